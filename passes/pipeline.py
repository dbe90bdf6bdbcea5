"""Decides, for one graph of Dynamo's, what becomes of it: track, choose the caches, rewrite, report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..adopt import Written, obstacle, place_of
from ..compat import dynamic_input, input_like, static_input
from ..config import Config
from ..geometry import same
from ..glimpse import Glimpse
from ..hints import is_ignored, is_marked
from ..kernels.block_means import blocks, nothing_written
from ..kernels.held import no_ranges
from ..kernels.quantizers import grid_of
from ..kernels.retention import no_places
from ..packed import PackedKV
from ..reasons import BUDGET, CLUSTERS, MEANS, PER_CHANNEL
from ..report import GraphReport, Rejected
from ..store import Store
from .actions import Append, Attend, Dense, Fill, Holder, Move, Returned, Scatter, Tracking
from .apart import tell_apart
from .attention_forms import SPELLED, as_attention
from .canonicalise import canonicalise
from .describe import describe, source_line
from .filled import join_filled
from .handed import Attended, Handed, Passages
from .nodes import example
from .own_tokens import hold_what_changes, make_own
from .pieces import CachePlan, Component
from .printing import graph_text
from .retain import ReadAsTensor, why_not_kept
from .rewrite import Rewritten, copy_graph, rewrite
from .roles import Roles
from .segments import Fresh
from .sources import Sources
from .spelled_writes import spell_out_writes
from .tracking import ONE_PACKED, Tracker
from .uncertainty import StepLayout
from .unpacked import Unknown, Unpacked

Action = Attend | Dense | Returned
NEWEST_UNKNOWN = (
    "packed, but recent={} is not honoured: it is written at places that a tensor holds, so that which tokens are the "
    "newest is not known"
)
OF_SOME_HEADS = "sink and recent hold tokens of all heads, and only some of its heads are used together"
NOT_SLICES = "this one is not known to be written in slices"
UNKNOWN = "what it reads is written to, and has no three dimensions or more of which one runs along tokens"
NO_CHUNK = "it is not told of how many: give as many tokens as the model writes at a time as center_tokens=, 8 or more"
FLEX_BY_GROUPS = "these are attended by flex_attention, whose score function takes steps of a few groups"
ONE_SIDE = "only one of key and value comes from a cache"


@dataclass
class WrittenRange:
    """A plain tensor that a graph writes a slice of: expressions for the range, in the symbols of integer arguments."""

    argument: int
    start: int
    stop: int


@dataclass
class Plan:
    """What becomes of a graph.

    outcome: "untouched", it has nothing to do with a cache; "adopted", its plain caches are packed when it is called;
    "watched", it attends to tensors that are caches if they come again in a later call, and are packed then;
    "packed", its caches are packed already (as some may be in the two before); "eager", it does to a packed cache what
    only eager code can express.
    """

    outcome: str
    report: GraphReport
    attentions: int
    rewritten: Rewritten | None = None
    owners: dict[int, Tensor] = field(default_factory=dict)  # by argument: the cache that it is a view of
    places: dict[int, int] = field(default_factory=dict)  # by argument: where that view begins in the cache's memory
    written: list[WrittenRange] = field(default_factory=list)
    first_tokens: dict[int, int] = field(default_factory=dict)  # by argument: the symbol of where its window begins
    ignores: bool = False  # tensors of the call that is compiled are to be left alone; those of others may be packed
    marked: set[int] = field(default_factory=set)  # arguments that are caches because they were marked as such
    glimpses: list[Glimpse] = field(default_factory=list)
    handed: list[Handed] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)
    unpacked: list[Unpacked] = field(default_factory=list)
    handed_in: dict[int, Tensor] = field(default_factory=dict)  # by argument: fakes of what another graph has read
    symbols: dict[Any, int] = field(default_factory=dict)  # by symbol: the argument that carries its value
    lost: str = ""  # why attention of the graph cannot run as it is: it would read tokens that were dropped
    instead: Plan | None = None  # what becomes of it while its plain caches stay so, where others are packed already

    def caches(self, example_inputs: Sequence[Any]) -> list[Tensor]:
        """The tensors that are packed, or are those of which a part enters the graph."""
        packed = {} if self.rewritten is None else self.rewritten.caches
        return [self.owners.get(i, example_inputs[i]) for i in packed]

    def inner_inputs(self, example_inputs: Sequence[Any]) -> list[Any]:
        """Example inputs of the rewritten graph."""
        assert self.rewritten is not None
        inputs = []
        for argument, component in self.rewritten.inputs:
            value = example_inputs[argument]
            if component == "plain":
                inputs.append(value)
            elif component == "active":
                batch, heads, _, head_dim = value._store.shape
                inputs.append(dynamic_input((batch, heads, 2, head_dim), 2, value.dtype, value.device))
            elif component == "first_token":
                inputs.append(self.first_tokens[argument])
            elif component == "active_range":
                inputs.append(static_input(torch.zeros(2, dtype=torch.int64)))
            elif component in ("places", "salience"):
                tokens, rows = int(value._store.shape[2]), int(value.codes.shape[2])
                retained = no_places(tokens) if component == "places" else torch.zeros(rows, device=value.device)
                inputs.append(static_input(retained))
            elif component in ("held", "held_ranges"):
                inputs.append(_held_input(value._store, component))
            elif component == "center":
                batch, heads, _, head_dim = map(int, value._store.shape)
                center = torch.zeros(batch, heads, 1, head_dim, dtype=value._store.dtype, device=value.device)
                inputs.append(static_input(center))
            elif component in ("means", "extents"):
                inputs.append(_means_input(value._store, component))
            elif component == "steps":
                inputs.append(input_like(self.handed_in[argument]))
            else:
                inputs.append(getattr(value, component))  # the tensor that Dynamo has seen
        return inputs


def _held_input(store: Store, component: Component) -> Tensor:
    """An example of what a cache holds in full precision for good, or of which tokens those are."""
    batch, heads, _, head_dim = map(int, store.shape)
    sink, recent = store.held_tokens
    if component == "held_ranges":
        return static_input(no_ranges(batch, sink, recent))
    rows = batch, heads, sink + 2 * recent, head_dim
    return static_input(torch.zeros(rows, dtype=store.dtype, device=store.device))


def _means_input(store: Store, component: Component) -> Tensor:
    """An example of the means of a cache's blocks, or of what is told of these blocks."""
    batch, heads, length, head_dim = map(int, store.shape)
    if component == "extents":
        return static_input(nothing_written(batch, heads, length, store.mean_tokens))
    rows = batch, heads, blocks(length, store.mean_tokens), head_dim * grid_of(store.quantizer).tables
    return static_input(torch.zeros(rows, dtype=store.dtype, device=store.device))


