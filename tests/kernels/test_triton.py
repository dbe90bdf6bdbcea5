"""The Triton kernels against the plain-torch reference: on a GPU as compiled, elsewhere in Triton's interpreter.

The interpreter must be chosen before triton is imported, so without a GPU these tests run in a process of their own,
started by `test_triton_interpreted.py`.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1; see test_triton_interpreted.py", allow_module_level=True)

pytest.importorskip("triton")

from jkv_compile.kernels import bench_gpu, gpu, gpu_rotate, quantizers, reference, triton_config  # noqa: E402
from jkv_compile.kernels.layout import pack, packed_width, unpack  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy, inside the interpreter

FLOORS = {torch.bfloat16: 2e-3, torch.float16: 4e-4, torch.float32: 6e-4}  # relative; cached products are float16
TOKENS = 200


def quantized(batch: int, heads: int, head_dim: int, bits: int, group_size: int, symmetric: bool = False):
    source = torch.randn(batch, heads, TOKENS, head_dim)
    codes, scales = reference.quantize(source, bits, group_size, symmetric=symmetric)
    return codes.to(DEVICE), scales.to(DEVICE)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def check(
    batch=1, heads=1, kv_heads=1, queries=40, current=40, ranges=(5, 135), head_dim=64, value_dim=None, group=32,
    key_bits=2, value_bits=2, dtype=torch.bfloat16, mask=None, causal=False, correction="taylor", scale=None,
    symmetric=False,
):  # fmt: skip
    """Attention of `gpu` against the float32 reference on the same packed data."""
    torch.manual_seed(0)
    value_dim = value_dim or head_dim
    scale = head_dim**-0.5 if scale is None else scale
    query = 2 * torch.randn(batch, queries, heads, head_dim).to(DEVICE, dtype).transpose(1, 2)
    key = torch.randn(batch, kv_heads, current, head_dim).to(DEVICE, dtype)
    value = torch.randn(batch, current, kv_heads, value_dim).to(DEVICE, dtype).transpose(1, 2)
    store = (
        *quantized(batch, kv_heads, head_dim, key_bits, group, symmetric),
        *quantized(batch, kv_heads, value_dim, value_bits, min(group, value_dim), symmetric),
    )
    columns = sum(b - a for a, b in zip(ranges[::2], ranges[1::2])) + current
    if mask == "boolean":
        mask = torch.rand(batch, 1, queries, columns, device=DEVICE) < 0.7
        mask[..., -1] = True
    elif mask == "additive":
        mask = torch.randn(1, heads, queries, columns, device=DEVICE).to(dtype)
    arguments = (query, *store, list(ranges), key, value, mask, causal, scale, key_bits, value_bits, correction)
    output, lse = gpu.attention(*arguments)
    expected, expected_lse = reference.attention(*arguments)
    assert output.dtype == dtype and output.transpose(1, 2).is_contiguous()
    assert relative_error(output, expected) < FLOORS[dtype]
    torch.testing.assert_close(lse, expected_lse, atol=3e-3, rtol=1e-3)


@pytest.fixture
def architecture(monkeypatch):
    """Change the table that the device under test is looked up in."""

    def change(**fields):
        name = triton_config.architecture_of(torch.device(DEVICE))
        changed = dataclasses.replace(triton_config.ARCHITECTURES[name], **fields)
        monkeypatch.setitem(triton_config.ARCHITECTURES, name, changed)

    return change


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize(
    "head_dim, group, bits, dtype",
    [
        (64, 32, 2, torch.float32), (64, 64, 3, torch.bfloat16), (96, 32, 2, torch.bfloat16),
        (96, 96, 3, torch.float32),
        (96, 32, 4, torch.float16), (128, 32, 2, torch.bfloat16), (128, 128, 4, torch.float16),
        (128, 64, 8, torch.bfloat16), (256, 32, 3, torch.bfloat16), (256, 256, 2, torch.float32),
    ],
)  # fmt: skip
def test_append_writes_the_references_bits_and_dequantize_reads_them(head_dim, group, bits, dtype, layout, symmetric):
    torch.manual_seed(0)
    batch, heads, tokens, start, length = 2, 2, 40, 7, 21
    source = torch.randn(batch, length, heads, head_dim) if layout == "BSHD" else None
    source = torch.randn(batch, heads, length, head_dim) if source is None else source.transpose(1, 2)
    source = source.to(DEVICE, dtype)
    source[0, 0, 2] = 3.0  # constant groups
    source[0, 1, 3] = 0.0
    codes = torch.zeros(batch, heads, tokens, packed_width(head_dim, bits), dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(batch, heads, head_dim // group, tokens, 2 - symmetric, dtype=torch.float16, device=DEVICE)
    gpu.append(codes, scales, source, start, bits)
    expected_codes, expected_scales = reference.quantize(source, bits, group, symmetric=symmetric)
    written = slice(start, start + length)
    assert torch.equal(codes[:, :, written], expected_codes)
    assert torch.equal(scales[:, :, :, written], expected_scales)
    assert not codes[:, :, :start].any() and not codes[:, :, start + length :].any()
    assert not scales[:, :, :, :start].any() and not scales[:, :, :, start + length :].any()
    for out in (torch.float32, torch.bfloat16, torch.float16):
        actual = gpu.dequantize(codes, scales, start, start + length, bits, out)
        assert torch.equal(actual, reference.dequantize(expected_codes, expected_scales, bits).to(out))


def test_append_takes_a_source_whose_channels_are_not_contiguous():
    torch.manual_seed(0)
    source = torch.randn(1, 1, 64, 30, device=DEVICE).transpose(2, 3)
    codes = torch.zeros(1, 1, 30, 16, dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(1, 1, 2, 30, 2, dtype=torch.float16, device=DEVICE)
    gpu.append(codes, scales, source, 0, 2)
    assert torch.equal(codes, reference.quantize(source, 2, 32)[0])


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_append_confines_non_finite_numbers_to_their_group(head_dim, symmetric):
    torch.manual_seed(0)
    source = torch.randn(1, 1, 8, head_dim, device=DEVICE)
    source[0, 0, 1, 3], source[0, 0, 2, 40], source[0, 0, 3, 40] = float("nan"), float("inf"), -float("inf")
    source[0, 0, 4, :2] = torch.tensor([3e38, -3e38])  # finite, but the range is not
    source[0, 0, 5, :2] = torch.tensor([6e4, -6e4])  # the step saturates
    codes = torch.zeros(1, 1, 8, head_dim // 4, dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(1, 1, head_dim // 32, 8, 2 - symmetric, dtype=torch.float16, device=DEVICE)
    gpu.append(codes, scales, source, 0, 2)
    expected_codes, expected_scales = reference.quantize(source, 2, 32, symmetric=symmetric)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales.view(torch.int16), expected_scales.view(torch.int16))
    assert scales.isnan().sum() == (3 if symmetric else 2 * 4)  # of steps alone the range may be infinite


class _Launches:
    """A kernel that counts how often it is launched."""

    def __init__(self, kernel):
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]


def test_append_kv_is_two_appends_in_one_launch(monkeypatch):
    torch.manual_seed(0)
    launches = _Launches(gpu.append_kernel)
    monkeypatch.setattr(gpu, "append_kernel", launches)
    key, value = torch.randn(1, 2, 9, 64, device=DEVICE), torch.randn(1, 2, 9, 128, device=DEVICE)

    def stores():
        return [
            torch.zeros(1, 2, 12, 24, dtype=torch.uint8, device=DEVICE),
            torch.zeros(1, 2, 2, 12, 2, dtype=torch.float16, device=DEVICE),
            torch.zeros(1, 2, 12, 32, dtype=torch.uint8, device=DEVICE),
            torch.zeros(1, 2, 1, 12, 2, dtype=torch.float16, device=DEVICE),
        ]

    joint, apart = stores(), stores()
    gpu.append_kv(*joint, key, value, 2, 3, 2)
    assert launches.count == 1
    gpu.append(*apart[:2], key, 2, 3)
    gpu.append(*apart[2:], value, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(joint, apart))


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize(
    "head_dim, group, block, bits, dtype",
    [
        (64, 1, 32, 2, torch.bfloat16), (96, 1, 8, 3, torch.float32), (128, 1, 20, 4, torch.float16),
        (64, 1, 40, 2, torch.float32), (32, 1, 120, 2, torch.bfloat16), (32, 1, 39, 8, torch.float32),
        (96, 32, 16, 2, torch.float32),
    ],
)  # fmt: skip
def test_append_of_blocks_of_tokens_that_share_steps(head_dim, group, block, bits, dtype, symmetric):
    """KIVI's keys (one step per channel and block) beside per-token values, in one launch; and by themselves."""
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, 2, 2 * block, head_dim).to(DEVICE, dtype)
    key[0, 0, 3, 5], key[0, 1, 2, head_dim - 1], key[0, 0, block:, 7] = float("nan"), float("inf"), 2.0
    key_codes = torch.zeros(1, 2, 4 * block, packed_width(head_dim, bits), dtype=torch.uint8, device=DEVICE)
    key_scales = torch.zeros(1, 2, head_dim // group, 4, 2 - symmetric, dtype=torch.float16, device=DEVICE)
    value_codes = torch.zeros(1, 2, 4 * block, packed_width(head_dim, 2), dtype=torch.uint8, device=DEVICE)
    value_scales = torch.zeros(1, 2, 1, 4 * block, 2, dtype=torch.float16, device=DEVICE)
    alone = key_codes.clone(), key_scales.clone()
    gpu.append_kv(key_codes, key_scales, value_codes, value_scales, key, value, block, bits, 2)
    gpu.append(*alone, key, block, bits)
    codes, scales = reference.quantize(key, bits, group, block, symmetric)
    assert torch.equal(key_codes[:, :, block : 3 * block], codes)
    assert torch.equal(key_scales[:, :, :, 1:3].contiguous().view(torch.int16), scales.view(torch.int16))
    assert scales.isnan().sum() == 2 * (2 - symmetric)  # of two groups in one block each
    assert torch.equal(alone[0], key_codes) and torch.equal(alone[1].view(torch.int16), key_scales.view(torch.int16))
    assert not key_codes[:, :, :block].any() and not key_scales[:, :, :, 3].any()
    codes, scales = reference.quantize(value, 2, head_dim)
    assert torch.equal(value_codes[:, :, block : 3 * block], codes)
    assert torch.equal(value_scales[:, :, :, block : 3 * block], scales)


def test_append_of_part_of_a_block_is_an_error_and_changes_nothing():
    codes = torch.zeros(1, 1, 32, 16, dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(1, 1, 64, 2, 2, dtype=torch.float16, device=DEVICE)
    with pytest.raises(RuntimeError, match="must be multiples of 16"):
        gpu.append(codes, scales, torch.randn(1, 1, 16, 64, device=DEVICE), 8, 2)
    assert not codes.any() and not scales.any()


MOVES = {
    "to the left, overlapping": (70, 10, 110),
    "to the right, overlapping": (10, 70, 110),
    "apart": (0, 100, 60),
    "by one, so that it goes aside": (1, 0, 199),
    "by nothing": (20, 20, 100),
    "of nothing": (20, 30, 0),
}


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize("name", MOVES)
def test_move_copies_packed_tokens_bit_for_bit(name, symmetric):
    torch.manual_seed(0)
    source, destination, length = MOVES[name]
    codes, scales = quantized(2, 2, 96, 3, 32, symmetric)
    expected = codes.clone(), scales.clone()
    expected[0][:, :, destination : destination + length] = codes[:, :, source : source + length]
    expected[1][:, :, :, destination : destination + length] = scales[:, :, :, source : source + length]
    gpu.move(codes, scales, source, destination, length)
    assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])


