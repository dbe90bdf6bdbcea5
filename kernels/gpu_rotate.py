"""Rotation and the unbiased grid for CUDA and HIP tensors, in one launch: what `ops` calls."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import quantizers
from .triton_config import ROTATE_LANES
from .triton_rotate import rotate_kernel


def rotate(x: Tensor) -> Tensor:
    """As `quantizers.rotate`."""
    output = torch.empty_like(x)
    return output if _launch(x, output, 0, 1, False) else quantizers.rotate(x)


def round_unbiased(x: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Tensor:
    """As `quantizers.round_unbiased`; where sums are added in another order, some channels go to the next level."""
    head_dim = x.shape[-1]
    if head_dim % group_size == 0 and group_size & (group_size - 1) == 0:
        output = x.new_empty(x.shape, dtype=torch.float32)
        if _launch(x, output, bits, group_size, symmetric):
            return output
    return quantizers.round_unbiased(x, bits, group_size, symmetric)


def _launch(x: Tensor, output: Tensor, bits: int, group_size: int, symmetric: bool) -> bool:
    """Whether the kernel takes `x`: tokens `[B, H, n, D]`, and runs of 16 to 512 channels."""
    head_dim = x.shape[-1]
    order = head_dim & -head_dim
    if x.dim() != 4 or not 16 <= order <= 512 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    batch, heads, length, _ = x.shape
    if x.numel():
        lanes = 1 << (head_dim - 1).bit_length()
        block = max(1, ROTATE_LANES // lanes)
        limit = quantizers.NORMAL_RANGE[bits] if bits else 0.0
        rotate_kernel[(-(-length // block), batch * heads)](
            x, output, x.stride(), output.stride(), heads, length, block, head_dim, lanes, order, bits, group_size,
            0.0 if math.isinf(limit) else limit, symmetric,
        )  # fmt: skip
    return True
