"""Graphs as text that a person can compare: one line per node, `name = target(arguments)`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node


def graph_text(graph: Graph) -> str:
    """Inputs on one line, then one line per operation, then what is returned."""
    inputs = ", ".join(node.name for node in graph.find_nodes(op="placeholder"))
    return "\n".join([f"inputs: {inputs}", *(_line(n) for n in graph.nodes if n.op != "placeholder")])


def _line(node: Node) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    args = [_value(a) for a in node.args]
    keywords = [f"{k}={_value(v)}" for k, v in node.kwargs.items()]
    if node.target is operator.getitem:
        return f"{node.name} = {args[0]}[{args[1].removeprefix('(').removesuffix(')')}]"
    if node.target is operator.setitem:
        return f"{args[0]}[{args[1].removeprefix('(').removesuffix(')')}] = {args[2]}"
    call = f"{_target(node)}({', '.join([*args[node.op == 'call_method' :], *keywords])})"
    call = f"{args[0]}.{call}" if node.op == "call_method" else call
    returns_nothing = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns
    return call if returns_nothing else f"{node.name} = {call}"


def _target(node: Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default").replace(".", "::", 1)
    return getattr(node.target, "__name__", str(node.target))


def _value(value: Any) -> str:
    if isinstance(value, slice):
        parts = ["" if p is None else _value(p) for p in (value.start, value.stop)]
        return ":".join(parts) + ("" if value.step is None else f":{_value(value.step)}")
    if isinstance(value, (tuple, list)):
        text = ", ".join(map(_value, value))
        return f"({text})" if isinstance(value, tuple) else f"[{text}]"
    return repr(value) if isinstance(value, str) else str(value)
