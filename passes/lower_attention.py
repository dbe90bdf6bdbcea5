"""Attention over packed caches: on the packed data, or on dequantized keys where the model changes them first."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..kernels.centers import uncentered, uncentered_lse
from ..kernels.dense import grouped
from ..kernels.reference import CLAMP
from . import block_means
from .actions import Attend, Dense
from .attention_forms import SDPA_LSE, AttentionCall, sdpa
from .channels import Pairs
from .flex import lower_flex
from .nodes import example
from .pieces import Pieces
from .retain import attention_kept
from .segments import Fresh, Scattered, Segment
from .uncertainty import NotLinear, Uncertainty

ops = torch.ops.jkv
STANDS_BETWEEN = "`{}` stands between cache and attention"


def lower_fused(pieces: Pieces, attend: Attend, correction: str) -> None:
    """`jkv::attention` on packed tokens and those of this graph; plain attention where none are packed yet."""
    call = attend.call
    dtype = call.result.dtype
    query = _cast(pieces, call.query, dtype)
    cached = [s for s in attend.key if not isinstance(s.content, Fresh)]
    keys, values = (_fresh_parts(pieces, segments, dtype) for segments in (attend.key, attend.value))
    # Rows that see no key are zeros, to which no mean is added; the log-sum-exp tells them.
    told = call.lse or (pieces.plans[attend.value_cache].centered and (call.mask is not None or not keys))
    if cached:
        result = _packed_attention(pieces, attend, query, cached, keys, values, correction, told)
    elif call.lse:
        tokens = pieces.concatenate(keys), pieces.concatenate(values)
        result = pieces.call(SDPA_LSE.default, query, *tokens, call.mask, call.is_causal, call.scale)
    else:  # the first chunk: nothing is quantized yet
        grouped = example(call.query).shape[1] != attend.key_cache.shape[attend.key_axes[1]]
        args = query, pieces.concatenate(keys), pieces.concatenate(values), call.mask, 0.0, call.is_causal
        keywords = {"scale": call.scale, "enable_gqa": bool(grouped)}
        result = pieces.call(sdpa, *args, **keywords)
    told = told if cached else call.lse
    result, lse = (pieces.call(operator.getitem, result, i) for i in range(2)) if told else (result, None)
    if cached:
        result, lse = _as_model_has_it(pieces, attend, query, result, lse)
    _replace(pieces, call, result, lse)


def _as_model_has_it(
    pieces: Pieces, attend: Attend, query: Node, result: Node, lse: Node | None
) -> tuple[Node, Node | None]:
    """What the kernels return, turned back from the basis that values are stored in, and shifted by caches' means."""
    result = pieces.from_grid(result, attend.value_cache)
    if pieces.plans[attend.value_cache].centered:
        result = pieces.call(uncentered, result, pieces.center(attend.value_cache), lse)
    if attend.call.lse and pieces.plans[attend.key_cache].centered:
        lse = pieces.call(uncentered_lse, lse, query, pieces.center(attend.key_cache), attend.call.scale)
    if attend.call.result.stride() != _attention_stride(attend.call.result):
        result = pieces.method("contiguous", result)
    return result, lse


def _replace(pieces: Pieces, call: AttentionCall, result: Node, lse: Node | None) -> None:
    """Put `result`, and a log-sum-exp where the call returns one, in the place of a call."""
    if call.lse:
        for user in list(call.node.users):
            user.replace_all_uses_with(result if user.args[1] == 0 else lse)  # type: ignore[arg-type]
            pieces.graph.erase_node(user)
    else:
        call.node.replace_all_uses_with(result)
    pieces.graph.erase_node(call.node)


@dataclass(frozen=True)
class Turned:
    """Δ of keys whose channels have steps of their own, and are turned two by two: see `kernels.turned`.

    kinds: what tells Δ of the cache's channels of the first kind alone, and of the second.
    """

    pairs: Pairs
    kinds: tuple[Uncertainty, Uncertainty]


