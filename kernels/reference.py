"""What every kernel computes, in plain float32 torch that a reader can check by eye.

Quantization: asymmetric min-max per token and channel group (arXiv 2605.26266, "RTN"), on the grid of `layout`; or
symmetric, between plus and minus a group's greatest magnitude, where only steps are stored.
Attention: softmax over cached keys, whose scores are corrected for the Jensen bias, and full-precision keys, whose
scores are not (arXiv 2605.26266, Taylor and exact forms).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import byte_steps
from .layout import pack, step_and_zero, token_block, unpack

FLOAT16_MAX = 65504.0
CLAMP = 1.0  # the greatest correction of "clamped", in nats


def quantize(x: Tensor, bits: int, group_size: int, block: int = 1, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize `x` `[B, H, S, D]` (any float dtype) to `(codes, scales)` as `layout` describes them.

    One scale per `group_size` channels and `block` tokens: `block` 1 is per-token quantization, `group_size` 1 with
    blocks of tokens is per-channel quantization (KIVI, arXiv 2402.02750, keys). S must be a multiple of `block`.
    `symmetric`: the grid lies around zero, and scales are steps alone.

    Step and zero point are rounded to what is stored before the codes are computed, by true division and rounding half
    to even, so that dequantization inverts exactly the grid the codes were chosen on. Ranges beyond float16 saturate,
    and where `symmetric` magnitudes beyond `symmetric_max` (24564 at 2 bits, 32624 at 8).
    A group with a NaN or an infinity gets NaN scales: the damage is visible, and stays in that token's group.
    """
    groups = x.float().unflatten(-1, (-1, group_size)).unflatten(2, (-1, block))  # [B, H, T, block, G, group_size]
    levels = 2**bits
    if symmetric:
        peak = groups.abs().amax((3, 5))  # [B, H, T, G]
        step, finite = peak * (2 * levels / (levels - 1)), torch.isfinite(peak)
    else:
        low, high = groups.amin((3, 5)), groups.amax((3, 5))
        step, finite = (high - low) * (levels / (levels - 1)), torch.isfinite(high - low)
    step = step.clamp(max=FLOAT16_MAX).to(torch.float16)
    stored = [step] if symmetric else [step, (low - step.float()).clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)]
    scales = torch.stack(stored, -1).masked_fill(~finite.unsqueeze(-1), float("nan"))  # [B, H, T, G, 2], or 1
    step, zero = (t[:, :, :, None, :, None] for t in step_and_zero(scales, bits))
    delta = step / levels
    codes = ((groups - (zero + step)) / delta).round().clamp(0, levels - 1)
    codes = torch.where(delta > 0, codes, 0).to(torch.uint8)  # constant and non-finite groups: code 0
    return pack(codes.flatten(-2).flatten(2, 3), bits), scales.transpose(2, 3).contiguous()


def symmetric_max(bits: int) -> float:
    """The greatest magnitude that a symmetric cache holds: steps are float16."""
    return FLOAT16_MAX * (2**bits - 1) / (2 * 2**bits)


