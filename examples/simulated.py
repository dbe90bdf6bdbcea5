"""Quantizers as reference simulations: a chunk's keys or values are quantized and at once dequantized, bytes counted.

The package packs `rtn`, `quarot` and `unbiased`, their symmetric forms, and Quant VideoGen; here they are once more,
beside methods and ideas that it does not pack, so that all can be compared in one harness. It packs KIVI, too, but with
an open block's tokens in full precision; here are blocks that chunks fill. Quantized channels may be rotated;
everything that the correction needs is told in the basis of what is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jkv_compile.kernels import byte_steps, reference
from jkv_compile.kernels.clusters import kmeans, nearest
from jkv_compile.kernels.quantizers import rotate, round_unbiased

FLOAT16_BITS, FLOAT8_BITS = 16, 8


@dataclass
class Quantized:
    """A quantized chunk.

    Attributes:
        values: float32 [B, H, S, D], dequantized, in the basis of the model.
        step: float32 [B, H, S, D], the quantization step of each channel, in the basis of what is stored.
        excess: float32 [B, H, S, D], by how much quantization raised the squared stored channels, mean over those that
            share a step; negative where it lowered them.
        rotated: whether the basis of what is stored is that of ``rotate``.
        bits: bits of storage in all.
    """

    values: Tensor
    step: Tensor
    excess: Tensor
    rotated: bool
    bits: float

    @property
    def effective_bits(self) -> float:
        """Bits per element."""
        return self.bits / self.values.numel()


@dataclass(frozen=True)
class MinMax:
    """Round to nearest between a group's least and greatest channel, per token: what the package packs.

    rotated: "quarot", channels rotated first. unbiased: "unbiased", rotated, and rounded to a better grid, see
    ``round_unbiased``. symmetric: "symmetric", between plus and minus the greatest magnitude, and no zero points.
    centred: the chunk's mean per channel is removed, and stored in float16.
    block: tokens that share a step; 1 is per token, more with group_size 1 is KIVI (arXiv 2402.02750) for keys.
    step_bits: 16, or 8, see ``jkv_compile.kernels.byte_steps``.
    """

    bits: int
    group_size: int
    rotated: bool = False
    centred: bool = False
    unbiased: bool = False
    symmetric: bool = False
    block: int = 1
    step_bits: int = FLOAT16_BITS

    def __call__(self, x: Tensor) -> Quantized:
        """Quantize x [B, H, S, D]."""
        tokens, head_dim = x.shape[2:]
        x = x.float()
        mean = x.mean(2, keepdim=True).half().float() if self.centred else torch.zeros(())
        stored = rotate(x - mean) if self.rotated else x - mean
        source = round_unbiased(x - mean, self.bits, self.group_size, self.symmetric) if self.unbiased else stored
        codes, scales = reference.quantize(source, self.bits, self.group_size, self.block, self.symmetric)
        if self.step_bits == FLOAT8_BITS:
            scales = byte_steps.decode(byte_steps.encode(scales, self.bits))
        read = reference.dequantize(codes, scales, self.bits)
        step = reference.quantization_step(reference.per_token(scales, tokens), self.bits)
        per_group = self.step_bits + (0 if self.symmetric else FLOAT16_BITS)
        metadata = per_group / (self.group_size * self.block) + self.centred * FLOAT16_BITS / tokens
        return Quantized(
            (rotate(read) if self.rotated else read) + mean,
            step.repeat_interleave(head_dim // step.shape[-1], -1),
            group_mean(read.square() - stored.square(), self.group_size, self.block),
            self.rotated,
            x.numel() * (self.bits + metadata),
        )


@dataclass(frozen=True)
class Ternary:
    """The grid {-1, 0, 1}·Δ in two bits, Δ the greatest magnitude, as Quant VideoGen has it (arXiv 2602.02958).

    One step per token and group, in float16 or in FP8 (E4M3), and no zero point.
    """

    group_size: int
    scale_bits: int = FLOAT16_BITS

    def __call__(self, x: Tensor) -> Quantized:
        """Quantize x [B, H, S, D]."""
        x = x.float()
        groups = x.unflatten(-1, (-1, self.group_size))
        dtype = torch.float16 if self.scale_bits == FLOAT16_BITS else torch.float8_e4m3fn
        step = groups.abs().amax(-1, keepdim=True).to(dtype).float().clamp_min(2.0**-9)
        read = ((groups / step).round().clamp(-1, 1) * step).flatten(-2)
        return Quantized(
            read,
            step.expand_as(groups).flatten(-2),
            group_mean(read.square() - x.square(), self.group_size, 1),
            False,
            x.numel() * (2 + self.scale_bits / self.group_size),
        )


@dataclass(frozen=True)
class Clustered:
    """Quant VideoGen (arXiv 2602.02958): subtract k-means centroids ``stages`` times, quantize what is left once.

    Its paper: 256 centroids over a span of tens of thousands of tokens, one stage, ternary residual, groups of 64 with
    an FP8 step; "Pro": four stages, groups of 16. Here a span is a chunk of some hundred tokens, so the number of
    centroids is an argument, and they are counted in float16.
    """

    residual: MinMax | Ternary
    centroids: int
    stages: int = 1

    def __call__(self, x: Tensor) -> Quantized:
        """Quantize x [B, H, S, D]."""
        rest, smooth = x.float(), torch.zeros_like(x, dtype=torch.float32)
        for _ in range(self.stages):
            centroids = kmeans(rest, self.centroids).half().float()
            closest = centroids.gather(2, nearest(rest, centroids).unsqueeze(-1).expand_as(rest))
            rest, smooth = rest - closest, smooth + closest
        quantized = self.residual(rest)
        batch, heads, tokens, head_dim = x.shape
        per_head = self.centroids * head_dim * FLOAT16_BITS + tokens * 8  # and an index of one byte per token
        quantized.bits += batch * heads * self.stages * per_head
        read = smooth + quantized.values
        stored = (rotate(read), rotate(x.float())) if quantized.rotated else (read, x.float())
        quantized.excess = group_mean(stored[0].square() - stored[1].square(), self.residual.group_size, 1)
        quantized.values = read
        return quantized


def group_mean(x: Tensor, group_size: int, block: int) -> Tensor:
    """x [B, H, S, D], each element replaced by the mean over its group of channels and block of tokens."""
    groups = x.unflatten(-1, (-1, group_size)).unflatten(2, (-1, block))  # [B, H, T, block, G, group_size]
    return groups.mean((3, 5), keepdim=True).expand_as(groups).flatten(-2).flatten(2, 3)


# ---- corrections: what is subtracted from the scores of cached keys ----


def taylor(query: Tensor, key: Quantized, scale: float) -> Tensor:
    """s²/24 · Σ_c q_c² Δ_c² (arXiv 2605.26266)."""
    return scale**2 / 24 * query.square() @ key.step.square().mT


def exact(query: Tensor, key: Quantized, scale: float) -> Tensor:
    """Σ_c log(sinh α_c / α_c), α_c = s·q_c·Δ_c / 2 (arXiv 2605.26266)."""
    return reference.correction_bias(query, key.step, scale, "exact")


def clamped(query: Tensor, key: Quantized, scale: float) -> Tensor:
    """Taylor, at most 1 (a weight is cut by no more than e): a guard for queries so large that it deletes the cache."""
    return taylor(query, key, scale).clamp_max(reference.CLAMP)


def second_moment(query: Tensor, key: Quantized, scale: float) -> Tensor:
    """s²/2 · Σ_c q_c² · (E k̂² − E k²) as measured when the key was quantized, per token and group; may be negative."""
    return scale**2 / 2 * query.square() @ key.excess.mT


def calibrated(query: Tensor, key: Quantized, scale: float) -> Tensor:
    """Taylor times one factor per head, by which the chunk's second moment rose against what Δ²/12 predicts."""
    dims = (-2, -1)
    return taylor(query, key, scale) * (12 * key.excess.sum(dims, True) / key.step.square().sum(dims, True))


CORRECTIONS: dict[str, Callable[[Tensor, Quantized, float], Tensor] | None] = {
    "none": None,
    "taylor": taylor,
    "exact": exact,
    "clamped": clamped,
    "second_moment": second_moment,
    "calibrated": calibrated,
}


def bias(query: Tensor, key: Quantized, scale: float, correction: str) -> Tensor | float:
    """What ``correction`` subtracts from the scores of queries [B, H, L, D] with the quantized keys: [B, H, L, S]."""
    form = CORRECTIONS[correction]
    if form is None:
        return 0.0
    query = query.float()
    return form(rotate(query) if key.rotated else query, key, scale)
