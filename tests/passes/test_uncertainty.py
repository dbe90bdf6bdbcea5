"""What becomes of quantization errors between a cache and the attention."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import torch
from torch.fx import Graph, Node

from jkv_compile.passes.uncertainty import Uncertainty


def test_sizes_that_a_graph_reads_off_keys_take_none_of_their_errors() -> None:
    """`size()` is a node where a size was dynamic first and then made static, as LongCat-Video's tables make it."""
    graph = Graph()

    def call(name: str, value: object, *args: object) -> Node:
        node = graph.call_function(operator.getitem, args) if name == "getitem" else graph.call_method(name, args)
        node.meta["example_value"] = value
        return node

    cache, steps = graph.placeholder("cache"), graph.placeholder("steps")
    cache.meta["example_value"] = keys = torch.zeros(6, 4)
    read = call("float", keys.clone(), cache)
    size = call("size", torch.Size((6, 4)), read)
    tokens = call("getitem", 6, size, 0)
    turned = call("reshape", torch.zeros(6, 2, 2), read, (tokens, 2, 2))
    errors = Uncertainty(graph, [turned], {read: [SimpleNamespace(argument=cache)]}, lambda _: steps, {}, {})  # type: ignore[dict-item, list-item]
    for node in (read, size, tokens, turned):
        errors.visit(node)
    carried = errors.of(turned, turned)
    assert carried.target == "reshape" and carried.args[1] == (tokens, 2, 2)
    assert carried.args[0].target == "float" and carried.args[0].args == (steps,)
