"""The `jkv::` operators: what they compute, by examples that can be checked by hand, and what compilers rely on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from jkv_compile.kernels import reference
from jkv_compile.kernels.layout import SUPPORTED_BITS, pack, packed_bytes, packed_width, step_and_zero, unpack

ops = torch.ops.jkv
CORRECTIONS = ["none", "taylor", "clamped", "exact"]


def packed(
    tokens: int = 12, heads: int = 2, head_dim: int = 64, bits: int = 2, group_size: int = 32, symmetric: bool = False
):
    source = torch.randn(1, heads, tokens, head_dim)
    return reference.quantize(source, bits, group_size, symmetric=symmetric)


def per_channel(tokens: int = 32, block: int = 8, symmetric: bool = False):
    """One step per channel and block of tokens (KIVI)."""
    return reference.quantize(torch.randn(1, 2, tokens, 64), 2, 1, block, symmetric)


def attention_arguments(
    length: int = 3, current: int = 4, ranges=(0, 4, 6, 9), mask=None, causal=False, heads: int = 4, symmetric=False
):
    """Grouped queries over two key/value heads; values with another head_dim than keys."""
    stores = *packed(bits=3, symmetric=symmetric), *packed(head_dim=32, bits=2, symmetric=symmetric)
    return (
        torch.randn(1, heads, length, 64), *stores, list(ranges),
        torch.randn(1, 2, current, 64), torch.randn(1, 2, current, 32), mask, causal, 0.125, 3, 2, "taylor",
    )  # fmt: skip


def active_arguments(written=(5, 8), values_written=None):
    query, *components, _, key, value, mask, causal, scale, key_bits, value_bits, correction = attention_arguments()
    held = (
        torch.randn(1, 2, 3, 64),
        torch.tensor(written),
        torch.randn(1, 2, 3, 32),
        torch.tensor(values_written or written),
    )
    return (query, *components, *held, 0, 9, key, value, mask, causal, scale, key_bits, value_bits, correction)


def turned_arguments(correction: str):
    query, key, value, _, *settings = dense_arguments(correction)
    mask, causal, scale, _, _ = settings
    first, second = torch.rand_like(key), torch.rand_like(key)
    pairs = [c for i in range(32) for c in (i, i + 32)]
    return query, key, value, first, second, pairs, mask, causal, scale, correction


def dense_arguments(correction):
    key, value, variance = torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 32), torch.rand(1, 2, 9, 2)
    return torch.randn(1, 4, 3, 64), key, value, variance, torch.rand(3, 9) > 0.2, False, 0.2, False, correction


CALLS = {
    "append": lambda: (*packed(), torch.randn(1, 2, 5, 64), 3, 2),
    "append of another dtype": lambda: (*packed(bits=8), torch.randn(1, 5, 2, 64).bfloat16().transpose(1, 2), 3, 8),
    "append_kv": lambda: (*packed(), *packed(bits=4), torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64), 3, 2, 4),
    "append of blocks of tokens": lambda: (*per_channel(), torch.randn(1, 2, 16, 64), 8, 2),
    "append, symmetric": lambda: (*packed(symmetric=True), torch.randn(1, 2, 5, 64), 3, 2),
    "append of blocks of tokens, symmetric": lambda: (*per_channel(symmetric=True), torch.randn(1, 2, 16, 64), 8, 2),
    "move": lambda: (*packed(), 2, 4, 6),
    "move, symmetric": lambda: (*packed(symmetric=True), 2, 4, 6),
    "move of blocks of tokens": lambda: (*per_channel(), 8, 0, 16),
    "fill": lambda: (*packed(), 2, 4, 0.0),
    "fill, symmetric": lambda: (*packed(symmetric=True), 2, 4, 0.0),
    "fill_symmetric": lambda: (*packed(symmetric=True), 2, 4, 2, -1.5),
    "dequantize": lambda: (*packed(bits=3), 2, 9, 3, torch.bfloat16),
    "dequantize, symmetric": lambda: (*packed(bits=3, symmetric=True), 2, 9, 3, torch.bfloat16),
    "dequantize of nothing": lambda: (*packed(bits=3), 2, 2, 3, torch.bfloat16),
    "dequantize_active": lambda: (*packed(), torch.randn(1, 2, 3, 64), torch.tensor([4, 7]), 2, 9, 2, torch.float32),
    "attention": attention_arguments,
    "attention, symmetric": lambda: attention_arguments(symmetric=True),
    "attention without a cached range": lambda: attention_arguments(ranges=()),
    "attention with a mask": lambda: attention_arguments(mask=torch.rand(1, 1, 3, 11) < 0.8),
    "attention, causal": lambda: attention_arguments(causal=True),
    "attention_lse": attention_arguments,
    "attention_lse of no keys": lambda: attention_arguments(current=0, ranges=()),
    "attention_lse with a mask": lambda: attention_arguments(mask=torch.rand(1, 1, 3, 11) < 0.8),
    "sdpa_lse": lambda: (*attention_arguments()[:1], *attention_arguments()[6:8], None, True, 0.125),
    "attention_active": active_arguments,
    "attention_active_lse": active_arguments,
    "attention_dense": lambda: dense_arguments("taylor"),
    "attention_dense, exact": lambda: dense_arguments("exact"),
    "attention_dense, not corrected": lambda: dense_arguments("none"),
    "attention_turned": lambda: turned_arguments("taylor"),
    "attention_turned, exact": lambda: turned_arguments("exact"),
    "score_terms": lambda: (torch.randn(2, 4, 3, 64), torch.rand(1, 2, 9, 2), 0.2, 0),
    "score_terms, halves": lambda: (torch.randn(2, 4, 3, 64), torch.rand(2, 2, 9, 2), 0.2, 64),
    "append_at": lambda: (*packed(), torch.randn(1, 2, 3, 64), torch.tensor([1, 7, 4]), 2),
    "extend": lambda: (*packed(), [0, 4, 6, 8], torch.randn(1, 2, 3, 64), 2),
    "append_at, symmetric": lambda: (*packed(symmetric=True), torch.randn(1, 2, 3, 64), torch.tensor([1, 7, 4]), 2),
    "extend, symmetric": lambda: (*packed(symmetric=True), [0, 4, 6, 8], torch.randn(1, 2, 3, 64), 2),
    "extend by nothing": lambda: (*packed(), [0, 4], torch.randn(1, 2, 0, 64), 2),
    "round_unbiased": lambda: (torch.randn(1, 5, 2, 96).bfloat16().transpose(1, 2), 2, 48),
    "round_unbiased of part of a tensor": lambda: (torch.randn(1, 5, 2, 192)[..., :64], 2, 64),
    "round_unbiased, symmetric": lambda: (torch.randn(1, 5, 2, 96).bfloat16().transpose(1, 2), 2, 48, True),
    "fill_rotated": lambda: (*packed(), 2, 4, 2, 1.5),
    "fill_within": lambda: (*packed(), 2, 4, 2, 1.5),
    "round_rotated": lambda: (torch.randn(1, 5, 2, 96).bfloat16().transpose(1, 2), 2, 48),
    "round_rotated, symmetric": lambda: (torch.randn(1, 5, 2, 96), 2, 48, True),
    "to_grid": lambda: (torch.randn(1, 5, 2, 128).bfloat16().transpose(1, 2), "quarot/pairs128", 32),
    "from_grid": lambda: (torch.randn(1, 5, 2, 128).bfloat16().transpose(1, 2), "rtn/pairs128", 32),
    "rotate": lambda: (torch.randn(1, 5, 2, 96).bfloat16().transpose(1, 2),),
    "rotate of part of a tensor": lambda: (torch.randn(1, 5, 2, 192)[..., :64],),
}


def operator(name: str):
    return getattr(ops, name.replace(",", " ").split()[0]).default


# ---- what compilers rely on ----


@pytest.mark.parametrize("name", CALLS)
def test_operator_passes_every_check_of_torch_library(name):
    """Schema and mutation annotations, autograd registration, fake kernel, and AOT dispatch with dynamic shapes."""
    torch.library.opcheck(operator(name), CALLS[name]())


def test_every_operator_is_checked():
    defined = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("jkv::")}
    of_held_tokens = {"hold", "hold_at", "hold_number", "hold_moved"}  # and "…_held": in test_held.py
    others = {name for name in defined if "_held" not in name} - of_held_tokens - {"append_blocks"}  # test_blocks.py
    others = {name for name in others if "_means" not in name}  # test_block_means.py
    others = {name for name in others if "_clusters" not in name}  # test_clusters.py
    others = {name for name in others if "_kept" not in name}  # test_retention.py
    assert {operator(name)._schema.name.partition("::")[2] for name in CALLS} == others


READS = [n for n in CALLS if n.split()[0].startswith(("dequantize", "attention", "sdpa"))]


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("heads_first", [True, False], ids=["contiguous queries", "queries from [B, L, H, D]"])
def test_fake_result_has_the_strides_of_the_real_one(name, heads_first):
    arguments = CALLS[name]()
    if not heads_first and not name.startswith("dequantize"):
        query = arguments[0].transpose(1, 2).contiguous().transpose(1, 2)
        arguments = (query, *arguments[1:])
    real = operator(name)(*arguments)
    mode = FakeTensorMode()
    fake = operator(name)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    for one, other in zip(tree_leaves(fake), tree_leaves(real), strict=True):
        assert (one.shape, one.stride(), one.dtype, one.device) == (
            other.shape, other.stride(), other.dtype, other.device
        )  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_result_is_the_same_under_autocast(name):
    arguments = CALLS[name]()
    plain = operator(name)(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        again = operator(name)(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(again), tree_leaves(plain), strict=True))
        assert torch.is_autocast_enabled("cpu")


def test_append_is_the_same_under_autocast():
    source, one, other = torch.randn(1, 2, 5, 64), packed(), packed()
    ops.append(*one, source, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        ops.append(*other, source, 3, 2)
    assert torch.equal(one[0][:, :, 3:8], other[0][:, :, 3:8])


# ---- errors ----

OUT_OF_RANGE = {
    "append beyond the end": lambda c: ops.append(*c, torch.randn(1, 2, 5, 64), 8, 2),
    "append before the beginning": lambda c: ops.append(*c, torch.randn(1, 2, 5, 64), -1, 2),
    "move from beyond the end": lambda c: ops.move(*c, 8, 0, 5),
    "move to beyond the end": lambda c: ops.move(*c, 0, 8, 5),
    "move of a negative length": lambda c: ops.move(*c, 4, 2, -1),
    "fill beyond the end": lambda c: ops.fill(*c, 8, 13, 0.0),
    "fill before the beginning": lambda c: ops.fill(*c, -2, 3, 0.0),
    "dequantize beyond the end": lambda c: ops.dequantize(*c, 8, 13, 2, torch.float32),
    "dequantize backwards": lambda c: ops.dequantize(*c, 8, 7, 2, torch.float32),
    "attention_lse beyond the end": lambda c: ops.attention_lse(
        torch.randn(1, 2, 3, 64), *c, *packed(), [0, 13], *torch.randn(2, 1, 2, 1, 64), None, False, 1.0, 2, 2, "none"
    ),
    "attention beyond the end": lambda c: ops.attention(
        torch.randn(1, 2, 3, 64), *c, *packed(), [0, 13], *torch.randn(2, 1, 2, 1, 64), None, False, 1.0, 2, 2, "none"
    ),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_range_outside_of_the_cache_is_an_error_and_changes_nothing(name):
    cache = packed()
    before = [t.clone() for t in cache]
    with pytest.raises(
        RuntimeError, match=rf"jkv::{name.split()[0]}: tokens -?\d+:-?\d+ do not lie within .* 12 tokens"
    ):
        OUT_OF_RANGE[name](cache)
    assert all(torch.equal(a, b) for a, b in zip(cache, before))


def test_blocks_of_tokens_that_share_steps_are_written_whole_or_not_at_all():
    codes, scales = per_channel()
    before = codes.clone(), scales.clone()
    for call in (
        lambda: ops.append(codes, scales, torch.randn(1, 2, 8, 64), 4, 2),
        lambda: ops.append_kv(*packed(32), codes, scales, *torch.randn(2, 1, 2, 4, 64), 8, 2, 2),
        lambda: ops.move(codes, scales, 8, 4, 16),
        lambda: ops.fill(codes, scales, 0, 9, 0.0),
    ):
        with pytest.raises(RuntimeError, match="must be multiples of 8"):
            call()
    assert torch.equal(codes, before[0]) and torch.equal(scales, before[1])
    ops.fill(codes, scales, 8, 24, 1.5)
    filled = ops.dequantize(codes, scales, 0, 32, 2, torch.float32)
    assert (filled[:, :, 8:24] == 1.5).all()
    expected = reference.dequantize(*before, 2)
    torch.testing.assert_close(filled[:, :, :8], expected[:, :, :8])
    torch.testing.assert_close(filled[:, :, 24:], expected[:, :, 24:])


# ---- quantization, by hand ----


def test_two_bits_of_a_ramp():
    """0 … 3 lie on the grid: Δ = 1, step' = 4, zero' = 0 - 4; a byte holds channels b, b + 2, b + 4, b + 6."""
    x = torch.tensor([0.0, 1, 2, 3, 0, 1, 2, 3]).view(1, 1, 1, 8)
    codes, scales = torch.zeros(1, 1, 1, 2, dtype=torch.uint8), torch.zeros(1, 1, 1, 1, 2, dtype=torch.float16)
    ops.append(codes, scales, x, 0, 2)
    assert scales.flatten().tolist() == [4, -4]
    assert codes.flatten().tolist() == [0b10_00_10_00, 0b11_01_11_01]
    assert torch.equal(ops.dequantize(codes, scales, 0, 1, 2, torch.float32), x)


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    codes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    assert pack(codes, 3).tolist() == [0b10_00_10_00, 0b11_01_11_01, 0b1111_0000]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_unpack_inverts_pack(bits):
    codes = torch.randint(2**bits, (3, 5, 48))
    assert torch.equal(unpack(pack(codes, bits), bits).long(), codes)
    assert pack(codes, bits).shape[-1] == packed_width(48, bits) == 48 * bits // 8


def test_rounding_goes_to_the_nearest_code():
    """Range 0 … 3 again: 0.4 is 0, 0.6 is 1, 2.6 is 3."""
    x = torch.tensor([0, 0.4, 0.6, 1.4, 1.6, 2.4, 2.6, 3.0]).view(1, 1, 1, 8)
    codes, scales = reference.quantize(x, 2, 8)
    assert reference.dequantize(codes, scales, 2).flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_levels_of_a_symmetric_grid(bits):
    """Half-odd multiples of Δ = 1: step' = 2^bits is all that is stored, and zero' = -(3 · 2^bits - 1) / 2."""
    levels = torch.arange(2**bits) - (2**bits - 1) / 2
    x = levels.repeat(max(1, 8 // len(levels))).view(1, 1, 1, -1)
    codes = torch.zeros(1, 1, 1, packed_width(x.shape[3], bits), dtype=torch.uint8)
    scales = torch.zeros(1, 1, 1, 1, 1, dtype=torch.float16)
    ops.append(codes, scales, x, 0, bits)
    assert scales.item() == 2**bits and reference.quantization_step(scales, bits).item() == 1
    assert torch.equal(unpack(codes, bits).long().flatten(), torch.arange(2**bits).repeat(max(1, 8 // len(levels))))
    assert torch.equal(ops.dequantize(codes, scales, 0, 1, bits, torch.float32), x)
    step, zero = step_and_zero(scales, bits)
    assert (step.item(), zero.item()) == (2**bits, -(3 * 2**bits - 1) / 2)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_symmetric_groups_of_zeros_are_exact_and_constant_ones_to_float16(bits):
    x = torch.tensor([0.0, 1.5, -320.0]).view(1, 1, 3, 1).expand(1, 1, 3, 32)
    read = reference.dequantize(*reference.quantize(x, bits, 32, symmetric=True), bits)
    assert torch.equal(read[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(read, x, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_symmetric_magnitudes_saturate_and_what_is_not_finite_becomes_nan(bits):
    x = torch.ones(1, 1, 5, 32)
    most = reference.symmetric_max(bits)
    assert round(most) == {2: 24564, 3: 28658, 4: 30705, 8: 32624}[bits]
    x[0, 0, :, 7] = torch.tensor([most, 60000.0, -3e38, math.inf, math.nan])
    read = reference.dequantize(*reference.quantize(x, bits, 32, symmetric=True), bits)
    assert read[0, 0, :3, 7].tolist() == [most, most, -most]
    assert read[0, 0, 3:].isnan().all() and read[0, 0, :3].isfinite().all()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_constant_groups_are_exact_and_have_no_step(bits):
    x = torch.tensor([0.0, 1.5, -320.0]).view(1, 1, 3, 1).expand(1, 1, 3, 32)
    codes, scales = reference.quantize(x, bits, 32)
    assert torch.equal(reference.dequantize(codes, scales, bits), x)
    assert not reference.quantization_step(scales, bits).any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_bytes_are_those_of_the_tensors(symmetric):
    for bits in SUPPORTED_BITS:
        codes, scales = packed(bits=bits, group_size=64, symmetric=symmetric)
        assert packed_bytes((1, 2, 12, 64), bits, 64, 2 if symmetric else 4) == codes.nbytes + scales.nbytes


def test_two_bits_without_zero_points_are_seven_times_smaller_than_sixteen():
    assert 2 * 128 * 1000 / packed_bytes((1, 1, 1000, 128), 2, 64, scale_bytes=2) == 16 / 2.25 > 7.1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_append_then_dequantize_is_the_reference(bits, symmetric):
    source = torch.randn(1, 2, 5, 64)
    codes, scales = packed(bits=bits, symmetric=symmetric)
    before = codes.clone(), scales.clone()
    ops.append(codes, scales, source, 4, bits)
    want = reference.dequantize(*reference.quantize(source, bits, 32, symmetric=symmetric), bits)
    assert torch.equal(ops.dequantize(codes, scales, 4, 9, bits, torch.float32), want)
    outside = [*range(4), *range(9, 12)]
    assert torch.equal(codes[:, :, outside], before[0][:, :, outside])
    assert torch.equal(scales[:, :, :, outside], before[1][:, :, :, outside])


@pytest.mark.parametrize("value", [1.5, -2.5, 0.0, 3e5])
def test_symmetric_caches_are_filled_as_if_they_were_written(value):
    for bits in SUPPORTED_BITS:
        filled, written = packed(bits=bits, symmetric=True), packed(bits=bits, symmetric=True)
        ops.fill_symmetric(*filled, 3, 7, bits, value)
        ops.append(*written, torch.full((1, 2, 4, 64), value), 3, bits)
        assert torch.equal(*(ops.dequantize(*t, 3, 7, bits, torch.float32) for t in (filled, written)))


def test_other_numbers_than_zero_take_the_operator_that_knows_of_bits():
    codes, scales = packed(symmetric=True)
    before = codes.clone(), scales.clone()
    for call, message in (
        (lambda: ops.fill(codes, scales, 0, 2, 1.5), "jkv::fill_symmetric takes"),
        (lambda: ops.fill_rotated(codes, scales, 0, 2, 2, 1.5), "can be filled with zeros only"),
        (lambda: ops.fill_within(codes, scales, 0, 2, 2, 1.5), "can be filled with zeros only"),
        (lambda: ops.fill_symmetric(codes, scales, 11, 13, 2, 1.5), "tokens 11:13 of a cache of 12"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert torch.equal(codes, before[0]) and torch.equal(scales, before[1])
    for fill, bits in ((ops.fill, ()), (ops.fill_rotated, (2,)), (ops.fill_within, (2,))):
        fill(codes, scales, 2, 5, *bits, 0.0)
        assert not ops.dequantize(codes, scales, 2, 5, 2, torch.float32).any()


def test_active_range_reads_as_it_was_written():
    codes, scales = packed()
    active = torch.randn(1, 2, 3, 64)
    plain = ops.dequantize(codes, scales, 2, 9, 2, torch.float32)
    for start, seen, rows in (
        (4, slice(2, 5), slice(0, 3)),
        (0, slice(0, 1), slice(2, 3)),
        (8, slice(6, 7), slice(0, 1)),
    ):
        written = torch.tensor([start, start + 3])
        got = ops.dequantize_active(codes, scales, active, written, 2, 9, 2, torch.float32)
        want = plain.clone()
        want[:, :, seen] = active[:, :, rows]
        assert torch.equal(got, want)
    nothing = ops.dequantize_active(codes, scales, active, torch.tensor([0, 0]), 2, 9, 2, torch.float32)
    assert torch.equal(nothing, plain)


# ---- attention, by hand ----


def one_token(delta: float, group_size: int = 32):
    """A packed token of 32 zero channels whose step is `delta`, at 2 bits; every channel has code 1."""
    codes = pack(torch.ones(1, 1, 1, 32, dtype=torch.int64), 2)
    scales = torch.tensor([4 * delta, -5 * delta], dtype=torch.float16).view(1, 1, 1, 1, 2)
    assert not reference.dequantize(codes, scales, 2).any()
    return codes, scales


def cached_weight(attention, query: torch.Tensor, delta: float, correction: str) -> float:
    """Weight of one cached token against one current token of equal score: 1 / (1 + e^b)."""
    values = reference.quantize(torch.ones(1, 1, 1, 32), 2, 32)
    current = torch.zeros(1, 1, 1, 32)
    out = attention(query, *one_token(delta), *values, [0, 1], current, current, None, False, 0.5, 2, 2, correction)
    return out.flatten()[0].item()


def expected_weight(query: torch.Tensor, delta: float, correction: str) -> float:
    """s = 1/2. Taylor: b = s²/24 · ‖q‖² Δ²; clamped: at most 1; exact: b = Σ_c log(sinh α_c / α_c) with α_c = s q_c Δ / 2."""
    if correction == "none":
        return 0.5
    if correction in ("taylor", "clamped"):
        bias = 0.25 / 24 * query.square().sum().item() * delta**2
        bias = min(bias, 1.0) if correction == "clamped" else bias
    else:
        alphas = [0.25 * q * delta for q in query.flatten().tolist()]
        bias = sum(math.log(math.sinh(a) / a) for a in alphas)
    return 1 / (1 + math.exp(bias))


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("delta", [0.5, 1.0, 2.0, 4.0])
def test_weight_of_one_cached_token_against_one_current_token(correction, delta):
    query = torch.randn(1, 1, 1, 32)
    got = cached_weight(ops.attention, query, delta, correction)
    assert got == pytest.approx(expected_weight(query, delta, correction), abs=2e-4)


def attention_that_corrects_the_current_chunk(query, *arguments):
    """The bug that voided a public replication: the bias is subtracted from all scores, so that it cancels."""
    key_codes, key_scales, value_codes, value_scales, _, key, value, _, _, scale, key_bits, value_bits, form = arguments
    keys = torch.cat((reference.dequantize(key_codes, key_scales, key_bits), key), 2)
    values = torch.cat((reference.dequantize(value_codes, value_scales, value_bits), value), 2)
    delta = reference.quantization_step(key_scales, key_bits).mean(2, keepdim=True).expand(-1, -1, keys.shape[2], -1)
    scores = scale * query @ keys.transpose(-1, -2) - reference.correction_bias(query, delta, scale, form)
    return scores.softmax(-1) @ values


def test_current_keys_are_never_corrected():
    query = torch.full((1, 1, 1, 32), 2.0)
    want = expected_weight(query, 1.0, "taylor")
    assert want < 0.3, "the bias must matter here, or the test tests nothing"
    assert cached_weight(ops.attention, query, 1.0, "taylor") == pytest.approx(want, abs=2e-4)
    mutant = cached_weight(attention_that_corrects_the_current_chunk, query, 1.0, "taylor")
    assert mutant == pytest.approx(0.5), "the bug that this test is there to find has this effect"


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_without_a_cached_range_it_is_plain_attention(correction):
    query, key, value = torch.randn(1, 4, 3, 64), torch.randn(1, 2, 7, 64), torch.randn(1, 2, 7, 64)
    got = ops.attention(query, *packed(), *packed(), [], key, value, None, False, 0.125, 2, 2, correction)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=0.125))


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(
    "case", ["plain", "mask", "additive mask", "causal", "one query", "no current tokens", "symmetric"]
)
def test_attention_is_the_reference(case, correction):
    mask = {"mask": torch.rand(1, 1, 3, 11) < 0.7, "additive mask": torch.randn(1, 4, 3, 11)}.get(case)
    length, current = (1 if case == "one query" else 3), (0 if case == "no current tokens" else 4)
    arguments = attention_arguments(length, current, mask=mask, causal=case == "causal", symmetric=case == "symmetric")[
        :-1
    ]
    want, _ = reference.attention(*arguments, correction)
    torch.testing.assert_close(ops.attention(*arguments, correction), want, rtol=2e-4, atol=2e-4)


def test_active_range_is_attended_in_full_precision_and_uncorrected():
    arguments = active_arguments()
    query, key_codes, key_scales, value_codes, value_scales, k, written, v, _, start, stop, key, value, *rest = (
        arguments
    )
    first, last = written.tolist()
    ranges = [start, first, last, stop]
    keys, values = torch.cat((k, key), 2), torch.cat((v, value), 2)
    want, lse = reference.attention(
        query, key_codes, key_scales, value_codes, value_scales, ranges, keys, values, *rest
    )
    torch.testing.assert_close(ops.attention_active(*arguments), want, rtol=2e-4, atol=2e-4)
    out, got = ops.attention_active_lse(*arguments)
    torch.testing.assert_close(out, want, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(got, lse, rtol=2e-4, atol=2e-4)


def test_active_ranges_that_differ_are_not_used():
    """Keys were written and values not yet: what is held of the keys has no counterpart."""
    arguments = active_arguments(written=(5, 8), values_written=(2, 5))
    query, *components = arguments[:5]
    start, stop, *rest = arguments[9:]
    want = ops.attention(query, *components, [start, stop], *rest)
    assert torch.equal(ops.attention_active(*arguments), want)


# ---- log-sum-exp ----


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("case", ["plain", "mask", "additive mask", "causal", "one query", "no current tokens"])
def test_log_sum_exp_is_the_reference(case, correction):
    mask = {"mask": torch.rand(1, 1, 3, 11) < 0.7, "additive mask": torch.randn(1, 4, 3, 11)}.get(case)
    length, current = (1 if case == "one query" else 3), (0 if case == "no current tokens" else 4)
    arguments = (*attention_arguments(length, current, mask=mask, causal=case == "causal")[:-1], correction)
    out, lse = ops.attention_lse(*arguments)
    assert torch.equal(out, ops.attention(*arguments)) and lse.dtype == torch.float32
    torch.testing.assert_close(lse, reference.attention(*arguments)[1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exp_weighs_parts_of_the_keys_exactly(correction, dtype):
    """Two attentions over halves of the keys, weighted by exp(lse_i - lse), are the attention over all of them."""
    query, *store, _, key, value, _, _, scale, key_bits, value_bits, _ = attention_arguments(length=5)
    query, key, value = (t.to(dtype) for t in (query, key, value))
    rest = (None, False, scale, key_bits, value_bits, correction)
    whole, whole_lse = ops.attention_lse(query, *store, [0, 9], key, value, *rest)
    first = ops.attention_lse(query, *store, [0, 5], key[:, :, :0], value[:, :, :0], *rest)
    second = ops.attention_lse(query, *store, [5, 9], key, value, *rest)
    lse = torch.logaddexp(first[1], second[1])
    merged = sum((part.float() * (own - lse).exp().unsqueeze(-1)) for part, own in (first, second))
    tolerance = 2e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(lse, whole_lse, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(merged, whole.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ["no keys", "a mask that hides all"])
def test_a_query_that_sees_no_key_gives_zeros_and_minus_infinity(case):
    hidden = torch.ones(1, 4, 3, 11, dtype=torch.bool).index_fill_(2, torch.tensor([1]), False)
    if case == "no keys":
        out, lse = ops.attention_lse(*attention_arguments(current=0, ranges=()))
        blind = slice(None)
    else:
        out, lse = ops.attention_lse(*attention_arguments(mask=hidden))
        blind = slice(1, 2)
        assert lse[:, :, ::2].isfinite().all() and out[:, :, ::2].abs().min() > 0
    assert torch.equal(out[:, :, blind], torch.zeros_like(out[:, :, blind]))
    assert (lse[:, :, blind] == -math.inf).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_attention_in_full_precision_with_its_log_sum_exp(causal, mask):
    """By hand; queries are grouped, and causal is PyTorch's: query i sees keys j <= i."""
    query, key, value = torch.randn(1, 4, 3, 64), torch.randn(1, 2, 7, 64), torch.randn(1, 2, 7, 32)
    given = {"boolean": torch.rand(3, 7) < 0.8, "additive": torch.randn(1, 4, 3, 7)}.get(mask)
    if mask == "boolean":
        given[:, 0] = True
    out, lse = ops.sdpa_lse(query, key, value, given, causal, 0.2)
    scores = 0.2 * query @ key.repeat_interleave(2, 1).mT
    if given is not None:
        scores = scores.masked_fill(~given, -math.inf) if mask == "boolean" else scores + given
    if causal:
        scores = scores.masked_fill(torch.arange(7) > torch.arange(3)[:, None], -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ value.repeat_interleave(2, 1))


