"""What lies where along the token axis of a tensor: cached tokens, or values that the graph itself has just computed.

Positions may be SymInts. Comparing them guards the compiled graph on the outcome, as any shape-dependent decision in
torch.compile does; positions that no guard can decide (data-dependent ones) raise, and the caller rejects the match.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

from ..geometry import same


@dataclass(frozen=True)
class Cached:
    """Tokens of a cache, beginning at `first`, as they are after `time` steps of the graph."""

    cache: Node
    first: int
    time: int

    def skip(self, n: int) -> Cached:
        return replace(self, first=self.first + n)


@dataclass(frozen=True)
class Fresh:
    """Tokens of a full-precision tensor of this graph, beginning at `first`; `axes` as in `geometry.Window`."""

    node: Node
    axes: tuple[int | None, ...]
    first: int

    def skip(self, n: int) -> Fresh:
        return replace(self, first=self.first + n)


@dataclass(frozen=True)
class Segment:
    start: int
    stop: int
    content: Cached | Fresh

    @property
    def length(self) -> int:
        return self.stop - self.start


def cut(segments: list[Segment], start: int, stop: int) -> list[Segment]:
    """The part within `start … stop`, positions unchanged."""
    result = []
    for s in segments:
        if _before(s.stop, start) or _before(stop, s.start):
            continue
        lo = s.start if _before(start, s.start) else start
        hi = s.stop if _before(s.stop, stop) else stop
        content = s.content if lo is s.start or same(lo, s.start) else s.content.skip(lo - s.start)
        result.append(Segment(lo, hi, content))
    return result


def overwrite(segments: list[Segment], start: int, stop: int, content: Cached | Fresh) -> list[Segment]:
    """`start … stop` replaced by `content`."""
    result, placed = [], False
    for s in segments:
        if _before(s.stop, start):
            result.append(s)
            continue
        if not placed:
            if not _before(start, s.start):
                result.append(Segment(s.start, start, s.content))
            result.append(Segment(start, stop, content))
            placed = True
        if _before(s.stop, stop):
            continue
        result.append(s if _before(stop, s.start) else Segment(stop, s.stop, s.content.skip(stop - s.start)))
    return result if placed else [*result, Segment(start, stop, content)]


def shift(segments: list[Segment], by: int) -> list[Segment]:
    """The same content at positions moved by `by`."""
    return [Segment(s.start + by, s.stop + by, s.content) for s in segments]


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return not (_before(a[1], b[0]) or _before(b[1], a[0]))


def _before(a: int, b: int) -> bool:
    """a <= b; free of guards where the answer is the same for all values of the symbols in it."""
    return same(a, b) or bool(a <= b)
