"""`jkv::attention_dense`: corrected attention over full-precision keys of which some were dequantized.

Where a model does something to cached keys after it reads them (rotary embeddings, repetition), they are dequantized
and the model's own operations run; what is left of the quantization is how uncertain each key is, and that is all that
the correction needs. It is appended to queries and keys as a few channels, after which any attention kernel computes
the corrected scores (the correction is a product of rank G): no score matrix is held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .ops import _without_autocast, library

# F.scaled_dot_product_attention itself: torch's context parallelism puts another function in its place for a while.
sdpa = torch._C._nn.scaled_dot_product_attention
_ROWS = 256  # query rows at a time where scores are held

library.define(
    "attention_dense(Tensor query, Tensor key, Tensor value, Tensor variance, Tensor? mask, bool causal, float scale, "
    "int pairs, str correction) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
# What `flex_attention`'s score function gathers from: Inductor's templates ask for buffers that lie in memory.
library.define(
    "score_terms(Tensor query, Tensor variance, float scale, int pairs) -> Tensor[]",
    tags=(torch.Tag.flexible_layout,),
)


def attention_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variance: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    pairs: int,
    correction: str,
) -> Tensor:
    """softmax over s·q·k_j - b_ij + mask, times the values; b_ij = s²/24 · Σ_g ‖q_ig‖² Δ²_jg (arXiv 2605.26266).

    Args:
        query: `[B, H, L, D]`, float32, float16 or bfloat16; H a multiple of the key heads.
        key, value: `[B, H_kv, S, D]` and `[B, H_kv, S, Dv]` in query's dtype.
        variance: Δ², float32 `[B, H_kv, S, G]` per key and channel group; 0 for keys that were never quantized.
        mask: None, boolean or additive, broadcastable to `[B, H, L, S]`.
        causal: query i sees key j only if j <= i, as PyTorch's.
        scale: softmax scale s.
        pairs: in each run of so many channels, a group's channels lie half in the first half and half in the second, at
            the same place in both (as half-split rotary embeddings pair them); 0, they are neighbours.
        correction: "none", "taylor", or one that is no product: "clamped" (the same, at most 1) or "exact"
            (Σ_c log(sinh α_c / α_c)); b is held for these, a few rows at a time.

    Returns:
        `[B, H, L, Dv]` in query's dtype, laid out in memory as `[B, L, H, Dv]`.
    """
    gqa = query.shape[1] != key.shape[1]
    if correction == "none":
        output = sdpa(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    elif correction != "taylor":
        output = _row_by_row(query, key, value, variance, mask, causal, scale, pairs, correction)
    else:
        wider = with_correction(query, key, value, variance, scale, pairs)
        output = sdpa(*wider, mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return laid_out(output, value.shape[-1])


def laid_out(output: Tensor, channels: int) -> Tensor:
    """The first channels of what attention returns, laid out in memory as `[B, L, H, Dv]`."""
    return output[..., :channels].transpose(1, 2).contiguous().transpose(1, 2)


def with_correction(
    query: Tensor, key: Tensor, value: Tensor, variance: Tensor, scale: float, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with channels appended, with which any attention computes Taylor-corrected scores.

    Arguments are those of `attention_dense`. All three get one head_dim, a multiple of 8, as fused kernels ask for;
    of the result, the first Dv channels count.
    """
    groups = variance.shape[-1]
    width = -(-(max(query.shape[-1], value.shape[-1]) + groups) // 8) * 8
    norms = grouped(query.float(), groups, pairs).square().sum(-1)
    padded = F.pad(value, (0, width - value.shape[-1]))
    return widened(query, norms, width), widened(key, -scale / 24 * variance, width), padded


def grouped(x: Tensor, groups: int, pairs: int) -> Tensor:
    """`[…, D]` as `[…, G, D / G]`: the channels of each group, `pairs` as for `attention_dense`."""
    if not pairs:
        return x.unflatten(-1, (groups, -1))
    runs = x.shape[-1] // pairs
    return x.unflatten(-1, (runs, 2, groups // runs, -1)).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def score_terms(query: Tensor, variance: Tensor, scale: float, pairs: int) -> list[Tensor]:
    """The factors of s²/24 · Σ_g ‖q_ig‖² Δ²_jg, group by group (arXiv 2605.26266).

    Args:
        query: `[B, H, L, D]`.
        variance: Δ² of the keys, float32 `[B or 1, H_kv, S, G]`.
        scale: softmax scale s.
        pairs: as for `attention_dense`.

    Returns:
        G times ‖q_g‖², then G times s²/24 · Δ_g²: float32 `[B, H, L]` and `[B, H_kv, S]`, contiguous.
    """
    groups = variance.shape[-1]
    norms = grouped(query.float(), groups, pairs).square().sum(-1)
    variances = (variance * (scale**2 / 24)).expand(query.shape[0], -1, -1, -1)
    return [one.contiguous() for of in (norms, variances) for one in of.unbind(-1)]


def _score_terms_fake(query: Tensor, variance: Tensor, scale: float, pairs: int) -> list[Tensor]:
    (batch, heads, length, _), (_, key_heads, tokens, groups) = query.shape, variance.shape
    sizes = [(batch, heads, length)] * groups + [(batch, key_heads, tokens)] * groups
    return [query.new_empty(size, dtype=torch.float32) for size in sizes]


def widened(x: Tensor, columns: Tensor, width: int) -> Tensor:
    """`x` with columns appended, and zeros up to `width` channels."""
    padding = width - x.shape[-1] - columns.shape[-1]
    return F.pad(torch.cat((x, columns.to(x.dtype)), -1), (0, padding))


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, variance: Tensor, mask: Tensor | None, causal: bool, scale: float,
    pairs: int, correction: str,
) -> Tensor:  # fmt: skip
    repeat = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeat, 1) for t in (key, value))
    biases = rows_of_bias(query, variance, mask, causal, scale, pairs, correction)
    return torch.cat([sdpa(query[:, :, rows], key, value, bias, scale=scale) for rows, bias in biases], 2)