def plan_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    written: Written,
    layouts: Mapping[int, StepLayout] | None = None,
    made: Collection[int] = (),
) -> Plan:
    """Decide what becomes of a graph, and rewrite a copy of it where caches are to be packed or are packed already.

    Args:
        layouts: by argument: which channels have one Δ, of what another graph has read from a packed cache.
        made: arguments that another graph has made of cached tokens; written to, they are no caches for that.

    Raises:
        ConfigurationError: groups do not tile the head_dim of a cache that would be packed.
    """
    report = GraphReport(len(gm.graph.nodes), "untouched", before=graph_text(gm.graph))
    return _plan(gm, example_inputs, config, written, report, layouts or {}, made, adopting=True)


def _plan(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    written: Written,
    report: GraphReport,
    layouts: Mapping[int, StepLayout],
    made: Collection[int],
    adopting: bool,
    read_as_tensors: frozenset[str] = frozenset(),
) -> Plan:
    """`plan_graph`; unless `adopting`, plain caches stay plain, as beside packed ones that have to be served anyway."""
    view = _View(gm, example_inputs, written, layouts, made, read_as_tensors=read_as_tensors)
    report.rejections = view.rejections()
    if config.correction == "none":  # and nothing is lost
        report.rejections = [r for r in report.rejections if r.reason != ONE_PACKED]
    reasons = view.beyond_graphs()
    if reasons:
        report.outcome = "eager"
        report.rejections += [Rejected("graph", reason) for reason in reasons]
        return Plan("eager", report, view.attentions, lost=view.loses_tokens())
    attentions = view.attentions
    unknown = Unknown(view.gm.graph, view.position, example_inputs, config)
    choice = _choose(view, config, report, adopting)
    while choice.plans or layouts:
        alone = view.not_lowered(choice.plans)  # that attention stays exactly as it is spelled
        across = view.written_across(choice.plans)
        if not alone and not across:
            break
        apart = view.as_spelled | alone, view.read_out | across, read_as_tensors
        view = _View(gm, example_inputs, written, layouts, made, *apart)
        choice = _choose(view, config, GraphReport(0, "untouched"), adopting)
    plans = choice.plans
    report.rejections = list(dict.fromkeys(report.rejections))
    plan = Plan(choice.outcome if plans else "packed" if layouts else "untouched", report, attentions)
    plan.symbols = _symbol_arguments(view.placeholders)
    plan.written = _written_ranges(view, plan.symbols, plans)
    if plan.outcome in ("untouched", "packed"):
        plan.glimpses = _glimpses(view)
    if plan.outcome != "adopted":
        plan.handed, plan.attended = unknown.passages.handed(), view.attended(unknown.passages)
    if not view.left:  # that attention is told of, and may be what reads them
        plan.unpacked = list(unknown.tensors(plan.handed, {view.position[h.node] for h in plans}))
    if not plans and not layouts:
        _note(plan, unknown, set())
        return plan
    report.outcome = plan.outcome
    report.caches = [h.node.name for h in plans]
    ignored = {h for h in plans if is_ignored(view.cache(h))}
    tracking = _settled(view.tracking, plans)
    matches, unasked = describe(tracking, plans, ignored)
    report.rejections += unasked
    telling = view.telling(plan.handed) if config.correction != "none" else {}
    tells_changes = config.offload is not None
    try:
        plan.rewritten = rewrite(view.gm, tracking, plans, config.correction, tells_changes, view.handed, telling)
    except ReadAsTensor as error:
        anew = GraphReport(report.nodes, "untouched", before=report.before)
        vars(report).update(vars(anew))
        found = read_as_tensors | {error.name}
        return _plan(gm, example_inputs, config, written, report, layouts, made, adopting, found)
    plan.handed_in = {view.position[p]: example(p) for p in view.handed}
    for node, why in plan.rewritten.uncorrected.items():
        if why and node in matches:
            matches[node] = replace(matches[node], lowering=f"dequantized, not corrected: {why}")
    lowered = {a.call.node for a in tracking.attends} | plan.rewritten.uncorrected.keys()
    report.matches = [match for node, match in matches.items() if node in lowered]
    report.rejections += _without_newest(tracking, plans)
    _note(plan, unknown, {n.meta.get(SPELLED, n.name) for n in matches if n in lowered})
    report.after = graph_text(plan.rewritten.graph.graph)
    plan.owners = {i: o for i, o in view.owners.items() if i in plan.rewritten.caches}
    plan.places = {i: place_of(example_inputs[i], owner) for i, owner in plan.owners.items()}
    plan.ignores = bool(ignored)
    plan.marked = {view.position[h.node] for h in choice.needed}
    plan.first_tokens = {view.position[h.node]: example(h.node).first_token.shape[0] for h in plans if h.packed}
    if any(h.packed for h in plans) and (plan.ignores or plan.outcome == "watched"):
        scratch = GraphReport(0, "untouched")
        plan.instead = _plan(gm, example_inputs, config, written, scratch, layouts, made, adopting=False)
    return plan


