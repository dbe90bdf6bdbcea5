"""What tensors of a graph hold of caches: which storage is a cache or a copy, and which tokens a view of it shows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..compat import is_wrapped
from ..geometry import Window, folded_axis, folds, four_dimensional, locate, same
from ..packed import PackedKV
from .actions import Holder
from .nodes import as_write, example, identity, is_dense, offset
from .roles import Roles
from .segments import Cached, Content, Fresh, Scattered, Segment, UnknownPosition, cut, hint, overlap, shift

Box = tuple[tuple[int, int] | None, tuple[int, int] | None]  # of batch entries and of heads: (first, length), None: all


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
        self.used = _used(graph)
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
        else:
            found = self._plain_cache(node, value if owner is None else owner)
            if found is None:
                return
            holder = found
        for part in self._parts(holder, value):
            part.segments = [Segment(0, part.shape[part.token_axis], Cached(part, 0, -1))]
            self.holders.setdefault(identity(value), []).append(part)
            self.caches.append(part)

    def _plain_cache(self, node: Node, shaped: Tensor) -> Holder | None:
        """What a plain input, or the tensor that it is a slice of, is as a cache; None where it is an ordinary one."""
        value, dim = example(node), self.roles.axes.get(node)
        if dim is not None and shaped is not value:
            window = locate(value.size(), value.stride(), offset(value), shaped.shape, shaped.stride())
            dim = None if window is None else window.axes[dim]
        last = shaped.dim() - 1
        channel = self.roles.channels.get(node, last) if last < 4 and shaped is value else last
        if dim is None or dim == channel:
            return None
        holders = []
        for fold in sorted(folds(shaped.dim()), key=lambda f: f[folded_axis(dim, f)]):  # tokens alone first
            geometry = four_dimensional(shaped.shape, shaped.stride(), fold)
            if geometry is not None:
                tokens, channels = folded_axis(dim, fold), folded_axis(channel, fold)
                batch, head = (axis for axis in range(4) if axis not in (tokens, channels))
                roles = batch, head, tokens, channels
                holder = Holder(node, *geometry, value.dtype, tokens, None, roles=roles, fold=fold)
                holder.offset = offset(shaped)
                holders.append(holder)
        used = self.used.get(identity(value), [])
        fitting = (h for h in holders if all(locate_in(shown, h) is not None for shown in used))
        return next(fitting, next(iter(holders), None))

    def _parts(self, whole: Holder, value: Tensor) -> list[Holder]:
        """A cache, or the boxes of its batch entries and heads that a graph uses, where they are several or not all."""
        if whole.packed:
            shown = locate(value.size(), value.stride(), offset(value), whole.shape, whole.strides, anywhere=True)
            whole = whole if shown is None else _part(whole, _box(whole, shown))
        boxes = self._boxes(whole, self.used.get(identity(value), []))
        if boxes is None and value.dim() == 5 and same(value.shape[0], 2):  # keys and values, whatever is done to them
            half = whole.shape[whole.roles[0]] // 2
            boxes = [((first, half), None) for first in (0, half)]
        return [_part(whole, box) for box in boxes or [(None, None)]]

    def _boxes(self, whole: Holder, used: list[Tensor]) -> list[Box] | None:
        """The batch entries and heads that views show; None where these are no boxes, or overlap."""
        boxes: list[Box] = []
        try:
            for value in used:
                if (window := locate_in(value, whole)) is None:
                    return None
                box = _box(whole, window)
                if any(_alike(box, other) for other in boxes):
                    continue
                if any(_meet(box, other) for other in boxes):
                    return None
                boxes.append(box)
        except (UnknownPosition, GuardOnDataDependentSymNode):
            return None
        return boxes

    def of(self, value: Tensor) -> Holder | None:
        """The holder whose memory a tensor lies in; None where it lies in none, or in several parts of one."""
        holders = self.holders.get(identity(value), [])
        if len(holders) < 2:
            return holders[0] if holders else None
        return next((h for h in holders if locate_in(value, h) is not None and _begins_in(value, h)), None)

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
        """The box that a view shows of a holder, and the tokens it holds, counted from its own first one; axes are
        the holder's."""
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
        return window, segments

    def content(self, value: Tensor, holder: Holder, time: int) -> tuple[Window, list[Segment]]:
        """As `window`, of a view that shows whole tokens; axes are its own."""
        window, segments = self.window(value, holder, time)
        for other in range(len(holder.shape)):
            if other != holder.token_axis and not window.covers(holder.shape, other):
                raise Unsupported("only some of its batch entries, heads or channels are used")
        return window, [Segment(s.start, s.stop, renamed(s.content, window.axes)) for s in segments]

    def shows_boxes(self, node: Node) -> bool:
        """Whether a view shows boxes of holders, or leads to nothing but views that do: these tell what is used."""
        shown = [v for v in tensors(example(node)) if identity(v) in self.holders]
        if all((h := self.of(v)) is not None and locate_in(v, h) is not None for v in shown):
            return True
        storages = {identity(v) for v in shown}
        return bool(node.users) and all(
            identity(write.target) in storages and self._is_box(write.target)
            if (write := as_write(user)) is not None
            else any(identity(v) in storages for v in tensors(example(user))) and self.shows_boxes(user)
            for user in node.users
        )

    def _is_box(self, value: Tensor) -> bool:
        holder = self.of(value)
        return holder is not None and locate_in(value, holder) is not None

    def shows_parts(self, value: Any) -> bool:
        """Whether a tensor lies in the memory of a cache of several parts, and in none of them alone."""
        parts = self.holders.get(identity(value), []) if isinstance(value, Tensor) else []
        return len(parts) > 1 and self.of(value) is None

    def derive(self, value: Tensor, sources: list[Holder]) -> None:
        known = self.computed.setdefault(identity(value), [])
        known += [h for h in sources if h not in known]


