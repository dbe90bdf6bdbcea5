"""`explain`: what packing would do to a model, told before it is done."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .adopt import Written
from .compat import graph_break_of, unwrap_compiled
from .config import Config, configure
from .errors import ConfigurationError, NoCachedAttentionError
from .explain_html import page
from .passed import Passed, attending_call, handing_call
from .passes.describe import input_name
from .passes.dtensors import localise
from .passes.pipeline import Plan, plan_graph
from .report import Break, CacheUse, GraphReport, Match, Note, Rejected, size_text
from .runtime import Seen, recorded_call, tell_watched
from .snapshot import taken_back

ELSEWHERE = (
    "it is not compiled, or runs in eager code behind a graph break or torch.compiler.disable, or is spelled in a way "
    "that jkv_compile.register_attention can tell of"
)
NO_ATTENTION = f"no attention came to a compiled graph: {ELSEWHERE}"
NO_CACHE = f"no attention over a cache came to a compiled graph. If the model has any, {ELSEWHERE}"


@dataclass(frozen=True)
class Explanation:
    """What was found in a model's graphs; `str()` of it is an account for a terminal."""

    config: Config
    graphs: list[GraphReport]
    attentions: int = 0  # that came to compiled graphs, over caches or not

    @property
    def matches(self) -> list[Match]:
        """Attention that would read packed caches."""
        return [m for g in self.graphs for m in g.matches]

    @property
    def rejections(self) -> list[Rejected]:
        """Attention over something like a cache that would stay in full precision."""
        return [r for g in self.graphs for r in g.rejections]

    @property
    def notes(self) -> list[Note]:
        """What may be cached tokens, or not, and would stay in full precision."""
        return [n for g in self.graphs for n in g.notes]

    @property
    def breaks(self) -> list[Break]:
        """Graph breaks that part a cache from its attention; all, where nothing could be packed."""
        return [g.graph_break for g in self.graphs if g.graph_break is not None]

    @property
    def caches(self) -> list[CacheUse]:
        """The caches that would be packed, each once per graph that reads it."""
        return list(dict.fromkeys(c for g in self.graphs for m in g.matches for c in m.caches))

    @property
    def summary(self) -> str:
        """What was found, in a line or two."""
        uses = [c for g in self.graphs for c in dict.fromkeys(c for m in g.matches for c in m.caches)]
        full, packed = sum(c.full_precision_bytes for c in uses), sum(c.packed_bytes for c in uses)
        saving = f"; their caches take {size_text(full)}, packed {size_text(packed)}" if packed else ""
        unknown = f", not known to be over caches: {len(self.notes)}" if self.notes else ""
        lines = [
            f"graphs: {len(self.graphs)}; attention over caches that can be packed: {len(self.matches)}, "
            f"left in full precision: {len(self.rejections)}{unknown}{saving}"
        ]
        if not self.matches and not self.rejections:
            lines.append(NO_CACHE if self.attentions else NO_ATTENTION)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for `json.dumps`."""
        config = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        return {"config": config, "summary": self.summary, "graphs": [g.to_dict() for g in self.graphs]}

    def to_html(self) -> str:
        """One self-contained page, with every graph before and after it is rewritten."""
        return page(self.summary, str(self.config), self.graphs)

    def __str__(self) -> str:
        return "\n".join([f"jkv_compile.explain with {self.config}", self.summary, *map(str, self.graphs)])


def explain(model: Callable[..., Any], *args: Any, calls: int = 2, **kwargs: Any) -> Explanation:
    """Tell what `torch.compile(model, backend=jkv_backend(...))` would do on these arguments, without doing it.

        print(jkv_compile.explain(model, x, cache, start, bits=2))

    The model runs `calls` times in full precision (a second time, since some caches are known as such only when they
    come again), and everything that it changed is taken back: caches and buffers, containers and attributes that can be
    reached from `model` and the arguments, and random number generators. Nothing is packed.

    Args:
        model: a module or function; where it was compiled, or parts of it were, this stays so.
        calls: how often to run it.
        args, kwargs: the model's own; keywords that `jkv_backend` has (`preset`, `bits`, …) are taken for it.

    Returns:
        An `Explanation`: per attention where it stands, how its cache is held, its shapes, how it is lowered and why,
        bits, and bytes before and after; what is left and why; what may be a cache or not; graph breaks that part a
        cache from its attention.

    Raises:
        ConfigurationError: a setting has a value that cannot work.
        NoCachedAttentionError: `strict=True`, and no attention reads a cache that can be packed; the message is the
            account.
    """
    names = {f.name for f in fields(Config)}
    settings = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    config = configure(kwargs.pop("preset", None), settings)
    watcher = _Watcher(config)
    known = inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    with (
        taken_back(model, args, kwargs),
        warnings.catch_warnings(),
        torch.compiler.set_stance(force_backend=watcher),
    ):
        warnings.simplefilter("ignore")
        compiled = torch.compile(unwrap_compiled(model), backend=watcher, **options)
        for _ in range(calls):
            compiled(*args, **kwargs)
    for report in watcher.graphs:
        packed = [*watcher.caches, *(t for ref in watcher.may_come_again if (t := ref()) is not None)]
        report.noted = [note for note in report.noted if not note.settled(packed)]
    explanation = Explanation(config, watcher.graphs, watcher.attentions)
    if not explanation.matches:
        for report, broken in zip(watcher.graphs, watcher.broken):
            report.graph_break = report.graph_break or broken
    if config.strict and not explanation.matches:
        raise NoCachedAttentionError(f"strict=True, and no attention reads a cache that can be packed\n{explanation}")
    return explanation


class _Watcher:
    """A backend that plans, keeps the report, and runs the graph as it was."""

    __name__ = "jkv_compile.explain"

    def __init__(self, config: Config) -> None:
        self.config, self.written, self.passed, self.seen = config, Written(), Passed(), Seen()
        self.graphs: list[GraphReport] = []
        self.broken: list[Break | None] = []  # where each of them ended early
        self.attentions = 0
        self.caches: list[Tensor] = []  # that would be packed
        self.may_come_again: list[weakref.ref[Tensor]] = []  # that would be, if they do; held alive, they seem to

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        on_shards, rejected = localise(gm)
        if on_shards is not None:
            inputs = on_shards.arguments(example_inputs)
            return on_shards.around(self._watch(on_shards.graph, inputs, rejected))
        return self._watch(gm, example_inputs, rejected)

    def _watch(
        self, gm: GraphModule, example_inputs: Sequence[Any], rejected: Sequence[Rejected]
    ) -> Callable[..., Any]:
        try:
            made = self.passed.made(example_inputs)
            plan = plan_graph(gm, example_inputs, self.config, self.written, made=made)
            plan.report.rejections = [*plan.report.rejections, *rejected]
            plan.report.noted = self.passed.notes(plan.unpacked, example_inputs)
            if plan.outcome == "watched":
                self.may_come_again += map(weakref.ref, plan.caches(example_inputs))
            else:
                self.caches += plan.caches(example_inputs)
        except ConfigurationError as error:
            self.graphs.append(
                GraphReport(len(gm.graph.nodes), "untouched", rejections=[Rejected("graph", str(error))])
            )
            self.broken.append(None)
            self.attentions += 1
            return gm.forward
        self.graphs.append(plan.report)
        self.attentions += plan.attentions + len(rejected)
        parted = [w.argument for w in plan.written] + [
            k.argument for k in (plan.rewritten.kept if plan.rewritten else ())
        ]
        parted += [h.argument for h in plan.handed if h.tokens is not None]
        broken = graph_break_of(gm)
        self.broken.append(None if broken is None else Break(*broken, []))
        if broken is not None and parted:
            inputs = list(gm.graph.find_nodes(op="placeholder"))
            plan.report.graph_break = Break(*broken, [input_name(inputs[i]) for i in dict.fromkeys(parted)])
        run: Callable[..., Any] = gm.forward
        if plan.outcome == "watched" and plan.rewritten is not None:
            run = self._told_of_watched(run, plan)
        if plan.attended:
            run = attending_call(run, plan.attended, plan.report, self.config, None, self.passed)
        if plan.handed:
            run = handing_call(run, plan.handed, self.passed)
        return recorded_call(run, plan, self.written) if plan.written else run

    def _told_of_watched(self, run: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
        """Call `run`; the past that its attention reads may turn out to be made anew in each call."""
        assert plan.rewritten is not None
        caches = list(plan.rewritten.caches)
        self.passed.watched.append(plan.report)

        def call(*args: Any) -> Any:
            tell_watched(plan.report, [t for i in caches if not self.seen.before(t := args[i])], self.passed)
            return run(*args)

        return call
