"""Caches whose tokens share steps, channel by channel and block by block (KIVI, arXiv 2402.02750, keys).

Keys have a few channels that are large in all tokens, so that a step per channel rounds them much better than a step
per token. It is known only once all tokens of a block are: a block that fills up is quantized again by each write to
it. Nothing may be lost by that, so the tokens of a block that a write leaves as they are come from what is held of them
in full precision (`held`), as far as that goes: the last `block` - 1 tokens before a write are enough for any that
goes on where the last one stopped. They are also enough for no such block ever to be attended: what lies further back
than that is in whole blocks.

Codes are of whole blocks, of which the last one may reach beyond the cache's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .held import put_over
from .layout import token_block

ops.library.define(
    "append_blocks(Tensor(a!) codes, Tensor(b!) scales, Tensor[] held, Tensor[] held_ranges, Tensor source, "
    "SymInt start, SymInt tokens, int bits) -> ()",
    tags=ops._HOST_TAGS,
)


def append_blocks(
    codes: Tensor, scales: Tensor, held: Sequence[Tensor], held_ranges: Sequence[Tensor], source: Tensor, start: int,
    tokens: int, bits: int,
) -> None:  # fmt: skip
    """`ops.append` to any range of tokens, also one that begins or ends inside of a block.

    The other tokens of such a block are quantized anew: as they were written where they are held, else as they read.
    What lies beyond the cache's tokens repeats the last of them, so that it has no part in a step.

    Args:
        codes: uint8 `[B, H, T · block, D · bits / 8]`, mutated; whole blocks, enough of them for `tokens`.
        scales: float16 `[B, H, G, T, 2]`, mutated; G = D for a step per channel.
        held, held_ranges: what is held of the cache in full precision, as for `held.dequantize_held`; only read.
        source: `[B, H, n, D]`, float32, float16 or bfloat16, any strides; must not alias the cache.
        start: first token written.
        tokens: how many the cache has.
        bits: 2, 3, 4 or 8.

    Raises:
        RuntimeError: the range does not lie within the cache; nothing has been written then.
    """
    block, stop = token_block(codes, scales), start + source.shape[2]
    if start < 0 or stop > tokens or tokens > codes.shape[2]:
        raise RuntimeError(f"jkv::append_blocks: tokens {start}:{stop} do not lie within the cache's {tokens} tokens")
    if start == stop:
        return
    jkv = torch.ops.jkv
    for first in sorted({edge - edge % block for edge in (start, stop) if edge % block}):
        last = min(first + block, tokens)
        values = jkv.dequantize(codes, scales, first, last, bits, torch.float32)
        for rows, ranges in zip(held, held_ranges):
            put_over(values, rows, ranges, first)
        a, b = max(start, first), min(stop, last)
        values[:, :, a - first : b - first] = source[:, :, a - start : b - start]
        beyond = values[:, :, -1:].expand(-1, -1, first + block - last, -1)
        jkv.append(codes, scales, torch.cat((values, beyond), 2), first, bits)
    first, last = start + -start % block, stop - stop % block
    if first < last:
        jkv.append(codes, scales, source[:, :, first - start : last - start], first, bits)


ops.library.impl("append_blocks", ops._without_autocast(append_blocks), "CompositeExplicitAutograd")
torch.library.register_fake("jkv::append_blocks", lambda *_: None, lib=ops.library)
