"""Caches that are quantized less each channel's mean over their block of tokens (`center_tokens=…`)."""

from __future__ import annotations

import copy
import io
import pickle
import random
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor, nn

import jkv_compile.distributed as parallel
from jkv_compile import (
    Config,
    ConfigurationError,
    NotRewrittenWarning,
    PackedCacheError,
    PackedKV,
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
from jkv_compile.store import Store, rebuild_store

from .caches import assert_same_bits, new_cache
from .harness import fresh_backend, relative_error, rewritten, run_beside, twins
from .idioms.cases import CASES as IDIOMS
from .idioms.models import RollingCache
from .models import BrokenAttention, SelfAttention
from .passes.test_in_place_cache import CASES, CHUNK, generate

BOUND = 0.025  # at 8 bits, of tokens that are shifted by as much as they differ
SHIFTED = {"center": True, "center_tokens": 8}
CLUSTERS = {"quantizer": "qvg/stages2of3"}  # instead of a mean


# ---- graphs ----

REFUSED = {
    "a concatenation that grows and is returned": "joined with new tokens and returned",
    "a concatenation that grows and is returned without its last tokens": "joined with new tokens and returned",
    "a whole buffer under a boolean mask": "written at places that a tensor holds",
    "a whole buffer under an additive mask": "written at places that a tensor holds",
    "a whole buffer, heads repeated": "written at places that a tensor holds",
    "keys beside values in one tensor": "read here, and attended in another graph",
}
MOVED = {  # by eight tokens
    "a buffer rolled and copied back": "expected numbers of tokens that 12 divides, not 8",
    "a buffer shifted by cat and copied back": "expected numbers of tokens that 12 divides, not 8",
}
PACKED = [name for name in IDIOMS if name not in REFUSED and "eviction" not in name]  # whose sink has four tokens


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning", "error::jkv_compile.PackedReadWarning")
def test_idioms_stay_close_to_eager(name: str) -> None:
    steps, stable_from = IDIOMS[name]
    torch.manual_seed(0)
    block = 8 if name in MOVED else 12
    backend = fresh_backend(center=True, center_tokens=block, quantizer="unbiased", sink=4)
    with torch.no_grad():
        generator = steps(backend)
        run_beside(generator, calls=10, stable_from=stable_from + 1)
    assert all(bool(store.means.data.any()) for store in backend._state.stores)
    assert {store.mean_tokens for store in backend._state.stores} == {block}


@pytest.mark.parametrize("name", [*REFUSED, *MOVED])
def test_idioms_that_take_blocks_apart_run_as_written_and_say_why(name: str) -> None:
    steps, _ = IDIOMS[name]
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, center=True, center_tokens=12)
    with torch.no_grad(), pytest.warns(NotRewrittenWarning, match={**REFUSED, **MOVED}[name]):
        generator = steps(backend)
        errors = [relative_error(*next(generator)) for _ in range(6)]
    assert max(errors) < 1e-5 and not backend.memory().adopted
    reasons = [r.reason for report in backend.reports for r in report.rejections]
    assert any("center_tokens=12 stores tokens less means of so many of them" in reason for reason in reasons)


IN_SLICES = (
    "a read window over heads before tokens", "batch of three", "inference mode", "autocast", "float16", "head_dim 96",
    "several layers in one graph", "a break, and a read window that moves", "positions from an earlier graph's item()",
    "three writes of every chunk, with a break", "dynamic shapes", "inductor, with a break",
)  # fmt: skip


@pytest.mark.parametrize("name", IN_SLICES)
@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")
def test_caches_in_slices_stay_close_to_eager(name: str) -> None:
    """Also where blocks are no multiples of chunks, and a read window begins inside of one."""
    model, options = CASES[name]
    options = dict(options)
    batch, dtype = options.pop("batch", 1), options.pop("dtype", torch.float32)
    context, repeats = options.pop("context", torch.no_grad), options.pop("repeats", 1)
    stable_from, inner = options.pop("stable_from", 2), options.pop("inner", "eager")
    torch.manual_seed(0)
    backend = fresh_backend(inner=inner, center=True, center_tokens=20, sink=4, recent=8)
    compiled, eager = twins(model.to(dtype), backend, **options)
    with context():
        cache, reference_cache = (model.new_cache(batch, 6 * CHUNK, dtype) for _ in range(2))  # type: ignore[operator]
        steps = generate(compiled, eager, cache, reference_cache, batch, dtype, repeats)
        run_beside(steps, 6 * repeats, stable_from, BOUND if dtype == torch.float32 else 0.04)
    assert {store.mean_tokens for store in backend._state.stores} == {20}


