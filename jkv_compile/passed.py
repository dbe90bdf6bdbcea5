"""Caches that one graph reads and another attends to: a graph break lies between.

What a graph hands on is remembered by tensor, from cache to attention. A tensor whose tokens reach attention in this
way for the second time is a cache, and is packed *after* that call. From then on the graph that reads it back returns Δ
as well, which is remembered beside the tensor that it is Δ of; the graph that attends to that tensor is compiled anew,
for being given it. Where Δ is lost on the way, attention is not corrected, which is said.

A view that is handed on may be a variable of the model's still, when the attention is done. Then the cache is packed
before the next call of the graph that reads it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adopt import adopt, obstacle, shared
from .compat import storage_key
from .config import Config
from .errors import ConfigurationError, NotRewrittenWarning
from .geometry import four_dimensional
from .hints import is_ignored
from .kernels.quantizers import grid_of, grid_within
from .packed import PackedKV
from .reasons import BUDGET, CLUSTERS, MEANS, PER_CHANNEL, Reason
from .report import GraphReport, Note, Rejected
from .runtime import Seen
from .store import Store

if TYPE_CHECKING:
    from .passes.handed import Attended, Handed
    from .passes.uncertainty import StepLayout
    from .passes.unpacked import Unpacked

REFUSED = "what it was handed of a cache stays in full precision: {}"
PENDING = "what it attends to is read from a cache in another graph: packed when it comes again"
UNCORRECTED = "packed, but read back in another graph: dequantized, and its scores are not corrected"


@dataclass(frozen=True)
class Source:
    """A cache that tokens come from, as it was when a graph handed them on.

    cache: the tensor, or its store where it was packed already.
    tokens: of a tensor, its dimension along tokens.
    pairs: how channels have been turned since, see `uncertainty.pairs_turned`.
    asked: whether graphs were to tell Δ of what they read of it.
    certain: whether it is a cache for sure: a copy of all of it was written in slices, and attended.
    """

    cache: weakref.ref[Tensor] | weakref.ref[Store]
    tokens: int | None
    pairs: int
    asked: bool = False
    certain: bool = False

    @property
    def store(self) -> Store | None:
        """The store of a cache that is packed by now."""
        cache = self.cache()
        return cache._store if isinstance(cache, PackedKV) else cache if isinstance(cache, Store) else None


@dataclass(frozen=True)
class Steps:
    """Δ of a tensor that a graph has read from a packed cache, of its shape and dtype, contiguous.

    version: the tensor's, as it was returned; eager code may change it in place, and Δ is not known any more.
    """

    delta: Tensor
    layout: StepLayout
    version: int | None


@dataclass(frozen=True)
class Awaited:
    """How a cache is packed that views are alive of; `adopt` tells of each."""

    cache: weakref.ref[Tensor]
    axes: tuple[int, ...]
    bits: int
    quantizer: str
    tells_steps: bool
    centered: bool


class Passed:
    """Where the tokens of tensors come from that graphs have handed on, and what is known of their errors.

    Holds no tensor alive but Δ, while the tensor that it is of lives.
    """

    def __init__(self) -> None:
        self._sources: dict[int, tuple[weakref.ref[Tensor], list[Source]]] = {}
        self._steps: dict[int, tuple[weakref.ref[Tensor], Steps]] = {}
        self.attended = Seen()  # the caches whose tokens came to attention
        self.awaited: dict[int, Awaited] = {}  # by identity
        self.shared = Seen()  # the caches that were awaited
        self.watched: list[GraphReport] = []  # of graphs that attend to a past that is packed if it comes again
        self.pending: dict[str, list[GraphReport]] = {}  # by source: where it is on record that they are to come again

    def __bool__(self) -> bool:
        return bool(self._sources)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is known of any tensor: then graphs that only pass on what is known have nothing to do."""
        return not (self._sources or self._steps or self.awaited)

    def sources(self, tensor: Any) -> list[Source]:
        known = self._sources.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return []
        return [source for source in known[1] if source.cache() is not None]

    def made(self, arguments: Sequence[Any]) -> set[int]:
        """The arguments that a graph has made of tokens of a cache, and that are none of its memory."""
        return {i for i, a in enumerate(arguments) if type(a) is Tensor and any(map(_elsewhere(a), self.sources(a)))}

    def layouts(self, arguments: Sequence[Any]) -> dict[int, StepLayout]:
        """The arguments that another graph has read from a packed cache, and which of their channels have one Δ."""
        if not self._steps:
            return {}
        told = ((i, self._told(argument)) for i, argument in enumerate(arguments))
        return {i: steps.layout for i, steps in told if steps is not None}

    def _told(self, tensor: Any) -> Steps | None:
        known = self._steps.get(id(tensor))
        if known is None or known[0]() is not tensor or known[1].version != _version(tensor):
            return None
        return known[1]

    def lost(self, tensor: Any) -> bool:
        """Whether Δ was asked for of what a tensor was read from, and is not told of the tensor."""
        return any(s.asked and s.store is not None for s in self.sources(tensor)) and not self.layouts([tensor])

    def steps(self, tensor: Tensor) -> Tensor:
        """Δ of a tensor that `layouts` tells of; zeros for any other, which is in full precision."""
        told = self._told(tensor)
        return torch.zeros_like(tensor, memory_format=torch.contiguous_format) if told is None else told.delta

    def tell_steps(self, tensor: Tensor, delta: Tensor, layout: StepLayout) -> None:
        key, steps = id(tensor), Steps(delta, layout, _version(tensor))
        self._steps[key] = weakref.ref(tensor, lambda _: self._steps.pop(key, None)), steps

    def notes(self, unpacked: Sequence[Unpacked], arguments: Sequence[Any]) -> list[Note]:
        """What to tell of a graph that is called with these arguments, but for what is known to be handed on."""
        unknown = [u for u in unpacked if not all(any(self.sources(arguments[i]) for i in side) for side in u.sides)]
        return list(dict.fromkeys(one.note(arguments) for one in unknown))

    def remade(self, tensor: Tensor) -> bool:
        """Whether a graph has made a tensor of one that is gone since, and that it is no view of."""
        known = self._sources.get(id(tensor))
        return known is not None and known[0]() is tensor and all(s.cache() is None for s in known[1])

    def record(self, output: Tensor, sources: Sequence[Source]) -> None:
        key = id(output)
        self._sources[key] = weakref.ref(output, lambda _: self._sources.pop(key, None)), list(sources)