def _used(graph: Graph) -> dict[int, list[Tensor]]:
    """By storage: the views of it that are written to, or read by something that is no view."""
    found: dict[int, list[Tensor]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        write, results = as_write(node), tensors(example(node))
        if write is not None:
            found.setdefault(identity(write.target), []).append(write.target)
        elif not results and node.op != "output":  # it asks for a size
            continue
        shown = set() if write is not None else {identity(v) for v in results}
        for argument in node.all_input_nodes:
            if write is None or argument is not write.base:
                for value in tensors(example(argument)):
                    if identity(value) not in shown:
                        found.setdefault(identity(value), []).append(value)
    return found


def _part(whole: Holder, box: Box) -> Holder:
    """A holder of its own for a box of another one."""
    if box == (None, None):
        return whole
    shape, begins, part = list(whole.shape), whole.offset, list(whole.part or (None, None))
    for i, (axis, within) in enumerate(zip(whole.roles, box)):
        if within is not None:
            first, length = within
            begins, shape[axis] = begins + first * whole.strides[axis], length
            known = part[i]
            part[i] = (first if known is None else known[0] + first), length
    return replace(
        whole, shape=tuple(shape), part=(part[0], part[1]), offset=begins, segments=[], writes=[], blockers=[]
    )


def _box(whole: Holder, window: Window) -> Box:
    batch, head = (
        None if window.covers(whole.shape, axis) else (window.starts[axis], window.lengths[axis])
        for axis in whole.roles[:2]
    )
    return batch, head


def _alike(one: Box, other: Box) -> bool:
    return all(a is b if a is None or b is None else same(a[0], b[0]) and same(a[1], b[1]) for a, b in zip(one, other))


def _meet(one: Box, other: Box) -> bool:
    """Whether two boxes have anything in common, in the call at hand; which is guarded on."""
    return all(a is None or b is None or overlap((a[0], a[0] + a[1]), (b[0], b[0] + b[1])) for a, b in zip(one, other))


def _begins_in(value: Tensor, holder: Holder) -> bool:
    """Whether a box of a holder begins within it, as one of another part of the same tensor may not."""
    window = locate_in(value, holder)
    assert window is not None
    return all(0 <= hint(start) < max(1, hint(n)) for start, n in zip(window.starts, holder.shape))


def _is_whole(value: Any) -> bool:
    return not isinstance(value, Tensor) or isinstance(value, PackedKV) or is_dense(value)


def locate_in(value: Tensor, holder: Holder) -> Window | None:
    if is_wrapped(value):  # its sizes lack a dimension
        return None
    return locate(value.size(), value.stride(), offset(value) - holder.offset, holder.shape, holder.strides)


def token_dimension(window: Window, holder: Holder) -> int:
    """The dimension of a view that runs along tokens."""
    if holder.token_axis not in window.axes:
        raise Unsupported("a view of it shows a single token, and has no dimension along tokens")
    return window.axes.index(holder.token_axis)


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