def _without_newest(tracking: Tracking, plans: dict[Holder, CachePlan]) -> list[Rejected]:
    """Caches whose newest tokens are to be held in full precision, and are not."""
    scattered = [w for w in tracking.writes if isinstance(w, Scatter) and w.holder in plans]
    asked = [(w, plans[w.holder].held[1]) for w in scattered]
    told = (Rejected(source_line(w.node), NEWEST_UNKNOWN.format(recent)) for w, recent in asked if recent)
    return list(dict.fromkeys(told))


def _note(plan: Plan, unknown: Unknown, matched: set[str]) -> None:
    """Tell of attention that is neither matched nor rejected, and may read cached tokens."""
    rejected = {r.source for r in plan.report.rejections}
    for unpacked in unknown.attention(matched):
        if unpacked.near_miss and unpacked.source not in rejected:
            plan.report.rejections.append(Rejected(unpacked.source, unpacked.reason))
        elif unpacked.source not in rejected:
            plan.unpacked.append(unpacked)


class _View:
    """A copy of a graph, its attention in one form (but for that of nodes `as_spelled`), and what was seen of caches.

    What the nodes `read_out` write is read as a tensor. So are the inputs `read_as_tensors`, as was found when they
    were to keep some of their tokens only.

    Where keys and values are written as a slice of a cache that another graph wrote, `owners` has it by argument;
    `handed` are the inputs that another graph has read from a cache.
    """

    def __init__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        written: Written,
        layouts: Mapping[int, StepLayout],
        made: Collection[int],
        as_spelled: frozenset[str] = frozenset(),
        read_out: frozenset[str] = frozenset(),
        read_as_tensors: frozenset[str] = frozenset(),
    ) -> None:
        self.gm, _ = copy_graph(gm)
        self.example_inputs, self.as_spelled, self.read_out = example_inputs, as_spelled, read_out
        self.made, self.read_as_tensors, self.written = made, read_as_tensors, written
        spell_out_writes(self.gm.graph)
        join_filled(self.gm.graph)
        tell_apart(self.gm.graph)
        make_own(self.gm.graph, read_out)
        hold_what_changes(self.gm.graph)
        self.left = canonicalise(self.gm.graph, as_spelled)
        self.placeholders = list(self.gm.graph.find_nodes(op="placeholder"))
        self.position = {p: i for i, p in enumerate(self.placeholders)}
        self.owners = _owners(self.placeholders, example_inputs, written)
        owners = {self.placeholders[i]: o for i, o in self.owners.items()}
        marked = [p for p, v in zip(self.placeholders, example_inputs) if isinstance(v, Tensor) and is_marked(v)]
        self.handed = {self.placeholders[i]: layout for i, layout in layouts.items()}
        passages = Passages(self.gm.graph, self.position)

        def handed(key: Node) -> tuple[Node, ...]:
            return tuple(p for p in passages.of(key) if p in self.handed)

        current = passages.current([*owners, *marked])
        self.tracking = Tracker(self.gm.graph, owners, current, handed).run()
        self.attentions = len(self.left) + sum(as_attention(n) is not None for n in self.gm.graph.nodes)

    def argument(self, holder: Holder) -> Any:
        """The value that a cache enters the graph as, in the call that is compiled."""
        return self.example_inputs[self.position[holder.node]]

    def cache(self, holder: Holder) -> Any:
        """That value, or the cache that it is a slice of."""
        return self.owners.get(self.position[holder.node], self.argument(holder))

    def written_elsewhere(self, holder: Holder) -> bool:
        return self.position[holder.node] in self.owners

    def rejections(self) -> list[Rejected]:
        """Attention over something like a cache that has no packed form."""
        tracked = [r for r in self.tracking.rejections if any(_looks_cached(c) for c in r.caches)]
        found = [(r.node, r.reason) for r in tracked] + [(left.node, left.reason) for left in self.left]
        found += [(node, UNKNOWN) for node in self._not_followed()]
        return [Rejected(source_line(node), reason) for node, reason in found]

    def _not_followed(self) -> list[Node]:
        """Attention over something that the graph writes to, and that was not recognized as a cache."""
        tracking, sources = self.tracking, Sources(self.gm.graph)
        followed = {attend.call.node for attend in tracking.attends} | {dense.call.node for dense in tracking.dense}
        followed |= {rejection.node for rejection in tracking.rejections}
        calls = [call for node in self.gm.graph.nodes if (call := as_attention(node)) is not None]
        return [
            call.node
            for call in calls
            if call.node not in followed and sources.written_before(call.query, call.key, call.value)
        ]

    def beyond_graphs(self) -> list[str]:
        """What the graph does to packed caches that only eager code can."""
        packed = [h for h in self.tracking.caches if h.packed]
        stores = {h.node: id(self.argument(h)._store.owner) for h in packed}
        changed = {stores[h.node] for h in packed if h.writes}
        aliased = any(list(stores.values()).count(store) > 1 for store in changed)
        reasons = ((h, reason) for h in packed for reason in (*h.blockers, self._not_packed(h)))
        blocked = [f"{h.node.name}: {reason}" for h, reason in reasons if reason is not None]
        return blocked or (["two views of one cache enter it"] if aliased else [])

    def loses_tokens(self) -> str:
        """Why a graph that attends has no packed form for caches of which tokens may have been dropped: as written, it
        would attend to zeros. Empty, where there is no such."""
        kept = [h for h in self.tracking.caches if self.attentions and h.packed and _packed_plan(h).keeps]
        reasons = ((h, r) for h in kept for r in (*h.blockers, self._not_packed(h)) if r is not None)
        return "; ".join(f"{h.node.name}: {reason}" for h, reason in reasons)

    def attended(self, passages: Passages) -> list[Attended]:
        """What attention may have been handed by other graphs; not of what only eager code could serve once packed."""
        blocked = {self.position[h.node] for h in self.tracking.caches if h.blockers and not h.packed}
        written = tuple(self.position[h.node] for h in self.tracking.caches if not h.packed and _looks_cached(h))
        attended = (one for one in passages.attended() if not blocked.intersection((*one.keys, *one.values)))
        return [replace(one, written=written) for one in attended]

    def _not_packed(self, holder: Holder) -> str | None:
        """Why what is done to a packed cache has no packed form of its quantizer."""
        plan = _packed_plan(holder)
        in_blocks = self.not_in_blocks(holder, plan.quantizer, plan.block)
        in_blocks = in_blocks or self.not_less_means(holder, plan.quantizer, plan.mean_tokens)
        kept = self.not_kept(holder, plan.keeps) if plan.keeps else None
        return in_blocks or kept or self.not_held(holder, plan.quantizer, plan.held)

    def not_kept(self, holder: Holder, policy: str) -> str | None:
        """Why a cache cannot keep some of its tokens only, as `policy` tells."""
        return why_not_kept(holder, self.tracking, holder.node.name in self.read_as_tensors, policy)

    def not_in_blocks(self, holder: Holder, quantizer: str, block: int) -> str | None:
        """Why a cache cannot be of a quantizer whose blocks of tokens share their steps.

        Numbers by which tokens are moved are those of the call that is compiled. Of others, and once it is packed, the
        operator refuses those that are no multiples.
        """
        if block == 1:
            return None
        alone = sum(h.node is holder.node for h in self.tracking.caches) == 1
        why = self._apart(holder, block, "block_tokens") if alone else "several caches lie in one tensor"
        return None if why is None else PER_CHANNEL.format(quantizer, why)

    def not_less_means(self, holder: Holder, quantizer: str, tokens: int) -> str | None:
        """Why a cache cannot be stored less means of so many tokens each (0, of none), or centroids; as
        `not_in_blocks`."""
        why = self._apart(holder, tokens, "center_tokens") if tokens else None
        if why is None:
            return None
        grid = grid_of(quantizer)
        return CLUSTERS.format(grid.quantizer, why) if grid.clustered else MEANS.format(tokens, why)

    def chunk(self, holders: Sequence[Holder]) -> int:
        """The most tokens that are written to one of these caches at a time, in the call that is compiled; of what is
        not written, how many it has. 0 where only the data tells."""
        found = []
        for holder in holders:
            writes = [w for w in self.tracking.writes if isinstance(w, Append) and w.holder.node is holder.node]
            found += [_hint(w.stop - w.start) or 0 for w in writes]
            if not writes and self.written_elsewhere(holder):
                start, stop = self.written.last_range(self.cache(holder))
                found.append(stop - start)
            elif not writes:
                found.append(_hint(holder.shape[holder.token_axis]) or 0)
        return max(found, default=0)

    def _apart(self, holder: Holder, block: int, setting: str) -> str | None:
        """How a graph takes apart what so many tokens of a cache, which a setting tells, have in common."""
        tracking, same_tensor = self.tracking, [h for h in self.tracking.caches if h.node is holder.node]
        writes = [w for w in tracking.writes if w.holder in same_tensor]
        moves = [w for w in writes if isinstance(w, Move) and not holder.packed]
        moved = [n for w in moves for n in (w.source, w.destination, w.length)]
        apart = next((n for n in map(_hint, moved) if n is None or n % block), 0)
        if any(isinstance(w, Scatter) for w in writes):
            return "these are written at places that a tensor holds"
        if apart != 0:
            told = "numbers that only the data tells" if apart is None else apart
            return f"these are moved: expected numbers of tokens that {block} divides, not {told}; choose {setting}= so"
        if any(r.copy.cache is holder for r in tracking.returned):
            return "these are joined with new tokens and returned"
        return None

    def not_held(self, holder: Holder, quantizer: str, window: tuple[int, int]) -> str | None:
        """Why a cache cannot be of a quantizer: it is set to a number that this does not hold.

        Nor with a `window`, of the first tokens and the newest in full precision, which all heads have in common.
        """
        if any(window) and holder.part is not None and holder.part[1] is not None:
            return OF_SOME_HEADS
        fills = (w.value for w in self.tracking.writes if isinstance(w, Fill) and w.holder.node is holder.node)
        value = next((v for v in fills if not grid_of(quantizer).holds(v)), None)
        return None if value is None else f"it is filled with {value}, which quantizer={quantizer!r} cannot hold"

    def not_lowered(self, plans: dict[Holder, CachePlan]) -> frozenset[str]:
        """Attention that was brought into one form, and is not going to be rewritten: what it was called."""
        tracking = _settled(self.tracking, plans)
        lowered = {a.call.node for a in tracking.attends if a.key_cache in plans}
        lowered |= {d.call.node for d in tracking.dense if d.handed or any(h in plans for h in d.key_caches)}
        nodes = [n for n in self.gm.graph.nodes if as_attention(n) is not None and n not in lowered]
        return frozenset(n.meta[SPELLED] for n in nodes if SPELLED in n.meta)

    def telling(self, handed: Sequence[Handed]) -> dict[int, list[Node]]:
        """Outputs that another graph attends to as keys, and the inputs that these come from."""
        found: dict[int, list[Node]] = {}
        for one in handed:
            value, node = self.example_inputs[one.argument], self.placeholders[one.argument]
            if node in self.handed or (isinstance(value, PackedKV) and value._store.tells_steps):
                found.setdefault(one.output, []).append(node)
        return found

    def written_across(self, plans: dict[Holder, CachePlan]) -> frozenset[str]:
        """Writes of a view of one cache to another: what they are called."""
        appended = {w.node: w.value for w in self.tracking.writes if isinstance(w, Append) and w.holder in plans}
        reads = (r for r in self.tracking.reads if r.holder in plans)
        return frozenset(r.consumer.name for r in reads if appended.get(r.consumer) is r.argument)


