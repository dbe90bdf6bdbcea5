"""Move packed tokens within a cache, bit for bit: one launch, which reads and writes everything once.

The ranges may overlap, and nothing is set aside. With `distance` the number of tokens that the move goes over, the
program that holds token p of the first `distance` also holds p + distance, p + 2·distance, …: no other program reads or
writes any of them, and this one reads each before it overwrites it, as it walks against the direction of the move. So
no program waits for another. Within one, threads need no barrier either: an element is read and written by one thread,
or passes from one to the other in between.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _walk(p_x, m_x, i_row, row_stride, source, destination, length, distance):
    """Rows `source …` to `destination …`; p_x `[N, columns]` points at row `i_row` `[N, 1]` of the tensor."""
    steps = tl.cdiv(length, distance)
    for i in range(steps):
        first = tl.where(source > destination, i, steps - 1 - i) * distance
        m_moved = m_x & (first + i_row < length)
        b_x = tl.load(p_x + (source + first).to(tl.int64) * row_stride, mask=m_moved, other=0)
        tl.store(p_x + (destination + first).to(tl.int64) * row_stride, b_x, mask=m_moved)


@triton.jit(do_not_specialize=["heads", "source", "destination", "length", "distance"])
def move_kernel(p_codes, p_scales, code_strides, scale_strides, heads, source, destination, length, distance,
                WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
                TOKEN_BLOCK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid: (blocks of the first `distance` tokens, batch · heads, 2: codes `[…, WIDTH]` and scales).

    `distance` is |source - destination|, or `length` where that is less; both not 0, and all multiples of TOKEN_BLOCK.
    """
    i_batch = (tl.program_id(1) // heads).to(tl.int64)
    i_head = (tl.program_id(1) % heads).to(tl.int64)
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    if tl.program_id(2) == 0:
        i_byte = tl.arange(0, WIDTH_PADDED)[None, :]
        p_bytes = p_codes + i_batch * code_strides[0] + i_head * code_strides[1] + i_row * code_strides[2] + i_byte
        m_bytes = (i_row < distance) & (i_byte < WIDTH)
        _walk(p_bytes, m_bytes, i_row, code_strides[2], source, destination, length, distance)
    else:
        i_group = tl.arange(0, GROUPS_PADDED)[None, :]
        p_words = p_scales + i_batch * scale_strides[0] + i_head * scale_strides[1]
        p_words = p_words + i_row + i_group * scale_strides[2]
        m_words = (i_row < distance // TOKEN_BLOCK) & (i_group < GROUPS)
        _walk(
            p_words, m_words, i_row, 1, source // TOKEN_BLOCK, destination // TOKEN_BLOCK, length // TOKEN_BLOCK,
            distance // TOKEN_BLOCK,
        )  # fmt: skip