# ---- the correction does what it is for ----


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_corrected_weights_of_quantized_keys_are_unbiased(correction):
    """E[exp(s·q·k̂ - b)] = exp(s·q·k) where the error k̂ - k is uniform on ±Δ/2 (arXiv 2605.26266).

    A random zero point per token (subtractive dither) makes it so whatever the keys are. Δ = 1, s·q·ε has variance
    s²‖q‖²/12 = 0.52, so that uncorrected weights are e^0.26 too large. The sum of weights is read off attention: cached
    values are 1, and one current token of score 0 has value 0.
    """
    tokens, head_dim, scale = 8000, 64, 0.125
    keys = 0.3 * torch.randn(1, 1, tokens, head_dim)
    query = F.normalize(torch.randn(1, 1, 8, head_dim), dim=-1) * 20
    offset = torch.rand(1, 1, 2, tokens)
    scales = torch.stack((torch.full_like(offset, 256), -256 - 8 + offset), -1).half()  # Δ = 1, first level -8 + offset
    origin = (scales[..., 0].float() + scales[..., 1].float()).transpose(2, 3).repeat_interleave(32, -1)
    codes = (keys - origin).round()
    assert codes.min() >= 0 and codes.max() < 256
    values = reference.quantize(torch.ones(1, 1, tokens, 32), 2, 32)
    zero_key, zero_value = torch.zeros(1, 1, 1, head_dim), torch.zeros(1, 1, 1, 32)
    mask = torch.full((1, 1, 8, tokens + 1), -math.log(tokens))
    mask[..., -1] = 0
    packed_keys = pack(codes.long(), 8), scales
    settings = (mask, False, scale, 8, 2, correction)
    out = ops.attention(query, *packed_keys, *values, [0, tokens], zero_key, zero_value, *settings)
    mass = out[..., 0].double()
    log_sum = (mass / (1 - mass)).log()
    truth = (scale * query.double() @ keys.double().transpose(-1, -2)).exp().mean(-1).log()
    bias = (log_sum - truth).mean().item()
    expected = scale**2 * 400 / 24 if correction == "none" else 0.0
    assert bias == pytest.approx(expected, abs=0.03)
