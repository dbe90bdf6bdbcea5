"""CPU kernels in plain torch, for machines without a compiler: no more than one block of keys is ever unpacked.

Keys are taken `BLOCK` at a time through one online softmax.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .layout import PLANES, in_blocks, is_symmetric, step_and_zero, token_block

BLOCK = 2048


def append(codes: Tensor, scales: Tensor, source: Tensor, start: int, bits: int) -> None:
    stop = start + source.shape[2]
    first, last = in_blocks(codes, scales, start, stop)
    block = token_block(codes, scales)
    group_size = source.shape[3] // scales.shape[2]
    new_codes, new_scales = reference.quantize(source, bits, group_size, block, is_symmetric(scales))
    codes[:, :, start:stop] = new_codes
    scales[:, :, :, first:last] = new_scales


def move(codes: Tensor, scales: Tensor, source: int, destination: int, length: int) -> None:
    first, to, count = in_blocks(codes, scales, source, destination, length)
    codes[:, :, destination : destination + length] = codes[:, :, source : source + length].clone()
    scales[:, :, :, to : to + count] = scales[:, :, :, first : first + count].clone()


def dequantize(codes: Tensor, scales: Tensor, start: int, stop: int, bits: int, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(codes[:, :, start:stop], reference.scales_between(codes, scales, start, stop), bits).to(
        dtype
    )


def _codes_as_floats(codes: Tensor, bits: int) -> Tensor:
    """`layout.unpack` to float32, by floors instead of shifts: several times fewer passes over memory."""
    head_dim = codes.shape[-1] * 8 // bits
    floats, offset, weight = codes.new_empty((*codes.shape[:-1], head_dim), dtype=torch.float32), 0, 1
    for width in PLANES[bits]:
        count = head_dim * width // 8
        rest = codes[..., offset : offset + count].float()
        for lane in range(8 // width):
            higher = (rest * 2.0**-width).floor_()
            code, channels = rest.sub_(higher, alpha=2**width), floats[..., lane * count : (lane + 1) * count]
            channels.copy_(code) if weight == 1 else channels.add_(code, alpha=weight)
            rest = higher
        offset, weight = offset + count, weight * 2**width
    return floats


def _expand(codes: Tensor, scales: Tensor, bits: int, factor: float) -> Tensor:
    """`reference.dequantize` times a factor, up to rounding; scales for each token."""
    step, zero = (t.unsqueeze(-1) * factor for t in step_and_zero(scales.transpose(2, 3), bits))  # [B, H, n, G, 1]
    floats = _codes_as_floats(codes, bits).unflatten(-1, (step.shape[3], -1))
    return floats.mul_(step * 2.0**-bits).add_(zero + step).flatten(-2)


def attention(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    ranges: list[int],
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    key_bits: int,
    value_bits: int,
    correction: str,
) -> tuple[Tensor, Tensor]:
    """As `ops.attention`; also returns the log-sum-exp `[B, H, L]` in float32."""
    batch, heads, length, _ = query.shape
    kv_heads, head_dim = key.shape[1], value.shape[3]
    rows = heads // kv_heads * length  # query heads that share keys are rows of one product
    dtype = query.dtype
    grouped = query.reshape(batch, kv_heads, rows, query.shape[3])
    n_cached = sum(b - a for a, b in zip(ranges[::2], ranges[1::2]))
    if mask is not None:
        mask = mask.expand(batch, heads, length, n_cached + key.shape[2]).reshape(batch, kv_heads, rows, -1)
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=query.device).masked_fill_(~mask, -math.inf)

    output = torch.zeros(batch, kv_heads, rows, head_dim)
    peak = torch.full((batch, kv_heads, rows, 1), -math.inf)
    total = torch.zeros(batch, kv_heads, rows, 1)

    def attend(scores: Tensor, values: Tensor, column: int, hidden: Tensor | None) -> None:
        nonlocal peak, total
        if mask is not None:
            scores += mask[..., column : column + scores.shape[-1]]
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        safe = new_peak.masked_fill(new_peak == -math.inf, 0)  # a row that has seen nothing yet
        weights = scores.sub_(safe).exp_()
        shrink = (peak - safe).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        weights, values = weights.to(dtype), values.to(dtype)
        if tail := -values.shape[2] % 32:  # oneDNN's bf16 product reads past rows' ends: NaN would leak from the next
            weights, values = F.pad(weights, (0, tail)), F.pad(values, (0, 0, 0, tail))
        output.mul_(shrink).add_((weights @ values).float())
        peak = new_peak

    column = 0
    for start, stop in zip(ranges[::2], ranges[1::2]):
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            key_steps = reference.scales_between(key_codes, key_scales, first, last)
            value_steps = reference.scales_between(value_codes, value_scales, first, last)
            keys = _expand(key_codes[:, :, first:last], key_steps, key_bits, scale).to(dtype)
            scores = (grouped @ keys.transpose(-1, -2)).float()
            if correction != "none":
                delta = reference.quantization_step(key_steps, key_bits)
                scores -= reference.correction_bias(grouped, delta, scale, correction)
            attend(scores, _expand(value_codes[:, :, first:last], value_steps, value_bits, 1.0).to(dtype), column, None)
            column += last - first
    n_current = key.shape[2]
    for first in range(0, n_current, BLOCK):
        last = min(first + BLOCK, n_current)
        hidden = None
        if causal:
            visible = torch.arange(length).unsqueeze(1) + n_current - length
            hidden = (torch.arange(first, last) > visible).repeat(heads // kv_heads, 1)
        scores = (grouped @ key[:, :, first:last].transpose(-1, -2)).float().mul_(scale)
        attend(scores, value[:, :, first:last], column, hidden)
        column += last - first

    output = (output / total.masked_fill(total == 0, 1)).view(batch, heads, length, head_dim).to(dtype)
    lse = (peak + total.log()).view(batch, heads, length)
    return output.transpose(1, 2).contiguous().transpose(1, 2), lse
