"""Device-side building blocks on tiles: unpacking codes, scaling them, and products that also hold in the interpreter.

Conventions in all kernels: `p_` pointers, `b_` blocks held in registers, `m_` masks, `i_` indices.

**Channels in eighths.** A tile's channel axis is `8 · EIGHTH_PADDED` lanes, eight runs of `head_dim / 8` channels, each
padded to a power of two (Triton's tiles must be one). Every plane of `layout` then stays a plane: a 2-bit plane is two
neighbouring eighths per byte lane, a 1-bit plane one. For head_dim 64, 128, 256 there is no padding and the mapping is
the identity; head_dim 96 runs as 128 lanes of which 96 are used.

**Codes become float16 by bits alone**: `(c << (10 - bits)) | 0x3C00` is the float16 `1 + c / 2^bits`, and one
multiply-add with the stored pair `(step', zero')` gives x̂. (The same in bfloat16 would cost 2-5 % error.)

**Scales are words**, one per group and token: int32, a float16 pair, or of a symmetric cache int16, the step alone
(`layout.scale_words`). Kernels tell which by the pointer's type.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(b_left, b_right, b_acc, PRECISION: tl.constexpr):
    """Matrix product summed in float32. The interpreter holds bfloat16 as integers: operands are widened there."""
    if INTERPRETED:
        b_acc = tl.dot(b_left.to(tl.float32), b_right.to(tl.float32), b_acc, input_precision="ieee")
    else:
        b_acc = tl.dot(b_left, b_right, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """float32 to `dtype`, rounding to nearest even (the interpreter truncates to bfloat16)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = b_x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        b_x = (bits & -65536).to(tl.float32, bitcast=True)
    return b_x.to(dtype)


@triton.jit
def channel_of_lane(i_lane, EIGHTH: tl.constexpr, EIGHTH_PADDED: tl.constexpr):
    """The channel that a lane of the padded channel axis stands for."""
    if EIGHTH != EIGHTH_PADDED:
        i_lane = i_lane // EIGHTH_PADDED * EIGHTH + i_lane % EIGHTH_PADDED
    return i_lane


@triton.jit
def lane_is_used(i_lane, EIGHTH: tl.constexpr, EIGHTH_PADDED: tl.constexpr):
    return i_lane % EIGHTH_PADDED < EIGHTH


@triton.jit
def concatenate(b_left, b_right):
    """Two tiles `[N, P]` side by side, `[N, 2P]`; moves no data between threads."""
    b_both = tl.permute(tl.join(b_left, b_right), (0, 2, 1))  # [N, 2, P]
    return tl.reshape(b_both, (b_left.shape[0], 2 * b_left.shape[1]))


@triton.jit
def _concatenate4(b_0, b_1, b_2, b_3):
    """Four tiles `[N, P]` side by side, `[N, 4P]`."""
    b_all = tl.permute(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), (0, 2, 3, 1))  # [N, (01|23), (02|13), P]
    return tl.reshape(b_all, (b_0.shape[0], 4 * b_0.shape[1]))


