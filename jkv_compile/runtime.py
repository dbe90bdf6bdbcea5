"""The callables that Dynamo gets back: they stand between the caller's arguments and a graph of plain tensors."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .adopt import Written, adopt, in_four_dimensions, is_part, obstacle, place_of
from .compat import as_function, storage_key
from .config import Config
from .errors import NotRewrittenWarning, PackedCacheError
from .hints import is_ignored, is_marked
from .host_memory import HostMemory
from .offload import Ranges, release, stage
from .packed import PackedKV
from .report import GraphReport, Rejected
from .store import Active, Store

if TYPE_CHECKING:
    from .passed import Passed
    from .passes.pipeline import Plan
    from .passes.rewrite import OutputStore, Rewritten

NO_RANGE = (0, 0)
REMADE = "the past that it attends is made anew in each call, in a form that is not packed: it stays in full precision"
HALF_WRITTEN = (
    "jkv: raised inside a call that writes packed caches: as in eager mode, the tokens that it writes may hold old or "
    "new values; all others are as they were"
)


def packed_call(plan: Plan, inner: Callable[..., Any], stores: Any, passed: Passed) -> Callable[..., Any]:
    """Call `inner` with the components of packed caches; nothing else where the graph needs nothing else.

    Caches that nobody counts yet, as they have been loaded from a file, say, are counted among `stores` from then on.
    `passed` knows Δ of what other graphs have read, and is told that of what this one returns.
    """
    rewritten = plan.rewritten
    assert rewritten is not None
    changed, used = [*rewritten.written, *(keep.argument for keep in rewritten.kept)], list(rewritten.caches)
    inputs = [(i, None if kind == "plain" else _reader(kind, passed)) for i, kind in rewritten.inputs]
    joined = rewritten.joined
    finish = _finisher(plan, passed) if rewritten.has_extra_outputs else None

    def call(*args: Any) -> Any:  # whatever this does, small models wait for it
        for argument in joined:
            args[argument]._store.settle()
        for argument in changed:
            args[argument]._store.own()
        here, offloads = [args[argument]._store for argument in used], False
        for store in here:
            if not store.is_counted:
                store.join(stores)
            offloads = offloads or store.host is not None
        offloaded = stage(here) if offloads else None
        moved: dict[HostMemory, Ranges] | None = None
        try:
            flat = [args[argument] if read is None else read(args[argument]) for argument, read in inputs]
            for argument in changed:
                args[argument]._store.changing()
            outputs = inner(*flat)
            moved = _moved(rewritten, args, changed, outputs) if offloaded else None
        except Exception as error:
            if changed:
                error.add_note(HALF_WRITTEN)
            raise
        finally:
            if offloaded:
                release(offloaded, moved)
        return outputs if finish is None else finish(args, outputs)

    return call


def refusing_call(why: str) -> Callable[..., Any]:
    """In place of a graph whose attention would read tokens that have been dropped."""

    def call(*_: Any) -> Any:
        raise PackedCacheError(
            f"attention over a packed cache that keeps some of its tokens has no packed form: {why}. Nothing was "
            "changed. Reset the cache and run this model without budget="
        )

    return call


def _moved(
    rewritten: Rewritten, args: Sequence[Any], changed: Sequence[int], outputs: Sequence[Any]
) -> dict[HostMemory, Ranges]:
    """What a call has changed of offloaded caches: all that the cache holds, where the graph does not tell."""
    moved: dict[HostMemory, Ranges] = {}
    for argument in changed:
        store, told = args[argument]._store, rewritten.changed.get(argument)
        ranges = [(0, store.shape[2])] if told is None else [(outputs[a], outputs[b]) for a, b in told]
        if store.host is not None:
            moved[store.host] = [*moved.get(store.host, ()), *ranges]
    return moved


def _reader(component: str, passed: Passed) -> Callable[[Any], Any]:
    """Gets what a graph is given in place of an argument: of a packed cache, or Δ of what another graph has read."""
    return passed.steps if component == "steps" else _READERS[component]


def _center(cache: PackedKV) -> Tensor:
    center = cache._store.center
    assert center is not None
    return center.contiguous()  # strides are compiled, and those of a copy of some heads are a larger one's


def _active(cache: PackedKV) -> Tensor:
    store = cache._store
    active = store.active
    if active is None or active.data.shape[2] < 2:  # sizes 0 and 1 are special to compilers: never pass them
        batch, heads, _, head_dim = store.shape
        padded = torch.zeros(batch, heads, 2, head_dim, dtype=store.dtype, device=store.device)
        if active is not None:
            padded[:, :, : active.data.shape[2]] = active.data
        return padded
    return active.data


def _active_range(cache: PackedKV) -> Tensor:
    active = cache._store.active
    return torch.tensor(NO_RANGE if active is None else (active.start, active.stop))


_READERS: dict[str, Callable[[Any], Any]] = {
    "codes": lambda cache: cache._store.staged[0],
    "scales": lambda cache: cache._store.staged[1],
    "first_token": lambda cache: cache.first_token.shape[0],
    "center": _center,
    "means": lambda cache: cache._store.means.data,
    "extents": lambda cache: cache._store.means.extents,
    "held": lambda cache: cache._store.held.data,
    "held_ranges": lambda cache: cache._store.held.ranges,
    "places": lambda cache: cache._store.places,
    "salience": lambda cache: cache._store.salience,
    "active": _active,
    "active_range": _active_range,
}


def _finisher(plan: Plan, passed: Passed) -> Callable[[Sequence[Any], Sequence[Any]], tuple[Any, ...]]:
    """Turns a rewritten graph's outputs into those of the user's graph, and keeps what else it tells."""
    rewritten = plan.rewritten
    assert rewritten is not None

    def finish(args: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, ...]:
        for keep in rewritten.kept:
            store = args[keep.argument]._store
            store.active = Active(outputs[keep.data], outputs[keep.start], outputs[keep.stop])
        made = [_new_store(args[new.argument]._store, new, outputs) for new in rewritten.stores]
        result = []
        for output in rewritten.outputs:
            if isinstance(output, int):
                result.append(outputs[output])
                continue
            size, stride = [outputs[i] for i in output.size], [outputs[i] for i in output.stride]
            if hasattr(output, "store"):
                store, inference = made[output.store], torch.is_inference_mode_enabled()
            else:
                store, inference = args[output.argument]._store, args[output.argument].is_inference()
            with torch.inference_mode(inference):
                result.append(PackedKV(store, size, stride, outputs[output.offset], store.dtype))
        for told in rewritten.steps:
            passed.tell_steps(result[told.output], outputs[told.steps], told.layout)
        return tuple(result)

    return finish


def _new_store(parent: Store, new: OutputStore, outputs: Sequence[Any]) -> Store:
    """A cache that a graph has made of `parent`'s tokens and new ones."""
    codes, scales = outputs[new.codes], outputs[new.scales]
    strides = [outputs[i] for i in new.strides]
    if new.after:
        store = parent.grown(codes, scales, strides)
        store.dtype = new.dtype
        _hold(store, None, new, outputs)
        return store
    store = parent.of_this_kind((*codes.shape[:3], parent.shape[3]), strides, codes, scales)
    store.dtype, store.grows = new.dtype, parent.grows or store.shape[2] != parent.shape[2]
    if new.active is not None:
        data, start, stop = (outputs[i] for i in new.active)
        store.active = Active(data, start, stop)
    store.join(parent._family)
    _hold(store, parent, new, outputs)
    return store