def _settled(tracking: Tracking, plans: dict[Holder, CachePlan]) -> Tracking:
    """Where only keys or only values are packed, or they are stored less centroids, attention reads them as tensors."""
    read = [(a, why) for a in tracking.attends if (why := _why_read(a, plans))]
    if not read:
        return tracking
    dense = [Dense(a.call, [a.key_cache], [a.value_cache], a.gathers, why) for a, why in read]
    attends = [a for a, _ in read]
    return replace(
        tracking,
        attends=[a for a in tracking.attends if a not in attends],
        dense=[*tracking.dense, *dense],
        reads=[*tracking.reads, *(read for a in attends for read in a.reads)],
    )


def _why_read(attend: Attend, plans: dict[Holder, CachePlan]) -> str:
    """Why an attention over caches as they are reads them as tensors; empty where it does not."""
    sides = [plans.get(cache) for cache in (attend.key_cache, attend.value_cache)]
    if (sides[0] is None) != (sides[1] is None):
        return "only its keys or its values are packed"
    cached = any(not isinstance(s.content, Fresh) for s in attend.key)
    clustered = any(plan is not None and grid_of(plan.quantizer).clustered for plan in sides)
    return "tokens are stored less centroids" if cached and clustered else ""


@dataclass
class _Choice:
    """The caches to pack or packed already, and what becomes of their graph; `needed` are known by a hint only."""

    outcome: str
    plans: dict[Holder, CachePlan]
    needed: set[Holder] = field(default_factory=set)


