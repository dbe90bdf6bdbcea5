"""What lies where along the token axis of a tensor: cached tokens, or values that the graph itself has just computed.

Positions may be SymInts. Comparing them guards the compiled graph on the outcome, as any shape-dependent decision in
torch.compile does; positions that no guard can decide (data-dependent ones) raise, and the caller rejects the match.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..geometry import same

if TYPE_CHECKING:
    from .actions import Holder


@dataclass(frozen=True)
class Cached:
    """Tokens of a cache, beginning at `first`, as they are after `time` steps of the graph."""

    cache: Holder
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
class Scattered:
    """Tokens of a cache, beginning at `first`, of which those at `positions` (known to the data only) are `value`'s.

    Other tokens are as `before` has them, where the graph had written at such places before.
    """

    cache: Holder
    first: int
    time: int
    positions: Node
    value: Fresh
    before: Scattered | None = None

    def skip(self, n: int) -> Scattered:
        return replace(self, first=self.first + n)


Content = Cached | Fresh | Scattered


@dataclass(frozen=True)
class Segment:
    start: int
    stop: int
    content: Content

    @property
    def length(self) -> int:
        return self.stop - self.start


def cut(segments: list[Segment], start: int, stop: int) -> list[Segment]:
    """The part within `start … stop`, positions unchanged; pieces may turn out to be empty."""
    result = []
    for s in segments:
        if at_most(s.stop, start) or at_most(stop, s.start):
            continue
        lo = s.start if at_most(start, s.start) else start
        hi = s.stop if at_most(s.stop, stop) else stop
        content = s.content if same(lo, s.start) else s.content.skip(lo - s.start)
        result.append(Segment(lo, hi, content))
    return result


def overwrite(segments: list[Segment], start: int, stop: int, content: Content) -> list[Segment]:
    """`start … stop` replaced by `content`."""
    result, placed = [], False
    for s in segments:
        if at_most(s.stop, start):
            result.append(s)
            continue
        if not placed:
            if not at_most(start, s.start):
                result.append(Segment(s.start, start, s.content))
            result.append(Segment(start, stop, content))
            placed = True
        if at_most(s.stop, stop):
            continue
        result.append(s if at_most(stop, s.start) else Segment(stop, s.stop, s.content.skip(stop - s.start)))
    return result if placed else [*result, Segment(start, stop, content)]


def shift(segments: list[Segment], by: int) -> list[Segment]:
    """The same content at positions moved by `by`."""
    return [Segment(s.start + by, s.stop + by, s.content) for s in segments]


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return not (at_most(a[1], b[0]) or at_most(b[1], a[0]))


def at_most(a: int, b: int) -> bool:
    """True: a <= b. False: b <= a. Callers must be right either way where the two are equal.

    The answer for the values at hand is guarded on, never more strictly than this: a guard `a < b` would have the graph
    compiled anew the day they meet.
    """
    if same(a, b) or statically_known_true(a <= b):
        return True
    if statically_known_true(b <= a):
        return False
    if hint(a) <= hint(b):
        return _guard(a <= b)
    return not _guard(b <= a)


def _guard(condition: bool) -> bool:
    return bool(condition)


def equal(a: int, b: int) -> bool:
    """Whether a == b for the values at hand, which is then guarded on; adds no guard where the answer is no.

    Guarded on as two inequalities: an equation would have one symbol replaced by the other, and Inductor (2.13) loses
    symbols that are replaced after Dynamo has made them inputs.
    """
    return same(a, b) or (hint(a) == hint(b) and _guard(a <= b) and _guard(b <= a))


def hint(n: int) -> int:
    """The value that a symbol has in the call that is being compiled."""
    if not isinstance(n, torch.SymInt):
        return n
    if not n.node.has_hint():
        raise UnknownPosition(f"the position {n} is not known before the data is")
    return int(n.node.hint)


class UnknownPosition(Exception):
    """A position depends on data, so that nothing can be decided about it while a graph is compiled."""