def _hold(store: Store, parent: Store | None, new: OutputStore, outputs: Sequence[Any]) -> None:
    """What a cache that a graph has made holds in full precision: of `parent`'s tokens and of new ones after them."""
    if store.held is None or new.held is None:
        return
    ranges, source, new_place = new.held
    for first, stop, place in zip(ranges[::3], ranges[1::3], ranges[2::3]):
        start, n = outputs[first], outputs[stop] - outputs[first]
        if parent is not None:
            store.take(parent, (0, 0, start, 0), (0, 0, outputs[place], 0), (*store.shape[:2], n, store.shape[3]))
    if source is not None:
        store.held.write(outputs[source], (0, 0, outputs[new_place], 0))
    store.put_away()


def first_contact(
    otherwise: Callable[..., Any],
    as_written: Callable[..., Any],
    later: Callable[..., Any],
    plan: Plan,
    config: Config,
    stores: Any,
    written: Written,
    passed: Passed,
) -> Callable[..., Any]:
    """Adopt the plain caches among the arguments, then run the rewritten graph as it is.

    Dynamo recompiles as soon as it sees packed caches: this graph runs once per cache and is not worth a compilation.
    Where the caches cannot be adopted after all, `otherwise` (the graph without them) runs, and a warning says why.
    Where means are to be taken of caches that hold nothing yet, `as_written` (the graph as it was) writes to them
    first. `later` has the graph compiled for what its arguments are by then, where Dynamo has not seen that they are
    others: it does not guard where a plain view begins, and torch 2.11 does not look into a dict that holds the same
    objects as before.
    """
    rewritten = plan.rewritten
    assert rewritten is not None
    run_packed = packed_call(plan, rewritten.graph.forward, stores, passed)
    empty = Seen()
    shown = {o.argument for o in rewritten.outputs if hasattr(o, "argument")}  # as windows of the memory that it is in

    def call(*args: Any) -> Any:
        plain = _still_plain(rewritten, args)
        if not plain:
            return later(*args)
        owners = {i: _owner(args[i], i in plan.owners, written) for i in plain}
        slices = [(i, owner) for i, owner in owners.items() if i in plan.owners and owner is not None]
        if any(place_of(args[i], owner) != plan.places[i] for i, owner in slices):
            return later(*args)
        if any(i in shown and i not in plan.owners and is_part(args[i]) for i in plain):
            return otherwise(*args)
        for argument, owner in owners.items():
            reason = "it is not known as a cache any more" if owner is None else None
            if owner is not None and not isinstance(owner, PackedKV):
                reason = obstacle(owner, views=int(owner is not args[argument]))
            if owner is not None and (is_ignored(owner) or (argument in plan.marked and not is_marked(owner))):
                return otherwise(*args)  # one graph serves many tensors, and hints are for single ones
            if reason is not None:
                _tell(plan, f"a cache stays in full precision: {reason}")
                return otherwise(*args)
        if len(plain) == len(rewritten.caches):
            first = [o for i, o in owners.items() if rewritten.caches[i].centered and _is_new(o, empty)]
            if first:
                return as_written(*args)
        for argument, owner in owners.items():
            cache, value = rewritten.caches[argument], args[argument]
            assert owner is not None
            active, last = None, None
            if argument in plan.owners:  # the chunk that another graph has just written is still in full precision
                start, stop = last = written.last_range(owner)
                canonical = in_four_dimensions(owner, cache.fold).permute(cache.axes)
                active = Active(canonical[:, :, start:stop].clone(), start, stop)
            views = [] if owner is value else [value]
            settings = views, cache.quantizer, last, cache.centered, cache.fold, cache.mean_tokens
            store = adopt(owner, cache.axes, cache.bits, config, *settings)
            store.active = active
            store.join(stores)
        return run_packed(*args)

    return call


