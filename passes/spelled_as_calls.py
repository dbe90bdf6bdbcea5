"""Attention as one call: SDPA's backends in ATen, flash-attn, SageAttention, xFormers, and custom ops shaped like them.

Told by name and by the names of their arguments, so that none of those packages is imported. Whatever an argument that
is not known here would change, has to have its default for the call to be understood.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..geometry import same
from .attention_forms import AttentionArguments, Causal, NotCanonical, as_attention, sdpa_call, too_many_dimensions
from .nodes import example
from .small_integers import small_integers


@dataclass(frozen=True)
class Convention:
    """How calls of one family are to be read.

    Attributes:
        layout: of query, key and value, see `AttentionArguments`; None where an argument tells it.
        causal: what being causal means; "equal_lengths": not known but for as many keys as queries.
        ignored: arguments that change what is returned beside the result, or how it is computed, but not the result.
        off: arguments that must have one of these values for the call to be plain attention.
    """

    layout: str | None
    causal: Causal | str = "top_left"
    ignored: frozenset[str] = frozenset()
    off: dict[str, tuple[Any, ...]] = field(default_factory=dict)


_OUTPUTS = frozenset({
    "return_debug_mask", "compute_log_sumexp", "return_softmax", "return_lse", "return_attn_probs",
    "return_softmax_lse", "deterministic", "num_splits", "pack_gqa", "sm_margin", "zero_tensors", "enable_gqa", "op",
    "output_dtype", "max_q", "max_k", "max_seqlen_q", "max_seqlen_k",
})  # fmt: skip
_FLASH_OFF: dict[str, tuple[Any, ...]] = {
    "window_size": ((-1, -1), [-1, -1], None), "window_size_left": (-1, None), "window_size_right": (-1, None),
    "softcap": (0, 0.0, None), "attention_chunk": (0, None),
}  # fmt: skip
_SAGE_IGNORED = _OUTPUTS | {"qk_quant_gran", "pv_accum_dtype", "smooth_k", "smooth_v"}

_ATEN = Convention("BHLD", "top_left", _OUTPUTS)
_ATEN_FUSED = Convention("BHLD", "equal_lengths", _OUTPUTS)
_FLASH = Convention("BLHD", "bottom_right", _OUTPUTS, _FLASH_OFF)
_XFORMERS = Convention("BLHD", "top_left", _OUTPUTS, {"window_size": (None,)})
_SAGE = Convention(None, "equal_lengths", _SAGE_IGNORED)

CONVENTIONS: dict[str, Convention] = {
    "aten::scaled_dot_product_attention": _ATEN,
    "aten::_scaled_dot_product_attention_math": _ATEN,
    "aten::_scaled_dot_product_efficient_attention": _ATEN,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _ATEN,
    "aten::_scaled_dot_product_flash_attention": _ATEN_FUSED,
    "aten::_scaled_dot_product_cudnn_attention": _ATEN_FUSED,
    "aten::_scaled_dot_product_fused_attention_overrideable": _ATEN_FUSED,
    "aten::_flash_attention_forward": _FLASH,
    "aten::_efficient_attention_forward": _XFORMERS,
}
_BY_LAST_NAME: dict[str, tuple[str, Convention]] = {  # the namespace or package contains the first
    "flash_attn_func": ("flash_attn", _FLASH),
    "flash_attn_varlen_func": ("flash_attn", _FLASH),
    "_flash_attn_forward": ("flash_attn", _FLASH),
    "_flash_attn_varlen_forward": ("flash_attn", _FLASH),
    "_wrapped_flash_attn_forward": ("flash_attn", _FLASH),
    "_wrapped_flash_attn_varlen_forward": ("flash_attn", _FLASH),
    "fwd": ("flash_attn", _FLASH),
    "sageattn": ("sage", _SAGE),
    "memory_efficient_attention": ("xformers", _XFORMERS),
    "memory_efficient_attention_forward": ("xformers", _XFORMERS),
}

_ALIASES: dict[str, tuple[str, ...]] = {
    "query": ("query", "q"), "key": ("key", "k"), "value": ("value", "v"), "mask": ("attn_mask", "attn_bias", "bias"),
    "scale": ("softmax_scale", "sm_scale", "scale"), "causal": ("causal", "is_causal", "custom_mask_type"),
    "dropout": ("dropout_p", "p"), "layout": ("tensor_layout",),
}  # fmt: skip
_SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "cum_seq_q", "cum_seq_k")


def qualified_name(target: Any) -> str:
    """`namespace::name` of an operator, `module.name` of a function; "" for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name
    if isinstance(target, str) or not hasattr(target, "__name__"):
        return ""
    return f"{getattr(target, '__module__', '')}.{target.__name__}"


