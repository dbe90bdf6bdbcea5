"""Which channels of a cache each channel of keys is made of, where a model computes keys from cached tokens.

Errors of channels that have a step each (`kernels.blocks`) are independent, and stay so until an operation mixes
channels. Rotary embeddings mix them two by two, which `kernels.turned` corrects exactly; it has to be told which two.
How they are spelled does not matter: sets of channels are carried through the graph as Δ is, with the shapes that
tensors have along channels, and size 1 along all dimensions in which the sets do not vary.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..geometry import constant, hint
from .actions import Read
from .contents import tensors
from .nodes import CONCATENATIONS, COPIES, NEW, as_write, example, identity, name_of
from .uncertainty import JOINING, MOVEMENT, PRODUCTS, SUMS, Carried, NotLinear

_MOST = 4096  # places along dimensions in which sets vary: there are hundreds of channels, and any number of tokens
_REGROUPING = {"view", "reshape", "flatten", "unflatten", "view_as", "squeeze"}
_AS_THEY_ARE = {"permute", "transpose", "t", "unsqueeze", "movedim", "swapaxes", "flip"}
MIXED = "channels of keys are mixed in other ways than two by two"


@dataclass(frozen=True)
class Pairs:
    """How channels are turned.

    order: those of keys; the ones at 2i and 2i + 1 are made of the same one or two channels of the cache.
    first: the channels of the cache of which no two are in one pair; nor are any two of the others.
    """

    order: tuple[int, ...]
    first: tuple[int, ...]


class Channels(Carried[Any]):
    """Sets of a cache's channels for the nodes that keys are computed from, as numbers of entries in `sets`.

    Args:
        graph: the graph; it is not changed.
        keys: the keys to tell them of.
        reads: what reads caches as ordinary tensors, by consumer.
        axes: of each cache's node, the axis along channels.
        handed: inputs that another graph has read from a cache, channels last.
    """

    def __init__(
        self,
        graph: Graph,
        keys: Sequence[Node],
        reads: Mapping[Node, Sequence[Read]],
        axes: Mapping[Node, int],
        handed: Sequence[Node],
    ) -> None:
        self.sets: list[frozenset[int]] = [frozenset()]
        self.numbers = {self.sets[0]: 0}
        self.axes = axes
        shown = {node: self._singles(example(node), example(node).dim() - 1, 0) for node in handed}
        super().__init__(graph, keys, reads, self._of_read, shown)
        for node in graph.nodes:
            self.visit(node)

    def pairs(self, key: Node, consumer: Node) -> Pairs | None:
        """Which channels of `key`, which `consumer` attends to, are mixed; None, where none are.

        Raises:
            NotLinear: it is not known how, or not two by two.
        """
        known = self.of(key, consumer)
        channels = _size(example(key).shape[-1])
        made = known.flatten(0, -2).unbind(0)
        numbers = self._union(made).expand(channels).tolist()
        return paired([self.sets[number] for number in numbers])

    def _singles(self, value: Tensor, dim: int | None, start: int) -> Tensor:
        """Of a tensor whose dimension `dim` (None, none: it shows one of them) is channels `start` … of a cache."""
        n, first = 1 if dim is None else _size(value.shape[dim]), _size(start)
        numbers = torch.tensor([self._number(frozenset([c])) for c in range(first, first + n)])
        return numbers.view([n if d == dim else 1 for d in range(value.dim())])

    def _of_read(self, read: Read) -> Tensor:
        axis, shown = self.axes[read.holder.node], read.window.axes
        dim = shown.index(axis) if axis in shown else None
        return self._singles(example(read.argument), dim, read.window.starts[axis])

    def _number(self, channels: frozenset[int]) -> int:
        if channels not in self.numbers:
            self.numbers[channels] = len(self.sets)
            self.sets.append(channels)
        return self.numbers[channels]

    def _union(self, parts: Sequence[Tensor]) -> Tensor:
        """Sets of all channels in any of the parts, which are broadcast."""
        first, *others = torch.broadcast_tensors(*parts)
        for other in others:
            if not torch.equal(first, other):
                pairs = zip(first.flatten().tolist(), other.flatten().tolist())
                both = [self._number(self.sets[a] | self.sets[b]) for a, b in pairs]
                first = torch.tensor(both, dtype=torch.int64).view(first.shape)
        return first

    # ---- what operations do ----

    def _carry(self, node: Node, given: dict[Node, Any]) -> None:
        name = name_of(node)
        if name in NEW or not tensors(example(node)):
            return
        if name in JOINING or node.target in CONCATENATIONS:
            self.known[node] = self._joined(node, given)
        elif name in SUMS | PRODUCTS:
            rank = example(node).dim()
            self.known[node] = self._union([x[(None,) * (rank - x.dim())] for x in given.values()])
        elif name in MOVEMENT and node.args and node.args[0] in given:
            self.known[node] = self._moved(node, name, given[node.args[0]])  # type: ignore[index]
        else:
            raise NotLinear(name)

    def _moved(self, node: Node, name: str, x: Any) -> Any:
        if name in COPIES or name == "double":
            return x
        if name == "getitem":
            return self._item(x, node.args[1], example(node.args[0]))
        before, after = _shape(example(node.args[0])), example(node)
        if name in _REGROUPING:
            return _regrouped(x, before, _shape(after))
        args: Any = torch.fx.node.map_arg(node.args[1:], example)
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, example)
        if name in _AS_THEY_ARE:
            return getattr(x, name)(*args, **kwargs)
        if name == "view_as_real":
            return x.unsqueeze(-1)
        if name == "view_as_complex":
            return self._union(x.unbind(-1))
        if name in ("expand", "expand_as"):
            return x[(None,) * (after.dim() - x.dim())]
        if name in ("repeat", "tile"):
            times = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
            x = x[(None,) * (after.dim() - x.dim())]
            times = (*[1] * (after.dim() - len(times)), *times)
            return x.repeat([1 if n == 1 else _size(time) for n, time in zip(x.shape, times)])
        default = None if name in ("roll", "repeat_interleave") else 0
        dim = kwargs.get("dim", kwargs.get("dims", next(iter(args[1:] if name in _DIM_SECOND else args[:1]), default)))
        if not isinstance(dim, int):
            raise NotLinear(name)
        varies = x.shape[dim] > 1
        if name in ("chunk", "split", "tensor_split", "unbind") and not varies:
            return tuple(x.select(dim, 0) if name == "unbind" else x for _ in after)
        if name == "select" and not varies:
            return x.select(dim, 0)
        if name in ("narrow", "index_select", "repeat_interleave", "roll") and not varies:
            return x
        if name in ("chunk", "split", "tensor_split", "unbind", "narrow", "select", "roll"):
            return getattr(torch, name)(x, *args, **kwargs)
        raise NotLinear(name)

    def _item(self, x: Any, index: Any, shown: Any) -> Any:
        """`shown[index]`, of which `x` is known."""
        if isinstance(x, tuple):
            return x[constant(example(index))]
        index = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in index):
            at, named = index.index(Ellipsis), sum(part is not None for part in index) - 1
            index = (*index[:at], *[slice(None)] * (x.dim() - named), *index[at + 1 :])
        own, dim = [], 0
        for part in index:
            if part is not None:
                varies, dim = x.shape[dim] > 1, dim + 1
                if not varies and isinstance(part, slice):
                    part = slice(None)
                elif not varies and isinstance(example(part), (int, torch.SymInt)):
                    part = 0
                elif isinstance(part, slice):
                    part = slice(*(p if p is None else _size(example(p)) for p in (part.start, part.stop, part.step)))
                elif not isinstance(part, int):
                    raise NotLinear("getitem")
            own.append(part)
        return x[tuple(own)]

    def _joined(self, node: Node, given: dict[Node, Any]) -> Tensor:
        arguments: dict[str, Any] = {**dict(zip(("tensors", "dim"), node.args)), **node.kwargs}
        name, value, parts = name_of(node), example(node), arguments["tensors"]
        rank = value.dim()
        dim = {"hstack": 1, "vstack": 0}.get(name, constant(example(arguments.get("dim", 0))))
        if not isinstance(dim, int) or any(example(part).dim() != rank - (name == "stack") for part in parts):
            raise NotLinear(name)
        dim %= rank
        known = [given.get(part, torch.zeros([1] * example(part).dim(), dtype=torch.int64)) for part in parts]
        sizes = [1 if name == "stack" else _size(example(part).shape[dim]) for part in parts]
        if name == "stack":
            known = [x.unsqueeze(dim) for x in known]
        of_caches = [x for x, part in zip(known, parts) if part in given]
        alike = all(x.shape[dim] == 1 and torch.equal(x, of_caches[0]) for x in of_caches)
        if alike or (sum(sizes) > _MOST and all(x.shape[dim] == 1 for x in known)):
            return self._union(of_caches)  # tokens: what some are made of is said of all
        whole = [x.expand([n if d == dim else -1 for d in range(rank)]) for x, n in zip(known, sizes)]
        shape = torch.broadcast_shapes(*(x.select(dim, 0).shape for x in whole))
        return torch.cat([x.expand(*shape[:dim], x.shape[dim], *shape[dim:]) for x in whole], dim)

    def _edit(self, node: Node, base: Node, given: dict[Node, Any]) -> None:
        target = given[base] if base in given else self._of_new(base, node)
        write = as_write(node)
        if write is None or not isinstance(write.value, Node) or write.value not in given:
            return  # sets that are too large do no harm
        if node.target is operator.setitem:
            target = self._item(target, node.args[1], example(base))
        elif name_of(node) != "copy_":
            raise NotLinear(name_of(node))
        made = given[write.value]
        made = made[(None,) * (target.dim() - made.dim())]
        shared = any(stride == 0 and n > 1 for stride, n in zip(target.stride(), target.shape))
        if shared or any(n not in (1, m) for n, m in zip(made.shape, target.shape)):
            raise NotLinear(name_of(node))
        target.copy_(self._union([target, made]))

    def _of_new(self, base: Node, write: Node) -> Any:
        """Sets of a new tensor, which views of it share memory with."""
        if base in self.known:
            return self.known[base]
        whole = base.args[0] if base.args else None
        if name_of(base) in NEW:
            sizes: list[int] = []
            for n in reversed(example(base).shape):  # its channels, and as far as they go other dimensions
                sizes.insert(0, n if isinstance(n, int) and n * math.prod(sizes) <= _MOST else 1)
            self.known[base] = torch.zeros(sizes, dtype=torch.int64)
            self.filled.add(identity(example(base)))
        elif name_of(base) in MOVEMENT and isinstance(whole, Node):
            known = self._of_new(whole, write)
            self.known[base] = self._moved(base, name_of(base), known)
            memory = known.untyped_storage()._cdata
            if any(x.untyped_storage()._cdata != memory for x in tensors(self.known[base])):
                raise NotLinear(f"`{name_of(write)}` into `{name_of(base)}`")
        else:
            raise NotLinear(f"`{name_of(write)}` into `{name_of(base)}`")
        return self.known[base]


_DIM_SECOND = {"chunk", "split", "tensor_split", "repeat_interleave", "roll"}  # it is their second argument


def _shape(value: Tensor) -> list[int]:
    """A tensor's shape in the call that is compiled; with any number for what only the data tells."""
    return [_size(n) for n in value.shape]


