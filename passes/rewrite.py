"""Replaces caches by their packed components: writes become `jkv::append`, attention `jkv::attention`.

Works on a copy of Dynamo's graph, which Dynamo goes on reading. What the callable around the compiled graph has to do
is told by `Rewritten`: which components to pass, which outputs are windows on a cache, which ranges stay in full
precision.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node

from ..geometry import constant, same
from ..kernels.quantizers import rotates
from ..packed import PackedKV
from .actions import Append, Attend, Fill, Holder, Move, Read, Tracking
from .nodes import example, identity, is_in_place, offset
from .segments import Cached, Fresh, Segment
from .symbols import Symbols

ops = torch.ops.jkv
Component = Literal["plain", "codes", "scales", "active", "active_range", "first_token"]


@dataclass(frozen=True)
class CachePlan:
    """How one cache is stored: `axes[role]` is the tensor's dimension for (batch, head, token, channel)."""

    axes: tuple[int, ...]
    bits: int
    group_size: int
    quantizer: str


@dataclass
class OutputWindow:
    """An output of the user's graph that is a view of a cache: where its geometry is among the outputs."""

    argument: int
    size: list[int]  # each an index into the compiled graph's outputs
    stride: list[int]
    offset: int


@dataclass
class KeptRange:
    """A range written by a graph that does not attend to it, held in full precision by the store."""

    argument: int
    data: int  # indices into the compiled graph's outputs
    start: int
    stop: int


@dataclass
class Rewritten:
    """A graph of plain tensors and what stands between it and the caller's arguments."""

    graph: GraphModule
    inputs: list[tuple[int, Component]]
    outputs: list[int | OutputWindow]
    kept: list[KeptRange] = field(default_factory=list)
    written: list[int] = field(default_factory=list)  # arguments whose store no longer has an active range
    caches: dict[int, CachePlan] = field(default_factory=dict)  # by argument

    @property
    def has_extra_outputs(self) -> bool:
        return bool(self.kept) or any(isinstance(o, OutputWindow) for o in self.outputs)


def copy_graph(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy that shares the module's parameters and metadata, and the map from old nodes to new ones."""
    graph = Graph()
    nodes: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, nodes)
    graph.output(output)
    for old, new in nodes.items():
        new.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    copied = GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source  # type: ignore[assignment]
    return copied, nodes


def rewrite(gm: GraphModule, tracking: Tracking, plans: dict[Holder, CachePlan], correction: str) -> Rewritten:
    """Lower every use of the caches in `plans`; `gm` is changed; `tracking` must have been made from it."""
    return _Rewriter(gm, tracking, plans, correction).run()


