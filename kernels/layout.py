"""Where the bits of a packed cache lie.

A packed cache of logical shape `[B, H, S, D]` (batch, key/value heads, tokens, head_dim) is two tensors:

* `codes`, uint8 `[B, H, S, W]`: the integer codes of each token, packed in *planes* along head_dim. A plane of p bits
  puts `n = 8 / p` channels into a byte, and byte b of the plane holds channels `b, b + D/n, b + 2D/n, …` from the low
  bits up, so that unpacking yields contiguous runs of channels. 2, 4 and 8 bits are one plane; 3 bits are a 2-bit
  plane (low bits) followed by a 1-bit plane (high bit).
* `scales`, float16 `[B, H, G, S, 2]`: per group of `group_size = D / G` neighbouring channels and token the pair
  `(step', zero')`, stored so that every device dequantizes with one multiply-add:

      x̂ = zero' + (1 + c / 2^bits) · step',       Δ = step' / 2^bits,      zero point = zero' + step'

  (1 + c/2^bits is a float16 whose mantissa *is* the code.) Scales are token-contiguous: kernels load them as vectors.
  In general scales are `[B, H, G, T, 2]` with one pair per `D / G` channels and `S / T` tokens: T = S above;
  per-channel steps over blocks of tokens (KIVI) have G = D and T = S / block. Codes are of whole blocks.

A *symmetric* cache stores no zero points: its scales are `[B, H, G, T, 1]`, step' alone, and that last dimension is how
everything tells it from the others. Its 2^bits levels lie around 0, which is none of them:

      x̂ = Δ · (c - (2^bits - 1) / 2),       that is, zero' = -(3 · 2^bits - 1) / (2 · 2^bits) · step'

Both are exact in float32. A step of 0 is how it holds zeros.

Steps may also be stored in 8 bits (`byte_steps`): scales are then uint8 `[B, H, G, T, 3]`, a byte of step' and two of
zero', or `[B, H, G, T, 1]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PackedCacheError

SUPPORTED_BITS = (2, 3, 4, 8)
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def packed_width(head_dim: int, bits: int) -> int:
    """Bytes that one token of one head takes in `codes`."""
    return head_dim * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes `[..., D]` in `0 … 2^bits - 1` to uint8 `[..., D · bits / 8]`."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        plane = (codes.to(torch.int32) >> shift) & (2**width - 1)
        shift += width
        per_byte = 8 // width
        lanes = plane.unflatten(-1, (per_byte, -1))  # [..., per_byte, D / per_byte]
        weights = 2 ** (width * torch.arange(per_byte, dtype=torch.int32, device=codes.device))
        planes.append((lanes * weights.unsqueeze(-1)).sum(-2).to(torch.uint8))
    return torch.cat(planes, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 `[..., D · bits / 8]` to integer codes uint8 `[..., D]`; the inverse of `pack`."""
    head_dim = packed.shape[-1] * 8 // bits
    codes, offset, shift = None, 0, 0
    for width in PLANES[bits]:
        n_bytes = head_dim * width // 8
        plane = packed[..., offset : offset + n_bytes]
        lanes = torch.cat([(plane >> (i * width)) & (2**width - 1) for i in range(8 // width)], -1)
        codes = lanes if codes is None else codes | (lanes << shift)
        offset, shift = offset + n_bytes, shift + width
    assert codes is not None
    return codes


def is_symmetric(scales: Tensor) -> bool:
    """Whether scales are steps alone, and zero points are implied."""
    return scales.shape[-1] == 1


def step_and_zero(scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """step' and zero' of float16 scales `[…, 2]` or `[…, 1]`, float32 `[…]`."""
    step = scales[..., 0].float()
    return step, step * implied_zero(bits) if is_symmetric(scales) else scales[..., 1].float()


def implied_zero(bits: int) -> float:
    """zero' of a symmetric cache, in units of step'."""
    return -(3 * 2**bits - 1) / (2 * 2**bits)


def scale_word(scales: Tensor) -> torch.dtype:
    """The integer that takes as many bytes as a group's scales: int32, or int16 of a symmetric cache, uint8 where its
    steps are bytes."""
    return (torch.uint8 if scales.dtype == torch.uint8 else torch.int16) if is_symmetric(scales) else torch.int32


def scale_words(scales: Tensor) -> Tensor:
    """Scales as such integers `[B, H, G, T]`; a view."""
    return scales.view(scale_word(scales)).squeeze(-1)


def token_block(codes: Tensor, scales: Tensor) -> int:
    """How many tokens share their scales: 1, or more where steps are those of channels."""
    return codes.shape[2] // scales.shape[3] if scales.shape[3] else 1


def in_blocks(codes: Tensor, scales: Tensor, *tokens: int) -> list[int]:
    """Token positions as positions in the scales.

    Raises:
        PackedCacheError: a position lies inside of a block of tokens that share scales.
    """
    block = token_block(codes, scales)
    if any(token % block for token in tokens):
        raise PackedCacheError(
            f"jkv: tokens {list(tokens)} must be multiples of {block}, as so many tokens share their steps; move "
            "and write whole blocks, choose another number (block_tokens=, with quantizer='kivi'), or choose another "
            "quantizer"
        )
    return [token // block for token in tokens]


def packed_bytes(shape: tuple[int, int, int, int], bits: int, group_size: int, scale_bytes: int = 4) -> int:
    """Bytes of a packed cache of logical shape `[B, H, S, D]`: codes, and scales of so many bytes a group
    (`quantizers.Grid.scale_bytes`)."""
    batch, heads, tokens, head_dim = shape
    return batch * heads * tokens * (packed_width(head_dim, bits) + scale_bytes * (head_dim // group_size))
