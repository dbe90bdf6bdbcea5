"""Corrected attention over cached and full-precision keys, in one online softmax.

For query row i, with s the softmax scale and every exponent taken to base 2:

    cached keys j:    score = s · (q_i·k̂_j  -  s/24 · Σ_g ‖q_ig‖² Δ_jg²)  [+ mask]
    current keys j:   score = s · q_i·k_j                                 [+ mask]

(arXiv 2605.26266, Taylor form.) The correction is a product of rank G = head_dim / group_size, so it rides in the score
product as one more dot of K = 16: columns `-s/24·‖q_g‖²`, split into a float16 and its remainder, against `Δ_g²`.

One kernel serves three lowerings. `CACHED == "packed"` unpacks codes in registers. `"dense"` reads keys and values that
were dequantized before, and beside them the columns Δ² or, for per-channel steps, each row's block of steps. `"none"`
is plain flash attention, the yardstick of the budgets. Where query heads share keys and are short, they are rows of
one tile: row r is query `r % n_query` of head `r // n_query`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_correction import CLAMP, delta_columns, exact_bias, query_columns
from .triton_tiles import LOG2E, channel_of_lane, dequantize_tile, dot, lane_is_used, load_dense, narrow


class Meta(NamedTuple):
    """What the kernel is compiled for. Nothing here depends on a length or an offset."""

    BLOCK_M: int
    BLOCK_N: int
    HEAD_DIM: int
    VALUE_DIM: int
    KEY_EIGHTH: int  # head_dim / 8, padded to a power of two
    VALUE_EIGHTH: int
    CACHED: str = "none"  # "packed", "dense" or "none"
    KEY_BITS: int = 2
    VALUE_BITS: int = 2
    KEY_GROUPS: int = 1
    VALUE_GROUPS: int = 1
    RANGES: int = 1
    CORRECTION: str = "none"  # "taylor", "exact", "block" or "none"
    CLAMPED: bool = False  # Taylor's correction is at most `CLAMP`
    COLUMNS: int = 16  # of the correction's dot
    CURRENT: bool = True
    MASK: str = "none"  # "boolean", "additive" or "none"
    CAUSAL: bool = False
    SPLIT: bool = False
    GROUPED: bool = False  # rows of a tile are queries of several heads that share keys
    PREPARED: bool = False  # cached phase reads its query from `prepare_kernel`
    PTX: bool = False  # unpack with PTX rather than portable integer operations
    FENCE: bool = False
    PRECISION: str = "ieee"  # of float32 products


@triton.jit
def _mask_scores(b_scores, p_mask_rows, i_column, m_column, stride_column, scale, MASK: tl.constexpr,
                 MASKED: tl.constexpr):  # fmt: skip
    """Scores in base 2 with the caller's mask applied; boolean masks come as bytes. p_mask_rows `[M]`."""
    b_scores = b_scores * scale
    p_mask = p_mask_rows[:, None] + i_column[None, :] * stride_column
    b_mask = tl.load(p_mask, mask=m_column[None, :], other=0) if MASKED else tl.load(p_mask)
    if MASK == "boolean":
        b_scores = tl.where(b_mask != 0, b_scores, -float("inf"))
    else:
        b_scores += b_mask.to(tl.float32) * LOG2E
    return b_scores


@triton.jit
def _online_softmax(b_scores, b_max, b_sum, scale, MASKED: tl.constexpr):
    """Weights of a block of scores and the factor by which what was summed before shrinks. `scale` turns to base 2."""
    b_new_max = tl.maximum(b_max, tl.max(b_scores, 1) * scale)
    b_base = b_new_max
    if MASKED:  # a row that has seen nothing yet has maximum -inf
        b_base = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
    b_weight = tl.exp2(b_scores * scale - b_base[:, None])
    b_shrink = tl.exp2(b_max - b_base)
    return b_weight, b_shrink, b_new_max, b_sum * b_shrink + tl.sum(b_weight, 1)


