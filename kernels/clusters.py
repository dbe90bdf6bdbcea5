"""Caches that are quantized less centroids that their tokens are near to (Quant VideoGen, arXiv 2602.02958).

Tokens iN … (i + 1)N - 1 of a head share a table of C centroids for each of S stages, which k-means finds: a token is
stored less the nearest of the first stage (Semantic-Aware Smoothing), what is left of it less the nearest of the
second, and so on (Progressive Residual Quantization); what is left in the end is quantized once, per token and channel
group. With one stage and one centroid these are the means of `block_means`, by whose rules tables are made: a write
gives a block new ones where nothing else has been written to the block, as each of the steps that denoise a chunk does;
else tokens are near to centroids that are there already.

tables: `[B, H, ⌈S / N⌉, stages · C · D]` in the cache's dtype, in the basis that the model knows.

codes: uint8 `[B, H, S, D · bits / 8 + stages]`: those of what is left, then which centroids they are of, a byte each;
so these come along wherever codes are moved or copied.

scales: as `layout` has them, with steps of 8 bits as a rule (the paper has FP8 ones with a sign, which these have no
need of). The grid of "qvg" is the paper's: 2^bits - 1 levels around zero, {-1, 0, 1}·Δ in 2 bits, between plus and
minus a group's greatest magnitude. "qvg_asymmetric" uses all 2^bits levels, between its extremes.

Attention reads such caches as ordinary tensors: scores of a token depend on which centroids it is of, and a product
with codes alone does not tell them. Only what is left is uncertain, so Δ is its step.

K-means is Euclidean, in float32, and begins with the token that is farthest from the mean, and then ever the one that
is farthest from those before it: nothing is drawn at random, and what a block holds alone tells its centroids. On keys
and values of a video model that leaves up to 15 % less than beginning with tokens in even distances, and about as much
as k-means++.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import byte_steps, ops
from .block_means import fill_blocks, numbers, write_blocks
from .grids import stored
from .held import _HELD, put_over
from .layout import is_symmetric, pack, packed_width
from .quantizers import Grid, from_grid, grid_of
from .reference import FLOAT16_MAX, quantization_step

ITERATIONS = 10  # of k-means; more bring less than 1 % of what is left
_CANDIDATES = 16  # for each centroid: so many tokens, in even distances, may be the ones to begin with
_AT_A_TIME = 4096  # tokens whose distances are held

_STORE = "Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) tables, Tensor(d!) extents"
_GRID = "int bits, int group_size, str quantizer"
for _schema in (
    f"append_clusters({_STORE}, Tensor source, SymInt start, int block, {_GRID}) -> ()",
    f"fill_clusters({_STORE}, SymInt start, SymInt stop, int block, {_GRID}, float value) -> ()",
    f"dequantize_clusters(Tensor codes, Tensor scales, Tensor tables, {_HELD}, SymInt start, SymInt stop, int block, "
    f"{_GRID}, ScalarType dtype) -> Tensor",
):
    ops.library.define(_schema, tags=ops._HOST_TAGS)


def centroids_of(tokens: int) -> int:
    """How many centroids so many tokens have as a rule: 256 for 28,672 of them and more, as in the paper, where tables
    take .14 bits a channel; fewer in proportion for fewer tokens."""
    return max(1, min(256, tokens // 112))


# ---- writing ----


def append_clusters(
    codes: Tensor, scales: Tensor, tables: Tensor, extents: Tensor, source: Tensor, start: int, block: int, bits: int,
    group_size: int, quantizer: str,
) -> None:  # fmt: skip
    """Quantize tokens `source` `[B, H, n, D]`, as the model has them, into tokens start … of a cache, less centroids.

    Args:
        codes, scales, tables: see above; mutated.
        extents: see `block_means`; mutated.
        source: float32, float16 or bfloat16; must not alias the cache.
        block: how many tokens share tables.
        bits, group_size, quantizer: how what is left is quantized, as `quantizers.Grid` spells it.

    Raises:
        RuntimeError: the range does not lie within the cache; nothing has been written then.
    """
    store = _Store(codes, scales, tables, block, bits, group_size, grid_of(quantizer))
    args = codes.shape[2], tables, extents, source, start, block
    write_blocks("append_clusters", *args, store.fit, store.put, lambda i: numbers(extents[:, :, i], tables))


def fill_clusters(
    codes: Tensor, scales: Tensor, tables: Tensor, extents: Tensor, start: int, stop: int, block: int, bits: int,
    group_size: int, quantizer: str, value: float,
) -> None:  # fmt: skip
    """Set tokens start … stop - 1 to a number: exactly in blocks that are covered, else as any token is quantized.

    Raises:
        RuntimeError: the range does not lie within the cache; nothing has been written then.
    """
    store = _Store(codes, scales, tables, block, bits, group_size, grid_of(quantizer))
    value = torch.tensor(value, dtype=tables.dtype).double().item()

    def cover(first: int, last: int, covered: slice) -> None:
        codes[:, :, first:last], scales[:, :, :, first:last] = 0, 0
        tables[:, :, covered] = 0
        tables[:, :, covered, : store.head_dim] = value  # the first centroid of the first stage

    args = codes.shape[2], tables, extents, start, stop, block, store.head_dim, value
    fill_blocks("fill_clusters", *args, cover, store.put)


class _Store:
    """The parts of a cache, and how tokens are put into it."""

    def __init__(
        self, codes: Tensor, scales: Tensor, tables: Tensor, block: int, bits: int, group_size: int, grid: Grid
    ) -> None:
        self.codes, self.scales, self.tables, self.block = codes, scales, tables, block
        self.bits, self.group_size, self.grid = bits, group_size, grid
        self.head_dim = scales.shape[2] * group_size
        self.width = packed_width(self.head_dim, bits)

    def of_block(self, i: int) -> Tensor:
        """Centroids of a block, float32 `[B, H, stages, C, D]`."""
        return self.tables[:, :, i].float().unflatten(-1, (self.grid.stages, self.grid.centroids, self.head_dim))

    def fit(self, tokens: Tensor) -> Tensor:
        """Tables of blocks `[B, H, t, n, D]`, float32 `[B, H, t, stages · C · D]`, rounded as the cache has them."""
        rest = torch.where(tokens.isfinite(), tokens, 0.0)  # others stay in their groups
        found = []
        for _ in range(self.grid.stages):
            centroids = kmeans(rest, self.grid.centroids).to(self.tables.dtype).float()
            found.append(centroids)
            rest = rest - _taken(centroids, nearest(rest, centroids))
        return torch.stack(found, 3).flatten(3)

    def put(self, tokens: Tensor, start: int) -> None:
        """Write `[B, H, n, D]` to tokens start …, by the tables that are there."""
        stop = start + tokens.shape[2]
        for i in range(start // self.block, -(-stop // self.block)):
            first, last = max(start, i * self.block), min(stop, (i + 1) * self.block)
            rest, centroids = tokens[:, :, first - start : last - start].float(), self.of_block(i)
            for stage in range(self.grid.stages):
                of = nearest(torch.where(rest.isfinite(), rest, 0.0), centroids[:, :, stage])
                rest = rest - _taken(centroids[:, :, stage], of)
                self.codes[:, :, first:last, self.width + stage] = of.to(torch.uint8)
            rest = stored(rest, self.bits, self.group_size, str(self.grid))
            codes, scales = self._quantized(rest)
            self.codes[:, :, first:last, : self.width], self.scales[:, :, :, first:last] = codes, scales

    def _quantized(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of `[B, H, n, D]`."""
        if self.grid.symmetric:
            return quantize_odd(rest, self.bits, self.group_size, self.grid.step_bits)
        (batch, heads, n, _), (_, _, groups, _, numbers) = rest.shape, self.scales.shape
        codes = self.codes.new_empty(batch, heads, n, self.width)
        scales = self.scales.new_empty(batch, heads, groups, n, numbers)
        torch.ops.jkv.append(codes, scales, rest, 0, self.bits)
        return codes, scales