def drifting(call: int, batch: int, length: int) -> Tensor:
    """A chunk that lies far from zero, each elsewhere."""
    return torch.randn(batch, length, 256) + 3 * torch.randn(256, generator=torch.Generator().manual_seed(call))


@pytest.mark.parametrize("kind, settings", [
    (SelfAttention, {}), (SelfAttention, {"quantizer": "unbiased"}), (SelfAttention, {"center": "keys"}),
    (SelfAttention, {"center": "values", "correction": "exact"}), (SelfAttention, {"correction": "none"}),
    (SelfAttention, {"quantizer": "symmetric_unbiased", "step_bits": 8, "sink": 6, "recent": 5}), (BrokenAttention, {}),
    (BrokenAttention, {"sink": 6, "recent": 5}), (SelfAttention, {"inner": "inductor"}),
    (SelfAttention, {"inner": "inductor", "quantizer": "unbiased", "sink": 6, "recent": 5}),
], ids=str)  # fmt: skip
def test_two_bits_are_attended_as_they_read(kind: type[SelfAttention], settings: dict[str, Any]) -> None:
    """Corrected by Δ as it is stored, the chunk at hand in full precision; nothing compiles from the third call on."""
    length = 8 if settings.get("quantizer") == "unbiased" else 12
    torch.manual_seed(0)
    model = kind(kv_heads=2)
    backend = fresh_backend(**{"bits": 2, **SHIFTED, **settings})
    compiled, cache = torch.compile(model, backend=backend), model.new_cache(2, 5 * length + 4)
    correction = settings.get("correction", "taylor")
    with torch.no_grad():
        for call, start in enumerate(range(0, 5 * length, length)):
            x = drifting(call, 2, length)
            with torch.compiler.set_stance("fail_on_recompile" if call > 2 else "default"):
                got = compiled(x, cache, start)
            if not start:
                continue
            q, k, v = (t.transpose(1, 2) for t in model.project(x))
            held = None if cache["k"]._store.held is None else cache["k"]._store.held.ranges.clone()
            read, values = (materialize(cache[name]).transpose(1, 2)[:, :, :start] for name in ("k", "v"))
            delta = quantization_step(cache["k"].transpose(1, 2))[:, :, :start]
            if held is not None:  # what is held since this chunk is of this chunk, and before it
                assert not delta[:, :, : min(6, start)].any()
            keys, values, delta = (
                t.repeat_interleave(2, 1) for t in (torch.cat((read, k), 2), torch.cat((values, v), 2), delta)
            )
            turned = torch.ops.jkv.rotate(q) if "unbiased" in settings.get("quantizer", "") else q
            scores = q @ keys.mT / 8
            scores[..., :start] -= reference.correction_bias(turned, delta, 1 / 8, correction)
            want = model.out((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
            assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("quantizer", ["rtn", "unbiased"])
def test_two_bits_go_further_where_chunks_drift(quantizer: str) -> None:
    """Each chunk has a mean of its own, also the first one: what is a sink does not reach others."""
    errors = {}
    for settings in ({}, {"center": True}, {"center": True, "center_tokens": 8}):
        torch.manual_seed(0)
        model = SelfAttention()
        compiled, eager = twins(model, fresh_backend(bits=2, quantizer=quantizer, **settings))
        cache, plain = model.new_cache(1, 64), model.new_cache(1, 64)
        found = []
        with torch.no_grad():
            for call in range(8):
                x = drifting(call, 1, 8) / 3
                found.append((compiled(x, cache, 8 * call), eager(x, plain, 8 * call)))
        errors[len(settings)] = relative_error(*(torch.cat(side[2:]) for side in zip(*found)))
    assert errors[2] < 0.75 * min(errors[0], errors[1]), errors


class Part(BrokenAttention):
    """Writes as many entries of a larger batch as the call has, in one graph, and attends in another."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        (n, length, _), written = x.shape, (("k", k), ("v", v))
        for name, new in written:
            cache[name][:n, start : start + length] = new
        torch._dynamo.graph_break()
        tokens = (cache[name][:n, : start + length].transpose(1, 2) for name in ("k", "v"))
        return self.attend(q.transpose(1, 2), *tokens)


@pytest.mark.parametrize("quantizer", ["rtn", "unbiased"])
def test_some_entries_are_written_and_attended(quantizer: str) -> None:
    torch.manual_seed(0)
    model = Part()
    compiled, eager = twins(model, fresh_backend(center=True, center_tokens=12, quantizer=quantizer))
    cache, plain = model.new_cache(3, 40), model.new_cache(3, 40)
    with torch.no_grad():
        for start in range(0, 40, 8):
            x = drifting(start, 2, 8) / 3
            assert relative_error(compiled(x, cache, start), eager(x, plain, start)) < BOUND
    assert relative_error(materialize(cache["k"]), plain["k"]) < BOUND
    assert not cache["v"]._store.means.extents[2, :, 1:].any()  # of what came after it was packed


class Masked(SelfAttention):
    """Reads the whole buffer under a mask, in which some queries may see nothing."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int, mask: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.project(x)
        cache["k"][:, start : start + x.shape[1]] = k
        cache["v"][:, start : start + x.shape[1]] = v
        keys, values = cache["k"].transpose(1, 2), cache["v"].transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask, enable_gqa=True)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_rows_that_see_no_key_are_zero(additive: bool, inner: str) -> None:
    torch.manual_seed(0)
    model = Masked(kv_heads=2)
    compiled, eager = twins(model, fresh_backend(inner=inner, **SHIFTED))
    cache, plain = model.new_cache(2, 36), model.new_cache(2, 36)
    with torch.no_grad():
        for call, start in enumerate((0, 8, 16)):
            x, mask = drifting(call, 2, 8), (torch.arange(36) < start + 8).repeat(2, 1, 8, 1)
            mask[1, :, :3] = False
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf) if additive else mask
            got, want = compiled(x, cache, start, mask), eager(x, plain, start, mask)
            assert relative_error(got, want) < BOUND
            assert not got[1, :, :3].any() and not want[1, :, :3].any()


