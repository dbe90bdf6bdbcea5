"""Caches that are DTensors sharded on heads: what a graph does to them, done to this rank's shard.

A rank's shard of such a cache is a cache of fewer heads, and writing it, slicing it along tokens and attending to it
concern no other rank. So those operations are put on the shards, where the other passes find them; what goes in is
taken from DTensors, and what comes out is made one again, by `to_local` and `from_local` without communication.
The caller's DTensor stays what it is: only the tensor inside of it becomes packed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..compat import is_dtensor
from ..packed import PackedKV
from ..report import Rejected
from .attention_forms import SDPA
from .context_parallel import parted_attention
from .describe import source_line
from .nodes import CONCATENATIONS, COPIES, example, identity, joined_along, mutates, name_of
from .rewrite import copy_graph

_VIEWS = {"transpose", "permute", "unsqueeze", "movedim", "swapaxes"}
_WRITES = {"copy_", "zero_", "fill_"}


@dataclass(frozen=True)
class Localised:
    """A graph in which the inputs at `places` are the shards of DTensors."""

    graph: GraphModule
    places: tuple[int, ...]

    def arguments(self, values: Sequence[Any]) -> list[Any]:
        """A call's arguments with the shards at those places, as the objects that the DTensors hold."""
        return [v._local_tensor if i in self.places else v for i, v in enumerate(values)]

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Calls with DTensors what takes shards."""
        return lambda *args: call(*self.arguments(args))


def packed_inside(values: Sequence[Any]) -> bool:
    """Whether a DTensor among the arguments has a packed shard."""
    return any(is_dtensor(v) and isinstance(v._local_tensor, PackedKV) for v in values)


def localise(gm: GraphModule) -> tuple[Localised | None, list[Rejected]]:
    """The graph with caches that are DTensors replaced by their shards; None where there are none, or none that can be.

    One that is used in a way that concerns other ranks stays a DTensor, and the graph runs as written on it.

    Returns:
        The graph, and why attention over DTensors that stay so is left as it is.
    """
    if not any(is_dtensor(example(node)) for node in gm.graph.nodes):
        return None, []
    copied, _ = copy_graph(gm)
    inputs = list(copied.graph.find_nodes(op="placeholder"))
    candidates = {node for node in inputs if _may_be_cache(node)}
    chosen = {n for n in candidates if is_dtensor(example(n)) and _placements(example(n)) is not None}
    while chosen:
        used = _Uses(copied, chosen)
        if not used.refused:
            break
        chosen -= used.refused
    rejected = _rejections(copied, candidates - chosen)
    if not chosen:
        return None, rejected
    used.put_on_shards()
    return Localised(copied, tuple(i for i, node in enumerate(inputs) if node in chosen)), rejected


def _rejections(gm: GraphModule, candidates: set[Node]) -> list[Rejected]:
    """Attention on DTensors that reads `candidates`, where these look like caches: written to, or concatenated."""
    reaches = {node: {node} for node in candidates}
    written = {a for node in gm.graph.nodes for a in node.all_input_nodes if mutates(node, a)}
    for node in gm.graph.nodes:
        if sources := {r for a in node.all_input_nodes for r in reaches.get(a, ())}:
            reaches.setdefault(node, sources)
    gathering = {r for node in reaches for r in reaches[node] if node in written or node.target in CONCATENATIONS}
    rejected = []
    for node in reaches:
        if node.target not in SDPA or not is_dtensor(example(node.args[1])) or parted_attention(node) is not None:
            continue
        placements = tuple(example(node.args[1]).placements)
        read = {r for a in node.args[1:3] if isinstance(a, Node) for r in reaches.get(a, ())}
        for cache in sorted(read & gathering, key=str):
            why = f"{cache.name}: its keys are a DTensor of {placements}, and are not attended shard by shard"
            rejected.append(Rejected(source_line(node), why))
    return rejected


class _Uses:
    """What a graph does to the inputs `chosen`: which nodes can be done shard by shard, and whose memory they show."""

    def __init__(self, gm: GraphModule, chosen: set[Node]) -> None:
        self.gm = gm
        self.root = {node: {node} for node in chosen}  # of a node on shards: the inputs that it shows or was made from
        self.refused: set[Node] = set()
        for node in gm.graph.nodes:
            sources = {r for a in node.all_input_nodes for r in self.root.get(a, ())}
            if not sources or node in chosen:
                continue
            if self._by_shards(node):
                self.root[node] = sources
        held = {_memory(example(node)): node for node in chosen}
        for node in gm.graph.nodes:
            for argument in node.all_input_nodes if node not in self.root else ():
                if isinstance(example(argument), Tensor) and mutates(node, argument):
                    self.refused |= {held[m] for m in [_memory(example(argument))] if m in held}
        attended = {r for node in self.root if node.target in SDPA for r in self.root[node]}
        written = {r for node in self.root if node.target is operator.setitem for r in self.root[node]}
        self.refused |= chosen - attended - written

    def _by_shards(self, node: Node) -> bool:
        """Whether a node does the same to all shards, each by itself."""
        tensors = [a for a in node.all_input_nodes if isinstance(example(a), Tensor)]
        if not all(is_dtensor(example(a)) and _placements(example(a)) is not None for a in tensors):
            return False
        alike = len({(example(a).device_mesh, _placements(example(a))) for a in tensors}) == 1
        if node.target is operator.setitem:
            value = node.args[2]
            whole = not isinstance(value, Node) or example(value).dim() == example(node.args[0]).dim()
            return alike and whole and _spares_sharded_dimensions(example(node.args[0]), node.args[1])
        if name_of(node) in _WRITES:
            whole = len(tensors) == 1 or example(tensors[0]).shape == example(tensors[1]).shape
            return alike and whole
        result = example(node)
        if (
            not is_dtensor(result)
            or _placements(result) is None
            or result.device_mesh != example(tensors[0]).device_mesh
        ):
            return False
        if node.target is operator.getitem:
            return all(_is_slice(part) for part in _parts(node.args[1])) and _spares_sharded_dimensions(
                example(node.args[0]), node.args[1]
            )
        if node.target in SDPA:
            return alike and _placements(result) == _placements(example(tensors[0])) and _sharded(result) <= {1}
        if name_of(node) in _VIEWS:  # a dimension that was sharded is, wherever it has gone to
            return bool(_sharded(result)) == bool(_sharded(example(tensors[0])))
        if name_of(node) in COPIES:
            return _placements(result) == _placements(example(tensors[0]))
        if node.target in CONCATENATIONS:
            dim = joined_along(node)
            same_placement = _placements(result) == _placements(example(tensors[0]))
            return alike and same_placement and dim is not None and dim not in _sharded(result)
        return False

    def put_on_shards(self) -> None:
        """Change the graph."""
        graph = self.gm.graph
        wrapped: dict[Node, Node] = {}
        local: dict[Node, Node] = {}
        for node in list(graph.nodes):
            value = example(node)
            if node.op == "placeholder":
                continue
            with graph.inserting_before(node):
                for argument in node.all_input_nodes:
                    if node in self.root and argument not in self.root and is_dtensor(example(argument)):
                        if argument not in local:
                            local[argument] = graph.call_function(to_local, (argument,))
                            local[argument].meta = {**argument.meta, "example_value": example(argument)._local_tensor}
                        node.replace_input_with(argument, local[argument])
                    elif node not in self.root and argument in self.root:
                        if argument not in wrapped:
                            shown = example(argument)
                            make = from_local(shown.device_mesh, tuple(shown.placements))
                            wrapped[argument] = graph.call_function(make, (argument,))
                            wrapped[argument].meta = dict(argument.meta)
                        node.replace_input_with(argument, wrapped[argument])
        for node in self.root:
            if is_dtensor(value := example(node)):
                node.meta = {**node.meta, "example_value": value._local_tensor}
        graph.lint()
        self.gm.recompile()


def to_local(value: Any) -> Tensor:
    """This rank's shard."""
    return value.to_local()