@triton.jit
def _unpack2_ptx(b_bytes):
    """Bytes to the four float16 tiles `1 + c / 4`. Per four bytes (16 codes): 3 shifts, 4 logic, 8 permutes.

    Codes are isolated for four bytes at once, as the *upper* byte of the float16; the permutes append the zero byte.
    """
    return tl.inline_asm_elementwise(
        """{ .reg .b32 t, u;
        lop3.b32 u, $8, 0x03030303, 0x3C3C3C3C, 0xEA;
        prmt.b32 $0, u, 0, 0x1404; prmt.b32 $1, u, 0, 0x3424;
        shr.b32 t, $8, 2; lop3.b32 u, t, 0x03030303, 0x3C3C3C3C, 0xEA;
        prmt.b32 $2, u, 0, 0x1404; prmt.b32 $3, u, 0, 0x3424;
        shr.b32 t, $8, 4; lop3.b32 u, t, 0x03030303, 0x3C3C3C3C, 0xEA;
        prmt.b32 $4, u, 0, 0x1404; prmt.b32 $5, u, 0, 0x3424;
        shr.b32 t, $8, 6; lop3.b32 u, t, 0x03030303, 0x3C3C3C3C, 0xEA;
        prmt.b32 $6, u, 0, 0x1404; prmt.b32 $7, u, 0, 0x3424; }""",
        "=r,=r,=r,=r,=r,=r,=r,=r,r",
        [b_bytes],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _unpack4_ptx(b_bytes):
    """Bytes to the two float16 tiles `1 + c / 16`."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 lo, hi, t;
        prmt.b32 lo, $4, 0, 0x4140; prmt.b32 hi, $4, 0, 0x4342;
        shl.b32 t, lo, 6; lop3.b32 $0, t, 0x03C003C0, 0x3C003C00, 0xEA;
        shl.b32 t, hi, 6; lop3.b32 $1, t, 0x03C003C0, 0x3C003C00, 0xEA;
        shl.b32 t, lo, 2; lop3.b32 $2, t, 0x03C003C0, 0x3C003C00, 0xEA;
        shl.b32 t, hi, 2; lop3.b32 $3, t, 0x03C003C0, 0x3C003C00, 0xEA; }""",
        "=r,=r,=r,=r,r",
        [b_bytes],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _unpack8_ptx(b_bytes):
    """Bytes to the float16 tile `1 + c / 256`: one multiply-add shifts the byte and sets the exponent."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 lo, hi;
        prmt.b32 lo, $2, 0, 0x4140; prmt.b32 hi, $2, 0, 0x4342;
        mad.lo.u32 $0, lo, 4, 0x3C003C00; mad.lo.u32 $1, hi, 4, 0x3C003C00; }""",
        "=r,=r,r",
        [b_bytes],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _lane(b_bytes, PLANE_BITS: tl.constexpr, LANE: tl.constexpr, TOP: tl.constexpr):
    """Lane `LANE` of a plane as integers, its codes' highest bit at position `TOP - 1`. Any device."""
    SHIFT: tl.constexpr = TOP - PLANE_BITS - PLANE_BITS * LANE
    b_word = b_bytes.to(tl.int16)
    b_word = b_word << SHIFT if SHIFT >= 0 else b_word >> -SHIFT
    return b_word & (((1 << PLANE_BITS) - 1) << (TOP - PLANE_BITS))


@triton.jit
def _mantissa(b_bits):
    return (b_bits | 0x3C00).to(tl.float16, bitcast=True)


@triton.jit
def codes_to_float16(b_bytes, b_high, BITS: tl.constexpr, PTX: tl.constexpr):
    """Bytes `[N, D·p/8]` to float16 `1 + c / 2^BITS` `[N, D]`; `b_high` `[N, D/8]` is the 1-bit plane of 3 bits."""
    if BITS == 2:
        if PTX:
            b_0, b_1, b_2, b_3 = _unpack2_ptx(b_bytes)
        else:
            b_0 = _mantissa(_lane(b_bytes, 2, 0, 10))
            b_1 = _mantissa(_lane(b_bytes, 2, 1, 10))
            b_2 = _mantissa(_lane(b_bytes, 2, 2, 10))
            b_3 = _mantissa(_lane(b_bytes, 2, 3, 10))
        b_u = _concatenate4(b_0, b_1, b_2, b_3)
    elif BITS == 3:
        b_low = _concatenate4(
            _lane(b_bytes, 2, 0, 9), _lane(b_bytes, 2, 1, 9), _lane(b_bytes, 2, 2, 9), _lane(b_bytes, 2, 3, 9)
        )
        b_top = concatenate(
            _concatenate4(
                _lane(b_high, 1, 0, 10), _lane(b_high, 1, 1, 10), _lane(b_high, 1, 2, 10), _lane(b_high, 1, 3, 10)
            ),
            _concatenate4(
                _lane(b_high, 1, 4, 10), _lane(b_high, 1, 5, 10), _lane(b_high, 1, 6, 10), _lane(b_high, 1, 7, 10)
            ),
        )
        b_u = _mantissa(b_low | b_top)
    elif BITS == 4:
        if PTX:
            b_0, b_1 = _unpack4_ptx(b_bytes)
        else:
            b_0 = _mantissa(_lane(b_bytes, 4, 0, 10))
            b_1 = _mantissa(_lane(b_bytes, 4, 1, 10))
        b_u = concatenate(b_0, b_1)
    else:
        tl.static_assert(BITS == 8)
        b_u = _unpack8_ptx(b_bytes) if PTX else _mantissa(_lane(b_bytes, 8, 0, 10))
    return b_u


@triton.jit
def load_bytes(p_token, m_token, FIRST: tl.constexpr, PLANE_BITS: tl.constexpr, EIGHTH: tl.constexpr,
               EIGHTH_PADDED: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One plane of a token block, `[N, PLANE_BITS · EIGHTH_PADDED]`. p_token `[N, 1]` points at each token's codes."""
    i_lane = tl.arange(0, PLANE_BITS * EIGHTH_PADDED)
    p_bytes = p_token + FIRST + channel_of_lane(i_lane, EIGHTH, EIGHTH_PADDED)[None, :]
    if EIGHTH != EIGHTH_PADDED:
        m_lane = lane_is_used(i_lane, EIGHTH, EIGHTH_PADDED)[None, :]
        b_bytes = tl.load(p_bytes, mask=m_lane & m_token[:, None] if MASKED else m_lane, other=0)
    elif MASKED:
        b_bytes = tl.load(p_bytes, mask=m_token[:, None], other=0)
    else:
        b_bytes = tl.load(p_bytes)
    return b_bytes


@triton.jit
def steps_of(b_words):
    """Stored words to float16 step'."""
    return b_words.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def scale_up(b_u, b_words, BITS: tl.constexpr):
    """Codes as `u = 1 + c / 2^BITS`, float16 or float32, to x̂ in the same dtype, rounded once."""
    b_step = steps_of(b_words).to(b_u.dtype)
    if b_words.dtype == tl.int16:  # symmetric: u + zero' / step' is a half-odd number of steps, which float16 holds
        b_x = (b_u - (3 * 2**BITS - 1) / (2 * 2**BITS)) * b_step
    else:
        b_zero = (b_words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        if INTERPRETED:
            b_x = (b_u.to(tl.float32) * b_step.to(tl.float32) + b_zero.to(tl.float32)).to(b_u.dtype)
        else:
            b_x = b_u * b_step + b_zero.to(b_u.dtype)
    return b_x


@triton.jit
def keep_here(b_x):
    """A no-op on 16-bit values that the compiler may not move code across.

    On mma.sync targets Triton would otherwise change a tile to the operand's layout before it is computed, and every
    warp would compute all of it; on wgmma targets it would hold a converted operand in registers rather than in shared
    memory.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b_x], dtype=b_x.dtype, is_pure=False, pack=2)


@triton.jit
def _steps_beside(b_u, b_step, COLUMNS: tl.constexpr):
    """The steps `[N, G, 1]` repeated to `[N, COLUMNS]`, column c of group c % G, held by the threads that hold `b_u`.

    A no-op for the machine. Left to itself, Triton gives a small tile computed from single words a layout in which no
    thread holds two neighbours, and writes it to shared memory two bytes at a time.
    """
    GROUPS: tl.constexpr = b_u.shape[1]
    b_steps = tl.broadcast_to(b_step, b_u.shape)
    b_steps = tl.inline_asm_elementwise(
        "mov.b32 $0, $2;", "=r,r,r", [b_u, b_steps], dtype=tl.float16, is_pure=True, pack=2
    )
    for _ in tl.static_range(8):
        if b_steps.shape[2] > COLUMNS // GROUPS:
            b_steps, _ = tl.split(tl.reshape(b_steps, (b_u.shape[0], GROUPS, b_steps.shape[2] // 2, 2)))
    return tl.reshape(tl.permute(b_steps, (0, 2, 1)), (b_u.shape[0], COLUMNS))


@triton.jit
def dequantize_tile(p_codes, p_scales, i_token, m_token, stride_token, stride_group, BITS: tl.constexpr,
                    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, EIGHTH_PADDED: tl.constexpr, MASKED: tl.constexpr,
                    PTX: tl.constexpr, FENCE: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A block of packed tokens as float16 `[N, 8 · EIGHTH_PADDED]`, and its steps `[N, GROUPS_PADDED]`.

    With `COLUMNS`, where groups tile the lanes, the steps come repeated to `[N, COLUMNS]`.

    `FENCE` ends the dequantization with an impure no-op. On mma.sync targets Triton would otherwise hoist the change
    to the operand's layout before the arithmetic, and every warp would unpack the whole tile.
    """
    EIGHTH: tl.constexpr = HEAD_DIM // 8
    GROUPS_PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    N: tl.constexpr = i_token.shape[0]
    p_token = p_codes + (i_token * stride_token)[:, None]
    if BITS == 3:
        b_low = load_bytes(p_token, m_token, 0, 2, EIGHTH, EIGHTH_PADDED, MASKED)
        b_high = load_bytes(p_token, m_token, HEAD_DIM // 4, 1, EIGHTH, EIGHTH_PADDED, MASKED)
        b_u = codes_to_float16(b_low, b_high, 3, PTX)
    else:
        b_low = load_bytes(p_token, m_token, 0, BITS, EIGHTH, EIGHTH_PADDED, MASKED)
        b_u = codes_to_float16(b_low, b_low, BITS, PTX)

    i_group = tl.arange(0, GROUPS_PADDED)
    p_words = p_scales + i_token[:, None] + (i_group % GROUPS)[None, :] * stride_group
    b_words = tl.load(p_words, mask=m_token[:, None], other=0) if MASKED else tl.load(p_words)  # [N, GROUPS_PADDED]
    b_step = steps_of(b_words)
    b_steps = b_step
    if GROUPS == GROUPS_PADDED and EIGHTH == EIGHTH_PADDED:
        SHAPE: tl.constexpr = (N, GROUPS, HEAD_DIM // GROUPS)
        b_u = tl.reshape(b_u, SHAPE)
        if COLUMNS > GROUPS:
            b_steps = _steps_beside(b_u, b_step[:, :, None], COLUMNS)
        b_x = scale_up(b_u, b_words[:, :, None], BITS)
        b_x = tl.reshape(b_x, (N, HEAD_DIM))
    elif GROUPS == 1:
        b_x = scale_up(b_u, b_words, BITS)
    else:  # groups that do not tile the padded lanes: choose each lane's scales
        i_lane = tl.arange(0, 8 * EIGHTH_PADDED)
        i_lane_group = channel_of_lane(i_lane, EIGHTH, EIGHTH_PADDED) // (HEAD_DIM // GROUPS)
        b_lane_words = tl.load(
            p_scales + i_token[:, None] + tl.minimum(i_lane_group, GROUPS - 1)[None, :] * stride_group,
            mask=m_token[:, None],
            other=0,
        )
        b_x = scale_up(b_u, b_lane_words, BITS)
    if FENCE:
        b_x = keep_here(b_x)
    return b_x, b_steps


@triton.jit
def load_dense(p_rows, m_row, HEAD_DIM: tl.constexpr, EIGHTH_PADDED: tl.constexpr, MASKED: tl.constexpr):
    """Rows of full-precision channels, `[N, 8 · EIGHTH_PADDED]`; p_rows `[N]` points at each row's first channel."""
    i_lane = tl.arange(0, 8 * EIGHTH_PADDED)
    p_x = p_rows[:, None] + channel_of_lane(i_lane, HEAD_DIM // 8, EIGHTH_PADDED)[None, :]
    if HEAD_DIM != 8 * EIGHTH_PADDED:
        m_lane = lane_is_used(i_lane, HEAD_DIM // 8, EIGHTH_PADDED)[None, :]
        b_x = tl.load(p_x, mask=m_lane & m_row[:, None] if MASKED else m_lane, other=0.0)
    elif MASKED:
        b_x = tl.load(p_x, mask=m_row[:, None], other=0.0)
    else:
        b_x = tl.load(p_x)
    return b_x