def _choose(view: _View, config: Config, report: GraphReport, adopting: bool) -> _Choice:
    """The caches of a graph. Why others are none is added to `report`."""
    tracking = view.tracking
    packed = {h: _packed_plan(h) for h in tracking.caches if h.packed}
    if not adopting:
        return _Choice("packed", packed)
    returned = {r.copy.cache for r in tracking.returned if r.grows or r.mirrors}

    def gathers(action: Action, holder: Holder) -> bool:
        """A cache gathers tokens: it is written slice by slice, never as a whole (as what a context gives once)."""
        written = _looks_cached(holder) and view.position[holder.node] not in view.made
        return holder in returned or view.written_elsewhere(holder) or written

    plans = _adoptable(view, gathers, config, report)
    marked = {h for h in tracking.caches if not h.packed and is_marked(view.cache(h))}
    more = _adoptable(view, lambda _, holder: holder in marked, config, report) if marked else {}
    needed = more.keys() - plans.keys()
    plans = {**more, **plans}
    if plans:
        return _Choice("adopted", {**packed, **plans}, needed)
    plans = _adoptable(view, _may_persist, config, report)
    if config.policy and plans:  # one of a pair might come again, and be packed without the other
        report.rejections += [Rejected(h.node.name, BUDGET.format(NOT_SLICES)) for h in plans]
        return _Choice("packed", packed)
    if plans or not packed:
        return _Choice("watched", {**packed, **plans})
    return _Choice("packed", packed)


