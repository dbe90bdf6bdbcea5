"""A new tensor that is filled part by part, along one dimension, is a concatenation; it becomes one.

Models join a past and the current chunk in this way, too: `buffer = k.new_empty(…)`, `buffer[:, :n] = past`,
`buffer[:, n:] = k`. What is known of concatenations then holds of it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..compat import fake_mode_of, is_dtensor
from ..geometry import locate, same
from ..packed import PackedKV
from .nodes import NEW, Write, as_write, example, identity, mutates, name_of, offset


@dataclass(frozen=True)
class _Part:
    node: Node  # the write
    value: Node
    dim: int
    start: int
    stop: int


def join_filled(graph: Graph) -> None:
    """Put `torch.cat` in the place of such tensors."""
    nodes = list(graph.nodes)
    time = {node: i for i, node in enumerate(nodes)}
    showing: dict[int, list[Node]] = {}  # by storage: its tensors
    for node in nodes:
        if isinstance(value := example(node), Tensor) and not is_dtensor(value):
            showing.setdefault(identity(value), []).append(node)
    for node in nodes:
        if node.op in ("call_function", "call_method") and name_of(node) in NEW:
            tensors = showing.get(identity(example(node)), []) if isinstance(example(node), Tensor) else []
            if tensors and tensors[0] is node and (parts := _parts(node, tensors, time)):
                _join(graph, node, tensors, parts, time)


def _parts(buffer: Node, tensors: list[Node], time: dict[Node, int]) -> list[_Part]:
    """What fills a tensor, in order; empty where nothing does, or something else is done to it before that."""
    users = {user for tensor in tensors for user in tensor.users}
    found = [_part(buffer, user, as_write(user)) for user in users if any(mutates(user, t) for t in tensors)]
    parts = sorted((p for p in found if p is not None), key=lambda p: time[p.node])
    if len(parts) < 2 or len(parts) < len(found) or len({p.dim for p in parts}) > 1:
        return []
    filled, writes = time[parts[-1].node], {p.node for p in parts}
    if any(time[user] < filled and user not in writes and not _only_written(user, tensors, writes) for user in users):
        return []
    if any(_changed(p.value, time[p.node], filled, time) for p in parts):
        return []
    ordered, at = list[_Part](), 0
    while len(ordered) < len(parts):
        following = [p for p in parts if same(p.start, at) and p not in ordered]
        if len(following) != 1:
            return []
        ordered += following
        at = following[0].stop
    return ordered if same(at, example(buffer).shape[parts[0].dim]) else []


def _part(buffer: Node, node: Node, write: Write | None) -> _Part | None:
    """A write of one tensor to a range of one dimension."""
    if write is None or write.positions is not None or not isinstance(write.value, Node) or node.users:
        return None
    whole, value, target = example(buffer), example(write.value), write.target
    if not isinstance(value, Tensor) or value.dim() != target.dim() or value.device != whole.device:
        return None
    if not all(map(same, value.shape, target.shape)) or identity(value) == identity(whole):
        return None
    window = locate(target.size(), target.stride(), offset(target), whole.shape, whole.stride())
    if window is None or window.axes != tuple(range(whole.dim())):
        return None
    partial = [d for d in range(whole.dim()) if not window.covers(whole.shape, d)]
    if len(partial) != 1:
        return None
    start = window.starts[partial[0]]
    return _Part(node, write.value, partial[0], start, start + window.lengths[partial[0]])


def _only_written(view: Node, tensors: list[Node], writes: set[Node]) -> bool:
    """Whether a view is there to be written to."""
    return view in tensors and all(user in writes for user in view.users)


def _changed(value: Node, after: int, before: int, time: dict[Node, int]) -> bool:
    """Whether something writes to the memory of a tensor in between."""
    storage = identity(example(value))
    between = (node for node, at in time.items() if after < at < before)
    return any(
        isinstance(example(a), Tensor) and identity(example(a)) == storage and mutates(node, a)
        for node in between
        for a in node.all_input_nodes
    )


def _join(graph: Graph, buffer: Node, tensors: list[Node], parts: list[_Part], time: dict[Node, int]) -> None:
    last, whole = max((p.node for p in parts), key=time.__getitem__), example(buffer)
    with graph.inserting_before(last), fake_mode_of(whole) or contextlib.nullcontext():
        taken = [_cast(graph, p.value, whole.dtype) for p in parts]
        values = [example(node) for node in taken]
        plain = not any(isinstance(v, PackedKV) for v in values)  # which are read in the order of the tensor's memory
        if plain and torch.cat(values, parts[0].dim).stride() != whole.stride():
            return
        joined = graph.call_function(torch.cat, (taken, parts[0].dim))
    joined.meta = {**last.meta, "example_value": whole}
    for part in parts:
        graph.erase_node(part.node)
    for node in [n for n in reversed(tensors) if n is not buffer and time[n] < time[last]]:
        if node not in {p.node for p in parts}:  # a view that was there to be written to
            graph.erase_node(node)
    buffer.replace_all_uses_with(joined)
    graph.erase_node(buffer)


def _cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    value = example(node)
    if value.dtype == dtype:
        return node
    cast = graph.call_method("to", (node, dtype))
    cast.meta = {**node.meta, "example_value": value.to(dtype)}
    return cast