def _elsewhere(tensor: Tensor) -> Callable[[Source], bool]:
    """Tells whether a cache is in another memory than a tensor."""

    def elsewhere(source: Source) -> bool:
        cache = source.cache()
        return type(cache) is not Tensor or storage_key(cache) != storage_key(tensor)

    return elsewhere


def _version(tensor: Any) -> int | None:
    """How often a tensor has been changed in place; None for one of inference mode, which does not know."""
    return None if tensor.is_inference() else tensor._version


def begins_passage(handed: Sequence[Handed], arguments: Sequence[Any]) -> bool:
    """Whether a graph hands on tokens of a cache that is among its own arguments, or that it takes for one."""
    return any(one.tokens is not None or one.whole or isinstance(arguments[one.argument], PackedKV) for one in handed)


def idle_call(inner: Callable[..., Any], passing: Callable[..., Any], passed: Passed) -> Callable[..., Any]:
    """Call `passing`, which is `inner` and all that looks after what is handed on; `inner`, while nothing has been."""

    def call(*args: Any) -> Any:
        return inner(*args) if passed.is_idle else passing(*args)

    return call


def handing_call(inner: Callable[..., Any], handed: Sequence[Handed], passed: Passed) -> Callable[..., Any]:
    """Call `inner`, and remember where what it returns comes from."""

    def call(*args: Any) -> Any:
        outputs = inner(*args)
        found: dict[int, list[Source]] = {}
        for one in handed:
            if type(outputs[one.output]) is Tensor:
                found.setdefault(one.output, []).extend(_handed_on(args[one.argument], one, passed))
        for output, sources in found.items():
            if sources:
                passed.record(outputs[output], sources)
        return outputs

    return call


def _handed_on(argument: Tensor, one: Handed, passed: Passed) -> list[Source]:
    """Where the tokens of an argument come from, once they have been handed on."""
    if before := passed.sources(argument):
        return [replace(source, pairs=source.pairs or one.pairs) for source in before]
    if isinstance(argument, PackedKV):
        store = argument._store
        return [Source(weakref.ref(store), None, one.pairs, store.tells_steps)]
    told = one.tokens is not None or one.whole
    return [Source(weakref.ref(argument), one.tokens, one.pairs)] if told else []


