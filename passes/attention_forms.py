"""The forms of attention that the passes know, and how others are described.

They are `F.scaled_dot_product_attention`, `jkv::sdpa_lse` where the log-sum-exp is used too, and flex_attention as the
function `flex` here.

`canonicalise` rewrites every other spelling to it; `spelled_as_calls`, `spelled_by_hand` and `spelled_by_users`
describe them as `AttentionArguments`.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from .. import kernels as kernels  # defines the operators
from ..compat import is_dtensor
from ..errors import ConfigurationError
from ..kernels.dense import sdpa as sdpa

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionCall:
    """softmax(scale · query @ keyᵀ + mask) @ value, all `[B, H, L, D]`, as a node of a graph.

    `mask` is a node (boolean or additive) or None; `is_causal` means PyTorch's: query i sees keys j <= i. `others` is
    None, but for flex_attention: tensors that its score function and its mask read. With `lse`, the node is
    `jkv::sdpa_lse`, a pair of the result and its log-sum-exp.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    is_causal: bool
    scale: float
    dropout: float
    others: tuple[Node, ...] | None = None
    lse: bool = False

    @property
    def result(self) -> Tensor:
        """The value of the attention's result."""
        value = self.node.meta["example_value"]
        return value[0] if self.lse else value


SDPA = (sdpa, aten.scaled_dot_product_attention.default)


SDPA_LSE = torch.ops.jkv.sdpa_lse
FLEX = torch.ops.higher_order.flex_attention
SPELLED = "jkv_spelled"  # in the meta of a node that took the place of another spelling: that node's name


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any,
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_other_buffers: tuple[Any, ...] = (),
    mask_mod_other_buffers: tuple[Any, ...] = (),
) -> Tensor:
    """The result of flex_attention's operator, `[B, H, L, D]`, without what else it returns; arguments are its own."""
    return FLEX(
        query, key, value, score_mod, block_mask, scale, kernel_options, score_mod_other_buffers, mask_mod_other_buffers
    )[0]


def as_attention(node: Node) -> AttentionCall | None:
    """The attention that a node computes on tensors of this device alone, or None."""
    if node.op == "call_function" and node.target is flex:
        query, key, value, _, _, scale, *_ = node.args
        others = tuple(n for n in node.all_input_nodes if n not in (query, key, value) and n.op != "get_attr")
        return AttentionCall(node, query, key, value, None, False, scale, 0.0, others)  # type: ignore[arg-type]
    if node.op == "call_function" and node.target in (SDPA_LSE, SDPA_LSE.default):
        if any(user.target is not operator.getitem for user in node.users):
            return None
        names = ("query", "key", "value", "mask", "causal", "scale")
        query, key, value, mask, causal, scale = ({**dict(zip(names, node.args)), **node.kwargs}[n] for n in names)
        return AttentionCall(node, query, key, value, mask, causal, scale, 0.0, lse=True)  # type: ignore[arg-type]
    call = None if is_dtensor(node.meta.get("example_value")) else sdpa_call(node)
    return None if call is None or too_many_dimensions(call) else call


def too_many_dimensions(call: AttentionCall) -> bool:
    """Whether there is more than a batch before the heads, which SDPA allows and nothing here expects."""
    return call.query.meta["example_value"].dim() > 4


def sdpa_call(node: Node) -> AttentionCall | None:
    """What a call of `F.scaled_dot_product_attention` computes, on whatever kind of tensors; None for other nodes."""
    if node.op != "call_function" or node.target not in SDPA:
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


Causal = Literal["top_left", "bottom_right"]
_DIMENSIONS = {frozenset("BHLD"), frozenset("HLD"), frozenset("BLD"), frozenset("LD")}


@dataclass(frozen=True)
class AttentionArguments:
    """What a call computes: softmax(scale · query @ keyᵀ + mask) @ value, told by the call's own arguments.

    Attributes:
        query, key, value: tensors of the call, laid out as `layout` says; grouped queries may have more heads.
        mask: boolean (true: attend) or additive, broadcastable to `[B, H, L, S]`.
        scale: factor of the scores; None is 1 / sqrt(head_dim).
        causal: None, or which corner the diagonal starts from: "top_left" (query i sees keys j <= i, as PyTorch's
            `is_causal`) or "bottom_right" (j <= i + S - L, as flash-attn's). They differ where L != S only.
        dropout: probability; attention with dropout is left as it is.
        layout: the dimensions of query, key, value and the result in order: "BHLD", "BLHD", or fewer of the letters
            (without B there is one batch entry, without H one head). Four of them where they differ.

    Raises:
        ConfigurationError: a setting has a value that is none of those above.
    """

    query: Any
    key: Any
    value: Any
    mask: Any = None
    scale: float | None = None
    causal: Causal | None = None
    dropout: float = 0.0
    layout: str | tuple[str, str, str, str] = "BHLD"

    def __post_init__(self) -> None:
        if self.causal not in (None, "top_left", "bottom_right"):
            raise ConfigurationError(f"causal={self.causal!r}: expected None, 'top_left' or 'bottom_right'")
        layouts = self.layouts
        if len(layouts) != 4 or any(len(x) != len(set(x)) or frozenset(x) not in _DIMENSIONS for x in layouts):
            raise ConfigurationError(
                f"layout={self.layout!r}: expected the dimensions in order, as 'BHLD' or 'BLHD' (B and H may be left "
                "out where there is one), or four of them for query, key, value and the result"
            )

    @property
    def layouts(self) -> tuple[str, str, str, str]:
        """The layouts of query, key, value and the result."""
        return (self.layout,) * 4 if isinstance(self.layout, str) else tuple(self.layout)  # type: ignore[return-value]


class NotCanonical(Exception):
    """A call is attention, but none that `F.scaled_dot_product_attention` computes; the message says why."""
