"""What single nodes of Dynamo's graph are: the tensors they stand for, copies, writes, in-place operations."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..compat import fake_mode_of
from ..geometry import same
from ..packed import PackedKV

COPIES = {"contiguous", "to", "clone", "type_as", "float", "half", "bfloat16", "type", "detach", "_to_copy"}
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}

_IN_PLACE_FUNCTIONS = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ior}


def example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else node


def identity(value: Tensor) -> int:
    """The same for all tensors of a graph that share memory."""
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


def is_dense(value: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, in whatever order of dimensions."""
    expected = 1
    for n, stride in sorted(zip(value.shape, value.stride()), key=lambda d: (_hint(d[1]), _hint(d[0]))):
        if not same(n, 1) and not same(stride, expected):
            return False
        expected = expected * n
    return same(offset(value), 0)


def _hint(n: int) -> int:
    return int(n.node.hint) if isinstance(n, torch.SymInt) else n


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


def as_write(node: Node) -> tuple[Tensor, Node, Any] | None:
    """(the view that is written, the node it belongs to, the value: a node or a number), where a node is a write."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    base = node.args[0]
    target = example(base)
    if not isinstance(base, Node) or not isinstance(target, Tensor):
        return None
    if node.target is operator.setitem:
        index = torch.fx.node.map_arg(node.args[1], example)
        if any(isinstance(i, Tensor) for i in (index if isinstance(index, tuple) else (index,))):
            return None
        return _indexed(target, index), base, node.args[2]
    name = name_of(node)
    if name == "copy_":
        return target, base, node.args[1]
    if name == "zero_":
        return target, base, 0.0
    if name == "fill_" and not isinstance(node.args[1], Node):
        return target, base, node.args[1]
    return None


def _indexed(target: Tensor, index: Any) -> Tensor:
    """`target[index]` on fake tensors, without guarding on more than Dynamo already has."""
    mode = fake_mode_of(target._store.codes if isinstance(target, PackedKV) else target)
    if mode is None:
        return target[index]
    with mode:
        return target[index]
