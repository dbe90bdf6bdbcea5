"""What rewritten graphs are built from: components of packed caches, tokens in canonical order, numbers as nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from ..geometry import Fold, constant, same
from ..kernels.centers import centered
from ..kernels.quantizers import grid_of
from ..packed import PackedKV
from .actions import Holder
from .nodes import example
from .segments import Fresh
from .symbols import Symbols
from .uncertainty import StepLayout

ops = torch.ops.jkv

Component = Literal[
    "plain", "codes", "scales", "active", "active_range", "held", "held_ranges", "center", "means", "extents",
    "places", "salience",
    "first_token", "steps",
]  # fmt: skip


@dataclass(frozen=True)
class CachePlan:
    """How one cache is stored: `axes[role]` is the tensor's dimension for (batch, head, token, channel).

    group_size: channels that share a step; of a grid per channel, tokens that do.
    quantizer: as `kernels.quantizers.Grid` spells it.
    held: how many of its first tokens are held in full precision, and of the newest before a chunk; at most.
    centered: what is stored are tokens less a mean, see `kernels.centers`.
    fold: how the tensor is seen as one of four dimensions, see `geometry.folds`.
    mean_tokens: how many tokens share a mean that they are stored less, see `kernels.block_means`, or centroids, see
        `kernels.clusters`; 0, none.
    keeps: what tells which tokens it keeps, where it has a budget, and `rows`, how many: see `kernels.retention`.
    """

    axes: tuple[int, ...]
    bits: int
    group_size: int
    quantizer: str
    held: tuple[int, int] = (0, 0)
    centered: bool = False
    fold: Fold | None = None
    mean_tokens: int = 0
    keeps: str = ""
    rows: int = 0

    @property
    def holds(self) -> bool:
        return any(self.held)

    @property
    def block(self) -> int:
        """Tokens that share their steps."""
        return self.group_size if grid_of(self.quantizer).per_channel else 1

    @property
    def channels(self) -> int:
        """Channels that do."""
        return 1 if self.block > 1 else self.group_size


class Pieces:
    """Puts nodes into a graph whose caches are stored as `plans` say.

    `handed` are inputs that another graph has read from a cache.
    """

    def __init__(
        self, gm: GraphModule, plans: dict[Holder, CachePlan], handed: Mapping[Node, StepLayout] | None = None
    ) -> None:
        self.graph, self.plans, self.handed = gm.graph, plans, handed or {}
        self.symbols = Symbols(gm.graph)
        self.components: dict[tuple[Node, Component], Node] = {}

    def walk(self) -> Iterator[Node]:
        """The graph's nodes as they are now, in order; new ones are put before the one at hand."""
        self.symbols.forget()
        self.bind_first_tokens()
        for node in [n for n in self.graph.nodes if n.op != "output"]:
            self.symbols.see(node)
            with self.graph.inserting_before(node):
                yield node

    def bind_first_tokens(self) -> None:
        """Where a window begins is a symbol that Dynamo makes no input of: it is one here."""
        for holder in self.plans:
            value = example(holder.node)
            first = constant(value.first_token.shape[0]) if isinstance(value, PackedKV) else 0
            if isinstance(first, torch.SymInt):
                self.symbols.known[first.node.expr] = self.component(holder, "first_token")

    def component(self, holder: Holder, kind: Component) -> Node:
        """The placeholder of one component of a cache, next to the cache's own."""
        return self.beside(holder.node, kind)

    def beside(self, node: Node, kind: Component) -> Node:
        """The placeholder of what comes with an input, next to its own."""
        key = (node, kind)
        if key not in self.components:
            with self.graph.inserting_before(node):
                component = self.graph.placeholder(f"{node.name}_{kind}")
            component._dynamo_source = None  # type: ignore[attr-defined]
            self.components[key] = component
        return self.components[key]

    def layouts(self, caches: Iterable[Holder], handed: Iterable[Node]) -> list[StepLayout]:
        """Which channels have one Δ, of packed caches and of inputs that another graph has read."""
        plans = [self.plans[h] for h in caches if h in self.plans]
        own = [StepLayout(plan.channels, grid_of(plan.quantizer).pairs) for plan in plans]
        return [*own, *(self.handed[node] for node in handed)]

    def packed(self, holder: Holder) -> tuple[Node, Node]:
        """Codes and scales of a cache."""
        return self.own(holder, "codes"), self.own(holder, "scales")

    def active(self, holder: Holder) -> tuple[Node, Node]:
        """What a cache holds in full precision, as it would be stored but for the rounding, and its range."""
        active = self.centered(self.own(holder, "active"), holder, holder.dtype)
        return self.to_grid(active, holder), self.component(holder, "active_range")

    def held(self, holder: Holder) -> tuple[Node, Node]:
        """What a cache holds in full precision for good, as it was written, and which tokens those are."""
        return self.own(holder, "held"), self.own(holder, "held_ranges")

    def all_held(self, holder: Holder) -> tuple[list[Node], list[Node]]:
        """All that a cache holds in full precision, less its mean, and of each which tokens those are; the range that
        another graph has written is among it where this graph writes none."""
        both = [self.held(holder)]
        if not holder.writes:
            both.append((self.own(holder, "active"), self.component(holder, "active_range")))
        return [self.centered(held, holder, holder.dtype) for held, _ in both], [ranges for _, ranges in both]

    def retained(self, holder: Holder) -> tuple[Node, Node]:
        """Which tokens a cache with a budget keeps, and how salient they are."""
        return self.component(holder, "places"), self.component(holder, "salience")

    def append_blocks(self, holder: Holder, value: Node, start: int) -> Node:
        """A write of tokens `[B, H, n, D]` to a cache whose tokens share steps, see `kernels.blocks`."""
        plan, (codes, scales) = self.plans[holder], self.packed(holder)
        rows, ranges = self.held(holder) if plan.holds else (None, None)
        told = ([], []) if rows is None else ([rows], [ranges])
        tokens = self.number(holder.shape[plan.axes[2]])
        return self.call(ops.append_blocks.default, codes, scales, *told, value, self.number(start), tokens, plan.bits)

    def tokens_of(self, value: float, holder: Holder, length: int) -> Node:
        """So many tokens of a cache `[B, H, length, D]` that are all one number; they share their memory."""
        batch, heads, head_dim = (self.number(holder.shape[self.plans[holder].axes[r]]) for r in (0, 1, 3))
        device = example(holder.node).device
        number = self.call(torch.full, [1, 1, 1, 1], value, dtype=holder.dtype, device=device)
        return self.method("expand", number, [batch, heads, self.number(length), head_dim])

    def own(self, holder: Holder, kind: Component) -> Node:
        """A component; of a cache that is part of a tensor, its batch entries and heads."""
        return self.within(self.component(holder, kind), holder, axes=1 if kind == "held_ranges" else 2)

    def within(self, node: Node, holder: Holder, axes: int = 2) -> Node:
        """The part that a cache is of a tensor `[B, H, …]`, or `[B, …]`, of all batch entries and heads."""
        for axis, part in enumerate((holder.part or ())[:axes]):
            if part is not None:
                node = self.call(torch.narrow, node, axis, *map(self.number, part))
        return node

    def number(self, value: int) -> Any:
        return self.symbols.node(value)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_method(name, args, kwargs)

    def concatenate(self, parts: Sequence[Node]) -> Node:
        """Along tokens."""
        return parts[0] if len(parts) == 1 else self.call(torch.cat, list(parts), 2)

    def no_tokens(self, like: Node, holder: Holder, dtype: torch.dtype | None = None) -> Node:
        """Zero tokens of a cache's heads `[B, H, 0, D]`, on the device, and as a rule in the dtype, of `like`."""
        batch, heads, head_dim = (self.number(holder.shape[self.plans[holder].axes[r]]) for r in (0, 1, 3))
        keywords = {} if dtype is None else {"dtype": dtype}
        return self.call(torch.ops.aten.new_empty.default, like, [batch, heads, 0, head_dim], **keywords)

    def center(self, holder: Holder) -> Node:
        """What tokens of a cache are stored less, `[B, H, 1, D]`."""
        return self.own(holder, "center")

    def centered(self, value: Node, holder: Holder, dtype: torch.dtype | None = None) -> Node:
        """Tokens `[B, H, n, D]` less a cache's mean, where it has one; see `kernels.centers.centered`."""
        return self.call(centered, value, self.center(holder), dtype) if self.plans[holder].centered else value

    def to_grid(self, value: Node, holder: Holder) -> Node:
        """A tensor `[…, D]` in the basis that a cache is stored in."""
        plan = self.plans[holder]
        grid = grid_of(plan.quantizer)
        if grid.within:
            return self.call(ops.to_grid.default, value, plan.quantizer, plan.group_size)
        return self.call(ops.rotate.default, value) if grid.rotates else value

    def from_grid(self, value: Node, holder: Holder) -> Node:
        """A tensor `[…, D]` back from the basis that a cache is stored in."""
        plan = self.plans[holder]
        grid = grid_of(plan.quantizer)
        if grid.within:
            return self.call(ops.from_grid.default, value, plan.quantizer, plan.group_size)
        return self.call(ops.rotate.default, value) if grid.rotates else value

    def stored(self, value: Node, holder: Holder) -> Node:
        """What is quantized of a tensor `[B, H, n, D]` that is written to a cache, see `kernels.quantizers`; the tensor
        where the operator that writes sees to it (`block_means`)."""
        return value if self.plans[holder].mean_tokens else self.rounded(self.centered(value, holder), holder)

    def rounded(self, value: Node, holder: Holder) -> Node:
        """The same of one that is less the cache's mean already."""
        plan = self.plans[holder]
        grid = grid_of(plan.quantizer)
        if not grid.unbiased:
            return self.to_grid(value, holder)
        settings = (plan.bits, plan.group_size, *([True] if grid.symmetric else []))
        if grid.within:
            value = self.to_grid(self.method("float", value), holder)
            return self.call(ops.round_rotated.default, value, *settings)
        return self.call(ops.round_unbiased.default, value, *settings)

    def roles(self, holder: Holder) -> tuple[int, ...]:
        """The canonical axis of each of a cache's own axes."""
        axes = self.plans[holder].axes
        return tuple(axes.index(a) for a in range(4))

    def canonical(self, fresh: Fresh, length: int, roles: Sequence[int | None] | None, dtype: torch.dtype) -> Node:
        """A fresh value as `[B, H, n, D]` of `dtype`. `roles` gives the canonical axis of each of its named axes."""
        node, value = fresh.node, example(fresh.node)
        axes = [roles[a] if roles is not None and a is not None else a for a in fresh.axes]
        token_dim = axes.index(2) if 2 in axes else None  # of a single token there may be none
        if token_dim is not None and not (same(fresh.first, 0) and same(length, value.shape[token_dim])):
            node = self.call(torch.narrow, node, token_dim, self.number(fresh.first), self.number(length))
        for dim in reversed([d for d, role in enumerate(axes) if role is None]):  # of size 1, and standing for nothing
            node = self.method("squeeze", node, dim)
            del axes[dim]
        for role in [r for r in range(4) if r not in axes]:  # a cache of fewer dimensions has one batch entry
            node = self.method("unsqueeze", node, -1)
            axes.append(role)
        order = [axes.index(role) for role in range(4)]
        if order != sorted(order):
            node = self.method("permute", node, order)
        if value.dtype != dtype:
            node = self.method("to", node, dtype)
        return node