def test_move_takes_the_steps_of_blocks_along_and_leaves_other_heads_alone():
    torch.manual_seed(0)
    codes, scales = (t.to(DEVICE) for t in reference.quantize(torch.randn(1, 3, 160, 64), 2, 1, 16))
    expected = codes.clone(), scales.clone()
    expected[0][:, 1:2, 16:112] = codes[:, 1:2, 64:160]
    expected[1][:, 1:2, :, 1:7] = scales[:, 1:2, :, 4:10]
    gpu.move(codes[:, 1:2], scales[:, 1:2], 64, 16, 96)
    assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])


@pytest.mark.parametrize(
    "head_dim, dtype",
    [
        (64, torch.bfloat16), (80, torch.float16), (96, torch.float32), (128, torch.bfloat16), (256, torch.float32),
    ],
)  # fmt: skip
def test_rotation_is_a_hadamard_matrix_times_each_run_of_channels(head_dim, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 21, 3, head_dim).to(DEVICE, dtype).transpose(1, 2)
    rotated = gpu_rotate.rotate(x)
    assert rotated.dtype == dtype and rotated.stride() == x.stride()
    expected = quantizers.rotate(x.cpu().double().float())
    assert relative_error(rotated.cpu(), expected) < {torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize(
    "head_dim, group, bits, dtype",
    [
        (64, 32, 2, torch.bfloat16), (96, 32, 3, torch.float32), (128, 64, 2, torch.float16),
        (256, 256, 8, torch.float32),
    ],
)  # fmt: skip
def test_rounding_on_the_unbiased_grid(head_dim, group, bits, dtype, symmetric):
    torch.manual_seed(0)
    x = torch.randn(1, 21, 2, head_dim).to(DEVICE, dtype).transpose(1, 2)
    x[0, 0, 2], x[0, 1, 3], x[0, 0, 4, 7] = 2.5, 0.0, 40.0
    rounded, expected = (f.round_unbiased(x, bits, group, symmetric) for f in (gpu_rotate, quantizers))
    assert rounded.dtype == torch.float32 and rounded.is_contiguous()
    assert relative_error(rounded, expected) < 3e-3 / 2**bits  # a code or two on the other side of a tie
    rotated = quantizers.rotate(x.float()).unflatten(-1, (-1, group))
    error = rounded.unflatten(-1, (-1, group)) - rotated
    assert ((error * rotated).sum(-1).abs() < 1e-4 * rotated.square().sum(-1) + 1e-6).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rounding_on_the_unbiased_grid_does_not_lose_non_finite_numbers(value):
    x = torch.randn(1, 1, 3, 96, device=DEVICE)
    x[0, 0, 1, 40] = value
    rounded = gpu_rotate.round_unbiased(x, 2, 32)
    assert rounded.isnan().nonzero()[:, 2:].tolist() == [[1, c] for c in range(32, 64)]


def test_what_the_rotation_kernel_does_not_take_goes_the_plain_way():
    for x, group in ((torch.randn(3, 5, 64), 32), (torch.randn(1, 2, 3, 24), 8), (torch.randn(1, 2, 3, 96), 48)):
        assert torch.equal(gpu_rotate.round_unbiased(x, 2, group), quantizers.round_unbiased(x, 2, group))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_in_every_dtype(dtype):
    check(dtype=dtype, head_dim=128)


@pytest.mark.parametrize("group", [32, 64, 128, "head"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_attention_at_every_head_dim_and_group_size(head_dim, group):
    group = head_dim if group == "head" else group
    if head_dim % group:
        pytest.skip("the group size does not divide head_dim")
    check(head_dim=head_dim, group=group, queries=20, current=20)


@pytest.mark.parametrize("key_bits, value_bits", [(2, 3), (3, 2), (4, 8), (8, 4), (3, 3)])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_attention_with_bits_of_keys_and_values_apart(head_dim, key_bits, value_bits):
    check(head_dim=head_dim, key_bits=key_bits, value_bits=value_bits, queries=20, current=20)


@pytest.mark.parametrize("head_dim, group", [(64, 64), (128, 64), (96, 32), (64, 32)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_attention_without_zero_points(head_dim, group, bits):
    check(head_dim=head_dim, group=group, key_bits=bits, value_bits=bits, queries=20, current=20, symmetric=True)


def test_attention_with_other_head_dims_for_values():
    check(head_dim=64, value_dim=128)
    check(head_dim=128, value_dim=32)


@pytest.mark.parametrize("mask", ["boolean", "additive"])
def test_attention_with_masks(mask):
    check(mask=mask, batch=2, heads=4, kv_heads=2)


def test_a_fully_masked_row_is_zero():
    torch.manual_seed(0)
    query = torch.randn(1, 1, 3, 64, device=DEVICE)
    mask = torch.ones(1, 1, 3, 70, dtype=torch.bool, device=DEVICE)
    mask[..., 1, :] = False
    store = (*quantized(1, 1, 64, 2, 32), *quantized(1, 1, 64, 2, 32))
    output, lse = gpu.attention(
        query, *store, [0, 67], query, query, mask, False, 0.125, 2, 2, "taylor"
    )  # fmt: skip
    assert not output[0, 0, 1].any() and lse[0, 0, 1] == -float("inf")
    assert output.isfinite().all()


@pytest.mark.parametrize("queries, current", [(50, 90), (90, 90), (90, 50), (1, 64)])
def test_attention_causal_within_the_current_keys(queries, current):
    check(queries=queries, current=current, causal=True)


def test_attention_with_a_sink_and_a_window_in_full_precision():
    """They are keys like the current chunk's, and before it: neither dequantized nor corrected, all of them visible."""
    sink, window, chunk = 16, 30, 20
    check(queries=chunk, current=sink + window + chunk, ranges=(sink, 150))


def test_attention_causal_and_masked_with_grouped_heads():
    check(heads=4, kv_heads=2, queries=30, current=50, causal=True, mask="additive")


@pytest.mark.parametrize("ranges", [(0, 200), (64, 128), (5, 60, 100, 170), (0, 1, 3, 9, 9, 9, 70, 200)])
def test_attention_over_token_ranges(ranges):
    check(ranges=ranges)


@pytest.mark.parametrize("correction, mask", [("taylor", None), ("exact", "additive")])
def test_attention_over_more_ranges_than_the_fused_kernel_takes(correction, mask):
    check(ranges=(3, 10, 20, 30, 40, 50, 60, 70, 80, 190), correction=correction, mask=mask, queries=10)


def per_channel(x: torch.Tensor, bits: int, block: int):
    """KIVI: one step per channel and block of tokens; codes, scales `[B, H, D, S / block, 2]`, x̂ and Δ per token."""
    batch, heads, _, head_dim = x.shape
    transposed = x.unflatten(2, (-1, block)).transpose(3, 4).flatten(2, 3)  # [B, H, blocks · D, block]
    codes, scales = reference.quantize(transposed, bits, block)
    restored = reference.dequantize(codes, scales, bits)
    delta = reference.quantization_step(scales, bits).expand_as(restored)
    restored, delta, integers = (
        t.unflatten(2, (-1, head_dim)).transpose(3, 4).flatten(2, 3) for t in (restored, delta, unpack(codes, bits))
    )
    return (
        pack(integers, bits),
        scales.view(batch, heads, -1, head_dim, 2).transpose(2, 3).contiguous(),
        restored,
        delta,
    )


@pytest.mark.parametrize("correction", ["taylor", "clamped", "exact", "none"])
@pytest.mark.parametrize(
    "block, ranges", [(32, (0, 192)), (32, (5, 60, 100, 170)), (48, (0, 192)), (40, (5, 60, 100, 170))]
)
def test_attention_with_per_channel_steps_shared_by_blocks_of_tokens(correction, block, ranges):
    torch.manual_seed(0)
    x = torch.randn(1, 2, -(-192 // block) * block, 64)
    codes, scales, cached_key, delta = (t.to(DEVICE) for t in per_channel(x, 2, block))
    assert torch.equal(gpu.dequantize(codes, scales, 7, 180, 2, torch.float32), cached_key[:, :, 7:180])
    values, value_scales = (
        t[:, :, :192] if i == 0 else t[:, :, :, :192] for i, t in enumerate(quantized(1, 2, 64, 2, 32))
    )
    query = 2 * torch.randn(1, 4, 20, 64, device=DEVICE)
    key = torch.randn(1, 2, 20, 64, device=DEVICE)
    arguments = (query, codes, scales, values, value_scales, list(ranges), key, key, None, False, 0.125, 2, 2)
    output, lse = gpu.attention(*arguments, correction)

    tokens = torch.cat([torch.arange(a, b) for a, b in zip(ranges[::2], ranges[1::2])])
    keys, steps, seen = (
        t[:, :, tokens].repeat_interleave(2, 1)
        for t in (cached_key, delta, reference.dequantize(values, value_scales, 2))
    )
    key = key.repeat_interleave(2, 1)
    cached = 0.125 * query @ keys.mT - reference.correction_bias(query, steps, 0.125, correction)
    scores = torch.cat((cached, 0.125 * query @ key.mT), -1)
    assert relative_error(output, scores.softmax(-1) @ torch.cat((seen, key), 2)) < 6e-4
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=3e-3, rtol=1e-3)


def test_attention_without_cached_or_without_current_keys():
    check(ranges=())
    check(current=0)


def test_attention_beside_a_cache_of_no_tokens():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 5, 64, device=DEVICE), torch.randn(1, 1, 9, 64, device=DEVICE)
    empty = [t[:, :, :0] if i % 2 == 0 else t[:, :, :, :0] for i, t in enumerate(quantized(1, 1, 64, 2, 32) * 2)]
    output, _ = gpu.attention(query, *empty, [], key, key, None, False, 0.125, 2, 2, "taylor")
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key, scale=0.125, enable_gqa=True)
    assert relative_error(output, expected) < FLOORS[torch.float32]


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize("correction", ["none", "exact"])
def test_attention_with_other_corrections(correction, symmetric):
    check(correction=correction, queries=16, head_dim=64, symmetric=symmetric)


@pytest.mark.parametrize("unpack_once", [False, True], ids=["fused", "unpack once"])
def test_attention_with_a_clamped_correction(unpack_once, architecture):
    """Scores so large that the clamp cuts most corrections, masks and ranges with it."""
    if unpack_once:
        architecture(unpack_once_rows=1)
    check(correction="clamped", queries=16, scale=0.3)
    check(correction="clamped", queries=16, head_dim=128, mask="additive", ranges=(0, 30, 50, 90), scale=0.2)


def test_attention_with_a_negative_and_a_zero_scale():
    check(scale=-0.1)
    check(scale=0.0)


@pytest.mark.parametrize("queries, heads, kv_heads", [(1, 8, 2), (1, 1, 1), (3, 2, 2)])
def test_decode_splits_the_keys_and_merges_by_log_sum_exp(queries, heads, kv_heads, monkeypatch):
    monkeypatch.setattr(gpu, "processors_of", lambda device: 64)
    check(queries=queries, current=queries, heads=heads, kv_heads=kv_heads, ranges=(0, 200), causal=True)
    check(queries=queries, current=70, heads=heads, kv_heads=kv_heads, ranges=(0, 100), mask="boolean", batch=2)


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize("head_dim, key_bits", [(64, 2), (96, 3), (128, 4)])
def test_unpack_once_computes_the_same(head_dim, key_bits, symmetric, architecture):
    architecture(unpack_once_rows=1)
    check(head_dim=head_dim, key_bits=key_bits, ranges=(5, 60, 100, 170), symmetric=symmetric)


def test_ten_thousand_queries(monkeypatch):
    if DEVICE == "cpu":  # fewer, larger tiles: the interpreter's time goes by their number
        monkeypatch.setattr(gpu, "tile", lambda *of: (triton_config.tile(*of)[0]._replace(BLOCK_M=2048), {}))
    check(queries=10_000, current=20, ranges=(5, 60))


@pytest.mark.parametrize("queries, path", [(15, "fused"), (16, "unpack once")])
def test_one_number_of_rows_decides_between_the_paths(queries, path, architecture, monkeypatch):
    """Rows are those of a key/value head: queries times the heads that share it."""
    architecture(unpack_once_rows=32)
    taken = []
    monkeypatch.setattr(gpu, "_fused", lambda *_: taken.append("fused"))
    monkeypatch.setattr(gpu, "_unpack_once", lambda *_: taken.append("unpack once"))
    query = torch.randn(1, 4, queries, 64, device=DEVICE)
    store = (*quantized(1, 2, 64, 2, 32), *quantized(1, 2, 64, 2, 32))
    gpu.attention(query, *store, [0, 9], query[:, :2], query[:, :2], None, False, 0.125, 2, 2, "taylor")
    assert taken == [path]


def test_unpack_once_works_through_the_heads_in_slabs(architecture, monkeypatch):
    architecture(unpack_once_rows=1)
    monkeypatch.setattr(gpu, "SLAB_BYTES", 1)
    check(batch=2, heads=6, kv_heads=3, queries=20, mask="additive")


def test_queries_prepared_ahead_compute_the_same(architecture):
    architecture(prepared=True)
    check(batch=2, heads=2, queries=40)
    check(heads=2, queries=40, group=64, symmetric=True)
    check(head_dim=96, heads=2, kv_heads=1, queries=40)


def test_current_keys_are_never_corrected():
    torch.manual_seed(0)
    query, key = 3 * torch.randn(1, 1, 20, 64, device=DEVICE), torch.randn(1, 1, 20, 64, device=DEVICE)
    store = (*quantized(1, 1, 64, 2, 32), *quantized(1, 1, 64, 2, 32))
    one = (query, *store, [], key, key, None, False, 0.125, 2, 2)
    assert torch.equal(gpu.attention(*one, "taylor")[0], gpu.attention(*one, "none")[0])


def test_a_non_finite_token_outside_the_ranges_is_not_seen():
    store = [*quantized(1, 1, 64, 2, 32), *quantized(1, 1, 64, 2, 32)]
    store[1][:, :, :, 100:], store[3][:, :, :, 100:] = float("nan"), float("nan")
    query = torch.randn(1, 1, 20, 64, device=DEVICE)
    output, _ = gpu.attention(query, *store, [0, 100], query, query, None, False, 0.125, 2, 2, "taylor")
    assert output.isfinite().all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_benchmarks_peers_compute_what_ours_does(monkeypatch):
    torch.manual_seed(0)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # its numbers are looked at, not its time
    shape = bench_gpu.Shape(heads=2, kv_heads=1, queries=20, cached=120, head_dim=64)
    callables = bench_gpu.implementations(shape, 2, 32, torch.device(DEVICE))
    outputs = {name: callables[name]().float() for name in ("flex", "jkv", "jkv_fused", "jkv_unpack_once")}
    for name, output in outputs.items():
        assert relative_error(output, outputs["flex"]) < 5e-3, name
    # On the same quantized cache, but without the correction: near, and different.
    assert 1e-2 < relative_error(callables["dequantize_then_sdpa"](), outputs["flex"]) < 0.2


class _Calls(TorchDispatchMode):
    """Records operators with the shapes and strides of what they return."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [result] if isinstance(result, torch.Tensor) else []
        self.calls.append((str(function), [(tuple(t.shape), t.stride()) for t in made]))
        return result


@pytest.mark.parametrize("path", ["fused", "split", "unpack once", "prepared", "per channel"])
def test_launches_and_allocations_depend_on_shapes_alone(path, architecture, monkeypatch):
    """What a CPU can show of CUDA-graph safety: no operator reads a value back, and data changes no call."""
    if path == "unpack once":
        architecture(unpack_once_rows=1)
    if path == "prepared":
        architecture(prepared=True)
    if path == "split":
        monkeypatch.setattr(gpu, "processors_of", lambda device: 64)
    recorded = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        query = torch.randn(1, 2, 40, 64, device=DEVICE) * 10**seed
        store = (*quantized(1, 1, 64, 2, 32), *quantized(1, 1, 64, 2, 32))
        if path == "per channel":
            store = (*(t.to(DEVICE) for t in per_channel(torch.randn(1, 1, TOKENS, 64), 2, 20)[:2]), *store[2:])
        key = torch.randn(1, 1, 60, 64, device=DEVICE)
        with _Calls() as mode:
            gpu.append(*store[:2], key, 20, 2)
            gpu.move(*store[:2], 60, 20, 120)
            gpu.attention(query, *store, [0, 190], key, key, None, False, 0.125, 2, 2, "taylor")
        recorded.append(mode.calls)
    assert recorded[0] == recorded[1]
    read_back = ("_local_scalar_dense", "nonzero", "item", "equal.default")
    assert not [name for name, _ in recorded[0] if any(word in name for word in read_back)]