def rows_of_bias(
    query: Tensor, variance: Tensor, mask: Tensor | None, causal: bool, scale: float, pairs: int, correction: str
) -> Iterator[tuple[slice, Tensor]]:
    """What a mask and a correction that is no product add to scores, for a few query rows at a time.

    Arguments are those of `attention_dense`. Yields rows, and an additive mask `[B, H, rows, S]` in query's dtype.
    """
    groups = variance.shape[-1]
    delta = variance.sqrt().repeat_interleave(query.shape[1] // variance.shape[1], 1)
    for rows in chunks_of_rows(query):
        ordered = grouped(query[:, :, rows].float(), groups, pairs).flatten(-2)
        bias = -reference.correction_bias(ordered, delta, scale, correction)
        yield rows, masked(bias, rows, mask, causal).to(query.dtype)


def chunks_of_rows(query: Tensor) -> Iterator[slice]:
    """A few query rows at a time."""
    for first in range(0, query.shape[2], _ROWS):
        yield slice(first, min(first + _ROWS, query.shape[2]))


def masked(bias: Tensor, rows: slice, mask: Tensor | None, causal: bool) -> Tensor:
    """What is added to scores of some query rows `[B, H, rows, S]`, and what a mask and causality hide of them."""
    if mask is not None:
        part = mask[..., rows, :] if mask.dim() > 1 and mask.shape[-2] > 1 else mask
        bias = bias.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else bias + part
    if causal:
        columns = torch.arange(bias.shape[-1], device=bias.device)
        visible = columns <= torch.arange(rows.start, rows.stop, device=bias.device)[:, None]
        bias = bias.masked_fill(~visible, -torch.inf)
    return bias


def _fake(query, key, value, *_):
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


for _name, _kernel, _shapes in (
    ("attention_dense", attention_dense, _fake),
    ("score_terms", score_terms, _score_terms_fake),
):
    for _key in ("CPU", "CUDA"):
        library.impl(_name, _without_autocast(_kernel), _key)
    torch.library.register_fake(f"jkv::{_name}", _shapes, lib=library)
