"""Join partial attention results over disjoint keys by their log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import narrow


@triton.jit(do_not_specialize=["splits", "n_rows", "n_query"])
def merge_kernel(p_partial, p_partial_lse, p_output, p_lse, output_strides, lse_stride, splits, n_rows, n_query,
                 VALUE_DIM: tl.constexpr, LANES: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """out = Σ_i exp(lse_i - lse)·out_i over `[splits, B, H · L, Dv]`. Grid: (blocks of H · L rows, B)."""
    i_batch = tl.program_id(1).to(tl.int64)
    i_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = i_row < n_rows
    i_lane = tl.arange(0, LANES)
    m_block = m_row[:, None] & (i_lane < VALUE_DIM)[None, :]
    b_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, LANES), tl.float32)
    for i_split in range(splits):
        i_partial = (i_split * tl.num_programs(1) + i_batch) * n_rows + i_row
        b_lse = tl.load(p_partial_lse + i_partial, mask=m_row, other=-float("inf"))
        b_partial = tl.load(p_partial + i_partial[:, None] * VALUE_DIM + i_lane[None, :], mask=m_block, other=0.0)
        b_new_max = tl.maximum(b_max, b_lse)
        b_base = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
        b_shrink = tl.exp(b_max - b_base)
        b_weight = tl.exp(b_lse - b_base)
        b_acc = b_acc * b_shrink[:, None] + b_weight[:, None] * b_partial
        b_sum = b_sum * b_shrink + b_weight
        b_max = b_new_max
    m_seen = b_sum > 0
    b_acc = b_acc / tl.where(m_seen, b_sum, 1.0)[:, None]
    b_lse = tl.where(m_seen, b_max + tl.log(b_sum), -float("inf"))
    p_rows = p_output + i_batch * output_strides[0] + i_row // n_query * output_strides[1]
    p_rows += i_row % n_query * output_strides[2]
    tl.store(p_rows[:, None] + i_lane[None, :], narrow(b_acc, p_output.dtype.element_ty), mask=m_block)
    tl.store(p_lse + i_batch * lse_stride + i_row, b_lse, mask=m_row)
