"""Keys that are quantized by channel, over blocks of tokens (`quantizer="kivi"`, arXiv 2402.02750)."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
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
from jkv_compile.snapshot import taken_back
from jkv_compile.store import rebuild_store

from .caches import assert_held_exactly, assert_same_bits
from .harness import fresh_backend, relative_error, rewritten, run_beside, twins, watch_memory
from .idioms.cases import CASES
from .idioms.models import FixedPast, RollingCache, TwoCaches
from .models import BrokenAttention, SelfAttention
from .passes.test_in_place_cache import CASES as IN_PLACE
from .passes.test_in_place_cache import CHUNK, generate

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
    recent: int = BLOCK - 1, sink: int = 0, block: int = BLOCK,
) -> Tensor:  # fmt: skip
    """The model's output, where `plain` holds all tokens in full precision, those of this chunk among them.

    Everything is quantized once, of the history; only whole blocks are, and not what is held in full precision.
    """
    q, _, _ = model.project(x)
    q, stop = q.transpose(1, 2), start + x.shape[1]
    k, v = (canonical(plain[name], model.layout)[:, :, :stop] for name in ("k", "v"))
    quantized_k, delta = read(k, bits, block)
    quantized_v = reference.dequantize(*reference.quantize(v, bits, BLOCK), bits)
    tokens = torch.arange(stop)
    exact = (tokens < sink) | (tokens >= start - recent)
    assert start - start % block >= start - recent  # what is not is in whole blocks
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


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning", "error::jkv_compile.PackedReadWarning")
def test_caches_in_slices_stay_close_to_eager(name: str) -> None:
    model, options = IN_PLACE[name]
    options = dict(options)
    batch, dtype = options.pop("batch", 1), options.pop("dtype", torch.float32)
    context, repeats = options.pop("context", torch.no_grad), options.pop("repeats", 1)
    stable_from, inner = options.pop("stable_from", 2), options.pop("inner", "eager")
    torch.manual_seed(0)
    backend = fresh_backend(inner=inner, quantizer="kivi", group_size=16)
    compiled, eager = twins(model.to(dtype), backend, **options)
    with context():
        cache, reference_cache = (model.new_cache(batch, 6 * CHUNK, dtype) for _ in range(2))  # type: ignore[operator]
        steps = generate(compiled, eager, cache, reference_cache, batch, dtype, repeats)
        run_beside(steps, 6 * repeats, stable_from)
    assert {s.quantizer for s in backend._state.stores} == {"kivi", "rtn"}


def test_caches_that_eager_code_writes_and_slices() -> None:
    """They are known from the slices that come to attention."""

    def step(x: Tensor, cache: dict[str, Tensor], start: int, attend: Callable[..., Tensor]) -> Tensor:
        q, k, v = model.project(x)
        stop = start + x.shape[1]
        cache["k"][:, start:stop], cache["v"][:, start:stop] = k, v
        return attend(q.transpose(1, 2), *(cache[name][:, :stop].transpose(1, 2) for name in ("k", "v")))

    torch.manual_seed(0)
    model, backend = SelfAttention(kv_heads=2), fresh_backend(bits=2, quantizer="kivi")
    compiled, cache, plain = (
        torch.compile(model.attend, backend=backend),
        model.new_cache(2, 96),
        model.new_cache(2, 96),
    )
    with torch.no_grad():
        for start in range(0, 96, 12):
            x = torch.randn(2, 12, 256)
            got, _ = step(x, cache, start, compiled), step(x, plain, start, model.attend)
            assert relative_error(got, simulated(model, x, plain, start, 2)) < 1e-5
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
        self.assertExpectedInline(
            rewritten(backend),
            """\
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
""",
        )


# ---- graphs that are refused ----


PACKED = (
    "eviction by rolling, with a sink", "a fixed past, concatenated",
    "a copy edited and attended, written back in the graph", "a copy edited and attended, written back in eager code",
    "a concatenation of sink, window and current chunk", "buffers allocated in the first forward",
    "buffers of two guidance branches, chosen ranges", "a fixed past, turned after the read",
    "a fixed past, turned in halves after the read", "a fixed past, its batch doubled", "a fixed past of two parts",
    "two caches, concatenated", "two caches, turned after the read",
    "a concatenation of sink, pinned chunk, window and current, the sink turned",
)  # fmt: skip
REFUSED = {
    "a concatenation that grows and is returned": "joined with new tokens and returned",
    "a concatenation that grows and is returned without its last tokens": "joined with new tokens and returned",
    "keys beside values in one tensor": "lie in one tensor",
    "keys and values stacked, written by another graph": "lie in one tensor",
    "keys and values stacked, batch of two": "lie in one tensor",
    "a whole buffer under a boolean mask": "written at places that a tensor holds",
    "a whole buffer under an additive mask": "written at places that a tensor holds",
    "a whole buffer, heads repeated": "written at places that a tensor holds",
    "a buffer rolled and copied back": "expected numbers of tokens that 32 divides, not 8",
    "a buffer shifted by cat and copied back": "expected numbers of tokens that 32 divides, not 8",
}


def test_every_way_of_holding_a_cache_is_told_of() -> None:
    assert {*PACKED, *REFUSED} == {*CASES}


@pytest.mark.parametrize(
    "name", [name for name in PACKED if "rolling" not in name and name != "a fixed past, concatenated"]
)
@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning", "error::jkv_compile.PackedReadWarning")
def test_idioms_that_are_packed_stay_close_to_eager(name: str) -> None:
    steps, stable_from = CASES[name]
    torch.manual_seed(0)
    backend = fresh_backend(quantizer="kivi", group_size=8 if "fixed" in name or "pinned" in name else 16)
    with torch.no_grad():
        generator = steps(backend)  # holds the caches
        run_beside(generator, 6 if "fixed" in name else 18, stable_from + 1)
    assert all("not corrected" not in match.lowering for report in backend.reports for match in report.matches)
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


@pytest.mark.parametrize("kind", [SelfAttention, BrokenAttention])
def test_keys_that_are_attended_in_eager_code_of_another_graph_are_corrected(kind: type[SelfAttention]) -> None:
    """A graph break between the read of keys and their attention, which only turned keys would mind."""

    class Turned(SelfAttention):
        def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
            q, k, v = self.project(x)
            end = start + x.shape[1]
            cache["k"][:, start:end], cache["v"][:, start:end] = k, v
            keys, values = cache["k"][:, :end] * 2.0, cache["v"][:, :end] * 1.0
            torch._dynamo.graph_break()
            return self.attend(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))

    torch.manual_seed(0)
    backend, model = fresh_backend(bits=2, quantizer="kivi"), Turned()
    compiled, cache, plain = torch.compile(model, backend=backend), model.new_cache(1, 64), model.new_cache(1, 64)
    with torch.no_grad(), pytest.warns(NotRewrittenWarning, match="attended in another graph"):
        for start in range(0, 64, 8):
            x = torch.randn(1, 8, 256)
            assert relative_error(compiled(x, cache, start), model(x, plain, start)) < 1e-5
    assert not is_packed(cache["k"])


def test_a_fixed_past_is_quantized_once() -> None:
    torch.manual_seed(0)
    model = FixedPast()
    backend = fresh_backend(bits=2, quantizer="kivi")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        past = model.produce(torch.randn(1, 150, 64))
    k, v = (t.clone() for t in past)
    codes_k, codes_v = read(k, 2)[0], reference.dequantize(*reference.quantize(v, 2, 32), 2)
    delta = read(k, 2)[1]
    exact = (torch.arange(150) >= 150 - 31)[:, None]
    k, v, delta = torch.where(exact, k, codes_k), torch.where(exact, v, codes_v), delta.masked_fill(exact, 0)
    with torch.no_grad():
        for call in range(5):
            x = 2 * torch.randn(1, 8, 64)
            with torch.compiler.set_stance("fail_on_recompile" if call > 2 else "default"):
                got = compiled(x, past)
            q, new_k, new_v = (t.transpose(1, 2) for t in model.project(x))
            scores = 32**-0.5 * q @ torch.cat((k, new_k), 2).mT
            scores[..., :150] -= reference.correction_bias(q, delta, 32**-0.5, "taylor")
            want = model.out((scores.softmax(-1) @ torch.cat((v, new_v), 2)).transpose(1, 2).flatten(2))
    assert is_packed(past[0]) and past[0]._store.quantizer == "kivi"
    assert relative_error(got, want) < 1e-5


# ---- moves ----


def test_whole_blocks_roll_bit_for_bit() -> None:
    """Whoever rolls by a multiple of a block loses nothing by it, however often."""
    torch.manual_seed(0)
    block = 8
    model = RollingCache(sink=8, tokens=48)
    compiled = torch.compile(model, backend=fresh_backend(bits=2, quantizer="kivi", group_size=block))
    cache, plain = model.new_cache(), model.new_cache()
    with torch.no_grad():
        for call in range(14):
            x = torch.randn(1, 8, 64)
            with torch.compiler.set_stance("fail_on_recompile" if call > 7 else "default"):
                compiled(x, cache, 8 * call)
            model(x, plain, 8 * call)
            codes, scales = reference.quantize(plain["k"].transpose(1, 2), 2, 1, block)
            stop = min(48, 8 * call + 8)
            store = cache["k"]._store
            assert_same_bits(
                (store.codes[:, :, :stop], store.scales[:, :, :, : stop // block].contiguous()),
                (codes[:, :, :stop], scales[:, :, :, : stop // block].contiguous()),
            )
            assert_held_exactly(cache["k"], plain["k"].transpose(1, 2))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("sink, tokens", [(8, 44), (4, 48)])
def test_other_rolls_are_refused_before_anything_is_moved(sink: int, tokens: int, inner: str) -> None:
    torch.manual_seed(0)
    model = RollingCache(sink=sink, tokens=tokens)
    compiled = torch.compile(model, backend=fresh_backend(bits=2, quantizer="kivi", group_size=8, inner=inner))
    cache = model.new_cache()
    with torch.no_grad():
        for call in range(tokens // 8):
            compiled(torch.randn(1, 8, 64), cache, 8 * call)
        before = materialize(cache["k"])
        with pytest.raises(PackedCacheError, match=r"must be multiples of 8, .* choose another quantizer"):
            compiled(torch.randn(1, 8, 64), cache, 8 * (tokens // 8))
    assert torch.equal(materialize(cache["k"]), before)


# ---- eager code ----


def kivi_cache(
    tokens: int = 40, bits: int = 8, dtype: torch.dtype = torch.float32, **window: int
) -> tuple[Any, Tensor]:
    """A packed cache of keys `[B, H, S, D]`, and the plain tensor that it was made from."""
    torch.manual_seed(0)
    plain = torch.randn(2, 2, tokens, 64).to(dtype)
    cache = plain.clone()
    adopt(cache, (0, 1, 2, 3), bits, Config(bits, group_size=16, quantizer="kivi", **window))
    return cache, plain


def close(packed: Tensor, plain: Tensor) -> None:
    assert packed.shape == plain.shape and packed.dtype == plain.dtype
    assert (materialize(packed) - plain).abs().max() < 0.05


def test_reads_are_of_whole_blocks_that_are_quantized_once() -> None:
    packed, plain = kivi_cache(bits=2)
    want, delta = read(plain, 2, 16)
    exact = (torch.arange(40) >= 40 - 15)[:, None]
    want, delta = torch.where(exact, plain, want), delta.masked_fill(exact, 0)
    assert torch.equal(materialize(packed), want)
    for part in (slice(0, 40), slice(3, 9), slice(15, 33), slice(32, 40), slice(5, 5)):
        assert torch.equal(materialize(packed[:, :, part]), want[:, :, part])
        assert torch.equal(quantization_step(packed[1:, :, part]), delta[1:, :, part])
    assert torch.equal(materialize(packed[1, 1, 7]), want[1, 1, 7])
    assert torch.equal(materialize(packed[..., 3:5]), want[..., 3:5])
    with pytest.raises(PackedCacheError, match="for whole heads"):
        packed[..., 3:5] = 0


def test_the_first_tokens_of_a_cache_that_is_packed_when_it_is_full_are_held() -> None:
    packed, plain = kivi_cache(bits=2, sink=6)
    assert assert_held_exactly(packed, plain) == [*range(6), *range(25, 40)]


def test_adoption_of_long_caches_quantizes_every_block_once() -> None:
    """In parts, none of which ends inside of a block."""
    torch.manual_seed(0)
    plain = torch.randn(1, 1, 4200, 48)
    cache = plain.clone()
    store = adopt(cache, (0, 1, 2, 3), 2, Config(group_size=24, quantizer="kivi"))
    assert_same_bits(store.data(), reference.quantize(in_whole_blocks(plain, 24), 2, 1, 24))


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "some tokens": lambda x, new: x[:, :, 5:11].copy_(new[:, :, 5:11]),
    "a token": lambda x, new: x[:, :, 7].copy_(new[:, :, 7]),
    "a block": lambda x, new: x[:, :, 16:32].copy_(new[:, :, 16:32]),
    "the last tokens": lambda x, new: x[:, :, 30:].copy_(new[:, :, 30:]),
    "all": lambda x, new: x.copy_(new),
    "zeros": lambda x, _: x.zero_(),
    "a number": lambda x, _: x[:, :, 3:30].fill_(1.5),
    "an entry": lambda x, new: x[1, :, 3:7].copy_(new[1, :, 3:7]),
    "a head": lambda x, new: x[:, 1:, 3:7].copy_(new[:, 1:, 3:7]),
    "places that follow one another": lambda x, new: x.index_copy_(2, torch.arange(9, 14), new[:, :, 9:14]),
    "entries": lambda x, new: x.index_copy_(0, torch.tensor([1, 0]), new),
    "a block moved down": lambda x, _: x[:, :, :16].copy_(x[:, :, 16:32]),
    "a block moved up": lambda x, _: x[:, :, 16:32].copy_(x[:, :, :16]),
    "a block moved by a copy": lambda x, _: x[:, :, :16].copy_(x[:, :, 16:32].clone()),
    "the end moved": lambda x, _: x[:, :, 32:].copy_(x[:, :, :8]),
    "an entry moved": lambda x, _: x[:1].copy_(x[1:]),
    "itself": lambda x, _: x.copy_(x.clone()),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("window", [{}, {"sink": 6, "recent": 20}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("error::jkv_compile.PackedReadWarning")
def test_eager_writes(name: str, window: dict[str, int], dtype: torch.dtype) -> None:
    packed, plain = kivi_cache(dtype=dtype, **window)
    for _ in range(3):
        new = torch.randn(2, 2, 40, 64).to(dtype)
        for x in (packed, plain):
            WRITES[name](x, new)
        close(packed, plain)
        assert_held_exactly(packed, plain)


@pytest.mark.parametrize("seed", range(8))
def test_random_eager_writes_leave_nothing_stale(seed: int) -> None:
    rng = random.Random(seed)
    packed, plain = kivi_cache(sink=rng.choice((0, 6)), recent=rng.choice((0, 20)))
    for _ in range(12):
        n = rng.randint(1, 20)
        start, new = rng.randint(0, 40 - n), torch.randn(2, 2, 40, 64)
        for x in (packed, plain):
            x[:, :, start : start + n] = new[:, :, start : start + n]
        name = rng.choice([*WRITES])
        for x in (packed, plain):
            WRITES[name](x, new)
        if rng.random() < 0.2:
            packed = COPIES[rng.choice([*COPIES])](packed)
        assert (materialize(packed) - plain).abs().max() < 0.2
        assert_held_exactly(packed, plain)


def test_zeros_and_other_numbers_are_exact_where_they_fill_blocks() -> None:
    packed, _ = kivi_cache(bits=2)
    packed[:, :, :32].fill_(-3.25)
    assert (materialize(packed[:, :, :32]) == -3.25).all()
    packed[:, :, 16:].zero_()
    assert not materialize(packed[:, :, 16:]).any() and (materialize(packed[:, :, :16]) == -3.25).all()
    packed.zero_()
    assert not materialize(packed).any() and not quantization_step(packed).any()


def _saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES: dict[str, Callable[[Any], Any]] = {
    "clone": torch.clone,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "bytes": lambda x: unpack_bytes(pack_bytes(x)),
    "save": _saved,
    "to": lambda x: x.to("cpu", copy=True),
    "cat of entries": lambda x: torch.cat([x[:1], x[1:]]),
    "cat of heads": lambda x: torch.cat([x[:, :1], x[:, 1:]], 1),
    "index_select": lambda x: x.index_select(0, torch.tensor([0, 1])),
    "index": lambda x: x[torch.tensor([0, 1])],
    "contiguous": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("tokens", [32, 40])
@pytest.mark.filterwarnings("error::jkv_compile.PackedReadWarning")
def test_copies_are_the_same_bits(name: str, tokens: int) -> None:
    packed, plain = kivi_cache(tokens, bits=2)
    other = COPIES[name](packed)
    assert isinstance(other, PackedKV) and other._store is not packed._store
    assert_same_bits(other._store.data(), packed._store.data())
    if name != "cat of heads":  # parts that hold tokens of some heads only
        assert torch.equal(materialize(other), materialize(packed))
    assert_held_exactly(other, plain)
    assert other._store.window == (0, 15) and other._store.block == 16
    other.zero_()
    assert materialize(packed).any()


def test_windows_that_begin_with_a_block_are_copied_packed() -> None:
    packed, _ = kivi_cache(bits=2)
    for part in (slice(0, 16), slice(16, 40), slice(16, 35), slice(32, 40)):
        copied = packed[:, :, part].clone()
        assert isinstance(copied, PackedKV)
        assert torch.equal(materialize(copied), materialize(packed[:, :, part]))
        sent = unpack_bytes(pack_bytes(packed[:1, :, part]))
        assert torch.equal(materialize(sent), materialize(packed[:1, :, part]))


@pytest.mark.parametrize("copied", [
    lambda x: x[:, :, 3:30].clone(), lambda x: x.roll(3, 2), lambda x: torch.cat([x[:, :, :16], x[:, :, 16:]], 2),
    lambda x: x.index_select(2, torch.tensor([3, 1])), lambda x: x[:, :, 3:9].contiguous(),
    lambda x: x[:, :, torch.tensor([3, 1])],
], ids=["clone", "roll", "cat", "index_select", "contiguous", "index"])  # fmt: skip
def test_copies_of_other_tokens_are_plain_and_warned_of(copied: Callable[[Tensor], Tensor]) -> None:
    packed, _ = kivi_cache(bits=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        other = copied(packed)
    assert type(other) is Tensor and any(issubclass(w.category, PackedReadWarning) for w in told)
    assert torch.equal(other, copied(materialize(packed)))


IMPOSSIBLE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a move from within a block": (lambda x: x[:, :, :16].copy_(x[:, :, 8:24]), r"tokens 8:24 .* multiples of 16"),
    "a move into one": (lambda x: x[:, :, 8:24].copy_(x[:, :, :16]), r"tokens 8:24 .* quantizes anew, or choose another"),
    "a move of a part": (
        lambda x: x[:, :, :8].copy_(x[:, :, 16:24]), r"tokens 0:8 of a packed cache of quantizer 'kivi' and 40 tokens",
    ),
    "a mask": (lambda x: x.masked_fill_(torch.ones(2, 2, 40, 1, dtype=torch.bool), 0), "set to a number one by one"),
    "places that are filled": (lambda x: x.index_fill_(2, torch.tensor([3]), 0), "set to a number one by one"),
    "places": (lambda x: x.index_copy_(2, torch.tensor([3, 1]), torch.ones(2, 2, 2, 64)), "write them as slices"),
    "a number at places": (
        lambda x: x.__setitem__((slice(None), slice(None), torch.tensor([3, 1])), 1.0), "write them as slices",
    ),
    "entries of a part": (
        lambda x: x[:, :, 3:8].index_copy_(0, torch.tensor([1, 0]), torch.ones(2, 2, 5, 64)), "tokens 3:8",
    ),
    "bytes of a part": (lambda x: pack_bytes(x[:, :, 3:8]), "the first of them a multiple of 16"),
    "rebalance of tokens": (lambda x: parallel.rebalance(x, 2), "blocks of 16 tokens share their steps"),
    "exchange for tokens": (lambda x: parallel.exchange(x, 1, 2), "blocks of 16 tokens share their steps"),
    "exchange of tokens": (lambda x: parallel.exchange(x, 2, 1), "blocks of 16 tokens share their steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.filterwarnings("ignore::jkv_compile.PackedReadWarning")
def test_what_blocks_cannot_do_is_refused_and_changes_nothing(name: str) -> None:
    packed, plain = kivi_cache(bits=2)
    refused, message = IMPOSSIBLE[name]
    before, data = materialize(packed), [t.clone() for t in packed._store.data()]
    with pytest.raises((PackedCacheError, ConfigurationError), match=message):
        refused(packed)
    assert_same_bits(packed._store.data(), data)  # type: ignore[arg-type]
    assert torch.equal(materialize(packed), before)
    assert assert_held_exactly(packed, plain) == list(range(25, 40))


def test_codes_of_tokens_and_of_blocks_are_not_taken_for_one_another() -> None:
    packed, plain = kivi_cache()
    other = plain.clone()
    adopt(other, (0, 1, 2, 3), 8, Config(8, group_size=16))
    with pytest.raises(PackedCacheError, match="cannot be copied into one of"):
        packed._store.move(other._store, (0, 0, 0, 0), (0, 0, 0, 0), packed._store.shape)
    other.copy_(packed)  # is quantized anew
    close(other, plain)
    packed[:, :, 3:30] = other[:, :, 3:30]
    close(packed, plain)


def test_a_saved_cache_that_does_not_fit_its_blocks_is_refused() -> None:
    packed, _ = kivi_cache()
    _, args = packed._store.__reduce__()
    rebuild_store(*args)
    shape, strides, dtype, bits, codes, scales, *others = args
    for wrong in ((codes[:, :, :40], scales), (codes, scales[:, :, :32])):
        with pytest.raises(PackedCacheError, match="does not fit its data"):
            rebuild_store(shape, strides, dtype, bits, *wrong, *others)
    with pytest.raises(PackedCacheError, match="does not fit its data"):
        rebuild_store((2, 2, 20, 64), strides, dtype, bits, codes, scales, *others)


def test_loaded_caches_go_on_where_they_were_saved() -> None:
    torch.manual_seed(0)
    model = SelfAttention()
    backend = fresh_backend(bits=2, quantizer="kivi")
    compiled, cache, plain = torch.compile(model, backend=backend), model.new_cache(1, 70), model.new_cache(1, 70)
    with torch.no_grad():
        for start in range(0, 60, 12):
            if start == 36:
                cache = {name: _saved(tensor) for name, tensor in cache.items()}
            x = torch.randn(1, 12, 256)
            got, _ = compiled(x, cache, start), model(x, plain, start)
            assert relative_error(got, simulated(model, x, plain, start, 2)) < 1e-5


def test_explain_puts_caches_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = SelfAttention()
    compiled = torch.compile(model, backend=fresh_backend(bits=2, quantizer="kivi"))
    cache = model.new_cache(1, 70)
    with torch.no_grad():
        for start in (0, 20):
            compiled(torch.randn(1, 20, 256), cache, start)
        before = [t.clone() for t in cache["k"]._store.data()]
        report = explain(model, torch.randn(1, 20, 256), cache, 40, bits=2, quantizer="kivi")
    assert {use.recent for match in report.matches for use in match.caches} == {BLOCK - 1}
    assert_same_bits(cache["k"]._store.data(), before)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error::jkv_compile.PackedReadWarning")
def test_writes_that_are_taken_back_leave_no_trace() -> None:
    packed, plain = kivi_cache(bits=2)
    data = [t.clone() for t in packed._store.data()]
    with taken_back([packed]):
        packed[:, :, 3:9] = 5.0
        packed[:, :, 30:] = torch.randn(2, 2, 10, 64)
        packed[1, :, 17:20].zero_()
    assert_same_bits(packed._store.data(), data)  # type: ignore[arg-type]
    assert_held_exactly(packed, plain)


@pytest.mark.parametrize("correction", ["taylor", "clamped"])
def test_attention_in_eager_code_is_corrected(correction: str) -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, quantizer="kivi", correction=correction)
    packed, _ = kivi_cache(bits=2)
    packed._store.join(backend._state.stores)
    value = torch.randn(2, 2, 40, 64)
    q, keys, delta = 3 * torch.randn(2, 2, 5, 64), materialize(packed), quantization_step(packed)
    with pytest.warns(PackedReadWarning):
        got = torch.nn.functional.scaled_dot_product_attention(q, packed, value)
    scores = q @ keys.mT / 8 - reference.correction_bias(q, delta, 1 / 8, correction)
    assert relative_error(got, scores.softmax(-1) @ value) < 1e-5
    assert not math.isclose(relative_error(got, (q @ keys.mT / 8).softmax(-1) @ value), 0, abs_tol=1e-3)


# ---- keys that another graph had packed, and that are read as tensors ----


def test_packed_keys_that_are_read_as_tensors_are_corrected_channel_by_channel() -> None:
    torch.manual_seed(0)
    model, backend = TwoCaches(rope_on_read=False), fresh_backend(bits=2, quantizer="kivi", group_size=16)
    ours = [{name: torch.randn(1, 48, 2, 32) for name in ("k", "v")} for _ in range(2)]
    plain = [{name: x.clone() for name, x in cache.items()} for cache in ours]
    quantizers = {"k": "kivi", "v": "rtn"}
    for cache in ours:
        for name, tensor in cache.items():
            adopt(tensor, (0, 2, 1, 3), 2, backend.config, quantizer=quantizers[name]).join(backend._state.stores)
    compiled, x, scale = torch.compile(model, backend=backend), 2 * torch.randn(1, 8, 64), 32**-0.5
    with torch.no_grad():
        got = compiled(x, *ours, 20, 30)
        q, k, v = (t.transpose(1, 2) for t in model.project(x))
        sides = [(cache["k"].transpose(1, 2), cache["v"].transpose(1, 2), n) for cache, n in zip(plain, (20, 30))]
        keys = torch.cat([*(read(key, 2, 16)[0][:, :, :n] for key, _, n in sides), k], 2)
        delta = torch.cat([*(read(key, 2, 16)[1][:, :, :n] for key, _, n in sides), torch.zeros_like(k)], 2)
        values = (reference.dequantize(*reference.quantize(value, 2, 16), 2)[:, :, :n] for _, value, n in sides)
        scores = scale * q @ keys.mT - reference.correction_bias(q, delta, scale, "taylor")
        want = model.out((scores.softmax(-1) @ torch.cat([*values, v], 2)).transpose(1, 2).flatten(2))
    assert relative_error(got, want) < 1e-5


# ---- settings ----


@pytest.mark.parametrize("settings, message", [
    ({"offload": "cpu"}, "offload='cpu' with quantizer='kivi'.*expected offload=None"),
    ({"center": True}, "center=True with quantizer='kivi': expected False or 'values'"),
    ({"center": "keys"}, "center='keys' with quantizer='kivi'"),
])  # fmt: skip
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        jkv_backend(quantizer="kivi", **settings)


def test_values_may_be_centered() -> None:
    torch.manual_seed(0)
    backend, model = fresh_backend(quantizer="kivi", center="values"), SelfAttention()
    compiled, cache, plain = torch.compile(model, backend=backend), model.new_cache(1, 96), model.new_cache(1, 96)
    with torch.no_grad():
        for start in range(0, 96, 12):
            x = torch.randn(1, 12, 256)
            assert relative_error(compiled(x, cache, start), model(x, plain, start)) < 0.01
    assert cache["v"]._store.centered and not cache["k"]._store.centered


def test_the_window_is_at_least_what_blocks_need() -> None:
    assert Config(quantizer="kivi").window == (0, 31)
    assert Config(quantizer="kivi", group_size=64, recent=20, sink=3).window == (3, 63)
    assert Config(quantizer="kivi", recent=50).window == (0, 50)
    assert Config(recent=5).window == (0, 5)


def test_a_cache_of_blocks_is_not_taken_by_a_backend_that_offloads() -> None:
    packed, _ = kivi_cache()
    backend = fresh_backend(offload="cpu")
    with pytest.raises(PackedCacheError, match=r"cannot live in host memory.*a backend without offload"):
        packed._store.join(backend._state.stores)
