"""Quantize new tokens into a packed cache: one pass, keys and values in one launch.

Per token and group of channels, as `reference.quantize`, whose bits it reproduces exactly:

    step'  = float16((max - min) · 2^b / (2^b - 1)),   zero' = float16(min - step')       rounded before the codes
    code   = round_half_even((x - zero' - step') / (step' / 2^b)), clamped to 0 … 2^b - 1

Of a symmetric cache, whose scales are steps alone,

    step'  = float16(max |x| · 2^(b+1) / (2^b - 1)),       zero' = -(3 · 2^b - 1) / 2^(b+1) · step'

A group that holds a NaN or an infinity, or spans more than float32 can hold, gets NaN scales and codes 0.

Where a block of tokens shares its steps (KIVI, arXiv 2402.02750, has one per channel and block), min and max are taken
over the block, too, by the one program that writes it.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT16_MAX = tl.constexpr(65504.0)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
NAN_STEP, NAN_PAIR = tl.constexpr(0x7E00), tl.constexpr(0x7E007E00)  # one float16 NaN, and two
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds half to even


@triton.jit
def _scales_of(b_low, b_high, m_finite, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Stored step' and zero' of groups with the given range, their word, and whether codes may be other than 0."""
    LEVELS: tl.constexpr = 2**BITS
    RATIO: tl.constexpr = (2 * LEVELS if SYMMETRIC else LEVELS) / (LEVELS - 1)
    b_range = tl.maximum(b_high, -b_low) if SYMMETRIC else b_high - b_low
    m_finite = m_finite & (b_range <= FLOAT32_MAX)
    b_range = tl.where(m_finite, b_range, 0.0)
    b_step = tl.minimum(b_range * RATIO, FLOAT16_MAX).to(tl.float16)
    b_word = b_step.to(tl.int16, bitcast=True)
    if SYMMETRIC:
        b_zero = b_step.to(tl.float32) * (-(3 * LEVELS - 1) / (2 * LEVELS))
        b_word = tl.where(m_finite, b_word, tl.full(b_word.shape, NAN_STEP, tl.int16))
    else:
        b_low = tl.where(m_finite, b_low, 0.0)
        b_zero = tl.minimum(tl.maximum(b_low - b_step.to(tl.float32), -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)
        b_word = (b_word.to(tl.int32) & 0xFFFF) | (b_zero.to(tl.int16, bitcast=True).to(tl.int32) << 16)
        b_word = tl.where(m_finite, b_word, NAN_PAIR)
    return b_step.to(tl.float32), b_zero.to(tl.float32), b_word, m_finite & (b_step.to(tl.float32) > 0)


@triton.jit
def _codes_of(b_x, b_step, b_zero, m_coded, BITS: tl.constexpr):
    LEVELS: tl.constexpr = 2**BITS
    b_delta = tl.where(m_coded, b_step * (1.0 / LEVELS), 1.0)
    b_code = tl.div_rn(b_x - (b_zero + b_step), b_delta + tl.zeros_like(b_x))
    b_code = tl.minimum(tl.maximum(b_code, 0.0), LEVELS - 1.0)
    b_code = (b_code + ROUNDER) - ROUNDER
    return tl.where(m_coded, b_code, 0.0).to(tl.int32)


@triton.jit
def _store_plane(p_plane, b_codes, m_token, PLANE_BITS: tl.constexpr, SHIFT: tl.constexpr, EIGHTH: tl.constexpr,
                 EIGHTH_PADDED: tl.constexpr):  # fmt: skip
    """One plane of the codes `[N, 8, EIGHTH_PADDED]`: lane i of a byte holds channels of eighths `i · PLANE_BITS …`."""
    N: tl.constexpr = b_codes.shape[0]
    b_plane = (b_codes >> SHIFT) & ((1 << PLANE_BITS) - 1)
    b_plane = tl.reshape(b_plane, (N, 8 // PLANE_BITS, PLANE_BITS, EIGHTH_PADDED))
    i_lane = tl.arange(0, 8 // PLANE_BITS)
    b_bytes = tl.sum(b_plane << (i_lane * PLANE_BITS)[None, :, None, None], 1).to(tl.uint8)
    i_eighth = tl.arange(0, PLANE_BITS)
    i_rest = tl.arange(0, EIGHTH_PADDED)
    p_bytes = p_plane[:, None, None] + i_eighth[None, :, None] * EIGHTH + i_rest[None, None, :]
    tl.store(p_bytes, b_bytes, mask=m_token[:, None, None] & (i_rest < EIGHTH)[None, None, :])


@triton.jit
def _store_planes(p_token, b_codes, m_token, BITS: tl.constexpr, EIGHTH: tl.constexpr,
                  EIGHTH_PADDED: tl.constexpr):  # fmt: skip
    """Codes `[N, 8, EIGHTH_PADDED]` of tokens; p_token `[N]`."""
    if BITS == 3:
        _store_plane(p_token, b_codes, m_token, 2, 0, EIGHTH, EIGHTH_PADDED)
        _store_plane(p_token + 2 * EIGHTH, b_codes, m_token, 1, 2, EIGHTH, EIGHTH_PADDED)
    else:
        _store_plane(p_token, b_codes, m_token, BITS, 0, EIGHTH, EIGHTH_PADDED)


@triton.jit
def _append_block(p_codes, p_scales, p_source, code_strides, scale_strides, source_strides, i_batch, i_head, i_token,
                  m_token, start, BITS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
                  EIGHTH_PADDED: tl.constexpr):  # fmt: skip
    N: tl.constexpr = i_token.shape[0]
    EIGHTH: tl.constexpr = HEAD_DIM // 8
    GROUP: tl.constexpr = HEAD_DIM // GROUPS
    SYMMETRIC: tl.constexpr = p_scales.dtype.element_ty == tl.int16
    i_eighth = tl.arange(0, 8)
    i_rest = tl.arange(0, EIGHTH_PADDED)
    i_channel = i_eighth[:, None] * EIGHTH + i_rest[None, :]  # [8, EIGHTH_PADDED]
    m_x = m_token[:, None, None] & (i_rest < EIGHTH)[None, None, :]
    p_x = p_source + i_batch * source_strides[0] + i_head * source_strides[1]
    p_x += (i_token * source_strides[2])[:, None, None] + (i_channel * source_strides[3])[None, :, :]
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)  # [N, 8, EIGHTH_PADDED]
    b_bad = (tl.abs(b_x) <= FLOAT32_MAX).to(tl.int32) ^ 1  # NaN compares false

    p_words = p_scales + i_batch * scale_strides[0] + i_head * scale_strides[1]
    p_words += start + i_token
    if EIGHTH == EIGHTH_PADDED:
        b_groups = tl.reshape(b_x, (N, GROUPS, GROUP))
        m_finite = tl.max(tl.reshape(b_bad, (N, GROUPS, GROUP)), 2) == 0
        b_step, b_zero, b_word, m_coded = _scales_of(
            tl.min(b_groups, 2), tl.max(b_groups, 2), m_finite, BITS, SYMMETRIC
        )
        b_codes = _codes_of(b_groups, b_step[:, :, None], b_zero[:, :, None], m_coded[:, :, None], BITS)
        b_codes = tl.reshape(b_codes, (N, 8, EIGHTH_PADDED))
        i_group = tl.arange(0, GROUPS)
        p_words = p_words[:, None] + i_group[None, :] * scale_strides[2]
        tl.store(p_words, b_word, mask=m_token[:, None])
    else:  # groups that do not tile the padded lanes: one at a time
        b_codes = tl.zeros((N, 8, EIGHTH_PADDED), tl.int32)
        for g in tl.static_range(GROUPS):
            m_group = ((i_channel // GROUP == g) & (i_rest < EIGHTH)[None, :])[None, :, :]
            b_low = tl.min(tl.min(tl.where(m_group, b_x, float("inf")), 2), 1)
            b_high = tl.max(tl.max(tl.where(m_group, b_x, -float("inf")), 2), 1)
            m_finite = tl.max(tl.max(tl.where(m_group, b_bad, 0), 2), 1) == 0
            b_step, b_zero, b_word, m_coded = _scales_of(b_low, b_high, m_finite, BITS, SYMMETRIC)
            b_group_codes = _codes_of(b_x, b_step[:, None, None], b_zero[:, None, None], m_coded[:, None, None], BITS)
            b_codes = tl.where(m_group, b_group_codes, b_codes)
            tl.store(p_words + g * scale_strides[2], b_word, mask=m_token)

    p_plane = p_codes + i_batch * code_strides[0] + i_head * code_strides[1]
    p_plane += (start + i_token).to(tl.int64) * code_strides[2]
    _store_planes(p_plane, b_codes, m_token, BITS, EIGHTH, EIGHTH_PADDED)


@triton.jit
def _append_shared_steps(p_codes, p_scales, p_source, code_strides, scale_strides, source_strides, i_batch, i_head,
                         i_block, start, BITS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
                         EIGHTH_PADDED: tl.constexpr, TOKEN_BLOCK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Block `i_block` of the source, whose tokens share their steps; a block of any length, a tile at a time.

    The second sweep over its tokens finds them in the L1 cache: memory is read once.
    """
    EIGHTH: tl.constexpr = HEAD_DIM // 8
    GROUP: tl.constexpr = HEAD_DIM // GROUPS
    SYMMETRIC: tl.constexpr = p_scales.dtype.element_ty == tl.int16
    i_rest = tl.arange(0, EIGHTH_PADDED)
    m_lane = tl.broadcast_to((i_rest < EIGHTH)[None, :], (8, EIGHTH_PADDED))
    i_channel = tl.arange(0, 8)[:, None] * EIGHTH + i_rest[None, :]  # [8, EIGHTH_PADDED]
    i_tile = tl.arange(0, TILE)
    p_x = p_source + i_batch * source_strides[0] + i_head * source_strides[1]
    p_x += (i_block * TOKEN_BLOCK + i_tile).to(tl.int64)[:, None, None] * source_strides[2]
    p_x += (i_channel * source_strides[3])[None, :, :]  # [TILE, 8, EIGHTH_PADDED]

    b_low = tl.full((TILE, 8, EIGHTH_PADDED), float("inf"), tl.float32)
    b_high = tl.full((TILE, 8, EIGHTH_PADDED), -float("inf"), tl.float32)
    b_bad = tl.zeros((TILE, 8, EIGHTH_PADDED), tl.int32)
    for i_first in range(0, TOKEN_BLOCK, TILE):
        m_x = (i_first + i_tile < TOKEN_BLOCK)[:, None, None] & m_lane[None, :, :]
        b_x = tl.load(p_x + i_first * source_strides[2], mask=m_x, other=0.0).to(tl.float32)
        b_low = tl.minimum(b_low, tl.where(m_x, b_x, float("inf")))
        b_high = tl.maximum(b_high, tl.where(m_x, b_x, -float("inf")))
        b_bad |= (tl.abs(b_x) <= FLOAT32_MAX).to(tl.int32) ^ 1  # NaN compares false
    b_low, b_high, b_bad = tl.min(b_low, 0), tl.max(b_high, 0), tl.max(b_bad, 0)  # [8, EIGHTH_PADDED]
    if GROUPS < HEAD_DIM:  # every channel gets its group's range
        for g in range(GROUPS):
            m_group = (i_channel // GROUP == g) & m_lane
            b_low = tl.where(m_group, tl.min(tl.min(tl.where(m_group, b_low, float("inf")), 1), 0), b_low)
            b_high = tl.where(m_group, tl.max(tl.max(tl.where(m_group, b_high, -float("inf")), 1), 0), b_high)
            b_bad = tl.where(m_group, tl.max(tl.max(tl.where(m_group, b_bad, 0), 1), 0), b_bad)
    b_step, b_zero, b_word, m_coded = _scales_of(b_low, b_high, b_bad == 0, BITS, SYMMETRIC)

    i_token = start + i_block * TOKEN_BLOCK
    p_words = p_scales + i_batch * scale_strides[0] + i_head * scale_strides[1]
    p_words += i_channel // GROUP * scale_strides[2] + i_token // TOKEN_BLOCK
    tl.store(p_words, b_word, mask=m_lane & (i_channel % GROUP == 0))
    p_plane = p_codes + i_batch * code_strides[0] + i_head * code_strides[1]
    p_plane += (i_token + i_tile).to(tl.int64) * code_strides[2]
    for i_first in range(0, TOKEN_BLOCK, TILE):
        m_token = i_first + i_tile < TOKEN_BLOCK
        m_x = m_token[:, None, None] & m_lane[None, :, :]
        b_x = tl.load(p_x + i_first * source_strides[2], mask=m_x, other=0.0).to(tl.float32)
        b_codes = _codes_of(b_x, b_step[None, :, :], b_zero[None, :, :], m_coded[None, :, :], BITS)
        _store_planes(p_plane + i_first * code_strides[2], b_codes, m_token, BITS, EIGHTH, EIGHTH_PADDED)


@triton.jit
def _append_store(p_codes, p_scales, p_source, code_strides, scale_strides, source_strides, i_batch, i_head, length,
                  start, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
                  EIGHTH_PADDED: tl.constexpr, TOKEN_BLOCK: tl.constexpr):  # fmt: skip
    i_block = tl.program_id(0)
    if TOKEN_BLOCK == 1:
        i_token = i_block * BLOCK + tl.arange(0, BLOCK)
        _append_block(
            p_codes, p_scales, p_source, code_strides, scale_strides, source_strides, i_batch, i_head, i_token,
            i_token < length, start, BITS, GROUPS, HEAD_DIM, EIGHTH_PADDED,
        )  # fmt: skip
    elif i_block * TOKEN_BLOCK < length:  # the grid may be the other store's, of shorter blocks
        _append_shared_steps(
            p_codes, p_scales, p_source, code_strides, scale_strides, source_strides, i_batch, i_head, i_block, start,
            BITS, GROUPS, HEAD_DIM, EIGHTH_PADDED, TOKEN_BLOCK, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "length", "start"])
def append_kernel(
    p_key_codes, p_key_scales, p_key, p_value_codes, p_value_scales, p_value, key_code_strides, key_scale_strides,
    key_strides, value_code_strides, value_scale_strides, value_strides, heads, length, start, BLOCK: tl.constexpr,
    KEY_BITS: tl.constexpr, KEY_GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_EIGHTH: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_GROUPS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_EIGHTH: tl.constexpr,
    KEY_TOKEN_BLOCK: tl.constexpr, VALUE_TOKEN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, batch · heads, 1 for keys alone or 2 for keys and values).

    A block is `BLOCK` tokens, or so many as share a step where they do; start and length are multiples of those.
    """
    i_batch = (tl.program_id(1) // heads).to(tl.int64)
    i_head = (tl.program_id(1) % heads).to(tl.int64)
    if tl.program_id(2) == 0:
        _append_store(
            p_key_codes, p_key_scales, p_key, key_code_strides, key_scale_strides, key_strides, i_batch, i_head,
            length, start, BLOCK, KEY_BITS, KEY_GROUPS, HEAD_DIM, KEY_EIGHTH, KEY_TOKEN_BLOCK,
        )  # fmt: skip
    else:
        _append_store(
            p_value_codes, p_value_scales, p_value, value_code_strides, value_scale_strides, value_strides, i_batch,
            i_head, length, start, BLOCK, VALUE_BITS, VALUE_GROUPS, VALUE_DIM, VALUE_EIGHTH, VALUE_TOKEN_BLOCK,
        )  # fmt: skip
