"""Writes of whole tokens in other words: brought into the forms that the other passes know.

`slice_scatter` is a concatenation of what is kept and what is new. `scatter_` with one position per token, and
`index_put_` or an assignment with the index of the only batch entry beside the positions, are `index_copy_`. In an
assignment positions may count from the end, which they do not any more.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..compat import fake_mode_of, is_dtensor
from ..geometry import constant, same
from ..packed import PackedKV
from .nodes import as_write, example, identity, mutates, name_of


def spell_out_writes(graph: Graph) -> None:
    """Put those forms in the place of such nodes."""
    counted: dict[tuple[Node, int], Node] = {}  # by positions and the size that they count within: from the first
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or not node.args:
            continue
        changed = {identity(example(a)) for a in node.all_input_nodes if counted and _changes(node, a)}
        counted = {key: n for key, n in counted.items() if not changed or identity(example(key[0])) not in changed}
        written = example(node.args[0])
        if not isinstance(written, Tensor) or is_dtensor(written) or written.dim() < 3:
            continue
        known = _SPELLINGS.get(name_of(node))
        if known is not None:
            with graph.inserting_before(node), _mode(written) or contextlib.nullcontext():
                if not _from_the_first(graph, node, counted):
                    known(graph, node)


def _changes(node: Node, argument: Node) -> bool:
    return isinstance(example(argument), Tensor) and mutates(node, argument)


def _from_the_first(graph: Graph, node: Node, counted: dict[tuple[Node, int], Node]) -> bool:
    """`cache[:, positions] = new`: places are told by their distance from the first one, as packed caches have it."""
    write = as_write(node) if node.target is operator.setitem else None
    if write is None or write.positions is None:
        return False
    length = constant(write.target.shape[write.dim])
    if isinstance(length, int) and example(write.positions).dtype in (torch.int64, torch.int32):
        key = write.positions, length
        if key not in counted:
            counted[key] = _counted(graph, node, *key)
        node.replace_input_with(write.positions, counted[key])
    return True


def _counted(graph: Graph, node: Node, positions: Node, length: int) -> Node:
    below = _call(graph, node, operator.mul, _call(graph, node, operator.lt, positions, 0), length)
    return _call(graph, node, operator.add, positions, below)


def _mode(value: Tensor) -> Any:
    return fake_mode_of(value._store.codes if isinstance(value, PackedKV) else value)


def _joined(graph: Graph, node: Node) -> None:
    """`slice_scatter(input, src, dim, start, end, step)`."""
    given: dict[str, Any] = {**dict(zip(("input", "src", "dim", "start", "end", "step"), node.args)), **node.kwargs}
    base, new = given.get("input"), given.get("src")
    dim, step = (constant(example(given.get(name, default))) for name, default in (("dim", 0), ("step", 1)))
    if not isinstance(base, Node) or not isinstance(new, Node) or not isinstance(dim, int) or step != 1:
        return
    whole, value = example(base), example(new)
    dim, start, end = dim % whole.dim(), given.get("start"), given.get("end")
    if value.dtype != whole.dtype or value.device != whole.device:
        return
    parts = [new]
    if start is not None and not same(example(start), 0):
        parts.insert(0, _call(graph, node, operator.getitem, base, _along(dim, slice(0, start))))
    if end is not None and not same(example(end), whole.shape[dim]):
        parts.append(_call(graph, node, operator.getitem, base, _along(dim, slice(end, None))))
    joined = _call(graph, node, torch.cat, parts, dim)
    if all(map(same, example(joined).shape, whole.shape)) and example(joined).stride() == example(node).stride():
        joined.meta["example_value"] = example(node)
        _put_in_place(graph, node, joined)
        return
    for made in (joined, *(part for part in parts if part is not new)):
        graph.erase_node(made)


def _scattered(graph: Graph, node: Node) -> None:
    """`scatter_(dim, index, src)`, where `index` has one position per token."""
    given: dict[str, Any] = {**dict(zip(("input", "dim", "index", "src"), node.args)), **node.kwargs}
    index, new, dim = given.get("index"), given.get("src"), constant(example(given.get("dim")))
    if not isinstance(index, Node) or not isinstance(new, Node) or not isinstance(dim, int) or "reduce" in given:
        return
    places, value, whole = example(index), example(new), example(node.args[0])
    dim = dim % whole.dim()
    others = [d for d in range(whole.dim()) if d != dim]
    expanded = places.dim() == whole.dim() and all(
        same(places.stride(d), 0) or same(places.shape[d], 1) for d in others
    )
    fits = value.dim() == whole.dim() and all(map(same, value.shape, places.shape))
    if not expanded or not fits or not all(same(places.shape[d], whole.shape[d]) for d in others):
        return
    positions = _call(
        graph, node, operator.getitem, index, tuple(slice(None) if d == dim else 0 for d in range(whole.dim()))
    )
    _copy_to(graph, node, dim, positions, new)


def _put(graph: Graph, node: Node) -> None:
    """`index_put_((batch, positions), values)`, or `cache[batch, positions] = values`, of one batch entry."""
    item = node.target is operator.setitem
    given: dict[str, Any] = {**dict(zip(("input", "indices", "values", "accumulate"), node.args)), **node.kwargs}
    index, new, whole = given.get("indices"), given.get("values"), example(node.args[0])
    if not isinstance(index, (tuple, list)) or len(index) < 2 or not isinstance(new, Node) or given.get("accumulate"):
        return
    batch, positions, *rest = index
    if not same(whole.shape[0], 1) or any(part != slice(None) for part in rest):
        return
    if not all(
        isinstance(i, Node) and isinstance(example(i), Tensor) and example(i).dim() == 1 for i in (batch, positions)
    ):
        return
    if any(example(i).dtype not in (torch.int64, torch.int32) for i in (batch, positions)):
        return
    value = example(new)
    tokens = (*example(positions).shape, *whole.shape[2:])
    if not same(example(batch).shape[0], tokens[0]) and not same(example(batch).shape[0], 1):
        return
    if value.dim() != len(tokens) or not all(map(same, value.shape, tokens)):
        return
    if value.dtype != whole.dtype and not item:
        return
    length = constant(whole.shape[1])
    if not isinstance(length, int):
        return
    positions = _counted(graph, node, positions, length)  # `index_copy_` counts none from the end
    _copy_to(graph, node, 1, positions, _call(graph, node, "unsqueeze", new, 0))


def _copy_to(graph: Graph, node: Node, dim: int, positions: Node, new: Node) -> None:
    if example(new).dtype != example(node.args[0]).dtype:
        new = _call(graph, node, "to", new, example(node.args[0]).dtype)
    written = graph.call_method("index_copy_", (node.args[0], dim, positions, new))
    written.meta = {**node.meta, "example_value": example(node.args[0])}
    _put_in_place(graph, node, written)


def _put_in_place(graph: Graph, node: Node, other: Node) -> None:
    node.replace_all_uses_with(other)
    graph.erase_node(node)


def _call(graph: Graph, node: Node, target: Any, *args: Any) -> Node:
    made = graph.call_method(target, args) if isinstance(target, str) else graph.call_function(target, args)
    values = torch.fx.node.map_arg(args, example)
    value = getattr(values[0], target)(*values[1:]) if isinstance(target, str) else target(*values)
    made.meta = {**node.meta, "example_value": value}
    return made


def _along(dim: int, part: slice) -> tuple[slice, ...]:
    return (*[slice(None)] * dim, part)


_SPELLINGS: dict[str, Callable[[Graph, Node], None]] = {
    "slice_scatter": _joined,
    "scatter_": _scattered,
    "index_put_": _put,
    "setitem": _put,
}