@pytest.mark.parametrize("center", [True, "keys", "values"])
def test_the_log_sum_exp_is_that_of_the_keys_themselves(center: bool | str) -> None:
    def model(x: Tensor, cache: dict[str, Tensor], start: int) -> tuple[Tensor, Tensor]:
        q, k, v = layer.project(x)
        cache["k"][:, start : start + 8], cache["v"][:, start : start + 8] = k, v
        tokens = (cache[name][:, : start + 8].transpose(1, 2) for name in "kv")
        return parallel.attention(q.transpose(1, 2), *tokens)

    torch.manual_seed(0)
    layer = SelfAttention(kv_heads=2)
    backend = fresh_backend(center=center, center_tokens=12, correction="none")
    compiled, cache, plain = torch.compile(model, backend=backend), layer.new_cache(1, 32), layer.new_cache(1, 32)
    with torch.no_grad():
        for start in (0, 8, 16, 24):
            x = drifting(start, 1, 8) / 3
            (out, lse), (want, want_lse) = compiled(x, cache, start), model(x, plain, start)
            assert relative_error(out, want) < BOUND
            torch.testing.assert_close(lse, want_lse, rtol=0, atol=0.03)
    assert isinstance(cache["k"], PackedKV)


@pytest.mark.parametrize("value", [0.0, 1.5])
@pytest.mark.parametrize("quantizer", ["rtn", "unbiased"])
def test_fills_in_graphs_and_in_eager_code(value: float, quantizer: str) -> None:
    class Reset(SelfAttention):
        def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
            for tensor in cache.values():
                tensor[:, :4].fill_(value)
            return super().forward(x, cache, start)

    torch.manual_seed(0)
    model = Reset()
    compiled, eager = twins(model, fresh_backend(quantizer=quantizer, **SHIFTED))
    cache, plain = model.new_cache(2, 32), model.new_cache(2, 32)
    with torch.no_grad():
        for start in (0, 8, 16, 24):
            x = torch.randn(2, 8, 256)
            assert relative_error(compiled(x, cache, start), eager(x, plain, start)) < BOUND
            for tensors in (cache, plain):
                tensors["v"][1, 5:7].fill_(value)
            assert relative_error(materialize(cache["v"]), plain["v"]) < BOUND
            assert relative_error(materialize(cache["k"]), plain["k"]) < BOUND
        cache["k"].fill_(value)
        assert (materialize(cache["k"]) == value).all()  # exactly, as no block has other tokens


