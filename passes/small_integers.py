"""The values of small integer tensors that a graph builds from sizes: boundaries of sequences, above all."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch.fx import Node

from .nodes import COPIES, example, name_of

_LIMIT = 64  # longer tensors are none that a graph builds from sizes


def small_integers(node: Any) -> list[int] | None:
    """What a one-dimensional integer tensor holds, as ints and SymInts; None where the graph does not tell.

    Follows `tensor`, `arange`, `zeros`, `full`, `cat`, `cumsum`, `pad` and casts, as models use them to make
    flash-attn's `cu_seqlens`.
    """
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    value = example(node)
    if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.dtype.is_floating_point:
        return None
    if isinstance(value.shape[0], torch.SymInt) or value.shape[0] > _LIMIT:
        return None
    name, kwargs = name_of(node), dict(node.kwargs)
    args: Any = torch.fx.map_arg(node.args, _number)
    if name == "tensor":
        return list(args[0]) if isinstance(args[0], (list, tuple)) and _numbers(args[0]) else None
    if name in ("zeros", "new_zeros"):
        return [0] * value.shape[0]
    if name == "full" and _numbers([args[1]]):
        return [args[1]] * value.shape[0]
    if name == "arange" and _numbers(args) and _numbers(kwargs.get("step", 1)):
        start = args[0] if len(args) > 1 else 0
        step: Any = args[2] if len(args) > 2 else kwargs.get("step", 1)
        return [start + i * step for i in range(value.shape[0])]
    if name in COPIES or name in ("int", "long"):
        return small_integers(node.args[0])
    if name in ("cat", "concat") and isinstance(node.args[0], (list, tuple)):
        parts = [small_integers(part) for part in node.args[0]]
        return None if None in parts else [n for part in parts for n in part or ()]
    if name == "cumsum":
        known = small_integers(node.args[0])
        return None if known is None else list(accumulate(known))
    if name == "pad" and len(args) >= 2 and tuple(args[1]) == (1, 0):
        known = small_integers(node.args[0])
        return None if known is None or len(args) > 2 or kwargs.get("value") else [0, *known]
    return None


def _number(node: Node) -> Any:
    value = example(node)
    return value if isinstance(value, (int, torch.SymInt)) else node


def _numbers(values: Any) -> bool:
    values = values if isinstance(values, (list, tuple)) else [values]
    return all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in values)