def from_local(mesh: Any, placements: tuple[Any, ...]) -> Callable[[Tensor], Any]:
    """A function (graphs hold no meshes): the DTensor that has a shard on each rank, evenly."""
    from torch.distributed.tensor import DTensor

    def from_local(shard: Tensor) -> Any:
        return DTensor.from_local(shard, mesh, placements, run_check=False)

    return from_local


def _memory(value: Tensor) -> int:
    """The same for all tensors that share a shard's memory."""
    return identity(value._local_tensor if is_dtensor(value) else value)  # type: ignore[attr-defined]


def _may_be_cache(node: Node) -> bool:
    value = example(node)
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.requires_grad:
        return False
    return value.dtype.is_floating_point and value.dim() >= 3


def _placements(value: Any) -> tuple[int | None, ...] | None:
    """Per dimension of the mesh, the dimension that is sharded, evenly, or None; None where it is placed otherwise."""
    known: list[int | None] = []
    for size, placement in zip(value.device_mesh.shape, value.placements):
        if placement.is_replicate():
            known.append(None)
        elif placement.is_shard() and type(placement).__name__ == "Shard":
            dim = placement.dim % value.dim()
            if dim in known or value.shape[dim] % size:
                return None
            known.append(dim)
        else:
            return None
    return tuple(known)


def _sharded(value: Any) -> set[int]:
    return {dim for dim in _placements(value) or () if dim is not None}


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_slice(part: Any) -> bool:
    return isinstance(part, slice) and part.step in (None, 1)


def _spares_sharded_dimensions(value: Any, index: Any) -> bool:
    """Whether an index is of slices, and takes all of the dimensions that are sharded."""
    parts = _parts(index)
    return all(_is_slice(p) for p in parts) and all(
        dim >= len(parts) or parts[dim] == slice(None) for dim in _sharded(value)
    )
