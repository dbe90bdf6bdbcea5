"""How uncertain the keys of an attention are, where a model computes them from cached tokens.

Quantization leaves an error of ±Δ/2 on every channel of a cached key. What the model does to keys after reading them
(rotary embeddings, repetition, concatenation, casts) is linear in them, so the same operations, done to Δ with zeros
for keys that were never quantized, tell where each error went; rotations within a group keep the sum of its squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch.fx import Graph, Node

from .actions import Read
from .contents import tensors
from .nodes import CONCATENATIONS, COPIES, NEW, as_write, example, identity, name_of

Known = TypeVar("Known")

MOVEMENT = COPIES | {
    "view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "flatten", "unflatten", "expand",
    "expand_as", "repeat", "repeat_interleave", "getitem", "chunk", "split", "unbind", "narrow", "select",
    "index_select", "flip", "roll", "movedim", "swapaxes", "view_as", "view_as_complex", "view_as_real", "double",
    "tile", "tensor_split", "hsplit", "vsplit", "dsplit", "hstack", "vstack", "gather", "take_along_dim",
    "narrow_copy",
}  # fmt: skip
JOINING = {"cat", "concat", "concatenate", "stack"}
SUMS = {"add", "sub", "neg"}
PRODUCTS = {"mul", "div", "truediv"}


@dataclass(frozen=True)
class StepLayout:
    """Which channels of keys have one Δ: what is told of keys that one graph reads and another attends to.

    group_size: channels of a group.
    pairs: as in `kernels.quantizers.Grid`.
    joined: channels that were put together from halves, of how many; 0, none.
    """

    group_size: int
    pairs: int
    joined: int = 0


class NotLinear(Exception):
    """An operation between cache and attention that does not carry errors over as they are; the message names it."""


class Carried(Generic[Known]):
    """Something that is known of what a graph reads from caches, carried along to the keys of attention.

    Args:
        graph: the graph. Its nodes are visited in order.
        keys: the keys to tell it of.
        reads: what reads caches as ordinary tensors, by consumer.
        first: what is known of what one of them reads.
        handed: what is known of inputs that another graph has read from a cache.
    """

    def __init__(
        self,
        graph: Graph,
        keys: Sequence[Node],
        reads: Mapping[Node, Sequence[Read]],
        first: Callable[[Read], Known],
        handed: Mapping[Node, Known],
    ) -> None:
        self.graph, self.reads, self.first = graph, reads, first
        self.needed = self._needed(keys)
        self.known = dict(handed)
        self.lost: dict[Node, str] = {}  # nodes of which it is not known, and the operation that lost it
        self.filled: set[int] = set()  # storages of new tensors that something uncertain is written to

    def of(self, key: Node, consumer: Node) -> Known:
        """What is known of `key`, which `consumer` attends to. Raises `NotLinear`."""
        direct = next((r for r in self.reads.get(consumer, []) if r.argument is key), None)
        if direct is not None:
            return self.first(direct)
        if key not in self.known:
            raise NotLinear(self.lost.get(key, name_of(key)))
        return self.known[key]

    def _needed(self, keys: Sequence[Node]) -> set[Node]:
        """Everything that keys are computed from, in-place edits included."""
        edits: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            if (write := as_write(node)) is not None:
                edits.setdefault(identity(write.target), []).append(node)
        needed: set[Node] = set()
        left = list(keys)
        while left:
            node = left.pop()
            if node in needed:
                continue
            needed.add(node)
            left += node.all_input_nodes
            value = example(node)
            if isinstance(value, torch.Tensor) and node.op not in ("placeholder", "get_attr"):
                left += edits.get(identity(value), [])
        return needed

    def visit(self, node: Node) -> None:
        """Do to what is known what a node does to the values."""
        if node not in self.needed or node.op not in ("call_function", "call_method"):
            return
        given = {a: self.known[a] for a in node.all_input_nodes if a in self.known}
        for read in self.reads.get(node, []):
            given[read.argument] = self.first(read)
        lost = next((self.lost[a] for a in node.all_input_nodes if a in self.lost), None)
        write = as_write(node)
        try:
            if lost is not None:
                raise NotLinear(lost)
            for view in node.all_input_nodes:  # of a new tensor, taken before it was written to
                value = example(view)
                if view not in given and isinstance(value, torch.Tensor) and identity(value) in self.filled:
                    given[view] = self._of_new(view, node)
            if not given:
                return
            if write is not None:
                self._edit(node, write.base, given)
            else:
                self._carry(node, given)
        except NotLinear as error:
            self.lost[node if write is None else write.base] = str(error)
            self.known.pop(node if write is None else write.base, None)

    def _carry(self, node: Node, given: dict[Node, Known]) -> None:
        """Find what is known of a node's result, given that of some of its arguments."""
        raise NotImplementedError

    def _edit(self, node: Node, base: Node, given: dict[Node, Known]) -> None:
        """Find what is known of a tensor that a node writes to."""
        raise NotImplementedError

    def _of_new(self, base: Node, write: Node) -> Known:
        """What is known of a new tensor, or of a view of one, that nothing uncertain has been written to before."""
        raise NotImplementedError