def _owners(placeholders: list[Node], example_inputs: Sequence[Any], written: Written) -> dict[int, Tensor]:
    """Plain arguments that show a cache which another graph has written, and that cache."""
    owners = {}
    for i, value in enumerate(example_inputs):
        if type(value) is Tensor and isinstance(example(placeholders[i]), Tensor):
            owner = written.owner(value)
            if owner is not None:
                owners[i] = owner
    return owners


def _glimpses(view: _View) -> list[Glimpse]:
    """Attention over plain arguments, which may be slices of caches that eager code writes."""
    roles, position = Roles(view.gm.graph), view.position
    found = {}
    for node in view.gm.graph.nodes:
        if (call := as_attention(node)) is not None:
            key, value = roles.input_of(call.key), roles.input_of(call.value)
            if key in roles.axes and value in roles.axes and not call.result.requires_grad:
                glimpse = Glimpse(position[key], position[value], roles.axes[key], roles.axes[value])  # type: ignore[index]
                found[glimpse.key, glimpse.value] = glimpse
    return list(found.values())


def _packed_plan(holder: Holder) -> CachePlan:
    store = example(holder.node)._store
    group_size = int(store.group_size)  # of what is traced with dynamic sizes, an expression
    told = store.bits, group_size, store.quantizer, store.held_tokens, store.centered
    rows = int(store.memory[0].shape[2]) if store.keeps else 0
    return CachePlan((0, 1, 2, 3), *told, mean_tokens=store.mean_tokens, keeps=store.keeps, rows=rows)


