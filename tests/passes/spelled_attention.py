"""Ways in which models spell attention. Each takes query, key and value `[B, H, L, D]`, and returns the same layout.

The packages that a model would import are stood in for by functions and operators with their names and signatures.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

library = torch.library.Library("flash_attn", "DEF")
_FLASH = (
    "float dropout_p, float softmax_scale, bool causal, int window_size_left, int window_size_right, float softcap, "
    "Tensor? alibi_slopes, bool return_softmax"
)
library.define(f"_flash_attn_forward(Tensor q, Tensor k, Tensor v, {_FLASH}) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(
    "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    f"SymInt max_seqlen_q, SymInt max_seqlen_k, {_FLASH}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def bottom_right(q: Tensor, k: Tensor) -> Tensor:
    """flash-attn's causal mask for `[B, H, L, D]` and `[B, H, S, D]`."""
    length, keys = q.shape[-2], k.shape[-2]
    return torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """All `[B, L, H, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = bottom_right(q, k) if causal else None
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2).contiguous()


def _forward(q, k, v, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes, return_softmax):
    out = _attend(q, k, v, causal, softmax_scale)
    return out, q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), q.new_zeros(0), q.new_zeros(2)


def _varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, *rest):
    out, lse, mask, state = _forward(q[None], k[None], v[None], *rest)
    return out[0].clone(), lse[0].clone(), mask, state


library.impl("_flash_attn_forward", _forward, "CompositeExplicitAutograd")
library.impl("_flash_attn_varlen_forward", _varlen_forward, "CompositeExplicitAutograd")


def _stand_in(module: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def mark(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        function.__module__ = module
        return torch.compiler.allow_in_graph(function)

    return mark


@_stand_in("flash_attn.flash_attn_interface")
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    return _attend(q, k, v, causal, softmax_scale)


@_stand_in("sageattention.core")
def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: object,
) -> Tensor:
    if tensor_layout == "HND":
        return _attend(*(x.transpose(1, 2) for x in (q, k, v)), is_causal, sm_scale).transpose(1, 2)
    if tensor_layout != "NHD":  # a layout that this stand-in alone has
        return sageattn(q, k, v, is_causal=is_causal, sm_scale=sm_scale)
    return _attend(q, k, v, is_causal, sm_scale)


@_stand_in("xformers.ops.fmha")
def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale).transpose(1, 2).contiguous()


def swapped(function: Callable[..., Tensor], *args: object, **kwargs: object) -> Callable[..., Tensor]:
    """A function over `[B, L, H, D]` as one over `[B, H, L, D]`."""

    def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(*(x.transpose(1, 2) for x in (q, k, v)), *args, **kwargs).transpose(1, 2)

    return spelled


# ---- by hand ----


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1) @ v


def scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(torch.matmul(q * 0.2, k.mT), dim=-1), v)


def scaled_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(torch.matmul(q, (k * 0.5).transpose(2, 3)) / 2.0, dim=-1) @ v


def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(q, k.permute(0, 1, 3, 2)).softmax(-1).matmul(v)


def float32_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=0.1, training=False) @ v


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) / 4
    scores = scores.masked_fill(~bottom_right(q, k), torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ v


def masked_minus_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3)
    return (scores.masked_fill(bottom_right(q, k).logical_not(), -math.inf) * 0.25).softmax(-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3)
    scores.mul_(0.25)
    scores += torch.zeros(q.shape[2], k.shape[2]).masked_fill(~bottom_right(q, k), -1e4)
    return scores.softmax(-1) @ v


def scaled_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(k.shape[2], dtype=q.dtype)[None] / 8
    return ((q @ k.transpose(2, 3) - distance + 1.0) * 0.25 + bottom_right(q, k)).softmax(-1) @ v


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
    scores = torch.baddbmm(torch.empty(b * h, n, k.shape[1]), q, k.transpose(-1, -2), beta=0, alpha=0.125)
    return torch.bmm(scores.float().softmax(-1).type_as(v), v).view(b, h, n, d)


def bmm_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    mask = torch.zeros(n, k.shape[2]).masked_fill(~bottom_right(q, k), -1e4).expand(b * h, -1, -1)
    q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
    return torch.baddbmm(mask, q, k.mT, alpha=0.125).softmax(-1).bmm(v).view(b, h, n, d)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd, bhkd -> bhqk", q, k) * 0.125
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


@swapped
def einsum_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.125).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def einsum_values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(torch.einsum("bhjd,bhid->bhij", k, q), dim=3)
    return torch.einsum("bhjd,bhij->bhid", v, weights)


def scores_edited(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., 0] = -1e4
    return scores.softmax(-1) @ v


def masked_by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.where(bottom_right(q, k), torch.clone(input=q) @ k.mT, -math.inf)
    return F.dropout(input=torch.softmax(input=scores, dim=-1), p=0.0) @ v


def keys_overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    k.mul_(0.5)
    return weights @ v


def method_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As GPT-2: what is hidden is a tensor of one number."""
    scores = (q @ k.mT) / torch.full([], q.shape[-1] ** 0.5)
    hidden = torch.full([], torch.finfo(scores.dtype).min).to(scores.dtype)
    return scores.where(bottom_right(q, k)[None, None], hidden).softmax(-1) @ v


