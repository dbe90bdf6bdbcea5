"""The memory order of what is dequantized, where a model relies on it.

A view of a cache has the cache's strides; its tokens, dequantized, lie as `[B, H, S, D]` and are permuted. Attention,
copies and arithmetic take any order. `view` does not, and what a graph returns has the strides that it was traced with.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..geometry import outermost_first, same
from .nodes import COPIES, example, identity, name_of
from .roles import alike


def keep_memory_order(graph: Graph, dequantized: dict[Node, Tensor]) -> None:
    """Make `view` and outputs of a rewritten graph work on tensors in another memory order.

    Args:
        dequantized: nodes that stand in for views of caches, and those views' values.
    """
    stands_for = dict(dequantized)
    for node in graph.nodes:
        moved = [a for a in node.all_input_nodes if a in stands_for]
        if not moved:
            continue
        if node.op == "output":
            with graph.inserting_before(node):
                for argument in moved:
                    if (ordered := _in_order_of(graph, argument, stands_for[argument])) is not argument:
                        node.replace_input_with(argument, ordered)
            continue
        if node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"
        value = example(node)
        if isinstance(value, Tensor) and any(_follows(node, value, stands_for[a]) for a in moved):
            stands_for[node] = value


def _follows(node: Node, value: Tensor, of: Tensor) -> bool:
    """Whether a result has the memory order of what it is made from: a view, a copy, or element by element."""
    return identity(value) == identity(of) or name_of(node) in COPIES or alike(value.shape, of.shape)


def _in_order_of(graph: Graph, node: Node, known: Tensor) -> Node:
    """`node` with the strides of `known`, a tensor that fills its memory; others stay as they are."""
    order, back = outermost_first(known)
    expected = 1
    for d in reversed(order):
        if not same(known.shape[d], 1) and not same(known.stride(d), expected):
            return node
        expected = expected * known.shape[d]
    if order == back == list(range(known.dim())):
        return graph.call_method("contiguous", (node,))
    ordered = graph.call_method("contiguous", (graph.call_method("permute", (node, order)),))
    return graph.call_method("permute", (ordered, back))
