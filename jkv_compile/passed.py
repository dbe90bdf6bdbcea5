"""Caches that one graph reads and another attends to: a graph break lies between.

What a graph hands on is remembered by tensor, from cache to attention. A tensor whose tokens reach attention in this
way for the second time is a cache, and is packed *after* that call. Read back in one graph, its tokens lose what is
known of their quantization steps before they come to the other: such attention is not corrected, which is said.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .adopt import adopt, obstacle
from .config import Config
from .errors import ConfigurationError, NotRewrittenWarning
from .geometry import four_dimensional
from .hints import is_ignored
from .reasons import Reason
from .report import GraphReport, Note, Rejected
from .runtime import Seen

if TYPE_CHECKING:
    from .passes.handed import Attended, Handed
    from .passes.unpacked import Unpacked

REFUSED = "what it was handed of a cache stays in full precision: {}"
PENDING = "what it attends to is read from a cache in another graph: packed when it comes again, and then not corrected"
UNCORRECTED = "packed, but read back in another graph: dequantized, and its scores are not corrected"
Source = tuple[Tensor, int]  # a tensor and its dimension along tokens


class Passed:
    """Where the tokens of tensors come from that graphs have handed on. Holds no tensor alive."""

    def __init__(self) -> None:
        self._sources: dict[int, tuple[weakref.ref[Tensor], list[tuple[weakref.ref[Tensor], int]]]] = {}
        self.attended = Seen()  # the caches whose tokens came to attention

    def __bool__(self) -> bool:
        return bool(self._sources)

    def sources(self, tensor: Any) -> list[Source]:
        known = self._sources.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return []
        return [(cache, tokens) for ref, tokens in known[1] if (cache := ref()) is not None]

    def notes(self, unpacked: Sequence[Unpacked], arguments: Sequence[Any]) -> list[Note]:
        """What to tell of a graph that is called with these arguments, but for what is known to be handed on."""
        unknown = [u for u in unpacked if not all(any(self.sources(arguments[i]) for i in side) for side in u.sides)]
        return list(dict.fromkeys(one.note(arguments) for one in unknown))

    def record(self, output: Tensor, sources: Sequence[Source]) -> None:
        key = id(output)
        refs = [(weakref.ref(cache), tokens) for cache, tokens in sources]
        self._sources[key] = weakref.ref(output, lambda _: self._sources.pop(key, None)), refs


def handing_call(inner: Callable[..., Any], handed: Sequence[Handed], passed: Passed) -> Callable[..., Any]:
    """Call `inner`, and remember where what it returns comes from."""
    begins = any(one.tokens is not None for one in handed)

    def call(*args: Any) -> Any:
        outputs = inner(*args)
        if not passed and not begins:
            return outputs
        found: dict[int, list[Source]] = {}
        for one in handed:
            argument = args[one.argument]
            if type(argument) is Tensor and type(outputs[one.output]) is Tensor:
                own = [(argument, one.tokens)] if one.tokens is not None else []
                found.setdefault(one.output, []).extend(passed.sources(argument) or own)
        for output, sources in found.items():
            if sources:
                passed.record(outputs[output], sources)
        return outputs

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

    Without `stores`, nothing is packed, and `report` alone tells of them.
    """

    def call(*args: Any) -> Any:
        outputs = inner(*args)
        for one in attended if passed else ():
            keys, values = ([s for i in side for s in passed.sources(args[i])] for side in (one.keys, one.values))
            if not keys and not values:
                continue
            handed = bool(keys and values)
            keys, values = (
                side or _like(other, [args[i] for i in own])
                for side, other, own in ((keys, values, one.keys), (values, keys, one.values))
            )
            reason = PENDING if stores is None else _adopt(keys, values, one.head_dim, config, stores, passed)
            if reason == PENDING and not handed:
                continue
            told, uncorrected = Rejected(one.source, reason or UNCORRECTED), Rejected(one.source, UNCORRECTED)
            if told in report.rejections or uncorrected in report.rejections:
                continue
            report.rejections = [r for r in report.rejections if r != Rejected(one.source, PENDING)] + [told]
            report.noted = [note for note in report.noted if note.source != one.source]
            if reason is None:
                warnings.warn(f"jkv: {one.source}: a cache is {UNCORRECTED}", NotRewrittenWarning, stacklevel=2)
            elif reason != PENDING and told.kind is not Reason.IGNORED:
                warnings.warn(f"jkv: {one.source}: {reason}", NotRewrittenWarning, stacklevel=2)
        return outputs

    return call


def _adopt(
    keys: list[Source], values: list[Source], head_dim: int, config: Config, stores: Any, passed: Passed
) -> str | None:
    """Pack the tensors that keys and values were read from; where that is not to be, or not yet, say why."""
    caches: dict[int, tuple[Tensor, tuple[int, ...], int]] = {}
    again = {id(cache) for cache in {id(c): c for c, _ in keys + values}.values() if passed.attended.before(cache)}
    sides = [[s for s in side if id(s[0]) in again] for side in (keys, values)]
    if not all(sides):
        return PENDING
    for side, bits in zip(sides, (config.key_bits, config.value_bits)):
        for cache, tokens in side:
            if (axes := _axes(cache, tokens)) is None:
                return REFUSED.format("it has no three or four dimensions of which one runs along tokens")
            known = caches.get(id(cache))
            caches[id(cache)] = cache, axes, bits if known is None else max(bits, known[2])
    for cache, _, _ in caches.values():
        if is_ignored(cache):
            return REFUSED.format("jkv_compile.ignore was called for it")
        if (reason := obstacle(cache)) is not None:
            return REFUSED.format(reason)
        try:
            config.check_head_dim(head_dim)  # keys and values may lie in one tensor, side by side
            config.check_head_dim(cache.shape[-1])
        except ConfigurationError as error:
            return REFUSED.format(error)
        if cache.shape[-1] % head_dim:
            return REFUSED.format(f"its last dimension is {cache.shape[-1]}, which heads of {head_dim} do not tile")
    for cache, axes, bits in caches.values():
        adopt(cache, axes, bits, config).join(stores)
    return None


def _like(sources: list[Source], arguments: list[Any]) -> list[Source]:
    """Arguments that are attended as they are, where they look as what the other side was handed from does."""
    shapes = {(cache.shape, cache.stride()): tokens for cache, tokens in sources}
    plain = [t for t in arguments if type(t) is Tensor]
    return [(t, shapes[t.shape, t.stride()]) for t in plain if (t.shape, t.stride()) in shapes]


def _axes(cache: Tensor, tokens: int) -> tuple[int, ...] | None:
    """A cache's dimension, as a tensor of four, for each of (batch, head, token, channel)."""
    if type(cache) is not Tensor or not 3 <= cache.dim() <= 4 or four_dimensional(cache.shape, cache.stride()) is None:
        return None
    token = tokens + 4 - cache.dim()
    if token == 3:
        return None
    batch, head = (axis for axis in range(3) if axis != token)
    return batch, head, token, 3
