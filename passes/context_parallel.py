"""Attention over tokens that are parted over ranks, as `torch.distributed.tensor.experimental.context_parallel` has it.

There every rank makes DTensors of its own queries, keys and values, sharded along tokens, and takes its own shard of
what attention returns. Keys that come from a cache need not travel: here the queries do, which are those of one chunk.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..compat import fake_mode_of, is_dtensor
from .attention_forms import SDPA_LSE, SPELLED, AttentionCall, NotCanonical, sdpa_call
from .nodes import example, name_of

TOKENS = 2  # of [B, H, L, D]


def parted_attention(node: Node) -> AttentionCall | None:
    """Attention over shards along tokens, that each rank makes and takes apart again: told by its own tensors."""
    call = sdpa_call(node)
    if call is None or not is_dtensor(example(node)):
        return None
    sharded = (call.query, call.key, call.value)
    local = [one for n in sharded if (one := _local(n)) is not None]
    if len(local) < len(sharded) or not node.users or any(name_of(user) != "to_local" for user in node.users):
        return None
    if not all(_along_tokens(example(n)) for n in (*sharded, node)):
        return None
    return replace(call, query=local[0], key=local[1], value=local[2])


def canonicalise_parted(graph: Graph, call: AttentionCall) -> None:
    """Replace it by `jkv::sdpa_lse` of all ranks' queries over this rank's keys, between two exchanges.

    Raises:
        NotCanonical: it has a mask, dropout, or is causal, where ranks hold tokens in an order of their own.
    """
    for what, used in (("a mask", call.mask is not None), ("a causal mask", call.is_causal), ("dropout", call.dropout)):
        if used:
            raise NotCanonical(f"it has {what}, and its tokens are parted over ranks")
    node, mesh = call.node, example(call.node).device_mesh
    gather, merge = _exchanges(mesh.get_group().group_name, mesh.size())
    query = example(call.query)
    batch, heads, length, _ = query.shape
    with graph.inserting_before(node), fake_mode_of(query) or contextlib.nullcontext():

        def new(function: Any, *arguments: Any, value: Any) -> Node:
            made = graph.call_function(function, arguments)
            made.meta = {**node.meta, "example_value": value}
            return made

        every = query.new_empty((batch, heads, length * mesh.size(), query.shape[-1]))
        out = every.new_empty((*every.shape[:-1], example(call.value).shape[-1]))
        lse = every.new_empty(every.shape[:-1], dtype=torch.float32)
        queries = new(gather, call.query, value=every)
        arguments = queries, call.key, call.value, None, False, call.scale
        both = new(SDPA_LSE.default, *arguments, value=(out, lse))
        both.meta[SPELLED] = node.name
        parts = [new(operator.getitem, both, i, value=part) for i, part in enumerate(example(both))]
        for user in list(node.users):
            user.replace_all_uses_with(new(merge, *parts, value=example(user)))
            graph.erase_node(user)
    sharded = node.all_input_nodes
    graph.erase_node(node)
    for argument in sharded:
        if not argument.users:
            graph.erase_node(argument)


def _exchanges(group: str, ranks: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Functions (graphs hold no groups): all ranks' queries, and the merged result for this rank's."""

    def gather_queries(query: Tensor) -> Tensor:
        from ..distributed import gather_queries

        return gather_queries(query, group)

    def merge_own(out: Tensor, lse: Tensor) -> Tensor:
        from ..distributed import merge_own

        return merge_own(out, lse, ranks, group)

    return gather_queries, merge_own


def _local(node: Any) -> Node | None:
    """What a DTensor was made from."""
    if isinstance(node, Node) and name_of(node) == "from_local" and isinstance(node.args[0], Node):
        return node.args[0]
    return None


def _along_tokens(value: Any) -> bool:
    if not is_dtensor(value) or value.dim() != 4 or value.device_mesh.ndim != 1:
        return False
    placement = value.placements[0]
    return type(placement).__name__ == "Shard" and placement.dim % 4 == TOKENS
