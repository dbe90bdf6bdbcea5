"""Follows cache contents through a graph: who holds which tokens, what writes them, and what attention reads.

One walk in program order. A `Holder` is a storage whose content along the token axis is known: a cache that enters the
graph, or a copy (`contiguous`, `to`, `clone`, `cat`) of parts of one. Views need no rules of their own:
`geometry.locate` reads their position off the fake tensors' metadata. What the walk sees is recorded as actions;
nothing is changed here.

The way caches are written and read falls out of the contents: tokens that the graph itself has written are `Fresh`,
all others are `Cached`, however the model spells it (slice write and slice read, concatenation, clone and edit, …).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from ..geometry import Window, same
from .actions import Append, Attend, Dense, Fill, Holder, Move, Read, Rejection, Returned, Scatter, Tracking
from .attention_forms import AttentionCall, as_attention
from .contents import CANNOT_FOLLOW, Contents, Unsupported, locate_in, reason_of, tensors, token_dimension
from .copies import copy_of_tokens
from .nodes import CONCATENATIONS, COPIES, Write, as_write, example, identity, mutates, name_of
from .segments import Cached, Content, Fresh, Scattered, Segment, at_most, equal, overlap, overwrite
from .sources import hands_tokens_on

IN_ANOTHER_GRAPH = "its keys are read from the cache in another graph"
ONE_PACKED = (
    "packed, but only its keys or only its values come so to this graph: dequantized, and its scores are not corrected"
)


class Tracker:
    """The walk.

    Args:
        owners: per placeholder that is a slice of a larger cache, that cache's shape and strides.
        current: placeholders that are no caches.
        handed: tells the placeholders that keys come from, and that another graph has read from a cache.
    """

    def __init__(
        self,
        graph: Graph,
        owners: dict[Node, Tensor] | None = None,
        current: Collection[Node] = (),
        handed: Callable[[Node], tuple[Node, ...]] = lambda key: (),
    ) -> None:
        self.graph, self.handed = graph, handed
        self.time = 0
        self.contents = Contents(graph, owners or {}, current)
        self.result = Tracking(self.contents.caches, [], [], [], [], [], [], [])
        self.as_complex: dict[int, list[Holder]] = {}  # by the memory of copies, the caches that they show

    def run(self) -> Tracking:
        for time, node in enumerate(self.graph.nodes):
            self.time = time
            if node.op in ("placeholder", "get_attr"):
                continue
            try:
                self._visit(node)
            except CANNOT_FOLLOW as error:
                write = as_write(node)
                for holder in {id(h): h for a in node.all_input_nodes for h in self.contents.sources(a)}.values():
                    holder.blockers.append(reason_of(error))
                    holder.refused |= write is not None and self.contents.of(write.target) is holder
        return self.result

    # ---- nodes ----

    def _visit(self, node: Node) -> None:
        self._follow_complex(node)
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

    def _follow_complex(self, node: Node) -> None:
        """Complex numbers show memory of a cache, but a packed one has none to show: they are a copy of what it holds
        (`packed_dispatch`), which may be read alone."""
        for argument in node.all_input_nodes:
            value = example(argument)
            shown = self.as_complex.get(identity(value), ()) if isinstance(value, Tensor) else ()
            if shown and (mutates(node, argument) or ((write := as_write(node)) and write.base is argument)):
                for holder in shown:
                    holder.blockers.append("it is written to as complex numbers")
        if name_of(node) == "view_as_complex" and identity(example(node)) not in self.contents.holders:
            self.as_complex[identity(example(node))] = self.contents.sources_of_inputs(node)

    def _is_view(self, node: Node) -> bool:
        """Whether a node shows memory of a holder. Where it is no box of it, it is an ordinary tensor from here on."""
        shown = [v for v in tensors(example(node)) if identity(v) in self.contents.holders]
        if not shown:
            return False
        for argument in node.all_input_nodes:
            if mutates(node, argument):
                raise Unsupported(f"`{name_of(node)}` changes it in place")
        read = any(argument in self.contents.plain for argument in node.all_input_nodes)
        if read or not self.contents.shows_boxes(node):
            self.contents.plain[node] = self.contents.sources_of_inputs(node)
            for argument in node.all_input_nodes:
                self._read(node, argument)
        return True

    def _compute(self, node: Node) -> None:
        """Anything else: it reads its arguments as ordinary tensors."""
        sources = self.contents.sources_of_inputs(node) if hands_tokens_on(node) else []
        for argument in node.all_input_nodes:
            self._read(node, argument)
        for value in tensors(example(node)) if sources else ():
            self.contents.derive(value, sources)

    def _read(self, consumer: Node, argument: Node) -> None:
        if mutates(consumer, argument) and self.contents.sources(argument):
            value = example(argument)
            if isinstance(value, Tensor) and identity(value) in self.contents.holders:
                raise Unsupported(f"`{name_of(consumer)}` changes it in place")
        self.result.reads += self._reading(consumer, argument)

    def _reading(self, consumer: Node, argument: Node) -> list[Read]:
        """The read of a view of a cache; none of any other tensor."""
        holder, value = self.contents.holder(argument), example(argument)
        if holder is None and argument not in self.contents.plain and self.contents.shows_parts(value):
            raise Unsupported("its keys and values are read together")
        if holder is None or holder.root is not None:
            return []
        window, segments = self.contents.window(value, holder, self.time)
        return [Read(consumer, argument, holder, window, segments)]

    def _returned(self, argument: Node) -> bool:
        """Record an output that is a copy of cached tokens, and after them, or in their midst, tokens of the graph."""
        copy = self.contents.holder(argument)
        if copy is None or copy.root is None or copy.repeats != 1 or None in copy.root_axes:
            return False
        kinds = [isinstance(s.content, Fresh) for s in copy.segments if not same(s.start, s.stop)]
        appended = kinds == sorted(kinds)
        if not kinds or all(kinds) or not (appended or kinds.count(True) == 1):
            return False
        for segment in copy.segments:
            content = segment.content
            if isinstance(content, Scattered) or (isinstance(content, Cached) and content.cache is not copy.root):
                return False
            if isinstance(content, Cached) and not self._is_current(content, segment.length):
                return False  # it is made of what the cache holds at the end
        attended = {c for a in self.result.attends for c in (a.key_cache, a.value_cache)}
        attended |= {c for d in self.result.dense for c in d.caches}
        fresh = [s.content.node for s in copy.segments if isinstance(s.content, Fresh)]
        mirrors = appended and any(
            isinstance(w, Append) and w.holder is copy.root and w.value in fresh for w in self.result.writes
        )
        grows = any(kinds) and copy.root in attended
        if not appended and not grows:
            return False
        self.result.returned.append(Returned(argument, copy, grows, mirrors and not grows))
        return True

    def _copy(self, node: Node) -> bool:
        """Record a copy of a holder's content as a holder of its own; False where the node is no such copy."""
        copy = copy_of_tokens(self.contents, node, self.time)
        if copy is None:
            return False
        for argument in node.all_input_nodes:
            holder = self.contents.holder(argument)
            if holder is not None and holder.root is None:
                self._read(node, argument)
        self.contents.holders[identity(example(node))] = [copy]
        self.result.copies.append(copy)
        return True

    def _write(self, node: Node, write: Write) -> None:
        holder, value = self.contents.of(write.target), write.value
        if holder is None and identity(write.target) in self.contents.holders:
            raise Unsupported("its keys and values are written together")
        if holder is None:
            if isinstance(value, Node):
                sources = self.contents.sources(value)
                self._read(node, value)
                if sources:
                    self.contents.derive(write.target, sources)
            return
        target = write.target
        window, axis = locate_in(target, holder), holder.token_axis
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
            holder.segments = overwrite(holder.segments, start, stop, Cached(holder, start, self.time))
            holder.writes.append((self.time, start, stop))
            return
        if list(example(value).shape) != list(target.shape):
            raise Unsupported(f"a value of size {tuple(example(value).shape)} is broadcast into it")
        if self._moved(node, holder, value, start, stop):
            return
        if self.contents.sources(value):
            self._read(node, value)
        holder.segments = overwrite(holder.segments, start, stop, Fresh(value, window.axes, 0))
        if holder.root is None:
            self.result.writes.append(Append(node, holder, start, stop, value, window.axes))
            holder.writes.append((self.time, start, stop))

    def _moved(self, node: Node, holder: Holder, value: Node, start: int, stop: int) -> bool:
        """A write of what the cache itself held: packed data is moved, and only what is new is quantized."""
        source = self.contents.holder(value)
        if source is None or holder.root is not None or source.repeats != 1:
            return False
        window, segments = self.contents.content(example(value), source, self.time)
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
        if any(isinstance(s.content, Fresh) for s in holder.segments):
            raise Unsupported("it is written twice, once at places that a tensor holds")
        if not isinstance(write.value, Node) or example(write.value).dim() != 4:
            raise Unsupported("a value is broadcast to places that a tensor holds")
        if self.contents.sources(write.value):
            self._read(node, write.value)
        tokens = holder.shape[holder.token_axis]
        before = next((s.content for s in holder.segments if isinstance(s.content, Scattered)), None)
        content = Scattered(holder, 0, self.time, write.positions, Fresh(write.value, window.axes, 0), before)
        holder.segments = [Segment(0, tokens, content)]
        holder.scattered = True
        holder.writes.append((self.time, 0, tokens))
        self.result.writes.append(Scatter(node, holder, write.positions, write.value, window.axes))

    def _check_current(self, content: Cached, length: int) -> None:
        """Packed tokens are read where they are used: nothing may have been written to them since they were copied."""
        if not self._is_current(content, length):
            raise Unsupported("tokens are overwritten between their being copied and used")

    def _is_current(self, content: Cached, length: int) -> bool:
        written = ((start, stop) for time, start, stop in content.cache.writes if time > content.time)
        return not any(overlap(w, (content.first, content.first + length)) for w in written)

    # ---- attention ----

    def _attention(self, call: AttentionCall) -> None:
        for other in (call.query, call.mask, *(call.others or ())):
            if isinstance(other, Node):
                self._read(call.node, other)
        sources = [self.contents.sources(call.key), self.contents.sources(call.value)]
        handed = self.handed(call.key)
        if not any(sources) and not handed:
            return
        caches = list({id(h): h for part in sources for h in part}.values())
        reason, lowered = self._unfit(call, all(sources) or bool(handed), caches), False
        if reason is None and handed:
            keys, values = sources
            gathers = self._gathers(call.key)
            self.result.dense.append(Dense(call, keys, values, gathers, IN_ANOTHER_GRAPH, handed))
        elif reason is None:
            try:
                attend = self._attend(call)
                attend.reads = [read for x in (call.key, call.value) for read in self._reading(call.node, x)]
                self.result.attends.append(attend)
                lowered = True
            except CANNOT_FOLLOW as error:
                keys, values = sources
                dense = Dense(call, keys, values, self._gathers(call.key), reason_of(error))
                self.result.dense.append(dense)
        else:
            self.result.rejections.append(Rejection(call.node, reason, caches))
        if not lowered:
            for argument in (call.key, call.value):
                self._read(call.node, argument)

    def _unfit(self, call: AttentionCall, both: bool, caches: list[Holder]) -> str | None:
        """Why an attention that reads caches must stay as it is."""
        if not both:
            packed = any(holder.packed for holder in caches)
            return ONE_PACKED if packed else "only one of key and value comes from a cache"
        if call.dropout:
            return f"dropout of {call.dropout}"
        return "gradients are required of it" if call.result.requires_grad else None

    def _gathers(self, key: Node) -> bool:
        """Whether keys of this graph stand beside cached ones."""
        seen, left = set(), [key]
        while left:
            node = left.pop()
            holder = self.contents.holder(node)
            if holder is not None and any(isinstance(s.content, Fresh) for s in holder.segments):
                return True
            if node in seen or not self.contents.sources(node):
                continue
            seen.add(node)
            if node.target in CONCATENATIONS and not all(self.contents.sources(p) for p in node.all_input_nodes):
                return True
            left += node.all_input_nodes
        return False

    def _attend(self, call: AttentionCall) -> Attend:
        if call.others is not None:
            raise Unsupported("flex_attention keeps its own scores")
        key_holder, value_holder = self.contents.holder(call.key), self.contents.holder(call.value)
        if key_holder is None or value_holder is None:
            what = call.key if key_holder is None else call.value
            raise Unsupported(f"`{name_of(what)}` stands between cache and attention")
        if key_holder.cache is value_holder.cache:
            raise Unsupported("keys and values lie in one cache")
        if key_holder.repeats != value_holder.repeats:
            raise Unsupported("keys and values are repeated differently")
        contents, axes = [], []
        for argument, holder in ((call.key, key_holder), (call.value, value_holder)):
            window, segments = self.contents.content(example(argument), holder, self.time)
            if token_dimension(window, holder) != 2:
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
            own: Sequence[int | None] = (
                window.axes
                if holder.root is None
                else [None if a is None else holder.root_axes[a] for a in window.axes]
            )
            if own.count(None) == 1:  # a copy of three dimensions, of a cache that has one batch entry
                missing = next(a for a in range(4) if a not in own)
                own = [missing if a is None and same(holder.cache.shape[missing], 1) else a for a in own]
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
        if any(isinstance(s.content, Scattered) and s.content.before is not None for s in segments):
            raise Unsupported("it is written several times, at places that a tensor holds")
        tokens = holder.cache.shape[holder.cache.token_axis]
        if len(segments) != 1 or not same(segments[0].length, tokens):
            raise Unsupported("part of a cache is attended that is written at places that a tensor holds")
        if call.mask is not None and not same(example(call.mask).shape[-1], tokens):
            raise Unsupported("a mask of one column for all keys")


