"""What was done, for people and for programs: memory of adopted caches, and per graph what matched and what did not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class MemoryReport:
    """Caches that are packed now.

    Attributes:
        adopted: number of live cache tensors.
        full_precision_bytes: what they would take as they were allocated.
        packed_bytes: what they take: codes, steps, zero points, slack, and ranges held in full precision.
        active_bytes: the part of `packed_bytes` that is held in full precision.
    """

    adopted: int
    full_precision_bytes: int
    packed_bytes: int
    active_bytes: int = 0

    @property
    def ratio(self) -> float:
        """How many times smaller the caches are; 1.0 where nothing is packed."""
        return self.full_precision_bytes / self.packed_bytes if self.packed_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        rows = [
            ("cache tensors packed", f"{self.adopted}"),
            ("in full precision", _size(self.full_precision_bytes)),
            ("packed", _size(self.packed_bytes)),
            ("  of which current chunk", _size(self.active_bytes)),
            ("ratio", f"{self.ratio:.2f}x"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value:>12}" for name, value in rows)


@dataclass(frozen=True)
class Match:
    """One attention that reads a packed cache."""

    source: str  # where it stands in the model's code
    lowering: str
    cached: str  # cached token ranges, as expressions
    current: str  # how many tokens of the graph's own are attended in full precision


@dataclass(frozen=True)
class Rejected:
    """One attention over something like a cache that was left as it was, and why."""

    source: str
    reason: str


@dataclass
class GraphReport:
    """One graph that the backend compiled.

    Attributes:
        outcome: "untouched", "adopted", "watched", "packed" or "eager"; see `passes.pipeline.Plan`.
        before, after: the graph as text, as Dynamo made it and as it was rewritten ("" where it was not).
    """

    nodes: int
    outcome: str
    matches: list[Match] = field(default_factory=list)
    rejections: list[Rejected] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)
    before: str = ""
    after: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"graph of {self.nodes} nodes: {self.outcome}"]
        lines += [f"  + {m.source}: {m.lowering}, cached {m.cached}, current {m.current}" for m in self.matches]
        lines += [f"  - {r.source}: {r.reason}" for r in self.rejections]
        return "\n".join(lines)


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
