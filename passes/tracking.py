"""Follows cache contents through a graph: who holds which tokens, what writes them, and what attention reads.

One walk in program order. A `Holder` is a storage whose content along the token axis is known: a cache that enters the
graph, or a copy (`contiguous`, `to`, `clone`, `cat`) of parts of one. Views need no rules of their own:
`geometry.locate` reads their position off the fake tensors' metadata. What the walk sees is recorded as actions;
nothing is changed here.

The way caches are written and read falls out of the contents: tokens that the graph itself has written are `Fresh`,
all others are `Cached`, however the model spells it (slice write and slice read, concatenation, clone and edit, …).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..geometry import Window, locate, same
from ..packed import PackedKV
from .actions import Append, Attend, Fill, Holder, Move, Read, Rejection, Tracking
from .attention_forms import AttentionCall, as_attention
from .nodes import CONCATENATIONS, as_write, copied, example, identity, is_dense, mutates, name_of, offset
from .roles import Roles
from .segments import Cached, Fresh, Segment, UnknownPosition, cut, equal, overlap, overwrite, shift


class Unsupported(Exception):
    """Something about a cache that cannot be followed; the message says what and why."""


_CANNOT_FOLLOW = (Unsupported, UnknownPosition, GuardOnDataDependentSymNode)


def _reason(error: Exception) -> str:
    return (
        "a position is not known before the data is" if isinstance(error, GuardOnDataDependentSymNode) else str(error)
    )


class Tracker:
    """The walk. `owners` gives, per placeholder that is a slice of a larger cache, that cache's shape and strides."""

    def __init__(self, graph: torch.fx.Graph, owners: dict[Node, Tensor] | None = None) -> None:
        self.graph = graph
        self.time = 0
        self.holders: dict[int, Holder] = {}
        self.result = Tracking([], [], [], [], [], [])
        self.roles = Roles(graph)
        for node in graph.find_nodes(op="placeholder"):
            self._add_cache(node, (owners or {}).get(node))

    def run(self) -> Tracking:
        for time, node in enumerate(self.graph.nodes):
            self.time = time
            if node.op in ("placeholder", "get_attr"):
                continue
            try:
                self._visit(node)
            except _CANNOT_FOLLOW as error:
                reason = _reason(error)
                for holder in self._held_arguments(node):
                    holder.cache.blockers.append(reason)
        return self.result

    # ---- holders ----

    def _add_cache(self, node: Node, owner: Tensor | None) -> None:
        value = example(node)
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            return
        if isinstance(value, PackedKV):
            store = value._store
            holder = Holder(node, store.shape, store.strides, value.dtype, 2, None, packed=True)
        else:
            shaped = value if owner is None else owner
            if shaped.dim() != 4 or (owner is None and not is_dense(value)):
                return
            token_axis = self.roles.axes.get(node)
            if token_axis is not None and owner is not None:
                window = locate(value.size(), value.stride(), offset(value), owner.shape, owner.stride())
                token_axis = None if window is None else window.axes[token_axis]
            if token_axis is None:
                return  # an ordinary input
            holder = Holder(node, tuple(shaped.shape), shaped.stride(), value.dtype, token_axis, None)
        holder.segments = [Segment(0, holder.shape[holder.token_axis], Cached(node, 0, -1))]
        self.holders[identity(value)] = holder
        self.result.caches.append(holder)

    def _holder(self, node: Any) -> Holder | None:
        value = example(node) if isinstance(node, Node) else None
        return self.holders.get(identity(value)) if isinstance(value, Tensor) else None

    def _held_arguments(self, node: Node) -> Iterator[Holder]:
        for argument in node.all_input_nodes:
            holder = self._holder(argument)
            if holder is not None:
                yield holder

    def _content(self, value: Tensor, holder: Holder) -> tuple[Window, list[Segment]]:
        """The window that a view shows of a holder, and what it holds, counted from its own first token."""
        window = locate(value.size(), value.stride(), offset(value), holder.shape, holder.strides)
        if window is None:
            raise Unsupported(f"the view of size {tuple(value.shape)} has steps or merged dimensions")
        axis = holder.token_axis
        for other in range(len(holder.shape)):
            if other != axis and not window.covers(holder.shape, other):
                raise Unsupported("only some of its batch entries, heads or channels are used")
        start = window.starts[axis]
        segments = shift(cut(holder.segments, start, start + window.lengths[axis]), -start)
        if holder.root is None:
            segments = [
                Segment(s.start, s.stop, Cached(s.content.cache, s.content.first, self.time))
                if isinstance(s.content, Cached) else s
                for s in segments
            ]  # fmt: skip
        return window, [Segment(s.start, s.stop, _renamed(s.content, window.axes)) for s in segments]

    # ---- nodes ----

    def _visit(self, node: Node) -> None:
        if (call := as_attention(node)) is not None:
            self._attention(call)
        elif node.op == "output":
            for argument in node.all_input_nodes:
                self._read(node, argument)
        elif (write := as_write(node)) is not None:
            self._write(node, *write)
        elif self._is_view(node):
            pass
        elif not self._copy(node):
            for argument in node.all_input_nodes:
                self._read(node, argument)

    def _is_view(self, node: Node) -> bool:
        """A result that shares memory with a holder is a view, or the work of an in-place operation we do not know."""
        value = example(node)
        holder = self._holder(node)
        if holder is None or not isinstance(value, Tensor):
            return isinstance(value, (list, tuple)) and any(
                isinstance(v, Tensor) and identity(v) in self.holders for v in value
            )
        if any(mutates(node, argument) for argument in node.all_input_nodes):
            raise Unsupported(f"`{name_of(node)}` changes it in place")
        return True

    def _read(self, consumer: Node, argument: Node) -> None:
        holder, value = self._holder(argument), example(argument)
        if holder is None or holder.root is not None:
            return
        if mutates(consumer, argument):
            raise Unsupported(f"`{name_of(consumer)}` changes it in place")
        window, segments = self._content(value, holder)
        self.result.reads.append(Read(consumer, argument, holder, window, segments))

    def _copy(self, node: Node) -> bool:
        """Record a copy of a holder's content as a holder of its own; False where the node is no such copy."""
        value = example(node)
        if not isinstance(value, Tensor):
            return False
        concatenated = node.target in CONCATENATIONS
        parts = copied(node)
        source = next((h for p in parts if (h := self._holder(p)) is not None), None)
        if source is None or value.dim() != example(parts[0]).dim() or value.device != example(parts[0]).device:
            return False
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) if concatenated else None
        segments: list[Segment] = []
        token_axis, root_axes, length = 0, None, 0
        for part in parts:
            holder, shown = self._holder(part), example(part)
            if holder is None:
                axes = tuple(range(shown.dim()))
                n = shown.shape[dim]
                segments.append(Segment(length, length + n, Fresh(part, axes, 0)))
            else:
                window, content = self._content(shown, holder)
                token_axis = window.axes.index(holder.token_axis)
                if concatenated and token_axis != dim % shown.dim():
                    return False
                if holder.root is None:
                    root_axes = root_axes or window.axes
                else:
                    root_axes = root_axes or tuple(None if a is None else holder.root_axes[a] for a in window.axes)
                segments += shift(content, length)
                n = shown.shape[token_axis]
                if holder.root is None:
                    self.result.reads.append(Read(node, part, holder, window, content))
            length = length + n
        copy = Holder(
            node, tuple(value.shape), value.stride(), value.dtype, token_axis, source.cache, root_axes or (), segments
        )
        self.holders[identity(value)] = copy
        self.result.copies.append(copy)
        return True

    def _write(self, node: Node, target: Tensor, base: Node, value: Any) -> None:
        holder = self.holders.get(identity(target))
        if holder is None:
            if isinstance(value, Node):
                self._read(node, value)
            return
        window = locate(target.size(), target.stride(), offset(target), holder.shape, holder.strides)
        axis = holder.token_axis
        if window is None:
            raise Unsupported("it is written in a way that has no packed form")
        if not all(window.covers(holder.shape, a) for a in range(len(holder.shape)) if a != axis):
            raise Unsupported("only some of its batch entries, heads or channels are written")
        start, stop = window.starts[axis], window.starts[axis] + window.lengths[axis]
        if not isinstance(value, Node):
            if holder.root is not None:
                raise Unsupported("a copy of it is edited with a number")
            self.result.writes.append(Fill(node, holder, start, stop, value))
            holder.writes.append((self.time, start, stop))
            return
        source = self._holder(value)
        content: Cached | Fresh = Fresh(value, window.axes, 0)
        if source is not None:
            _, segments = self._content(example(value), source)
            if holder.root is None and len(segments) == 1 and isinstance(segments[0].content, Cached):
                origin = segments[0].content
                if self.holders[identity(example(origin.cache))] is holder:
                    self._check_current(origin, segments[0].length)
                    self.result.writes.append(Move(node, holder, origin.first, start, segments[0].length))
                    content = Cached(holder.node, start, self.time)
                    holder.segments = overwrite(holder.segments, start, stop, content)
                    holder.writes.append((self.time, start, stop))
                    return
            self._read(node, value)
        if list(example(value).shape) != list(target.shape):
            raise Unsupported(f"a value of size {tuple(example(value).shape)} is broadcast into it")
        holder.segments = overwrite(holder.segments, start, stop, content)
        if holder.root is None:
            self.result.writes.append(Append(node, holder, start, stop, value, window.axes))
            holder.writes.append((self.time, start, stop))

    def _check_current(self, content: Cached, length: int) -> None:
        """Packed tokens are read where they are used: nothing may have been written to them since they were copied."""
        holder = self.holders[identity(example(content.cache))]
        for time, start, stop in holder.writes:
            if time > content.time and overlap((start, stop), (content.first, content.first + length)):
                raise Unsupported("tokens are overwritten between their being copied and used")

    def _attention(self, call: AttentionCall) -> None:
        holders = [self._holder(call.key), self._holder(call.value)]
        for other in (call.query, call.mask):
            if isinstance(other, Node):
                self._read(call.node, other)
        if holders[0] is None and holders[1] is None:
            return
        caches = [h.cache for h in holders if h is not None]
        try:
            self.result.attends.append(self._attend(call, *holders))
        except _CANNOT_FOLLOW as error:
            reason = _reason(error)
            self.result.rejections.append(Rejection(call.node, reason, caches))
            for argument in (call.key, call.value):
                self._read(call.node, argument)

    def _attend(self, call: AttentionCall, key_holder: Holder | None, value_holder: Holder | None) -> Attend:
        if key_holder is None or value_holder is None:
            raise Unsupported("only one of key and value comes from a cache")
        if key_holder.cache is value_holder.cache:
            raise Unsupported("key and value are the same cache")
        if call.dropout:
            raise Unsupported(f"dropout of {call.dropout}")
        if example(call.node).requires_grad:
            raise Unsupported("gradients are required of it")
        contents, axes = [], []
        for argument, holder in ((call.key, key_holder), (call.value, value_holder)):
            window, segments = self._content(example(argument), holder)
            if window.axes.index(holder.token_axis) != 2:
                raise Unsupported("tokens are not the third dimension of its keys and values")
            for segment in segments:
                if isinstance(segment.content, Cached):
                    self._check_current(segment.content, segment.length)
            contents.append([s for s in segments if not same(s.start, s.stop)])
            own = (
                window.axes
                if holder.root is None
                else [None if a is None else holder.root_axes[a] for a in window.axes]
            )
            if None in own:
                raise Unsupported("a dimension of its keys or values is none of the cache's")
            axes.append(tuple(a for a in own if a is not None))
        _check_alike(*contents)
        kinds = [isinstance(s.content, Fresh) for s in contents[0]]
        if call.mask is not None and kinds != sorted(kinds):
            raise Unsupported("a mask, and cached tokens that follow the current chunk")
        return Attend(call, contents[0], contents[1], key_holder.cache, value_holder.cache, axes[0], axes[1])


def _renamed(content: Cached | Fresh, axes: tuple[int | None, ...]) -> Cached | Fresh:
    """Fresh values with their dimensions named after the dimensions of a view with these `axes`."""
    if isinstance(content, Cached):
        return content
    names = {axis: i for i, axis in enumerate(axes) if axis is not None}
    return Fresh(content.node, tuple(None if a is None else names.get(a) for a in content.axes), content.first)


def _check_alike(key: list[Segment], value: list[Segment]) -> None:
    """Keys and values must be split into cached and current tokens at the same places."""
    alike = len(key) == len(value) and all(
        type(k.content) is type(v.content)
        and equal(k.length, v.length)
        and (isinstance(k.content, Fresh) or equal(k.content.first, v.content.first))
        for k, v in zip(key, value)
    )
    if not alike:
        raise Unsupported("keys and values hold different ranges of cached tokens")
