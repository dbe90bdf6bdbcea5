"""Follows cache contents through a graph: who holds which tokens, what writes them, and what attention reads.

One walk in program order. A `Holder` is a storage whose content along the token axis is known: a cache that enters the
graph, or a copy (`contiguous`, `to`, `clone`, `cat`) of parts of one. Views need no rules of their own:
`geometry.locate` reads their position off the fake tensors' metadata. What the walk sees is recorded as actions;
nothing is changed here.

The way caches are written and read falls out of the contents: tokens that the graph itself has written are `Fresh`,
all others are `Cached`, however the model spells it (slice write and slice read, concatenation, clone and edit, …).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..geometry import Window, locate, same
from ..packed import PackedKV
from .attention_forms import AttentionCall, as_attention
from .segments import Cached, Fresh, Segment, UnknownPosition, cut, equal, overlap, overwrite, shift

COPIES = {"contiguous", "to", "clone", "type_as", "float", "half", "bfloat16", "type", "detach", "_to_copy"}
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}

_IN_PLACE_FUNCTIONS = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ior}


class Unsupported(Exception):
    """Something about a cache that cannot be followed; the message says what and why."""


_CANNOT_FOLLOW = (Unsupported, UnknownPosition, GuardOnDataDependentSymNode)


def _reason(error: Exception) -> str:
    return (
        "a position is not known before the data is" if isinstance(error, GuardOnDataDependentSymNode) else str(error)
    )


@dataclass(eq=False)
class Holder:
    """A storage that holds tokens of a cache. Axes are those of `shape`; caches that are packed have canonical ones."""

    node: Node
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    token_axis: int
    root: Holder | None  # the cache that a copy was (first) taken from; None for a cache itself
    root_axes: tuple[int | None, ...] = ()  # of a copy: the root's axis for each of its own
    segments: list[Segment] = field(default_factory=list)
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # (time, start, stop)
    packed: bool = False
    blockers: list[str] = field(default_factory=list)

    @property
    def cache(self) -> Holder:
        return self.root or self


@dataclass
class Append:
    node: Node
    holder: Holder
    start: int
    stop: int
    value: Node
    axes: tuple[int | None, ...]


@dataclass
class Move:
    node: Node
    holder: Holder
    source: int
    destination: int
    length: int


@dataclass
class Fill:
    node: Node
    holder: Holder
    start: int
    stop: int
    value: float


@dataclass
class Attend:
    call: AttentionCall
    key: list[Segment]
    value: list[Segment]
    key_cache: Holder
    value_cache: Holder
    key_axes: tuple[int, ...]  # the cache's axis for each of the dimensions (batch, head, token, channel)
    value_axes: tuple[int, ...]


@dataclass
class Read:
    """`consumer` uses `argument`, a view of a cache, as an ordinary tensor."""

    consumer: Node
    argument: Node
    holder: Holder
    window: Window
    segments: list[Segment]


@dataclass
class Rejection:
    """An attention that could not be lowered, and why."""

    node: Node
    reason: str
    caches: list[Holder]


@dataclass
class Tracking:
    """What the walk saw, in program order."""

    caches: list[Holder]
    copies: list[Holder]
    writes: list[Append | Move | Fill]
    attends: list[Attend]
    reads: list[Read]
    rejections: list[Rejection]


def example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else node


def identity(value: Tensor) -> int:
    """The same for all tensors of a graph that share memory."""
    return id(value._store.codes) if isinstance(value, PackedKV) else value.untyped_storage()._cdata


def offset(value: Tensor) -> int:
    """Where a tensor begins in its storage, or in the tensor that its packed store replaces."""
    return value.offset if isinstance(value, PackedKV) else value.storage_offset()  # type: ignore[return-value]


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
            if shaped.dim() != 4 or (owner is None and not _is_dense(value)):
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
        elif (write := _as_write(node)) is not None:
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
        if any(_mutates(node, argument) for argument in node.all_input_nodes):
            raise Unsupported(f"`{_name(node)}` changes it in place")
        return True

    def _read(self, consumer: Node, argument: Node) -> None:
        holder, value = self._holder(argument), example(argument)
        if holder is None or holder.root is not None:
            return
        if _mutates(consumer, argument):
            raise Unsupported(f"`{_name(consumer)}` changes it in place")
        window, segments = self._content(value, holder)
        self.result.reads.append(Read(consumer, argument, holder, window, segments))

    def _copy(self, node: Node) -> bool:
        """Record a copy of a holder's content as a holder of its own; False where the node is no such copy."""
        value = example(node)
        if not isinstance(value, Tensor):
            return False
        concatenated = node.target in CONCATENATIONS
        parts = _copied(node)
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
            write = _as_write(node)
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
            for part in _copied(base):
                self._follow(part, axis)

    def _locate(self, value: Tensor, base: Node) -> Window | None:
        whole = example(base)
        if isinstance(whole, PackedKV):
            return None
        return locate(
            value.size(), value.stride(), value.storage_offset() - whole.storage_offset(), whole.shape, whole.stride()
        )


