"""Caches that are quantized less each channel's mean, `center` `[B, H, 1, D]`: what graphs do around the kernels.

Softmax does not see that all keys of an attention, cached and current, are shifted by the same m, as every score
shifts by s·q·m. Its weights sum to 1, so attention over shifted values is shifted as they are. Large models have a few
channels whose keys lie many standard deviations from zero (arXiv 2402.02750), and these take a group's range.
"""

from __future__ import annotations

import torch
from torch import Tensor


def centered(x: Tensor, center: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Tokens `[B, H, n, D]` less the mean; in `dtype`, or in what both are promoted to."""
    difference = x - center
    return difference if dtype is None else difference.to(dtype)


def uncentered(result: Tensor, center: Tensor, lse: Tensor | None = None) -> Tensor:
    """Attention `[B, H, L, D]` over values less `center` `[B, H_kv, 1, D]`, shifted back; in the result's dtype.

    lse: float32 `[B, H, L]`, where rows may see no key: these are zeros, and stay so.
    """
    shift = _per_query_head(center, result)
    if lse is not None:
        shift = torch.where((lse == -torch.inf).unsqueeze(-1), 0.0, shift)
    return (result + shift).to(result.dtype)


def uncentered_lse(lse: Tensor, query: Tensor, center: Tensor, scale: float) -> Tensor:
    """The log-sum-exp `[B, H, L]` of scores of keys less `center`, as it is of the keys themselves.

    query `[B, H, L, D]`, as the model has it.
    """
    return lse + scale * (query.float() @ _per_query_head(center, query).float().mT).squeeze(-1)


def centered_number(value: float, center: Tensor, length: int) -> Tensor:
    """So many tokens of one number, less the mean: `[B, H, length, D]`."""
    return (value - center).expand(-1, -1, length, -1)


def _per_query_head(center: Tensor, query: Tensor) -> Tensor:
    repeats = query.shape[1] // center.shape[1]
    return center if repeats == 1 else center.repeat_interleave(repeats, 1)
