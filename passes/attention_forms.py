"""Every spelling of attention becomes one `AttentionCall`; later passes know only that.

A spelling is a function from an FX node to an `AttentionCall`, or None where the node is none of its kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionCall:
    """softmax(scale · query @ keyᵀ + mask) @ value, all `[B, H, L, D]`, as a node of a graph.

    `mask` is a node (boolean or additive) or None; `is_causal` means PyTorch's: query i sees keys j <= i.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    is_causal: bool
    scale: float
    dropout: float


_SDPA = (
    F.scaled_dot_product_attention,
    torch._C._nn.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
)


def scaled_dot_product_attention(node: Node) -> AttentionCall | None:
    """`F.scaled_dot_product_attention` and its aten twin."""
    if node.op != "call_function" or node.target not in _SDPA:
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    given |= dict(zip(names, node.args)) | dict(node.kwargs)
    head_dim = given["query"].meta["example_value"].shape[-1]
    scale = 1 / math.sqrt(head_dim) if given["scale"] is None else given["scale"]
    return AttentionCall(
        node, given["query"], given["key"], given["value"], given["attn_mask"], given["is_causal"], scale,
        given["dropout_p"],
    )  # fmt: skip


SPELLINGS: list[Callable[[Node], AttentionCall | None]] = [scaled_dot_product_attention]


def as_attention(node: Node) -> AttentionCall | None:
    """The attention that a node computes, or None."""
    return next((call for spelling in SPELLINGS if (call := spelling(node)) is not None), None)
