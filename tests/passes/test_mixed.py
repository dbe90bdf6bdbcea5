"""Graphs in which some caches are packed and others are plain: those that come later, are ignored, or are no caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import jkv_compile
from jkv_compile import backend as backend_module
from jkv_compile import hints, is_packed, materialize

from ..harness import BOUND, fresh_backend, relative_error, run_beside, twins
from ..idioms.models import CHUNK, DIM, HEAD_DIM, HEADS, Projections, rope

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")
Cache = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _no_hints() -> Iterator[None]:
    yield
    hints._tensors.clear()


def new_cache(tokens: int = 64) -> Cache:
    return {name: torch.zeros(1, tokens, HEADS, HEAD_DIM) for name in ("k", "v")}


def past(tokens: int = 12) -> Cache:
    return {name: torch.randn(1, tokens, HEADS, HEAD_DIM) for name in ("k", "v")}


def copies(*caches: Cache | None) -> list[Cache | None]:
    return [None if c is None else {n: t.clone() for n, t in c.items()} for c in caches]


def all_packed(*caches: Cache) -> bool:
    return all(is_packed(t) for c in caches for t in c.values())


class OneCache(Projections):
    def forward(self, x: Tensor, cache: Cache, start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        cache["k"][:, start:end] = k
        cache["v"][:, start:end] = v
        return self.sdpa(q, cache["k"][:, :end], cache["v"][:, :end])


class Memory(Projections):
    """A cache, and what is attended beside it: a memory that is written too, or a past that is only read."""

    def __init__(self, write: bool, rope_on_read: bool = False) -> None:
        super().__init__()
        self.write, self.rope_on_read = write, rope_on_read

    def forward(self, x: Tensor, cache: Cache, memory: Cache | None, start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        cache["k"][:, start:end] = k
        cache["v"][:, start:end] = v
        keys, values = cache["k"][:, :end], cache["v"][:, :end]
        if memory is not None:
            old_k, old_v = memory["k"], memory["v"]
            if self.write:
                old_k[:, start:end] = -k
                old_v[:, start:end] = 2 * v
                old_k, old_v = old_k[:, :end], old_v[:, :end]
            old_k = rope(old_k) if self.rope_on_read else old_k
            keys, values = torch.cat([old_k, keys], 1), torch.cat([old_v, values], 1)
        return self.sdpa(q, keys, values)


@pytest.mark.parametrize("rope_on_read", [False, True], ids=["as it is", "turned after the read"])
@pytest.mark.parametrize("write", [True, False], ids=["written", "only read"])
def test_a_cache_that_is_born_later_is_packed_beside_one_that_is(write: bool, rope_on_read: bool) -> None:
    torch.manual_seed(0)
    compiled, eager = twins(Memory(write, rope_on_read), fresh_backend())
    cache, memory = new_cache(), new_cache() if write else past()
    reference, reference_memory = copies(cache, memory)

    def steps() -> Iterator[tuple[Tensor, Tensor]]:
        for call in range(8):
            x, late = torch.randn(1, CHUNK, DIM), call > 2
            arguments = [(cache, memory), (reference, reference_memory)]
            got, want = (
                model(x, c, m if late else None, call * CHUNK) for model, (c, m) in zip((compiled, eager), arguments)
            )
            yield got, want

    with torch.no_grad():
        run_beside(steps(), calls=8, stable_from=7)
    assert all_packed(cache, memory)


def test_a_past_beside_a_packed_cache_stays_plain_where_it_comes_once() -> None:
    torch.manual_seed(0)
    compiled, eager = twins(Memory(write=False), fresh_backend())
    cache = new_cache()
    (reference,) = copies(cache)
    pasts = []
    with torch.no_grad():
        for call in range(5):
            x, memory = torch.randn(1, CHUNK, DIM), past()
            pasts.append(memory)
            got, want = compiled(x, cache, memory, call * CHUNK), eager(x, reference, memory, call * CHUNK)
            assert relative_error(got, want) < BOUND
    assert all_packed(cache) and not any(is_packed(t) for p in pasts for t in p.values())


class Chunks(Projections):
    """The last chunks, each in tensors of its own."""

    def forward(self, x: Tensor, chunks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.project(x)
        keys, values = (torch.cat([*(c[i] for c in chunks), new], 1) for i, new in enumerate((k, v)))
        return self.sdpa(q, keys, values), (k.clone(), v.clone())


def test_of_a_list_of_chunks_those_that_come_again_are_packed() -> None:
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(Chunks(), backend)
    ours: list[tuple[Tensor, Tensor]] = []
    theirs: list[tuple[Tensor, Tensor]] = []

    def steps() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.randn(1, CHUNK, DIM)
            (got, new), (want, reference) = compiled(x, ours[-3:]), eager(x, theirs[-3:])
            ours.append(new)
            theirs.append(reference)
            yield got, want

    with torch.no_grad():
        run_beside(steps(), calls=9, stable_from=7)
    assert all(is_packed(t) for chunk in ours[:-2] for t in chunk)
    assert not any(is_packed(t) for chunk in ours[-2:] for t in chunk)  # attended once, or not at all
    assert len(backend.reports) <= 9


@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_and_values_of_which_one_is_ignored(name: str) -> None:
    """As where one of them was put in the place of a packed one: the other stays packed, and is read as a tensor."""
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(OneCache(), backend)
    cache = new_cache()
    (reference,) = copies(cache)
    with torch.no_grad():
        for call in range(6):
            if call == 2:
                cache[name] = materialize(cache[name])
                jkv_compile.ignore(cache[name])
            x = torch.randn(1, CHUNK, DIM)
            error = relative_error(compiled(x, cache, call * CHUNK), eager(x, reference, call * CHUNK))
            assert error < BOUND and (error > 0 or call == 0)
    assert [is_packed(cache[n]) for n in ("k", "v")] == [n != name for n in ("k", "v")]
    assert {r.kind.name for report in backend.reports for r in report.rejections} == {"IGNORED"}


def test_one_of_them_replaced_by_a_plain_tensor_is_packed_again() -> None:
    torch.manual_seed(0)
    compiled, eager = twins(OneCache(), fresh_backend())
    cache = new_cache()
    (reference,) = copies(cache)
    with torch.no_grad():
        for call in range(6):
            if call == 3:
                cache["v"] = materialize(cache["v"])
            x = torch.randn(1, CHUNK, DIM)
            assert relative_error(compiled(x, cache, call * CHUNK), eager(x, reference, call * CHUNK)) < BOUND
            assert all_packed(cache)


def test_a_cache_that_is_ignored_and_comes_late_runs_compiled_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations: list[Any] = []
    real = backend_module.compile_inner
    monkeypatch.setattr(backend_module, "compile_inner", lambda *args: compilations.append(args) or real(*args))
    torch.manual_seed(0)
    compiled, eager = twins(OneCache(), fresh_backend(bits=2))
    packed, ignored = new_cache(), new_cache()
    (reference,) = copies(ignored)
    jkv_compile.ignore(ignored["k"])
    with torch.no_grad():
        for call in range(3):
            compiled(torch.randn(1, CHUNK, DIM), packed, call * CHUNK)
        known = len(compilations)
        for call in range(6):
            x = torch.randn(1, CHUNK, DIM)
            got, want = compiled(x, ignored, call * CHUNK), eager(x, reference, call * CHUNK)
            torch.testing.assert_close(got, want)
            if call == 0:
                assert len(compilations) > known
                known = len(compilations)
    assert len(compilations) <= known + 1  # the position becomes dynamic
    assert all_packed(packed) and not any(map(is_packed, ignored.values()))


class TextByHand(OneCache):
    """Beside its cache, hand-written attention over the keys of a text, under a mask that hides all of a row."""

    def forward(self, x: Tensor, cache: Cache, start: int, text: Cache | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        assert text is not None
        q, keys, values = (t.transpose(1, 2) for t in (self.project(x)[0], text["k"], text["v"]))
        scores = (q @ keys.mT).masked_fill(torch.arange(x.shape[1])[:, None] == 0, torch.finfo(x.dtype).min)
        return super().forward(x, cache, start), (scores.softmax(-1) @ values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_that_stays_runs_exactly_as_it_is_spelled(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    compiled, eager = twins(TextByHand().to(dtype), fresh_backend())
    cache, text = ({n: t.to(dtype) for n, t in c.items()} for c in (new_cache(), past()))
    (reference,) = copies(cache)
    with torch.no_grad():
        for call in range(4):
            x = torch.randn(1, CHUNK, DIM, dtype=dtype)
            (got, got_text), (want, want_text) = (
                model(x, c, call * CHUNK, text) for model, c in ((compiled, cache), (eager, reference))
            )
            assert torch.equal(got_text, want_text)
            assert relative_error(got, want) < BOUND
    assert all_packed(cache) and not any(map(is_packed, text.values()))
