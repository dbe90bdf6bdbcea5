"""What graphs do with caches whose tokens are stored less what blocks of them have in common: a mean
(`kernels.block_means`), or centroids (`kernels.clusters`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ..kernels.quantizers import grid_of
from .actions import Append, Fill, Holder, Move
from .pieces import Pieces

ops = torch.ops.jkv


def write(pieces: Pieces, action: Append | Move | Fill, packed: tuple[Node, Node], value: Node | None) -> None:
    """Write `value` `[B, H, n, D]` as the model has it, a number, or tokens that are moved, to codes and scales."""
    holder, number = action.holder, pieces.number
    store = *packed, pieces.own(holder, "means"), pieces.own(holder, "extents")
    settings, clustered = _settings(pieces, holder), grid_of(pieces.plans[holder].quantizer).clustered
    if isinstance(action, Append):
        append = ops.append_clusters if clustered else ops.append_means
        pieces.call(append.default, *store, value, number(action.start), *settings)
    elif isinstance(action, Fill):
        tokens = number(action.start), number(action.stop)
        fill = ops.fill_clusters if clustered else ops.fill_means
        pieces.call(fill.default, *store, *tokens, *settings, float(action.value))
    else:
        args = number(action.source), number(action.destination), number(action.length)
        pieces.call(ops.move_means.default, *store, *args, pieces.plans[holder].mean_tokens)


def read(pieces: Pieces, holder: Holder, first: Any, stop: Any, whole: bool = False) -> Node:
    """Tokens as the model knows them, `[B, H, n, D]`; `whole`, of all batch entries and heads, as they are stored."""
    if whole:
        store = [pieces.component(holder, kind) for kind in ("codes", "scales", "means")]
        held: Sequence[Sequence[Node]] = ([], [])
    else:
        store, held = [*pieces.packed(holder), pieces.own(holder, "means")], _in_full(pieces, holder)
    args = pieces.number(first), pieces.number(stop), *_settings(pieces, holder), holder.dtype
    clustered = grid_of(pieces.plans[holder].quantizer).clustered
    return pieces.call((ops.dequantize_clusters if clustered else ops.dequantize_means).default, *store, *held, *args)


def attention(
    pieces: Pieces, keys: Holder, values: Holder, query: Node, packed: Sequence[Node], ranges: list[Any], key: Node,
    value: Node, settings: Sequence[Any], lse: bool,
) -> Node:  # fmt: skip
    """`jkv::attention_means` over ranges of two caches, and `key` and `value` in the basis that these are stored in."""
    means, held = [], []
    for cache in (keys, values):
        rows, told = _in_full(pieces, cache)
        held += [[pieces.to_grid(pieces.centered(row, cache, cache.dtype), cache) for row in rows], told]
        n, node = pieces.plans[cache].mean_tokens, None
        if n:
            node = pieces.to_grid(pieces.method("float", pieces.own(cache, "means")), cache)
        means += [node, n]
    target = ops.attention_means_lse.default if lse else ops.attention_means.default
    return pieces.call(target, query, *packed, *means, *held, ranges, key, value, *settings)


def _settings(pieces: Pieces, holder: Holder) -> tuple[int, int, int, str]:
    plan = pieces.plans[holder]
    return plan.mean_tokens, plan.bits, plan.group_size, plan.quantizer


def _in_full(pieces: Pieces, holder: Holder) -> tuple[list[Node], list[Node]]:
    """What a cache holds in full precision, as it was written: for good, and the range another graph wrote last."""
    both = [pieces.held(holder)] if pieces.plans[holder].holds else []
    if not holder.writes:
        both.append((pieces.own(holder, "active"), pieces.component(holder, "active_range")))
    return [rows for rows, _ in both], [ranges for _, ranges in both]