def awaiting_call(
    inner: Callable[..., Any],
    arguments: set[int],
    config: Config,
    stores: Any,
    compiled_later: Callable[[], Callable[..., Any]],
    passed: Passed,
) -> Callable[..., Any]:
    """Call `inner`; or, where caches among these arguments are awaited, pack them, and call what is compiled for it."""
    compiled: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        found = [passed.awaited.pop(id(args[i]), None) for i in arguments] if passed.awaited else []
        packed = False
        for one in found:
            cache = None if one is None else one.cache()
            if one is not None and type(cache) is Tensor and obstacle(cache) is None and not is_ignored(cache):
                store = adopt(cache, one.axes, one.bits, config, quantizer=one.quantizer, centered=one.centered)
                store.tells_steps = one.tells_steps
                store.join(stores)
                packed = True
        if not packed:
            return inner(*args)
        if not compiled:
            compiled.append(compiled_later())
        return compiled[0](*args)

    return call


def told_call(
    inner: Callable[..., Any],
    layouts: dict[int, StepLayout],
    compiled_later: Callable[[], Callable[..., Any]],
    passed: Passed,
) -> Callable[..., Any]:
    """Call `inner`, compiled for arguments that come with Δ as `layouts` tell, or what is compiled for these."""
    compiled = {tuple(layouts.items()): inner}

    def call(*args: Any) -> Any:
        told = tuple(passed.layouts(args).items())
        if told not in compiled:
            compiled[told] = compiled_later()
        return compiled[told](*args)

    return call


def attending_call(
    inner: Callable[..., Any],
    attended: Sequence[Attended],
    report: GraphReport,
    config: Config,
    stores: Any,
    passed: Passed,
) -> Callable[..., Any]:
    """Call `inner`; afterwards pack the tensors that its attention was handed tokens of, once they come again.

    Of keys that were read from a packed cache, Δ is asked for. Without `stores`, nothing is packed or asked for, and
    `report` alone tells of them.
    """

    def settle(source: str) -> None:
        """Take back what is on record only until more is known."""
        report.noted = [note for note in report.noted if note.source != source]
        for each in passed.pending.pop(source, []):
            each.rejections = [r for r in each.rejections if r != Rejected(source, PENDING)]

    def tell(source: str, reason: str) -> None:
        """Have a reason on record, and warn of it, once."""
        told = Rejected(source, reason)
        if told in report.rejections:
            return
        settle(source)
        report.rejections.append(told)
        if reason == PENDING:
            passed.pending.setdefault(source, []).append(report)
        if reason == UNCORRECTED:
            warnings.warn(f"jkv: {source}: a cache is {UNCORRECTED}", NotRewrittenWarning, stacklevel=3)
        elif reason != PENDING and told.kind is not Reason.IGNORED:
            warnings.warn(f"jkv: {source}: {reason}", NotRewrittenWarning, stacklevel=3)

    def call(*args: Any) -> Any:
        lost = {one for one in attended if any(passed.lost(args[i]) for i in one.keys)}  # the graph may change them
        outputs = inner(*args)
        for one in attended if passed else ():
            keys, values = (
                [s for i in side for s in _sources(args[i], i, one, passed)] for side in (one.keys, one.values)
            )
            handed = bool(keys and values)
            packed = [store for source in keys if (store := source.store) is not None]
            done = [
                any(s.store is not None for s in side) or any(isinstance(args[i], PackedKV) for i in own)
                for side, own in ((keys, one.keys), (values, one.values))
            ]
            plain_keys, plain_values = ([s for s in side if s.store is None] for side in (keys, values))
            if plain_keys or plain_values:
                sides = [
                    side or _like(other, [args[i] for i in own])
                    for side, other, own in (
                        (plain_keys, plain_values, one.keys),
                        (plain_values, plain_keys, one.values),
                    )
                ]
                reason = PENDING if stores is None else _adopt(sides, done, one, config, stores, passed)
                if reason is None:
                    settle(one.source)
                elif reason != PENDING or handed:
                    tell(one.source, reason)
            elif all(done) and one.source in passed.pending:  # packed meanwhile
                settle(one.source)
            if config.correction != "none" and stores is not None:
                for store in packed:
                    store.tells_steps = True
                if one in lost:
                    tell(one.source, UNCORRECTED)
        return outputs

    return call


def _sources(argument: Any, place: int, one: Attended, passed: Passed) -> list[Source]:
    """Where an argument comes from. Of a plain cache that was copied as a whole, attention tells what its axes are."""
    axis, shape = dict(one.axes).get(place), getattr(argument, "shape", None)
    found = []
    for source in passed.sources(argument):
        cache = source.cache()
        if source.tokens is not None or source.store is not None:
            found.append(source)
        elif axis is not None and isinstance(cache, Tensor) and cache.shape == shape:
            found.append(replace(source, tokens=axis, certain=place in one.written))
    return found


