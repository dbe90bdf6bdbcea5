"""`jkv::attention_turned`: corrected attention over keys whose channels have steps of their own, and were turned.

Rotary embeddings mix the errors of two channels a and c of a cached key. With a step for each group of channels these
are alike, and their sum of squares is all that there is to know (`dense`). With a step for each channel (`blocks`) they
are not: what is left of ε_a ~ Δ_a and ε_c ~ Δ_c is one error along u = R(Δ_a e_a) and one along w = R(Δ_c e_c), where R
is what the model did. Both are known, as R is linear: it is done to the steps of channels of the first kind alone, and
to those of the second. Then

    b_ij = s²/24 · Σ_pairs (q·u)² + (q·w)² = s²/24 · Σ_pairs q_1² (u_1² + w_1²) + q_2² (u_2² + w_2²)
                                                            + 2 q_1 q_2 (u_1 u_2 + w_1 w_2)

which still is a product of queries and keys, of rank 3 · D / 2, and exactly what keys have that are attended unturned.

Half as many terms would do with the mean of a pair's Δ²: right on average over the angle. It is no good where steps of
a channel each are: with eight channels in 128 eight times as large as the others, 2 bits, blocks of 32 and rotary
embeddings of base 10,000 single corrections are off by 27 %, and the squared error of attention's output is 41.1 %
instead of 38.9 %, where it is 41.9 % without a correction. Δ turned as if it were a key, with a sign that no error has,
is off by 20 % (`examples.kivi`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense import chunks_of_rows, laid_out, masked, sdpa, widened
from .ops import _without_autocast, library
from .reference import CLAMP, log_sinhc

library.define(
    "attention_turned(Tensor query, Tensor key, Tensor value, Tensor first, Tensor second, int[] pairs, Tensor? mask, "
    "bool causal, float scale, str correction) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)


def attention_turned(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, second: Tensor, pairs: Sequence[int],
    mask: Tensor | None, causal: bool, scale: float, correction: str,
) -> Tensor:  # fmt: skip
    """softmax over s·q·k_j - b_ij + mask, times the values; b_ij as above (after arXiv 2605.26266).

    Args:
        query, key, value, mask, causal, scale: as for `dense.attention_dense`.
        first, second: u and w `[B, H_kv, S, D]`, any floating dtype: Δ of the cache's channels of the first kind, and
            of the second, after all that the model did to its keys; 0 for keys that were never quantized.
        pairs: D of the keys' channels; those at 2i and 2i + 1 have errors of one channel of each kind.
        correction: "taylor"; "clamped", at most 1; or "exact", for uniform errors: Σ log(sinh α / α) over both,
            α = s/2 · q·u and s/2 · q·w. b is held for the last two, a few rows at a time.

    Returns:
        `[B, H, L, Dv]` in query's dtype, laid out in memory as `[B, L, H, Dv]`.
    """
    gqa = query.shape[1] != key.shape[1]
    if correction == "taylor":
        terms, variance = _of_queries(query, pairs), _of_keys(first, second, pairs)
        width = -(-(max(query.shape[-1], value.shape[-1]) + variance.shape[-1]) // 8) * 8
        both = widened(query, terms, width), widened(key, -scale / 24 * variance, width)
        padded = F.pad(value, (0, width - value.shape[-1]))
        return laid_out(sdpa(*both, padded, mask, is_causal=causal, scale=scale, enable_gqa=gqa), value.shape[-1])
    repeat = query.shape[1] // key.shape[1]
    key, value, first, second = (t.repeat_interleave(repeat, 1) for t in (key, value, first.float(), second.float()))
    parts = []
    for rows in chunks_of_rows(query):
        bias = masked(-bias_of(query[:, :, rows], first, second, pairs, scale, correction), rows, mask, causal)
        parts.append(sdpa(query[:, :, rows], key, value, bias.to(query.dtype), scale=scale))
    return laid_out(torch.cat(parts, 2), value.shape[-1])


def _of_queries(query: Tensor, pairs: Sequence[int]) -> Tensor:
    """q_1², q_2² and 2 q_1 q_2 of every pair: float32 `[…, 3 D / 2]`."""
    one, other = _apart(query, pairs)
    return torch.cat((one.square(), other.square(), 2 * one * other), -1)


def _of_keys(first: Tensor, second: Tensor, pairs: Sequence[int]) -> Tensor:
    """What these are multiplied with: float32 `[…, 3 D / 2]`."""
    (u1, u2), (w1, w2) = _apart(first, pairs), _apart(second, pairs)
    return torch.cat((u1.square() + w1.square(), u2.square() + w2.square(), u1 * u2 + w1 * w2), -1)


def _apart(x: Tensor, pairs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first channel of every pair, and the second: float32 `[…, D / 2]`."""
    order = torch.tensor(pairs, device=x.device)
    return x.float().index_select(-1, order[::2]), x.float().index_select(-1, order[1::2])


def bias_of(
    query: Tensor, first: Tensor, second: Tensor, pairs: Sequence[int], scale: float, correction: str
) -> Tensor:
    """b `[B, H, rows, S]`, as `attention_turned` has it."""
    if correction in ("taylor", "clamped"):
        bias = scale**2 / 24 * _of_queries(query, pairs) @ _of_keys(first, second, pairs).mT
        return bias.clamp_max(CLAMP) if correction == "clamped" else bias
    if correction != "exact":
        raise ValueError(f"correction is {correction!r}; expected 'taylor', 'clamped' or 'exact'")
    one, other = _apart(scale / 2 * query.float(), pairs)
    bias = torch.zeros(*query.shape[:3], first.shape[2], dtype=torch.float32, device=query.device)
    for errors in (first, second):
        u1, u2 = _apart(errors, pairs)
        for i in range(one.shape[-1]):  # one channel of the cache at a time: [B, H, rows, S] is all that is ever held
            alpha = one[..., i, None] * u1[..., None, :, i] + other[..., i, None] * u2[..., None, :, i]
            bias += log_sinhc(alpha)
    return bias


def _fake(query, key, value, *_):
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


for _key in ("CPU", "CUDA"):
    library.impl("attention_turned", _without_autocast(attention_turned), _key)
torch.library.register_fake("jkv::attention_turned", _fake, lib=library)
