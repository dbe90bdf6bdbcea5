"""`jkv::append_at`: tokens are quantized into places that a tensor holds, so that no device is waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import _without_autocast, library

library.define(
    "append_at(Tensor(a!) codes, Tensor(b!) scales, Tensor source, Tensor positions, int bits) -> ()",
    tags=(torch.Tag.flexible_layout,),
)


def append_at(codes: Tensor, scales: Tensor, source: Tensor, positions: Tensor, bits: int) -> None:
    """Quantize token i of `source` `[B, H, n, D]` into token `positions[i]` of a packed cache, in place.

    Args:
        codes, scales: as for `ops.append`, mutated; one pair of scales per token.
        source: float32, float16 or bfloat16, any strides.
        positions: int64 or int32 `[n]`, each different, on the cache's device.
        bits: 2, 3, 4 or 8.

    Raises:
        IndexError: a position does not lie within the cache, as `Tensor.index_copy_` raises it; nothing is written.
    """
    batch, heads, _, width = codes.shape
    tokens = source.shape[2]
    new_codes = codes.new_empty(batch, heads, tokens, width)
    new_scales = scales.new_empty(batch, heads, scales.shape[2], tokens, 2)
    torch.ops.jkv.append(new_codes, new_scales, source, 0, bits)
    positions = positions.long()
    codes.index_copy_(2, positions, new_codes)
    scales.index_copy_(3, positions, new_scales)


for _key in ("CPU", "CUDA"):
    library.impl("append_at", _without_autocast(append_at), _key)
torch.library.register_fake("jkv::append_at", lambda *_: None, lib=library)
