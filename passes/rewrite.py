"""Replaces caches by their packed components: writes become `jkv::append_kv`, attention `jkv::attention`.

Works on a copy of Dynamo's graph, which Dynamo goes on reading. What the callable around the compiled graph has to do
is told by `Rewritten`: which components to pass, which outputs are windows on a cache, which ranges stay in full
precision.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..geometry import Window, dense_strides, hint, locate, same
from ..kernels.centers import centered_number
from ..kernels.quantizers import grid_of, grid_within
from ..packed import PackedKV
from . import block_means
from .actions import Append, Dense, Fill, Holder, Move, Read, Returned, Scatter, Tracking
from .channels import Channels, Pairs
from .join_appends import join_appends
from .lower_attention import STANDS_BETWEEN, Turned, lower_dense, lower_fused
from .lower_reads import materialize, only, steps
from .memory_order import keep_memory_order
from .nodes import example, identity, is_in_place, offset
from .pieces import CachePlan, Component, Pieces
from .retain import ReadAsTensor, lower_kept, score_written
from .segments import Cached, Fresh, Segment, cut, shift
from .uncertainty import NotLinear, StepLayout, Uncertainty, pairs_turned

ops = torch.ops.jkv


@dataclass
class OutputWindow:
    """An output of the user's graph that is a view of a cache: where its geometry is among the outputs."""

    argument: int
    size: list[int]  # each an index into the compiled graph's outputs
    stride: list[int]
    offset: int


@dataclass
class OutputStore:
    """A packed cache that a graph makes of one that enters it; numbers are indices into the compiled graph's outputs.

    Outputs that show the same one share it (`OutputView.store`).
    """

    argument: int
    codes: int
    scales: int
    strides: list[int]  # of the tensor that it stands for, canonical order
    dtype: torch.dtype  # of that tensor
    active: tuple[int, int, int] | None  # data, start, stop: tokens that another graph attends in full precision
    after: bool = False  # codes and scales are those of the new tokens alone, that come after the whole old cache
    held: tuple[list[int], int | None, int] | None = None  # (start, stop, place) of old ranges; new tokens; their place


@dataclass
class OutputView:
    """An output of the user's graph that shows a packed cache which the graph makes."""

    store: int  # among `Rewritten.stores`
    size: list[int]
    stride: list[int]
    offset: int


@dataclass
class KeptRange:
    """A range written by a graph that does not attend to it, held in full precision by the store."""

    argument: int
    data: int  # indices into the compiled graph's outputs
    start: int
    stop: int


@dataclass
class OutputSteps:
    """An output of the user's graph that another graph may attend to as keys, and where Δ of its channels is."""

    output: int  # among those of the user's graph
    steps: int  # among those of the compiled graph
    layout: StepLayout


@dataclass
class Rewritten:
    """A graph of plain tensors and what stands between it and the caller's arguments."""

    graph: GraphModule
    inputs: list[tuple[int, Component]]
    outputs: list[int | OutputWindow | OutputView]
    stores: list[OutputStore] = field(default_factory=list)
    kept: list[KeptRange] = field(default_factory=list)
    steps: list[OutputSteps] = field(default_factory=list)
    written: list[int] = field(default_factory=list)  # arguments whose store no longer has an active range
    joined: list[int] = field(default_factory=list)  # arguments attended beside tokens of the graph's own
    caches: dict[int, CachePlan] = field(default_factory=dict)  # by argument
    uncorrected: dict[Node, str] = field(default_factory=dict)  # attention on dequantized keys, and why not corrected
    changed: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # by argument: tokens, as outputs

    @property
    def has_extra_outputs(self) -> bool:
        return bool(self.kept or self.steps or self.changed) or not all(isinstance(o, int) for o in self.outputs)


def copy_graph(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy that shares the module's parameters and metadata, and the map from old nodes to new ones."""
    graph = Graph()
    nodes: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, nodes)
    graph.output(output)
    for old, new in nodes.items():
        new.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    copied = GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source  # type: ignore[assignment]
    return copied, nodes


