"""CPU kernels in plain torch, for machines without a compiler: no more than one block of keys is ever unpacked.

Keys are taken `BLOCK` at a time through one online softmax.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

BLOCK = 2048


def append(codes: Tensor, scales: Tensor, source: Tensor, start: int, bits: int) -> None:
    stop = start + source.shape[2]
    new_codes, new_scales = reference.quantize(source, bits, source.shape[3] // scales.shape[2])
    codes[:, :, start:stop] = new_codes
    scales[:, :, :, start:stop] = new_scales


def move(codes: Tensor, scales: Tensor, source: int, destination: int, length: int) -> None:
    codes[:, :, destination : destination + length] = codes[:, :, source : source + length].clone()
    scales[:, :, :, destination : destination + length] = scales[:, :, :, source : source + length].clone()


def dequantize(codes: Tensor, scales: Tensor, start: int, stop: int, bits: int, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(codes[:, :, start:stop], scales[:, :, :, start:stop], bits).to(dtype)


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
        if (
            tail := -values.shape[2] % 32
        ):  # oneDNN's bf16 product reads rows past their end: a NaN would leak from the next
            weights, values = F.pad(weights, (0, tail)), F.pad(values, (0, 0, 0, tail))
        output.mul_(shrink).add_((weights @ values).float())
        peak = new_peak

    column = 0
    for start, stop in zip(ranges[::2], ranges[1::2]):
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            keys = dequantize(key_codes, key_scales, first, last, key_bits, dtype)
            scores = (grouped @ keys.transpose(-1, -2)).float().mul_(scale)
            if correction != "none":
                delta = reference.quantization_step(key_scales[:, :, :, first:last], key_bits)
                scores -= reference.correction_bias(grouped, delta, scale, correction)
            attend(scores, dequantize(value_codes, value_scales, first, last, value_bits, dtype), column, None)
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

    output = (output / total).view(batch, heads, length, head_dim).to(dtype)
    lse = (peak + total.log()).view(batch, heads, length)
    return output.transpose(1, 2).contiguous().transpose(1, 2), lse
