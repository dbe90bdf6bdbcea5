"""Hadamard rotation, and rounding on the unbiased grid: one pass, as `quantizers.rotate` and `round_unbiased`.

A run of ORDER channels is multiplied by H / √ORDER, with H = H_S ⊗ H_16 and S = ORDER / 16: once over the 16 channels
of each sixteenth, once over the S channels with the same place in theirs. H is ±1, which bfloat16 holds exactly, and
float32 operands are three bfloat16: tensor cores lose nothing, and two small matrices stand for a large one.

With `BITS`, each group of rotated channels is then rounded to 2^BITS levels twice, from extreme to extreme and within
± LIMIT root mean squares, and rescaled by ‖x‖² / (x·x̂), which makes the error orthogonal to x (RaBitQ, arXiv
2405.12497); what comes closer is kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_append import FLOAT32_MAX, ROUNDER
from .triton_tiles import dot, narrow


@triton.jit
def _hadamard(SIZE: tl.constexpr, ORDER: tl.constexpr):
    """Sylvester's matrix of ORDER, as often as it goes into SIZE, on the diagonal: negative by the bits shared."""
    i_row, i_column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    b_shared = i_row & i_column & (ORDER - 1)
    b_shared ^= b_shared >> 4
    b_shared ^= b_shared >> 2
    b_shared ^= b_shared >> 1
    b_sign = tl.where(b_shared & 1 == 1, -1.0, 1.0)
    return tl.where(i_row // ORDER == i_column // ORDER, b_sign, 0.0).to(tl.bfloat16)


@triton.jit
def _times(b_x, b_matrix):
    """float32 `b_x` times a matrix that bfloat16 holds exactly, as three products that lose nothing."""
    b_high = narrow(b_x, tl.bfloat16)
    b_x -= b_high.to(tl.float32)
    b_middle = narrow(b_x, tl.bfloat16)
    b_low = narrow(b_x - b_middle.to(tl.float32), tl.bfloat16)
    b_sum = dot(b_low, b_matrix, None, "ieee")
    return dot(b_high, b_matrix, dot(b_middle, b_matrix, b_sum, "ieee"), "ieee")


@triton.jit
def _rotated(b_x, ORDER: tl.constexpr):
    """`[N, LANES]`, run by run of ORDER lanes, in float32."""
    N: tl.constexpr = b_x.shape[0]
    LANES: tl.constexpr = b_x.shape[1]
    S: tl.constexpr = ORDER // 16
    b_x = tl.reshape(b_x, (N * LANES // 16, 16))
    if b_x.dtype == tl.bfloat16:
        b_x = dot(b_x, _hadamard(16, 16), None, "ieee")
    else:
        b_x = _times(b_x.to(tl.float32), _hadamard(16, 16))
    if S > 1:
        SIZE: tl.constexpr = S if S > 16 else 16
        b_x = tl.permute(tl.reshape(b_x, (N, LANES // ORDER, S, 16)), (0, 1, 3, 2))
        b_x = _times(tl.reshape(b_x, (N * LANES // SIZE, SIZE)), _hadamard(SIZE, S))
        b_x = tl.permute(tl.reshape(b_x, (N, LANES // ORDER, 16, S)), (0, 1, 3, 2))
    return tl.reshape(b_x, (N, LANES)) * ORDER**-0.5


@triton.jit
def _on_grid(b_x, b_low, b_high, b_energy, LEVELS: tl.constexpr):
    """Groups `[N, group_size]` rounded to levels from `b_low` to `b_high` `[N]`, and rescaled; see `quantizers`."""
    b_step = (b_high - b_low) / (LEVELS - 1)
    b_step = tl.where(b_step > 0, b_step, 1.0)[:, None]  # of a constant group, whose codes all are 0
    b_codes = tl.div_rn(tl.minimum(tl.maximum(b_x, b_low[:, None]), b_high[:, None]) - b_low[:, None], b_step + 0 * b_x)
    b_codes = (b_codes + ROUNDER) - ROUNDER
    b_rounded = b_codes * b_step + b_low[:, None]
    b_product = tl.sum(b_x * b_rounded, 1)
    return b_rounded * tl.where(b_product > 0, b_energy / b_product, 1.0)[:, None]


@triton.jit
def _round_unbiased(b_x, LEVELS: tl.constexpr, LIMIT: tl.constexpr, SYMMETRIC: tl.constexpr):
    b_low, b_high, b_energy = tl.min(b_x, 1), tl.max(b_x, 1), tl.sum(b_x * b_x, 1)
    if SYMMETRIC:
        b_high = tl.maximum(b_high, -b_low)
        b_low = -b_high
    b_rounded = _on_grid(b_x, b_low, b_high, b_energy, LEVELS)
    if LIMIT > 0:
        b_limit = LIMIT * tl.sqrt(b_energy / b_x.shape[1])
        b_inner = _on_grid(b_x, tl.maximum(b_low, -b_limit), tl.minimum(b_high, b_limit), b_energy, LEVELS)
        m_closer = tl.sum(b_inner * b_inner, 1) < tl.sum(b_rounded * b_rounded, 1)
        b_rounded = tl.where(m_closer[:, None], b_inner, b_rounded)
    m_finite = b_energy <= FLOAT32_MAX  # minima and maxima pass over NaN: it would be lost
    return tl.where(m_finite[:, None], b_rounded, float("nan"))


@triton.jit(do_not_specialize=["heads", "length"])
def rotate_kernel(p_source, p_target, source_strides, target_strides, heads, length, BLOCK: tl.constexpr,
                  HEAD_DIM: tl.constexpr, LANES: tl.constexpr, ORDER: tl.constexpr, BITS: tl.constexpr,
                  GROUP: tl.constexpr, LIMIT: tl.constexpr, SYMMETRIC: tl.constexpr):  # fmt: skip
    """Tokens `[B, H, n, D]` to a tensor of the same shape; BITS 0 only rotates. Grid: (blocks of tokens, B · H).

    LANES is D, padded to a power of two; LIMIT 0 leaves out the inner grid; SYMMETRIC puts grids around zero.
    """
    i_batch = (tl.program_id(1) // heads).to(tl.int64)
    i_head = (tl.program_id(1) % heads).to(tl.int64)
    i_token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    i_lane = tl.arange(0, LANES)
    m_x = (i_token < length)[:, None] & (i_lane < HEAD_DIM)[None, :]
    p_rows = p_source + i_batch * source_strides[0] + i_head * source_strides[1] + i_token * source_strides[2]
    b_x = tl.load(p_rows[:, None] + (i_lane * source_strides[3])[None, :], mask=m_x, other=0.0)
    b_x = _rotated(b_x, ORDER)
    if BITS:
        b_x = _round_unbiased(tl.reshape(b_x, (BLOCK * LANES // GROUP, GROUP)), 2**BITS, LIMIT, SYMMETRIC)
        b_x = tl.reshape(b_x, (BLOCK, LANES))
    p_rows = p_target + i_batch * target_strides[0] + i_head * target_strides[1] + i_token * target_strides[2]
    p_out = p_rows[:, None] + (i_lane * target_strides[3])[None, :]
    tl.store(p_out, narrow(b_x, p_target.dtype.element_ty), mask=m_x)
