"""CPU kernels against `reference`: the C++ ones and the pure-torch ones, on the same cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from jkv_compile.kernels import cpu, cpu_cpp, cpu_torch, layout, ops, reference

BOUND = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# The pure-torch path rounds scores to the queries' dtype.
BOUND_TORCH = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@pytest.fixture(scope="module", params=["cpp", "torch"])
def kernels(request) -> cpu_cpp.Kernels | ModuleType:
    if request.param == "torch":
        return cpu_torch
    try:
        return cpu_cpp.load()
    except cpu_cpp.BuildError as error:
        pytest.skip(str(error))


PRODUCTS = {  # few_rows, half_precision, byte_products, in_place
    "float32": (0, False, False),
    "bytes": (0, False, True, True),
    "bytes, few rows": (16, False, True, True),
    "bfloat16, few rows in place": (16, True, False, True),
}


@pytest.fixture(scope="module", params=["cpp", "torch", *PRODUCTS])
def attending(request) -> Iterator[cpu_cpp.Kernels | ModuleType]:
    """What attends: as it is chosen here, and with products that are chosen elsewhere."""
    if request.param == "torch":
        yield cpu_torch
        return
    try:
        kernels = cpu_cpp.load()
    except cpu_cpp.BuildError as error:
        pytest.skip(str(error))
    if request.param in PRODUCTS:
        if PRODUCTS[request.param][1] and not kernels.half_precision:
            pytest.skip("torch has no products in bfloat16 for this processor")
        kernels.configure(*PRODUCTS[request.param])
    yield kernels
    kernels.choose_products()


@pytest.fixture
def configure() -> Iterator[Callable[..., None]]:
    """Sets products, until the test ends."""
    try:
        kernels = cpu_cpp.load()
    except cpu_cpp.BuildError as error:
        pytest.skip(str(error))
    yield kernels.configure
    kernels.choose_products()


def make(
    *,
    batch=1,
    heads=2,
    kv_heads=None,
    length=33,
    tokens=300,
    current=33,
    head_dim=64,
    value_dim=None,
    key_bits=2,
    value_bits=2,
    group_size=32,
    dtype=torch.bfloat16,
    ranges=None,
    mask=None,
    causal=False,
    correction="taylor",
    block=None,
    symmetric=False,
    seed=0,
) -> list:
    """Arguments of `ops.attention`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kv_heads, value_dim = kv_heads or heads, value_dim or head_dim
    key_groups = (group_size, 1, symmetric) if block is None else (1, block, symmetric)  # channels, tokens
    key_cache = reference.quantize(1.5 * randn(batch, kv_heads, tokens, head_dim) + 0.3, key_bits, *key_groups)
    value_cache = reference.quantize(
        randn(batch, kv_heads, tokens, value_dim), value_bits, group_size, symmetric=symmetric
    )
    query = randn(batch, heads, length, head_dim).to(dtype)
    key, value = (randn(batch, kv_heads, current, d).to(dtype) for d in (head_dim, value_dim))
    ranges = [0, tokens] if ranges is None else ranges
    columns = sum(ranges[1::2]) - sum(ranges[::2]) + current
    if mask == "boolean":
        mask = torch.rand(batch, 1, length, columns, generator=generator) > 0.3
    elif mask == "additive":
        mask = randn(1, heads, length, columns)
    elif mask == "keys only":
        mask = (torch.rand(columns, generator=generator) > 0.3).expand(length, columns)
    return [query, *key_cache, *value_cache, ranges, key, value, mask, causal, head_dim**-0.5, key_bits, value_bits,
            correction]  # fmt: skip


def check(kernels, arguments: list, bound: float | None = None) -> None:
    dtype = arguments[0].dtype
    expected, expected_lse = reference.attention(*arguments)
    output, lse = kernels.attention(*arguments)
    bound = bound or (BOUND_TORCH if kernels is cpu_torch else BOUND)[dtype]
    assert output.dtype == dtype and output.shape == expected.shape
    assert output.transpose(1, 2).is_contiguous()
    assert torch.equal(output.isnan(), expected.isnan()), "NaN in other places than in the reference"
    error = (output.float() - expected).nan_to_num().norm() / expected.nan_to_num().norm().clamp_min(1e-9)
    assert error < bound, f"relative error {error:.1e}"
    assert torch.equal(lse.isfinite(), expected_lse.isfinite())
    # below -1e30 it only matters that a row sees nothing but hidden keys
    difference = (lse.clamp_min(-1e30) - expected_lse.clamp_min(-1e30)).nan_to_num(posinf=0, neginf=0)
    assert difference.abs().amax() < 4 * bound