def per_token(scales: Tensor, tokens: int) -> Tensor:
    """Scales `[B, H, G, T, 2]` of a cache of `tokens` tokens, repeated for each of them `[B, H, G, S, 2]`."""
    blocks = scales.shape[3]
    return scales if blocks == tokens else scales.repeat_interleave(tokens // blocks, 3)


def scales_between(codes: Tensor, scales: Tensor, start: int, stop: int) -> Tensor:
    """Scales for each token from `start` to `stop - 1` of a cache: `[B, H, G, n, 2]` or `[B, H, G, n, 1]`."""
    block = token_block(codes, scales)
    first, last = start // block, -(-stop // block)
    of_tokens = per_token(scales[:, :, :, first:last], (last - first) * block)
    return of_tokens[:, :, :, start - first * block : stop - first * block]


def dequantize(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """`(codes, scales)` back to float32 `[B, H, S, D]`."""
    step, zero = step_and_zero(per_token(scales, codes.shape[2]).transpose(2, 3), bits)  # [B, H, S, G]
    c = unpack(codes, bits).float().unflatten(-1, (step.shape[-1], -1))
    return (zero.unsqueeze(-1) + (1 + c / 2**bits) * step.unsqueeze(-1)).flatten(-2)


def quantization_step(scales: Tensor, bits: int) -> Tensor:
    """Δ, float32 `[B, H, S, G]`."""
    step = byte_steps.step(scales) if byte_steps.are_bytes(scales) else scales[..., 0]
    return step.float().transpose(2, 3) / 2**bits


def correction_bias(query: Tensor, delta: Tensor, scale: float, correction: str) -> Tensor:
    """b `[B, H, L, S]`, to be subtracted from the scores of cached keys, so that E[exp(score)] is the true weight.

    query `[B, H, L, D]`, delta `[B, H, S, G]` (query heads already matched by repeating). With s the softmax scale:
    `"taylor"`: b = s²/24 · Σ_g ‖q_g‖² Δ_g²;   `"clamped"`: the same, at most `CLAMP`;
    `"exact"`: b = Σ_c log(sinh α_c / α_c), α_c = s·q_c·Δ_c / 2.
    """
    groups = delta.shape[-1]
    if correction == "none":
        return query.new_zeros(*query.shape[:3], delta.shape[2], dtype=torch.float32)
    if correction in ("taylor", "clamped"):
        norms = query.float().unflatten(-1, (groups, -1)).square().sum(-1)  # [B, H, L, G]
        bias = scale**2 / 24 * norms @ delta.square().transpose(-1, -2)
        return bias if correction == "taylor" else bias.clamp_max(CLAMP)
    if correction == "exact":
        per_channel = delta.repeat_interleave(query.shape[-1] // groups, -1)
        bias = query.new_zeros(*query.shape[:3], delta.shape[2], dtype=torch.float32)
        for c in range(query.shape[-1]):  # one channel at a time: [B, H, L, S] is all that is ever held
            bias += log_sinhc(scale / 2 * query[..., c, None].float() * per_channel[..., None, :, c])
        return bias
    raise ValueError(f"correction is {correction!r}; expected 'none', 'taylor', 'clamped' or 'exact'")


def log_sinhc(alpha: Tensor) -> Tensor:
    """log(sinh α / α), without overflow, and without cancellation where α is small."""
    a = alpha.abs()
    series = a.square() / 6 - a.square().square() / 180
    return torch.where(a < 0.1, series, a + torch.log1p(-torch.exp(-2 * a)) - math.log(2) - a.clamp_min(0.1).log())


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
    """Corrected attention over packed token ranges followed by full-precision keys; see `ops.attention`.

    Returns float32 output `[B, H, L, Dv]` and log-sum-exp of the (corrected) scores `[B, H, L]`.
    """
    query, key, value = query.float(), key.float(), value.float()
    key_scales = per_token(key_scales, key_codes.shape[2])
    value_scales = per_token(value_scales, value_codes.shape[2])
    tokens = torch.cat([torch.arange(a, b, device=query.device) for a, b in zip(ranges[::2], ranges[1::2])] or
                       [torch.arange(0, device=query.device)])  # fmt: skip
    cached_key = dequantize(key_codes[:, :, tokens], key_scales[:, :, :, tokens], key_bits)
    cached_value = dequantize(value_codes[:, :, tokens], value_scales[:, :, :, tokens], value_bits)
    delta = quantization_step(key_scales[:, :, :, tokens], key_bits)

    repeat = query.shape[1] // cached_key.shape[1]
    keys, values, delta = (
        t.repeat_interleave(repeat, 1)
        for t in (torch.cat((cached_key, key), 2), torch.cat((cached_value, value), 2), delta)
    )
    n_cached, n_current, n_query = len(tokens), key.shape[2], query.shape[2]
    scores = scale * query @ keys.transpose(-1, -2)
    scores[..., :n_cached] -= correction_bias(query, delta, scale, correction)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    if causal:
        visible = torch.ones(n_query, n_current, dtype=torch.bool, device=query.device).tril(n_current - n_query)
        scores[..., n_cached:] = scores[..., n_cached:].masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).masked_fill((lse == -math.inf).unsqueeze(-1), 0)  # a row that sees nothing is zero
    return weights @ values, lse
