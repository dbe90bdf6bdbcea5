"""Decides, for one graph of Dynamo's, what becomes of it: track, choose the caches, rewrite, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..adopt import Written, obstacle
from ..compat import dynamic_input, static_input
from ..config import Config
from ..geometry import same
from ..glimpse import Glimpse
from ..hints import is_ignored, is_marked
from ..report import GraphReport, Rejected
from .actions import Append, Attend, Dense, Holder, Returned, Tracking
from .attention_forms import as_attention
from .canonicalise import canonicalise
from .describe import describe, source_line
from .nodes import example
from .pieces import CachePlan
from .printing import graph_text
from .rewrite import Rewritten, copy_graph, rewrite
from .roles import Roles
from .tracking import Tracker


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
    "packed", its caches are packed already; "eager", it does to a packed cache what only eager code can express.
    """

    outcome: str
    report: GraphReport
    attentions: int
    rewritten: Rewritten | None = None
    owners: dict[int, Tensor] = field(default_factory=dict)  # by argument: the cache that it is a view of
    written: list[WrittenRange] = field(default_factory=list)
    first_tokens: dict[int, int] = field(default_factory=dict)  # by argument: the symbol of where its window begins
    ignores: bool = False  # tensors of the call that is compiled are to be left alone; those of others may be packed
    marked: set[int] = field(default_factory=set)  # arguments that are caches because they were marked as such
    glimpses: list[Glimpse] = field(default_factory=list)
    symbols: dict[Any, int] = field(default_factory=dict)  # by symbol: the argument that carries its value

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
            else:
                inputs.append(getattr(value, component))  # the tensor that Dynamo has seen
        return inputs


def plan_graph(gm: GraphModule, example_inputs: Sequence[Any], config: Config, written: Written) -> Plan:
    """Decide what becomes of a graph, and rewrite a copy of it where caches are to be packed or are packed already.

    Raises:
        ConfigurationError: groups do not tile the head_dim of a cache that would be packed.
    """
    copied, _ = copy_graph(gm)
    left = canonicalise(copied.graph)
    placeholders = list(copied.graph.find_nodes(op="placeholder"))
    position = {p: i for i, p in enumerate(placeholders)}
    owners = _owners(placeholders, example_inputs, written)
    tracking = Tracker(copied.graph, {placeholders[i]: owner for i, owner in owners.items()}).run()
    attentions = len(left) + sum(as_attention(n) is not None for n in copied.graph.nodes)
    report = GraphReport(len(gm.graph.nodes), "untouched", before=graph_text(gm.graph))
    report.rejections = [
        Rejected(source_line(r.node), r.reason) for r in tracking.rejections if any(_looks_cached(c) for c in r.caches)
    ]
    report.rejections += [Rejected(source_line(attention.node), attention.reason) for attention in left]

    packed = [h for h in tracking.caches if h.packed]
    blocked = [h for h in packed if h.blockers]
    stores = {h.node: id(example_inputs[position[h.node]]._store) for h in packed}
    changed = {stores[h.node] for h in packed if h.writes}
    aliased = any(list(stores.values()).count(store) > 1 for store in changed)
    if blocked or aliased:
        reasons = [f"{h.node.name}: {r}" for h in blocked for r in h.blockers] or ["two views of one cache enter it"]
        report.outcome = "eager"
        report.rejections += [Rejected("graph", reason) for reason in reasons]
        return Plan("eager", report, attentions)

    plans = {h: _packed_plan(h) for h in packed}
    needed: set[Holder] = set()  # known as caches by nothing but a hint
    outcome = "packed"
    if not packed:
        outcome = "adopted"
        returned = {r.copy.cache for r in tracking.returned if r.grows or r.mirrors}

        def gathers(action: Attend | Dense | Returned, holder: Holder, written_elsewhere: bool) -> bool:
            return holder in returned or _gathers(action, holder, written_elsewhere)

        plans = _choose(tracking, gathers, position, example_inputs, owners, config, report)
        marked = _marked(tracking, position, example_inputs, owners)
        if marked:
            more = _choose(tracking, lambda _, h, __: h in marked, position, example_inputs, owners, config, report)
            needed = more.keys() - plans.keys()
            plans = {**more, **plans}
        if not plans:
            outcome = "watched"
            plans = _choose(tracking, _may_persist, position, example_inputs, owners, config, report)
    else:
        report.rejections += _beside_packed(tracking)
    report.rejections = list(dict.fromkeys(report.rejections))
    if not plans:
        plan = Plan("untouched", report, attentions)
        plan.symbols = _symbol_arguments(placeholders)
        plan.written = _written_ranges(tracking, position, plan.symbols)
        plan.glimpses = _glimpses(copied.graph, position)
        return plan
    report.outcome = outcome
    report.caches = [h.node.name for h in plans]
    ignored = {h for h in plans if is_ignored(owners.get(position[h.node], example_inputs[position[h.node]]))}
    matches, unasked = describe(tracking, plans, ignored)
    report.rejections += unasked
    rewritten = rewrite(copied, tracking, plans, config.correction)
    for node, why in rewritten.uncorrected.items():
        if why and node in matches:
            matches[node] = replace(matches[node], lowering=f"dequantized, not corrected: {why}")
    lowered = {a.call.node for a in tracking.attends} | rewritten.uncorrected.keys()
    report.matches = [match for node, match in matches.items() if node in lowered]
    report.after = graph_text(rewritten.graph.graph)
    plan = Plan(outcome, report, attentions, rewritten, {i: o for i, o in owners.items() if i in rewritten.caches})
    plan.ignores = bool(ignored)
    plan.marked = {position[h.node] for h in needed}
    plan.first_tokens = {position[h.node]: example(h.node).first_token.shape[0] for h in packed}
    return plan


