"""Keys that are quantized by channel, over blocks of tokens (`quantizer="kivi"`, arXiv 2402.02750)."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor

import jkv_compile.distributed as parallel
from jkv_compile import (
    Config,
    ConfigurationError,
    NotRewrittenWarning,
    PackedCacheError,
    PackedKV,
    PackedReadWarning,
    explain,
    is_packed,
    jkv_backend,
    materialize,
    quantization_step,
)
from jkv_compile.adopt import adopt
from jkv_compile.flat import pack_bytes, unpack_bytes
from jkv_compile.kernels import reference
from jkv_compile.store import rebuild_store

from .caches import assert_held_exactly, assert_same_bits
from .harness import fresh_backend, relative_error, rewritten, run_beside, watch_memory
from .idioms.cases import CASES
from .idioms.models import RollingCache, TwoCaches
from .models import BrokenAttention, BufferAttention, ItemAttention, Network, SelfAttention

BLOCK = 32
HEADS, HEAD_DIM = 4, 64


# ---- what it is to be, by brute force ----


def canonical(x: Tensor, layout: str) -> Tensor:
    """A cache as `[B, H, S, D]`."""
    return x.transpose(1, 2) if layout == "bshd" else x


def in_whole_blocks(keys: Tensor, block: int = BLOCK) -> Tensor:
    """Keys `[B, H, S, D]`, the last of them repeated until blocks are whole."""
    beyond = keys[:, :, -1:].expand(-1, -1, -keys.shape[2] % block, -1)
    return torch.cat((keys, beyond), 2)


def read(keys: Tensor, bits: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """What keys `[B, H, S, D]` that are quantized once read as, and Δ of each."""
    codes, scales = reference.quantize(in_whole_blocks(keys, block), bits, 1, block)
    n, step = keys.shape[2], reference.quantization_step(reference.per_token(scales, codes.shape[2]), bits)
    return reference.dequantize(codes, scales, bits)[:, :, :n], step[:, :, :n]


def simulated(
    model: SelfAttention, x: Tensor, plain: dict[str, Tensor], start: int, bits: int, correction: str = "taylor",
    recent: int = BLOCK - 1, sink: int = 0,
) -> Tensor:  # fmt: skip
    """The model's output, where `plain` holds all tokens in full precision, those of this chunk among them.

    Everything is quantized once, of the history; only whole blocks are, and not what is held in full precision.
    """
    q, _, _ = model.project(x)
    q, stop = q.transpose(1, 2), start + x.shape[1]
    k, v = (canonical(plain[name], model.layout)[:, :, :stop] for name in ("k", "v"))
    quantized_k, delta = read(k, bits)
    quantized_v = reference.dequantize(*reference.quantize(v, bits, BLOCK), bits)
    tokens = torch.arange(stop)
    exact = (tokens < sink) | (tokens >= start - recent)
    assert start - start % BLOCK >= start - recent  # what is not is in whole blocks
    k = torch.where(exact[:, None], k, quantized_k)
    v = torch.where(exact[:, None], v, quantized_v)
    delta = delta.masked_fill(exact[:, None], 0)
    repeats = model.heads // model.kv_heads
    k, v, delta = (t.repeat_interleave(repeats, 1) for t in (k, v, delta))
    scale = model.head_dim**-0.5
    scores = scale * q @ k.mT - reference.correction_bias(q, delta, scale, correction)
    return model.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def chunks(tokens: int, length: int, repeats: int) -> Iterator[tuple[int, int]]:
    """Where chunks begin and end; each is written so many times."""
    for start in range(0, tokens, length):
        yield from [(start, min(start + length, tokens))] * repeats


@pytest.mark.parametrize("model, batch, settings", [
    (SelfAttention(), 1, {}),
    (SelfAttention(layout="bhsd"), 3, {}),
    (SelfAttention(kv_heads=2), 2, {"correction": "clamped"}),
    (SelfAttention(kv_heads=1, layout="bhsd"), 2, {"correction": "exact"}),
    (SelfAttention(), 2, {"correction": "none"}),
    (SelfAttention(kv_heads=2), 2, {"sink": 4, "recent": 36}),
    (BrokenAttention(), 1, {}),
    (SelfAttention(), 1, {"inner": "inductor"}),
], ids=["plain", "heads first, batch", "grouped, clamped", "one head, exact", "none", "window", "broken", "inductor"])  # fmt: skip
@pytest.mark.parametrize("length, repeats", [(8, 1), (12, 3), (32, 2), (40, 1), (72, 2)])
def test_two_bits_are_what_brute_force_computes(
    model: SelfAttention, batch: int, settings: dict[str, Any], length: int, repeats: int
) -> None:
    """Chunks that are no multiples of a block, written again and again; nothing compiles from the third place on."""
    torch.manual_seed(0)
    tokens = 8 * length + 3 if length < 40 else 3 * length
    backend = fresh_backend(bits=2, quantizer="kivi", **settings)
    compiled = torch.compile(model, backend=backend)
    cache, plain = model.new_cache(batch, tokens), model.new_cache(batch, tokens)
    freed = watch_memory(list(cache.values()))
    window = {"recent": max(settings.get("recent", 0), BLOCK - 1), "sink": settings.get("sink", 0)}
    correction, errors = settings.get("correction", "taylor"), []
    with torch.no_grad():
        for call, (start, stop) in enumerate(chunks(tokens - tokens % length, length, repeats)):
            x = 2 * torch.randn(batch, stop - start, HEADS * HEAD_DIM)
            with torch.compiler.set_stance("fail_on_recompile" if call > 2 * repeats else "default"):
                got = compiled(x, cache, start)
            full = model(x, plain, start)
            want = simulated(model, x, plain, start, 2, correction, **window)
            assert relative_error(got, want) < 1e-5
            errors.append(relative_error(got, full))
            if start <= window["recent"]:
                assert errors[-1] < 1e-5  # nothing of this is quantized
    assert max(errors) > 1e-3
    assert freed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [7, 16, 32, 45])
def test_blocks_are_quantized_once_of_what_was_written(length: int, dtype: torch.dtype) -> None:
    """However often chunks are written: bit for bit, up to the end of a cache that is no multiple of a block."""
    torch.manual_seed(0)
    model, tokens = SelfAttention(kv_heads=2).to(dtype), 6 * length
    compiled = torch.compile(model, backend=fresh_backend(bits=2, quantizer="kivi"))
    cache, plain = model.new_cache(2, tokens, dtype), model.new_cache(2, tokens, dtype)
    with torch.no_grad():
        for start, stop in chunks(tokens, length, 3):
            x = torch.randn(2, stop - start, HEADS * HEAD_DIM, dtype=dtype) * (1 + 100 * (stop < tokens))
            compiled(x, cache, start)
            model(x, plain, start)
            store = cache["k"]._store
            codes, scales = reference.quantize(in_whole_blocks(plain["k"].transpose(1, 2)), 2, 1, BLOCK)
            whole = stop - stop % BLOCK
            got = store.codes[:, :, :whole], store.scales[:, :, :, : whole // BLOCK].contiguous()
            assert_same_bits(got, (codes[:, :, :whole], scales[:, :, :, : whole // BLOCK].contiguous()))
            assert_held_exactly(cache["k"], plain["k"].transpose(1, 2))
    assert_same_bits(store.data(), (codes, scales))


@pytest.mark.parametrize("model", [
    BufferAttention(tokens=96), Network(), ItemAttention(), SelfAttention(window=50), SelfAttention(head_dim=96),
], ids=["buffers", "layers", "item", "read window", "head_dim 96"])  # fmt: skip
@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")
def test_caches_in_slices_stay_close_to_eager(model: Any) -> None:
    torch.manual_seed(0)
    backend, eager = fresh_backend(quantizer="kivi"), copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    layer = model.layers[0] if isinstance(model, Network) else model
    states = [[] if isinstance(model, BufferAttention) else [model.new_cache(2, 96)] for _ in range(2)]

    def steps() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 96, 12):
            x = torch.randn(1 if isinstance(model, BufferAttention) else 2, 12, layer.heads * layer.head_dim)
            yield compiled(x, *states[0], start), eager(x, *states[1], start)

    with torch.no_grad():
        run_beside(steps(), 8, 2)
    assert {s.quantizer for s in backend._state.stores} == {"kivi", "rtn"}


def test_memory_is_counted_byte_by_byte() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, quantizer="kivi")
    model = SelfAttention(kv_heads=2).bfloat16()
    compiled, cache = torch.compile(model, backend=backend), model.new_cache(2, 200, torch.bfloat16)
    with torch.no_grad():
        for start in (0, 40):
            compiled(torch.randn(2, 40, 256).bfloat16(), cache, start)
    rows = 2 * 2 * 2 * (BLOCK - 1) * HEAD_DIM * 2  # before this chunk and before the next, of each cache
    keys = 2 * 2 * 224 * HEAD_DIM // 4 + 2 * 2 * HEAD_DIM * 7 * 4  # in seven blocks
    values = 2 * 2 * 200 * (HEAD_DIM // 4 + HEAD_DIM // 32 * 4)
    memory = backend.memory()
    assert memory.held_bytes == 2 * rows
    assert memory.packed_bytes == keys + values + 2 * rows
    explained = next(r for r in backend.reports if r.outcome == "adopted")
    assert [use.packed_bytes for m in explained.matches for use in m.caches] == [keys + rows, values + rows]
    assert [use.recent for m in explained.matches for use in m.caches] == [BLOCK - 1] * 2


class TestGraph(expecttest.TestCase):
    def test_keys_are_appended_to_blocks_and_values_to_tokens(self) -> None:
        torch.manual_seed(0)
        backend = fresh_backend(bits=2, quantizer="kivi")
        model = SelfAttention(kv_heads=2)
        compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 40)
        with torch.no_grad():
            for start in (0, 8, 16):
                compiled(torch.randn(1, 8, 256), cache, start)
        self.assertExpectedInline(rewritten(backend), """\