CASES = {
    "a chunk of queries": {},
    "one query": {"length": 1, "current": 1, "tokens": 700},
    "few queries": {"length": 5, "current": 5, "tokens": 700},
    "sixteen queries": {"length": 16, "current": 3, "tokens": 513},
    "more rows than one tile": {"heads": 1, "length": 801, "tokens": 90, "current": 7},
    "more keys than one block": {"tokens": 1205, "current": 600, "length": 20},
    "head_dim 64, whole-head groups": {"group_size": 64},
    "head_dim 96": {"head_dim": 96},
    "head_dim 128, groups of 32": {"head_dim": 128},
    "head_dim 128, groups of 64": {"head_dim": 128, "group_size": 64},
    "head_dim 128, groups of 128": {"head_dim": 128, "group_size": 128},
    "head_dim 256, eight groups": {"head_dim": 256},
    "head_dim 256, whole-head groups": {"head_dim": 256, "group_size": 256},
    "values narrower than keys": {"head_dim": 128, "value_dim": 64},
    "keys 4 bits, values 2": {"key_bits": 4},
    "keys 2 bits, values 4": {"value_bits": 4},
    "3 bits": {"key_bits": 3, "value_bits": 3},
    "3 bits, head_dim 96": {"key_bits": 3, "value_bits": 3, "head_dim": 96},
    "8 bits": {"key_bits": 8, "value_bits": 8},
    "grouped queries": {"heads": 6, "kv_heads": 2},
    "grouped queries, one row": {"heads": 8, "kv_heads": 2, "length": 1, "current": 1},
    "batch": {"batch": 3, "length": 3},
    "boolean mask": {"mask": "boolean"},
    "boolean mask, one query": {"mask": "boolean", "length": 1},
    "mask broadcast over batch and heads": {"mask": "keys only", "batch": 2},
    "additive mask": {"mask": "additive"},
    "causal": {"causal": True},
    "causal, fewer queries than keys": {"causal": True, "length": 10, "current": 600},
    "causal, more queries than keys": {"causal": True, "length": 40, "current": 30},
    "causal, grouped queries": {"causal": True, "heads": 4, "kv_heads": 1},
    "causal with a mask": {"causal": True, "mask": "boolean"},
    "several ranges": {"ranges": [3, 50, 200, 300, 60, 61]},
    "an empty range": {"ranges": [3, 50, 50, 50]},
    "nothing cached": {"ranges": []},
    "no current keys": {"current": 0},
    "per-channel key steps": {"block": 30, "head_dim": 128},
    "per-channel key steps of 120 tokens": {"block": 120, "head_dim": 128, "tokens": 720, "ranges": [7, 131, 200, 660]},
    "per-channel key steps of 40 tokens, one query": {
        "block": 40,
        "tokens": 320,
        "length": 1,
        "ranges": [7, 131, 200, 280],
    },
    "per-channel key steps, one query": {"block": 20, "length": 1, "ranges": [7, 131, 200, 280]},
    "uncorrected": {"correction": "none"},
    "symmetric": {"symmetric": True, "group_size": 64},
    "symmetric, one query": {"symmetric": True, "length": 1, "tokens": 700, "head_dim": 128, "group_size": 64},
    "symmetric, keys 3 bits, values 8": {"symmetric": True, "key_bits": 3, "value_bits": 8, "head_dim": 96},
    "symmetric per-channel key steps": {"symmetric": True, "block": 20, "length": 7, "ranges": [7, 131, 200, 280]},
    "symmetric, exact correction": {"symmetric": True, "correction": "exact", "length": 7, "tokens": 40},
    "exact correction": {"correction": "exact", "length": 7, "tokens": 40},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_is_the_reference(attending, case, dtype):
    arguments = make(**case, dtype=dtype)
    if attending is not cpu_torch and case.get("correction") == "exact":
        with pytest.raises(NotImplementedError):
            attending.attention(*arguments)
        attending = cpu  # which chooses
    check(attending, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("mask", [None, "additive"])
def test_a_clamped_correction_is_the_reference(kernels, length, mask, dtype):
    """Queries so large that the clamp cuts half of the corrections: what bf16 leaves of their scores is bounded wider."""
    arguments = make(length=length, tokens=300, mask=mask, dtype=dtype, correction="clamped")
    arguments[0] = 2.5 * arguments[0]
    delta = reference.quantization_step(arguments[2], 2).repeat_interleave(
        arguments[0].shape[1] // arguments[1].shape[1], 1
    )
    bias = reference.correction_bias(arguments[0], delta, arguments[10], "taylor")
    assert 0.2 < (bias > reference.CLAMP).float().mean() < 0.8
    check(kernels, arguments, bound=1.5e-2 if dtype == torch.bfloat16 else None)


FEW_ROWS = {  # bits, head_dim, group_size
    "groups of one plane": (2, 128, 32),
    "groups of two planes": (2, 128, 64),
    "groups of all planes": (2, 128, 128),
    "two groups to a plane": (2, 256, 32),
    "head_dim 64": (2, 64, 64),
    "half a vector to a plane": (2, 32, 32),
    "groups that straddle planes": (2, 192, 64),
    "head_dim 96": (2, 96, 32),
    "4 bits": (4, 128, 64),
    "4 bits, groups of two planes": (4, 64, 64),
    "3 bits": (3, 128, 64),
}


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("bits,head_dim,group_size", FEW_ROWS.values(), ids=FEW_ROWS.keys())
@pytest.mark.parametrize("tokens", [3, 530])
def test_few_rows_are_more_precise_than_bfloat16_products(bits, head_dim, group_size, length, tokens):
    kernels = cpu.kernels()
    if kernels is None:
        pytest.skip("no C++ kernels")
    channels_of_a_plane = head_dim * bits // 8
    in_place = bits != 3 and channels_of_a_plane % 16 == 0  # else products in bf16, where the library has none of bytes
    general = kernels.few_rows == 0 or (kernels.in_place and not in_place)
    check(cpu, make(length=length, tokens=tokens, current=0, key_bits=bits, value_bits=bits, head_dim=head_dim,
                    group_size=group_size), bound=BOUND[torch.bfloat16] if general else 2.5e-3)  # fmt: skip


@pytest.mark.parametrize("few_rows", [0, 16])
@pytest.mark.parametrize("length", [9, 70])
@pytest.mark.parametrize("bits,head_dim,group_size", [x for x in FEW_ROWS.values() if x[1] >= 64])
def test_bytes_are_more_precise_than_bfloat16_products(configure, bits, head_dim, group_size, length, few_rows):
    configure(few_rows, half_precision=False, byte_products=True, in_place=True)
    check(cpu_cpp.load(), make(length=length, tokens=530, current=0, key_bits=bits, value_bits=bits, head_dim=head_dim,
                               group_size=group_size, dtype=torch.float16), bound=2e-3)  # fmt: skip


def test_bytes_of_many_small_weights_beside_a_large_one(configure):
    """Each less than a thousandth of it, and together as much; on average values are far from a middle code."""
    configure(0, half_precision=False, byte_products=True, in_place=True)
    arguments = make(length=20, tokens=1024, current=0, head_dim=128, group_size=64, dtype=torch.float16)
    values = torch.randn(1, 2, 1024, 128) + 4 * torch.randn(128)
    arguments[3:5] = reference.quantize(values, 2, 64)
    arguments[8] = torch.zeros(1, 1, 20, 1024)
    arguments[8][..., 100] = 9.0
    check(cpu_cpp.load(), arguments, bound=2e-3)


def test_bytes_with_the_largest_codes_in_every_place(configure):
    configure(0, half_precision=False, byte_products=True, in_place=True)
    test_few_rows_with_the_largest_codes_in_every_place()


def test_few_rows_with_the_largest_codes_in_every_place():
    """Sums are integers: nothing may overflow."""
    arguments = make(length=2, tokens=1024, current=0, head_dim=256, group_size=256, key_bits=4, value_bits=4,
                     dtype=torch.float16)  # fmt: skip
    for codes in arguments[1], arguments[3]:
        codes.fill_(255)
    for scales in arguments[2], arguments[4]:
        scales[:] = torch.tensor([0.5, -0.7])
    arguments[0].fill_(3.0)
    kernels = cpu.kernels()
    integers = kernels is not None and (kernels.few_rows or kernels.byte_products)
    check(cpu, arguments, bound=1e-3 if integers else BOUND[torch.float16])


@pytest.mark.parametrize("length", [1, 40])
def test_float16_queries(attending, length):
    check(attending, make(dtype=torch.float16, length=length))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 70])
