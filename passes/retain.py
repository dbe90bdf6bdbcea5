"""Caches with a budget: which graphs can serve them, and what their writes and attention become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..geometry import same
from ..kernels.retention import is_head
from ..reasons import BUDGET
from .actions import Append, Attend, Fill, Holder, Move, Scatter, Tracking
from .nodes import example
from .pieces import Pieces
from .segments import Fresh

ops = torch.ops.jkv


class ReadAsTensor(Exception):
    """A rewritten graph goes on reading a cache with a budget as a tensor, in which tokens that were dropped would be
    zeros; of a copy that is only edited, attended or moved back nothing is left by then.

    name: the input's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def why_not_kept(holder: Holder, tracking: Tracking, as_tensor: bool, policy: str) -> str | None:
    """Why a graph cannot serve a cache that keeps some of its tokens only, as `policy` tells.

    as_tensor: whether it is known that it is read as one.
    """
    writes = [w for w in tracking.writes if w.holder.node is holder.node]
    attends = [a for a in tracking.attends if holder in (a.key_cache, a.value_cache)]
    dense = next((d for d in tracking.dense if holder in d.caches), None)
    if holder.part is not None or any(h.node is holder.node and h is not holder for h in tracking.caches):
        why = "several caches lie in this tensor"
    elif any(isinstance(w, Scatter) for w in writes):
        why = "this one is written at places that a tensor holds"
    elif any(isinstance(w, Fill) and w.value for w in writes):
        why = "this one is set to a number other than zero"
    elif any(r.copy.cache is holder for r in tracking.returned):
        why = "tokens of this one are joined with new ones and returned"
    elif dense is not None:
        why = f"this one is not attended as it is: {dense.reason}"
    elif any(a.call.lse for a in attends):
        why = "the log-sum-exp of attention over this one is used"
    elif attends and not any(isinstance(w, Append) for w in writes):
        why = "this one is not written in the graph that attends to it"
    elif any(_keeps(h, holder, policy) != policy for a in attends for h in (a.key_cache, a.value_cache)):
        why = "only one of keys and values keeps some of its tokens, or the two go by different saliences"
    elif as_tensor:
        why = "this one is read as a tensor, too"
    else:
        return None
    return BUDGET.format(why)


def _keeps(one: Holder, beside: Holder, policy: str) -> str | None:
    """What tells which tokens a cache keeps, that is attended with another one; None, where that is not known yet."""
    if one.packed:
        return example(one.node)._store.keeps
    return None if beside.packed else policy


def lower_kept(
    pieces: Pieces, write: Append | Scatter | Move | Fill, stored: Callable[[Append, Fresh, int], Node]
) -> None:
    """A write to such a cache; `stored` tells what it puts there."""
    number, plan = pieces.number, pieces.plans[write.holder]
    state = *pieces.packed(write.holder), *pieces.retained(write.holder)
    if isinstance(write, Append):
        value = stored(write, Fresh(write.value, write.axes, write.first), write.stop - write.start)
        pieces.call(ops.append_kept.default, *state, value, number(write.start), plan.bits, plan.keeps)
    elif isinstance(write, Move):
        tokens = number(write.source), number(write.destination), number(write.length)
        pieces.call(ops.move_kept.default, *state, *tokens, plan.keeps)
    else:
        assert isinstance(write, Fill)
        pieces.call(ops.forget_kept.default, *state, number(write.start), number(write.stop))


def score_written(pieces: Pieces, attend: Attend, unscored: list[Append], written: Callable[[Append], Node]) -> None:
    """Before keys and values of the same tokens are attended, a learned head tells how salient they are.

    Done are then taken off `unscored`; `written` tells what a write puts into a cache, in full precision.
    """
    policy = pieces.plans[attend.key_cache].keeps
    if not is_head(policy):
        return
    for key in [w for w in unscored if w.holder is attend.key_cache]:
        partners = (w for w in unscored if w.holder is attend.value_cache and _same_tokens(w, key))
        if (value := next(partners, None)) is not None:
            key_places, key_salience = pieces.retained(key.holder)
            state = key_places, key_salience, *pieces.retained(value.holder)
            pieces.call(ops.score_kept.default, *state, written(key), written(value), pieces.number(key.start), policy)
            unscored.remove(key)
            unscored.remove(value)


def _same_tokens(one: Append, other: Append) -> bool:
    return bool(same(one.start, other.start) and same(one.stop, other.stop))


def attention_kept(
    pieces: Pieces, attend: Attend, query: Node, components: list[Node], ranges: list[Any], *others: Any
) -> Node:
    """`jkv::attention_kept`; `others` are the arguments of `jkv::attention` after `ranges`."""
    (key_places, key_salience), (value_places, value_salience) = map(
        pieces.retained, (attend.key_cache, attend.value_cache)
    )
    state = key_places, value_places, key_salience, value_salience
    policy = pieces.plans[attend.key_cache].keeps
    return pieces.call(ops.attention_kept.default, query, *components, *state, ranges, *others, policy)
