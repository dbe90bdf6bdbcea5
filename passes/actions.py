"""What is seen while a graph is walked: who holds tokens of a cache, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ..geometry import Fold, Window
from .attention_forms import AttentionCall
from .segments import Fresh, Segment


@dataclass(eq=False)
class Holder:
    """A storage that holds tokens of a cache. Axes are those of `shape`; caches that are packed have canonical ones.

    A tensor of which a graph uses boxes of batch entries and heads is as many caches (keys and values of the same
    tokens, those of several layers): each a `part`, (first, length) along batch and heads, None where it has all.
    """

    node: Node
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    token_axis: int
    root: Holder | None  # the cache that a copy was (first) taken from; None for a cache itself
    root_axes: tuple[int | None, ...] = ()  # of a copy: the root's axis for each of its own
    segments: list[Segment] = field(default_factory=list)
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # (time, start, stop)
    scattered: bool = False  # some of them are to places that only the data tells
    refused: bool = False  # it is written in a way that cannot be followed
    repeats: int = 1  # of a copy: how often each head of the root stands in it
    packed: bool = False
    roles: tuple[int, ...] = ()  # of a cache: its axis for (batch, head, token, channel), as far as its shape tells
    offset: int = 0  # where it begins in the storage
    part: tuple[tuple[int, int] | None, tuple[int, int] | None] | None = None
    fold: Fold | None = None  # of a plain cache: how it is seen as a tensor of four dimensions
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
    first: int = 0  # the value's first token that is written


@dataclass
class Scatter:
    """Tokens are written at places that a tensor holds."""

    node: Node
    holder: Holder
    positions: Node
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
    reads: list[Read] = field(default_factory=list)  # what it reads, where it is left to read tensors

    @property
    def gathers(self) -> bool:
        """Whether keys of this graph are attended together with cached ones."""
        return any(isinstance(s.content, Fresh) for s in self.key)


@dataclass
class Dense:
    """Attention that the packed kernels cannot do: its keys and values are dequantized, and what the model does to them
    between cache and attention runs as it is."""

    call: AttentionCall
    key_caches: list[Holder]
    value_caches: list[Holder]
    gathers: bool  # keys of this graph are attended together with cached ones
    reason: str
    handed: tuple[Node, ...] = ()  # inputs that keys come from, and that another graph has read from a cache

    @property
    def caches(self) -> list[Holder]:
        return [*self.key_caches, *(c for c in self.value_caches if c not in self.key_caches)]


@dataclass
class Read:
    """`consumer` uses `argument`, a view of a cache, as an ordinary tensor; axes of segments are the cache's."""

    consumer: Node
    argument: Node
    holder: Holder
    window: Window
    segments: list[Segment]


@dataclass
class Returned:
    """An output of the graph that is a view of a copy of cached tokens, alone or with some of the graph."""

    argument: Node
    copy: Holder
    grows: bool  # tokens of this graph are among them, and the graph attends to it
    mirrors: bool  # tokens that the graph also writes to the cache are among them: another graph will attend to it


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
    writes: list[Append | Scatter | Move | Fill]
    attends: list[Attend]
    dense: list[Dense]
    reads: list[Read]
    returned: list[Returned]
    rejections: list[Rejection]
