"""Attention over packed caches in eager code, as where Dynamo has given up compiling a function: corrected, too."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .errors import PackedCacheError
from .geometry import Window
from .kernels.dense import rows_of_bias, with_correction
from .kernels.quantizers import grid_of
from .kernels.retention import SAMPLES, stand_for, with_weights
from .packed import PackedKV
from .packed_dispatch import implements, warn_of_read
from .retention import KeptStore

aten = torch.ops.aten


@implements(aten._scaled_dot_product_flash_attention_for_cpu.default)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """What `F.scaled_dot_product_attention` comes to on CPUs: keys `[B, H, S, D]` are dequantized for the call, and the
    scores of those that are quantized corrected, in Taylor's form (arXiv 2605.26266), as it is or clamped."""
    forms = ("taylor", "clamped", *(("exact", "none") if isinstance(key, PackedKV) and key._store.keeps else ()))
    correct = isinstance(key, PackedKV) and key._store.correction in forms and not isinstance(query, PackedKV)
    window = key.find_window() if correct else None  # type: ignore[attr-defined]
    if not isinstance(key, PackedKV) or window is None or tuple(window.axes) != (0, 1, 2, 3):
        return NotImplemented
    store = key._store
    if not window.covers(store.shape, 3) or dropout_p:
        return NotImplemented
    warn_of_read("scaled_dot_product_attention")
    variance = store.quantization_step(window.starts, window.lengths).square()
    grid = grid_of(store.quantizer)
    keys = key.dequantize_window()
    values = value.dequantize_window() if isinstance(value, PackedKV) else value
    if isinstance(store, KeptStore):
        columns, attn_mask = _kept_columns(query, store, value, window, is_causal, attn_mask)
        keys, values, variance = (x.index_select(2, columns) for x in (keys, values, variance))
        is_causal = False
    if grid.rotates and not grid.within:  # groups are of rotated channels; scores stay what they are
        query, keys = torch.ops.jkv.rotate(query), torch.ops.jkv.rotate(keys)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    flash = functools.partial(aten._scaled_dot_product_flash_attention_for_cpu, dropout_p=0.0, scale=scale)
    if store.correction == "none":
        output, lse = flash(query, keys, values, is_causal=is_causal, attn_mask=attn_mask)
    elif store.correction == "taylor":
        widened = with_correction(query, keys, values, variance, scale, grid.pairs)
        output, lse = flash(*widened, is_causal=is_causal, attn_mask=attn_mask)
    else:
        biases = rows_of_bias(query, variance, attn_mask, is_causal, scale, grid.pairs, store.correction)
        parts = [flash(query[:, :, rows], keys, values, attn_mask=bias) for rows, bias in biases]
        output, lse = (torch.cat(part, 2) for part in zip(*parts))
    return output[..., : values.shape[-1]].transpose(1, 2).contiguous().transpose(1, 2), lse  # laid out as its own


def _kept_columns(
    query: Tensor, store: KeptStore, value: Tensor, window: Window, is_causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The keys of a cache with a budget that have not been dropped, int64 `[n]`, and a mask of those.

    Raises:
        PackedCacheError: of values others have been.
    """
    start, n = window.starts[2], window.lengths[2]
    dropped = store.dropped_among(start, n)
    if isinstance(value, PackedKV) and isinstance(value._store, KeptStore):
        other = value.find_window()
        if other is None or not torch.equal(value._store.dropped_among(other.starts[2], other.lengths[2]), dropped):
            raise PackedCacheError("keys and values of a packed cache keep other tokens (budget=): reset both")
    columns = (~dropped).nonzero().flatten().to(query.device)
    weights = stand_for(store.places, start, start + n) if store.keeps in SAMPLES else torch.zeros(n)
    if is_causal:
        visible = torch.ones(query.shape[2], n, dtype=torch.bool, device=query.device).tril()
        mask = (query.new_zeros(1, 1) if mask is None else mask).masked_fill(~visible, -torch.inf)
    mask = with_weights(mask, weights, query)
    return columns, mask if mask is None or mask.shape[-1] == 1 else mask.index_select(-1, columns)
