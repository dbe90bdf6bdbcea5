"""Follows cache contents through a graph: who holds which tokens, what writes them, and what attention reads.

One walk in program order. A `Holder` is a storage whose content along the token axis is known: a cache that enters the
graph, or a copy (`contiguous`, `to`, `clone`, `cat`) of parts of one. Views need no rules of their own:
`geometry.locate` reads their position off the fake tensors' metadata. What the walk sees is recorded as actions;
nothing is changed here.

The way caches are written and read falls out of the contents: tokens that the graph itself has written are `Fresh`,
all others are `Cached`, however the model spells it (slice write and slice read, concatenation, clone and edit, …).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..compat import is_wrapped
from ..geometry import Window, four_dimensional, locate, same
from ..packed import PackedKV
from .actions import Append, Attend, Dense, Fill, Holder, Move, Read, Rejection, Returned, Scatter, Tracking
from .attention_forms import AttentionCall, as_attention
from .nodes import (
    CONCATENATIONS,
    Write,
    as_write,
    copied,
    example,
    identity,
    is_dense,
    mutates,
    name_of,
    offset,
    repeated,
)
from .roles import Roles
from .segments import (
    Cached,
    Content,
    Fresh,
    Scattered,
    Segment,
    UnknownPosition,
    at_most,
    cut,
    equal,
    hint,
    overlap,
    overwrite,
    shift,
)
from .sources import hands_tokens_on


class Unsupported(Exception):
    """Something about a cache that cannot be followed; the message says what and why."""


CANNOT_FOLLOW = (Unsupported, UnknownPosition, GuardOnDataDependentSymNode)


def _reason(error: Exception) -> str:
    return (
        "a position is not known before the data is" if isinstance(error, GuardOnDataDependentSymNode) else str(error)
    )


class Tracker:
    """The walk. `owners` gives, per placeholder that is a slice of a larger cache, that cache's shape and strides."""

    def __init__(self, graph: torch.fx.Graph, owners: dict[Node, Tensor] | None = None) -> None:
        self.graph = graph
        self.time = 0
        self.holders: dict[int, list[Holder]] = {}  # by storage; several where it is parted
        self.plain: dict[Node, list[Holder]] = {}  # views of a holder that are no boxes of it: ordinary tensors
        self.computed: dict[int, list[Holder]] = {}  # by storage: the caches that a tensor's values come from
        self.result = Tracking([], [], [], [], [], [], [], [])
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
            except CANNOT_FOLLOW as error:
                for holder in {id(h): h for a in node.all_input_nodes for h in self._sources(a)}.values():
                    holder.blockers.append(_reason(error))
        return self.result

    # ---- holders ----

    def _add_cache(self, node: Node, owner: Tensor | None) -> None:
        value = example(node)
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            return
        if isinstance(value, PackedKV):
            store = value._store
            holder = Holder(node, store.shape, store.strides, value.dtype, 2, None, packed=True, roles=(0, 1, 2, 3))
            stacked = value.dim() == 5 and same(value.shape[0], 2)
            window = locate(value.size(), value.stride(), value.offset, store.shape, store.strides)
            if not stacked and window is not None and not window.covers(store.shape, 0):
                self._add_parts(holder, value, [(window.starts[0], window.lengths[0])])
                return
        else:
            shaped = value if owner is None else owner
            geometry = four_dimensional(shaped.shape, shaped.stride())
            if geometry is None or (owner is None and not is_dense(value)):
                return
            token_axis = self.roles.axes.get(node)
            if token_axis is not None and owner is not None and owner is not value:
                window = locate(value.size(), value.stride(), offset(value), owner.shape, owner.stride())
                token_axis = None if window is None else window.axes[token_axis]
            if token_axis is None or token_axis == shaped.dim() - 1:
                return  # an ordinary input
            token_axis += 4 - shaped.dim()
            batch, head = (axis for axis in range(3) if axis != token_axis)
            holder = Holder(node, *geometry, value.dtype, token_axis, None, roles=(batch, head, token_axis, 3))
            stacked = shaped.dim() == 5 and same(shaped.shape[0], 2)
        if stacked:  # keys and values
            half = holder.shape[0] // 2
            self._add_parts(holder, value, [(0, half), (half, half)])
        else:
            self._add(holder, value)

    def _add_parts(self, whole: Holder, value: Tensor, parts: list[tuple[int, int]]) -> None:
        for first, length in parts:
            shape = (length, *whole.shape[1:])
            part = replace(whole, shape=shape, part=(first, length), offset=first * whole.strides[0], blockers=[])
            part.segments, part.writes = [], []
            self._add(part, value)

    def _add(self, holder: Holder, value: Tensor) -> None:
        holder.segments = [Segment(0, holder.shape[holder.token_axis], Cached(holder, 0, -1))]
        self.holders.setdefault(identity(value), []).append(holder)
        self.result.caches.append(holder)

    def _of(self, value: Tensor) -> Holder | None:
        """The holder whose memory a tensor lies in; None where it lies in none, or in several parts of one."""
        holders = self.holders.get(identity(value), [])
        if len(holders) < 2:
            return holders[0] if holders else None
        begins = hint(offset(value))
        own = [h for h in holders if h.offset <= begins < h.offset + h.shape[0] * h.strides[0]]
        return next((h for h in own if _locate_in(value, h) is not None), None)

    def _holder(self, node: Any) -> Holder | None:
        """Whose box a tensor is a view of."""
        value = example(node) if isinstance(node, Node) and node not in self.plain else None
        return self._of(value) if isinstance(value, Tensor) else None

    def _sources(self, node: Any) -> list[Holder]:
        """The caches that a node's values come from, by whatever way."""
        if node in self.plain:
            return self.plain[node]
        sources: list[Holder] = []
        for value in _tensors(example(node)):
            holders = self.holders.get(identity(value), [])
            own = self._of(value)
            for holder in holders if own is None else [own]:
                held = [s.content.cache for s in holder.segments if not isinstance(s.content, Fresh)]
                sources += [c for c in held or [holder.cache] if c not in sources]
            sources += self.computed.get(identity(value), [])
        return sources

    def _inputs_sources(self, node: Node) -> list[Holder]:
        return list({id(h): h for argument in node.all_input_nodes for h in self._sources(argument)}.values())

    def _window(self, value: Tensor, holder: Holder) -> tuple[Window, list[Segment]]:
        """The box that a view shows of a holder, and the tokens it holds, counted from its own first one."""
        window = _locate_in(value, holder)
        if window is None:
            raise Unsupported(f"the view of size {tuple(value.shape)} has steps or merged dimensions")
        axis = holder.token_axis
        start = window.starts[axis]
        segments = shift(cut(holder.segments, start, start + window.lengths[axis]), -start)
        if holder.root is None:
            segments = [
                Segment(s.start, s.stop, replace(s.content, time=self.time)) if isinstance(s.content, Cached) else s
                for s in segments
            ]
        return window, [Segment(s.start, s.stop, _renamed(s.content, window.axes)) for s in segments]

    def _content(self, value: Tensor, holder: Holder) -> tuple[Window, list[Segment]]:
        """As `_window`, of a view that shows whole tokens."""
        window, segments = self._window(value, holder)
        for other in range(len(holder.shape)):
            if other != holder.token_axis and not window.covers(holder.shape, other):
                raise Unsupported("only some of its batch entries, heads or channels are used")
        return window, segments

    # ---- nodes ----

    def _visit(self, node: Node) -> None:
        if (call := as_attention(node)) is not None:
            self._attention(call)
        elif node.op == "output":
            for argument in node.all_input_nodes:
                if not self._returned(argument):
                    self._read(node, argument)
        elif (write := as_write(node)) is not None:
            self._write(node, write)
        elif not self._is_view(node) and not self._copy(node):
            self._compute(node)

    def _is_view(self, node: Node) -> bool:
        """Whether a node shows memory of a holder. Where it is no box of it, it is an ordinary tensor from here on."""
        shown = [v for v in _tensors(example(node)) if identity(v) in self.holders]
        if not shown:
            return False
        for argument in node.all_input_nodes:
            if mutates(node, argument):
                raise Unsupported(f"`{name_of(node)}` changes it in place")
        boxes = all(self._is_box(v) for v in shown)
        if not boxes or any(argument in self.plain for argument in node.all_input_nodes):
            self.plain[node] = self._inputs_sources(node)
            for argument in node.all_input_nodes:
                self._read(node, argument)
        return True

    def _is_box(self, value: Tensor) -> bool:
        holder = self._of(value)
        return holder is not None and _locate_in(value, holder) is not None

    def _compute(self, node: Node) -> None:
        """Anything else: it reads its arguments as ordinary tensors."""
        sources = self._inputs_sources(node) if hands_tokens_on(node) else []
        for argument in node.all_input_nodes:
            self._read(node, argument)
        for value in _tensors(example(node)) if sources else ():
            self._derive(value, sources)

    def _derive(self, value: Tensor, sources: list[Holder]) -> None:
        known = self.computed.setdefault(identity(value), [])
        known += [h for h in sources if h not in known]

    def _read(self, consumer: Node, argument: Node) -> None:
        if mutates(consumer, argument) and self._sources(argument):
            value = example(argument)
            if isinstance(value, Tensor) and identity(value) in self.holders:
                raise Unsupported(f"`{name_of(consumer)}` changes it in place")
        holder, value = self._holder(argument), example(argument)
        if holder is None or holder.root is not None:
            return
        window, segments = self._window(value, holder)
        self.result.reads.append(Read(consumer, argument, holder, window, segments))

    def _returned(self, argument: Node) -> bool:
        """Record an output that is a copy of cached tokens, and after them tokens of the graph."""
        copy = self._holder(argument)
        if copy is None or copy.root is None or copy.repeats != 1 or None in copy.root_axes:
            return False
        kinds = [isinstance(s.content, Fresh) for s in copy.segments if not same(s.start, s.stop)]
        if not kinds or all(kinds) or kinds != sorted(kinds):
            return False
        for segment in copy.segments:
            content = segment.content
            if isinstance(content, Scattered) or (isinstance(content, Cached) and content.cache is not copy.root):
                return False
        attended = {c for a in self.result.attends for c in (a.key_cache, a.value_cache)}
        attended |= {c for d in self.result.dense for c in d.caches}
        fresh = [s.content.node for s in copy.segments if isinstance(s.content, Fresh)]
        mirrors = any(isinstance(w, Append) and w.holder is copy.root and w.value in fresh for w in self.result.writes)
        grows = any(kinds) and copy.root in attended
        self.result.returned.append(Returned(argument, copy, grows, mirrors and not grows))
        return True

    def _copy(self, node: Node) -> bool:
        """Record a copy of a holder's content as a holder of its own; False where the node is no such copy."""
        value = example(node)
        if not isinstance(value, Tensor):
            return False
        try:
            copy = self._repeated(node) or self._rolled(node) or self._concatenated(node)
        except CANNOT_FOLLOW:
            return False  # it reads something else than whole tokens
        if copy is None:
            return False
        for argument in node.all_input_nodes:
            holder = self._holder(argument)
            if holder is not None and holder.root is None:
                self._read(node, argument)
        self.holders[identity(value)] = [copy]
        self.result.copies.append(copy)
        return True

    def _rolled(self, node: Node) -> Holder | None:
        """`roll` along tokens."""
        if name_of(node) != "roll" or (source := self._holder(node.args[0])) is None:
            return None
        arguments = {**dict(zip(("shifts", "dims"), node.args[1:])), **node.kwargs}
        shift_by, dims = (x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x for x in arguments.values())
        value = example(node)
        window, segments = self._content(example(node.args[0]), source)
        token_axis = window.axes.index(source.token_axis)
        if not isinstance(dims, int) or not isinstance(shift_by, int) or dims % value.dim() != token_axis:
            return None
        tokens = value.shape[token_axis]
        split = -shift_by if shift_by < 0 else tokens - shift_by
        rolled = shift(cut(segments, split, tokens), -split) + shift(cut(segments, 0, split), tokens - split)
        return self._copy_of(node, source, window, token_axis, rolled)

    def _repeated(self, node: Node) -> Holder | None:
        """A copy in which each head stands several times, as grouped queries have it."""
        if (found := repeated(node)) is None:
            return None
        shown, _, dim, times = found
        source = self._of(shown)
        if source is None:
            return None
        window, segments = self._content(shown, source)
        token_axis = window.axes.index(source.token_axis)
        if token_axis != 2 or dim != 1 or source.repeats != 1:
            return None
        copy = self._copy_of(node, source, window, token_axis, segments)
        copy.repeats = times
        return copy

    def _concatenated(self, node: Node) -> Holder | None:
        """`cat` along tokens, or a plain copy."""
        value, parts = example(node), copied(node)
        source = next((h for p in parts if (h := self._holder(p)) is not None), None)
        if source is None or value.dim() != example(parts[0]).dim() or value.device != example(parts[0]).device:
            return None
        concatenated = node.target in CONCATENATIONS
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) if concatenated else None
        segments: list[Segment] = []
        first_window, token_axis, length = None, 0, 0
        for part in parts:
            holder, shown = self._holder(part), example(part)
            if holder is None:
                if self._sources(part):
                    raise Unsupported("cached tokens that have been changed")
                axes = tuple(range(shown.dim()))
                n = shown.shape[dim]
                segments.append(Segment(length, length + n, Fresh(part, axes, 0)))
            else:
                window, content = self._content(shown, holder)
                token_axis = window.axes.index(holder.token_axis)
                if concatenated and token_axis != dim % shown.dim():
                    return None
                if holder.repeats != source.repeats:
                    return None
                first_window = first_window or window
                segments += shift(content, length)
                n = shown.shape[token_axis]
            length = length + n
        if source.repeats != 1 and any(h is None for h in map(self._holder, parts)):
            return None
        assert first_window is not None
        copy = self._copy_of(node, source, first_window, token_axis, segments)
        copy.repeats = source.repeats
        return copy

    def _copy_of(self, node: Node, source: Holder, window: Window, token_axis: int, segments: list[Segment]) -> Holder:
        value, axes = example(node), window.axes
        if source.root is not None:
            axes = tuple(None if a is None else source.root_axes[a] for a in axes)
        shape, strides = tuple(value.shape), value.stride()
        return Holder(node, shape, strides, value.dtype, token_axis, source.cache, axes, segments)

    def _write(self, node: Node, write: Write) -> None:
        holder, value = self._of(write.target), write.value
        if holder is None and identity(write.target) in self.holders:
            raise Unsupported("its keys and values are written together")
        if holder is None:
            if isinstance(value, Node):
                sources = self._sources(value)
                self._read(node, value)
                if sources:
                    self._derive(write.target, sources)
            return
        target = write.target
        window, axis = _locate_in(target, holder), holder.token_axis
        if window is None:
            raise Unsupported("it is written in a way that has no packed form")
        if not all(window.covers(holder.shape, a) for a in range(len(holder.shape)) if a != axis):
            raise Unsupported("only some of its batch entries, heads or channels are written")
        if write.positions is not None:
            self._scatter(node, holder, window, write)
            return
        start, stop = window.starts[axis], window.starts[axis] + window.lengths[axis]
        if not isinstance(value, Node):
            if holder.root is not None:
                raise Unsupported("a copy of it is edited with a number")
            self.result.writes.append(Fill(node, holder, start, stop, value))
            holder.writes.append((self.time, start, stop))
            return
        if list(example(value).shape) != list(target.shape):
            raise Unsupported(f"a value of size {tuple(example(value).shape)} is broadcast into it")
        if self._moved(node, holder, value, start, stop):
            return
        if self._sources(value):
            self._read(node, value)
        holder.segments = overwrite(holder.segments, start, stop, Fresh(value, window.axes, 0))
        if holder.root is None:
            self.result.writes.append(Append(node, holder, start, stop, value, window.axes))
            holder.writes.append((self.time, start, stop))

    def _moved(self, node: Node, holder: Holder, value: Node, start: int, stop: int) -> bool:
        """A write of what the cache itself held: packed data is moved, and only what is new is quantized."""
        source = self._holder(value)
        if source is None or holder.root is not None or source.repeats != 1:
            return False
        window, segments = self._content(example(value), source)
        segments = [s for s in segments if not same(s.start, s.stop)]
        moves, fresh = [], []
        for s in segments:
            if isinstance(s.content, Cached) and s.content.cache is holder:
                self._check_current(s.content, s.length)
                moves.append(Move(node, holder, s.content.first, start + s.start, s.length))
            elif isinstance(s.content, Fresh):
                fresh.append((start + s.start, start + s.stop, s.content))
            else:
                return False
        if not moves or (len(moves) > 1 and not all(at_most(m.destination, m.source) for m in moves)):
            return False
        view = tuple(window.axes)  # dimensions of `value`, named after those of its own holder
        for move in moves:
            self.result.writes.append(move)
            content: Content = Cached(holder, move.destination, self.time)
            holder.segments = overwrite(holder.segments, move.destination, move.destination + move.length, content)
            holder.writes.append((self.time, move.destination, move.destination + move.length))
        for first, last, part in fresh:
            # `part` names its dimensions after those of `value`; the cache's own follow from where both have tokens.
            named = Fresh(part.node, self._names_in(holder, source, part.axes, view), part.first)
            self.result.writes.append(Append(node, holder, first, last, part.node, named.axes, part.first))
            holder.segments = overwrite(holder.segments, first, last, named)
            holder.writes.append((self.time, first, last))
        if source is not holder and window.covers(source.shape, source.token_axis):
            source.segments = [  # what it was copied from is gone, but the cache now holds the same
                replace(s, content=Cached(holder, start + s.start, self.time)) if isinstance(s.content, Cached) else s
                for s in source.segments
            ]
        return True

    def _names_in(
        self, holder: Holder, source: Holder, axes: tuple[int | None, ...], view: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        """The cache's axis for each dimension of a part of a copy, told as dimensions of a view of that copy."""
        names = source.root_axes if source.root is not None else tuple(range(len(source.shape)))
        return tuple(None if a is None or view[a] is None else names[view[a]] for a in axes)  # type: ignore[index]

    def _scatter(self, node: Node, holder: Holder, window: Window, write: Write) -> None:
        """A write to places that a tensor holds."""
        assert write.positions is not None
        whole = window.covers(holder.shape, holder.token_axis)
        if holder.root is not None or not whole or window.axes[write.dim] != holder.token_axis:
            raise Unsupported("it is written at places that a tensor holds, other than tokens of the whole cache")
        if any(not isinstance(s.content, Cached) for s in holder.segments):
            raise Unsupported("it is written twice, at places that a tensor holds")
        if not isinstance(write.value, Node) or example(write.value).dim() != 4:
            raise Unsupported("a value is broadcast to places that a tensor holds")
        if self._sources(write.value):
            self._read(node, write.value)
        tokens = holder.shape[holder.token_axis]
        content = Scattered(holder, 0, self.time, write.positions, Fresh(write.value, window.axes, 0))
        holder.segments = [Segment(0, tokens, content)]
        holder.scattered = True
        holder.writes.append((self.time, 0, tokens))
        self.result.writes.append(Scatter(node, holder, write.positions, write.value, window.axes))

    def _check_current(self, content: Cached, length: int) -> None:
        """Packed tokens are read where they are used: nothing may have been written to them since they were copied."""
        for time, start, stop in content.cache.writes:
            if time > content.time and overlap((start, stop), (content.first, content.first + length)):
                raise Unsupported("tokens are overwritten between their being copied and used")

    # ---- attention ----

    def _attention(self, call: AttentionCall) -> None:
        for other in (call.query, call.mask, *(call.others or ())):
            if isinstance(other, Node):
                self._read(call.node, other)
        sources = [self._sources(call.key), self._sources(call.value)]
        if not any(sources):
            return
        caches = list({id(h): h for part in sources for h in part}.values())
        reason, lowered = self._unfit(call, sources), False
        if reason is None:
            try:
                self.result.attends.append(self._attend(call))
                lowered = True
            except CANNOT_FOLLOW as error:
                dense = Dense(call, *sources, self._gathers(call.key), _reason(error))
                self.result.dense.append(dense)
        else:
            self.result.rejections.append(Rejection(call.node, reason, caches))
        if not lowered:
            for argument in (call.key, call.value):
                self._read(call.node, argument)

    def _unfit(self, call: AttentionCall, sources: list[list[Holder]]) -> str | None:
        """Why an attention that reads caches must stay as it is."""
        if not all(sources):
            return "only one of key and value comes from a cache"
        if call.dropout:
            return f"dropout of {call.dropout}"
        return "gradients are required of it" if example(call.node).requires_grad else None

    def _gathers(self, key: Node) -> bool:
        """Whether keys of this graph stand beside cached ones."""
        holder = self._holder(key)
        if holder is not None and any(isinstance(s.content, Fresh) for s in holder.segments):
            return True
        seen, left = set(), [key]
        while left:
            node = left.pop()
            if node in seen or not self._sources(node):
                continue
            seen.add(node)
            if node.target in CONCATENATIONS and not all(self._sources(p) for p in node.all_input_nodes):
                return True
            left += node.all_input_nodes
        return False

    def _attend(self, call: AttentionCall) -> Attend:
        if call.others is not None:
            raise Unsupported("flex_attention keeps its own scores")
        key_holder, value_holder = self._holder(call.key), self._holder(call.value)
        if key_holder is None or value_holder is None:
            what = call.key if key_holder is None else call.value
            raise Unsupported(f"`{name_of(what)}` stands between cache and attention")
        if key_holder.cache is value_holder.cache:
            raise Unsupported("keys and values lie in one cache")
        if key_holder.repeats != value_holder.repeats:
            raise Unsupported("keys and values are repeated differently")
        contents, axes = [], []
        for argument, holder in ((call.key, key_holder), (call.value, value_holder)):
            window, segments = self._content(example(argument), holder)
            if window.axes.index(holder.token_axis) != 2:
                raise Unsupported("tokens are not the third dimension of its keys and values")
            segments = [s for s in segments if not same(s.start, s.stop)]
            for segment in segments:
                content = segment.content
                if isinstance(content, Cached):
                    self._check_current(content, segment.length)
                if not isinstance(content, Fresh) and content.cache is not holder.cache:
                    raise Unsupported("tokens of several caches are attended together")
            if any(isinstance(s.content, Scattered) for s in segments):
                self._check_scattered(call, segments, holder)
            contents.append(segments)
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

    def _check_scattered(self, call: AttentionCall, segments: list[Segment], holder: Holder) -> None:
        """Columns of the mask are taken by the positions: it must have them all, in the cache's order."""
        tokens = holder.cache.shape[holder.cache.token_axis]
        if len(segments) != 1 or not same(segments[0].length, tokens):
            raise Unsupported("part of a cache is attended that is written at places that a tensor holds")
        if call.mask is not None and not same(example(call.mask).shape[-1], tokens):
            raise Unsupported("a mask of one column for all keys")


def _locate_in(value: Tensor, holder: Holder) -> Window | None:
    if is_wrapped(value):  # its sizes lack a dimension
        return None
    return locate(value.size(), value.stride(), offset(value) - holder.offset, holder.shape, holder.strides)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a result: itself, or the elements of a tuple."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in values if isinstance(v, Tensor)]


def _renamed(content: Content, axes: tuple[int | None, ...]) -> Content:
    """Fresh values with their dimensions named after the dimensions of a view with these `axes`."""
    if isinstance(content, Cached):
        return content
    if isinstance(content, Scattered):
        return replace(content, value=_renamed(content.value, axes))
    names = {axis: i for i, axis in enumerate(axes) if axis is not None}
    return Fresh(content.node, tuple(None if a is None else names.get(a) for a in content.axes), content.first)


def _check_alike(key: list[Segment], value: list[Segment]) -> None:
    """Keys and values must be split into cached and current tokens at the same places."""
    alike = len(key) == len(value) and all(
        type(k.content) is type(v.content)
        and equal(k.length, v.length)
        and (isinstance(k.content, Fresh) or equal(k.content.first, v.content.first))
        and (not isinstance(k.content, Scattered) or k.content.positions is v.content.positions)
        for k, v in zip(key, value)
    )
    if not alike:
        raise Unsupported("keys and values hold different ranges of cached tokens")
