"""What nobody should do, and what happens then: the right result, a typed refusal, or damage that shows."""

from __future__ import annotations

import copy
import io
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jkv_compile import PackedCacheError, is_packed, jkv_backend, materialize

from ..caches import new_cache
from ..harness import BOUND, fresh_backend, relative_error, twins
from ..models import BufferAttention, SelfAttention

TOKENS, CHUNK = 32, 8

pytestmark = pytest.mark.filterwarnings("ignore::jkv_compile.PackedReadWarning")


def generated(model: nn.Module | None = None, chunks: int = 2) -> tuple[Any, Any, dict[str, Tensor], dict[str, Tensor]]:
    """A compiled model, its eager twin, and the cache of each after some chunks."""
    model = SelfAttention(heads=2) if model is None else model
    compiled, eager = twins(model, fresh_backend())
    ours, theirs = model.new_cache(1, TOKENS), model.new_cache(1, TOKENS)  # type: ignore[operator]
    with torch.no_grad():
        for start in range(0, chunks * CHUNK, CHUNK):
            x = torch.randn(1, CHUNK, 128)
            compiled(x, ours, start), eager(x, theirs, start)
    assert is_packed(ours["k"])
    return compiled, eager, ours, theirs


# ---- numbers ----


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_number_that_is_none_shows_in_every_result_that_attends_it_and_goes_with_it(bad: float) -> None:
    compiled, eager, ours, theirs = generated()
    with torch.no_grad():
        x = torch.randn(1, CHUNK, 128)
        x[0, 3, 5] = bad
        compiled(x, ours, 2 * CHUNK), eager(x, theirs, 2 * CHUNK)
        x = torch.randn(1, CHUNK, 128)
        assert compiled(x, ours, 3 * CHUNK).isnan().all() and eager(x, theirs, 3 * CHUNK).isnan().all()
        for start in (2 * CHUNK, 3 * CHUNK):  # written again
            x = torch.randn(1, CHUNK, 128)
            got, want = compiled(x, ours, start), eager(x, theirs, start)
        assert relative_error(got, want) < BOUND


@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_that_float16_cannot_hold_saturate(sign: int) -> None:
    cache, _ = new_cache()
    cache[:, 2:4] = torch.full((2, 2, 2, 64), sign * 1e5)
    cache._store.active = None
    assert (materialize(cache)[:, 2:4] * sign > 65000).all() and materialize(cache).isfinite().all()


def test_very_small_numbers_are_off_by_less_than_float16_resolves() -> None:
    cache, plain = new_cache()
    plain[:, :4] = torch.randn(2, 4, 2, 64) * 1e-7
    plain[:, 4:8] = 1e-42
    cache[:] = plain
    cache._store.active = None
    assert (materialize(cache)[:, :8] - plain[:, :8]).abs().max() < 2**-24


# ---- shapes and places ----


def test_empty_writes_change_nothing() -> None:
    cache, _ = new_cache()
    before = materialize(cache).clone()
    cache[:, 3:3] = torch.zeros(2, 0, 2, 64)
    cache[:, 16:] = torch.zeros(2, 0, 2, 64)
    cache[:, 5:5].zero_()
    assert torch.equal(materialize(cache), before)


