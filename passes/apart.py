"""Keys and values that lie in one tensor, `[2, …]` or `[B, S, 2, …]`, told apart where a graph handles both at once.

What is known of a cache is known of keys, or of values. So both are written one after the other, and concatenated one
by one, where the graph goes on with one of them at a time; and what reads both gets them stacked.
"""

from __future__ import annotations

import contextlib
import enum
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from ..compat import fake_mode_of, is_dtensor
from ..geometry import same
from ..packed import PackedKV
from .nodes import CONCATENATIONS, Write, as_write, copied, example, identity, is_in_place, joined_along, name_of


def tell_apart(graph: Graph) -> None:
    """Rewrite such nodes, in place."""
    inputs = {identity(v): v for n in graph.find_nodes(op="placeholder") if _may_hold_both(v := example(n))}
    steps = {key: step for key, value in inputs.items() if (step := _step(graph, key, value)) is not None}
    written = {identity(w.target) for n in graph.nodes if (w := as_write(n)) is not None}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        if (write := as_write(node)) is not None:
            step = steps.get(identity(write.target))
            if step is not None and (dim := _halved(write.target, step)) is not None:
                _write_each(graph, node, write, dim)
        elif not _join_each(graph, node):
            packed = {i: s for i, s in steps.items() if isinstance(inputs[i], PackedKV) or i in written}
            _read_each(graph, node, packed)


def _may_hold_both(value: Any) -> bool:
    """Whether a tensor may hold keys and values."""
    plain = isinstance(value, Tensor) and not is_dtensor(value) and not isinstance(value, torch.nn.Parameter)
    return plain and value.dim() == 5 and value.dtype.is_floating_point


def _of_two(value: Any) -> bool:
    """Whether a tensor may hold keys and values, one after the other."""
    return _may_hold_both(value) and same(value.shape[0], 2)


def _step(graph: Graph, storage: int, whole: Tensor) -> int | None:
    """How far values lie from keys in a tensor; None where it does not hold both, as far as a graph shows."""
    if _of_two(whole) and _use(graph, storage, whole.stride(0)) is not _Use.WHOLE:
        return whole.stride(0)
    beside_heads = same(whole.shape[2], 2) and _use(graph, storage, whole.stride(2)) is _Use.HALVES
    return whole.stride(2) if beside_heads else None


class _Use(enum.Enum):
    NONE = enum.auto()
    HALVES = enum.auto()
    WHOLE = enum.auto()


def _use(graph: Graph, storage: int, step: int) -> _Use:
    """Whether a graph reads halves of a tensor; or both at once, other dimensions merged: it has two batch entries."""
    use = _Use.NONE
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or as_write(node) is not None:
            continue
        results = [v for v in pytree.tree_leaves(example(node)) if isinstance(v, Tensor)]
        for argument in node.all_input_nodes:
            value = example(argument)
            if isinstance(value, Tensor) and identity(value) == storage and _halved(value, step) is not None:
                shown = [v for v in results if identity(v) == storage]
                if any(_halved(v, step) is None for v in shown):
                    return _Use.HALVES
                if results and not shown and value.dim() < 5:
                    use = _Use.WHOLE
    return use


def _halved(view: Tensor, step: int) -> int | None:
    """The dimension of a view of keys and values that tells one from the other; None where it shows one of them."""
    pairs = zip(view.shape, view.stride())
    found = [d for d, (n, stride) in enumerate(pairs) if same(n, 2) and same(stride, step)]
    return found[0] if len(found) == 1 else None


def _write_each(graph: Graph, node: Node, write: Write, dim: int) -> None:
    value, shown = write.value, write.target
    if isinstance(value, Node):
        given = example(value)
        if not isinstance(given, Tensor) or given.dim() != shown.dim() or not same(given.shape[dim], 2):
            return  # one for both, or what cannot be told
    if write.positions is not None and write.dim == dim:
        return
    new = _Nodes(graph, node)
    base = write.base
    if node.target is operator.setitem and write.positions is None:
        base = new.call(operator.getitem, base, node.args[1])
    for i in range(2):
        target = new.method("select", base, dim, i)
        part = new.method("select", value, dim, i) if isinstance(value, Node) else value
        if write.positions is not None:
            before = write.dim - (dim < write.dim)
            if node.target is operator.setitem:
                new.call(operator.setitem, target, (*[slice(None)] * before, write.positions), part)
            else:
                new.method("index_copy_", target, before, write.positions, part)
        else:
            new.method("copy_" if isinstance(part, Node) else "fill_", target, part)
    node.replace_all_uses_with(write.base)  # in-place methods return what they write to
    graph.erase_node(node)