def _is_new(cache: Tensor | None, known: Seen) -> bool:
    """Whether a cache holds nothing yet, and has not been asked about before."""
    return cache is not None and not isinstance(cache, PackedKV) and not cache.any() and not known.before(cache)


def _tell(plan: Plan, reason: str) -> None:
    """Warn, and have it on record."""
    warnings.warn(f"jkv: {reason}", NotRewrittenWarning, stacklevel=3)
    told = (Rejected(source, reason) for source in dict.fromkeys(m.source for m in plan.report.matches))
    plan.report.rejections += [r for r in told if r not in plan.report.rejections]


def watched_call(
    inner: Callable[..., Any],
    later: Callable[..., Any],
    plan: Plan,
    config: Config,
    stores: Any,
    written: Written,
    seen: Seen,
    passed: Passed,
) -> Callable[..., Any]:
    """Call `inner`, until the tensors that would be caches come a second time; then adopt them.

    Where only some of them do (a list of the last chunks, say), these are adopted, and `later` is called, which has the
    graph compiled for what its arguments are by then.
    """
    rewritten = plan.rewritten
    assert rewritten is not None
    adopting = first_contact(inner, inner, later, plan, config, stores, written, passed)
    passed.watched.append(plan.report)

    def call(*args: Any) -> Any:
        plain = _still_plain(rewritten, args)
        again = [i for i in plain if seen.before(args[i])]
        if len(again) == len(plain):
            tell_watched(plan.report, (), passed)
            return adopting(*args)
        tell_watched(plan.report, [args[i] for i in plain if i not in again], passed)
        alone = [i for i in again if i not in plan.owners and obstacle(args[i]) is None and not is_ignored(args[i])]
        for argument in alone:
            cache = rewritten.caches[argument]
            settings = (), cache.quantizer, None, cache.centered, cache.fold, cache.mean_tokens
            adopt(args[argument], cache.axes, cache.bits, config, *settings).join(stores)
        return later(*args) if alone else inner(*args)

    return call