q = linear.view(1, 8, 4, 64)
view_1 = linear_1.view(1, 8, 2, 2, 64)
unbind = view_1.unbind(2)
k = unbind[0]
v = unbind[1]
add = add(l_start_, 8)
permute = k.permute([0, 2, 1, 3])
jkv::append_blocks(l_cache_k__codes, l_cache_k__scales, [l_cache_k__held], [l_cache_k__held_ranges], permute, l_start_, 40, 2)
permute_1 = k.permute([0, 2, 1, 3])
jkv::hold(l_cache_k__held, l_cache_k__held_ranges, permute_1, l_start_)
permute_2 = v.permute([0, 2, 1, 3])
jkv::append(l_cache_v__codes, l_cache_v__scales, permute_2, l_start_, 2)
permute_3 = v.permute([0, 2, 1, 3])
jkv::hold(l_cache_v__held, l_cache_v__held_ranges, permute_3, l_start_)
transpose_2 = q.transpose(1, 2)
permute_4 = k.permute([0, 2, 1, 3])
permute_5 = v.permute([0, 2, 1, 3])
attention_held_default = jkv::attention_held(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [l_cache_k__held], [l_cache_k__held_ranges], [l_cache_v__held], [l_cache_v__held_ranges], [0, l_start_], permute_4, permute_5, None, False, 0.125, 2, 2, 'taylor')
transpose_3 = attention_held_default.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear_2)
""")


# ---- graphs that are refused ----


PACKED = (
    "eviction by rolling, with a sink", "a fixed past, concatenated",
    "a copy edited and attended, written back in the graph", "a copy edited and attended, written back in eager code",
    "a concatenation of sink, window and current chunk", "buffers allocated in the first forward",
    "buffers of two guidance branches, chosen ranges",
)  # fmt: skip
REFUSED = {
    "a fixed past, turned after the read": "not attended as they are in the cache",
    "a fixed past, turned in halves after the read": "not attended as they are in the cache",
    "a fixed past, its batch doubled": "not attended as they are in the cache",
    "a fixed past of two parts": "not attended as they are in the cache",
    "a concatenation that grows and is returned": "joined with new tokens and returned",
    "keys beside values in one tensor": "keys and values lie in one tensor",
    "keys and values stacked, written by another graph": "keys and values lie in one tensor",
    "keys and values stacked, batch of two": "keys and values lie in one tensor",
    "two caches, concatenated": "not attended as they are in the cache",
    "two caches, turned after the read": "not attended as they are in the cache",
    "a whole buffer under a boolean mask": "written at places that a tensor holds",
    "a whole buffer under an additive mask": "written at places that a tensor holds",
    "a whole buffer, heads repeated": "written at places that a tensor holds",
    "a buffer rolled and copied back": "expected numbers of tokens that 32 divides, not 8",
    "a buffer shifted by cat and copied back": "expected numbers of tokens that 32 divides, not 8",
    "a concatenation of sink, pinned chunk, window and current, the sink turned": "not attended as they are",
}


def test_every_way_of_holding_a_cache_is_told_of() -> None:
    assert {*PACKED, *REFUSED} == {*CASES}


@pytest.mark.parametrize("name", [name for name in PACKED if "rolling" not in name and "fixed" not in name])
@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning", "error::jkv_compile.PackedReadWarning")
def test_idioms_that_are_packed_stay_close_to_eager(name: str) -> None:
    steps, stable_from = CASES[name]
    torch.manual_seed(0)
    backend = fresh_backend(quantizer="kivi", group_size=16)
    with torch.no_grad():
        generator = steps(backend)  # holds the caches
        run_beside(generator, 18, stable_from + 1)
    assert {s.quantizer for s in backend._state.stores} == {"kivi", "rtn"}


@pytest.mark.parametrize("name", REFUSED)
def test_idioms_that_are_not_run_as_written_and_say_why(name: str) -> None:
    steps, _ = CASES[name]
    torch.manual_seed(0)
    backend = fresh_backend(quantizer="kivi", bits=2)
    with torch.no_grad(), pytest.warns(NotRewrittenWarning, match=REFUSED[name]):
        generator = steps(backend)
        errors = [relative_error(*next(generator)) for _ in range(6)]
    assert max(errors) < 1e-5
    assert not backend.memory().adopted
    reasons = [r.reason for report in backend.reports for r in report.rejections]
    assert any("quantizer='kivi' quantizes keys by channel" in reason for reason in reasons)
