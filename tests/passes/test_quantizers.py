"""Graphs of rotated caches: every way of holding a cache that works with `rtn` works with `quarot` and `unbiased`."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor

from jkv_compile import NotRewrittenWarning, PackedCacheError
from jkv_compile.kernels import reference
from jkv_compile.kernels.quantizers import grid_of, rotate, round_unbiased

from ..caches import assert_same_bits, packed_data
from ..harness import fresh_backend, relative_error, rewritten, run_beside, twins
from ..idioms.test_idioms import CASES as IDIOMS
from ..models import BrokenAttention, SelfAttention
from .test_in_place_cache import CASES, CHUNK, generate

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")


@pytest.mark.parametrize("name", CASES)
def test_caches_in_slices_are_attended_closely(name: str) -> None:
    model, options = CASES[name]
    options = dict(options)
    batch, dtype = options.pop("batch", 1), options.pop("dtype", torch.float32)
    context, repeats = options.pop("context", torch.no_grad), options.pop("repeats", 1)
    stable_from, inner = options.pop("stable_from", 2), options.pop("inner", "eager")
    torch.manual_seed(0)
    backend = fresh_backend(inner=inner, quantizer="quarot")
    compiled, eager = twins(model.to(dtype), backend, **options)
    with context():
        cache, reference_cache = (model.new_cache(batch, 6 * CHUNK, dtype) for _ in range(2))  # type: ignore[operator]
        run_beside(generate(compiled, eager, cache, reference_cache, batch, dtype, repeats), 6 * repeats, stable_from)
    assert all(store.quantizer == "quarot" for store in backend._state.stores)
    assert backend.memory().adopted


@pytest.mark.parametrize("quantizer", ["quarot", "unbiased", "symmetric_unbiased"])
@pytest.mark.parametrize("name", IDIOMS)
def test_other_ways_of_holding_a_cache_are_attended_closely(name: str, quantizer: str) -> None:
    steps, stable_from = IDIOMS[name]
    torch.manual_seed(0)
    backend = fresh_backend(quantizer=quantizer)
    with torch.no_grad():
        generator = steps(backend)
        run_beside(generator, calls=10, stable_from=stable_from)
    assert all(
        store.quantizer in (quantizer, f"{quantizer}/groups", f"{quantizer}/pairs64") for store in backend._state.stores
    )
    assert backend.memory().adopted


@pytest.mark.parametrize("quantizer", ["quarot", "unbiased", "symmetric", "symmetric_unbiased"])
@pytest.mark.parametrize("correction", ["none", "taylor", "exact"])
@pytest.mark.parametrize("bits", [2, (4, 2)], ids=str)
def test_output_is_what_the_reference_computes(bits: Any, correction: str, quantizer: str) -> None:
    """The correction is that of the rotated query and the rotated key's steps; the current chunk has none."""
    torch.manual_seed(0)
    grid = grid_of(quantizer)
    turned = rotate if grid.rotates else lambda x: x
    backend = fresh_backend(bits=bits, correction=correction, quantizer=quantizer)
    model = SelfAttention(kv_heads=2)
    compiled = torch.compile(model, backend=backend)
    key_bits, value_bits = bits if isinstance(bits, tuple) else (bits, bits)
    cache = model.new_cache(1, 64)
    history: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for start in range(0, 40, CHUNK):
            x = 3 * torch.randn(1, CHUNK, 256)
            q, k, v = (turned(t.transpose(1, 2)) for t in model.project(x))
            got = compiled(x, cache, start)
            if history:
                old_k, old_v = (torch.cat(t, 2) for t in zip(*history))
                packed: list[Tensor] = []
                for x, b in ((old_k, key_bits), (old_v, value_bits)):
                    x = round_unbiased(rotate(x), b, 32, grid.symmetric) if grid.unbiased else x
                    packed += reference.quantize(x, b, 32, symmetric=grid.symmetric)
                o, _ = reference.attention(
                    q, *packed, [0, start], k, v, None, False, 1 / 8, key_bits, value_bits, correction
                )
                assert relative_error(got, model.out(turned(o).transpose(1, 2).flatten(2))) < 1e-4
            history.append((k, v))


