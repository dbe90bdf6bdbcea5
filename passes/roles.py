"""Which dimension of a plain cache tensor runs along tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..compat import is_wrapped
from ..geometry import Window, locate, same
from ..packed import PackedKV
from .attention_forms import as_attention, sdpa_call
from .nodes import CONCATENATIONS, as_write, copied, example, identity, joined_along, name_of

_PROJECTIONS = {"linear", "bilinear", "embedding", "conv1d", "conv2d", "conv3d"}
ARITHMETIC = {"mul", "add", "sub", "div", "truediv", "addcmul", "lerp", "where", "mul_", "add_", "sub_"}


class Roles:
    """Which dimension of each plain input runs along tokens, from how the graph uses it.

    Followed backwards from the third dimension of attention's keys and values, through views, copies and
    concatenations. An input that no attention of this graph reads is told by its being written in slices; with
    `of_copies`, also by its being concatenated, or copied and written in slices, as what other graphs attend to is.
    """

    def __init__(self, graph: torch.fx.Graph, of_copies: bool = False) -> None:
        self.first: dict[int, Node] = {}  # storage -> the node that first holds it
        self.axes: dict[Node, int] = {}  # by input
        self.channels: dict[Node, int] = {}  # by input that attention reads as it is: the dimension along channels
        self.followed: set[Node] = set()
        written: dict[Node, set[int]] = {}
        for node in graph.nodes:
            if isinstance(value := example(node), Tensor):
                self.first.setdefault(identity(value), node)
            write = as_write(node)
            if write is not None and (base := self.first.get(identity(write.target))) is not None:
                window = self._locate(write.target, base)
                shape = example(base).shape
                partial = {a for a in range(len(shape)) if window is not None and not window.covers(shape, a)}
                if window is not None and len(shape) > 4 and partial.intersection(window.axes):
                    partial.intersection_update(window.axes)  # others are selected: those of a layer, keys or values
                if window is not None and write.positions is not None and window.axes[write.dim] is not None:
                    partial = {window.axes[write.dim]}  # type: ignore[arg-type]
                written.setdefault(base, set()).update(partial)
        for node in graph.nodes:
            if (call := as_attention(node)) is not None:
                self._follow(call.key, 2, 3)
                self._follow(call.value, 2, 3)
        for base, partial in written.items():
            if example(base).dim() == 5 or len(partial) > 1:  # keys and values, or batch entries
                partial.discard(0)
            if len(partial) == 1:
                axis = partial.pop()
                self.axes.setdefault(base, axis)
                if of_copies:
                    self._follow(base, axis)
        for node in graph.nodes if of_copies else ():
            if node.target in CONCATENATIONS and (dim := joined_along(node)) is not None:
                for part in copied(node):
                    self._follow(part, dim)

    def input_of(self, node: Node) -> Node | None:
        """The input whose memory a node shows or copies, where it is a single one."""
        base = self.first[identity(example(node))]
        while base.op != "placeholder":
            parts = copied(base)
            if len(parts) != 1:
                return None
            base = self.first[identity(example(parts[0]))]
        return base

    def _follow(self, node: Any, dim: int, channel: int | None = None) -> None:
        value = example(node)
        if not isinstance(value, Tensor) or isinstance(value, PackedKV) or dim >= value.dim():
            return
        base = self.first[identity(value)]
        window = self._locate(value, base)
        if window is None:  # a view that is no box: go on where it was made
            if isinstance(node, Node) and node is not base:
                self._follow_arguments(node, dim)
            return
        if (axis := window.axes[dim]) is None:
            return
        channel = None if channel is None or channel >= value.dim() else window.axes[channel]
        if base.op == "placeholder":
            if channel is not None:
                self.channels.setdefault(base, channel)
            shape = example(base).shape
            left = [a for a in range(len(shape)) if not window.covers(shape, a) and (a or len(shape) < 5)]
            left = [axis] if len(shape) > 5 else left  # of which several are selected
            self.axes.setdefault(base, left[0] if same(value.shape[dim], 1) and len(left) == 1 else axis)
        elif parts := copied(base):
            for part in parts:
                self._follow(part, axis, channel)
        else:
            self._follow_arguments(base, axis)

    def _follow_arguments(self, node: Node, dim: int) -> None:
        """Through an operation that is not known: its arguments' dimensions are told by their sizes.

        The dimension's own size and those after it, or before it, must be the result's (rotary embeddings change what
        comes after tokens, repeated heads or batches what comes before). Not through projections: what they are made
        from are hidden states.
        """
        if node in self.followed or projects(node):
            return
        self.followed.add(node)
        result = example(node)
        shape = result.shape
        for argument in node.all_input_nodes:
            value = example(argument)
            if not isinstance(value, Tensor):
                continue
            if identity(value) == identity(result):  # a view: a dimension keeps its step
                step = result.stride(dim)
                kept = [d for d, n in enumerate(value.shape) if same(n, shape[dim]) and same(value.stride(d), step)]
                if len(kept) == 1:
                    self._follow(argument, kept[0])
                continue
            if name_of(node) in ARITHMETIC:  # what is broadcast (tables of angles, scales) is no cache
                if alike(value.shape, shape):
                    self._follow(argument, dim)
                continue
            own = dim + value.dim() - len(shape)
            after = own >= 0 and alike(value.shape[own:], shape[dim:])
            before = value.dim() > dim and alike(value.shape[: dim + 1], shape[: dim + 1])
            within = value.dim() == len(shape) and same(value.shape[dim], shape[dim])
            if after or before or within:
                self._follow(argument, own if after else dim)

    def _locate(self, value: Tensor, base: Node) -> Window | None:
        whole = example(base)
        if isinstance(whole, PackedKV) or is_wrapped(value):
            return None
        return locate(
            value.size(), value.stride(), value.storage_offset() - whole.storage_offset(), whole.shape, whole.stride()
        )


def projects(node: Node) -> bool:
    """Whether a node is a layer's: attention, or the product with a matrix of weights."""
    if as_attention(node) is not None or sdpa_call(node) is not None or name_of(node) in _PROJECTIONS:
        return True
    weights = any(isinstance(v := example(a), nn.Parameter) and v.dim() > 1 for a in node.all_input_nodes)
    return weights and name_of(node) not in ARITHMETIC


def alike(a: Sequence[int], b: Sequence[int]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