def test_memory_is_counted_byte_by_byte() -> None:
    torch.manual_seed(0)
    backend, model = fresh_backend(bits=2, center=True, center_tokens=24), SelfAttention(kv_heads=2).bfloat16()
    compiled, cache = torch.compile(model, backend=backend), model.new_cache(3, 100, torch.bfloat16)
    with torch.no_grad():
        for start in (0, 8):
            compiled(torch.randn(3, 8, 256).bfloat16(), cache, start)
    store = cache["k"]._store
    packed = 3 * 2 * 100 * (64 // 4 + 64 // 32 * 4) + 3 * 2 * 5 * 64 * 2
    assert store.packed_bytes == packed and backend.memory().packed_bytes == 2 * packed
    explained = next(r for r in backend.reports if r.outcome == "adopted")
    assert {use.packed_bytes for match in explained.matches for use in match.caches} == {packed}
    with torch.no_grad():
        new = model.new_cache(3, 100, torch.bfloat16)
        report = explain(model, torch.randn(3, 8, 256).bfloat16(), new, 8, bits=2, center=True, center_tokens=24)
    assert {use.packed_bytes for match in report.matches for use in match.caches} == {packed}


def test_the_mean_is_that_of_what_a_cache_holds_when_it_is_packed() -> None:
    torch.manual_seed(0)
    packed, plain = new_cache("bhsd", tokens=20, **SHIFTED)
    torch.testing.assert_close(packed._store.means.data[:, :, 0], plain[:, :, :8].mean(2))
    torch.testing.assert_close(packed._store.means.data[:, :, 2], plain[:, :, 16:].mean(2))
    half = torch.zeros(1, 2, 5000, 64)
    half[:, :, :13] = torch.randn(1, 2, 13, 64) + 3
    want = half.clone()
    store = adopt(half, (0, 1, 2, 3), 8, Config(bits=8, center=True, center_tokens=4999), centered=True)
    torch.testing.assert_close(store.means.data[:, :, 0], want[:, :, :13].mean(2))  # not of zeros behind it
    assert relative_error(materialize(half), want) < 2 * BOUND and store.means.extents[0, 0].tolist() == [
        [0, 0, 13],
        [0, 0, 0],
    ]


class TestGraph(expecttest.TestCase):
    def test_caches_are_written_and_attended_less_their_means(self) -> None:
        torch.manual_seed(0)
        backend = fresh_backend(bits=2, center=True, center_tokens=16, quantizer="unbiased")
        model = SelfAttention(kv_heads=2)
        compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 32)
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
jkv::append_means(l_cache_k__codes, l_cache_k__scales, l_cache_k__means, l_cache_k__extents, permute, l_start_, 16, 2, 32, 'unbiased')
permute_1 = v.permute([0, 2, 1, 3])
jkv::append_means(l_cache_v__codes, l_cache_v__scales, l_cache_v__means, l_cache_v__extents, permute_1, l_start_, 16, 2, 32, 'unbiased')
transpose_2 = q.transpose(1, 2)
permute_2 = k.permute([0, 2, 1, 3])
permute_3 = v.permute([0, 2, 1, 3])
rotate_default = jkv::rotate(transpose_2)
rotate_default_1 = jkv::rotate(permute_2)
rotate_default_2 = jkv::rotate(permute_3)
float_1 = l_cache_k__means.float()
rotate_default_3 = jkv::rotate(float_1)
float_2 = l_cache_v__means.float()
rotate_default_4 = jkv::rotate(float_2)
attention_means_default = jkv::attention_means(rotate_default, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, rotate_default_3, 16, rotate_default_4, 16, [], [], [], [], [0, l_start_], rotate_default_1, rotate_default_2, None, False, 0.125, 2, 2, 'taylor')
rotate_default_5 = jkv::rotate(attention_means_default)
transpose_3 = rotate_default_5.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear_2)
""",
        )

    def test_a_graph_that_only_reads_takes_what_was_written_last_in_full_precision(self) -> None:
        torch.manual_seed(0)
        backend = fresh_backend(bits=2, center="keys", center_tokens=16, sink=4)
        model = BrokenAttention()
        compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 32)
        with torch.no_grad():
            for start in (0, 8, 16):
                compiled(torch.randn(1, 8, 256), cache, start)
        self.assertExpectedInline(
            rewritten(backend, index=-1),
            """\