def where_hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(~bottom_right(q, k), -1e4, q @ k.mT).mul(0.25).softmax(-1) @ v


BY_HAND = (
    masked_by_where, method_where, where_hidden,
    matmul, scaled_query, scaled_key, no_scale, float32_softmax, masked_fill, masked_minus_infinity, in_place,
    scaled_mask, bmm, bmm_masked, einsum, einsum_tokens_first, einsum_values_first,
)  # fmt: skip

# ---- by hand, over queries in groups that share a head of keys and values ----


def in_groups(q: Tensor, k: Tensor) -> Tensor:
    """Queries `[B, H_kv, G, L, D]`."""
    return q.unflatten(1, (k.shape[1], -1))


def einsum_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhgqd,bhkd->bhgqk", in_groups(q, k) * 0.25, k)
    return torch.einsum("bhgqk,bhkd->bhgqd", scores.softmax(-1), v).flatten(1, 2)


def einsum_grouped_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Under a mask that all heads share."""
    mask = torch.zeros(q.shape[2], k.shape[2]).masked_fill(~bottom_right(q, k), -math.inf)
    query = in_groups(q, k).permute(0, 3, 1, 2, 4)  # [B, L, H_kv, G, D]
    scores = torch.einsum("bqhgd,bkhd->bhgqk", query, k.transpose(1, 2)) + mask
    return torch.einsum("bhgqk,bkhd->bqhgd", scores.softmax(-1), v.transpose(1, 2)).flatten(2, 3).transpose(1, 2)


def einsum_groups_after_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Under a mask of one dimension."""
    scores = torch.einsum("bhgqd,bhkd->bhqgk", in_groups(q, k), k) + torch.arange(k.shape[2]) / 8
    return torch.einsum("bhqgk,bhkd->bhgqd", scores.softmax(-1), v).flatten(1, 2)


def matmul_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = in_groups(q, k) @ k.unsqueeze(2).mT
    scores = torch.where(bottom_right(q, k)[None, None, None], scores, -math.inf)
    return (scores.softmax(-1) @ v[:, :, None]).reshape(q.shape)


