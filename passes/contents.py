"""What tensors of a graph hold of caches: which storage is a cache or a copy, and which tokens a view of it shows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..compat import is_wrapped
from ..geometry import Window, four_dimensional, locate, same
from ..packed import PackedKV
from .actions import Holder
from .nodes import example, identity, is_dense, offset
from .roles import Roles
from .segments import Cached, Content, Fresh, Scattered, Segment, UnknownPosition, cut, hint, shift


class Unsupported(Exception):
    """Something about a cache that cannot be followed; the message says what and why."""


CANNOT_FOLLOW = (Unsupported, UnknownPosition, GuardOnDataDependentSymNode)


def reason_of(error: Exception) -> str:
    return (
        "a position is not known before the data is" if isinstance(error, GuardOnDataDependentSymNode) else str(error)
    )


class Contents:
    """Holders by storage. `owners` gives, per placeholder that is a slice of a larger cache, that cache; `current` are
    placeholders that are none."""

    def __init__(self, graph: Graph, owners: dict[Node, Tensor], current: Collection[Node] = ()) -> None:
        self.holders: dict[int, list[Holder]] = {}  # by storage; several where it is parted
        self.plain: dict[Node, list[Holder]] = {}  # views of a holder that are no boxes of it: ordinary tensors
        self.computed: dict[int, list[Holder]] = {}  # by storage: the caches that a tensor's values come from
        self.caches: list[Holder] = []
        self.roles = Roles(graph)
        inputs = list(graph.find_nodes(op="placeholder"))
        # Views of other tensors, which are never packed, but told of, come last: a part of a cache is that cache's.
        for node in sorted(inputs, key=lambda n: n not in owners and not _is_whole(example(n))):
            if node not in current:
                self._add_input(node, owners.get(node))

    def _add_input(self, node: Node, owner: Tensor | None) -> None:
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
            if geometry is None:
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
            holder.offset = offset(shaped)
            stacked = shaped.dim() == 5 and same(shaped.shape[0], 2)
        if stacked:  # keys and values
            half = holder.shape[0] // 2
            self._add_parts(holder, value, [(0, half), (half, half)])
        else:
            self._add(holder, value)

    def _add_parts(self, whole: Holder, value: Tensor, parts: list[tuple[int, int]]) -> None:
        for first, length in parts:
            shape = (length, *whole.shape[1:])
            part = replace(whole, shape=shape, part=(first, length), blockers=[])
            part.offset = whole.offset + first * whole.strides[0]
            part.segments, part.writes = [], []
            self._add(part, value)

    def _add(self, holder: Holder, value: Tensor) -> None:
        holder.segments = [Segment(0, holder.shape[holder.token_axis], Cached(holder, 0, -1))]
        self.holders.setdefault(identity(value), []).append(holder)
        self.caches.append(holder)

    def of(self, value: Tensor) -> Holder | None:
        """The holder whose memory a tensor lies in; None where it lies in none, or in several parts of one."""
        holders = self.holders.get(identity(value), [])
        if len(holders) < 2:
            return holders[0] if holders else None
        try:
            begins = hint(offset(value))
            own = [h for h in holders if hint(h.offset) <= begins < hint(h.offset + h.shape[0] * h.strides[0])]
        except UnknownPosition:
            return None
        return next((h for h in own if locate_in(value, h) is not None), None)

    def holder(self, node: Any) -> Holder | None:
        """Whose box a tensor is a view of."""
        value = example(node) if isinstance(node, Node) and node not in self.plain else None
        return self.of(value) if isinstance(value, Tensor) else None

    def sources(self, node: Any) -> list[Holder]:
        """The caches that a node's values come from, by whatever way."""
        if node in self.plain:
            return self.plain[node]
        sources: list[Holder] = []
        for value in tensors(example(node)):
            holders = self.holders.get(identity(value), [])
            own = self.of(value)
            for holder in holders if own is None else [own]:
                held = [s.content.cache for s in holder.segments if not isinstance(s.content, Fresh)]
                sources += [c for c in held or [holder.cache] if c not in sources]
            sources += self.computed.get(identity(value), [])
        return sources

    def sources_of_inputs(self, node: Node) -> list[Holder]:
        return list({id(h): h for argument in node.all_input_nodes for h in self.sources(argument)}.values())

    def window(self, value: Tensor, holder: Holder, time: int) -> tuple[Window, list[Segment]]:
        """The box that a view shows of a holder, and the tokens it holds, counted from its own first one."""
        window = locate_in(value, holder)
        if window is None:
            raise Unsupported(f"the view of size {tuple(value.shape)} has steps or merged dimensions")
        axis = holder.token_axis
        start = window.starts[axis]
        segments = shift(cut(holder.segments, start, start + window.lengths[axis]), -start)
        if holder.root is None:
            segments = [
                Segment(s.start, s.stop, replace(s.content, time=time)) if isinstance(s.content, Cached) else s
                for s in segments
            ]
        return window, [Segment(s.start, s.stop, renamed(s.content, window.axes)) for s in segments]

    def content(self, value: Tensor, holder: Holder, time: int) -> tuple[Window, list[Segment]]:
        """As `window`, of a view that shows whole tokens."""
        window, segments = self.window(value, holder, time)
        for other in range(len(holder.shape)):
            if other != holder.token_axis and not window.covers(holder.shape, other):
                raise Unsupported("only some of its batch entries, heads or channels are used")
        return window, segments

    def is_box(self, value: Tensor) -> bool:
        """Whether a tensor shows a box of a holder, or of several parts of one, whose views will tell the box."""
        holder = self.of(value)
        return self.shows_parts(value) if holder is None else locate_in(value, holder) is not None

    def shows_parts(self, value: Any) -> bool:
        """Whether a tensor lies in the memory of a cache of several parts, and in none of them alone."""
        parts = self.holders.get(identity(value), []) if isinstance(value, Tensor) else []
        if len(parts) < 2:
            return False
        try:
            first = hint(offset(value))
            last = first + sum(max(hint(n) - 1, 0) * hint(step) for n, step in zip(value.shape, value.stride()))
        except UnknownPosition:
            return True
        return not any(hint(h.offset) <= first and last < hint(h.offset + h.shape[0] * h.strides[0]) for h in parts)

    def derive(self, value: Tensor, sources: list[Holder]) -> None:
        known = self.computed.setdefault(identity(value), [])
        known += [h for h in sources if h not in known]


def _is_whole(value: Any) -> bool:
    return not isinstance(value, Tensor) or isinstance(value, PackedKV) or is_dense(value)


def locate_in(value: Tensor, holder: Holder) -> Window | None:
    if is_wrapped(value):  # its sizes lack a dimension
        return None
    return locate(value.size(), value.stride(), offset(value) - holder.offset, holder.shape, holder.strides)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a result: itself, or the elements of a tuple."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in values if isinstance(v, Tensor)]


def renamed(content: Content, axes: tuple[int | None, ...]) -> Content:
    """Fresh values with their dimensions named after the dimensions of a view with these `axes`."""
    if isinstance(content, Cached):
        return content
    if isinstance(content, Scattered):
        before = None if content.before is None else renamed(content.before, axes)
        return replace(content, value=_renamed(content.value, axes), before=before)  # type: ignore[arg-type]
    return _renamed(content, axes)


def _renamed(value: Fresh, axes: tuple[int | None, ...]) -> Fresh:
    names = {axis: i for i, axis in enumerate(axes) if axis is not None}
    return Fresh(value.node, tuple(None if a is None else names.get(a) for a in value.axes), value.first)
