"""What nodes of a graph are made of: whether attention may read a cache, and whether that gathers tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from ..packed import PackedKV
from .nodes import CONCATENATIONS, as_write, copied, example, identity, mutates, name_of


class Sources:
    """Which inputs of the graph each node depends on, as bits of an integer; what is written into a tensor counts."""

    def __init__(self, graph: Graph) -> None:
        self._bits: dict[Node, int] = {}
        self._written_into: dict[int, int] = {}  # by storage
        self.gathers = 0  # inputs that are packed, written to, or concatenated with other tokens
        owners: dict[int, int] = {}  # storage -> the bit of the input that it is
        written = {identity(example(a)) for n in graph.nodes for a in n.all_input_nodes if writes(n, a)}
        for node in graph.nodes:
            value = example(node)
            bits = 0
            for argument in node.all_input_nodes:
                bits |= self.of(argument)
            if node.op == "placeholder" and _may_be_cache(value, written):
                bits = owners.setdefault(identity(value), 1 << len(owners))
                self.gathers |= bits if isinstance(value, PackedKV) else 0
            self._bits[node] = bits
            if (write := as_write(node)) is not None:
                into = identity(write.target)
                self._written_into[into] = self._written_into.get(into, 0) | bits
            if node.target in CONCATENATIONS:
                for part in copied(node):
                    while (of := copied(part)) and len(of) == 1:
                        part = of[0]
                    shown = example(part)
                    self.gathers |= owners.get(identity(shown), 0) if isinstance(shown, Tensor) else 0
        self.written = sum({owners[storage] for storage in written & owners.keys()})
        self.gathers |= self.written

    def own(self, placeholder: Node) -> int:
        """The bit of an input; 0 where it can be no cache."""
        return self._bits[placeholder]

    def of(self, node: Any) -> int:
        """The inputs that a node depends on; none of what is no node."""
        value = example(node) if isinstance(node, Node) else None
        own = self._written_into.get(identity(value), 0) if isinstance(value, Tensor) else 0
        return own | self._bits.get(node, 0)

    def of_keys(self, query: Any, key: Any, value: Any) -> int:
        """The inputs that keys or values depend on, and that queries do not."""
        return (self.of(key) | self.of(value)) & ~self.of(query)

    def may_read_a_cache(self, query: Any, key: Any, value: Any) -> bool:
        return bool(self.of_keys(query, key, value))

    def written_before(self, query: Any, key: Any, value: Any) -> bool:
        """Whether keys or values depend on an input that the graph writes to, and that queries do not depend on."""
        return bool(self.of_keys(query, key, value) & self.written)

    def gathered(self, node: Any) -> bool:
        return bool(self.of(node) & self.gathers)


def writes(node: Node, argument: Node) -> bool:
    return isinstance(example(argument), Tensor) and mutates(node, argument)


def _may_be_cache(value: Any, written: set[int]) -> bool:
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or not value.dtype.is_floating_point:
        return False
    return value.dim() >= 3 or (value.dim() == 2 and identity(value) in written)


_PROJECTIONS = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}


def hands_tokens_on(node: Node) -> bool:
    """Whether a result may still be the keys or values that went in, turned, scaled or laid out anew.

    Nothing is left of them where only their size is used, nor where they are features that keys are yet to be made of,
    as frames that a causal convolution keeps.
    """
    name = name_of(node)
    return name not in _PROJECTIONS and not name.endswith("_like") and not name.startswith("new_")