OUT_OF_RANGE = {
    "slice": (lambda x: x.__setitem__((slice(None), slice(12, 20)), torch.zeros(2, 8, 2, 64)), "expanded size"),
    "narrow": (lambda x: x.narrow(1, 12, 8), "exceeds dimension size"),
    "select": (lambda x: x[:, 16], "out of bounds"),
    "shape": (lambda x: x[:, :4].copy_(torch.zeros(2, 4, 2, 63)), "must match"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_places_outside_of_the_cache_are_errors_as_torchs_and_change_nothing(name: str) -> None:
    act, message = OUT_OF_RANGE[name]
    cache, plain = new_cache()
    before = materialize(cache).clone()
    with pytest.raises((RuntimeError, IndexError), match=message):
        act(plain)
    with pytest.raises((RuntimeError, IndexError), match=message):
        act(cache)
    assert torch.equal(materialize(cache), before)


def test_a_chunk_beyond_the_end_is_an_error_in_compiled_code_and_the_cache_goes_on() -> None:
    compiled, eager, ours, theirs = generated()
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            compiled(torch.randn(1, CHUNK, 128), ours, TOKENS - 4)
        x = torch.randn(1, CHUNK, 128)
        assert relative_error(compiled(x, ours, 2 * CHUNK), eager(x, theirs, 2 * CHUNK)) < BOUND


@pytest.mark.parametrize("source", ["expanded", "steps", "transposed", "flipped"])
def test_sources_of_any_layout_are_written(source: str) -> None:
    cache, _ = new_cache()
    wide = torch.randn(2, 8, 4, 64)
    value = {
        "expanded": wide[:, :1, :2].expand(2, 4, 2, 64),
        "steps": wide[:, ::2, ::2],
        "transposed": wide.transpose(1, 2)[:, :, :2],
        "flipped": wide[:, :4, :2].flip(1),
    }[source]
    cache[:, 2:6] = value
    cache._store.active = None
    assert relative_error(materialize(cache)[:, 2:6], value) < BOUND


def test_an_empty_batch_gives_an_empty_result() -> None:
    model = SelfAttention(heads=2)
    compiled, _ = twins(model, fresh_backend())
    cache = model.new_cache(0, TOKENS)
    with torch.no_grad():
        for start in (0, CHUNK, 2 * CHUNK):
            assert compiled(torch.randn(0, CHUNK, 128), cache, start).shape == (0, CHUNK, 128)


RESIZES = {
    "resize_": lambda x: x.resize_(2, 32, 2, 64),
    "set_": lambda x: x.set_(torch.zeros(3)),
    ".data =": lambda x: setattr(x, "data", torch.zeros(3)),
}


@pytest.mark.parametrize("name", RESIZES)
def test_a_packed_cache_cannot_be_resized_and_says_so(name: str) -> None:
    cache, _ = new_cache()
    before = materialize(cache).clone()
    with pytest.raises(PackedCacheError, match="nothing was written"):
        RESIZES[name](cache)
    assert torch.equal(materialize(cache), before)


# ---- owners ----


def test_a_cache_of_two_models_is_one_cache() -> None:
    """Also where the second would pack at other bits: the cache stays what it is."""
    first, second = SelfAttention(heads=2), SelfAttention(heads=2)
    backends = fresh_backend(), jkv_backend(bits=4, inner="eager")
    compiled = [torch.compile(m, backend=b) for m, b in zip((first, second), backends)]
    eager = [copy.deepcopy(m) for m in (first, second)]
    ours, theirs = first.new_cache(1, TOKENS), first.new_cache(1, TOKENS)
    with torch.no_grad():
        for call in range(4):
            x = torch.randn(1, CHUNK, 128)
            got = compiled[call % 2](x, ours, call * CHUNK)
            assert relative_error(got, eager[call % 2](x, theirs, call * CHUNK)) < BOUND
    assert ours["k"]._store.bits == 8  # type: ignore[attr-defined]


def buffers() -> tuple[nn.Module, Any, nn.Module]:
    model = BufferAttention(tokens=TOKENS, heads=2)
    compiled, eager = twins(model, fresh_backend())
    with torch.no_grad():
        for start in (0, CHUNK):
            x = torch.randn(1, CHUNK, 128)
            compiled(x, start), eager(x, start)
    assert is_packed(model.cache_k)
    return model, compiled, eager


@pytest.mark.parametrize("change", ["half", "to"])
def test_a_module_with_packed_buffers_can_be_moved_and_cast(change: str) -> None:
    model, compiled, eager = buffers()
    for m in (model, eager):
        m.to("cpu") if change == "to" else getattr(m, change)()
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        x = torch.randn(1, CHUNK, 128, dtype=dtype)
        got, want = compiled(x, 2 * CHUNK), eager(x, 2 * CHUNK)
    assert got.dtype == want.dtype and relative_error(got, want) < 2 * BOUND
    assert is_packed(model.cache_k)


def test_a_module_with_packed_buffers_is_copied_and_its_state_loads_into_plain_and_packed_ones() -> None:
    model, _, _ = buffers()
    twin = copy.deepcopy(model)
    assert is_packed(twin.cache_k)
    twin.cache_k.zero_()
    assert materialize(model.cache_k).any(), "a copy stands alone"
    state = {"cache_k": model.cache_k, "cache_v": model.cache_v}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    plain = BufferAttention(tokens=TOKENS, heads=2)
    for target in (plain, twin):
        for name in state:
            target.register_buffer(name, getattr(target, name))  # persistent, so that states hold it
        target.load_state_dict(state, strict=False)
        assert torch.equal(materialize(target.cache_k), materialize(model.cache_k))
    assert is_packed(twin.cache_k) and not is_packed(plain.cache_k)


def test_a_cache_that_is_freed_between_calls_is_gone_and_the_next_is_packed() -> None:
    compiled, eager, ours, _ = generated()
    store = weakref.ref(ours["k"]._store)  # type: ignore[attr-defined]
    del ours
    assert store() is None
    fresh, reference = (SelfAttention(heads=2).new_cache(1, TOKENS) for _ in range(2))
    with torch.no_grad():
        x = torch.randn(1, CHUNK, 128)
        assert relative_error(compiled(x, fresh, 0), eager(x, reference, 0)) < BOUND
    assert is_packed(fresh["k"])


class Faulty(SelfAttention):
    """Fails in the middle of a call, when it is told to: between the write and the attention."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int, row: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        cache["k"][:, start:end] = k
        cache["v"][:, start:end] = v
        scale = torch.ones(4).index_select(0, row)  # fails for rows that are not there
        keys, values = cache["k"][:, :end].transpose(1, 2), cache["v"][:, :end].transpose(1, 2)
        return self.attend(q.transpose(1, 2) * scale, keys, values)


def test_an_exception_inside_a_call_says_that_caches_may_have_been_written() -> None:
    model = Faulty(heads=2)
    compiled, eager = twins(model, fresh_backend())
    ours, theirs = model.new_cache(1, TOKENS), model.new_cache(1, TOKENS)
    fine, missing = torch.tensor([1]), torch.tensor([9])
    with torch.no_grad(), warnings.catch_warnings():
        for start in (0, CHUNK):
            x = torch.randn(1, CHUNK, 128)
            compiled(x, ours, start, fine), eager(x, theirs, start, fine)
        before = materialize(ours["k"])[:, : 2 * CHUNK]
        x = torch.randn(1, CHUNK, 128)
        with pytest.raises((RuntimeError, IndexError)) as caught:
            compiled(x, ours, 2 * CHUNK, missing)
        assert any("jkv: raised inside a call that writes packed caches" in note for note in caught.value.__notes__)
        assert torch.equal(materialize(ours["k"])[:, : 2 * CHUNK], before), "what it does not write stays"
        got, want = compiled(x, ours, 2 * CHUNK, fine), eager(x, theirs, 2 * CHUNK, fine)
    assert relative_error(got, want) < BOUND