def _check_alike(key: list[Segment], value: list[Segment]) -> None:
    """Keys and values must be split into cached and current tokens at the same places."""
    alike = len(key) == len(value) and all(
        type(k.content) is type(v.content)
        and equal(k.length, v.length)
        and (isinstance(k.content, Fresh) or equal(k.content.first, v.content.first))
        and _same_places(_positions(k.content), _positions(v.content))
        for k, v in zip(key, value)
    )
    if not alike:
        raise Unsupported("keys and values hold different ranges of cached tokens")


def _positions(content: Content) -> Node | None:
    return content.positions if isinstance(content, Scattered) else None


_TAKES = COPIES | {"getitem", "select", "narrow", "view", "reshape", "flatten", "squeeze", "unsqueeze"}
_TAKES |= {"lt", "mul", "add"}  # places counted from the first one, see `spelled_writes`


def _same_places(a: Any, b: Any) -> bool:
    """Whether two nodes hold the same: one node, or views and copies taken alike that nothing writes to in between."""
    if a is b or not isinstance(a, Node) or not isinstance(b, Node):
        return a is b or (not isinstance(a, Node) and not isinstance(b, Node) and a == b)
    if a.target != b.target or name_of(a) not in _TAKES or len(a.args) != len(b.args) or a.kwargs != b.kwargs:
        return False
    first, last = sorted((a, b))
    node, storage = first, identity(example(a.args[0]))
    while node is not last:
        shown = (x for x in node.all_input_nodes if isinstance(example(x), Tensor) and identity(example(x)) == storage)
        if any(mutates(node, x) for x in shown):
            return False
        node = node.next
    return all(map(_same_places, a.args, b.args))
