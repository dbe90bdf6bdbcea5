"""The correction's three forms on the device (arXiv 2605.26266), and the query rows prepared for it.

    Taylor:  b_ij = s²/24 · Σ_g ‖q_ig‖² Δ_jg²  (at most `CLAMP`)   as a dot of 2·G ≤ 16 columns
    exact:   b_ij = Σ_c log(sinh α_c / α_c),  α_c = s·q_ic·Δ_jc / 2  a channel at a time
    block:   b_iJ, one number per query and block of tokens          read from memory (per-channel steps)

Scores are corrected before they are multiplied by s, so the columns hold b / s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import reference
from .triton_tiles import channel_of_lane, concatenate, lane_is_used, load_dense, narrow, steps_of

CLAMP = tl.constexpr(reference.CLAMP)


@triton.jit
def query_columns(b_query, softmax_scale, HEAD_DIM: tl.constexpr, EIGHTH_PADDED: tl.constexpr, GROUPS: tl.constexpr,
                   COLUMNS: tl.constexpr):  # fmt: skip
    """The query side, float16 `[M, COLUMNS]`: -s/24·‖q_g‖² in column g, its remainder GROUPS_PADDED further."""
    GROUPS_PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    i_lane = tl.arange(0, 8 * EIGHTH_PADDED)
    i_group = channel_of_lane(i_lane, HEAD_DIM // 8, EIGHTH_PADDED) // (HEAD_DIM // GROUPS)
    i_column = tl.arange(0, COLUMNS)
    b_squares = b_query.to(tl.float32) * b_query.to(tl.float32)
    b_norms = tl.zeros((b_query.shape[0], COLUMNS), tl.float32)
    for g in tl.static_range(GROUPS):
        b_norm = tl.sum(tl.where((i_group == g)[None, :], b_squares, 0.0), 1)
        b_norms = tl.where((i_column % GROUPS_PADDED == g)[None, :], b_norm[:, None], b_norms)
    b_norms = tl.maximum(b_norms * (-softmax_scale / 24), -65504.0)
    b_upper = b_norms.to(tl.float16)
    b_lower = (b_norms - b_upper.to(tl.float32)).to(tl.float16)
    b_both = tl.where((i_column < GROUPS_PADDED)[None, :], b_upper, b_lower)
    return tl.where((i_column < 2 * GROUPS_PADDED)[None, :], b_both, 0.0).to(tl.float16)


@triton.jit
def delta_columns(b_steps, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """The key side, float16 `[N, COLUMNS]`: Δ_g² in every column of group g, saturating at float16's end."""
    b_delta = b_steps * (1.0 / 2**BITS)
    b_square = tl.minimum(b_delta * b_delta, tl.full(b_delta.shape, 65504.0, tl.float16))
    for _ in tl.static_range(6):
        if b_square.shape[1] < COLUMNS:
            b_square = concatenate(b_square, b_square)
    return b_square


@triton.jit
def _log_sinhc(b_alpha):
    """log(sinh α / α): the series where α is small, and no overflow where it is large."""
    b_a = tl.abs(b_alpha)
    b_square = b_a * b_a
    b_series = b_square * (1.0 / 6) - b_square * b_square * (1.0 / 180)
    b_safe = tl.maximum(b_a, 0.1)
    b_large = b_safe + tl.log(0.5 * (1 - tl.exp(-2 * b_safe)) / b_safe)
    return tl.where(b_a < 0.1, b_series, b_large)


@triton.jit
def exact_bias(p_query_rows, m_row, p_scales, i_token, m_token, stride_group, softmax_scale, BITS: tl.constexpr,
                HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """b = Σ_c log(sinh α_c / α_c) with α_c = s·q_c·Δ_c / 2, `[M, N]`; one channel at a time, as no product gives it."""
    b_bias = tl.zeros((BLOCK_M, i_token.shape[0]), tl.float32)
    for i_channel in range(HEAD_DIM):
        b_q = tl.load(p_query_rows + i_channel, mask=m_row, other=0.0).to(tl.float32)
        b_words = tl.load(p_scales + i_token + i_channel // (HEAD_DIM // GROUPS) * stride_group, mask=m_token, other=0)
        b_half = steps_of(b_words).to(tl.float32) * (0.5 / 2**BITS) * softmax_scale
        b_bias += _log_sinhc(b_q[:, None] * b_half[None, :])
    return b_bias


@triton.jit(do_not_specialize=["heads", "n_query"])
def prepare_kernel(p_query, p_prepared, query_strides, heads, n_query, softmax_scale, BLOCK_M: tl.constexpr,
                   HEAD_DIM: tl.constexpr, EIGHTH_PADDED: tl.constexpr, GROUPS: tl.constexpr,
                   COLUMNS: tl.constexpr):  # fmt: skip
    """Rows `[float16 query | correction columns]`, so that the attention kernel's operands come from a plain load.

    Tensor cores that read operands from shared memory (wgmma, tcgen05) get them there without passing registers only
    if they are loaded: a query converted in the kernel would occupy registers through the hot loop.
    """
    i_batch_head = tl.program_id(1).to(tl.int64)
    i_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = i_row < n_query
    p_rows = p_query + i_batch_head // heads * query_strides[0] + i_batch_head % heads * query_strides[1]
    p_rows += i_row * query_strides[2]
    b_query = load_dense(p_rows, m_row, HEAD_DIM, EIGHTH_PADDED, True)
    b_columns = query_columns(b_query, softmax_scale, HEAD_DIM, EIGHTH_PADDED, GROUPS, COLUMNS)
    p_out = p_prepared + (i_batch_head * n_query + i_row) * (HEAD_DIM + COLUMNS)
    i_lane = tl.arange(0, 8 * EIGHTH_PADDED)
    m_out = m_row[:, None] & lane_is_used(i_lane, HEAD_DIM // 8, EIGHTH_PADDED)[None, :]
    i_channel = channel_of_lane(i_lane, HEAD_DIM // 8, EIGHTH_PADDED)
    tl.store(p_out[:, None] + i_channel[None, :], narrow(b_query, tl.float16), mask=m_out)
    p_columns = p_out[:, None] + HEAD_DIM + tl.arange(0, COLUMNS)[None, :]
    tl.store(p_columns, b_columns, mask=m_row[:, None])
