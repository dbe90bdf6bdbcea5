"""Rewrites every spelling of attention that may read a cache to `F.scaled_dot_product_attention` over `[B, H, L, D]`.

Attention that can have nothing to do with a cache stays exactly as it was: its keys and values depend on no tensor that
its queries do not depend on as well.
"""

from __future__ import annotations

import contextlib
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..compat import fake_mode_of
from ..geometry import hint, same
from .attention_forms import FLEX, SPELLED, AttentionArguments, NotCanonical, as_attention, sdpa
from .context_parallel import canonicalise_parted, parted_attention
from .flex import canonicalise_flex
from .nodes import example, identity, mutates, name_of
from .sources import Sources
from .spelled_as_calls import attention_call
from .spelled_by_hand import HandWritten, Mask, check_unchanged, hand_written, untransposed
from .spelled_by_users import registered_call
from .symbols import Symbols
from .with_lse import canonicalise_with_lse, returns_used_lse

_FULL, _GROUPED = "BHLD", "BHGLD"
_CALLS = ("call_function", "call_method")


@dataclass(frozen=True)
class Left:
    """Attention over something that gathers tokens, left as the model spells it, and why."""

    node: Node
    reason: str


def canonicalise(graph: Graph, as_spelled: frozenset[str] = frozenset()) -> list[Left]:
    """Rewrite a graph's attention to one form; `graph` is changed, and what it computes is not, but for rounding.

    Args:
        as_spelled: names of nodes that are not touched: what new nodes have as `meta[SPELLED]`.

    Returns:
        Attention over something like a cache that has no such form.
    """
    left: list[Left] = []
    sources = Sources(graph)
    for node in list(graph.nodes):
        if node.op not in _CALLS or node.name in as_spelled:
            continue
        call = as_attention(node)
        if call is not None and example(call.query).dim() == 4:
            continue
        try:
            if (parted := parted_attention(node)) is not None:
                if sources.may_read_a_cache(parted.query, parted.key, parted.value):
                    canonicalise_parted(graph, parted)
                continue
            if returns_used_lse(node):
                if sources.may_read_a_cache(*node.args[:3]):
                    canonicalise_with_lse(graph, node)
                continue
            _canonicalise(graph, node, sources)
        except NotCanonical as error:
            operands = [a for a in node.all_input_nodes if isinstance(example(a), Tensor)]
            if any(sources.gathered(a) for a in operands):
                left.append(Left(node, str(error)))
    return left


def _canonicalise(graph: Graph, node: Node, sources: Sources) -> None:
    if node.target is FLEX:
        if sources.may_read_a_cache(*node.args[:3]):
            canonicalise_flex(graph, node, _only_result(node))
        return
    attention: AttentionArguments | HandWritten | None = (
        registered_call(node) or attention_call(node) or hand_written(node)
    )
    if attention is None or not sources.may_read_a_cache(attention.query, attention.key, attention.value):
        return
    result = _only_result(node)
    chain: list[Node] = []
    if isinstance(attention, HandWritten):
        chain = attention.chain
        check_unchanged(chain, [attention.query, attention.key, *(m.node for m in attention.masks)])
    elif attention.dropout:
        raise NotCanonical(f"dropout of {attention.dropout}")
    own = _own_storages(graph, chain)
    with graph.inserting_before(node):
        replacement = _Writer(graph, node, example(result)).write(attention)
    result.replace_all_uses_with(replacement)
    _erase_unused(graph, [result, *chain], own)


def _only_result(node: Node) -> Node:
    """The node that holds the result: the call itself, or the first of the several things that it returns."""
    value = example(node)
    if isinstance(value, Tensor):
        return node
    if not isinstance(value, (tuple, list)) or not isinstance(value[0], Tensor):
        raise NotCanonical(f"`{name_of(node)}` returns a {type(value).__name__}")
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise NotCanonical(f"what `{name_of(node)}` returns beside the result goes into `{name_of(user)}`")
        if user.args[1] != 0 and user.users:
            raise NotCanonical(f"output {user.args[1]} of `{name_of(node)}` is used, not only the attention's result")
    results = [user for user in node.users if user.args[1] == 0]
    if len(results) != 1:
        raise NotCanonical(f"the result of `{name_of(node)}` is used {len(results)} times")
    return results[0]