def _join_each(graph: Graph, node: Node) -> bool:
    """A concatenation along another dimension, where the graph goes on with one half of what it makes."""
    if node.target not in CONCATENATIONS or not _of_two(example(node)):
        return False
    dim, parts = joined_along(node), copied(node)
    halves = {user: i for user in node.users if (i := _half(user)) is not None}
    apart = [user for user in node.users if name_of(user) == "unbind" and _along(user) == 0]
    if not dim or not (halves or apart) or not all(_of_two(example(p)) for p in parts):
        return False
    new = _Nodes(graph, node)
    each = [new.call(torch.cat, [new.method("select", p, 0, i) for p in parts], dim - 1) for i in range(2)]
    for user, i in halves.items():
        user.replace_all_uses_with(each[i])
        graph.erase_node(user)
    for user in apart:
        for taken in list(user.users):
            if (i := _half(taken)) is not None:
                taken.replace_all_uses_with(each[i])
                graph.erase_node(taken)
        if not user.users:
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(new.call(torch.stack, each, 0))
    graph.erase_node(node)
    return True


def _half(node: Node) -> int | None:
    """Which of both a node takes of its argument, 0 or 1."""
    selects = name_of(node) == "select" and len(node.args) == 3 and _along(node) == 0
    taken = node.args[-1] if node.target is operator.getitem or selects else None
    return taken % 2 if type(taken) is int else None


def _along(node: Node) -> Any:
    given = {**dict(zip(("input", "dim"), node.args)), **node.kwargs}
    return given.get("dim", 0)


def _read_each(graph: Graph, node: Node, steps: dict[int, int]) -> None:
    """Give what reads both of a tensor a stack of them; `steps` are those between keys and values, by storage."""
    shown = {identity(v) for v in pytree.tree_leaves(example(node)) if isinstance(v, Tensor)}
    for argument in node.all_input_nodes:
        value = example(argument)
        step = steps.get(identity(value)) if isinstance(value, Tensor) else None
        if step is None or identity(value) in shown:  # a view reads nothing
            continue
        if (dim := _halved(value, step)) is not None:
            new = _Nodes(graph, node)
            each = [new.method("select", argument, dim, i) for i in range(2)]
            node.replace_input_with(argument, new.call(torch.stack, each, dim))


class _Nodes:
    """New nodes before another one, which know their values."""

    def __init__(self, graph: Graph, before: Node) -> None:
        self.graph, self.before = graph, before

    def call(self, target: Any, *args: Any) -> Node:
        with self.graph.inserting_before(self.before):
            return self._known(self.graph.call_function(target, args), target)

    def method(self, name: str, *args: Any) -> Node:
        with self.graph.inserting_before(self.before):
            return self._known(self.graph.call_method(name, args), getattr(Tensor, name))

    def _known(self, node: Node, function: Any) -> Node:
        node.meta = {k: v for k, v in self.before.meta.items() if k in ("stack_trace", "nn_module_stack")}
        if node.target is operator.setitem or is_in_place(node):
            node.meta["example_value"] = example(node.args[0])
            return node
        args = torch.fx.map_arg(node.args, example)
        with _mode(args) or contextlib.nullcontext(), torch.no_grad():
            node.meta["example_value"] = function(*args)
        return node


def _mode(values: Any) -> Any:
    tensors = [v for v in pytree.tree_leaves(values) if isinstance(v, Tensor)]
    modes = (fake_mode_of(t._store.memory[0] if isinstance(t, PackedKV) else t) for t in tensors)
    return next((mode for mode in modes if mode is not None), None)
