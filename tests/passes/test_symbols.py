"""Numbers that a graph is to compute."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from jkv_compile.passes.symbols import Symbols


def test_an_expression_of_several_inputs_is_computed_by_the_graph() -> None:
    shapes = ShapeEnv()
    first, second = (shapes.create_unbacked_symint() for _ in range(2))
    graph = Graph()
    symbols = Symbols(graph)
    for name, value in (("first", first), ("second", second)):
        node = graph.placeholder(name)
        node.meta["example_value"] = value
        symbols.see(node)
    wanted = torch.sym_min(first + 3, 2 * second) - first * second
    graph.output(symbols.node(wanted))
    run = GraphModule(torch.nn.Module(), graph)
    assert [run(4, 5), run(40, 5)] == [min(4 + 3, 2 * 5) - 20, min(40 + 3, 2 * 5) - 200]
