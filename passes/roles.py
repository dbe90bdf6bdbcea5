"""Which dimension of a plain cache tensor runs along tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..geometry import Window, locate, same
from ..packed import PackedKV
from .attention_forms import as_attention
from .nodes import as_write, copied, example, identity


class Roles:
    """Which dimension of each plain input runs along tokens, from how the graph uses it.

    Followed backwards from the third dimension of attention's keys and values, through views, copies and
    concatenations. An input that no attention of this graph reads is told by its being written in slices.
    """

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.first: dict[int, Node] = {}  # storage -> the node that first holds it
        self.axes: dict[Node, int] = {}  # by input
        written: dict[Node, set[int]] = {}
        for node in graph.nodes:
            if isinstance(value := example(node), Tensor):
                self.first.setdefault(identity(value), node)
            write = as_write(node)
            if write is not None and (base := self.first.get(identity(write[0]))) is not None:
                window = self._locate(write[0], base)
                shape = example(base).shape
                partial = {a for a in range(len(shape)) if window is not None and not window.covers(shape, a)}
                written.setdefault(base, set()).update(partial)
        for node in graph.nodes:
            if (call := as_attention(node)) is not None:
                self._follow(call.key, 2)
                self._follow(call.value, 2)
        for base, partial in written.items():
            if len(partial) == 1:
                self.axes.setdefault(base, partial.pop())

    def _follow(self, node: Any, dim: int) -> None:
        value = example(node)
        if not isinstance(value, Tensor) or isinstance(value, PackedKV) or dim >= value.dim():
            return
        base = self.first[identity(value)]
        window = self._locate(value, base)
        if window is None or (axis := window.axes[dim]) is None:
            return
        if base.op == "placeholder":
            shape = example(base).shape
            left = [a for a in range(len(shape)) if not window.covers(shape, a)]
            self.axes.setdefault(base, left[0] if same(value.shape[dim], 1) and len(left) == 1 else axis)
        else:
            for part in copied(base):
                self._follow(part, axis)

    def _locate(self, value: Tensor, base: Node) -> Window | None:
        whole = example(base)
        if isinstance(whole, PackedKV):
            return None
        return locate(
            value.size(), value.stride(), value.storage_offset() - whole.storage_offset(), whole.shape, whole.stride()
        )