@triton.jit
def _token_of_column(i_column, spans, RANGES: tl.constexpr):
    """The store's token behind each cached column; spans hold (shift, stop), columns below `stop` shift by `shift`."""
    i_token = i_column + spans[0][0]
    for r in tl.static_range(1, RANGES):
        i_token = tl.where(i_column < spans[r - 1][1], i_token, i_column + spans[r][0])
    return i_token


@triton.jit
def _cached_tile(b_acc, b_max, b_sum, b_query, b_query_columns, first, n_cached, key_store, value_store, rows, spans,
                 scale, META: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One block of cached keys into the running softmax."""
    p_keys, p_key_scales, key_stride, key_group_stride = key_store
    p_values, p_value_scales, value_stride, value_group_stride = value_store
    p_query_rows, p_mask_rows, p_bias_rows, m_row, mask_column_stride, softmax_scale = rows
    i_column = first + tl.arange(0, META.BLOCK_N)
    m_column = i_column < n_cached
    if META.CACHED == "packed":
        i_token = _token_of_column(i_column, spans, META.RANGES)
        b_key, b_steps = dequantize_tile(
            p_keys, p_key_scales, i_token, m_column, key_stride, key_group_stride, META.KEY_BITS, META.KEY_GROUPS,
            META.HEAD_DIM, META.KEY_EIGHTH, MASKED, META.PTX, META.FENCE,
            META.COLUMNS if META.PREPARED and META.PTX and META.CORRECTION == "taylor" else 0,
        )  # fmt: skip
    else:
        i_token = i_column
        b_key = load_dense(p_keys + i_column * key_stride, m_column, META.HEAD_DIM, META.KEY_EIGHTH, MASKED)
    if META.CORRECTION == "taylor":  # first, so that both products share one fence
        if META.CACHED == "packed":
            b_delta = delta_columns(b_steps, META.KEY_BITS, META.COLUMNS)
        else:
            p_delta = p_key_scales + i_column[:, None] * META.COLUMNS + tl.arange(0, META.COLUMNS)[None, :]
            b_delta = tl.load(p_delta, mask=m_column[:, None], other=0.0) if MASKED else tl.load(p_delta)
        b_scores = dot(b_query_columns, tl.trans(b_delta), None, META.PRECISION)
        if META.CLAMPED:
            b_scores = tl.maximum(b_scores, -CLAMP / softmax_scale)
        b_scores = dot(b_query, tl.trans(b_key), b_scores, META.PRECISION)  # [BLOCK_M, BLOCK_N]
    else:
        b_scores = dot(b_query, tl.trans(b_key), None, META.PRECISION)
    if META.CORRECTION == "exact":
        b_bias = exact_bias(
            p_query_rows, m_row, p_key_scales, i_token, m_column, key_group_stride, softmax_scale, META.KEY_BITS,
            META.HEAD_DIM, META.KEY_GROUPS, META.BLOCK_M,
        )  # fmt: skip
        b_scores -= b_bias / softmax_scale
    elif META.CORRECTION == "block":
        i_block = tl.load(p_key_scales + i_column, mask=m_column, other=0)
        m_bias = m_row[:, None] & m_column[None, :]
        b_scores -= tl.load(p_bias_rows[:, None] + i_block[None, :], mask=m_bias, other=0.0)
    if META.MASK != "none":
        b_scores = _mask_scores(b_scores, p_mask_rows, i_column, m_column, mask_column_stride, scale, META.MASK, MASKED)
    if MASKED:
        b_scores = tl.where(m_column[None, :], b_scores, -float("inf"))
    b_weight, b_shrink, b_max, b_sum = _online_softmax(
        b_scores, b_max, b_sum, 1.0 if META.MASK != "none" else scale, MASKED or META.MASK != "none"
    )
    if META.CACHED == "packed":
        b_value, _ = dequantize_tile(
            p_values, p_value_scales, i_token, m_column, value_stride, value_group_stride, META.VALUE_BITS,
            META.VALUE_GROUPS, META.VALUE_DIM, META.VALUE_EIGHTH, MASKED, META.PTX, META.FENCE, 0,
        )  # fmt: skip
    else:
        b_value = load_dense(p_values + i_column * value_stride, m_column, META.VALUE_DIM, META.VALUE_EIGHTH, MASKED)
    b_acc = dot(narrow(b_weight, b_value.dtype), b_value, b_acc * b_shrink[:, None], META.PRECISION)
    return b_acc, b_max, b_sum


@triton.jit
def _current_tile(b_acc, b_max, b_sum, b_query, first, n_current, n_cached, i_last, p_keys, p_values, key_stride,
                  value_stride, rows, scale, META: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One block of full-precision keys, never corrected. i_last `[BLOCK_M]`: the last key a row may see."""
    _, p_mask_rows, _, _, mask_column_stride, _ = rows
    i_column = first + tl.arange(0, META.BLOCK_N)
    m_column = i_column < n_current
    b_key = load_dense(p_keys + i_column * key_stride, m_column, META.HEAD_DIM, META.KEY_EIGHTH, MASKED)
    b_scores = dot(b_query, tl.trans(b_key), None, META.PRECISION)  # [BLOCK_M, BLOCK_N]
    if META.MASK != "none":
        b_scores = _mask_scores(
            b_scores, p_mask_rows, n_cached + i_column, m_column, mask_column_stride, scale, META.MASK, MASKED
        )
    if MASKED:
        m_visible = m_column[None, :]
        if META.CAUSAL:
            m_visible = m_visible & (i_column[None, :] <= i_last[:, None])
        b_scores = tl.where(m_visible, b_scores, -float("inf"))
    b_weight, b_shrink, b_max, b_sum = _online_softmax(
        b_scores, b_max, b_sum, 1.0 if META.MASK != "none" else scale, MASKED or META.MASK != "none"
    )
    b_value = load_dense(p_values + i_column * value_stride, m_column, META.VALUE_DIM, META.VALUE_EIGHTH, MASKED)
    b_acc = dot(narrow(b_weight, b_value.dtype), b_value, b_acc * b_shrink[:, None], META.PRECISION)
    return b_acc, b_max, b_sum


@triton.jit
def _rows_of_program(grid_heads, group, n_rows, n_query, META: tl.constexpr):
    """Which queries of which heads this program holds: (valid `[BLOCK_M]`, head, query `[BLOCK_M]`).

    Called anew for each phase, through a program id that the compiler does not recognise: rows and all addresses made
    of them would else occupy registers from the first phase through the last.
    """
    i_block = tl.program_id(0)
    if META.PTX:
        i_block = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [i_block], tl.int32, is_pure=False, pack=1)
    i_row = i_block * META.BLOCK_M + tl.arange(0, META.BLOCK_M)
    i_head = (tl.program_id(1) % grid_heads).to(tl.int64)
    # Masks are loaded without a predicate on rows: those beyond the last repeat it, and are not stored.
    i_query = tl.minimum(i_row, n_rows - 1) if META.MASK != "none" else i_row
    if META.GROUPED:
        i_head = i_head * group + i_query // n_query  # [BLOCK_M]
        i_query = i_query % n_query
    return i_row < n_rows, i_head, i_query