def _adoptable(
    view: _View, is_cache: Callable[[Action, Holder], bool], asked: Config, report: GraphReport
) -> dict[Holder, CachePlan]:
    """The plain caches to pack: those that attention reads as keys and as values, and that `is_cache` holds for.

    Beside others: what else a single attention reads stays as it is.
    """
    tracking = view.tracking
    plans: dict[Holder, CachePlan] = {}
    mirrored = [r for r in tracking.returned if r.mirrors]
    actions: list[Action] = [*tracking.attends, *tracking.dense, *mirrored]
    sides = [{h.node for action in actions for h, _ in _read_by(action)[side]} for side in range(2)]
    for action in actions:
        keys, values = _read_by(action)
        keys, values = ([(h, a) for h, a in side if h.packed or is_cache(action, h)] for side in (keys, values))
        caches = [h for h, _ in (*keys, *values) if not h.packed]
        config = asked
        if asked.clustered and not asked.center_tokens and (chunk := view.chunk(caches)) >= 8:
            config = asked.in_blocks_of(chunk)
        if not keys or not values:
            alone = isinstance(action, (Attend, Dense)) and not action.gathers  # otherwise it may persist
            if alone and any(map(_looks_cached, caches)):
                report.rejections.append(Rejected(source_line(action.call.node), ONE_SIDE))  # type: ignore[union-attr]
            continue
        for holder in caches:
            value, cache = view.argument(holder), view.cache(holder)
            if isinstance(value, torch.nn.Parameter):
                break  # learned keys: no near miss
            reason = obstacle(cache, views=int(cache is not value)) or next(iter(holder.blockers), None)
            if holder in dict(keys) and grid_of(config.key_quantizer).per_channel:
                reason = reason or _not_by_channel(view, holder, dict(values), config)
            sides_of = (side for side, of in (("keys", keys), ("values", values)) if holder in dict(of))
            tokens = config.mean_tokens(*sides_of)
            reason = reason or view.not_less_means(holder, config.quantizer, tokens)
            if config.clustered and not tokens:
                reason = reason or CLUSTERS.format(config.quantizer, NO_CHUNK)
            reason = reason or view.not_held(holder, config.quantizer, config.window)
            reason = reason or (view.not_kept(holder, config.policy) if config.policy else None)
            if reason is not None:
                node = action.argument if isinstance(action, Returned) else action.call.node
                report.rejections.append(Rejected(source_line(node), f"{holder.node.name}: {reason}"))
                break
        else:
            for pairs, bits, quantizer, side in (
                (keys, config.key_bits, config.key_quantizer, "keys"),
                (values, config.value_bits, config.value_quantizer, "values"),
            ):
                for holder, axes in pairs:
                    if holder.packed:
                        continue
                    config.check_head_dim(int(holder.shape[axes[3]]))
                    centered, means = config.centers(side), config.mean_tokens(side)
                    if holder.node in sides[0] & sides[1]:  # keys and values lie in one tensor
                        bits, centered = max(config.key_bits, config.value_bits), bool(config.center)
                        means = config.mean_tokens("keys", "values")
                    shares, one_mean = config.shares(quantizer), centered and not means
                    settings = bits, shares, quantizer, config.window, one_mean, holder.fold
                    rows = config.rows(_hint(holder.shape[axes[2]]) or 1) if config.policy else 0
                    plans.setdefault(holder, CachePlan(axes, *settings, means, config.policy, rows))
    for part in [h for h in tracking.caches if h.part is not None and h not in plans]:
        other = next((h for h in plans if h.node is part.node), None)
        if other is not None:  # the tensor is packed as a whole
            plans[part] = plans[other]
    return plans


