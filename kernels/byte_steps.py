"""Steps in 8 bits instead of 16: the upper half of a float16, which no kernel need know of.

A step is positive, so that of its float16 five bits of exponent and the three upper bits of the mantissa make a byte
(the format that is called UE5M3): as wide a range as float16's, and rounded to within one part in 16. That moves a
group's levels by a small part of their distance, which adds next to nothing to what codes of few bits leave out. The
zero point of a group is moved along, so that the middle of its levels stays where it was.

Scales are then uint8: `[B, H, G, T, 1]` of a symmetric cache, or `[B, H, G, T, 3]`, the step and the two bytes of a
float16 zero'. Operators make float16 scales of those that they read, of the tokens that are asked for, and leave the
rest to the kernels: a copy of one layer's scales is alive while it is attended.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .layout import implied_zero, in_blocks, is_symmetric, token_block

_LARGEST = 0xF7  # of finite steps, 61440; float16 has an infinity above it
_HALF_INFINITY, _SHIFT = 0x7C00, 7


def are_bytes(scales: Tensor) -> bool:
    """Whether steps are stored in 8 bits."""
    return scales.dtype == torch.uint8


def step(scales: Tensor) -> Tensor:
    """step' of scales of bytes `[…, 1]` or `[…, 3]`: float16 `[…]`."""
    return (scales[..., 0].to(torch.int16) << _SHIFT).view(torch.float16)


def decode(scales: Tensor) -> Tensor:
    """Scales of bytes as float16 ones, `[…, 1]` or `[…, 2]`; `layout` tells what they mean."""
    steps = step(scales)
    if is_symmetric(scales):
        return steps.unsqueeze(-1)
    zero = scales[..., 1:].clone(memory_format=torch.contiguous_format)  # at an even address
    return torch.stack((steps, zero.view(torch.float16).squeeze(-1)), -1)


def encode(scales: Tensor, bits: int) -> Tensor:
    """Float16 scales `[…, 1]` or `[…, 2]` of a grid of 2^bits levels as bytes, steps rounded to the nearest.

    Steps beyond the largest byte, 61440, become that, and zero points stay within float16's range; a NaN stays one.
    """
    half = scales[..., 0].contiguous().view(torch.int16).to(torch.int32) & 0x7FFF
    nearest = (half + 0x3F + ((half >> _SHIFT) & 1)) >> _SHIFT  # half to even
    nearest = torch.where(half < _HALF_INFINITY, nearest.clamp(max=_LARGEST), half >> _SHIFT)
    rounded = nearest.to(torch.uint8).unsqueeze(-1)
    if is_symmetric(scales):
        return rounded
    moved = (scales[..., 0].float() - step(rounded).float()) * -implied_zero(bits)  # the levels' middle from zero'
    most = torch.finfo(torch.float16).max
    zero = (scales[..., 1].float() + moved).clamp(-most, most).to(torch.float16)
    return torch.cat((rounded, zero.unsqueeze(-1).view(torch.uint8)), -1)


def write(
    operator: Callable[[Tensor, Tensor], None], codes: Tensor, scales: Tensor, start: int, stop: int, bits: int
) -> None:
    """Have `operator(codes, scales)` set tokens start … stop - 1, which it gets alone, with float16 scales."""
    first, last = in_blocks(codes, scales, start, stop)
    half = scales.new_empty((*scales.shape[:3], last - first, 1 if is_symmetric(scales) else 2), dtype=torch.float16)
    operator(codes[:, :, start:stop], half)
    scales[:, :, :, first:last] = encode(half, bits)


def read(start: int, stop: int, *stores: tuple[Tensor, Tensor]) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """Codes and float16 scales of tokens start … stop - 1 of each of the stores (codes, scales), in whole blocks; and
    which token the first of them is."""
    begin = start - start % math.lcm(*(token_block(*store) for store in stores))
    parts = []
    for codes, scales in stores:
        block = token_block(codes, scales)
        first, last = begin // block, -(-stop // block)
        part = scales[:, :, :, first:last]
        parts.append((codes[:, :, begin : last * block], decode(part) if are_bytes(scales) else part))
    return begin, parts