@triton.jit(
    do_not_specialize=[
        "grid_heads", "group", "n_rows", "n_query", "n_current", "n_cached", "shift_0", "stop_0", "shift_1", "stop_1",
        "shift_2", "stop_2", "shift_3", "tiles_per_split",
    ]
)  # fmt: skip
def attention_kernel(
    p_query, p_key_store, p_key_scales, p_value_store, p_value_scales, p_prepared, p_bias, p_key, p_value, p_mask,
    p_output, p_lse, query_strides, prepared_strides, key_store_strides, key_scale_strides, value_store_strides,
    value_scale_strides, bias_strides, key_strides, value_strides, mask_strides, output_strides, lse_strides,
    grid_heads, group, n_rows, n_query, n_current, n_cached, shift_0, stop_0, shift_1, stop_1, shift_2, stop_2,
    shift_3, tiles_per_split, softmax_scale,
    META: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, batch · heads, splits of the keys); with `GROUPED` they are the keys' heads.

    Scales come as words (`triton_tiles`). With `SPLIT`, outputs are float32 partial results, which
    `merge_kernel` joins by their log-sum-exp.
    """
    i_batch = (tl.program_id(1) // grid_heads).to(tl.int64)
    i_kv_head = (tl.program_id(1) % grid_heads // (1 if META.GROUPED else group)).to(tl.int64)
    i_split = tl.program_id(2).to(tl.int64)
    scale = softmax_scale * LOG2E

    m_row, i_head, i_query = _rows_of_program(grid_heads, group, n_rows, n_query, META)
    p_query_rows = p_query + i_batch * query_strides[0] + i_head * query_strides[1] + i_query * query_strides[2]

    p_mask_rows = p_mask
    p_bias_rows = p_bias
    if META.MASK != "none":
        p_mask_rows = p_mask + i_batch * mask_strides[0] + i_head * mask_strides[1]
        p_mask_rows += i_query.to(tl.int64) * mask_strides[2]
    if META.CORRECTION == "block":
        p_bias_rows = p_bias + i_batch * bias_strides[0] + i_head * bias_strides[1] + i_query * bias_strides[2]
    rows = (p_query_rows, p_mask_rows, p_bias_rows, m_row, mask_strides[3], softmax_scale)

    b_max = tl.full([META.BLOCK_M], -float("inf"), tl.float32)
    b_sum = tl.full([META.BLOCK_M], 0.0, tl.float32)
    b_acc = tl.full([META.BLOCK_M, 8 * META.VALUE_EIGHTH], 0.0, tl.float32)

    if META.CACHED != "none":
        p_keys = p_key_store + i_batch * key_store_strides[0] + i_kv_head * key_store_strides[1]
        p_values = p_value_store + i_batch * value_store_strides[0] + i_kv_head * value_store_strides[1]
        key_store = (p_keys, p_keys, key_store_strides[2], 0)
        value_store = (p_values, p_values, value_store_strides[2], 0)
        if META.CACHED == "packed" or META.CORRECTION != "none":
            p_scales = p_key_scales + i_batch * key_scale_strides[0] + i_kv_head * key_scale_strides[1]
            key_store = (p_keys, p_scales, key_store_strides[2], key_scale_strides[2])
        if META.CACHED == "packed":
            p_scales = p_value_scales + i_batch * value_scale_strides[0] + i_kv_head * value_scale_strides[1]
            value_store = (p_values, p_scales, value_store_strides[2], value_scale_strides[2])
        if META.PREPARED:
            p_rows = p_prepared + i_batch * prepared_strides[0] + i_head * prepared_strides[1]
            p_rows += i_query * (META.HEAD_DIM + META.COLUMNS)
            b_query = load_dense(p_rows, m_row, META.HEAD_DIM, META.KEY_EIGHTH, True)
            b_query_columns = b_query
            if META.CORRECTION == "taylor":
                p_columns = p_rows[:, None] + META.HEAD_DIM + tl.arange(0, META.COLUMNS)[None, :]
                b_query_columns = tl.load(p_columns, mask=m_row[:, None], other=0.0)
        else:
            b_query = load_dense(p_query_rows, m_row, META.HEAD_DIM, META.KEY_EIGHTH, True)
            b_query_columns = b_query
            if META.CORRECTION == "taylor":
                b_query_columns = query_columns(
                    b_query, softmax_scale, META.HEAD_DIM, META.KEY_EIGHTH, META.KEY_GROUPS, META.COLUMNS
                )
            b_query = narrow(b_query, tl.float16)
        spans = ((shift_0, stop_0), (shift_1, stop_1), (shift_2, stop_2), (shift_3, n_cached))
        first = 0
        stop = n_cached
        if META.SPLIT:
            first = tl.minimum(i_split.to(tl.int32) * tiles_per_split * META.BLOCK_N, n_cached)
            stop = tl.minimum(first + tiles_per_split * META.BLOCK_N, n_cached)
        full_stop = first + (stop - first) // META.BLOCK_N * META.BLOCK_N
        for i_first in tl.range(first, full_stop, META.BLOCK_N):
            b_acc, b_max, b_sum = _cached_tile(
                b_acc, b_max, b_sum, b_query, b_query_columns, i_first, n_cached, key_store, value_store, rows, spans,
                scale, META, False,
            )  # fmt: skip
        if full_stop < stop:
            b_acc, b_max, b_sum = _cached_tile(
                b_acc, b_max, b_sum, b_query, b_query_columns, full_stop, n_cached, key_store, value_store, rows,
                spans, scale, META, True,
            )  # fmt: skip

    if META.CURRENT:
        m_row, i_head, i_query = _rows_of_program(grid_heads, group, n_rows, n_query, META)
        p_query_rows = p_query + i_batch * query_strides[0] + i_head * query_strides[1] + i_query * query_strides[2]
        b_query = load_dense(p_query_rows, m_row, META.HEAD_DIM, META.KEY_EIGHTH, True)  # not held through phase one
        p_keys = p_key + i_batch * key_strides[0] + i_kv_head * key_strides[1]
        p_values = p_value + i_batch * value_strides[0] + i_kv_head * value_strides[1]
        i_last = i_query + (n_current - n_query)
        first = 0
        stop = n_current
        if META.SPLIT:
            first = (i_split.to(tl.int32) * tiles_per_split - tl.cdiv(n_cached, META.BLOCK_N)) * META.BLOCK_N
            stop = tl.minimum(first + tiles_per_split * META.BLOCK_N, n_current)
            first = tl.maximum(first, 0)
        full_stop = stop
        if META.CAUSAL:
            stop = tl.minimum(stop, tl.max(tl.where(m_row, i_last, -1)) + 1)
            full_stop = tl.minimum(stop, tl.min(tl.where(m_row, i_last, n_current)) + 1)
        full_stop = first + tl.maximum(full_stop - first, 0) // META.BLOCK_N * META.BLOCK_N
        for i_first in tl.range(first, full_stop, META.BLOCK_N):
            b_acc, b_max, b_sum = _current_tile(
                b_acc, b_max, b_sum, b_query, i_first, n_current, n_cached, i_last, p_keys, p_values, key_strides[2],
                value_strides[2], rows, scale, META, False,
            )  # fmt: skip
        for i_first in tl.range(full_stop, stop, META.BLOCK_N, num_stages=1):
            b_acc, b_max, b_sum = _current_tile(
                b_acc, b_max, b_sum, b_query, i_first, n_current, n_cached, i_last, p_keys, p_values, key_strides[2],
                value_strides[2], rows, scale, META, True,
            )  # fmt: skip

    m_row, i_head, i_query = _rows_of_program(grid_heads, group, n_rows, n_query, META)
    m_seen = b_sum > 0  # a fully masked row is zero, as in F.scaled_dot_product_attention
    b_acc = b_acc / tl.where(m_seen, b_sum, 1.0)[:, None]
    b_lse = tl.where(m_seen, (b_max + tl.log2(b_sum)) / LOG2E, -float("inf"))
    i_lane = tl.arange(0, 8 * META.VALUE_EIGHTH)
    p_rows = p_output + i_split * output_strides[0] + i_batch * output_strides[1]
    p_rows += i_head * output_strides[2] + i_query * output_strides[3]
    p_out = p_rows[:, None] + channel_of_lane(i_lane, META.VALUE_DIM // 8, META.VALUE_EIGHTH)[None, :]
    m_out = m_row[:, None] & lane_is_used(i_lane, META.VALUE_DIM // 8, META.VALUE_EIGHTH)[None, :]
    tl.store(p_out, narrow(b_acc, p_output.dtype.element_ty), mask=m_out)
    i_lse = i_split * lse_strides[0] + i_batch * lse_strides[1] + i_head * n_query + i_query
    tl.store(p_lse + i_lse, b_lse, mask=m_row)