def _copied(node: Node) -> list[Node]:
    """What a node copies (several tensors, where it concatenates); empty where it is no copy."""
    if node.op == "call_function" and node.target in CONCATENATIONS and isinstance(node.args[0], (list, tuple)):
        return list(node.args[0])  # type: ignore[arg-type]
    if _name(node) in COPIES and node.args and isinstance(node.args[0], Node):
        return [node.args[0]]
    return []


def _is_dense(value: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, in whatever order of dimensions."""
    expected = 1
    for n, stride in sorted(zip(value.shape, value.stride()), key=lambda d: (_hint(d[1]), _hint(d[0]))):
        if not same(n, 1) and not same(stride, expected):
            return False
        expected = expected * n
    return same(offset(value), 0)


def _hint(n: int) -> int:
    return int(n.node.hint) if isinstance(n, torch.SymInt) else n


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


def _name(node: Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def _mutates(consumer: Node, argument: Node) -> bool:
    """Whether a node writes to one of its arguments."""
    target = consumer.target
    if target in _IN_PLACE_FUNCTIONS:
        return consumer.args[0] is argument
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True  # its body may write; it is not looked into
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        writes = [a.is_write for a in target._schema.arguments]
        return any(a is argument and w for a, w in zip(consumer.args, writes))
    return (is_in_place(consumer) and consumer.args[0] is argument) or consumer.kwargs.get("out") is argument


def is_in_place(node: Node) -> bool:
    """Whether a node is named as PyTorch names what changes its first argument."""
    name = _name(node)
    return bool(node.args) and name.endswith("_") and not name.endswith("__")


def _as_write(node: Node) -> tuple[Tensor, Node, Any] | None:
    """(the view that is written, the node it belongs to, the value: a node or a number), where a node is a write."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    base = node.args[0]
    target = example(base)
    if not isinstance(base, Node) or not isinstance(target, Tensor):
        return None
    if node.target is operator.setitem:
        index = torch.fx.node.map_arg(node.args[1], example)
        if any(isinstance(i, Tensor) for i in (index if isinstance(index, tuple) else (index,))):
            return None
        return _indexed(target, index), base, node.args[2]
    name = _name(node)
    if name == "copy_":
        return target, base, node.args[1]
    if name == "zero_":
        return target, base, 0.0
    if name == "fill_" and not isinstance(node.args[1], Node):
        return target, base, node.args[1]
    return None


def _indexed(target: Tensor, index: Any) -> Tensor:
    """`target[index]` on fake tensors, without guarding on more than Dynamo already has."""
    from ..compat import fake_mode_of

    mode = fake_mode_of(target._store.codes if isinstance(target, PackedKV) else target)
    if mode is None:
        return target[index]
    with mode:
        return target[index]
