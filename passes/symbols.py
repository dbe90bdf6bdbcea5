"""SymInts of a captured graph as nodes of that graph, so that rewritten nodes can take them as arguments."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ..compat import own_expression
from ..geometry import constant


class Symbols:
    """Knows, while a graph is walked in order, which node computes which expression."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[sympy.Expr, Node] = {}
        self.sizes: dict[sympy.Expr, tuple[Node, int]] = {}  # of tensors: some depend on data, which no number carries
        self.tracer = torch.fx.proxy.GraphAppendingTracer(graph)  # one: proxies of several do not mix

    def forget(self) -> None:
        self.known.clear()
        self.sizes.clear()

    def see(self, node: Node) -> None:
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt):
            # Where guards have made two symbols one, the input that carries the surviving one is used: Inductor (2.13)
            # names its variables after the symbols that inputs were made with.
            survives = own_expression(value) == value.node.expr
            if survives and node.op == "placeholder":
                self.known[value.node.expr] = node
            else:
                self.known.setdefault(value.node.expr, node)
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    self.sizes.setdefault(size.node.expr, (node, dim))

    def node(self, value: int) -> Node | int:
        """An int as it is; a SymInt as a node, built from nodes seen so far at the graph's insertion point."""
        value = constant(value)
        if not isinstance(value, torch.SymInt):
            return value
        expression = value.node.expr
        if expression in self.known:
            return self.known[expression]
        if expression in self.sizes and not expression.free_symbols <= self.known.keys():
            return self.graph.call_method("size", self.sizes[expression])
        proxies = {symbol: torch.fx.Proxy(self.known[symbol], self.tracer) for symbol in expression.free_symbols}
        result: Any = sympy_interp(PythonReferenceAnalysis, proxies, expression)
        return result.node