class Uncertainty(Carried[Node]):
    """Nodes that compute Δ for keys, each next to the node whose errors it tells.

    Args:
        graph: the graph, at whose insertion point nodes are put.
        first: makes a node with Δ for what one of `reads` reads, of the same shape.
        handed: nodes with Δ of inputs that another graph has read from a cache.
        joined: inputs whose channels were put together from halves, and of how many channels.
    """

    def __init__(
        self,
        graph: Graph,
        keys: Sequence[Node],
        reads: Mapping[Node, Sequence[Read]],
        first: Callable[[Read], Node],
        handed: Mapping[Node, Node],
        joined: Mapping[Node, int],
    ) -> None:
        super().__init__(graph, keys, reads, first, handed)
        self.joined = dict(joined)  # by key

    def layout(self, key: Node, before: Sequence[StepLayout]) -> StepLayout:
        """Which channels of `key` have one Δ, where what it comes from had these. The first of them tells, unless any
        has steps of channels."""
        least = next((layout for layout in before if layout.group_size == 1), before[0])
        return replace(least, joined=self.joined.get(key, 0))

    def _carry(self, node: Node, given: dict[Node, Node]) -> None:
        name, uncertain = name_of(node), list(given)
        if name in NEW or not tensors(example(node)):
            return  # it takes none of its values
        joins = name in JOINING or node.target in CONCATENATIONS
        if joins or name in SUMS:
            others = [a for a in node.all_input_nodes if a not in given and isinstance(example(a), torch.Tensor)]
            given |= {a: self.graph.call_function(torch.zeros_like, (a,)) for a in others}
        elif name in PRODUCTS:
            if len(uncertain) != 1 or (name != "mul" and node.args[0] is not uncertain[0]):
                raise NotLinear(name)
        elif name not in MOVEMENT:
            raise NotLinear(name)
        self.known[node] = self.graph.node_copy(node, lambda a: given.get(a, a))
        width = min((self.joined[a] for a in uncertain if a in self.joined), default=0) or _halves(node)
        if width:
            self.joined[node] = width

    def _edit(self, node: Node, base: Node, given: dict[Node, Node]) -> None:
        """A write into a tensor: with Δ where what is written has it, with zeros where it does not."""
        if base not in given:
            given[base] = self._of_new(base, node)
        value = node.args[-1]
        if isinstance(value, Node) and value not in given:
            given[value] = self.graph.call_function(torch.zeros_like, (value,))
        self.graph.node_copy(node, lambda a: given.get(a, a))

    def _of_new(self, base: Node, write: Node) -> Node:
        """Δ of a new tensor, or of a view of one, that nothing uncertain has been written to before."""
        if base in self.known:
            return self.known[base]
        if name_of(base) in NEW:
            self.known[base] = self.graph.call_function(torch.zeros_like, (base,))
            self.filled.add(identity(example(base)))
        elif name_of(base) in MOVEMENT and identity(example(base)) == identity(example(base.args[0])):
            whole = base.args[0]
            assert isinstance(whole, Node)
            delta = self._of_new(whole, write)
            self.known[base] = self.graph.node_copy(base, lambda a: delta if a is whole else a)
        else:
            raise NotLinear(f"`{name_of(write)}` into `{name_of(base)}`")
        return self.known[base]


def pairs_turned(graph: Graph, key: Node, caches: list[Node]) -> int:
    """How many channels there are to each run of a cache's that half-split rotary embeddings turn before attention.

    They put keys together from two halves of channels: `cat`, `stack` or slice assignments, of which the innermost
    tell. 0 where keys are turned otherwise (interleaved pairs are neighbours), not at all, or in runs of several sizes.
    """
    from_caches = set(caches)
    for node in graph.nodes:
        if any(a in from_caches for a in node.all_input_nodes):
            from_caches.add(node)
            if (write := as_write(node)) is not None:
                from_caches.add(write.base)
    edits: dict[int, list[Node]] = {}
    for node in from_caches:
        if (write := as_write(node)) is not None:
            edits.setdefault(identity(write.target), []).append(node)
    found, seen, left = set(), set[Node](), [key]
    while left:
        node = left.pop()
        if node in seen or node not in from_caches:
            continue
        seen.add(node)
        value = example(node)
        before = [*node.all_input_nodes, *(edits.get(identity(value), []) if isinstance(value, torch.Tensor) else [])]
        left += before
        found.add(_halves(node))
    found.discard(0)
    return min(found) if found and all(width % min(found) == 0 for width in found) else 0


def _halves(node: Node) -> int:
    """How many channels a node's result has, where it is put together from two halves of them; 0 where it is not."""
    value = example(node)
    if (write := as_write(node)) is not None:
        width = example(write.base).shape[-1]
        contiguous = write.target.dim() > 1 and write.target.stride(-1) == 1
        return width if contiguous and isinstance(width, int) and write.target.shape[-1] * 2 == width else 0
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or not isinstance(value.shape[-1], int):
        return 0
    arguments = {**dict(zip(("tensors", "dim"), node.args)), **node.kwargs}
    parts, dim = arguments.get("tensors"), arguments.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not isinstance(dim, int):
        return 0
    if node.target in CONCATENATIONS and dim % value.dim() == value.dim() - 1:
        return value.shape[-1] if example(parts[0]).shape[-1] * 2 == value.shape[-1] else 0
    if name_of(node) == "stack" and dim % value.dim() == value.dim() - 2:
        return value.shape[-2] * value.shape[-1]
    return 0