def lower_dense(
    pieces: Pieces, dense: Dense, uncertainty: Uncertainty | Turned | str, correction: str
) -> tuple[Node, str]:
    """`jkv::attention_dense`, or `jkv::attention_turned`, on keys as the model computes them.

    Args:
        uncertainty: what tells Δ of keys; or why nothing does.

    Returns:
        The new node, which reads what the old one did, and why keys are not corrected ("" where they are).
    """
    call = dense.call
    dtype, stride = call.result.dtype, call.result.stride()
    told, why = _steps_of(call, uncertainty)
    delta = told[0] if told else None
    if call.others is not None:
        if correction == "exact":
            delta, why = None, "flex_attention takes the Taylor correction only, as it is or clamped"
        elif isinstance(uncertainty, Turned):
            delta, why = None, "flex_attention takes steps of channels only where these are not turned"
        if delta is None or correction == "none" or not isinstance(uncertainty, Uncertainty):
            return lower_flex(pieces, call, None, 1, 0), why
        groups, pairs = _groups(pieces, dense, uncertainty)
        most = CLAMP if correction == "clamped" else math.inf
        return lower_flex(pieces, call, _variance(pieces, delta, groups, pairs), groups, pairs, most), why
    query, key, value = (_cast(pieces, x, dtype) for x in (call.query, call.key, call.value))
    if call.lse:
        result = pieces.call(SDPA_LSE.default, query, key, value, call.mask, call.is_causal, call.scale)
        call.node.replace_all_uses_with(result)
        pieces.graph.erase_node(call.node)
        return result, "" if correction == "none" else "its log-sum-exp is used"
    if delta is None or correction == "none":
        grouped = bool(example(call.query).shape[1] != example(call.key).shape[1])
        args = query, key, value, call.mask, 0.0, call.is_causal
        attention = result = pieces.call(sdpa, *args, scale=call.scale, enable_gqa=grouped)
    else:
        settings = call.mask, call.is_causal, call.scale
        own: tuple[Any, ...]
        if isinstance(uncertainty, Uncertainty):
            groups, pairs = _groups(pieces, dense, uncertainty)
            variance = _variance(pieces, delta, groups, pairs)
            target, own = ops.attention_dense.default, (variance, *settings, pairs)
        else:
            assert isinstance(uncertainty, Turned)
            target, own = ops.attention_turned.default, (*told, list(uncertainty.pairs.order), *settings)
        attention = result = pieces.call(target, query, key, value, *own, correction)
        if stride != _attention_stride(call.result):
            result = pieces.method("contiguous", attention)
    call.node.replace_all_uses_with(result)
    pieces.graph.erase_node(call.node)
    return attention, why


def _steps_of(call: AttentionCall, uncertainty: Uncertainty | Turned | str) -> tuple[list[Node], str]:
    """Δ of keys, in one node or two; or none, and why."""
    if isinstance(uncertainty, str):
        return [], uncertainty
    kinds = uncertainty.kinds if isinstance(uncertainty, Turned) else (uncertainty,)
    try:
        return [kind.of(call.key, call.node) for kind in kinds], ""
    except NotLinear as error:
        return [], STANDS_BETWEEN.format(error)


def _groups(pieces: Pieces, dense: Dense, uncertainty: Uncertainty) -> tuple[int, int]:
    """How many groups of channels keys have, and how these lie in the head (`pairs` of `jkv::attention_dense`)."""
    head_dim = example(dense.call.key).shape[-1]
    layout = uncertainty.layout(dense.call.key, pieces.layouts(dense.key_caches, dense.handed))
    groups, pairs = head_dim // layout.group_size, layout.pairs
    if head_dim % layout.group_size:
        return 1, 0
    if pairs:
        return groups, pairs if head_dim % pairs == 0 else 0
    if layout.joined > layout.group_size and groups % 2 == 0 and layout.joined == head_dim:
        # They are stored in groups of neighbours: of the two groups that are turned together, the mean.
        return groups // 2, layout.joined
    return groups, 0


def _variance(pieces: Pieces, delta: Node, groups: int, pairs: int) -> Node:
    """Δ² per channel group, float32 `[B, H, S, G]`, from Δ per channel."""
    squares = pieces.method("square", pieces.method("float", delta))
    if pairs:
        return pieces.method("mean", pieces.call(grouped, squares, groups, pairs), -1)
    return pieces.method("mean", pieces.method("unflatten", squares, -1, (groups, -1)), -1)


def _cast(pieces: Pieces, node: Node, dtype: torch.dtype) -> Node:
    return node if example(node).dtype == dtype else pieces.method("to", node, dtype)