def bound_arguments(node: Node) -> dict[str, Any] | None:
    """A call's arguments by name, defaults included; None where the target does not tell their names."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema.arguments
        given: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
        return given | dict(zip([a.name for a in schema], node.args)) | node.kwargs
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.arguments |= bound.arguments.pop(name)
    return dict(bound.arguments)


def _convention(target: Any) -> Convention | None:
    name = qualified_name(target)
    if name in CONVENTIONS:
        return CONVENTIONS[name]
    space, last = (name.rsplit("::", 1) if "::" in name else name.rsplit(".", 1)) if name else ("", "")
    prefix, convention = _BY_LAST_NAME.get(last, ("", None))
    return convention if prefix in space else None


def attention_call(node: Node) -> AttentionArguments | None:
    """Attention as one call of a function or an operator whose name and arguments are known.

    Raises:
        NotCanonical: it is such a call, with something that plain attention does not have.
    """
    if node.op != "call_function":
        return None
    if (call := as_attention(node)) is not None and example(call.query).dim() == 3:
        causal: Causal | None = "top_left" if call.is_causal else None
        return AttentionArguments(
            call.query, call.key, call.value, call.mask, call.scale, causal, call.dropout, layout="HLD"
        )
    if (call := sdpa_call(node)) is not None and too_many_dimensions(call):
        raise NotCanonical(f"its query has {example(call.query).dim()} dimensions")
    convention = _convention(node.target)
    if convention is None:
        return None
    given = bound_arguments(node)
    if given is None or not {"q", "query"} & given.keys():
        return None
    roles = {}
    for role, aliases in _ALIASES.items():
        for name in aliases:
            if given.get(name) is not None:
                roles[role] = given.pop(name)
    if not {"query", "key", "value"} <= roles.keys():
        return None
    packed = [given.pop(name) for name in _SEQUENCES if given.get(name) is not None]
    _check_plain(node, convention, given)
    if "mask" in roles and example(roles["mask"]).dtype == torch.bool and not _takes_boolean_mask(node.target):
        raise NotCanonical(f"`{qualified_name(node.target)}` adds its mask to the scores, and is given a boolean one")
    layout = convention.layout or {"HND": "BHLD", "NHD": "BLHD"}.get(roles.get("layout", "HND"))
    if layout is None:
        raise NotCanonical(f"its queries are laid out as {roles['layout']!r}, which is not known")
    query, key = example(roles["query"]), example(roles["key"])
    length, keys = query.shape[layout.index("L") - 4], key.shape[layout.index("L") - 4]
    if packed or (query.dim() == 3 and "varlen" in qualified_name(node.target)):
        layout = "LHD"
        _check_one_sequence(packed, query.shape[0], key.shape[0])
        length, keys = query.shape[0], key.shape[0]
    elif query.dim() == 3:
        layout = "HLD" if layout == "BHLD" else "BLD"  # xFormers without a dimension of heads
        length, keys = query.shape[1], key.shape[1]
    elif query.dim() != 4:
        raise NotCanonical(f"its query has {query.dim()} dimensions")
    causal = _causal(convention, roles.get("causal", False), same(length, keys), same(length, 1))
    return AttentionArguments(
        roles["query"], roles["key"], roles["value"], roles.get("mask"), roles.get("scale"), causal,
        roles.get("dropout", 0.0), layout,
    )  # fmt: skip


def _check_plain(node: Node, convention: Convention, others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name in convention.ignored or value is None or value in convention.off.get(name, ()):
            continue
        if name in convention.off or isinstance(value, Node) or value not in (False, 0, "", ()):
            raise NotCanonical(
                f"`{name}={value}` of `{qualified_name(node.target)}` is nothing that plain attention has"
            )


def _takes_boolean_mask(target: Any) -> bool:
    return qualified_name(target) == "aten::scaled_dot_product_attention"


def _check_one_sequence(boundaries: list[Any], queries: int, keys: int) -> None:
    """Sequences of unequal lengths are plain attention where there is provably one of each, and it is all there is."""
    if len(boundaries) != 2:
        raise NotCanonical("its queries are packed into one dimension without both `cu_seqlens`")
    for boundary, total in zip(boundaries, (queries, keys)):
        known = small_integers(boundary)
        if known is None or len(known) != 2 or not (same(known[0], 0) and same(known[1], total)):
            raise NotCanonical(f"its sequences' boundaries `{boundary}` are not known to be [0, {total}]")


def _causal(convention: Convention, flag: Any, equal_lengths: bool, one_query: bool) -> Causal | None:
    if not flag:
        return None
    kind = {1: "top_left", 2: "bottom_right"}.get(flag, "equal_lengths") if type(flag) is int else convention.causal
    if kind == "equal_lengths" and not equal_lengths:
        raise NotCanonical("it is causal with more keys than queries, which this function leaves undefined")
    if kind == "bottom_right" and one_query:
        return None
    return "top_left" if equal_lengths or kind == "top_left" else "bottom_right"
