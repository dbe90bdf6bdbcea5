"""Caches that are read as ordinary tensors: their values, and how uncertain these are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import Node

from ..geometry import same
from ..kernels.byte_steps import step
from ..kernels.quantizers import grid_of, unpaired
from . import block_means
from .actions import Read
from .pieces import Pieces
from .segments import Cached, Fresh, Scattered, Segment

ops = torch.ops.jkv


def materialize(pieces: Pieces, read: Read) -> Node:
    """A view of a cache as an ordinary tensor: cached tokens dequantized, fresh ones as they are."""
    holder, plan, number = read.holder, pieces.plans[read.holder], pieces.number

    def dequantized(first: int, stop: int) -> Node:
        if plan.mean_tokens:
            return block_means.read(pieces, holder, first, stop)
        codes, scales = pieces.packed(holder)
        args = number(first), number(stop), plan.bits, holder.dtype
        if plan.holds:
            settings = number(first), number(stop), plan.bits, plan.group_size, plan.quantizer, holder.dtype
            node = pieces.call(ops.dequantize_held.default, codes, scales, *pieces.all_held(holder), *settings)
            return pieces.call(torch.add, node, pieces.center(holder)) if plan.centered else node
        if holder.writes:
            node = pieces.call(ops.dequantize.default, codes, scales, *args)
        else:
            node = pieces.call(ops.dequantize_active.default, codes, scales, *pieces.active(holder), *args)
        node = pieces.from_grid(node, holder)
        return pieces.call(torch.add, node, pieces.center(holder)) if plan.centered else node

    return _assemble(
        pieces, read, dequantized, lambda fresh: fresh, lambda node, at, fresh: _put(pieces, node, at, fresh)
    )


def steps(pieces: Pieces, read: Read, kind: tuple[Sequence[int], int] | None = None) -> Node:
    """Δ of every channel that `materialize` reads, 0 where it is in full precision; same shape and dtype.

    `kind`: (channels, 0) of these channels of the cache alone, (channels, 1) of all others; 0 for the rest.

    Where heads were rotated as a whole: the root mean square of a token's Δ, since rotating back spreads each error
    over all channels. It also makes them correlate, which Δ cannot tell: right in the mean, single corrections are off
    by 4 % (2 bits, random keys, head_dim 128, groups of 32). So keys that a model is seen to change after reading them
    are packed on a grid `within` groups; this is for caches that another graph, or eager code, had packed before.
    """
    holder, plan, number = read.holder, pieces.plans[read.holder], pieces.number
    grid = grid_of(plan.quantizer)

    def delta(first: int, stop: int) -> Node:
        _, scales = pieces.packed(holder)
        length = number(stop - first)
        node = pieces.call(step, scales) if grid.step_bits == 8 else pieces.method("select", scales, -1, 0)
        if plan.block > 1:
            node = pieces.method("repeat_interleave", node, plan.block, 3)
        node = pieces.call(torch.narrow, node, 3, number(first), length)
        node = pieces.method("transpose", pieces.method("float", node), 2, 3)  # [B, H, n, G]
        node = pieces.call(torch.mul, node, 2.0**-plan.bits)
        if grid.rotates and not grid.within:
            node = pieces.method("sqrt", pieces.method("mean", pieces.method("square", node), -1, keepdim=True))
            node = pieces.method("repeat_interleave", node, number(holder.shape[plan.axes[3]]), -1)
        elif plan.channels > 1:
            node = pieces.method("repeat_interleave", node, plan.channels, -1)
        if grid.pairs:
            node = pieces.call(unpaired, node, grid.pairs, plan.group_size)
        if not holder.writes:
            node = pieces.call(_outside, node, pieces.component(holder, "active_range"), number(first))
        if plan.holds:
            node = pieces.call(_outside_held, node, pieces.held(holder)[1], number(first))
        if kind is not None:
            node = pieces.call(only, node, [*kind[0]], kind[1])
        return pieces.method("to", node, holder.dtype)

    def zeros(fresh: Node) -> Node:
        return pieces.call(torch.zeros_like, fresh)

    return _assemble(pieces, read, delta, zeros, lambda node, at, fresh: _put(pieces, node, at, zeros(fresh)))


def _outside(delta: torch.Tensor, active_range: torch.Tensor, first: int) -> torch.Tensor:
    """Δ `[B, H, n, D]` of tokens from `first` on, 0 for those of a range that is held in full precision."""
    tokens = torch.arange(delta.shape[2], device=delta.device)[:, None] + first
    start, stop = active_range.to(delta.device).unbind()
    return delta.masked_fill((tokens >= start) & (tokens < stop), 0.0)


def _outside_held(delta: torch.Tensor, held_ranges: torch.Tensor, first: int) -> torch.Tensor:
    """The same for tokens that are held for good, which `held_ranges` `[B, regions, 4]` tell."""
    tokens = torch.arange(delta.shape[2], device=delta.device) + first
    start, stop = held_ranges[..., :2, None].to(delta.device).unbind(2)  # [B, regions, 1] each
    held = ((tokens >= start) & (tokens < stop)).any(1)
    return delta.masked_fill(held[:, None, :, None], 0.0)


def only(delta: torch.Tensor, channels: list[int], kind: int) -> torch.Tensor:
    """Δ `[…, D]` of some channels alone (kind 0), or of all others (kind 1); 0 for the rest."""
    chosen = torch.zeros(delta.shape[-1], dtype=torch.bool, device=delta.device)
    chosen[torch.tensor(channels, device=delta.device)] = True
    return delta.masked_fill(chosen == bool(kind), 0.0)


def _put(pieces: Pieces, node: Node, positions: Node, fresh: Node) -> Node:
    return pieces.method("index_copy", node, 2, positions, fresh)


def _assemble(
    pieces: Pieces,
    read: Read,
    cached: Callable[[int, int], Node],
    fresh: Callable[[Node], Node],
    put: Callable[[Node, Node, Node], Node],
) -> Node:
    """What a view of a cache shows, from its cached and its fresh tokens `[B, H, n, D]`, in the view's shape."""
    holder, window = read.holder, read.window
    roles, axes = pieces.roles(read.holder), pieces.plans[read.holder].axes
    of_view = [None if a is None else roles[a] for a in window.axes]  # canonical axis of each of the view's dimensions

    def canonical(value: Fresh, length: int) -> Node:
        return pieces.canonical(value, length, roles, holder.dtype)

    def part(segment: Segment) -> Node:
        content = segment.content
        if isinstance(content, Fresh):
            return fresh(canonical(content, segment.length))
        if isinstance(content, Cached):
            return cached(content.first, content.first + segment.length)
        return scattered(content, segment.length)

    def scattered(content: Scattered, length: int) -> Node:
        tokens = holder.shape[holder.token_axis]
        written = content.positions.meta["example_value"].shape[0]
        before = cached(0, tokens) if content.before is None else scattered(content.before, tokens)
        node = put(before, content.positions, canonical(content.value, written))
        if same(length, tokens):
            return node
        return pieces.call(torch.narrow, node, 2, pieces.number(content.first), pieces.number(length))

    segments = [s for s in read.segments if not same(s.length, 0)] or read.segments[:1]
    node = pieces.concatenate([part(s) for s in segments]) if segments else cached(0, 0)
    for role in (0, 1, 3):  # a view of some batch entries, heads or channels
        axis = axes[role]
        if not window.covers(holder.shape, axis):
            start, length = pieces.number(window.starts[axis]), pieces.number(window.lengths[axis])
            node = pieces.call(torch.narrow, node, role, start, length)
    order = [role for role in of_view if role is not None]
    dropped = [role for role in range(4) if role not in order]
    if [*order, *dropped] != [0, 1, 2, 3]:
        node = pieces.method("permute", node, [*order, *dropped])
    for _ in dropped:
        node = pieces.method("squeeze", node, -1)
    for i, shown in enumerate(window.axes):
        if shown is None:
            node = pieces.method("unsqueeze", node, i)
    return node
