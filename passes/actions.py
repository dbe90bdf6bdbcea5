"""What is seen while a graph is walked: who holds tokens of a cache, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ..geometry import Window
from .attention_forms import AttentionCall
from .segments import Segment


@dataclass(eq=False)
class Holder:
    """A storage that holds tokens of a cache. Axes are those of `shape`; caches that are packed have canonical ones."""

    node: Node
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    token_axis: int
    root: Holder | None  # the cache that a copy was (first) taken from; None for a cache itself
    root_axes: tuple[int | None, ...] = ()  # of a copy: the root's axis for each of its own
    segments: list[Segment] = field(default_factory=list)
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # (time, start, stop)
    packed: bool = False
    blockers: list[str] = field(default_factory=list)

    @property
    def cache(self) -> Holder:
        return self.root or self


@dataclass
class Append:
    node: Node
    holder: Holder
    start: int
    stop: int
    value: Node
    axes: tuple[int | None, ...]


@dataclass
class Move:
    node: Node
    holder: Holder
    source: int
    destination: int
    length: int


@dataclass
class Fill:
    node: Node
    holder: Holder
    start: int
    stop: int
    value: float


@dataclass
class Attend:
    call: AttentionCall
    key: list[Segment]
    value: list[Segment]
    key_cache: Holder
    value_cache: Holder
    key_axes: tuple[int, ...]  # the cache's axis for each of the dimensions (batch, head, token, channel)
    value_axes: tuple[int, ...]


@dataclass
class Read:
    """`consumer` uses `argument`, a view of a cache, as an ordinary tensor."""

    consumer: Node
    argument: Node
    holder: Holder
    window: Window
    segments: list[Segment]


@dataclass
class Rejection:
    """An attention that could not be lowered, and why."""

    node: Node
    reason: str
    caches: list[Holder]


@dataclass
class Tracking:
    """What the walk saw, in program order."""

    caches: list[Holder]
    copies: list[Holder]
    writes: list[Append | Move | Fill]
    attends: list[Attend]
    reads: list[Read]
    rejections: list[Rejection]
