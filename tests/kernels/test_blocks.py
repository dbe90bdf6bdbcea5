"""Writes to caches whose tokens share steps block by block: any range, quantized of what was written."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from jkv_compile import PackedCacheError
from jkv_compile.kernels import held as rules
from jkv_compile.kernels import reference
from jkv_compile.kernels.quantizers import grid_of

jkv = torch.ops.jkv
BLOCK, TOKENS, HEAD_DIM = 8, 44, 32


def empty(batch: int = 2, bits: int = 2, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    codes, scales = grid_of("kivi").store_shapes((batch, 2, tokens, HEAD_DIM), bits, BLOCK)
    return torch.zeros(codes, dtype=torch.uint8), torch.zeros(scales, dtype=torch.float16)


def whole(x: Tensor) -> Tensor:
    """Tokens in whole blocks: the last of them repeated."""
    return torch.cat((x, x[:, :, -1:].expand(-1, -1, -x.shape[2] % BLOCK, -1)), 2)


def known(out: Tensor, held: list[Tensor], ranges: list[Tensor], first: int = 0) -> Tensor:
    for rows, told in zip(held, ranges):
        rules.put_over(out, rows, told, first)
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_range_is_what_its_blocks_are_when_they_are_read_overlaid_and_quantized(
    bits: int, dtype: torch.dtype
) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    codes, scales = empty(bits=bits)
    held, ranges = torch.zeros(2, 2, 5 + 2 * 7, HEAD_DIM, dtype=dtype), rules.no_ranges(2, 5, 7)
    for _ in range(40):
        n = rng.choice((0, 1, 3, BLOCK, 11, 2 * BLOCK, 21, TOKENS))
        start = rng.choice((0, BLOCK, TOKENS - n, rng.randint(0, TOKENS - n)))
        start = min(start, TOKENS - n)
        source = torch.randn(2, n, 2, HEAD_DIM).to(dtype).transpose(1, 2)  # strided
        before = reference.dequantize(codes, scales, bits)[:, :, :TOKENS]
        want = known(before.clone(), [held], [ranges])
        want[:, :, start : start + n] = source
        first, last = start - start % BLOCK, -(-(start + n) // BLOCK) * BLOCK
        want_codes, want_scales = reference.quantize(whole(want), bits, 1, BLOCK)
        old = codes.clone(), scales.clone()
        jkv.append_blocks(codes, scales, [held], [ranges], source, start, TOKENS, bits)
        jkv.hold(held, ranges, source, start)
        if n:
            written = slice(first, last), slice(first // BLOCK, last // BLOCK)
            assert torch.equal(codes[:, :, written[0]], want_codes[:, :, written[0]])
            assert torch.equal(scales[:, :, :, written[1]], want_scales[:, :, :, written[1]])
            old[0][:, :, written[0]], old[1][:, :, :, written[1]] = codes[:, :, written[0]], scales[:, :, :, written[1]]
        assert torch.equal(codes, old[0]) and torch.equal(scales, old[1])  # and nothing else has changed


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 9, 20])
def test_block_minus_one_held_tokens_are_enough(chunk: int) -> None:
    """Whole blocks are those of the tokens as they were written, whatever the chunks and however often each comes."""
    torch.manual_seed(0)
    codes, scales = empty()
    held, ranges = torch.zeros(2, 2, 2 * (BLOCK - 1), HEAD_DIM), rules.no_ranges(2, 0, BLOCK - 1)
    plain = torch.zeros(2, 2, TOKENS, HEAD_DIM)
    for start in range(0, TOKENS, chunk):
        stop = min(start + chunk, TOKENS)
        for _ in range(3):
            source = torch.randn(2, 2, stop - start, HEAD_DIM)
            plain[:, :, start:stop] = source
            jkv.append_blocks(codes, scales, [held], [ranges], source, start, TOKENS, 2)
            jkv.hold(held, ranges, source, start)
        exact = {token for run in rules.runs_of(ranges) for token in range(run.start, run.stop)}
        assert set(range(stop - stop % BLOCK, stop)) <= exact  # no block that is open is attended
    want_codes, want_scales = reference.quantize(whole(plain), 2, 1, BLOCK)
    assert torch.equal(codes, want_codes) and torch.equal(scales, want_scales)


def test_batch_entries_that_hold_different_tokens() -> None:
    torch.manual_seed(0)
    codes, scales = empty()
    held, ranges = torch.zeros(2, 2, 2 * (BLOCK - 1), HEAD_DIM), rules.no_ranges(2, 0, BLOCK - 1)
    first = torch.randn(2, 2, 5, HEAD_DIM)
    jkv.append_blocks(codes, scales, [held], [ranges], first, 0, TOKENS, 2)
    jkv.hold(held[:1], ranges[:1], first[:1], 0)  # of one entry only
    read, new = reference.dequantize(codes, scales, 2)[:, :, :5], torch.randn(2, 2, 3, HEAD_DIM)
    jkv.append_blocks(codes, scales, [held], [ranges], new, 5, TOKENS, 2)
    want = torch.cat((torch.cat((first[:1], read[1:])), new), 2)
    want_codes, want_scales = reference.quantize(want, 2, 1, BLOCK)
    assert torch.equal(codes[:, :, :BLOCK], want_codes) and torch.equal(scales[:, :, :, :1], want_scales)


@pytest.mark.parametrize("start, n, tokens", [(-1, 3, TOKENS), (40, 5, TOKENS), (0, 3, 49)])
def test_a_range_beyond_the_cache_is_refused_and_nothing_written(start: int, n: int, tokens: int) -> None:
    codes, scales = empty()
    with pytest.raises(RuntimeError, match=r"do not lie within the cache's"):
        jkv.append_blocks(codes, scales, [], [], torch.ones(2, 2, n, HEAD_DIM), start, tokens, 2)
    assert not codes.any() and not scales.any()


def test_moves_of_parts_of_blocks_are_refused_with_a_way_out() -> None:
    codes, scales = empty()
    with pytest.raises(PackedCacheError, match=r"tokens \[12, 8, 8\] must be multiples of 8.*another quantizer"):
        jkv.move(codes, scales, 12, 8, 8)
    jkv.append_blocks(codes, scales, [], [], torch.randn(2, 2, TOKENS, HEAD_DIM), 0, TOKENS, 2)
    expected = codes[:, :, 16:40].clone(), scales[:, :, :, 2:5].clone()
    jkv.move(codes, scales, 16, 8, 24)
    assert torch.equal(codes[:, :, 8:32], expected[0]) and torch.equal(scales[:, :, :, 1:4], expected[1])


@pytest.mark.parametrize("start, n", [(0, 16), (3, 7), (40, 4)])
@pytest.mark.parametrize("holds", [False, True])
def test_opcheck(start: int, n: int, holds: bool) -> None:
    torch.manual_seed(0)
    held = [torch.randn(2, 2, 14, HEAD_DIM)] if holds else []
    ranges = [rules.no_ranges(2, 0, 7)] if holds else []
    args = (*empty(), held, ranges, torch.randn(2, 2, n, HEAD_DIM), start, TOKENS, 2)
    torch.library.opcheck(jkv.append_blocks.default, args)
