"""The backend for `torch.compile`: rewrite the graph, adopt the caches, hand plain tensors to the inner compiler."""

from __future__ import annotations

import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import EllipsisType
from typing import Any

import torch
from torch.fx import GraphModule

from .adopt import Written
from .agreement import check_agreement
from .compat import compile_inner, records_cuda_graphs
from .config import Config, configure
from .errors import ConfigurationError, NoCachedAttentionError, NotRewrittenWarning, OffloadWarning
from .glimpse import Sightings, glimpsing_call
from .offload import Offload
from .passed import Passed, attending_call, awaiting_call, begins_passage, handing_call, idle_call, told_call
from .passes.dtensors import localise, packed_inside
from .passes.pipeline import Plan, plan_graph
from .reasons import Reason
from .report import GraphReport, MemoryReport, Rejected
from .retention import KeptStore
from .runtime import Seen, first_contact, packed_call, recorded_call, refusing_call, watched_call
from .store import Family

logger = logging.getLogger(__name__)

LAYERS_AT_HAND = 2  # more in one graph, and offloading frees little


class State:
    """What a configuration knows at run time; shared by all backends that are equal."""

    def __init__(self, config: Config) -> None:
        self.stores = Family(config.correction, Offload() if config.offload else None, config.window)
        self.reports: list[GraphReport] = []
        self.written = Written()
        self.seen = Seen()
        self.sightings = Sightings()
        self.passed = Passed()


_states: weakref.WeakValueDictionary[Config, State] = weakref.WeakValueDictionary()
_lock = threading.Lock()