def matmul_grouped_expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Under a mask for each batch entry."""
    keep = bottom_right(q, k).expand(q.shape[0], 1, 1, -1, -1)
    query = in_groups(q, k)
    key, value = (t[:, :, None].expand(-1, -1, query.shape[2], -1, -1) for t in (k, v))
    scores = (query @ key.transpose(3, 4) / 6).masked_fill(~keep, torch.finfo(q.dtype).min)
    return (scores.softmax(-1) @ value).flatten(1, 2)


def grouped_with_a_bias_per_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query = in_groups(q, k)
    slopes = torch.arange(q.shape[1]).view(k.shape[1], -1, 1, 1) / 8
    bias = slopes * torch.arange(k.shape[2])
    return ((query @ k[:, :, None].mT + bias).softmax(-1) @ v[:, :, None]).flatten(1, 2)


def groups_as_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, H_kv, G·L, D]`."""
    query = in_groups(q, k).flatten(2, 3)
    return ((query @ k.mT).softmax(-1) @ v).unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def heads_repeated_before_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Llama's own code: `[B, S, H_kv, D]` is repeated, and transposed then."""

    def repeated(x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        times = q.shape[1] // h
        return x.transpose(1, 2)[:, :, :, None].expand(b, n, h, times, d).reshape(b, n, h * times, d).transpose(1, 2)

    key, value = repeated(k), repeated(v)
    weights = (q @ key.transpose(2, 3) / q.shape[-1] ** 0.5).float().softmax(-1).type_as(q)
    return weights @ value


def multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of keys and values, by broadcasting."""
    return (q @ k.mT / 4).softmax(-1) @ v


GROUPED = {
    f.__name__: f
    for f in (
        einsum_grouped, einsum_grouped_tokens_first, einsum_groups_after_tokens, matmul_grouped, matmul_grouped_expanded,
        grouped_with_a_bias_per_head, groups_as_queries, heads_repeated_before_tokens,
        multi_query,
    )
}  # fmt: skip

# ---- one call ----


def aten_packet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention(q, k, v, scale=0.25)


def aten_flash_for_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def aten_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, _ = torch.ops.aten._scaled_dot_product_attention_math.default(q, k, v, bottom_right(q, k).float())
    return out


def three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h = q.shape[:2]
    return F.scaled_dot_product_attention(*(x.reshape(b * h, *x.shape[2:]) for x in (q, k, v))).unflatten(0, (b, h))


@swapped
def flash_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, _, _, _ = torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    return out


@swapped
def flash_varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Wan's `flash_attention` calls it."""
    b, n, s = q.shape[0], q.shape[1], k.shape[1]
    lengths = [torch.tensor([x] * b, dtype=torch.int32) for x in (n, s)]
    boundaries = [torch.cat([x.new_zeros([1]), x]).cumsum(0, dtype=torch.int32) for x in lengths]
    out = torch.ops.flash_attn._flash_attn_varlen_forward(
        *(x.flatten(0, 1) for x in (q, k, v)), *boundaries, n, s, 0.0, 0.25, True, -1, -1, 0.0, None, False
    )[0]
    return out.unflatten(0, (b, n))


flash_function = swapped(flash_attn_func)
flash_causal = swapped(flash_attn_func, causal=True, softmax_scale=0.3)
sage_heads_first = sageattn
sage_tokens_first = swapped(sageattn, tensor_layout="NHD", sm_scale=0.25)
xformers = swapped(memory_efficient_attention)


@swapped
def xformers_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.arange(k.shape[1], dtype=q.dtype).expand(q.shape[0], q.shape[2], q.shape[1], -1) / 8
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=0.25)


AS_CALLS = {
    "aten operator": aten_packet,
    "aten's flash attention on CPUs": aten_flash_for_cpu,
    "aten's math attention, masked": aten_math,
    "SDPA over [B·H, L, D]": three_dimensions,
    "flash-attn's operator, causal": flash_operator,
    "flash-attn's function": flash_function,
    "flash-attn's function, causal": flash_causal,
    "SageAttention, heads first": sage_heads_first,
    "SageAttention, tokens first": sage_tokens_first,
    "xFormers": xformers,
    "xFormers with a bias": xformers_bias,
}
ALL = {f.__name__ if f.__name__ != "spelled" else "einsum_tokens_first": f for f in BY_HAND} | AS_CALLS
