"""What may be cached tokens, and stays in full precision without a reason of its own: told, and nobody is warned.

Two sorts: attention whose keys and values enter the graph as plain tensors, from eager code or another graph; and
tensors that the graph writes in slices or joins with new tokens, and that no attention of it reads.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from ..adopt import obstacle
from ..compat import is_wrapped
from ..config import Config
from ..errors import ConfigurationError
from ..geometry import same
from ..hints import is_ignored
from ..packed import PackedKV
from ..report import Note
from .attention_forms import SPELLED, AttentionCall, as_attention
from .describe import input_name, source_line
from .handed import Handed, Passages
from .nodes import as_write, example, identity, name_of
from .sources import Sources

ENTERS = "its keys and values enter the graph as plain tensors, which are not known to be of a cache"
ENTERS_UNFIT = ENTERS + "; nor could they be packed as they are: {}"
UNFIT_PAST = "the past that it attends with new tokens cannot be packed: {}"
ONE_TENSOR = "its keys and values are views of one tensor"
WRITTEN, HANDED_ON = "written here", "read here and handed on"
SPELLED_OTHERWISE = "{} is {}, and comes to the softmax of {}, in a spelling of attention which is not known"
UNATTENDED = "{} is {}, and attended in another graph, in eager code, or not at all"
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}


@dataclass(frozen=True)
class Unpacked:
    """What a note tells of: the arguments that hold the tokens, and the reason as far as the graph tells."""

    source: str
    sides: tuple[tuple[int, ...], ...]  # of keys and of values, or of one tensor
    reason: str
    near_miss: bool = False  # attended together with new tokens, as a past is
    while_alive: bool = False  # may be of the current chunk: such tensors do not live on

    def note(self, example_inputs: Sequence[Any]) -> Note:
        owners = {id(t): t for t in (_owner(example_inputs[i]) for side in self.sides for i in side)}
        return Note(self.source, self.reason, tuple(map(weakref.ref, owners.values())), self.while_alive)


class Unknown:
    """Finds both sorts in a graph whose attention is in one form; `position` gives the index of each placeholder."""

    def __init__(self, graph: Graph, position: dict[Node, int], example_inputs: Sequence[Any], config: Config) -> None:
        self.graph, self.position, self.example_inputs, self.config = graph, position, example_inputs, config
        self.passages, self.sources = Passages(graph, position), Sources(graph)
        calls = (as_attention(node) for node in graph.nodes)
        self.calls = [call for call in calls if call is not None and not call.result.requires_grad]

    def attention(self, told: set[str]) -> Iterator[Unpacked]:
        """Attention over plain tensors, but for nodes that are `told` of, by the name of what the model called."""
        for call in self.calls:
            keys, values = (self._entering(node, call.query) for node in (call.key, call.value))
            own = same(example(call.query).shape[2], example(call.key).shape[2])  # a chunk that attends to itself
            if keys and values and not own and call.node.meta.get(SPELLED, call.node.name) not in told:
                yield self._unpacked(call, keys, values)

    def tensors(self, handed: Sequence[Handed], plans: set[int]) -> Iterator[Unpacked]:
        """Tensors that are written in slices, or joined with new tokens and handed on, and not attended here."""
        inputs = {i: p for p, i in self.position.items() if _may_be_cache(example(p))}
        found = {self.position[p]: (node, WRITTEN) for p, node in self._written(inputs.values())}
        for one in handed:
            if one.tokens is not None and one.argument in inputs:
                reader = next(iter(inputs[one.argument].users))
                found.setdefault(one.argument, (reader, HANDED_ON))
        sides = [self.sources.of(side) for call in self.calls for side in (call.key, call.value)]
        attended, convolved = functools.reduce(operator.or_, sides, 0), self._convolved()
        for argument, (node, how) in found.items():
            entering = inputs[argument]
            known = argument in plans or self.sources.own(entering) & attended or entering in convolved
            if not known and not is_ignored(self.example_inputs[argument]):
                softmax = self._softmax_of(self.sources.own(entering))
                name = input_name(entering)
                reason = (
                    UNATTENDED.format(name, how)
                    if softmax is None
                    else SPELLED_OTHERWISE.format(name, how, source_line(softmax))
                )
                yield Unpacked(source_line(node), ((argument,),), reason, while_alive=how == HANDED_ON)

    def _softmax_of(self, own: int) -> Node | None:
        """A softmax of what depends on an input, or whose weights meet something that does."""
        behind: dict[Node, Node] = {}  # what is computed of one
        for node in self.graph.nodes:
            sides = [(behind.get(a), a) for a in node.all_input_nodes]
            softmax = next((of for of, _ in sides if of is not None), None)
            if name_of(node) in ("softmax", "_softmax"):
                softmax = node
                if self.sources.of(node) & own:
                    return node
            elif name_of(node) in _PRODUCTS and any(
                of is None and self.sources.of(a) & own for of, a in sides if softmax
            ):
                return softmax
            if softmax is not None:
                behind[node] = softmax
        return None

    def _written(self, inputs: Iterable[Node]) -> Iterator[tuple[Node, Node]]:
        """Inputs of which a part is written, and where."""
        by_storage = {identity(example(p)): p for p in inputs}
        for node in self.graph.nodes:
            write = as_write(node)
            written = None if write is None else by_storage.get(identity(write.target))
            if write is None or written is None:
                continue
            if write.positions is not None or not same(write.target.numel(), example(written).numel()):
                yield written, node

    def _entering(self, node: Node, query: Node) -> list[Node]:
        """The inputs that tokens come from, where queries do not depend on them."""
        queries = self.sources.of(query)
        plain = [p for p in self.passages.of(node) if not isinstance(example(p), PackedKV)]
        found = [p for p in plain if self.sources.own(p) & ~queries]
        inputs = (p for p in self.position if isinstance(example(p), Tensor) and not _excluded(example(p)))
        shown = [p for p in inputs if identity(example(p)) == identity(example(node))]  # whatever its dimensions
        return list(dict.fromkeys([*found, *shown]))

    def _unpacked(self, call: AttentionCall, keys: list[Node], values: list[Node]) -> Unpacked:
        sides = tuple(tuple(self.position[p] for p in side) for side in (keys, values))
        key_owners, value_owners = ([_owner(self.example_inputs[i]) for i in side] for side in sides)
        entering = [self.example_inputs[i] for i in dict.fromkeys(sides[0] + sides[1])]
        why = ONE_TENSOR if any(k is v for k in key_owners for v in value_owners) else None
        why = why or next((reason for v in entering if (reason := self._obstacle(v, _owner(v))) is not None), None)
        near_miss = why is not None and self.sources.gathered(call.key) and not self._returned(call.key)
        reason = ENTERS if why is None else (UNFIT_PAST if near_miss else ENTERS_UNFIT).format(why)
        return Unpacked(source_line(call.node), sides, reason, near_miss)

    def _returned(self, node: Node) -> bool:
        """Whether the graph returns what it attends to: a growing past, which comes again in a tensor of its own."""
        output = next(iter(self.graph.find_nodes(op="output")))
        returned = (example(a) for a in output.all_input_nodes)
        return any(isinstance(v, Tensor) and identity(v) == identity(example(node)) for v in returned)

    def _obstacle(self, value: Tensor, owner: Tensor) -> str | None:
        """Why a tensor could not be packed, even if slices of it, as `value` is one, were seen to move."""
        if owner.dim() < 3:
            return f"a tensor of {owner.dim()} dimensions, expected three or more"
        if owner is value:
            return None
        try:
            self.config.check_head_dim(owner.shape[-1])
        except ConfigurationError as error:
            return str(error)
        return obstacle(owner, views=1)

    def _convolved(self) -> set[Node]:
        """Inputs that are frames which a causal convolution keeps."""
        layers = (node for node in self.graph.nodes if name_of(node).startswith("conv") and node.args)
        return {p for node in layers if isinstance(node.args[0], Node) for p in self.passages.of(node.args[0])}


def _owner(value: Tensor) -> Tensor:
    """The tensor that a view is a part of; any other tensor itself."""
    base = value._base if value._is_view() else None
    return base if base is not None and base.numel() > value.numel() else value


def _excluded(value: Tensor) -> bool:
    return isinstance(value, (nn.Parameter, PackedKV)) or is_wrapped(value) or not value.dtype.is_floating_point


def _may_be_cache(value: object) -> bool:
    return isinstance(value, Tensor) and not _excluded(value) and value.dim() >= 3
