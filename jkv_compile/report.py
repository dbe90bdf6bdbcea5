"""What was done, for people and for programs: memory of adopted caches, and per graph what matched and what did not."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from .offload import Traffic
from .reasons import Reason, classify


@dataclass(frozen=True)
class MemoryReport:
    """Caches that are packed now.

    Attributes:
        adopted: number of live cache tensors.
        full_precision_bytes: what they would take as they were allocated.
        packed_bytes: what they take: codes, steps, zero points, slack, and ranges held in full precision.
        active_bytes: the part of `packed_bytes` that holds the current chunk in full precision.
        held_bytes: the part that is there for the first tokens and the newest (`sink=`, `recent=`).
        host_bytes: the part of `packed_bytes` that is in host memory, with `offload="cpu"`.
        staging_bytes: device memory that those caches were brought to: the most that it was at a time.
        traffic: what went between the two; `ratio` of it tells how much less than in full precision.
        kept_tokens, known_tokens: of caches with a budget (`budget=`): tokens of all of them that are kept, of those
            that were written.
    """

    adopted: int
    full_precision_bytes: int
    packed_bytes: int
    active_bytes: int = 0
    host_bytes: int = 0
    staging_bytes: int = 0
    traffic: Traffic | None = None
    held_bytes: int = 0
    kept_tokens: int = 0
    known_tokens: int = 0

    @property
    def ratio(self) -> float:
        """How many times smaller the caches are; 1.0 where nothing is packed."""
        return self.full_precision_bytes / self.packed_bytes if self.packed_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        rows = [
            ("cache tensors packed", f"{self.adopted}"),
            ("in full precision", size_text(self.full_precision_bytes)),
            ("packed", size_text(self.packed_bytes)),
            ("  of which current chunk", size_text(self.active_bytes)),
            *([("  of which sink and recent", size_text(self.held_bytes))] if self.held_bytes else []),
            *([("tokens kept, of all caches", f"{self.kept_tokens:,}")] if self.known_tokens else []),
            *([("  of tokens written", f"{self.known_tokens:,}")] if self.known_tokens else []),
            ("ratio", f"{self.ratio:.2f}x"),
        ]
        if self.traffic is not None:
            rows += [
                ("in host memory", size_text(self.host_bytes)),
                ("device memory for calls", size_text(self.staging_bytes)),
                ("moved to the device", size_text(self.traffic.to_device)),
                ("moved back", size_text(self.traffic.from_device)),
                ("less than in full precision", f"{self.traffic.ratio:.2f}x"),
            ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value:>12}" for name, value in rows]
        if not self.adopted:
            lines.append("No cache is packed; jkv_compile.explain(model, *inputs) tells why.")
        return "\n".join(lines)


@dataclass(frozen=True)
class CacheUse:
    """A cache that an attention reads, and what storing it packed saves.

    Attributes:
        name: how the model's code reaches it, as far as Dynamo tells.
        role: "keys" or "values".
        shape: of the whole cache tensor, sizes as expressions.
        full_precision_bytes, packed_bytes: of the whole cache, for the sizes of the call that was compiled.
        sink, recent: how many of its first tokens, and of the newest before a chunk, are held in full precision.
        kept: how many of its tokens a budget keeps; 0, where it keeps all.
        by_channel: whether a channel has a step for every `group_size` tokens, instead of a token for as many channels.
    """

    name: str
    role: str
    shape: str
    dtype: str
    bits: int
    group_size: int
    full_precision_bytes: int
    packed_bytes: int
    sink: int = 0
    recent: int = 0
    kept: int = 0
    by_channel: bool = False

    def __str__(self) -> str:
        sizes = f"{size_text(self.full_precision_bytes)} -> {size_text(self.packed_bytes)}"
        held = [f"{n:,} {which}" for n, which in ((self.sink, "first"), (self.recent, "newest")) if n]
        beside = f", {' and '.join(held)} tokens in full precision" if held else ""
        packed = f"{self.bits} bits " + ("by channel in blocks of {} tokens" if self.by_channel else "in groups of {}")
        packed = packed.format(self.group_size)
        packed += f", {self.kept:,} tokens kept" if self.kept else ""
        return f"{self.name} {self.shape} {self.dtype}, {packed}{beside}: {sizes}"


@dataclass(frozen=True)
class Match:
    """One attention that reads packed caches."""

    source: str  # where it stands in the model's code
    lowering: str  # how the packed cache is read, and why so
    cached: str  # cached token ranges, as expressions
    current: str  # how many tokens of the graph's own are attended in full precision
    idiom: str = ""  # how the model holds the cache
    query: str = ""  # shapes [batch, head, token, channel]
    key: str = ""
    caches: list[CacheUse] = field(default_factory=list)

    def lines(self) -> list[str]:
        """An account of a few lines, for a terminal."""
        return [
            f"+ {self.source}",
            f"    cache: {self.idiom}",
            f"    query {self.query}, keys {self.key}: cached {self.cached}, current {self.current}",
            f"    lowering: {explained(self.lowering)}",
            *(f"    {cache}" for cache in self.caches),
        ]


@dataclass(frozen=True)
class Rejected:
    """One attention over something like a cache that was left as it was, and why."""

    source: str
    reason: str

    @property
    def kind(self) -> Reason:
        """What sort of reason it is."""
        return classify(self.reason)

    def to_dict(self) -> dict[str, str]:
        return {"source": self.source, "reason": self.reason, "kind": self.kind.name, "advice": self.kind.advice}

    def lines(self) -> list[str]:
        """An account of a few lines, for a terminal."""
        packed = self.reason.startswith("packed,")  # and only its attention is not all that it could be
        reason = self.reason if packed else f"left in full precision: {self.reason}"
        return [f"- {self.source}", f"    {reason}", f"    {self.kind.advice}"]


@dataclass(frozen=True)
class Note(Rejected):
    """What stays in full precision and may be of a cache, or not: told, but no reason to warn.

    Attributes:
        tensors: what it is told of; the note is settled once all of them are packed.
        while_alive: or once one of them is gone, as what belongs to the current chunk only is after the call.
    """

    tensors: tuple[weakref.ref[Tensor], ...] = field(default=(), compare=False, repr=False)
    while_alive: bool = field(default=False, compare=False, repr=False)

    def settled(self, packed: Sequence[Tensor] = ()) -> bool:
        """Whether its tensors have been packed, or are among those that would be."""
        from .packed import PackedKV  # which counts its bytes by this file

        if self.while_alive and any(ref() is None for ref in self.tensors):
            return True
        return all(isinstance(t := ref(), PackedKV) or any(t is p for p in packed) for ref in self.tensors)

    def lines(self) -> list[str]:
        """An account of a few lines, for a terminal."""
        _, *rest = super().lines()
        return [f"~ {self.source}", *rest]


@dataclass(frozen=True)
class Break:
    """Where Dynamo ended a graph early."""

    source: str
    reason: str
    parts: list[str]  # caches that the graph writes, or shows, and no attention of it reads

    def lines(self) -> list[str]:
        """An account of a few lines, for a terminal."""
        return [
            f"! {self.source}",
            f"    graph break: {self.reason}",
            *([f"    parts from its attention: {', '.join(self.parts)}"] if self.parts else []),
        ]


@dataclass
class GraphReport:
    """One graph that the backend compiled.

    Attributes:
        outcome: "untouched", "adopted", "watched", "packed" or "eager"; see `passes.pipeline.Plan`.
        before, after: the graph as text, as Dynamo made it and as it was rewritten ("" where it was not).
        graph_break: where the graph ended early, where that parts a cache from its attention.
        noted: what was not known to be of a cache when the graph was compiled; `notes` are of what is plain still.
        seconds: what the passes took.
        unmatched: what was matched, and turned out to be nothing that is ever packed; `rejections` tell of it.
    """

    nodes: int
    outcome: str
    matches: list[Match] = field(default_factory=list)
    rejections: list[Rejected] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)
    before: str = ""
    after: str = ""
    graph_break: Break | None = None
    seconds: float = 0.0
    noted: list[Note] = field(default_factory=list)
    unmatched: list[Match] = field(default_factory=list)

    @property
    def notes(self) -> list[Note]:
        """What may be cached tokens, and is in full precision by now."""
        return [note for note in self.noted if not note.settled()]

    def to_dict(self) -> dict[str, Any]:
        told = {name: [r.to_dict() for r in getattr(self, name)] for name in ("rejections", "notes")}
        return {name: value for name, value in asdict(self).items() if name not in ("noted", "unmatched")} | told

    def __str__(self) -> str:
        sites: list[Match | Rejected | Break] = [*self.matches, *self.rejections, *self.notes]
        sites += [self.graph_break] if self.graph_break else []
        lines = [line for site in sites for line in site.lines()]
        return "\n".join([f"graph of {self.nodes} nodes: {OUTCOMES[self.outcome]}", *(f"  {line}" for line in lines)])


OUTCOMES = {
    "untouched": "untouched, it runs as written",
    "adopted": "adopted, its caches are packed when it is called",
    "watched": "watched, the past that it attends is packed when it comes a second time",
    "packed": "packed, it works on packed caches",
    "eager": "eager, it does to a packed cache what only eager code can",
}


def explained(lowering: str) -> str:
    """A lowering, with what it means."""
    kind, _, why = lowering.partition(": ")
    meaning = {
        "fused": "codes are read where they lie, and nothing is dequantized in memory",
        "reconstructed": "one layer's cache is dequantized for the call, and corrected",
        "dequantized, not corrected": "one layer's cache is dequantized for the call, without the correction",
    }.get(kind, "")
    return f"{kind} ({meaning})" + (f", as {why}" if why else "")


def size_text(n: float) -> str:
    """A number of bytes, for people."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
