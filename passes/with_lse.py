"""Attention whose log-sum-exp is used beside the result, as models have it that merge attention over parts of the keys.

ATen's flash attention returns both; here it becomes `jkv::sdpa_lse`, which the other passes know.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from ..geometry import same
from .attention_forms import SDPA_LSE, SPELLED, NotCanonical
from .nodes import example
from .spelled_as_calls import bound_arguments, qualified_name

_RETURN_BOTH = ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention")


def returns_used_lse(node: Node) -> bool:
    """Whether a node is attention that returns `(result, log-sum-exp [B, H, L], …)`, of which both are used only."""
    if node.op != "call_function" or qualified_name(node.target) not in _RETURN_BOTH:
        return False
    used = {user.args[1] for user in node.users if user.target is operator.getitem and user.users}
    return used in ({0, 1}, {1}) and all(user.target is operator.getitem for user in node.users)


def canonicalise_with_lse(graph: Graph, node: Node) -> None:
    """Replace such a node by `jkv::sdpa_lse`.

    Raises:
        NotCanonical: it has dropout, or it is causal in a way that is not defined.
    """
    given: Any = bound_arguments(node)
    query, key = (example(given[name]) for name in ("query", "key"))
    if given["dropout_p"]:
        raise NotCanonical(f"dropout of {given['dropout_p']}")
    if given["is_causal"] and "for_cpu" not in qualified_name(node.target) and not same(query.shape[2], key.shape[2]):
        raise NotCanonical("it is causal with more keys than queries, which this function leaves undefined")
    mask = given.get("attn_mask")
    scale = 1 / math.sqrt(query.shape[-1]) if given["scale"] is None else given["scale"]
    arguments = given["query"], given["key"], given["value"], mask, bool(given["is_causal"]), float(scale)
    with graph.inserting_before(node):
        replacement = graph.call_function(SDPA_LSE.default, arguments)
        replacement.meta = {**node.meta, SPELLED: node.name}
        result: tuple[Tensor, ...] = node.meta["example_value"]
        replacement.meta["example_value"] = (result[0], result[1])
    node.replace_all_uses_with(replacement)
    graph.erase_node(node)
    for user in list(replacement.users):
        if not user.users:
            graph.erase_node(user)
