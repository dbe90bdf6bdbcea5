"""What a token goes through before it is quantized, and after it is dequantized.

`rtn` quantizes tokens as they are. `quarot` rotates each head's channels first (QuaRot, arXiv 2404.00456): a Hadamard
matrix spreads a few large channels over all of them, so that the groups' ranges shrink, and the rounding errors become
the independent noise that the Jensen correction (arXiv 2605.26266) assumes. A rotation leaves scores alone,
(Hq)·(Hk) = q·k, so attention runs on rotated queries and keys; what it returns of rotated values is rotated back.

`unbiased` rotates as well, and then makes more of the same bits. Rotated channels are close to normal, so the grid is
the one that rounds normal numbers best (Max, 1960) instead of reaching to the extremes; and each group is rescaled so
that its error is orthogonal to it, as in RaBitQ (arXiv 2405.12497): what is read, projected on what was written, is
what was written, and a query along a key sees that key's score without error.

`symmetric`, `symmetric_quarot` and `symmetric_unbiased` are the same three on grids around zero, which need no zero
points: half the bytes beside the codes, 2.25 bits per channel in all at 2 bits and groups of 64. Rotated channels have
no preferred sign, so that there is little to lose. But such a grid has no level at zero. A group of zeros is a step of
0; a single channel among zeros, as a constant token is when it is rotated, has no close code at few bits.

`kivi` is of keys, and quantizes them as they are, by channel: the tokens of a block share a step for each channel
(KIVI, arXiv 2402.02750; `blocks`). Values go with it as `rtn` has them, by token.

`qvg` and `qvg_asymmetric` store tokens less centroids (Quant VideoGen, arXiv 2602.02958; `clusters`), on an odd number
of levels around zero, or on as many as codes can tell, between a group's least and greatest channel.

The correction needs each channel's step where scores are made, and some models turn or join cached keys before that
(rotary embeddings after the read). What is dequantized has the errors' variances group by group, and rotary embeddings
leave them alone, as long as (a) a rotation has not mixed groups of different steps, and (b) a group holds both channels
of each pair that is turned. Such keys are stored on a `Grid` that sees to both: its rotation stays within each group,
and where embeddings turn channels c and c + pairs/2 of each run of `pairs` channels, the two are put into one group.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .byte_steps import are_bytes, encode
from .layout import in_blocks, is_symmetric, pack, packed_width
from .reference import FLOAT16_MAX

CLUSTERED = ("qvg", "qvg_asymmetric")
QUANTIZERS = ("rtn", "quarot", "unbiased", "symmetric", "symmetric_quarot", "symmetric_unbiased", "kivi", *CLUSTERED)
_STORED = re.compile(
    f"({'|'.join(QUANTIZERS)})(/steps8)?(/stages([1-9][0-9]?)of([1-9][0-9]{{0,2}}))?(/groups|/pairs([1-9][0-9]{{0,5}}))?"
)

# Greatest level, in standard deviations, of the uniform grid of 2^bits levels with the least squared error for normal
# numbers. With 8 bits it lies beyond the extremes of any group.
NORMAL_RANGE = {2: 1.494, 3: 2.051, 4: 2.514, 8: math.inf}


@dataclass(frozen=True)
class Grid:
    """How channels lie in groups: what a cache's `quantizer` says, "quarot", "quarot/groups" or "quarot/pairs128"; with
    steps of 8 bits "quarot/steps8", "quarot/steps8/groups", ….

    quantizer: one of `QUANTIZERS`.
    within: nothing leaves its group: rotations are of each group by itself.
    pairs: channels c and c + pairs/2 of each run of so many channels lie in one group; 0, groups are neighbours.
    step_bits: 16, or 8 (`byte_steps`).
    stages, centroids: of a clustered one (`clusters`), how many centroids a token is stored less, each one of so many;
        where it is not known yet, 0 centroids.
    """

    quantizer: str
    within: bool = False
    pairs: int = 0
    step_bits: int = 16
    stages: int = 0
    centroids: int = 0

    @property
    def rotates(self) -> bool:
        """Whether what is stored are rotated channels."""
        return self.quantizer not in ("rtn", "symmetric", "kivi", *CLUSTERED)

    @property
    def clustered(self) -> bool:
        """Whether tokens are stored less centroids, see `clusters`."""
        return self.quantizer in CLUSTERED

    @property
    def tables(self) -> int:
        """How many vectors the tokens of a block have in common, where they have any: centroids, or one mean."""
        return self.stages * self.centroids or 1

    @property
    def per_channel(self) -> bool:
        """Whether steps are those of channels, over blocks of tokens; then a group is a block."""
        return self.quantizer == "kivi"

    @property
    def symmetric(self) -> bool:
        """Whether scales are steps without zero points."""
        return self.quantizer.startswith("symmetric") or self.quantizer == "qvg"

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.uint8 if self.step_bits == 8 else torch.float16

    @property
    def scale_size(self) -> int:
        """Numbers in a group's scales, their last dimension."""
        return 1 if self.symmetric else 3 if self.step_bits == 8 else 2

    @property
    def scale_bytes(self) -> int:
        """Bytes of a group's scales."""
        return self.scale_size * self.scale_dtype.itemsize

    def open_tokens(self, group_size: int) -> int:
        """The most tokens of a block that is not full yet: those that have to be held in full precision (`blocks`)."""
        return group_size - 1 if self.per_channel else 0

    def store_shapes(self, shape: Sequence[int], bits: int, group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of codes and of scales of a cache `[B, H, S, D]`, as `layout` describes them."""
        batch, heads, tokens, head_dim = shape
        width = packed_width(head_dim, bits) + self.stages  # a byte for each of a token's centroids
        if self.per_channel:
            blocks = -(-tokens // group_size)
            return (batch, heads, blocks * group_size, width), (batch, heads, head_dim, blocks, self.scale_size)
        return (batch, heads, tokens, width), (batch, heads, head_dim // group_size, tokens, self.scale_size)

    def store_bytes(self, shape: Sequence[int], bits: int, group_size: int) -> int:
        """Bytes of both."""
        codes, scales = self.store_shapes(shape, bits, group_size)
        return math.prod(codes) + math.prod(scales) * self.scale_dtype.itemsize

    @property
    def unbiased(self) -> bool:
        """Whether what is written goes through `round_unbiased`."""
        return self.quantizer.endswith("unbiased")

    @property
    def fill_operator(self) -> str | None:
        """What sets tokens to a number other than zero, by a token's bits; None, where `jkv::fill` takes any number."""
        if self.rotates:
            return "fill_within" if self.within else "fill_rotated"
        return "fill_symmetric" if self.symmetric else None

    def holds(self, value: float) -> bool:
        """Whether tokens can be set to a number: not where they are rotated, and the grid has no level at zero."""
        return value == 0 or not (self.rotates and (self.symmetric or self.step_bits == 8))

    def __str__(self) -> str:
        steps = "/steps8" if self.step_bits == 8 else ""
        steps += f"/stages{self.stages}of{self.centroids}" if self.centroids else ""
        return self.quantizer + steps + (f"/pairs{self.pairs}" if self.pairs else "/groups" if self.within else "")


@functools.cache
def grid_of(quantizer: str) -> Grid:
    """The grid that a cache's `quantizer` names. Raises `ValueError` where it names none."""
    match = _STORED.fullmatch(quantizer)
    if match is None:
        raise ValueError(
            f"quantizer {quantizer!r}: expected one of {QUANTIZERS}, and /steps8, /stagesSofC, /groups or /pairsN "
            "after it, in this order"
        )
    stages, centroids = int(match[4] or 0), int(match[5] or 0)
    if (stages and match[1] not in CLUSTERED) or centroids > 256:
        raise ValueError(
            f"quantizer {quantizer!r}: expected one of {CLUSTERED} where there are /stagesSofC, C at most 256"
        )
    return Grid(match[1], match[6] is not None, int(match[7] or 0), 8 if match[2] else 16, stages, centroids)


def grid_within(quantizer: str, head_dim: int, group_size: int, pairs: int) -> Grid:
    """The grid for keys that are changed after they are read, `pairs` as they are turned; the plainest that will do."""
    grid = replace(grid_of(quantizer), within=False, pairs=0)
    if grid.per_channel:  # no two channels share a step
        return grid
    apart = pairs > group_size and pairs % group_size == 0 and head_dim % pairs == 0
    return replace(grid, within=apart or (grid.rotates and head_dim != group_size), pairs=pairs if apart else 0)


def rotates(quantizer: str) -> bool:
    """Whether what is stored are rotated channels."""
    return grid_of(quantizer).rotates


def to_grid(x: Tensor, quantizer: str, group_size: int) -> Tensor:
    """`x` `[…, D]` in the basis that the grid `within` groups is laid over; x's dtype, contiguous.

    An orthogonal map: scores are the same where queries and keys both go through it.
    """
    grid = grid_of(quantizer)
    x = _blocks_swapped(x, grid.pairs, group_size, 2) if grid.pairs else x
    return (_rotated(x, group_size) if grid.rotates else x).to(x.dtype).contiguous()


def from_grid(x: Tensor, quantizer: str, group_size: int) -> Tensor:
    """The inverse of `to_grid`."""
    grid = grid_of(quantizer)
    turned = (_rotated(x, group_size) if grid.rotates else x).to(x.dtype)
    return unpaired(turned, grid.pairs, group_size).contiguous()


def unpaired(x: Tensor, pairs: int, group_size: int) -> Tensor:
    """`x` `[…, D]`, whose channels are in the order of groups that hold `pairs`, in the order of the head."""
    return _blocks_swapped(x, pairs, group_size, pairs // group_size) if pairs else x


def _blocks_swapped(x: Tensor, pairs: int, group_size: int, rows: int) -> Tensor:
    """In each run of `pairs` channels, its half groups, as a matrix of so many rows, transposed."""
    return x.unflatten(-1, (-1, rows, 2 * pairs // group_size // rows, group_size // 2)).transpose(-3, -2).flatten(-4)


def rotate(x: Tensor) -> Tensor:
    """`x` `[…, D]` times an orthonormal Hadamard matrix, along its last dimension; its own inverse.

    D need not be a power of two: runs of as many channels as the largest power of two that divides it are rotated, each
    by itself. Computed in float32; returns x's dtype, and memory laid out as `torch.empty_like` does.
    """
    return torch.empty_like(x).copy_(_rotated(x))


def round_unbiased(x: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Tensor:
    """What the quantizer `unbiased` stores of `x` `[…, D]`: rotated, on a grid of 2^bits levels per group.

    Both ends of a group's grid occur in it, so that `jkv::append`, which quantizes between extremes, finds this very
    grid. Its range is ± `NORMAL_RANGE` root mean squares, or from extreme to extreme where that comes closer (a group
    with an outlier, or all of one number). Then x̂ is rescaled by ‖x‖² / (x·x̂), which makes the error orthogonal to x.

    `symmetric`: the extremes are plus and minus the greatest magnitude, so that the grid lies around zero; one end of
    it occurs in the group, which is what `jkv::append` finds a symmetric grid by.

    Returns:
        float32, contiguous, of x's shape.
    """
    return round_rotated(_rotated(x), bits, group_size, symmetric)


def round_rotated(x: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Tensor:
    """What `round_unbiased` makes of channels `[…, D]` that have been rotated already."""
    if x.shape[-1] % group_size:
        raise RuntimeError(f"groups of {group_size} channels do not divide a head of {x.shape[-1]}")
    groups = x.float().reshape(-1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    energy = groups.square().sum(-1, keepdim=True)
    limit = NORMAL_RANGE[bits] * (energy / group_size).sqrt()
    wide = _on_grid(groups, low, high, energy, bits)
    narrow = _on_grid(groups, torch.maximum(low, -limit), torch.minimum(high, limit), energy, bits)
    # An error that is orthogonal to x is the smaller, the smaller x̂.
    closer = narrow.square().sum(-1, keepdim=True) < wide.square().sum(-1, keepdim=True)
    return torch.where(closer, narrow, wide).view(x.shape)


def _rotated(x: Tensor, within: int = 0) -> Tensor:
    """`rotate`, float32 and contiguous: one matrix product over rows, which strided inputs are copied into first.

    Where `within` is given, as if heads had so many channels.
    """
    matrix = _hadamard(_order(within or x.shape[-1]), x.device)
    return (x.reshape(-1, len(matrix)).float() @ matrix).view(x.shape)


def _on_grid(groups: Tensor, low: Tensor, high: Tensor, energy: Tensor, bits: int) -> Tensor:
    """Groups `[N, group_size]` of squared norm `energy` rounded to 2^bits levels from `low` to `high`, and rescaled."""
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, 1.0)  # of a constant group, whose codes all are 0
    clipped = torch.minimum(torch.maximum(groups, low), high)  # many times faster than clamp with tensors
    rounded = clipped.sub_(low).div_(step).round_().mul_(step).add_(low)
    product = (groups * rounded).sum(-1, keepdim=True)
    return rounded * torch.where(product > 0, energy / product, 1.0)


def fill_rotated(codes: Tensor, scales: Tensor, start: int, stop: int, bits: int, value: float) -> None:
    """Set tokens `start … stop - 1` of a rotated cache so that, rotated back, all channels are `value`.

    A constant token, rotated, is value · √order in the first channel of each block and zero elsewhere: the grid's two
    ends, and the zero is exact. A symmetric grid has no level at zero: only zeros can be filled in.
    """
    _check_fill("fill_rotated", codes, scales, start, stop, value)
    _fill_runs(codes, scales, start, stop, bits, value, _order(codes.shape[-1] * 8 // bits))


def fill_within(codes: Tensor, scales: Tensor, start: int, stop: int, bits: int, value: float) -> None:
    """`fill_rotated` of a cache whose rotation stays within each group."""
    _check_fill("fill_within", codes, scales, start, stop, value)
    _fill_runs(codes, scales, start, stop, bits, value, _order(codes.shape[-1] * 8 // bits // scales.shape[2]))


def fill_symmetric(codes: Tensor, scales: Tensor, start: int, stop: int, bits: int, value: float) -> None:
    """Set tokens of a symmetric cache, whose channels are not rotated, to a number, as if it had been written there."""
    _check_range("fill_symmetric", codes, start, stop)
    first, last = in_blocks(codes, scales, start, stop)
    codes[:, :, start:stop] = 255 if value > 0 else 0  # the greatest code, of any number of bits, or the least
    step = min(abs(value) * 2 * 2**bits / (2**bits - 1), FLOAT16_MAX)
    stored = torch.tensor([step if math.isfinite(value) else math.nan], dtype=torch.float16)
    scales[:, :, :, first:last] = _as_stored(stored, scales, bits)


def _check_range(name: str, codes: Tensor, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= codes.shape[2]:
        raise RuntimeError(f"jkv::{name}: tokens {start}:{stop} of a cache of {codes.shape[2]} tokens")


def _check_fill(name: str, codes: Tensor, scales: Tensor, start: int, stop: int, value: float) -> None:
    _check_range(name, codes, start, stop)
    if value and (is_symmetric(scales) or are_bytes(scales)):
        raise RuntimeError(
            f"jkv::{name}: {value} in tokens of a cache that is symmetric, or whose steps have 8 bits: such tokens "
            "can be filled with zeros only"
        )


def _fill_runs(codes: Tensor, scales: Tensor, start: int, stop: int, bits: int, value: float, order: int) -> None:
    head_dim, levels = codes.shape[-1] * 8 // bits, 2**bits
    token = torch.zeros(head_dim, dtype=torch.uint8, device=codes.device)
    token[::order] = levels - 1
    codes[:, :, start:stop] = pack(token, bits)
    step = (token.view(scales.shape[2], -1).amax(-1) > 0) * (value * order**0.5 * levels / (levels - 1))  # [G]
    pairs = torch.stack((step, -step), -1)[:, : 1 if is_symmetric(scales) else 2]  # zeros have a step of 0
    scales[:, :, :, start:stop] = _as_stored(pairs.to(torch.float16), scales, bits).unsqueeze(1)


def _as_stored(half: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Float16 scales as `scales` hold them, on their device."""
    half = half.to(scales.device)
    return encode(half, bits) if are_bytes(scales) else half


def _order(head_dim: int) -> int:
    """The largest power of two that divides head_dim."""
    return head_dim & -head_dim


@functools.cache
def _hadamard(order: int, device: torch.device) -> Tensor:
    """Sylvester's matrix of a power of two: ±1/√order, negative where row and column share an odd number of bits."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1)
        while len(matrix) < order:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        return (matrix * order**-0.5).to(device)