def test_keys_are_split_over_threads_that_would_idle(attending, threads, length):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(attending, make(heads=1, length=length, tokens=2100 if length > 1 else 34000, current=31))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("length", [1, 33])
def test_any_strides(attending, length, symmetric):
    query, key_codes, key_scales, value_codes, value_scales, _, key, value, *rest = make(
        batch=2, length=length, head_dim=128, mask="boolean", symmetric=symmetric
    )

    def tokens_first(x: Tensor) -> Tensor:  # [B, S, H, …] in memory
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    batch_view = torch.cat((key_codes, key_codes))[1:3]
    groups_apart = value_scales.transpose(2, 3).contiguous().transpose(2, 3)
    later = (value_codes[:, :, 5:], groups_apart[:, :, :, 5:], [0, 200, 250, 290])
    full = (tokens_first(key), tokens_first(value), rest[0][..., 10 : 10 + 273])
    check(attending, [tokens_first(query), batch_view, key_scales, *later, *full, *rest[1:]])


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("where", ["step of a key", "step of a value", "query", "current key", "current value"])
def test_nan_comes_out_where_the_reference_has_it(attending, where, length):
    arguments = make(head_dim=128, length=length)
    nan = float("nan")
    if where == "step of a key":
        arguments[2][0, 0, 1, 17] = nan
    elif where == "step of a value":
        arguments[4][0, 0, 1, 17] = nan
    elif where == "query":
        arguments[0][0, 1, length // 2, 3] = nan
    else:
        arguments[6 if where == "current key" else 7][0, 0, 3, 5] = nan
    check(attending, arguments)


@pytest.mark.parametrize("length", [1, 20])
def test_rows_that_see_nothing_are_zero_as_pytorchs(attending, length):
    arguments = make(length=length, mask="boolean")
    arguments[8] = arguments[8].expand(1, 2, length, -1).clone()
    arguments[8][0, 1, length // 2] = False
    check(attending, arguments)
    assert not attending.attention(*arguments)[0][0, 1, length // 2].any()


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min], ids=["-inf", "lowest float"])
def test_additive_masks_that_hide(attending, low, length):
    arguments = make(length=length, mask="boolean", tokens=1100)
    hidden = ~arguments[8]
    hidden[..., :1024] = True  # whole blocks
    hidden[..., length // 2, :] = True  # and a whole row
    arguments[8] = torch.zeros(hidden.shape).masked_fill(hidden, low)
    if low == -math.inf or attending is not cpu_torch:
        check(attending, arguments)


def test_scores_of_any_size(kernels):
    arguments = make(length=20, dtype=torch.float32)
    arguments[0] *= 300.0
    check(kernels, arguments, bound=1e-3)


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", layout.SUPPORTED_BITS)
@pytest.mark.parametrize("head_dim,group_size", [(64, 64), (96, 32), (128, 64), (256, 128)])
def test_append_and_dequantize_are_the_reference_bit_for_bit(kernels, head_dim, group_size, bits, dtype, symmetric):
    source = torch.randn(2, 3, 37, head_dim, generator=torch.Generator().manual_seed(0))
    source *= torch.rand(2, 3, 37, 1, generator=torch.Generator().manual_seed(1)) * 5
    source[0, 0, 0] = 1  # constant
    source[0, 1, 2, 3] = math.nan
    source[1, 1, 3, 40] = math.inf
    source[1, 1, 4, 40] = -math.inf
    source[0, 2, 2] = 0
    source[0, 2, 3] *= 1e-5
    source = source.to(dtype)
    source[0, 2, 4, ::2] = torch.finfo(dtype).max  # saturates
    source[0, 2, 5, :2] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min])  # the range may be infinite
    codes, scales = reference.quantize(source, bits, group_size, symmetric=symmetric)
    my_codes = torch.full((2, 3, 50, codes.shape[3]), 7, dtype=torch.uint8)
    my_scales = torch.full((2, 3, head_dim // group_size, 50, 2 - symmetric), 7, dtype=torch.float16)
    kernels.append(my_codes, my_scales, source.transpose(1, 2).contiguous().transpose(1, 2), 7, bits)
    assert torch.equal(my_codes[:, :, 7:44], codes)
    torch.testing.assert_close(my_scales[:, :, :, 7:44], scales, rtol=0, atol=0, equal_nan=True)
    for untouched in (my_codes[:, :, :7], my_codes[:, :, 44:], my_scales[:, :, :, :7], my_scales[:, :, :, 44:]):
        assert (untouched == 7).all()
    mine = kernels.dequantize(my_codes, my_scales, 7, 44, bits, dtype)
    expected = reference.dequantize(codes, scales, bits).to(dtype)
    torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize("bits", layout.SUPPORTED_BITS)
def test_ties_round_to_even_and_their_neighbours_do_not(kernels, bits, symmetric):
    levels = 2**bits
    grid = torch.arange(2 * levels - 1) / 2  # every level and every tie, at a step of 1
    ties = torch.stack((grid, grid.nextafter(grid + 1), grid.nextafter(grid - 1))).clamp(0, levels - 1)
    rows = ties.reshape(-1).split(62)
    source = torch.zeros(1, 1, len(rows), 64)
    for row, values in zip(source[0, 0], rows):
        row[: len(values)], row[-1] = values, levels - 1
    source = source - (levels - 1) / 2 if symmetric else source
    source = torch.cat((source, 0.7 * source - 0.3), 2)
    codes, scales = reference.quantize(source, bits, 64, symmetric=symmetric)
    mine, my_scales = torch.zeros_like(codes), torch.zeros_like(scales)
    kernels.append(mine, my_scales, source, 0, bits)
    assert torch.equal(mine, codes) and torch.equal(my_scales, scales)


@pytest.mark.parametrize("factor", [1, 8, 60])
def test_scores_that_grow_from_block_to_block(attending, factor):
    """As far as exponents reach, and beyond, where 2-byte products are less precise, but nothing overflows."""
    arguments = make(heads=1, length=20, tokens=2048, current=0)
    arguments[2] *= torch.linspace(0.1, 6, 2048)[:, None].half()
    arguments[0] *= factor
    expected, expected_lse = reference.attention(*arguments)
    output, lse = attending.attention(*arguments)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-2, atol=0.1)
    error = (output.float() - expected).norm() / expected.norm()
    assert error < 5e-2, f"relative error {error:.1e}"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("source,destination,length", [(7, 3, 30), (3, 7, 30), (0, 40, 10), (5, 5, 5), (0, 1, 0)])
def test_move_copies_bits(kernels, source, destination, length, symmetric):
    codes, scales = reference.quantize(torch.randn(2, 3, 50, 64), 2, 32, symmetric=symmetric)
    for view in (lambda x, token: x, lambda x, token: x.transpose(1, token).contiguous().transpose(1, token)):
        mine, my_scales = view(codes.clone(), 2), view(scales.clone(), 3)
        kernels.move(mine, my_scales, source, destination, length)
        expected, expected_scales = codes.clone(), scales.clone()
        expected[:, :, destination : destination + length] = codes[:, :, source : source + length]
        expected_scales[:, :, :, destination : destination + length] = scales[:, :, :, source : source + length]
        assert torch.equal(mine, expected) and torch.equal(my_scales, expected_scales)


@pytest.mark.parametrize("length", [1, 33])
def test_operators_pass_opcheck(length):
    arguments = make(length=length)
    codes, scales = arguments[1], arguments[2]
    torch.library.opcheck(torch.ops.jkv.attention.default, arguments)
    torch.library.opcheck(torch.ops.jkv.append.default, (codes, scales, torch.randn(1, 2, 9, 64), 3, 2))
    torch.library.opcheck(torch.ops.jkv.move.default, (codes, scales, 3, 7, 20))
    torch.library.opcheck(torch.ops.jkv.dequantize.default, (codes, scales, 3, 7, 2, torch.bfloat16))


def test_ranges_outside_the_cache_are_errors():
    arguments = make()
    arguments[5] = [0, 301]
    with pytest.raises(RuntimeError, match="do not lie within"):
        ops.attention(*arguments)


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize("bits", layout.SUPPORTED_BITS)
def test_per_channel_steps_round_to_the_nearest_level(bits, symmetric):
    x = torch.randn(1, 2, 60, 64, generator=torch.Generator().manual_seed(0))
    codes, scales = reference.quantize(x, bits, 1, block=20, symmetric=symmetric)
    assert scales.shape == (1, 2, 64, 3, 2 - symmetric)
    delta = reference.quantization_step(reference.per_token(scales, 60), bits)
    assert ((reference.dequantize(codes, scales, bits) - x).abs() <= 0.52 * delta).all()
    same = torch.zeros_like(codes), torch.zeros_like(scales)
    cpu.append(*same, x[:, :, 20:], 20, bits)
    assert torch.equal(same[0][:, :, 20:], codes[:, :, 20:]) and torch.equal(same[1][:, :, :, 1:], scales[:, :, :, 1:])
    cpu.move(*same, 20, 0, 20)
    assert torch.equal(
        cpu.dequantize(*same, 0, 40, bits, x.dtype)[:, :, :20], reference.dequantize(codes, scales, bits)[:, :, 20:40]
    )
    with pytest.raises(RuntimeError, match="must be multiples of 20"):
        cpu.append(*same, x[:, :, :20], 10, bits)
