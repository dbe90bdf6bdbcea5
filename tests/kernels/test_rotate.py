"""What the quantizers `quarot` and `unbiased` do before rounding."""

from __future__ import annotations

import pytest
import torch

from jkv_compile.kernels import cpu, reference
from jkv_compile.kernels.quantizers import rotate, round_unbiased


def test_four_channels_by_hand():
    rotated = rotate(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 2, 3, 4]]))
    torch.testing.assert_close(
        rotated, torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5], [5.0, -1.0, -2.0, 0.0]])
    )


@pytest.mark.parametrize("head_dim", [8, 48, 64, 96, 128])
def test_rotation_keeps_scores_and_is_its_own_inverse(head_dim):
    query, key = torch.randn(2, 3, 5, head_dim), torch.randn(2, 3, 7, head_dim)
    scores = rotate(query) @ rotate(key).transpose(-1, -2)
    torch.testing.assert_close(scores, query @ key.transpose(-1, -2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(rotate(key)), key)
    assert (rotate(key) - key).abs().max() > 1


@pytest.mark.parametrize("head_dim, block", [(96, 32), (48, 16), (64, 64)])
def test_rotation_mixes_blocks_of_the_largest_power_of_two_that_divides_head_dim(head_dim, block):
    first_channel = torch.zeros(head_dim)
    first_channel[0] = 1
    torch.testing.assert_close(rotate(first_channel)[:block], torch.full((block,), block**-0.5))
    assert (rotate(first_channel)[block:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_and_memory_layout_are_those_of_the_input(dtype):
    cpp = cpu.kernels() is not None
    x = torch.randn(2, 5, 3, 64).to(dtype).transpose(1, 2)
    rotated = torch.ops.jkv.rotate(x)
    assert rotated.dtype == dtype and rotated.stride() == x.stride()
    exact = x.double() @ rotate(torch.eye(64)).sign().double() / 8  # H / √64
    places = 2 if cpp else 4  # a float32 matrix product of torch's comes less close than the C++ kernel
    assert (rotated.double() - exact).abs().max() <= places * torch.finfo(dtype).eps * rotated.abs().max()


def test_rotation_in_inference_mode_leaves_no_inference_tensor_behind():
    with torch.inference_mode():
        torch.ops.jkv.rotate(torch.randn(2, 512))
    x = torch.randn(2, 512, requires_grad=True)
    rotate(x).sum().backward()
    assert x.grad is not None


def test_a_large_channel_costs_less_after_rotation():
    """Why it is there: one channel ten times the others widens its group's step for all of them."""
    torch.manual_seed(0)
    key = torch.randn(1, 2, 64, 64)
    key[..., 3] *= 10

    def error(x, back=lambda t: t):
        return (back(reference.dequantize(*reference.quantize(x, 2, 32), 2)) - key).square().mean().item()

    assert error(rotate(key), rotate) < 0.75 * error(key)


# ---- round_unbiased ----


def errors(x, bits, group_size, symmetric=False):
    """Relative squared error of what `append` stores of x, with `unbiased` and with `quarot`."""
    rotated = rotate(x)

    def error(source):
        read = reference.dequantize(*reference.quantize(source, bits, group_size, symmetric=symmetric), bits)
        return ((read - rotated).square().sum() / rotated.square().sum()).item()

    return error(round_unbiased(x, bits, group_size, symmetric)), error(rotated)


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_append_finds_the_grid_and_its_error_is_orthogonal(bits, group_size, symmetric):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 50, 64)
    stored = round_unbiased(x, bits, group_size, symmetric)
    read = reference.dequantize(*reference.quantize(stored, bits, group_size, symmetric=symmetric), bits)
    torch.testing.assert_close(read, stored, rtol=0, atol=1e-2)  # float16 steps and zero points
    groups, rounded = (t.unflatten(-1, (-1, group_size)) for t in (rotate(x), stored))
    torch.testing.assert_close((groups * rounded).sum(-1), groups.square().sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize("bits, share", [(2, 0.75), (3, 0.95), (4, 1.0), (8, 1.2)])
def test_it_comes_closer_than_rounding_between_extremes(bits, share, symmetric):
    torch.manual_seed(0)
    ours, theirs = errors(torch.randn(1, 2, 200, 64), bits, 64, symmetric)
    assert ours < share * theirs


def test_zero_points_are_worth_little_at_two_bits_and_more_at_more():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 400, 64)
    without, with_zeros = ([errors(x, bits, 64, symmetric)[0] for bits in (2, 4)] for symmetric in (True, False))
    assert without[0] < 1.01 * with_zeros[0] and without[1] > 1.1 * with_zeros[1]


def test_outliers_keep_their_size():
    """After rotation too one channel may dwarf the others: the grid then reaches out to it."""
    x = rotate(torch.eye(64)[None, None, :1] * 50 + 0.01 * torch.randn(1, 1, 20, 64))
    ours, theirs = errors(x, 2, 64)
    assert ours < 1e-4 and theirs < 1e-4


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_tokens_are_kept(value):
    stored = round_unbiased(torch.full((2, 64), value), 2, 32)
    torch.testing.assert_close(rotate(stored), torch.full((2, 64), value))


def test_a_nan_stays_in_its_group():
    x = torch.randn(1, 64)
    stored = round_unbiased(rotate(torch.where(torch.arange(64) == 40, float("nan"), x)), 2, 32)
    assert stored.isnan().all()  # the rotation spreads it over the token
    assert round_unbiased(torch.stack((torch.full((64,), float("nan")), x[0])), 2, 32)[1].isfinite().all()