class Filled(SelfAttention):
    """The chunk that will come next is set to a number before it is written."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        for name in ("k", "v"):
            cache[name][:, start + CHUNK : start + 2 * CHUNK].fill_(1.5)
        return super().forward(x, cache, start)


@pytest.mark.parametrize("quantizer", ["rtn", "quarot", "symmetric"])
def test_a_fill_in_the_graph_reads_as_the_constant(quantizer: str) -> None:
    backend = fresh_backend(bits=2, quantizer=quantizer)
    model = Filled()
    compiled = torch.compile(model, backend=backend)
    cache = model.new_cache(1, 48)
    with torch.no_grad():
        for start in (0, CHUNK, 2 * CHUNK):
            compiled(torch.randn(1, CHUNK, 256), cache, start)
    assert cache["k"]._store.quantizer == quantizer
    torch.testing.assert_close(cache["k"][:, 24:32].contiguous() + 0, torch.full((1, 8, 4, 64), 1.5), rtol=1e-3, atol=0)


def test_a_cache_that_is_filled_with_what_its_quantizer_cannot_hold_stays_as_it_is() -> None:
    backend = fresh_backend(bits=2, quantizer="symmetric_unbiased")
    compiled, eager = twins(Filled(), backend)
    caches = [eager.new_cache(1, 48) for _ in range(2)]
    why = "filled with 1.5, which quantizer='symmetric_unbiased' cannot hold"
    with torch.no_grad(), pytest.warns(NotRewrittenWarning, match=why):
        for start in (0, CHUNK, 2 * CHUNK):
            x = torch.randn(1, CHUNK, 256)
            torch.testing.assert_close(compiled(x, caches[0], start), eager(x, caches[1], start))
    assert not backend.memory().adopted


def test_a_packed_cache_is_not_filled_with_what_its_quantizer_cannot_hold() -> None:
    backend = fresh_backend(bits=2, quantizer="symmetric_unbiased")
    model = SelfAttention()
    cache, filled = model.new_cache(1, 48), Filled()
    compiled = [torch.compile(m, backend=backend) for m in (model, filled)]
    with torch.no_grad():
        for start in (0, CHUNK):
            compiled[0](torch.randn(1, CHUNK, 256), cache, start)
        before = packed_data(cache["k"])
        told = pytest.warns(NotRewrittenWarning, match="which quantizer='symmetric_unbiased' cannot hold")
        with told, pytest.raises(PackedCacheError, match="expected 0, the only constant"):
            compiled[1](torch.randn(1, CHUNK, 256), cache, 2 * CHUNK)
    assert_same_bits(packed_data(cache["k"]), before)
    assert backend.reports[-1].outcome == "eager"


class TestGraphs(expecttest.TestCase):
    def graph(self, model: SelfAttention, index: int = 0, quantizer: str = "quarot") -> str:
        backend = fresh_backend(bits=2, quantizer=quantizer)
        compiled = torch.compile(model, backend=backend)
        cache = model.new_cache(1, 64)
        with torch.no_grad():
            for call in range(3):
                compiled(torch.randn(1, CHUNK, 256), cache, call * CHUNK)
        return rewritten(backend, index=index)

    def test_slice_write_and_slice_read(self) -> None:
        self.assertExpectedInline(
            self.graph(SelfAttention()),
            """\
q = linear.view(1, 8, 4, 64)
view_1 = linear_1.view(1, 8, 2, 4, 64)
unbind = view_1.unbind(2)
k = unbind[0]
v = unbind[1]
add = add(l_start_, 8)
permute = k.permute([0, 2, 1, 3])
rotate_default = jkv::rotate(permute)
permute_1 = v.permute([0, 2, 1, 3])
rotate_default_1 = jkv::rotate(permute_1)
jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, rotate_default, rotate_default_1, l_start_, 2, 2)
transpose_2 = q.transpose(1, 2)
permute_2 = k.permute([0, 2, 1, 3])
permute_3 = v.permute([0, 2, 1, 3])
rotate_default_2 = jkv::rotate(transpose_2)
rotate_default_3 = jkv::rotate(permute_2)
rotate_default_4 = jkv::rotate(permute_3)
attention_default = jkv::attention(rotate_default_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, l_start_], rotate_default_3, rotate_default_4, None, False, 0.125, 2, 2, 'taylor')
rotate_default_5 = jkv::rotate(attention_default)
transpose_3 = rotate_default_5.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear_2)
""",
        )

    def test_attention_after_a_break(self) -> None:
        self.assertExpectedInline(
            self.graph(BrokenAttention(), index=1),
            """\
transpose = l_q_.transpose(1, 2)
add = add(-2, l_keys__first_token)
add_1 = add(-2, s22)
add_2 = add(add_1, l_keys__first_token)
rotate_default = jkv::rotate(transpose)
new_empty_default = aten::new_empty(rotate_default, [1, 4, 0, 64])
new_empty_default_1 = aten::new_empty(rotate_default, [1, 4, 0, 64])
rotate_default_1 = jkv::rotate(l_keys__active)
rotate_default_2 = jkv::rotate(l_values__active)
attention_active_default = jkv::attention_active(rotate_default, l_keys__codes, l_keys__scales, l_values__codes, l_values__scales, rotate_default_1, l_keys__active_range, rotate_default_2, l_values__active_range, add, add_2, new_empty_default, new_empty_default_1, None, False, 0.125, 2, 2, 'taylor')
rotate_default_3 = jkv::rotate(attention_active_default)
transpose_3 = rotate_default_3.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear)
""",
        )

    def test_what_is_written_is_rounded_first(self) -> None:
        lines = self.graph(SelfAttention(), quantizer="unbiased").splitlines()
        self.assertExpectedInline(
            "\n".join(line for line in lines if "append" in line or "round" in line),
            """\
round_unbiased_default = jkv::round_unbiased(permute, 2, 32)
round_unbiased_default_1 = jkv::round_unbiased(permute_1, 2, 32)
jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, round_unbiased_default, round_unbiased_default_1, l_start_, 2, 2)""",
        )