def _fresh_parts(pieces: Pieces, segments: list[Segment], dtype: torch.dtype) -> list[Node]:
    parts = []
    for segment in segments:
        content = segment.content
        if isinstance(content, Fresh):
            parts.append(pieces.canonical(content, segment.length, None, dtype))
        elif isinstance(content, Scattered):
            length = example(content.positions).shape[0]
            parts.append(pieces.canonical(content.value, length, None, dtype))
    return parts


def _packed_attention(
    pieces: Pieces,
    attend: Attend,
    query: Node,
    cached: list[Segment],
    keys: list[Node],
    values: list[Node],
    correction: str,
    lse: bool,
) -> Node:
    """`jkv::attention`, or with `lse` what returns its log-sum-exp too, in the basis that values are stored in."""
    call, number = attend.call, pieces.number
    key_cache, value_cache = attend.key_cache, attend.value_cache
    components = [*pieces.packed(key_cache), *pieces.packed(value_cache)]
    ranges = [number(p) for s in cached for p in (s.content.first, s.content.first + s.length)]
    query = pieces.to_grid(query, key_cache)
    key, value = (
        pieces.to_grid(pieces.centered(pieces.concatenate(parts), cache, call.result.dtype), cache)
        if parts
        else pieces.no_tokens(query, cache)
        for parts, cache in ((keys, key_cache), (values, value_cache))
    )
    mask = _causal_mask(pieces, attend) if call.is_causal else call.mask
    if isinstance(cached[0].content, Scattered):
        mask = _scattered_mask(pieces, mask, cached[0])
    settings = (mask, False, call.scale, pieces.plans[key_cache].bits, pieces.plans[value_cache].bits, correction)
    if pieces.plans[key_cache].mean_tokens or pieces.plans[value_cache].mean_tokens:
        tokens = query, components, ranges, key, value
        return block_means.attention(pieces, key_cache, value_cache, *tokens, settings, lse)
    if pieces.plans[key_cache].keeps:
        return attention_kept(pieces, attend, query, components, ranges, key, value, *settings)
    if pieces.plans[key_cache].holds and pieces.plans[value_cache].holds:
        sides = [pieces.all_held(cache) for cache in (key_cache, value_cache)]
        held = [x for cache, (rows, told) in zip((key_cache, value_cache), sides) for x in (
            [pieces.to_grid(row, cache) for row in rows], told
        )]  # fmt: skip
        target = ops.attention_held_lse.default if lse else ops.attention_held.default
        return pieces.call(target, query, *components, *held, ranges, key, value, *settings)
    if len(cached) == 1 and not key_cache.writes and not value_cache.writes:
        args = (*components, *pieces.active(key_cache), *pieces.active(value_cache), *ranges, key, value, *settings)
        return pieces.call(ops.attention_active_lse.default if lse else ops.attention_active.default, query, *args)
    target = ops.attention_lse.default if lse else ops.attention.default
    return pieces.call(target, query, *components, ranges, key, value, *settings)


def _causal_mask(pieces: Pieces, attend: Attend) -> Node:
    """PyTorch's `is_causal` over cached and current keys together: query i sees the first i + 1 of them."""
    length = pieces.number(example(attend.call.query).shape[2])
    total = pieces.number(attend.key[-1].stop)
    device = example(attend.call.query).device
    return pieces.method("tril", pieces.call(torch.ones, [length, total], dtype=torch.bool, device=device))


def _scattered_mask(pieces: Pieces, mask: Node | None, cached: Segment) -> Node:
    """The mask of a cache followed by its current tokens: those at `positions` are seen in full precision only."""
    assert isinstance(cached.content, Scattered)
    positions = cached.content.positions
    if mask is None:
        device = example(positions).device
        mask = pieces.call(torch.ones, [1, pieces.number(cached.length)], dtype=torch.bool, device=device)
    hidden = False if example(mask) is None or example(mask).dtype == torch.bool else float("-inf")
    packed = pieces.method("index_fill", mask, -1, positions, hidden)
    return pieces.call(torch.cat, [packed, pieces.method("index_select", mask, -1, positions)], -1)


def _attention_stride(value: torch.Tensor) -> tuple[int, ...]:
    """Strides of `[B, L, H, D]` memory seen as `[B, H, L, D]`, as `jkv::attention` returns it."""
    _, heads, length, head_dim = value.shape
    return (length * heads * head_dim, head_dim, heads * head_dim, 1)