def rewrite(
    gm: GraphModule,
    tracking: Tracking,
    plans: dict[Holder, CachePlan],
    correction: str,
    tell_changes: bool = False,
    handed: Mapping[Node, StepLayout] | None = None,
    telling: Mapping[int, Sequence[Node]] | None = None,
) -> Rewritten:
    """Lower every use of the caches in `plans`; `gm` is changed; `tracking` must have been made from it.

    Args:
        tell_changes: which tokens of its caches the graph changes is among its outputs, where numbers tell it.
        handed: inputs that another graph has read from a cache.
        telling: outputs whose Δ is among its outputs, where it is known, and the inputs that they come from.

    Raises:
        ReadAsTensor: a cache with a budget would be read as a tensor; `gm` is of no use then.
    """
    settled = _settled(gm.graph, tracking, plans)
    return _Rewriter(gm, tracking, settled, correction, tell_changes, handed or {}, telling or {}).run()


def _settled(graph: Graph, tracking: Tracking, plans: dict[Holder, CachePlan]) -> dict[Holder, CachePlan]:
    """Plans for keys that are changed after they are read, where they are yet to be packed, on the grids for such."""
    plans = dict(plans)
    for dense in tracking.dense:
        for cache in dense.key_caches:
            if cache in plans and not cache.packed:
                plan, pairs = plans[cache], pairs_turned(graph, dense.call.key, [h.node for h in dense.key_caches])
                grid = grid_within(plan.quantizer, int(cache.shape[plan.axes[3]]), plan.group_size, pairs)
                for holder in plans:
                    if holder.node is cache.node:  # one tensor, of which others may be other parts
                        plans[holder] = replace(plans[holder], quantizer=str(grid))
    return plans