class _Rewriter:
    def __init__(self, gm: GraphModule, tracking: Tracking, plans: dict[Holder, CachePlan], correction: str) -> None:
        self.gm, self.graph, self.plans, self.correction = gm, gm.graph, plans, correction
        self.symbols = Symbols(gm.graph)
        self.placeholders = list(gm.graph.find_nodes(op="placeholder"))
        self.position = {p: i for i, p in enumerate(self.placeholders)}
        self.components: dict[tuple[Node, Component], Node] = {}
        self.holders = {holder.node: holder for holder in plans}
        self.writes = {w.node: w for w in tracking.writes if w.holder in plans}
        self.attends = {a.call.node: a for a in tracking.attends if a.key_cache in plans and a.value_cache in plans}
        self.copies = [copy for copy in tracking.copies if copy.cache in plans]
        self.reads: dict[Node, list[Read]] = {}
        for read in tracking.reads:
            if read.holder in plans:
                self.reads.setdefault(read.consumer, []).append(read)
        self.rewritten = Rewritten(gm, [], [], caches={self.position[h.node]: plan for h, plan in plans.items()})

    def run(self) -> Rewritten:
        output = next(iter(self.graph.find_nodes(op="output")))
        self._bind_first_tokens()
        order = [n for n in self.graph.nodes if n.op != "output"]
        for node in order:
            self.symbols.see(node)
            if node in self.writes or node in self.attends:
                with self.graph.inserting_before(node):
                    self._lower(node)
        self._erase_edited_copies()
        self._erase_dead()
        self.symbols.known.clear()
        self._bind_first_tokens()
        for node in [n for n in self.graph.nodes if n.op != "output"]:
            self.symbols.see(node)
            with self.graph.inserting_before(node):
                for read in self.reads.get(node, []):
                    node.replace_input_with(read.argument, self._materialize(read))
        with self.graph.inserting_before(output):
            self._lower_output(output)
        self._erase_dead()
        for cache in self.holders:
            assert not cache.users, f"{cache} still has users: {list(cache.users)}"
            self.graph.erase_node(cache)
        self._order_inputs()
        self.graph.lint()
        self.gm.recompile()
        return self.rewritten

    # ---- pieces ----

    def _bind_first_tokens(self) -> None:
        """Where a window begins is a symbol that Dynamo makes no input of: it is one here."""
        for cache in self.holders:
            value = example(cache)
            first = constant(value.first_token.shape[0]) if isinstance(value, PackedKV) else 0
            if isinstance(first, torch.SymInt):
                self.symbols.known[first.node.expr] = self._component(cache, "first_token")

    def _component(self, cache: Node, kind: Component) -> Node:
        """The placeholder of one component of a cache, next to the cache's own."""
        key = (cache, kind)
        if key not in self.components:
            with self.graph.inserting_before(cache):
                node = self.graph.placeholder(f"{cache.name}_{kind}")
            node._dynamo_source = None  # type: ignore[attr-defined]
            self.components[key] = node
        return self.components[key]

    def _packed(self, cache: Node) -> tuple[Node, Node]:
        return self._component(cache, "codes"), self._component(cache, "scales")

    def _call(self, target: Callable[..., Any], *args: Any) -> Node:
        return self.graph.call_function(target, args)

    def _canonical(self, fresh: Fresh, length: int, roles: tuple[int, ...] | None, dtype: torch.dtype) -> Node:
        """A fresh value as `[B, H, n, D]` of `dtype`. `roles` gives the canonical axis of each of its named axes."""
        node, value = fresh.node, example(fresh.node)
        axes = [roles[a] if roles is not None and a is not None else a for a in fresh.axes]
        token_dim = axes.index(2)
        if not (same(fresh.first, 0) and same(length, value.shape[token_dim])):
            node = self._call(torch.narrow, node, token_dim, self.symbols.node(fresh.first), self.symbols.node(length))
        order = [axes.index(role) for role in range(4)]
        if order != sorted(order):
            node = self.graph.call_method("permute", (node, order))
        if value.dtype != dtype:
            node = self.graph.call_method("to", (node, dtype))
        return node

    def _roles(self, holder: Holder) -> tuple[int, ...]:
        """The canonical axis of each of a cache's own axes."""
        axes = self.plans[holder].axes
        return tuple(axes.index(a) for a in range(4))

    def _fill(self, write: Fill, plan: CachePlan, codes: Node, scales: Node) -> None:
        number, value = self.symbols.node, float(write.value)
        tokens = codes, scales, number(write.start), number(write.stop)
        if value and rotates(plan.quantizer):
            self._call(ops.fill_rotated.default, *tokens, plan.bits, value)
        else:
            self._call(ops.fill.default, *tokens, value)

    def _concatenate(self, parts: list[Node]) -> Node:
        return parts[0] if len(parts) == 1 else self._call(torch.cat, parts, 2)

    # ---- lowering ----

    def _lower(self, node: Node) -> None:
        if node in self.attends:
            self._lower_attention(self.attends[node])
            return
        write = self.writes[node]
        cache, number = write.holder.node, self.symbols.node
        codes, scales = self._packed(cache)
        plan = self.plans[write.holder]
        if isinstance(write, Append):
            roles = self._roles(write.holder)
            fresh = Fresh(write.value, write.axes, 0)
            value = self._canonical(fresh, write.stop - write.start, roles, example(write.value).dtype)
            value = self._rotated(value, plan)
            self._call(ops.append.default, codes, scales, value, number(write.start), plan.bits)
        elif isinstance(write, Move):
            args = number(write.source), number(write.destination), number(write.length)
            self._call(ops.move.default, codes, scales, *args)
        elif isinstance(write, Fill):
            self._fill(write, plan, codes, scales)
        target = node.args[0]
        if node.users and isinstance(target, Node):  # in-place methods return what they write to
            node.replace_all_uses_with(target)
        self.graph.erase_node(node)

    def _lower_attention(self, attend: Attend) -> None:
        call = attend.call
        dtype = example(call.node).dtype
        query = call.query
        if example(query).dtype != dtype:
            query = self.graph.call_method("to", (query, dtype))
        keys, values = (self._fresh_parts(segments, dtype) for segments in (attend.key, attend.value))
        cached = [s for s in attend.key if isinstance(s.content, Cached)]
        if not cached:  # the first chunk: nothing is quantized yet
            args = [query, self._concatenate(keys), self._concatenate(values), call.mask, 0.0, call.is_causal]
            grouped = example(call.query).shape[1] != example(call.key).shape[1]
            result = self.graph.call_function(
                torch.nn.functional.scaled_dot_product_attention, tuple(args),
                {"scale": call.scale, "enable_gqa": bool(grouped)},
            )  # fmt: skip
        else:
            result = self._call_packed(attend, query, cached, keys, values)
        if cached and example(call.node).stride() != _attention_stride(example(call.node)):
            result = self.graph.call_method("contiguous", (result,))
        call.node.replace_all_uses_with(result)
        self.graph.erase_node(call.node)

    def _call_packed(
        self, attend: Attend, query: Node, cached: list[Segment], keys: list[Node], values: list[Node]
    ) -> Node:
        call, number = attend.call, self.symbols.node
        key_plan, value_plan = self.plans[attend.key_cache], self.plans[attend.value_cache]
        components = [*self._packed(attend.key_cache.node), *self._packed(attend.value_cache.node)]
        ranges = [number(p) for s in cached for p in (s.content.first, s.content.first + s.length)]
        query = self._rotated(query, key_plan)
        key = self._rotated(self._concatenate(keys), key_plan) if keys else self._no_tokens(query, attend.key_cache)
        value = (
            self._rotated(self._concatenate(values), value_plan)
            if values
            else self._no_tokens(query, attend.value_cache)
        )
        mask = self._causal_mask(attend) if call.is_causal else call.mask
        settings = (mask, False, call.scale, key_plan.bits, value_plan.bits, self.correction)
        if len(cached) == 1 and not attend.key_cache.writes and not attend.value_cache.writes:
            active = [*self._active(attend.key_cache), *self._active(attend.value_cache)]
            args = (*components, *active, *ranges, key, value, *settings)
            result = self._call(ops.attention_active.default, query, *args)
        else:
            result = self._call(ops.attention.default, query, *components, ranges, key, value, *settings)
        return self._rotated(result, value_plan)

    def _rotated(self, value: Node, plan: CachePlan) -> Node:
        """A tensor `[…, D]` in the basis that a cache is stored in, or back from it: a rotation that is its inverse."""
        return self._call(ops.rotate.default, value) if rotates(plan.quantizer) else value

    def _active(self, cache: Holder) -> tuple[Node, Node]:
        """What a cache holds in full precision, in the basis that it is stored in, and its range."""
        held = self._component(cache.node, "active")
        return self._rotated(held, self.plans[cache]), self._component(cache.node, "active_range")

    def _no_tokens(self, query: Node, cache: Holder) -> Node:
        """Zero tokens of a cache's heads, where no key is in full precision."""
        batch, heads, head_dim = (self.symbols.node(cache.shape[self.plans[cache].axes[r]]) for r in (0, 1, 3))
        return self._call(torch.ops.aten.new_empty.default, query, [batch, heads, 0, head_dim])

    def _causal_mask(self, attend: Attend) -> Node:
        """PyTorch's `is_causal` over cached and current keys together: query i sees the first i + 1 of them."""
        length = self.symbols.node(example(attend.call.query).shape[2])
        total = self.symbols.node(attend.key[-1].stop)
        device = example(attend.call.query).device
        ones = self.graph.call_function(torch.ones, ([length, total],), {"dtype": torch.bool, "device": device})
        return self.graph.call_method("tril", (ones,))

    def _fresh_parts(self, segments: list[Segment], dtype: torch.dtype) -> list[Node]:
        return [self._canonical(s.content, s.length, None, dtype) for s in segments if isinstance(s.content, Fresh)]

    def _materialize(self, read: Read) -> Node:
        """A view of a cache as an ordinary tensor: cached tokens dequantized, fresh ones as they are."""
        holder, plan, number = read.holder, self.plans[read.holder], self.symbols.node
        roles = self._roles(holder)
        codes, scales = self._packed(holder.node)
        to_view = [
            roles[a] for a in read.window.axes if a is not None
        ]  # canonical axis of each of the view's dimensions
        parts = []
        for segment in read.segments:
            if same(segment.length, 0):
                continue
            content = segment.content
            if isinstance(content, Fresh):
                named = Fresh(content.node, tuple(to_view[a] for a in content.axes if a is not None), content.first)
                parts.append(self._canonical(named, segment.length, None, holder.dtype))
                continue
            args = number(content.first), number(content.first + segment.length), plan.bits, holder.dtype
            if holder.writes:
                parts.append(self._call(ops.dequantize.default, codes, scales, *args))
            else:
                active = self._active(holder)
                parts.append(self._call(ops.dequantize_active.default, codes, scales, *active, *args))
            parts[-1] = self._rotated(parts[-1], plan)
        node = self._concatenate(parts)
        order = [to_view[i] for i in range(len(to_view))]
        dropped = [r for r in range(4) if r not in order]
        if [*order, *dropped] != [0, 1, 2, 3]:
            node = self.graph.call_method("permute", (node, [*order, *dropped]))
        for _ in dropped:
            node = self.graph.call_method("squeeze", (node, -1))
        for i, axis in enumerate(read.window.axes):
            if axis is None:
                node = self.graph.call_method("unsqueeze", (node, i))
        return node

    # ---- the outer signature ----

    def _lower_output(self, output: Node) -> None:
        """Views of a cache are told by their geometry; ranges that nobody here attends to are handed out."""
        values: list[Any] = list(output.args[0]) if isinstance(output.args[0], (tuple, list)) else [output.args[0]]
        windows = {r.argument: r for r in self.reads.get(output, [])}
        plain = [v for v in values if v not in windows]
        extra: list[Any] = []

        def add(value: Any) -> int:
            extra.append(self.symbols.node(value) if not isinstance(value, Node) else value)
            return len(plain) + len(extra) - 1

        taken = 0
        for value in values:
            if value not in windows:
                self.rewritten.outputs.append(taken)
                taken += 1
                continue
            view = example(value)
            self.rewritten.outputs.append(
                OutputWindow(
                    self.position[windows[value].holder.node],
                    [add(n) for n in view.shape],
                    [add(n) for n in view.stride()],
                    add(offset(view)),
                )
            )
        attended = {c for a in self.attends.values() for c in (a.key_cache, a.value_cache)}
        for holder in self.plans:
            if not holder.writes:
                continue
            argument = self.position[holder.node]
            last = [w for w in self.writes.values() if w.holder is holder][-1]
            if holder in attended or not isinstance(last, Append):
                self.rewritten.written.append(argument)
                continue
            fresh = Fresh(last.value, last.axes, 0)
            held = self._canonical(fresh, last.stop - last.start, self._roles(holder), holder.dtype)
            held = self.graph.call_method("clone", (held,), {"memory_format": torch.contiguous_format})
            self.rewritten.kept.append(KeptRange(argument, add(held), add(last.start), add(last.stop)))
        output.args = ((*plain, *extra),)

    def _order_inputs(self) -> None:
        components = {node: (self.position[cache], kind) for (cache, kind), node in self.components.items()}
        for node in self.graph.find_nodes(op="placeholder"):
            _, kind = components.get(node, (0, "plain"))
            if kind == "first_token" and not node.users:
                self.graph.erase_node(node)
                continue
            self.rewritten.inputs.append(components.get(node) or (self.position[node], "plain"))

    def _erase_edited_copies(self) -> None:
        """Copies of a cache that are written to, and now read by nothing: their contents went into the attention."""
        for copy in reversed(self.copies):
            key = identity(example(copy.node))
            shown = [n for n in self.graph.nodes if isinstance(v := example(n), torch.Tensor) and identity(v) == key]
            users = {user for node in shown for user in node.users if user not in shown}
            if all(user.target is operator.setitem and user.args[0] in shown for user in users):
                for node in [*users, *reversed(shown)]:
                    self.graph.erase_node(node)

    def _erase_dead(self) -> None:
        """Views, copies and edited copies of caches that nothing uses any more."""
        from_cache: set[Node] = set()
        for node in self.graph.nodes:
            if node in self.holders or any(a in from_cache for a in node.all_input_nodes):
                from_cache.add(node)
        for node in reversed(list(self.graph.nodes)):
            removable = node.op in ("call_method", "call_function") and node in from_cache and not node.users
            if removable and isinstance(example(node), (torch.Tensor, list, tuple)) and not is_in_place(node):
                self.graph.erase_node(node)


def _attention_stride(value: torch.Tensor) -> tuple[int, ...]:
    """Strides of `[B, L, H, D]` memory seen as `[B, H, L, D]`, as `jkv::attention` returns it."""
    _, heads, length, head_dim = value.shape
    return (length * heads * head_dim, head_dim, heads * head_dim, 1)
