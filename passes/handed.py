"""Tokens that pass from graph to graph: graph breaks may lie between the read of a cache and its attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import Graph, Node

from ..compat import is_wrapped
from ..packed import PackedKV
from .attention_forms import as_attention
from .contents import tensors
from .describe import source_line
from .nodes import CONCATENATIONS, as_write, copied, example, identity, joined_along, name_of
from .roles import ARITHMETIC, Roles, alike, projects
from .sources import hands_tokens_on, writes
from .uncertainty import pairs_turned


@dataclass(frozen=True)
class Handed:
    """An output whose tokens may come from an argument.

    tokens: the dimension of the argument along tokens, where this graph tells.
    pairs: how its channels are turned on the way, see `uncertainty.pairs_turned`.
    whole: whether it is a copy of the argument, and nothing else.
    """

    output: int
    argument: int
    tokens: int | None
    pairs: int
    whole: bool = False


@dataclass(frozen=True)
class Attended:
    """Arguments that the keys and the values of an attention may come from, and where in the model that is.

    pairs: how channels of keys are turned on the way, see `uncertainty.pairs_turned`.
    axes: of arguments, the dimension along tokens, where this graph tells.
    written: arguments that this graph writes slices of.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]
    head_dim: int
    pairs: int
    source: str
    axes: tuple[tuple[int, int], ...] = ()
    written: tuple[int, ...] = ()


class Passages:
    """Which inputs the tokens of each tensor of a graph may come from, turned, scaled or laid out anew."""

    def __init__(self, graph: Graph, position: dict[Node, int]) -> None:
        self.graph, self.position = graph, position
        self.inputs: dict[int, dict[Node, None]] = {}  # by storage
        self.joined: list[tuple[set[Node], set[Node]]] = []  # by concatenation: what its parts come from, and its last
        for node in graph.nodes:
            if _joins_tokens(node):
                *parts, last = copied(node)
                self.joined.append(({p for part in parts for p in self.of(part)}, set(self.of(last))))
            if node.op == "placeholder":
                if _may_hold_tokens(example(node)):
                    self.inputs[identity(example(node))] = {node: None}
            elif (write := as_write(node)) is not None:
                self.inputs.setdefault(identity(write.target), {}).update(self.of(write.value))
            elif not as_attention(node) and not projects(node) and hands_tokens_on(node):
                for result in tensors(example(node)):
                    known = self.inputs.setdefault(identity(result), {})
                    for argument in node.all_input_nodes:
                        if not _broadcast(node, argument, result):
                            known.update(self.of(argument))

    def of(self, node: object) -> dict[Node, None]:
        found: dict[Node, None] = {}
        for value in tensors(example(node)):
            found |= self.inputs.get(identity(value), {})
        return found

    def current(self, caches: Iterable[Node]) -> set[Node]:
        """Plain inputs that are the chunk at hand: tokens that are concatenated behind those of other inputs.

        Where a model hands its new keys to a compiled function, nothing else tells them from the past. What the graph
        writes to, and `caches`, which are known to be some, are no chunks.
        """
        kept = {identity(example(a)) for n in self.graph.nodes for a in n.all_input_nodes if writes(n, a)}
        kept |= {identity(example(n)) for n in caches}
        kept |= {identity(example(p)) for p in self.position if isinstance(example(p), PackedKV)}
        found: set[int] = set()  # storages: keys and values may be views of one tensor
        followed: list[set[Node]] = []  # where the parts of later concatenations come from, but for the last
        for others, own in reversed(self.joined):
            part_of_another = any(others | own <= inputs for inputs in followed)
            if others - own and not part_of_another:
                found |= {identity(example(p)) for p in own - others} - kept
            followed.append(others)
        return {p for p in self.position if isinstance(example(p), Tensor) and identity(example(p)) in found}

    def handed(self) -> list[Handed]:
        """What the graph hands on."""
        output = next(iter(self.graph.find_nodes(op="output")))
        results = [(i, node) for i, node in enumerate(output.args[0]) if isinstance(example(node), Tensor)]
        if not any(self.of(node) for _, node in results):
            return []
        axes = Roles(self.graph, of_copies=True).axes
        found = []
        for i, node in results:
            inputs = [p for p in self.of(node) if p is not node]
            pairs = pairs_turned(self.graph, node, inputs) if inputs else 0
            copy = name_of(node) == "clone" and node.args[0] in self.position
            found += [Handed(i, self.position[p], axes.get(p), pairs, copy) for p in inputs]
        return found

    def attended(self) -> list[Attended]:
        """What attention of the graph may have been handed."""
        found = []
        axes = {self.position[p]: axis for p, axis in Roles(self.graph).axes.items() if p in self.position}
        for node in self.graph.nodes:
            if (call := as_attention(node)) is not None and not call.result.requires_grad:
                inputs = list(self.of(call.key))
                keys, values = (tuple(self.position[p] for p in side) for side in (inputs, self.of(call.value)))
                if keys and values:
                    head_dim, pairs = int(example(call.key).shape[-1]), pairs_turned(self.graph, call.key, inputs)
                    told = tuple((i, axis) for i, axis in axes.items() if i in (*keys, *values))
                    found.append(Attended(keys, values, head_dim, pairs, source_line(node), told))
        return found


def _joins_tokens(node: Node) -> bool:
    """Whether a node concatenates several tensors, along another dimension than channels."""
    if node.target not in CONCATENATIONS or len(copied(node)) < 2:
        return False
    return joined_along(node) not in (None, example(node).dim() - 1)


def _broadcast(node: Node, argument: Node, result: Tensor) -> bool:
    """Whether an argument is spread over a result, as tables of angles and scales are: no tokens."""
    value = example(argument)
    return name_of(node) in ARITHMETIC and isinstance(value, Tensor) and not alike(value.shape, result.shape)


def _may_hold_tokens(value: object) -> bool:
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or is_wrapped(value):
        return False
    return isinstance(value, PackedKV) or (value.dim() >= 3 and value.dtype.is_floating_point)