class JKVBackend:
    """A `torch.compile` backend; make one with `jkv_backend`. Equal configurations make equal backends."""

    __name__ = "jkv"

    def __init__(self, config: Config) -> None:
        self.config = config
        with _lock:
            self._state = _states.setdefault(config, State(config))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JKVBackend) and self.config == other.config

    def __hash__(self) -> int:
        return hash((JKVBackend, self.config))

    def __repr__(self) -> str:
        return f"jkv_backend({self.config})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, as configurations that hold a backend make them, know what this one knows."""
        return JKVBackend, (self.config,)

    def memory(self) -> MemoryReport:
        """Bytes of the caches that backends of this configuration have packed and that are still alive."""
        stores, offload = list(self._state.stores), self._state.stores.offload
        return MemoryReport(
            adopted=len(stores),
            full_precision_bytes=sum(s.full_precision_bytes for s in stores),
            packed_bytes=sum(s.packed_bytes for s in stores),
            active_bytes=sum(s.active_bytes for s in stores),
            held_bytes=sum(s.held_bytes for s in stores),
            kept_tokens=sum(s.kept_tokens for s in stores if isinstance(s, KeptStore)),
            known_tokens=sum(s.known_tokens for s in stores if isinstance(s, KeptStore)),
            host_bytes=sum(s.host_bytes for s in stores),
            staging_bytes=offload.peak_bytes if offload else 0,
            traffic=replace(offload.traffic) if offload else None,
        )

    @property
    def reports(self) -> list[GraphReport]:
        """One report per compiled graph, oldest first."""
        return list(self._state.reports)

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph of Dynamo's. `mode` and `options` are passed on to Inductor."""
        check_agreement(self.config)
        if self.config.offload and self.config.inner == "inductor" and records_cuda_graphs(mode, options or {}):
            raise ConfigurationError(
                f"offload={self.config.offload!r} with CUDA graphs (mode={mode!r}): they are recorded for tensors that "
                "stay where they are, and an offloaded cache is brought to another place in every call; use another "
                'mode, such as "default" or "max-autotune-no-cudagraphs", or offload=None'
            )
        on_shards, rejected = localise(gm)
        inputs = list(example_inputs) if on_shards is None else on_shards.arguments(example_inputs)
        if packed_inside(inputs):  # what this graph does to a shard is told by eager code only
            return gm.forward
        if on_shards is None:
            return self._compile(gm, example_inputs, mode, options, rejected)
        return on_shards.around(self._compile(on_shards.graph, inputs, mode, options, rejected))

    def _compile(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        mode: str | None,
        options: dict[str, Any] | None,
        rejected: Sequence[Rejected] = (),
        again: bool = False,
    ) -> Callable[..., Any]:
        """Compile one graph; `again`, where it was compiled before, and met other caches than it was compiled for."""
        begin, state = time.perf_counter(), self._state
        corrects = self.config.correction != "none"
        layouts = state.passed.layouts(example_inputs) if corrects else {}
        made = state.passed.made(example_inputs)
        plan = plan_graph(gm, example_inputs, self.config, state.written, layouts, made)
        plan.report.rejections, plan.attentions = [*plan.report.rejections, *rejected], plan.attentions + len(rejected)
        plan.report.noted = state.passed.notes(plan.unpacked, example_inputs)
        plan.report.seconds = time.perf_counter() - begin
        state.reports.append(plan.report)
        logger.debug("%s", plan.report)
        self._complain(plan)

        def later() -> Callable[..., Any]:
            return self._compiled_later(gm, mode, options)

        def compile_plan(plan: Plan | None) -> Callable[..., Any]:
            """The graph as it is where there is no plan, or none to do with packed caches."""
            if plan is not None and plan.outcome == "eager":
                return refusing_call(plan.lost) if plan.lost else gm.forward
            graph, inputs = gm, list(example_inputs)
            if plan is not None and plan.rewritten is not None:
                graph, inputs = plan.rewritten.graph, plan.inner_inputs(example_inputs)
            inner = compile_inner(graph, inputs, self.config.inner, mode, options or {})
            return inner if graph is gm else packed_call(plan, inner, state.stores, state.passed)  # type: ignore[arg-type]

        if plan.outcome == "adopted":
            anew = later()
            otherwise = compile_plan(plan.instead) if plan.ignores else gm.forward if again else anew
            known = state.stores, state.written, state.passed
            return first_contact(otherwise, gm.forward, anew, plan, self.config, *known)

        run = compile_plan(plan.instead if plan.outcome == "watched" else plan)
        if plan.glimpses and self.config.budget is None:  # what eager code writes would not be scored
            run = glimpsing_call(run, plan.glimpses, self.config, state.stores, state.sightings)
        alone = None if plan.written or layouts or begins_passage(plan.handed, example_inputs) else run
        if plan.attended:
            run = attending_call(run, plan.attended, plan.report, self.config, state.stores, state.passed)
        if plan.handed:
            run = handing_call(run, plan.handed, state.passed)
        if plan.written:
            run = recorded_call(run, plan, state.written)
        if corrects and not again and (plan.handed or plan.attended):
            run = told_call(run, layouts, later, state.passed)
        if plan.handed and not again:
            arguments = {one.argument for one in plan.handed}
            run = awaiting_call(run, arguments, self.config, state.stores, later, state.passed)
        if alone is not None and alone is not run:
            run = idle_call(alone, run, state.passed)
        if plan.outcome != "watched" or again:  # what is called again in the same call does not come again
            return run
        return watched_call(run, later(), plan, self.config, state.stores, state.written, state.seen, state.passed)

    def _compiled_later(self, gm: GraphModule, mode: str | None, options: dict[str, Any] | None) -> Callable[..., Any]:
        """A graph for tensors that it was not compiled for: planned and compiled when it is first called with them."""

        def compile_again(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
            return self._compile(gm, example_inputs, mode, options, again=True)

        return torch.compile(gm, backend=compile_again)

    def _complain(self, plan: Plan) -> None:
        """Nothing is left undone in silence: near misses warn, or raise where the user asked for it."""
        report, caches = plan.report, plan.rewritten.caches if plan.rewritten else {}
        if self.config.offload and plan.outcome == "packed" and len(caches) > LAYERS_AT_HAND * 2:
            warnings.warn(
                f"jkv: one graph uses {len(caches)} caches: while it runs, all of them are on the device. Compile the "
                "model's blocks one by one, `for block in model.blocks: block.compile(backend=backend)`, to have those "
                "of two blocks there at a time",
                OffloadWarning,
                stacklevel=2,
            )
        unasked = [r for r in report.rejections if r.kind is not Reason.IGNORED]
        if report.matches or not plan.attentions:
            if unasked:
                warnings.warn(
                    f"jkv: some attention was left in full precision\n{report}", NotRewrittenWarning, stacklevel=2
                )
            return
        if self.config.strict and not plan.ignores:
            raise NoCachedAttentionError(
                f"strict=True, and no attention of this graph reads a cache that could be packed\n{report}"
            )
        if unasked:
            warnings.warn(f"jkv: the model runs as written\n{report}", NotRewrittenWarning, stacklevel=2)


def jkv_backend(
    bits: int | tuple[int, int] | EllipsisType = ..., *, preset: str | None = None, **settings: Any
) -> JKVBackend:
    """A backend that keeps K/V caches packed: `torch.compile(model, backend=jkv_backend(bits=2))`.

    Args:
        bits: bits of a stored channel, 2 unless the preset says otherwise, or a pair `(key_bits, value_bits)`.
        preset: "quality", "balanced", "memory" or "smallest": what measured best at 4.0, 5.3, 6.4 and 7.5 times less
            memory; "qvg" or "qvg_pro": published settings (`config.PRESETS`). Settings that are given beside it replace
            the preset's.
        settings: group_size, correction, quantizer, inner, strict, offload, sink, recent, center, center_tokens,
            step_bits, stages, centroids, budget, salience and block_tokens, as `Config` describes them.

    Raises:
        ConfigurationError: one of them has a value that cannot work.
    """
    if bits is not ...:
        settings["bits"] = bits
    return JKVBackend(configure(preset, settings))


_named: dict[Config, JKVBackend] = {}  # backends used by name: what one graph leaves behind, the next must find
_SETTINGS = ("preset", *Config.__dataclass_fields__)


def jkv(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend by name, `torch.compile(model, backend="jkv", options={"bits": 2})`; other options go to Inductor."""
    options = dict(options or {})
    settings = {name: options.pop(name) for name in _SETTINGS if name in options}
    backend = jkv_backend(**settings)
    return _named.setdefault(backend.config, backend)(gm, example_inputs, mode=mode, options=options)