def tell_watched(report: GraphReport, new: Sequence[Tensor], passed: Passed) -> None:
    """Have it on record, and warn, that what comes is no past that came before, but one that was made of it.

    What is `new` may come again in a later call, and is packed then, which takes this back. It is told of all graphs of
    the same attention: that of the first calls may never be called again.
    """
    if not new and report.unmatched:
        report.matches, report.unmatched, report.outcome = report.unmatched, [], "watched"
        report.rejections = [r for r in report.rejections if r.reason != REMADE]
    elif report.matches and any(map(passed.remade, new)):
        sources = list(dict.fromkeys(m.source for m in report.matches))
        for each in passed.watched:
            if each.matches and sources == list(dict.fromkeys(m.source for m in each.matches)):
                each.matches, each.unmatched, each.outcome = [], each.matches, "untouched"
                each.rejections += [Rejected(source, REMADE) for source in sources]
        warnings.warn(f"jkv: {', '.join(sources)}: {REMADE}", NotRewrittenWarning, stacklevel=3)


class Seen:
    """Tensors that graphs have been called with, by identity, or by the memory that they show: a model may hold it as
    another object each time (`cache = cache.detach()`)."""

    def __init__(self) -> None:
        self._tensors: dict[int, Any] = {}
        self._memory: dict[tuple[Any, ...], StorageWeakRef] = {}

    def before(self, tensor: Tensor) -> bool:
        """Whether this very tensor, or one that is the same view of the same memory, has been asked about before."""
        key = id(tensor)
        known = self._tensors.get(key)
        if known is not None and known() is tensor:
            return True
        self._tensors[key] = weakref.ref(tensor, lambda _: self._tensors.pop(key, None))
        return type(tensor) is Tensor and self._shown_before(tensor)

    def _shown_before(self, tensor: Tensor) -> bool:
        place = storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
        known = self._memory.get(place)
        if known is not None and not known.expired():
            return True
        self._memory = {p: storage for p, storage in self._memory.items() if not storage.expired()}
        self._memory[place] = StorageWeakRef(tensor.untyped_storage())
        return False


def _still_plain(rewritten: Rewritten, args: Sequence[Any]) -> list[int]:
    """The arguments that are to be adopted: the caches that are not packed already."""
    return [i for i in rewritten.caches if not isinstance(args[i], PackedKV)]


def _owner(value: Tensor, elsewhere: bool, written: Written) -> Tensor | None:
    return written.owner(value) if elsewhere else value


def recorded_call(inner: Callable[..., Any], plan: Plan, written: Written) -> Callable[..., Any]:
    """Call `inner`, and remember which slices of plain tensors it wrote."""
    names = list(plan.symbols)
    places = [plan.symbols[n] for n in names]

    def evaluator(value: Any) -> Callable[..., int]:
        return as_function(value.node.expr if isinstance(value, torch.SymInt) else value, names)

    ranges = [(w.argument, evaluator(w.start), evaluator(w.stop)) for w in plan.written]

    def call(*args: Any) -> Any:
        outputs = inner(*args)
        values = [args[i] for i in places]
        for argument, start, stop in ranges:
            written.record(args[argument], int(start(*values)), int(stop(*values)))
        return outputs

    return call