def _adopt(
    sides: list[list[Source]], packed: list[bool], one: Attended, config: Config, stores: Any, passed: Passed
) -> str | None:
    """Pack the tensors that keys and values were read from; where that is not to be, or not yet, say why.

    `packed` tells of each side whether there is a packed cache on it already.
    """
    caches: dict[int, tuple[Tensor, tuple[int, ...], int, bool]] = {}
    tensors = {id(cache): cache for source in sides[0] + sides[1] if isinstance(cache := source.cache(), Tensor)}
    again = {key for key, cache in tensors.items() if passed.attended.before(cache)}
    again |= {id(s.cache()) for side in sides for s in side if s.certain}
    sides = [[s for s in side if id(s.cache()) in again] for side in sides]
    if not all(side or done for side, done in zip(sides, packed)):
        return PENDING
    elsewhere = "these are read here, and attended in another graph"
    if sides[0] and grid_of(config.key_quantizer).per_channel:
        return REFUSED.format(PER_CHANNEL.format(config.quantizer, elsewhere))
    if config.clustered:
        return REFUSED.format(CLUSTERS.format(config.quantizer, elsewhere))
    if config.mean_tokens(*(name for side, name in zip(sides, ("keys", "values")) if side)):
        return REFUSED.format(MEANS.format(config.center_tokens, elsewhere))
    if config.budget is not None:
        return REFUSED.format(BUDGET.format("this one is read here, and attended in another graph"))
    for side, bits, name in zip(sides, (config.key_bits, config.value_bits), ("keys", "values")):
        for source in side:
            cache = tensors[id(source.cache())]
            if (axes := _axes(cache, source.tokens)) is None:
                return REFUSED.format("it has no three or four dimensions of which one runs along tokens")
            known = caches.get(id(cache))
            centered = config.centers(name)
            if known is not None:
                bits, centered = max(bits, known[2]), centered or known[3]
            caches[id(cache)] = cache, axes, bits, centered
    waits = False  # for views that are variables of the model's, until it returns
    for cache, *_ in caches.values():
        if is_ignored(cache):
            return REFUSED.format("jkv_compile.ignore was called for it")
        if (reason := obstacle(cache)) is not None:
            if reason != shared(cache) or passed.shared.before(cache):
                return REFUSED.format(reason)
            waits = True
        try:
            config.check_head_dim(one.head_dim)  # keys and values may lie in one tensor, side by side
            config.check_head_dim(cache.shape[-1])
        except ConfigurationError as error:
            return REFUSED.format(error)
        if cache.shape[-1] % one.head_dim:
            return REFUSED.format(f"its last dimension is {cache.shape[-1]}, which heads of {one.head_dim} do not tile")
    pairs = {id(source.cache()): source.pairs or one.pairs for source in sides[0]}  # of keys
    for cache, axes, bits, centered in caches.values():
        quantizer: str = config.key_quantizer if id(cache) in pairs else config.value_quantizer
        if id(cache) in pairs:
            quantizer = str(grid_within(quantizer, cache.shape[-1], config.group_size, pairs[id(cache)]))
        tells_steps = id(cache) in pairs and config.correction != "none"
        if waits:
            passed.awaited[id(cache)] = Awaited(weakref.ref(cache), axes, bits, quantizer, tells_steps, centered)
            continue
        store = adopt(cache, axes, bits, config, quantizer=quantizer, centered=centered)
        store.tells_steps = tells_steps
        store.join(stores)
    return PENDING if waits else None


def _like(sources: list[Source], arguments: list[Any]) -> list[Source]:
    """Arguments that are attended as they are, where they look as what the other side was handed from does."""
    caches = [(cache, source.tokens) for source in sources if isinstance(cache := source.cache(), Tensor)]
    shapes = {(cache.shape, cache.stride()): tokens for cache, tokens in caches}
    plain = [t for t in arguments if type(t) is Tensor]
    return [Source(weakref.ref(t), shapes[t.shape, t.stride()], 0) for t in plain if (t.shape, t.stride()) in shapes]


def _axes(cache: Tensor, tokens: int | None) -> tuple[int, ...] | None:
    """A cache's dimension, as a tensor of four, for each of (batch, head, token, channel)."""
    if (
        tokens is None
        or type(cache) is not Tensor
        or not 3 <= cache.dim() <= 4
        or four_dimensional(cache.shape, cache.stride()) is None
    ):
        return None
    token = tokens + 4 - cache.dim()
    if token == 3:
        return None
    batch, head = (axis for axis in range(3) if axis != token)
    return batch, head, token, 3
