"""`flex_attention` over packed caches: it stays what it is, with its score function and block mask, and is corrected.

In Dynamo's graph it is a higher-order operator that returns a tuple. `canonicalise_flex` makes it one node with one
result; `lower_flex` makes it the operator again, on dequantized keys, with the correction composed into its score
function: what is subtracted from a score is gathered from small tensors per query and per key (arXiv 2605.26266).
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from .attention_forms import FLEX, SPELLED, AttentionCall, NotCanonical, flex
from .nodes import example, name_of
from .pieces import Pieces


def canonicalise_flex(graph: Graph, node: Node, result: Node) -> None:
    """Make the operator `node`, of whose outputs only `result` is used, one node that returns it.

    Raises:
        NotCanonical: the operator is called in a way that is not known.
    """
    if len(node.args) < 7 or node.kwargs:
        raise NotCanonical(f"`{name_of(node)}` is called in a way that is not known")
    with graph.inserting_before(node):
        canonical = graph.call_function(flex, node.args)
    canonical.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
    canonical.meta["example_value"] = example(result)
    canonical.meta[SPELLED] = node.name
    result.replace_all_uses_with(canonical)
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)


class CorrectedScores(nn.Module):
    """A score function of flex_attention with the correction subtracted before it: score_mod(s·q·k_j - b_ij, …).

    b_ij = Σ_g norms[g][b, h, i] · variances[g][b, h / repeat, j]: the last 2 · `groups` buffers, of `jkv::score_terms`;
    at most `most`, where that is finite.
    """

    def __init__(self, score_mod: nn.Module, groups: int, repeat: int, most: float = math.inf) -> None:
        super().__init__()
        self.score_mod, self.groups, self.repeat, self.most = score_mod, groups, repeat, most

    def forward(self, score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, *buffers: Any) -> Tensor:
        first = len(buffers) - 2 * self.groups
        norms, variances = buffers[first : first + self.groups], buffers[first + self.groups :]
        key_head = head if self.repeat == 1 else head // self.repeat
        if self.most == math.inf:
            for norm, variance in zip(norms, variances):
                score = score - (norm[batch, head, query] * variance[batch, key_head, key]).to(score.dtype)
        else:
            bias = torch.zeros_like(score, dtype=torch.float32)
            for norm, variance in zip(norms, variances):
                bias = bias + norm[batch, head, query] * variance[batch, key_head, key]
            score = score - bias.clamp(max=self.most).to(score.dtype)
        return self.score_mod(score, batch, head, query, key, *buffers[:first])


def lower_flex(
    pieces: Pieces, call: AttentionCall, variance: Node | None, groups: int, pairs: int, most: float = math.inf
) -> Node:
    """Put the operator on keys as the model computes them in the place of a canonical node, which is erased.

    Args:
        variance: Δ² of the keys, `[B, H_kv, S, groups]`, or None where scores are not to be corrected.
        most: the greatest correction of a score.

    Returns:
        The operator's node, which reads what the canonical one did.
    """
    node, graph = call.node, pieces.graph
    query, key, value, score_mod, block_mask, scale, options, *buffers = node.args
    score_buffers, mask_buffers = (*buffers, (), ())[:2]
    if variance is not None:
        repeat = example(query).shape[1] // example(key).shape[1]
        terms = pieces.call(torch.ops.jkv.score_terms.default, query, variance, scale, pairs)
        parts = [pieces.call(operator.getitem, terms, i) for i in range(2 * groups)]
        score_buffers = (*score_buffers, *parts)  # type: ignore[misc]
        score_mod = _corrected(graph, score_mod, groups, int(repeat), most)
    result = pieces.call(FLEX, query, key, value, score_mod, block_mask, scale, options, score_buffers, mask_buffers)
    result.meta["stack_trace"] = node.meta.get("stack_trace", "")
    node.replace_all_uses_with(pieces.call(operator.getitem, result, 0))
    graph.erase_node(node)
    return result


def _corrected(graph: Graph, score_mod: Any, groups: int, repeat: int, most: float) -> Node:
    """A node for the module that corrects the scores that the module of `score_mod` is given."""
    module = graph.owning_module
    name = f"{score_mod.target}_corrected"
    inner = functools.reduce(getattr, score_mod.target.split("."), module)
    module.add_submodule(name, CorrectedScores(inner, groups, repeat, most))  # type: ignore[union-attr, arg-type]
    return graph.get_attr(name)
