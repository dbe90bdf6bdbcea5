"""Appends of the keys and of the values of the same tokens become one `jkv::append_kv`: one launch on a GPU.

What is written first has to wait for the other, and does so only where nobody could tell: nothing between the two reads
the cache that is written late, and nothing changes a tensor in place, which might be what is appended. Where keys are
attended before values are written, there are two appends.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from ..geometry import same
from .actions import Append, Holder
from .nodes import example, is_in_place, mutates
from .pieces import CachePlan

ops = torch.ops.jkv


def join_appends(
    graph: Graph, appends: dict[Node, Append], plans: dict[Holder, CachePlan], together: Iterable[tuple[Holder, Holder]]
) -> None:
    """Join `jkv::append` nodes of a rewritten graph, in place.

    appends: those nodes in their order, with the writes that they stand for.
    together: keys' caches with the values' caches they are attended with. Caches that no attention in this graph reads
        are joined as they come.
    """
    partners = {k: v for k, v in together} | {v: k for k, v in together}
    keys = {k for k, _ in together}
    waiting: list[Node] = []
    for late, write in appends.items():
        for early in waiting:
            other = appends[early]
            if _alike(other, write, plans, partners) and _may_wait(early, late):
                break
        else:
            waiting.append(late)
            continue
        waiting.remove(early)
        (key_codes, key_scales, key, start, key_bits), (value_codes, value_scales, value, _, value_bits) = (
            (late.args, early.args) if write.holder in keys else (early.args, late.args)
        )
        stores = key_codes, key_scales, value_codes, value_scales
        with graph.inserting_before(late):
            graph.call_function(ops.append_kv.default, (*stores, key, value, start, key_bits, value_bits))
        graph.erase_node(early)
        graph.erase_node(late)


def _alike(one: Append, other: Append, plans: dict[Holder, CachePlan], partners: dict[Holder, Holder]) -> bool:
    """Whether two caches of the same batch and heads get the same tokens, and as far as is known belong together."""
    a, b = one.holder, other.holder
    if a is b or a.part is not None or b.part is not None:  # parts of one tensor are views of it
        return False
    if example(a.node).device != example(b.node).device or partners.get(a, b) is not b or partners.get(b, a) is not a:
        return False
    shapes = [[h.shape[plans[h].axes[role]] for role in (0, 1)] for h in (a, b)]
    written = (one.start, one.stop), (other.start, other.stop)
    return all(same(x, y) for x, y in zip(*shapes)) and all(same(x, y) for x, y in zip(*written))


def _may_wait(early: Node, late: Node) -> bool:
    store = early.args[:2]
    node = early.next
    while node is not late:
        if any(argument in store for argument in node.all_input_nodes):
            return False
        ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "jkv"
        if not ours and (is_in_place(node) or any(mutates(node, argument) for argument in node.all_input_nodes)):
            return False
        node = node.next
    return True
