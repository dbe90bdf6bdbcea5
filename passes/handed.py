"""Tokens that pass from graph to graph: graph breaks may lie between the read of a cache and its attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import Graph, Node

from ..compat import is_wrapped
from ..packed import PackedKV
from .attention_forms import as_attention
from .contents import tensors
from .describe import source_line
from .nodes import as_write, example, identity, name_of
from .roles import ARITHMETIC, Roles, alike, projects
from .sources import hands_tokens_on


@dataclass(frozen=True)
class Handed:
    """An output whose tokens may come from an argument; the dimension of that along tokens, where this graph tells."""

    output: int
    argument: int
    tokens: int | None


@dataclass(frozen=True)
class Attended:
    """Arguments that the keys and the values of an attention may come from, and where in the model that is."""

    keys: tuple[int, ...]
    values: tuple[int, ...]
    head_dim: int
    source: str


class Passages:
    """Which plain inputs the tokens of each tensor of a graph may come from, turned, scaled or laid out anew."""

    def __init__(self, graph: Graph, position: dict[Node, int]) -> None:
        self.graph, self.position = graph, position
        self.inputs: dict[int, dict[Node, None]] = {}  # by storage
        for node in graph.nodes:
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

    def handed(self) -> list[Handed]:
        """What the graph hands on."""
        output = next(iter(self.graph.find_nodes(op="output")))
        results = [(i, node) for i, node in enumerate(output.args[0]) if isinstance(example(node), Tensor)]
        if not any(self.of(node) for _, node in results):
            return []
        axes = Roles(self.graph, of_copies=True).axes
        return [Handed(i, self.position[p], axes.get(p)) for i, node in results for p in self.of(node) if p is not node]

    def attended(self) -> list[Attended]:
        """What attention of the graph may have been handed."""
        found = []
        for node in self.graph.nodes:
            if (call := as_attention(node)) is not None and not call.result.requires_grad:
                keys, values = (tuple(self.position[p] for p in self.of(n)) for n in (call.key, call.value))
                if keys and values:
                    found.append(Attended(keys, values, int(example(call.key).shape[-1]), source_line(node)))
        return found


def _broadcast(node: Node, argument: Node, result: Tensor) -> bool:
    """Whether an argument is spread over a result, as tables of angles and scales are: no tokens."""
    value = example(argument)
    return name_of(node) in ARITHMETIC and isinstance(value, Tensor) and not alike(value.shape, result.shape)


def _may_hold_tokens(value: object) -> bool:
    if not isinstance(value, Tensor) or isinstance(value, (nn.Parameter, PackedKV)) or is_wrapped(value):
        return False
    return value.dim() >= 3 and value.dtype.is_floating_point