def _owners(placeholders: list[Node], example_inputs: Sequence[Any], written: Written) -> dict[int, Tensor]:
    """Plain arguments that show a cache which another graph has written, and that cache."""
    owners = {}
    for i, value in enumerate(example_inputs):
        if type(value) is Tensor and isinstance(example(placeholders[i]), Tensor):
            owner = written.owner(value)
            if owner is not None:
                owners[i] = owner
    return owners


def _marked(
    tracking: Tracking, position: dict[Node, int], example_inputs: Sequence[Any], owners: dict[int, Tensor]
) -> set[Holder]:
    """Inputs that the user has marked as caches."""
    arguments = {h: position[h.node] for h in tracking.caches if not h.packed}
    return {h for h, i in arguments.items() if is_marked(owners.get(i, example_inputs[i]))}


def _glimpses(graph: Graph, position: dict[Node, int]) -> list[Glimpse]:
    """Attention over plain arguments, which may be slices of caches that eager code writes."""
    roles = Roles(graph)
    found = {}
    for node in graph.nodes:
        if (call := as_attention(node)) is not None:
            key, value = roles.input_of(call.key), roles.input_of(call.value)
            if key in roles.axes and value in roles.axes and not call.result.requires_grad:
                glimpse = Glimpse(position[key], position[value], roles.axes[key], roles.axes[value])  # type: ignore[index]
                found[glimpse.key, glimpse.value] = glimpse
    return list(found.values())


def _packed_plan(holder: Holder) -> CachePlan:
    store = example(holder.node)._store
    return CachePlan((0, 1, 2, 3), store.bits, store.group_size, store.quantizer)