transpose = l_q_.transpose(1, 2)
add = add(-2, l_keys__first_token)
add_1 = add(-2, s22)
add_2 = add(add_1, l_keys__first_token)
new_empty_default = aten::new_empty(transpose, [1, 4, 0, 64])
new_empty_default_1 = aten::new_empty(transpose, [1, 4, 0, 64])
float_1 = l_keys__means.float()
attention_means_default = jkv::attention_means(transpose, l_keys__codes, l_keys__scales, l_values__codes, l_values__scales, float_1, 16, None, 0, [l_keys__held, l_keys__active], [l_keys__held_ranges, l_keys__active_range], [l_values__held, l_values__active], [l_values__held_ranges, l_values__active_range], [add, add_2], new_empty_default, new_empty_default_1, None, False, 0.125, 2, 2, 'taylor')
transpose_3 = attention_means_default.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear)
""",
        )


# ---- moves ----


@pytest.mark.parametrize("settings", [{}, {"quantizer": "unbiased", "sink": 8, "recent": 8}], ids=str)
def test_whole_blocks_roll_bit_for_bit(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = RollingCache(sink=8, tokens=48)
    backend = fresh_backend(**SHIFTED, **settings)
    compiled, eager = twins(model, backend)
    cache, plain = model.new_cache(), model.new_cache()
    with torch.no_grad():
        for call in range(14):
            x = torch.randn(1, 8, 64)
            store = cache["k"]._store if call > 6 else None
            before = None if store is None else [t.clone() for t in (*store.data(), store.means.data)]
            with torch.compiler.set_stance("fail_on_recompile" if call > 7 else "default"):
                assert relative_error(compiled(x, cache, 8 * call), eager(x, plain, 8 * call)) < BOUND
            if before is not None:
                assert torch.equal(store.codes[:, :, 8:40], before[0][:, :, 16:])
                assert torch.equal(store.scales[:, :, :, 8:40], before[1][:, :, :, 16:])
                assert torch.equal(store.means.data[:, :, 1:5], before[2][:, :, 2:])


@pytest.mark.parametrize("sink, tokens, inner", [(8, 44, "eager"), (4, 48, "inductor")])
def test_other_rolls_are_refused_before_anything_is_moved(sink: int, tokens: int, inner: str) -> None:
    torch.manual_seed(0)
    model = RollingCache(sink=sink, tokens=tokens)
    compiled = torch.compile(model, backend=fresh_backend(bits=2, inner=inner, **SHIFTED))
    cache = model.new_cache()
    with torch.no_grad():
        for call in range(tokens // 8):
            compiled(torch.randn(1, 8, 64), cache, 8 * call)
        before = materialize(cache["k"])
        with pytest.raises(PackedCacheError, match=r"must be multiples of 8, .* choose center_tokens"):
            compiled(torch.randn(1, 8, 64), cache, 8 * (tokens // 8))
    assert torch.equal(materialize(cache["k"]), before)


# ---- eager code ----


def mean_cache(**settings: Any) -> tuple[Any, Tensor]:
    """A packed cache `[B, H, S, D]` of eight bits with two blocks of eight tokens and one of four, and its twin."""
    torch.manual_seed(0)
    return new_cache("bhsd", tokens=20, **{**SHIFTED, **settings})


def close(packed: Tensor, plain: Tensor) -> None:
    assert packed.shape == plain.shape
    assert relative_error(materialize(packed), plain) < BOUND
    assert (materialize(packed) - plain).abs().max() < 0.2


def _saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("copied", [
    torch.clone, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: unpack_bytes(pack_bytes(x)),
    _saved, lambda x: x.to("cpu", copy=True), lambda x: torch.cat([x[:1], x[1:]]),
    lambda x: torch.cat([x[:, :1], x[:, 1:]], 1), lambda x: x.index_select(0, torch.tensor([0, 1])),
], ids=["clone", "deepcopy", "pickle", "bytes", "save", "to", "cat of entries", "cat of heads", "index"])  # fmt: skip
@pytest.mark.parametrize("window", [
    {}, {"sink": 3, "recent": 2}, {"quantizer": "unbiased"}, CLUSTERS, {**CLUSTERS, "sink": 3, "recent": 2},
], ids=str)  # fmt: skip
def test_copies_are_the_same_bits(copied: Any, window: dict[str, Any]) -> None:
    packed, plain = mean_cache(**window)
    packed[:, :, 16:].zero_(), plain[:, :, 16:].zero_()
    other = copied(packed)
    assert isinstance(other, PackedKV) and other._store.mean_tokens == 8
    assert_same_bits(other._store.data(), packed._store.data())
    assert torch.equal(other._store.means.data, packed._store.means.data)
    assert torch.equal(other._store.means.extents, packed._store.means.extents)
    before, new = materialize(packed), torch.randn(2, 2, 14, 64) + 2
    for x in (other, plain):
        x[:, :, 4:18] = new
    close(other, plain)
    assert torch.equal(materialize(packed), before)  # it shares nothing


@pytest.mark.parametrize("settings", [{}, CLUSTERS], ids=str)
def test_parts_take_their_means_along(settings: dict[str, Any]) -> None:
    packed, _ = mean_cache(**settings)
    read, order = materialize(packed), torch.tensor([1, 0, 1])
    for got, want in (
        (packed[1:].clone(), read[1:]), (packed[:, 1:].clone(), read[:, 1:]), (packed[:, :, 8:].clone(), read[:, :, 8:]),
        (packed[:, :, 8:13].clone(), read[:, :, 8:13]), (packed[:, :, 16:].clone(), read[:, :, 16:]),
        (packed.index_select(0, order), read[order]), (packed.index_select(1, order), read[:, order]),
        (packed[1:, :, 8:].index_select(1, order), read[1:, order, 8:]), (unpack_bytes(pack_bytes(packed[:, 1:, 8:])), read[:, 1:, 8:]),
        (packed.repeat_interleave(2, 0), read.repeat_interleave(2, 0)), (torch.cat([packed, packed]), torch.cat([read, read])),
    ):  # fmt: skip
        assert isinstance(got, PackedKV) and torch.equal(materialize(got), want)
    mixed = torch.cat([packed, read])
    assert isinstance(mixed, PackedKV)
    close(mixed, torch.cat([read, read]))


@pytest.mark.parametrize("settings", [{}, CLUSTERS], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_takes_blocks_apart_is_read(settings: dict[str, Any]) -> None:
    packed, _ = mean_cache(**settings)
    read = materialize(packed)
    for got, want in (
        (packed[:, :, 3:9].clone(), read[:, :, 3:9]), (packed.roll(8, 2), read.roll(8, 2)),
        (packed[:, :, [3, 1]], read[:, :, [3, 1]]), (torch.cat([packed, packed], 2), torch.cat([read, read], 2)),
    ):  # fmt: skip
        assert not is_packed(got) and torch.equal(got, want)


@pytest.mark.parametrize("change", [
    lambda x, new: x[:, :, 2:6].copy_(new[:, :, 2:6]), lambda x, new: x[1].copy_(new[1]),
    lambda x, new: x[:, 1:].copy_(new[:, 1:]), lambda x, new: x.index_copy_(2, torch.tensor([5, 6, 7, 8]), new[:, :, :4]),
    lambda x, new: x.index_copy_(0, torch.tensor([1]), new[:1]), lambda x, new: x[:, :, 1:17].zero_(),
    lambda x, new: x.index_copy_(1, torch.tensor([1, 0]), new), lambda x, new: x[:, :, 3:].index_copy_(0, torch.tensor([1, 0]), new[:, :, 3:]),
    lambda x, new: x[1].fill_(2.0), lambda x, new: x[:, :1].zero_(), lambda x, new: x.fill_(-0.5),
    lambda x, new: x[:, :, :8].copy_(x[:, :, 8:16]), lambda x, new: x[:, :, 8:].copy_(x[:, :, :12].clone()),
    lambda x, new: x[0].copy_(x[1].clone()), lambda x, new: x[0].copy_(x[1]),
    lambda x, new: x[:, 0].copy_(x[:, 1].clone()), lambda x, new: x[:1, :, :8].copy_(x[1:, :, 8:16]),
    lambda x, new: x.index_copy_(0, torch.tensor([1, 0]), x.clone()), lambda x, new: x.copy_(x.flip(0)),
    lambda x, new: x.copy_(x[[1, 0]]), lambda x, new: x.copy_(x.roll(3, 2)), lambda x, new: x.copy_(new),
    lambda x, new: x[:, :, 1:9].copy_(x[:, :, 3:11].clone()),
], ids=[
    "a slice", "an entry", "a head", "a run of indices", "an entry by index", "a reset", "heads by index",
    "parts of entries by index", "a fill of an entry", "a reset of a head", "a fill", "a move of a block",
    "a move up to the end", "another entry, copied", "another entry", "another head", "a block of another entry",
    "entries in turn", "a flip", "entries by index", "a roll", "all of it", "parts of blocks, copied",
])  # fmt: skip
@pytest.mark.parametrize("window", [{}, {"sink": 3, "recent": 2}, CLUSTERS], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_writes_are_read_back(change: Any, window: dict[str, int]) -> None:
    packed, plain = mean_cache(**window)
    for _ in range(2):
        new = torch.randn(2, 2, 20, 64)
        for x in (packed, plain):
            change(x, new)
        close(packed, plain)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_writes_moves_and_copies_leave_nothing_stale(seed: int) -> None:
    rng = random.Random(seed)
    packed, plain = mean_cache(**rng.choice(({}, {"sink": 3, "recent": 4}, {"quantizer": "unbiased"}, CLUSTERS)))
    for _ in range(40):
        start = rng.randrange(20)
        stop = rng.randint(start + 1, 20)
        entries, heads = (slice(a, a + n) for a, n in (rng.choice(((0, 2), (0, 1), (1, 1))) for _ in range(2)))
        box = entries, heads, slice(start, stop)
        new, action = torch.randn(2, 2, 20, 64) + 3 * torch.randn(2, 2, 1, 64), rng.randrange(6)
        if action == 0:
            packed[box], plain[box] = 0.0, 0.0
        elif action == 1:  # two whole blocks
            a, b = rng.sample((0, 8), 2)
            packed[:, :, b : b + 8], plain[:, :, b : b + 8] = packed[:, :, a : a + 8], plain[:, :, a : a + 8].clone()
        elif action == 2:
            packed = rng.choice((torch.clone, copy.deepcopy, lambda x: unpack_bytes(pack_bytes(x)), _saved))(packed)
        elif action == 3:
            order = torch.tensor(rng.choice(((1, 0), (0, 0), (0, 1))))
            packed, plain = packed.index_select(1, order), plain.index_select(1, order)
        else:
            packed[box], plain[box] = new[box], new[box]
        assert isinstance(packed, PackedKV)
        assert relative_error(materialize(packed), plain) < BOUND or not plain.any()


@pytest.mark.parametrize("change, message", [
    (lambda x: x.index_copy_(2, torch.tensor([5, 1, 7]), torch.randn(2, 2, 3, 64)), "tokens are written one by one"),
    (lambda x: x.masked_fill_((torch.arange(20) % 3 == 0)[:, None], 0.0), "tokens are set to a number one by one"),
    (lambda x: x[:, :, :8].copy_(x[:, :, 2:10]), "share a mean; copy whole blocks"),
    (lambda x: x[:, :, 2:10].copy_(x[:, :, 8:16]), "share a mean; copy whole blocks"),
    (lambda x: x[:, :, :4].copy_(x[:, :, 8:12]), "share a mean; copy whole blocks"),
    (lambda x: x._store.grown(*x._store.data(), x._store.strides), "tokens are added at the end"),
], ids=["places", "a mask", "from a part", "to a part", "part of a block", "growth"])  # fmt: skip
@pytest.mark.parametrize("settings", [{}, CLUSTERS], ids=str)
def test_what_takes_blocks_apart_is_refused_before_anything_is_written(
    change: Any, message: str, settings: dict[str, Any]
) -> None:
    packed, _ = mean_cache(**settings)
    before = materialize(packed)
    if settings:
        message = message.replace("a mean", "centroids")
    with pytest.raises(PackedCacheError, match=message) as raised:
        change(packed)
    assert "center_tokens" in str(raised.value)
    assert torch.equal(materialize(packed), before)


def test_caches_of_other_means_exchange_tokens_and_not_codes() -> None:
    (one, plain), (other, other_plain) = mean_cache(), mean_cache(center_tokens=10)
    (single, single_plain), (bare, bare_plain) = mean_cache(center_tokens=0), new_cache("bhsd", tokens=20)
    with pytest.raises(PackedCacheError, match="other means"):
        one._store.move(other._store, (0, 0, 0, 0), (0, 0, 0, 0), (2, 2, 4, 64))
    with pytest.warns(UserWarning):
        for source, twin in ((other, other_plain), (single, single_plain), (bare, bare_plain)):
            for target, held in ((one, plain), (bare, bare_plain), (single, single_plain)):
                target[:, :, 2:10], held[:, :, 2:10] = source[:, :, 1:9], twin[:, :, 1:9].clone()
                close(target, held)
            close(torch.cat([one, source], 0), torch.cat([plain, twin], 0))
            close(torch.cat([source, one], 1), torch.cat([twin, plain], 1))
            close(torch.cat([source, one], 2), torch.cat([twin, plain], 2))


@pytest.mark.parametrize("settings", [{}, CLUSTERS], ids=str)
def test_writes_that_are_taken_back_leave_no_trace(settings: dict[str, Any]) -> None:
    packed, _ = mean_cache(bits=2, **settings)
    store: Store = packed._store
    data = [t.clone() for t in (*store.data(), *store.means.saved[:2])]
    with taken_back([packed]):
        packed[:, :, 3:9] = 5.0
        packed[:, :, 12:] = torch.randn(2, 2, 8, 64)
        packed[1, :, 0:4].zero_()
    assert all(torch.equal(a, b) for a, b in zip(data, (*store.data(), *store.means.saved)))


def test_explain_leaves_caches_as_they_are() -> None:
    torch.manual_seed(0)
    model = SelfAttention()
    compiled, cache = torch.compile(model, backend=fresh_backend(bits=2, **SHIFTED)), model.new_cache(1, 64)
    with torch.no_grad():
        for start in (0, 20):
            compiled(torch.randn(1, 20, 256), cache, start)
        store = cache["k"]._store
        before = [t.clone() for t in (*store.data(), store.means.data)]
        explain(model, torch.randn(1, 20, 256), cache, 40, bits=2, **SHIFTED)
    assert all(torch.equal(a, b) for a, b in zip(before, (*store.data(), store.means.data)))


def test_attention_in_eager_code_reads_the_means() -> None:
    packed, plain = mean_cache()
    q, value = torch.randn(2, 2, 5, 64), torch.randn(2, 2, 20, 64)
    with pytest.warns(UserWarning, match="reads a packed cache in eager code"):
        got = nn.functional.scaled_dot_product_attention(q, packed, value)
    assert relative_error(got, nn.functional.scaled_dot_product_attention(q, plain, value)) < BOUND


# ---- what does not fit ----


@pytest.mark.parametrize("damage", [
    lambda data, extents, n: (data[:1], extents, n), lambda data, extents, n: (data.half(), extents, n),
    lambda data, extents, n: (data, extents.float(), n), lambda data, extents, n: (data, extents, n + 9),
    lambda data, extents, n: (data, extents, 0), lambda data, extents, n: (data, extents, "8"),
], ids=["shape", "dtype", "extents", "another length", "no length", "a string"])  # fmt: skip
def test_files_with_other_means_are_refused(damage: Any) -> None:
    store = mean_cache()[0]._store
    build, arguments = store.__reduce__()
    assert build is rebuild_store
    with pytest.raises(PackedCacheError, match=r"has means .* expected"):
        build(*arguments[:-1], damage(*arguments[-1]))
    with pytest.raises(PackedCacheError, match="beside a mean of all of them"):
        build(*arguments[:-2], store.means.data[:, :, :1], arguments[-1])


def test_tokens_of_ranks_make_no_one_cache() -> None:
    packed, _ = mean_cache()
    with pytest.raises(ConfigurationError, match="center_tokens=8: so many tokens share a mean"):
        parallel.rebalance(packed, 2)
    for scatter, gather in ((2, 1), (1, 2)):
        with pytest.raises(ConfigurationError, match="center_tokens=8: so many tokens share a mean"):
            parallel.exchange(packed, scatter, gather)


def test_a_backend_that_offloads_does_not_take_them() -> None:
    packed, _ = mean_cache()
    with pytest.raises(PackedCacheError, match=r"center_tokens=8 cannot live in host memory"):
        packed._store.join(fresh_backend(offload="cpu")._state.stores)


@pytest.mark.parametrize("settings, message", [
    ({"center": True, "center_tokens": -1}, "center_tokens=-1: expected a number of tokens of at least 8"),
    ({"center": True, "center_tokens": 4}, "center_tokens=4: expected"),
    ({"center": True, "center_tokens": True}, "center_tokens=True: expected"),
    ({"center": True, "center_tokens": 8.0}, r"center_tokens=8.0: expected"),
    ({"center_tokens": 16}, "center_tokens=16 with center=False: expected center=True"),
    ({"center": True, "center_tokens": 16, "offload": "cpu"}, "center_tokens=16 with offload='cpu'.*expected offload=None"),
    ({"center": True, "center_tokens": 16, "quantizer": "kivi"}, "center=True with quantizer='kivi'"),
])  # fmt: skip
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        jkv_backend(**settings)


def test_settings_are_told_apart() -> None:
    assert jkv_backend(center=True, center_tokens=8) != jkv_backend(center=True)
    assert jkv_backend(center=True, center_tokens=0) == jkv_backend(center=True)


def test_values_beside_keys_by_channel() -> None:
    torch.manual_seed(0)
    backend, model = fresh_backend(quantizer="kivi", center="values", center_tokens=12), SelfAttention()
    compiled, eager = twins(model, backend)
    cache, plain = model.new_cache(1, 96), model.new_cache(1, 96)
    with torch.no_grad():
        for start in range(0, 96, 12):
            x = drifting(start, 1, 12) / 3
            assert relative_error(compiled(x, cache, start), eager(x, plain, start)) < BOUND
    assert cache["k"]._store.mean_tokens == 0 and cache["v"]._store.mean_tokens == 12
