"""Less common ways to write packed caches, on top of `jkv::append`.

`append_at` takes the places from a tensor, so that no device is waited for; `extend` makes a new cache of an old one's
tokens and new ones, for models whose caches grow by concatenation.
"""

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
        codes, scales: as for `ops.append`, mutated; scales for each token.
        source: float32, float16 or bfloat16, any strides.
        positions: int64 or int32 `[n]`, each different, on the cache's device.
        bits: 2, 3, 4 or 8.

    Raises:
        IndexError: a position does not lie within the cache, as `Tensor.index_copy_` raises it; nothing is written.
    """
    batch, heads, _, width = codes.shape
    tokens = source.shape[2]
    new_codes = codes.new_empty(batch, heads, tokens, width)
    new_scales = scales.new_empty(batch, heads, scales.shape[2], tokens, scales.shape[4])
    torch.ops.jkv.append(new_codes, new_scales, source, 0, bits)
    positions = positions.long()
    codes.index_copy_(2, positions, new_codes)
    scales.index_copy_(3, positions, new_scales)


library.define(
    "extend(Tensor codes, Tensor scales, SymInt[] ranges, Tensor source, int bits) -> (Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout,),
)


def extend(codes: Tensor, scales: Tensor, ranges: list[int], source: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A new packed cache: the given token ranges of an old one, bit for bit, and `source`, quantized, after them.

    Args:
        codes, scales: as for `ops.append`; not changed, so that two caches may grow from one.
        ranges: `[start, stop, start, stop, …]`.
        source: `[B, H, n, D]`, float32, float16 or bfloat16; n may be 0.

    Returns:
        codes and scales of a cache of as many tokens as there are in all.

    Raises:
        RuntimeError: a range does not lie within the cache.
    """
    pairs = list(zip(ranges[::2], ranges[1::2]))
    for start, stop in pairs:
        if not 0 <= start <= stop <= codes.shape[2]:
            raise RuntimeError(
                f"jkv::extend: tokens {start}:{stop} do not lie within the cache's {codes.shape[2]} tokens"
            )
    new_codes, new_scales = _extend_fake(codes, scales, ranges, source, bits)
    place = 0
    for start, stop in pairs:
        new_codes[:, :, place : place + stop - start] = codes[:, :, start:stop]
        new_scales[:, :, :, place : place + stop - start] = scales[:, :, :, start:stop]
        place += stop - start
    torch.ops.jkv.append(new_codes, new_scales, source, place, bits)
    return new_codes, new_scales


def _extend_fake(codes, scales, ranges, source, bits):
    tokens = source.shape[2]
    for start, stop in zip(ranges[::2], ranges[1::2]):
        tokens = tokens + stop - start
    batch, heads, _, width = codes.shape
    _, _, groups, _, numbers = scales.shape
    return codes.new_empty(batch, heads, tokens, width), scales.new_empty(batch, heads, groups, tokens, numbers)


for _key in ("CPU", "CUDA"):
    library.impl("append_at", _without_autocast(append_at), _key)
    library.impl("extend", _without_autocast(extend), _key)
torch.library.register_fake("jkv::extend", _extend_fake, lib=library)
torch.library.register_fake("jkv::append_at", lambda *_: None, lib=library)