class _Rewriter:
    def __init__(
        self,
        gm: GraphModule,
        tracking: Tracking,
        plans: dict[Holder, CachePlan],
        correction: str,
        tell_changes: bool,
        handed: Mapping[Node, StepLayout],
        telling: Mapping[int, Sequence[Node]],
    ) -> None:
        self.gm, self.graph, self.plans, self.correction = gm, gm.graph, plans, correction
        self.tell_changes, self.handed = tell_changes, handed
        self.told: dict[int, tuple[Node, StepLayout]] = {}  # by output: Δ
        self.pieces = Pieces(gm, plans, handed)
        self.position = {p: i for i, p in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self.writes: dict[Node, list[Append | Scatter | Move | Fill]] = {}
        self.appends: dict[Node, Append] = {}  # in the rewritten graph
        self.unscored: list[Append] = []  # to caches that a learned head tells the salience of
        for write in tracking.writes:
            if write.holder in plans:
                self.writes.setdefault(write.node, []).append(write)
        self.attends = {a.call.node: a for a in tracking.attends if a.key_cache in plans and a.value_cache in plans}
        self.dense = {d.call.node: d for d in tracking.dense if d.handed or any(h in plans for h in d.key_caches)}
        self.copies = [copy for copy in tracking.copies if copy.cache in plans]
        self.reads: dict[Node, list[Read]] = {}
        for read in tracking.reads:
            if read.holder in plans:
                self.reads.setdefault(read.consumer, []).append(read)
        self.returned = {r.argument: r for r in tracking.returned if r.copy.cache in plans}
        output = next(iter(gm.graph.find_nodes(op="output")))
        shown = {*self.returned, *(read.argument for read in self.reads.get(output, []))}  # and packed as they are
        self.telling = {i: inputs for i, inputs in telling.items() if _outputs(output)[i] not in shown}
        self.rewritten = Rewritten(gm, [], [], caches={self.position[h.node]: plan for h, plan in plans.items()})
        beside = [h for a in self.attends.values() if a.gathers for h in (a.key_cache, a.value_cache)]
        beside += [h for d in self.dense.values() if d.gathers for h in d.caches]
        self.rewritten.joined = sorted({self.position[h.node] for h in beside if h in plans})

    def run(self) -> Rewritten:
        output = next(iter(self.graph.find_nodes(op="output")))
        for node in self.pieces.walk():
            if node in self.attends:
                score_written(self.pieces, self.attends[node], self.unscored, self._held)
                lower_fused(self.pieces, self.attends[node], self.correction)
            elif node in self.writes:
                self._lower_writes(node)
        with self.graph.inserting_before(output):
            for attend in self.attends.values() if self.unscored else ():
                score_written(self.pieces, attend, self.unscored, self._held)
        self._erase_edited_copies()
        self._erase_dead()
        self._lower_dense()
        with self.graph.inserting_before(output):
            self._lower_output(output)
        self._erase_dead()
        dequantized = {}
        for node in self.pieces.walk():
            for read in self.reads.get(node, []):
                if self.plans[read.holder].keeps:
                    raise ReadAsTensor(read.holder.node.name)
                shown = materialize(self.pieces, read)
                dequantized[shown] = example(read.argument)
                node.replace_input_with(read.argument, shown)
        keep_memory_order(self.graph, dequantized)
        self._erase_dead()
        pairs = [(a.key_cache, a.value_cache) for a in self.attends.values()]
        pairs += [pair for d in self.dense.values() for pair in zip(d.key_caches, d.value_caches)]
        join_appends(self.graph, self.appends, self.plans, pairs)
        for cache in {holder.node for holder in self.plans}:
            if cache.users:
                raise AssertionError(f"{cache} still has users: {list(cache.users)}")
            self.graph.erase_node(cache)
        self._order_inputs()
        self.graph.lint()
        self.gm.recompile()
        return self.rewritten

    # ---- lowering ----

    def _lower_dense(self) -> None:
        outputs = _outputs(next(iter(self.graph.find_nodes(op="output"))))
        channels = self._channels([*(d.call.key for d in self.dense.values()), *(outputs[i] for i in self.telling)])
        turned = {node: self._turned(channels, dense) for node, dense in self.dense.items()}
        keys = [self.dense[node].call.key for node, how in turned.items() if how is None]
        handed = {node: self.pieces.beside(node, "steps") for node in self.handed}
        joined = {node: layout.joined for node, layout in self.handed.items() if layout.joined}
        told = {i: inputs for i, inputs in self.telling.items() if channels is None or not _mixes(channels, outputs[i])}
        keys += [outputs[i] for i in told]
        uncertainty = Uncertainty(self.graph, keys, self.reads, lambda read: steps(self.pieces, read), handed, joined)
        kinds = {how.first: self._kinds(how.first, turned) for how in turned.values() if isinstance(how, Pairs)}
        for node in self.pieces.walk():
            for one in (uncertainty, *itertools.chain(*kinds.values())):
                one.visit(node)
            if node in self.dense:
                how = turned[node]
                tells = Turned(how, kinds[how.first]) if isinstance(how, Pairs) else how or uncertainty
                result, uncorrected = lower_dense(self.pieces, self.dense[node], tells, self.correction)
                self.reads[result] = self.reads.pop(node, [])
                self.rewritten.uncorrected[node] = uncorrected
        for i, inputs in told.items():
            if (delta := uncertainty.known.get(outputs[i])) is not None:
                caches = [h for h in self.plans if h.node in inputs]
                before = self.pieces.layouts(caches, [node for node in inputs if node in self.handed])
                self.told[i] = delta, uncertainty.layout(outputs[i], before)

    def _channels(self, keys: list[Node]) -> Channels | None:
        """Which channels of caches keys are made of, where those of some cache have steps of their own."""
        told = self.pieces.layouts(self.plans, self.handed)
        if self.correction == "none" or all(layout.group_size > 1 for layout in told):
            return None
        axes = {holder.node: plan.axes[3] for holder, plan in self.plans.items()}
        return Channels(self.graph, keys, self.reads, axes, [*self.handed])

    def _turned(self, channels: Channels | None, dense: Dense) -> Pairs | str | None:
        """How channels that have steps of their own are mixed before an attention, or why that is not known."""
        layouts = self.pieces.layouts(dense.key_caches, dense.handed)
        if channels is None or all(layout.group_size > 1 for layout in layouts):
            return None
        try:
            return channels.pairs(dense.call.key, dense.call.node)
        except NotLinear as error:
            return STANDS_BETWEEN.format(error)

    def _kinds(self, first: tuple[int, ...], turned: Mapping[Node, Any]) -> tuple[Uncertainty, Uncertainty]:
        """What tells Δ of the channels `first` alone, and of the others."""
        keys = [self.dense[n].call.key for n, how in turned.items() if isinstance(how, Pairs) and how.first == first]
        begin = next(n for n in self.graph.nodes if n.op != "placeholder")

        def of_kind(kind: int) -> Uncertainty:
            with self.graph.inserting_before(begin):
                given = {node: self.pieces.beside(node, "steps") for node in self.handed}
                handed = {node: self.pieces.call(only, delta, [*first], kind) for node, delta in given.items()}
            return Uncertainty(self.graph, keys, self.reads, lambda r: steps(self.pieces, r, (first, kind)), handed, {})

        return of_kind(0), of_kind(1)

    def _lower_writes(self, node: Node) -> None:
        number = self.pieces.number
        for write in self.writes[node]:
            plan, (codes, scales) = self.plans[write.holder], self.pieces.packed(write.holder)
            if plan.mean_tokens and not isinstance(write, Scatter):
                value = self._held(write) if isinstance(write, Append) else None
                block_means.write(self.pieces, write, (codes, scales), value)
            elif plan.keeps:
                lower_kept(self.pieces, write, self._stored)
                self.unscored += [write] if isinstance(write, Append) else []
            elif isinstance(write, Append):
                value = self._stored(write, Fresh(write.value, write.axes, write.first), write.stop - write.start)
                if plan.block > 1:
                    self.pieces.append_blocks(write.holder, value, write.start)
                else:
                    append = self.pieces.call(ops.append.default, codes, scales, value, number(write.start), plan.bits)
                    self.appends[append] = write
            elif isinstance(write, Scatter):
                value = self._stored(write, Fresh(write.value, write.axes, 0), example(write.positions).shape[0])
                self.pieces.call(ops.append_at.default, codes, scales, value, write.positions, plan.bits)
            elif isinstance(write, Move):
                args = number(write.source), number(write.destination), number(write.length)
                self.pieces.call(ops.move.default, codes, scales, *args)
            elif plan.block > 1:
                value = self.pieces.tokens_of(float(write.value), write.holder, write.stop - write.start)
                self.pieces.append_blocks(write.holder, value, write.start)
            elif plan.centered:  # no token of one number is one less the mean
                length = number(write.stop - write.start)
                filled = self.pieces.call(centered_number, float(write.value), self.pieces.center(write.holder), length)
                value = self.pieces.rounded(filled, write.holder)
                self.pieces.call(ops.append.default, codes, scales, value, number(write.start), plan.bits)
            elif write.value and (fill := grid_of(plan.quantizer).fill_operator) is not None:
                tokens = number(write.start), number(write.stop)
                self.pieces.call(getattr(ops, fill).default, codes, scales, *tokens, plan.bits, float(write.value))
            else:
                tokens = number(write.start), number(write.stop)
                self.pieces.call(ops.fill.default, codes, scales, *tokens, float(write.value))
            if plan.holds:
                self._hold(write)
        target = node.args[0]
        if node.users and isinstance(target, Node):  # in-place methods return what they write to
            node.replace_all_uses_with(target)
        self.graph.erase_node(node)

    def _hold(self, write: Append | Scatter | Move | Fill) -> None:
        """What a write does to the tokens that are held in full precision for good."""
        held, number = self.pieces.held(write.holder), self.pieces.number
        if isinstance(write, Append):
            self.pieces.call(ops.hold.default, *held, self._held(write), number(write.start))
        elif isinstance(write, Scatter):
            self.pieces.call(ops.hold_at.default, *held, self._held(write), write.positions)
        elif isinstance(write, Move):
            args = number(write.source), number(write.destination), number(write.length)
            self.pieces.call(ops.hold_moved.default, *held, *args)
        else:
            self.pieces.call(
                ops.hold_number.default, *held, number(write.start), number(write.stop), float(write.value)
            )

    def _stored(self, write: Append | Scatter, fresh: Fresh, length: int) -> Node:
        """What a write puts into a cache, in the basis that the cache is stored in."""
        value = self.pieces.canonical(fresh, length, self.pieces.roles(write.holder), example(write.value).dtype)
        return self.pieces.stored(value, write.holder)

    # ---- the outer signature ----

    def _lower_output(self, output: Node) -> None:
        """Views of caches are told by their geometry; ranges that nobody here attends to are handed out."""
        values = _outputs(output)
        windows = {r.argument: r for r in self.reads.get(output, [])}
        plain = [v for v in values if v not in windows and v not in self.returned]
        extra: list[Any] = []

        def add(value: Any) -> int:
            extra.append(value if isinstance(value, Node) else self.pieces.number(value))
            return len(plain) + len(extra) - 1

        taken = 0
        stores: dict[Holder, int] = {}
        parts = self._parts_shown()
        for value in values:
            if value in windows or value in self.returned:
                view = example(value)
                strides, first = view.stride(), offset(view)
                if value in parts:
                    returned, window = parts[value]
                    strides = tuple(1 if a is None else returned.copy.strides[a] for a in window.axes)
                    first = 0
                shown = [add(n) for n in view.shape], [add(n) for n in strides], add(first)
                if value in windows:
                    argument = self.position[windows[value].holder.node]
                    self.rewritten.outputs.append(OutputWindow(argument, *shown))
                    continue
                copy = self.returned[value].copy
                if copy not in stores:
                    stores[copy] = len(stores)
                    made = parts[value][0] if value in parts else self.returned[value]
                    self.rewritten.stores.append(self._new_store(made, add))
                self.rewritten.outputs.append(OutputView(stores[copy], *shown))
                continue
            self.rewritten.outputs.append(taken)
            taken += 1
        self._keep_written(add)
        for i, (delta, layout) in self.told.items():
            self.rewritten.steps.append(OutputSteps(i, add(self.pieces.method("contiguous", delta)), layout))
        if self.tell_changes:
            self._tell_changed(add)
        output.args = ((*plain, *extra),)

    def _parts_shown(self) -> dict[Node, tuple[Returned, Window]]:
        """Outputs that show a range of the tokens of a copy that no other output shows: what is made is these alone."""
        parts = {}
        for value, returned in self.returned.items():
            copy, view = returned.copy, example(value)
            if sum(r.copy is copy for r in self.returned.values()) > 1:
                continue
            window = locate(view.size(), view.stride(), offset(view), copy.shape, copy.strides)
            order = sorted(range(len(copy.shape)), key=lambda a: (-hint(copy.strides[a]), -hint(copy.shape[a])))
            axis = copy.token_axis
            others = [a for a in range(len(copy.shape)) if a != axis]
            if window is None or window.covers(copy.shape, axis):
                continue
            if all(window.covers(copy.shape, a) for a in others):
                start, length = window.starts[axis], window.lengths[axis]
                shape = tuple(length if a == axis else n for a, n in enumerate(copy.shape))
                segments = shift(cut(copy.segments, start, start + length), -start)
                part = replace(copy, shape=shape, strides=dense_strides(shape, order), segments=segments)
                parts[value] = replace(returned, copy=part), window
        return parts

    def _new_store(self, returned: Returned, add: Callable[[Any], int]) -> OutputStore:
        """A packed cache of the tokens that a copy holds."""
        copy, cache, pieces = returned.copy, returned.copy.cache, self.pieces
        plan, roles = self.plans[cache], self.pieces.roles(cache)
        axes = [roles[a] for a in copy.root_axes if a is not None]  # canonical axis of each of the copy's own
        segments = [s for s in copy.segments if not same(s.start, s.stop)]
        cached = [s for s in segments if isinstance(s.content, Cached)]
        ranges = [pieces.number(p) for s in cached for p in (s.content.first, s.content.first + s.length)]
        fresh = [pieces.canonical(s.content, s.length, axes, copy.dtype) for s in segments if s not in cached]  # type: ignore[arg-type]
        value = pieces.concatenate(fresh) if fresh else pieces.no_tokens(pieces.packed(cache)[1], cache, copy.dtype)
        after = returned.grows and cached == segments[:1] and cache.part is None and _is_whole(cached[0], cache)
        packed = *pieces.packed(cache), [] if after else ranges, pieces.stored(value, cache), plan.bits
        made = pieces.call(ops.extend.default, *packed)
        components = [pieces.call(operator.getitem, made, i) for i in range(2)]
        new = next((s for s in segments if s not in cached), None)
        if new is not None and segments[-1] in cached:  # `extend` puts new tokens last
            components = [self._inserted(x, dim, new, copy) for x, dim in zip(components, (2, 3))]
        codes, scales = map(add, components)
        strides = [add(copy.strides[axes.index(role)] if role in axes else 1) for role in range(4)]
        active, held, source = None, None, None
        if fresh and (plan.holds or not returned.grows):
            source = add(pieces.method("clone", value, memory_format=torch.contiguous_format))
        if source is not None and not returned.grows:
            first = next(s.start for s in segments if s not in cached)
            active = source, add(first), add(segments[-1].stop)
        if plan.holds:
            places = [add(p) for s in cached for p in (s.content.first, s.content.first + s.length, s.start)]  # type: ignore[union-attr]
            held = places, source, add(new.start if new is not None else 0)
        return OutputStore(self.position[cache.node], codes, scales, strides, copy.dtype, active, after, held)

    def _inserted(self, packed: Node, dim: int, new: Segment, copy: Holder) -> Node:
        """Codes or scales of which the last tokens, the new ones, are put where they belong."""
        end = copy.shape[copy.token_axis] - new.length
        bounds = ((0, new.start), (end, end + new.length), (new.start, end))
        shown = (slice(*map(self.pieces.number, b)) for b in bounds if not same(*b))
        index = ((*[slice(None)] * dim, part) for part in shown)
        return self.pieces.call(torch.cat, [self.pieces.call(operator.getitem, packed, i) for i in index], dim)

    def _keep_written(self, add: Callable[[Any], int]) -> None:
        """Ranges that are written, and attended to by another graph if at all, go out in full precision."""
        attended = {c for a in self.attends.values() for c in (a.key_cache, a.value_cache)}
        attended |= {c for d in self.dense.values() for c in d.caches}
        writes = [w for written in self.writes.values() for w in written]
        for argument in {self.position[h.node]: None for h in self.plans if h.writes}:
            parts = [h for h in self.plans if self.position[h.node] == argument]
            last = [next((w for w in reversed(writes) if w.holder is part), None) for part in parts]
            alike = all(isinstance(w, Append) and _same_range(w, last[0]) for w in last)
            if not alike or attended.intersection(parts):
                self.rewritten.written.append(argument)
                continue
            held = {w.holder: self._held(w) for w in last if isinstance(w, Append)}
            first = last[0]
            assert isinstance(first, Append)
            whole = [node for part, node in held.items() if part.part is None]
            data = whole[0] if whole else self._all_entries(held, first)
            data = self.pieces.method("clone", data, memory_format=torch.contiguous_format)
            self.rewritten.kept.append(KeptRange(argument, add(data), add(first.start), add(first.stop)))

    def _all_entries(self, held: dict[Holder, Node], write: Append) -> Node:
        """What tokens of a range are in all batch entries and heads of a cache, of which parts were written."""
        pieces, holder, start, stop = self.pieces, write.holder, write.start, write.stop
        halves = [part.part for part in held]
        value = example(holder.node)
        packed_batch = value._store.shape[0] if isinstance(value, PackedKV) else math.prod(value.shape[:2])
        if len(halves) == 2 and value.dim() == 5 and _are_halves(halves, packed_batch):  # keys and values
            return pieces.call(torch.cat, list(held.values()), 0)
        plan, packed = self.plans[holder], [pieces.component(holder, kind) for kind in ("codes", "scales")]
        args = *map(pieces.number, (start, stop)), plan.bits, holder.dtype
        if plan.mean_tokens:
            node = block_means.read(pieces, holder, start, stop, whole=True)
        else:
            node = pieces.from_grid(pieces.call(ops.dequantize.default, *packed, *args), holder)
        if plan.centered:
            node = pieces.call(torch.add, node, pieces.component(holder, "center"))
        for part, value in held.items():
            pieces.method("copy_", pieces.within(node, part), value)
        return node

    def _tell_changed(self, add: Callable[[Any], int]) -> None:
        """Which tokens the graph writes, moves and fills, of the caches of which it does nothing else."""
        for argument in {self.position[h.node]: None for h in self.plans if h.writes}:
            writes = [w for ws in self.writes.values() for w in ws if self.position[w.holder.node] == argument]
            ranges = [_range_of(w) for w in writes if not isinstance(w, Scatter)]
            if len(ranges) == len(writes):
                self.rewritten.changed[argument] = [(add(start), add(stop)) for start, stop in ranges]

    def _held(self, write: Append | Scatter) -> Node:
        """What a write puts into a cache, in full precision."""
        if isinstance(write, Scatter):
            fresh, length = Fresh(write.value, write.axes, 0), example(write.positions).shape[0]
        else:
            fresh, length = Fresh(write.value, write.axes, write.first), write.stop - write.start
        return self.pieces.canonical(fresh, length, self.pieces.roles(write.holder), write.holder.dtype)

    def _order_inputs(self) -> None:
        components = {node: (self.position[cache], kind) for (cache, kind), node in self.pieces.components.items()}
        for node in self.graph.find_nodes(op="placeholder"):
            _, kind = components.get(node, (0, "plain"))
            if kind in ("first_token", "steps") and not node.users:
                self.graph.erase_node(node)
                continue
            self.rewritten.inputs.append(components.get(node) or (self.position[node], "plain"))

    def _erase_edited_copies(self) -> None:
        """Copies of a cache that are written to, and now read by nothing: their contents went into the attention."""
        for copy in reversed(self.copies):
            key = identity(example(copy.node))
            shown = [n for n in self.graph.nodes if isinstance(v := example(n), torch.Tensor) and identity(v) == key]
            users = {user for node in shown for user in node.users if user not in shown}
            if all(user.target is operator.setitem and user.args[0] in shown for user in users):
                for node in [*users, *reversed(shown)]:
                    self.graph.erase_node(node)

    def _erase_dead(self) -> None:
        """Views, copies and edited copies of caches that nothing uses any more."""
        caches, from_cache = {holder.node for holder in self.plans}, set[Node]()
        for node in self.graph.nodes:
            if node in caches or any(a in from_cache for a in node.all_input_nodes):
                from_cache.add(node)
        for node in reversed(list(self.graph.nodes)):
            removable = node.op in ("call_method", "call_function") and node in from_cache and not node.users
            if removable and isinstance(example(node), (torch.Tensor, list, tuple)) and not is_in_place(node):
                self.graph.erase_node(node)


def _mixes(channels: Channels, key: Node) -> bool:
    """Whether Δ of an output cannot tell another graph of its errors, as some channels have one of several."""
    try:
        return channels.pairs(key, key) is not None
    except NotLinear:
        return True


def _are_halves(parts: list[Any], batch: int) -> bool:
    """Whether two parts are of batch entries alone, of all that there are, the first half first."""
    (one, heads), (other, other_heads) = parts
    if heads is not None or other_heads is not None or one is None or other is None:
        return False
    return same(one[0], 0) and same(other[0], one[1]) and same(one[1] + other[1], batch)


def _outputs(output: Node) -> list[Any]:
    """What a graph returns."""
    values: Any = output.args[0]
    return list(values) if isinstance(values, (tuple, list)) else [values]


def _is_whole(segment: Segment, cache: Holder) -> bool:
    """Whether cached tokens are all that the cache holds."""
    content = segment.content
    return (
        isinstance(content, Cached) and same(content.first, 0) and same(segment.length, cache.shape[cache.token_axis])
    )


def _range_of(write: Append | Move | Fill) -> tuple[int, int]:
    """The tokens [start, stop) that a write changes."""
    if isinstance(write, Move):
        return write.destination, write.destination + write.length
    return write.start, write.stop


def _same_range(write: Append, other: object) -> bool:
    return isinstance(other, Append) and same(write.start, other.start) and same(write.stop, other.stop)