def _not_by_channel(view: _View, holder: Holder, values: dict[Holder, tuple[int, ...]], config: Config) -> str | None:
    """Why keys cannot be packed by channel."""
    if holder in values:
        return PER_CHANNEL.format(config.quantizer, "keys and values lie in one tensor")
    if (reason := view.not_in_blocks(holder, config.quantizer, config.shares(config.quantizer))) is not None:
        return reason
    if any(d.call.others is not None for d in view.tracking.dense if holder in d.key_caches):
        return PER_CHANNEL.format(config.quantizer, FLEX_BY_GROUPS)
    return None


def _hint(n: int) -> int | None:
    """A number, as it is in the call that is compiled; None where only the data tells."""
    if isinstance(n, torch.SymInt):
        return int(n.node.hint) if n.node.has_hint() else None
    return n


def _read_by(action: Action) -> tuple[list[tuple[Holder, tuple[int, ...]]], list[tuple[Holder, tuple[int, ...]]]]:
    """The caches that keys, and that values are read from, with their axes by role."""
    if isinstance(action, Attend):
        return [(action.key_cache, action.key_axes)], [(action.value_cache, action.value_axes)]
    if isinstance(action, Returned):  # keys beside values, as far as can be seen
        both = [(action.copy.cache, action.copy.cache.roles)]
        return both, both
    keys, values = ([(h, h.roles) for h in caches] for caches in (action.key_caches, action.value_caches))
    return keys, values


def _may_persist(action: Action, holder: Holder) -> bool:
    """Attended together with tokens of this graph: the past, if it is still there in a later call."""
    return not isinstance(action, Returned) and action.gathers


def _looks_cached(holder: Holder) -> bool:
    if holder.packed or holder.refused:
        return True
    return holder.scattered or any(
        not same(stop - start, holder.shape[holder.token_axis]) for _, start, stop in holder.writes
    )


def _symbol_arguments(placeholders: list[Node]) -> dict[Any, int]:
    symbols = {}
    for i, node in enumerate(placeholders):
        value = example(node)
        if isinstance(value, torch.SymInt) and value.node.expr.is_symbol:
            symbols[value.node.expr] = i
    return symbols


def _written_ranges(view: _View, symbols: dict[Any, int], plans: dict[Holder, CachePlan]) -> list[WrittenRange]:
    """Slices that the graph writes of tensors that stay plain, where integer arguments tell their range."""
    ranges = {}
    for write in view.tracking.writes:
        holder = write.holder
        if holder in plans:
            continue
        if isinstance(write, Append) and holder.root is None and not holder.blockers and _looks_cached(holder):
            positions = [p.node.expr for p in (write.start, write.stop) if isinstance(p, torch.SymInt)]  # type: ignore[attr-defined]
            if all(s in symbols for p in positions for s in p.free_symbols):
                ranges[holder.node] = WrittenRange(view.position[holder.node], write.start, write.stop)
    return list(ranges.values())