def quantize_odd(x: Tensor, bits: int, group_size: int, step_bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x` `[B, H, n, D]` on 2^bits - 1 levels around zero, which is one of them.

    As `layout` has symmetric caches, whose levels lie half a step lower. A group with a NaN or an infinity gets a NaN
    step; steps beyond float16 saturate.
    """
    groups, most = x.float().unflatten(-1, (-1, group_size)), 2 ** (bits - 1) - 1
    peak = groups.abs().amax(-1)  # [B, H, n, G]
    step = (peak * (2**bits / most)).clamp(max=FLOAT16_MAX).masked_fill(~peak.isfinite(), torch.nan)
    scales = step.to(torch.float16).transpose(2, 3).unsqueeze(-1).contiguous()
    scales = byte_steps.encode(scales, bits) if step_bits == 8 else scales
    delta = quantization_step(scales, bits).unsqueeze(-1)
    codes = (groups / delta).round().clamp(-most, most) + most
    codes = torch.where(delta > 0, codes, most).to(torch.uint8)
    return pack(codes.flatten(-2), bits), scales


# ---- k-means ----


def kmeans(tokens: Tensor, count: int) -> Tensor:
    """`count` centroids of tokens `[…, n, D]`, float32 `[…, count, D]`; of fewer tokens, these and zeros after them.

    A centroid that loses all its tokens stays where it is.
    """
    n = tokens.shape[-2]
    if n <= count:
        return torch.nn.functional.pad(tokens, (0, 0, 0, count - n))
    centroids, which = _far_apart(tokens, count), torch.arange(count, device=tokens.device).unsqueeze(-1)
    for _ in range(ITERATIONS):
        total, size = torch.zeros_like(centroids), centroids.new_zeros(*centroids.shape[:-1], 1)
        for part in tokens.split(_AT_A_TIME, -2):
            members = (nearest(part, centroids).unsqueeze(-2) == which).to(part.dtype)  # [..., C, n]
            total += members @ part
            size += members.sum(-1, keepdim=True)
        centroids = torch.where(size > 0, total / size.clamp_min(1), centroids)
    return centroids


def _far_apart(tokens: Tensor, count: int) -> Tensor:
    """As many of tokens `[…, n, D]`, each the farthest from the mean or, from the second on, from those before it."""
    n, m = tokens.shape[-2], min(tokens.shape[-2], _CANDIDATES * count)
    among = tokens[..., torch.arange(m, device=tokens.device) * n // m, :]
    norms = among.square().sum(-1)

    def to(one: Tensor) -> Tensor:
        """Squared distances to one vector `[…, 1, D]`."""
        return norms - 2 * (among @ one.mT).squeeze(-1) + one.square().sum(-1)

    distance = to(tokens.mean(-2, keepdim=True))
    found: list[Tensor] = []
    while len(found) < count:
        found.append(_taken(among, distance.argmax(-1, keepdim=True)))
        distance = torch.minimum(distance, to(found[-1])) if len(found) > 1 else to(found[-1])
    return torch.cat(found, -2)


def nearest(tokens: Tensor, centroids: Tensor) -> Tensor:
    """The nearest of centroids `[…, C, D]` to each of tokens `[…, n, D]`, int64 `[…, n]`."""
    half = centroids.square().sum(-1).unsqueeze(-2) / 2  # |t - c|² / 2 is this - t·c, but for what all have
    return torch.cat([(part @ centroids.mT - half).argmax(-1) for part in tokens.split(_AT_A_TIME, -2)], -1)


def _taken(centroids: Tensor, of: Tensor) -> Tensor:
    """Centroids `[…, C, D]` that tokens are of, `[…, n, D]`."""
    return centroids.gather(-2, of.unsqueeze(-1).expand(*of.shape, centroids.shape[-1]))


# ---- reading ----


def dequantize_clusters(
    codes: Tensor, scales: Tensor, tables: Tensor, held: Sequence[Tensor], held_ranges: Sequence[Tensor], start: int,
    stop: int, block: int, bits: int, group_size: int, quantizer: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Tokens start … stop - 1 as the model knows them, `[B, H, n, D]`; arguments as for `held.dequantize_held`."""
    store = _Store(codes, scales, tables, block, bits, group_size, grid_of(quantizer))
    grid, head_dim = store.grid, store.head_dim
    centroids = tables.unflatten(-1, (grid.stages, grid.centroids, head_dim)).transpose(2, 3).flatten(3, 4)
    out = codes.new_empty(*codes.shape[:2], stop - start, head_dim, dtype=dtype)
    for first in range(start, stop, _AT_A_TIME):
        last = min(first + _AT_A_TIME, stop)
        part = codes[:, :, first:last]
        steps = scales[:, :, :, first:last]
        left = torch.ops.jkv.dequantize(
            part[..., : store.width].contiguous(), steps.contiguous(), 0, last - first, bits, torch.float32
        )
        if is_symmetric(scales):  # the middle of an odd number of levels is zero
            left.unflatten(-1, (-1, group_size)).add_(quantization_step(steps, bits).unsqueeze(-1), alpha=0.5)
        if grid.within:
            left = from_grid(left, quantizer, group_size)
        table = torch.arange(first, last, device=codes.device) // block * grid.centroids
        for stage in range(grid.stages):
            left += _taken(centroids[:, :, stage], part[..., store.width + stage].long() + table)
        out[:, :, first - start : last - start] = left
    for tensor, ranges in zip(held, held_ranges):
        put_over(out, tensor, ranges, start)
    return out


def _dequantize_clusters_fake(codes, scales, tables, held, held_ranges, start, stop, block, bits, group_size, *others):
    return codes.new_empty(*codes.shape[:2], stop - start, scales.shape[2] * group_size, dtype=others[-1])


def _nothing(*_: Any) -> None:
    return None


for _name, _kernel, _fake in (
    ("append_clusters", append_clusters, _nothing),
    ("fill_clusters", fill_clusters, _nothing),
    ("dequantize_clusters", dequantize_clusters, _dequantize_clusters_fake),
):
    ops.library.impl(_name, ops._without_autocast(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"jkv::{_name}", _fake, lib=ops.library)