class _Writer:
    """Writes the canonical form before `node`, whose result is `result`."""

    def __init__(self, graph: Graph, node: Node, result: Tensor) -> None:
        self.graph, self.node, self.result = graph, node, result

    def write(self, attention: AttentionArguments | HandWritten) -> Node:
        """The node that takes the place of the result."""
        arguments = [attention.query, attention.key, attention.value]
        *layouts, layout = attention.layouts
        split = _split_batch(arguments[1], layouts[1]) if {*layout} == {*"HLD"} else None
        canonical = [self._canonical(a, one, split) for a, one in zip(arguments, layouts)]
        dtype = self.result.dtype
        canonical = [n if example(n).dtype == dtype else self.call("to", n, dtype) for n in canonical]
        query, key, _ = (example(n) for n in canonical)
        grouped = (key.shape[1], query.shape[1] // key.shape[1]) if "G" in layout else None
        if grouped is not None and not all(isinstance(n, int) for n in grouped):
            raise NotCanonical(f"its query heads come in groups of a size that is not known: {grouped}")
        if not same(query.shape[1] % key.shape[1], 0):
            raise NotCanonical(f"{query.shape[1]} query heads over {key.shape[1]} heads of keys")
        keywords: dict[str, Any] = {}
        if isinstance(attention, HandWritten):
            mask = self._sum([self._mask(m, split, grouped) for m in attention.masks])
            scale: float | None = attention.scale
        else:
            mask, scale = attention.mask, attention.scale
            if attention.causal and same(query.shape[2], key.shape[2]) and mask is None:
                keywords["is_causal"] = True
            elif attention.causal:
                mask = self._sum([m for m in (mask, self._causal(attention.causal, *canonical[:2])) if m is not None])
        if mask is not None:
            known = example(mask)
            keywords["attn_mask"] = mask if known.dtype in (torch.bool, dtype) else self.call("to", mask, dtype)
        if scale is not None:
            keywords["scale"] = scale
        if not same(query.shape[1], key.shape[1]):
            keywords["enable_gqa"] = True
        steps = _steps_back(layout, split, grouped)
        node = self.call(sdpa, *canonical, value=self._unlaid(steps, split), **keywords)
        node.meta[SPELLED] = self.node.name
        for i, (name, *args) in enumerate(steps):
            node = self.call(name, node, *args, value=self.result if i == len(steps) - 1 else None)
        return self._same_strides(node)

    def call(self, target: Any, *args: Any, value: Any = None, **kwargs: Any) -> Node:
        """A new node that knows its value; `value` where that is known already."""
        if isinstance(target, str):
            node = self.graph.call_method(target, args, kwargs)
        else:
            node = self.graph.call_function(target, args, kwargs)
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if name in self.node.meta:
                node.meta[name] = self.node.meta[name]
        node.meta["example_value"] = self.evaluate(target, *args, **kwargs) if value is None else value
        return node

    def evaluate(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """The value of a call on nodes' values, in the fake mode of the graph that they belong to."""
        args, kwargs = torch.fx.map_arg((args, kwargs), example)
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        with fake_mode_of(self.result) or contextlib.nullcontext(), torch.no_grad():
            return function(*args, **kwargs)

    def _canonical(self, node: Node, layout: str, split: tuple[int, int] | None) -> Node:
        """A tensor of the call as `[B, H, L, D]`, a view wherever it can be one."""
        if "1" in layout:
            at = layout.index("1")
            node, layout = self.call("select", node, at, 0), layout.replace("1", "")
        if split is not None:
            merged = _merged_from(node, layout, split)
            if merged is not None:
                node, layout = merged
            else:
                at = layout.index("H")
                node = self.call("unflatten", node, at, split)
                layout = layout.replace("H", "BH")
        for letter in [c for c in "HB" if c not in layout]:
            node, layout = self.call("unsqueeze", node, 0), letter + layout
        if "G" in layout:
            return self.call("flatten", self._permute(node, [layout.index(c) for c in _GROUPED]), 1, 2)
        return self._permute(node, [layout.index(c) for c in _FULL])

    def _permute(self, node: Node, order: list[int]) -> Node:
        step = _permutation(order)
        return node if step is None else self.call(step[0], node, *step[1:])

    def _same_strides(self, node: Node) -> Node:
        """Memory in the order that the call's result had, as views that are taken of it may need."""
        strides = self.result.stride()
        order = sorted(range(len(strides)), key=lambda i: -hint(strides[i]))
        if 0 in strides or order == list(range(len(order))):
            return self.call("contiguous", node, value=self.result)
        node = self.call("contiguous", self._permute(node, order))
        return self._permute(node, [order.index(i) for i in range(len(order))])

    def _unlaid(self, steps: list[tuple[Any, ...]], split: tuple[int, int] | None) -> Tensor:
        """What attention returns before the steps that lay it out as the call's result."""
        value = self.result
        for name, *args in reversed(steps):
            if name == "flatten":
                value = self.evaluate("unflatten", value, args[0], split)
            elif name == "unflatten":
                value = self.evaluate("flatten", value, args[0], args[0] + 1)
            elif name == "squeeze":
                value = self.evaluate("unsqueeze", value, args[0])
            elif name == "transpose":
                value = self.evaluate("transpose", value, *args)
            else:
                value = self.evaluate("permute", value, [args[0].index(i) for i in range(len(args[0]))])
        return value

    # ---- masks ----

    def _mask(self, mask: Mask, split: tuple[int, int] | None, grouped: tuple[int, int] | None) -> Node:
        node = mask.node
        if mask.fill is not None:
            if (mask.fill == float("-inf")) == mask.hides:
                node = self.call("logical_not", node)
            if mask.fill != float("-inf"):
                fill = max(mask.fill, torch.finfo(self.result.dtype).min)
                zeros = self.call(torch.zeros_like, node, dtype=self.result.dtype)
                node = self.call("masked_fill", zeros, node, fill)
        else:
            if example(node).dtype == torch.bool:  # added as a number
                node = self.call("to", node, self.result.dtype)
            if mask.factor != 1:
                node = self.call(operator.mul, node, mask.factor)
        if mask.entries is not None and split is None:
            node = self._of_entries(node, mask.entries)
        if split is not None and example(node).dim() == 3:
            shape = example(node).shape
            several = not same(shape[0], 1)
            node = self.call("unflatten", node, 0, split) if several else self.call("unsqueeze", node, 0)
        while example(node).dim() < 2:
            node = self.call("unsqueeze", node, 0)
        if grouped is not None and example(node).dim() > 2:  # its heads, and the queries of a group, are one dimension
            node = self.call("unsqueeze", node, 0) if example(node).dim() == 3 else node
            shape = example(node).shape
            if same(shape[-4], 1) and same(shape[-3], 1):
                return self.call("select", node, -3, 0)
            sizes = [-1] * (len(shape) - 4) + [*grouped, -1, -1]
            node = self.call("flatten", self.call("expand", node, *sizes), -4, -3)
        return node

    def _of_entries(self, node: Node, entries: tuple[int, int]) -> Node:
        """A mask for scores of B batch entries and H heads, for B·H matrices of them."""
        while example(node).dim() > 2 and same(example(node).shape[0], 1):
            node = self.call("select", node, 0, 0)
        if example(node).dim() < 3:
            return node
        node = self.call("expand", node, *map(self._size, entries), -1, -1)
        return self.call("flatten", node, 0, 1)

    def _size(self, n: int) -> Any:
        return n if isinstance(n, int) else self._symbols().node(n)

    def _symbols(self) -> Symbols:
        """The nodes with numbers before this one."""
        symbols = Symbols(self.graph)
        for node in self.graph.nodes:
            if node is self.node:
                break
            symbols.see(node)
        return symbols

    def _sum(self, masks: list[Node]) -> Node | None:
        """One mask for several: all that is additive added, what is boolean filled in."""
        if len(masks) < 2:
            return masks[0] if masks else None
        boolean = [m for m in masks if example(m).dtype == torch.bool]
        additive = [m for m in masks if m not in boolean]
        total = additive[0] if additive else None
        for mask in additive[1:]:
            total = self.call(operator.add, total, mask)
        if not boolean:
            return total
        keep = boolean[0]
        for mask in boolean[1:]:
            keep = self.call(operator.and_, keep, mask)
        if total is None:
            return keep
        return self.call(torch.where, keep, total, float("-inf"))

    def _causal(self, corner: str, query: Node, key: Node) -> Node | None:
        """The mask of causal attention over more (or fewer) keys than queries; True: attend."""
        symbols = self._symbols()
        length, keys = example(query).shape[2], example(key).shape[2]
        diagonal = 0 if corner == "top_left" else keys - length
        settings = {"dtype": torch.bool, "device": example(query).device}
        known = self.evaluate(torch.ones, [length, keys], **settings)
        ones = self.call(torch.ones, [symbols.node(length), symbols.node(keys)], value=known, **settings)
        return self.call("tril", ones, symbols.node(diagonal), value=self.evaluate("tril", known, diagonal))


def _permutation(order: list[int]) -> tuple[Any, ...] | None:
    """The method that reorders dimensions so, with its arguments; None where they are in order."""
    moved = [i for i, j in enumerate(order) if i != j]
    if not moved:
        return None
    return ("transpose", *moved) if len(moved) == 2 else ("permute", order)


def _steps_back(layout: str, split: tuple[int, int] | None, grouped: tuple[int, int] | None) -> list[tuple[Any, ...]]:
    """The methods that lay `[B, H, L, D]` out as `layout`."""
    steps: list[tuple[Any, ...]] = [] if grouped is None else [("unflatten", 1, grouped)]
    full = layout.replace("H", "BH") if split is not None else "".join(c for c in "BH" if c not in layout) + layout
    order = _FULL if grouped is None else _GROUPED
    step = _permutation([order.index(c) for c in full])
    if step is not None:
        steps.append(step)
    if split is not None:
        at = full.index("B")
        steps.append(("flatten", at, at + 1))
    else:
        steps += [("squeeze", 0)] * (len(order) - len(layout))
    return steps


def _split_batch(key: Node, layout: str) -> tuple[int, int] | None:
    """(B, H), where the key's first dimension is both of them merged by a reshape of the graph."""
    inner: Node | None = key
    while isinstance(inner, Node) and inner.op in _CALLS:
        if (found := _source_of_merge(inner, layout.index("H"))) is not None:
            return found
        moved = untransposed(inner, layout)
        inner = None if moved is None else moved[0]
        layout = layout if moved is None else moved[1]
    return None


def _source_of_merge(node: Node, at: int) -> tuple[int, int] | None:
    """The sizes of two dimensions that become dimension `at` of a node."""
    if name_of(node) not in ("reshape", "view", "flatten") or not isinstance(node.args[0], Node):
        return None
    inner, outer = example(node.args[0]), example(node)
    if inner.dim() != 4 or outer.dim() != 3 or not same(inner.shape[at] * inner.shape[at + 1], outer.shape[at]):
        return None
    kept = [*inner.shape[:at], *inner.shape[at + 2 :]]
    if not all(map(same, kept, [*outer.shape[:at], *outer.shape[at + 1 :]])):
        return None
    return inner.shape[at], inner.shape[at + 1]


def _merged_from(node: Node, layout: str, split: tuple[int, int]) -> tuple[Node, str] | None:
    """What a tensor was before batch and heads were merged, with its layout: so that a copy is none of the cache."""
    inner, order = node, layout
    while inner.op in _CALLS:
        found = _source_of_merge(inner, order.index("H"))
        if found is not None and all(same(m, n) for m, n in zip(found, split)):
            return inner.args[0], order.replace("H", "BH")  # type: ignore[return-value]
        moved = untransposed(inner, order)
        if moved is None:
            return None
        inner, order = moved
    return None


def _own_storages(graph: Graph, chain: list[Node]) -> set[int]:
    """Memory that nothing but a chain of nodes sees: what is written to it in place is gone with the chain."""
    members = set(chain)
    own = {identity(v) for n in chain[1:] if isinstance(v := example(n), Tensor)}
    for node in graph.nodes:
        value = example(node)
        if isinstance(value, Tensor) and (node not in members or not members.issuperset(node.users)):
            own.discard(identity(value))
    return own


def _erase_unused(graph: Graph, nodes: list[Node], own: set[int]) -> None:
    """Erase nodes that nothing uses, and what only they used; never what writes to memory that others see."""
    pending, erased = nodes[::-1], set()
    while pending:
        node = pending.pop()
        if node in erased or node.users or node.op not in _CALLS:
            continue
        if any(mutates(node, a) and identity(example(a)) not in own for a in node.all_input_nodes):
            continue
        pending += node.all_input_nodes
        graph.erase_node(node)
        erased.add(node)
