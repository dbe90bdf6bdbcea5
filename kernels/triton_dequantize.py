"""Packed tokens back to numbers: x̂ = zero' + (1 + c / 2^b) · step', exact in float32 before the cast.

The first half of the unpack-once path too, where it also lays down the columns Δ² that the attention kernel's
correction reads. Bytes are loaded once per lane they hold (hits in the L1 cache), so no data moves between threads and
one form serves every width of code, every group size and every head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import channel_of_lane, lane_is_used, narrow, scale_up, steps_of


@triton.jit
def _plane(p_token, m_x, i_channel, FIRST: tl.constexpr, PLANE_BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Integer codes of one plane, `[N, lanes]`; p_token `[N]`."""
    PER_LANE: tl.constexpr = HEAD_DIM * PLANE_BITS // 8
    p_bytes = p_token[:, None] + FIRST + (i_channel % PER_LANE)[None, :]
    b_bytes = tl.load(p_bytes, mask=m_x, other=0).to(tl.int32)
    return (b_bytes >> (i_channel // PER_LANE * PLANE_BITS)[None, :]) & ((1 << PLANE_BITS) - 1)


@triton.jit
def _dequantize_block(p_codes, p_scales, p_output, p_columns, code_strides, scale_strides, output_strides, i_batch,
                      i_head, i_batch_head, i_token, m_token, start, length, BITS: tl.constexpr, GROUPS: tl.constexpr,
                      HEAD_DIM: tl.constexpr, EIGHTH_PADDED: tl.constexpr, TOKEN_BLOCK: tl.constexpr,
                      COLUMNS: tl.constexpr):  # fmt: skip
    i_lane = tl.arange(0, 8 * EIGHTH_PADDED)
    i_channel = channel_of_lane(i_lane, HEAD_DIM // 8, EIGHTH_PADDED)
    m_x = m_token[:, None] & lane_is_used(i_lane, HEAD_DIM // 8, EIGHTH_PADDED)[None, :]
    p_token = p_codes + i_batch * code_strides[0] + i_head * code_strides[1]
    p_token += (start + i_token).to(tl.int64) * code_strides[2]
    if BITS == 3:
        b_codes = _plane(p_token, m_x, i_channel, 0, 2, HEAD_DIM)
        b_codes |= _plane(p_token, m_x, i_channel, HEAD_DIM // 4, 1, HEAD_DIM) << 2
    else:
        b_codes = _plane(p_token, m_x, i_channel, 0, BITS, HEAD_DIM)

    p_words = p_scales + i_batch * scale_strides[0] + i_head * scale_strides[1]
    p_words += (start + i_token) // TOKEN_BLOCK
    i_group = i_channel // (HEAD_DIM // GROUPS)
    b_words = tl.load(p_words[:, None] + i_group[None, :] * scale_strides[2], mask=m_x, other=0)
    b_x = scale_up(1.0 + b_codes.to(tl.float32) * (1.0 / 2**BITS), b_words, BITS)
    p_out = p_output + i_batch * output_strides[0] + i_head * output_strides[1]
    p_out += i_token.to(tl.int64) * output_strides[2]
    tl.store(p_out[:, None] + i_channel[None, :], narrow(b_x, p_output.dtype.element_ty), mask=m_x)
    if COLUMNS:
        GROUPS_PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
        i_column = tl.arange(0, COLUMNS)
        p_steps = p_words[:, None] + (i_column % GROUPS_PADDED % GROUPS)[None, :] * scale_strides[2]
        b_step = steps_of(tl.load(p_steps, mask=m_token[:, None], other=0))
        b_delta = b_step.to(tl.float32) * (1.0 / 2**BITS)
        b_square = tl.minimum(b_delta * b_delta, 65504.0).to(tl.float16)
        p_out = p_columns + (i_batch_head * length + i_token) * COLUMNS
        tl.store(p_out[:, None] + i_column[None, :], b_square, mask=m_token[:, None])


@triton.jit(do_not_specialize=["heads", "start", "length", "first", "total"])
def dequantize_kernel(
    p_key_codes, p_key_scales, p_key, p_columns, p_value_codes, p_value_scales, p_value, key_code_strides,
    key_scale_strides, key_strides, value_code_strides, value_scale_strides, value_strides, heads, start, length,
    first, total, BLOCK: tl.constexpr, KEY_BITS: tl.constexpr, KEY_GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    KEY_EIGHTH: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_GROUPS: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_EIGHTH: tl.constexpr, KEY_TOKEN_BLOCK: tl.constexpr, VALUE_TOKEN_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tokens `start … start + length - 1` to rows `first …` of outputs of `total` rows; grid as `append_kernel`."""
    i_batch = (tl.program_id(1) // heads).to(tl.int64)
    i_head = (tl.program_id(1) % heads).to(tl.int64)
    i_token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_token = i_token < length
    i_row = tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        _dequantize_block(
            p_key_codes, p_key_scales, p_key + first * key_strides[2], p_columns + first * COLUMNS, key_code_strides,
            key_scale_strides, key_strides, i_batch, i_head, i_row, i_token, m_token, start, total, KEY_BITS,
            KEY_GROUPS, HEAD_DIM, KEY_EIGHTH, KEY_TOKEN_BLOCK, COLUMNS,
        )  # fmt: skip
    else:
        _dequantize_block(
            p_value_codes, p_value_scales, p_value + first * value_strides[2], p_columns, value_code_strides,
            value_scale_strides, value_strides, i_batch, i_head, i_row, i_token, m_token, start, total, VALUE_BITS,
            VALUE_GROUPS, VALUE_DIM, VALUE_EIGHTH, VALUE_TOKEN_BLOCK, 0,
        )  # fmt: skip
