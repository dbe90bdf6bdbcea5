"""What single nodes of Dynamo's graph are: the tensors they stand for, copies, writes, in-place operations."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..compat import fake_mode_of, is_dtensor, unwrapped
from ..geometry import constant, hint, same
from ..packed import PackedKV

COPIES = {"contiguous", "to", "clone", "type_as", "float", "half", "bfloat16", "type", "detach", "_to_copy"}
NEW = {"empty", "zeros", "empty_like", "zeros_like", "new_empty", "new_zeros"}
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}

_KNOWN_WRITE = "jkv_write"  # in the meta of a node: its arguments, the tensor written to, and what it writes
_IN_PLACE_FUNCTIONS = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ior}


def example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else node


def identity(value: Tensor) -> int:
    """The same for all tensors of a graph that share memory."""
    value = unwrapped(value)
    return id(value._store.codes) if isinstance(value, PackedKV) else value.untyped_storage()._cdata


def offset(value: Tensor) -> int:
    """Where a tensor begins in its storage, or in the tensor that its packed store replaces."""
    return value.offset if isinstance(value, PackedKV) else value.storage_offset()  # type: ignore[return-value]


def copied(node: Node) -> list[Node]:
    """What a node copies (several tensors, where it concatenates); empty where it is no copy."""
    if node.op == "call_function" and node.target in CONCATENATIONS and isinstance(node.args[0], (list, tuple)):
        return list(node.args[0])  # type: ignore[arg-type]
    if name_of(node) in COPIES and node.args and isinstance(node.args[0], Node):
        return [node.args[0]]
    return []


def joined_along(node: Node) -> int | None:
    """The dimension that a concatenation is along, counted from the first; None where that is not known."""
    given: Any = {**dict(zip(("tensors", "dim"), node.args)), **node.kwargs}
    dim = constant(example(given.get("dim", 0)))
    return dim % example(node).dim() if isinstance(dim, int) else None


def is_dense(value: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, in whatever order of dimensions."""
    expected = 1
    for n, stride in sorted(zip(value.shape, value.stride()), key=lambda d: (hint(d[1]), hint(d[0]))):
        if not same(n, 1) and not same(stride, expected):
            return False
        expected = expected * n
    return same(offset(value), 0)