def _size(n: int) -> int:
    if isinstance(n, torch.SymInt) and not n.node.has_hint():
        return int(n.node.expr.xreplace({symbol: 8191 for symbol in n.node.expr.free_symbols}))
    return hint(n)


def _regrouped(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """`x`, known of a tensor of shape `before`, for a view of it of shape `after`.

    Dimensions that are split or merged with one another are whole where any of them varies.
    """
    own, shown, i, j = list[int](), list[int](), 0, 0
    while i < len(before) or j < len(after):
        first, second = i, j
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while (n := math.prod(before[first:i])) != (m := math.prod(after[second:j])):
            if (n < m and i == len(before)) or (n > m and j == len(after)):
                raise NotLinear("a view")
            i, j = (i + 1, j) if n < m else (i, j + 1)
        varies = any(size > 1 for size in x.shape[first:i])
        if varies and n > _MOST:
            raise NotLinear("a view of channels beside tokens")
        own += before[first:i] if varies else [1] * (i - first)
        shown += after[second:j] if varies else [1] * (j - second)
    return x.expand(own).reshape(shown)


def paired(channels: Sequence[frozenset[int]]) -> Pairs | None:
    """How keys are turned each of whose channels is made of the given ones of a cache; None, where none are mixed.

    Raises:
        NotLinear: not two by two.
    """
    if sum(map(len, channels)) == len(frozenset().union(*channels)) and all(len(of) < 2 for of in channels):
        return None
    parts: list[tuple[list[int], frozenset[int]]] = []  # channels of keys with some of the cache's in common, and these
    for channel, of in enumerate(channels):
        common = [part for part in parts if part[1] & of]
        parts = [part for part in parts if part not in common]
        parts.append(([*(c for part in common for c in part[0]), channel], of.union(*(part[1] for part in common))))
    alone = [(keys, sorted(made)) for keys, made in parts if len(keys) == 1]
    turned = [(sorted(keys), sorted(made)) for keys, made in parts if len(keys) > 1]
    pairs = all(len(keys) == 2 and len(made) <= 2 for keys, made in turned)
    if not pairs or len(alone) % 2 or any(len(made) > 1 for _, made in alone):
        raise NotLinear(MIXED)
    for (keys, made), (others, more) in zip(alone[::2], alone[1::2]):  # two that have nothing in common
        turned.append(([*keys, *others], [*made, *more] if made else [-1, *more]))
    turned.sort()
    order = tuple(channel for keys, _ in turned for channel in keys)
    return Pairs(order, tuple(sorted(made[0] for _, made in turned if made and made[0] >= 0)))
