"""Tokens that are no tensor of their own where they are written to a cache: they are made one.

Tokens that a graph changes in place after it has written them to a cache, or joined them with cached ones; and the
places that a tensor holds, where a graph counts on in that tensor once it has written there.

What is written in a graph is attended from its own value there, in full precision (`segments.Fresh`), which has to be
what was written. So the tokens are copied before they are written, where the graph changes their memory later on (an
embedding that rotates keys in place after they have been cached, say), and the copy is what is written.

Tokens that are written from one cache to another: packed data is not exchanged, so they are read as a tensor first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..compat import fake_mode_of, is_dtensor
from ..packed import PackedKV
from .attention_forms import FLEX
from .nodes import CONCATENATIONS, as_write, copied, example, identity, mutates


def hold_what_changes(graph: Graph) -> None:
    """Put `clone` nodes before such writes and concatenations, in place."""
    changes: dict[int, int] = {}  # by storage: the last node that changes it
    nodes = list(graph.nodes)
    for time, node in enumerate(nodes):
        for argument in node.all_input_nodes:
            if isinstance(example(argument), Tensor) and node.target is not FLEX and mutates(node, argument):
                changes[identity(example(argument))] = time
    for time, node in enumerate(nodes):
        for source in [*_tokens_taken(node), *_places(node)]:
            value = example(source)
            mode = fake_mode_of(value) if isinstance(value, Tensor) and not isinstance(value, PackedKV) else None
            if mode is None or is_dtensor(value) or changes.get(identity(value), -1) <= time:
                continue
            with graph.inserting_before(node), mode:
                held = graph.call_method("clone", (source,))
                held.meta["example_value"] = value.clone()
            node.replace_input_with(source, held)


def make_own(graph: Graph, writes: Collection[str]) -> None:
    """Make what these nodes write tensors of their own, in place: it is a view of a cache, and read as a tensor."""
    for node in [n for n in graph.nodes if n.name in writes]:
        (source,) = _tokens_taken(node)
        value = example(source)
        memory = value._store.memory[0] if isinstance(value, PackedKV) else value
        with graph.inserting_before(node), fake_mode_of(memory) or contextlib.nullcontext():
            taken = graph.call_function(as_tensor, (source,))
            taken.meta = {**node.meta, "example_value": memory.new_empty(value.shape, dtype=value.dtype)}
        node.replace_input_with(source, taken)


def as_tensor(x: Tensor) -> Tensor:
    """`x`, which the passes take for the outcome of a computation."""
    return x


def _places(node: Node) -> list[Node]:
    """The tensor of places that a node writes to."""
    write = as_write(node)
    return [] if write is None or write.positions is None else [write.positions]


def _tokens_taken(node: Node) -> list[Node]:
    """What a node writes to another tensor, or joins to one."""
    if node.op == "call_function" and node.target in CONCATENATIONS:
        return list(dict.fromkeys(copied(node)))
    write = as_write(node)
    taken = write is not None and isinstance(write.value, Node) and write.value is not write.base
    return [write.value] if taken and isinstance(example(write.value), torch.Tensor) else []  # type: ignore[union-attr]