def _choose(
    tracking: Tracking,
    is_cache: Callable[[Attend | Dense | Returned, Holder, bool], bool],
    position: dict[Node, int],
    example_inputs: Sequence[Any],
    owners: dict[int, Tensor],
    config: Config,
    report: GraphReport,
) -> dict[Holder, CachePlan]:
    """The plain caches to pack: those that attention reads as keys and as values, and that `is_cache` holds for."""
    plans: dict[Holder, CachePlan] = {}
    mirrored = [r for r in tracking.returned if r.mirrors]
    actions: list[Attend | Dense | Returned] = [*tracking.attends, *tracking.dense, *mirrored]
    for action in actions:
        if isinstance(action, Attend):
            keys, values = [(action.key_cache, action.key_axes)], [(action.value_cache, action.value_axes)]
        elif isinstance(action, Returned):  # keys beside values, as far as can be seen
            keys = values = [(action.copy.cache, action.copy.cache.roles)]
        else:
            keys, values = ([(h, h.roles) for h in caches] for caches in (action.key_caches, action.value_caches))
        caches = [*keys, *values]
        if not all(is_cache(action, h, position[h.node] in owners) for h, _ in caches):
            continue
        for holder, _ in caches:
            value = example_inputs[position[holder.node]]
            if isinstance(value, torch.nn.Parameter):
                break  # learned keys: no near miss
            owner = owners.get(position[holder.node], value)
            reason = next(iter(holder.blockers), None) or obstacle(owner, views=int(owner is not value))
            if reason is not None:
                node = action.argument if isinstance(action, Returned) else action.call.node
                report.rejections.append(Rejected(source_line(node), f"{holder.node.name}: {reason}"))
                break
        else:
            for pairs, bits in ((keys, config.key_bits), (values, config.value_bits)):
                for holder, axes in pairs:
                    config.check_head_dim(int(holder.shape[axes[3]]))
                    if holder.part is not None or keys == values:  # keys and values lie in one tensor
                        bits = max(config.key_bits, config.value_bits)
                    plans.setdefault(holder, CachePlan(axes, bits, config.group_size, config.quantizer))
    for part in [h for h in tracking.caches if h.part is not None and h not in plans]:
        other = next((h for h in plans if h.node is part.node), None)
        if other is not None:  # the tensor is packed as a whole
            plans[part] = plans[other]
    return plans


def _beside_packed(tracking: Tracking) -> list[Rejected]:
    """Plain caches that are attended together with packed ones: they were none yet when those were packed."""
    rejected = []
    actions: list[Attend | Dense] = [*tracking.attends, *tracking.dense]
    for action in actions:
        caches = [action.key_cache, action.value_cache] if isinstance(action, Attend) else action.caches
        for holder in caches:
            if any(h.packed for h in caches) and not holder.packed and _looks_cached(holder):
                why = "it is written beside caches that are packed already, and stays in full precision"
                rejected.append(Rejected(source_line(action.call.node), f"{holder.node.name}: {why}"))
    return rejected


def _gathers(action: Attend | Dense | Returned, holder: Holder, written_elsewhere: bool) -> bool:
    """A cache gathers tokens: it is written slice by slice, never as a whole (as what a context gives once)."""
    return written_elsewhere or _looks_cached(holder)


def _may_persist(action: Attend | Dense | Returned, holder: Holder, written_elsewhere: bool) -> bool:
    """Attended together with tokens of this graph: the past, if it is still there in a later call."""
    return not isinstance(action, Returned) and action.gathers


def _looks_cached(holder: Holder) -> bool:
    if holder.packed:
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


def _written_ranges(tracking: Tracking, position: dict[Node, int], symbols: dict[Any, int]) -> list[WrittenRange]:
    """Slices that the graph writes of plain tensors, where integer arguments tell their range."""
    ranges = {}
    for write in tracking.writes:
        holder = write.holder
        if isinstance(write, Append) and holder.root is None and not holder.blockers and _looks_cached(holder):
            positions = [p.node.expr for p in (write.start, write.stop) if isinstance(p, torch.SymInt)]  # type: ignore[attr-defined]
            if all(s in symbols for p in positions for s in p.free_symbols):
                ranges[holder.node] = WrittenRange(position[holder.node], write.start, write.stop)
    return list(ranges.values())