def name_of(node: Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def mutates(consumer: Node, argument: Node) -> bool:
    """Whether a node writes to one of its arguments."""
    target = consumer.target
    if target in _IN_PLACE_FUNCTIONS:
        return consumer.args[0] is argument
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True  # its body may write; it is not looked into
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        writes = [a.is_write for a in target._schema.arguments]
        return any(a is argument and w for a, w in zip(consumer.args, writes))
    return (is_in_place(consumer) and consumer.args[0] is argument) or consumer.kwargs.get("out") is argument


def is_in_place(node: Node) -> bool:
    """Whether a node is named as PyTorch names what changes its first argument."""
    name = name_of(node)
    return bool(node.args) and name.endswith("_") and not name.endswith("__")


@dataclass(frozen=True)
class Write:
    """A node that changes part of a tensor: `target` is a view of the part that `value` (a node or a number) goes to.

    Where `positions` is a node, the places along dimension `dim` of `target` are those that a tensor holds.
    """

    target: Tensor
    base: Node
    value: Any
    positions: Node | None = None
    dim: int = 0


def as_write(node: Node) -> Write | None:
    """What a node writes, where it is a write."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    known = node.meta.get(_KNOWN_WRITE)  # every pass asks, and fake tensors are slow to index
    if known is None or known[0] is not node.args or known[1] is not example(node.args[0]):
        known = node.meta[_KNOWN_WRITE] = node.args, example(node.args[0]), _write_of(node)
    return known[2]


def _write_of(node: Node) -> Write | None:
    base = node.args[0]
    target = example(base)
    if not isinstance(base, Node) or not isinstance(target, Tensor) or is_dtensor(target):
        return None
    if node.target is operator.setitem:
        return _item_write(node, base, target)
    name = name_of(node)
    if name == "copy_":
        return Write(target, base, node.args[1])
    if name == "zero_":
        return Write(target, base, 0.0)
    if name == "fill_" and not isinstance(node.args[1], Node):
        return Write(target, base, node.args[1])
    if name == "index_copy_" and len(node.args) == 4 and isinstance(node.args[2], Node):
        dim, positions, value = node.args[1:]
        axis = constant(example(dim))  # which may be a node where it equals a size
        if not isinstance(axis, int):
            return None
        return Write(target, base, value, positions, axis % target.dim())  # type: ignore[arg-type]
    return None


def _item_write(node: Node, base: Node, target: Tensor) -> Write | None:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if any(part is Ellipsis for part in index):
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (target.dim() - len(index) + 1), *index[at + 1 :])
    tensors = [i for i, part in enumerate(index) if isinstance(example(part), Tensor)]
    if not tensors:
        return Write(_indexed(target, torch.fx.node.map_arg(node.args[1], example)), base, node.args[2])
    dim, *others = tensors
    positions = index[dim]
    if others or not isinstance(positions, Node) or any(part is None for part in index):
        return None
    shown = torch.fx.node.map_arg((*index[:dim], slice(None), *index[dim + 1 :]), example)
    if any(part != slice(None) for part in shown):  # places within a part of it
        if not all(isinstance(part, slice) for part in shown):  # an index, whose dimension is gone
            return None
        target = _indexed(target, shown)
    if example(positions).dim() != 1 or example(positions).dtype == torch.bool:
        return None
    place = _literal(positions)
    if place is not None:  # a tensor written out in the model's source: the place is known
        start = place if place >= 0 else target.shape[dim] + place
        shown = (*[slice(None)] * dim, slice(start, start + 1))
        return Write(_indexed(target, shown), base, node.args[2])
    return Write(target, base, node.args[2], positions, dim)


def _literal(node: Node) -> int | None:
    """The number that `torch.tensor([number])` holds."""
    values = node.args[0] if node.target is torch.tensor and node.args else None
    single = isinstance(values, (list, tuple)) and len(values) == 1 and isinstance(values[0], int)
    return values[0] if single else None  # type: ignore[index, return-value]


def repeated(node: Node) -> tuple[Tensor, Node, int, int] | None:
    """(view without repetition, the node it belongs to, dimension, how often), where each index of one is repeated.

    `repeat_interleave`, or `expand` on a dimension put in for it and `reshape` (as grouped queries are often spelled).
    """
    value, source = example(node), node.args[0] if node.args else None
    shown = example(source)
    if not isinstance(value, Tensor) or not isinstance(source, Node) or not isinstance(shown, Tensor):
        return None
    if name_of(node) == "repeat_interleave":
        arguments = {**dict(zip(("repeats", "dim"), node.args[1:])), **node.kwargs}
        times, dim = arguments.get("repeats"), arguments.get("dim")
        return (shown, source, dim % shown.dim(), times) if isinstance(times, int) and isinstance(dim, int) else None
    if name_of(node) not in ("reshape", "flatten"):
        return None
    if value.dim() != shown.dim() - 1 or value.requires_grad:
        return None
    for dim in range(1, shown.dim()):
        times = shown.shape[dim]
        kept = [*shown.shape[:dim], *shown.shape[dim + 1 :]]
        merged = [n * times if i == dim - 1 else n for i, n in enumerate(kept)]
        if shown.stride(dim) == 0 and isinstance(times, int) and all(same(a, b) for a, b in zip(merged, value.shape)):
            return _indexed(shown, (*[slice(None)] * dim, 0)), source, dim - 1, times
    return None


def _indexed(target: Tensor, index: Any) -> Tensor:
    """`target[index]` on fake tensors, without guarding on more than Dynamo already has."""
    mode = fake_mode_of(target._store.codes if isinstance(target, PackedKV) else target)
    if mode is None:
        return target[index]
    with mode:
        return target[index]
