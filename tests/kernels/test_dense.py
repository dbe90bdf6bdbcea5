"""Corrected attention over keys in full precision, and appending at places that a tensor holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jkv_compile.kernels import reference

ops = torch.ops.jkv


def case(
    heads: int = 4, kv_heads: int = 2, length: int = 5, tokens: int = 24, head_dim: int = 64, groups: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    torch.manual_seed(0)
    query = torch.randn(2, heads, length, head_dim, dtype=dtype)
    key, value = (torch.randn(2, kv_heads, tokens, head_dim, dtype=dtype) for _ in range(2))
    delta = torch.rand(2, kv_heads, tokens, groups)
    delta[:, :, -length:] = 0  # the current chunk
    return query, key, value, delta


def expected(
    query: Tensor, key: Tensor, value: Tensor, delta: Tensor, mask: Tensor | None, causal: bool, correction: str
) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    key, value, delta = (t.float().repeat_interleave(repeat, 1) for t in (key, value, delta))
    scale = 0.2
    scores = scale * query.float() @ key.mT - reference.correction_bias(query, delta, scale, correction)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("correction", ["none", "taylor", "clamped", "exact"])
@pytest.mark.parametrize("hidden", ["nothing", "boolean", "additive", "causal"])
def test_is_what_the_reference_computes(correction: str, hidden: str) -> None:
    query, key, value, delta = case()
    query = 4 * query  # so that some corrections are above 1
    mask = {"boolean": torch.rand(2, 1, 5, 24) > 0.3, "additive": torch.randn(5, 24)}.get(hidden)
    causal = hidden == "causal"
    got = ops.attention_dense(query, key, value, delta.square(), mask, causal, 0.2, 0, correction)
    want = expected(query, key, value, delta, mask, causal, correction)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert got.stride() == (5 * 4 * 64, 64, 4 * 64, 1)


def test_many_rows_at_once_are_the_same_as_few() -> None:
    query, key, value, delta = case(length=24, tokens=300)
    query = query.repeat(1, 1, 25, 1)  # 600 rows: three blocks
    mask = torch.randn(600, 300)
    for correction in ("exact", "clamped"):
        got = ops.attention_dense(query, key, value, delta.square(), mask, False, 0.2, 0, correction)
        want = expected(query, key, value, delta, mask, False, correction)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    query, key, value, delta = case(dtype=dtype)
    got = ops.attention_dense(query, key, value, delta.square(), None, False, 0.2, 0, "taylor")
    assert got.dtype == dtype
    want = expected(query, key, value, delta, None, False, "taylor")
    assert ((got.float() - want).norm() / want.norm()).item() < 0.01


@pytest.mark.parametrize("correction", ["taylor", "clamped", "exact"])
def test_groups_may_hold_channels_of_both_halves(correction: str) -> None:
    """Channels c and c + D/2 belong to one group, as half-split rotary embeddings pair them."""
    query, key, value, delta = case(head_dim=64, groups=2)
    order = torch.cat([torch.arange(16), torch.arange(32, 48), torch.arange(16, 32), torch.arange(48, 64)])
    got = ops.attention_dense(query, key, value, delta.square(), None, False, 0.2, 64, correction)
    want = expected(query[..., order], key[..., order], value, delta, None, False, correction)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_keys_that_were_never_quantized_are_not_corrected() -> None:
    query, key, value, delta = case()
    got = ops.attention_dense(query, key, value, torch.zeros_like(delta), None, False, 0.2, 0, "taylor")
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(got, plain)


def packed(tokens: int = 32) -> tuple[Tensor, Tensor]:
    return reference.quantize(torch.randn(2, 3, tokens, 64), 2, 32)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_append_at_writes_where_a_tensor_says(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    (codes, scales), source = packed(), torch.randn(2, 3, 4, 64)
    before = codes.clone(), scales.clone()
    positions = torch.tensor([9, 3, 30, 4], dtype=dtype)
    ops.append_at(codes, scales, source, positions, 2)
    new_codes, new_scales = reference.quantize(source, 2, 32)
    assert torch.equal(codes[:, :, positions], new_codes) and torch.equal(scales[:, :, :, positions], new_scales)
    others = [i for i in range(32) if i not in (9, 3, 30, 4)]
    assert torch.equal(codes[:, :, others], before[0][:, :, others])
    assert torch.equal(scales[:, :, :, others], before[1][:, :, :, others])


def test_append_at_outside_the_cache_is_an_error() -> None:
    codes, scales = packed()
    before = codes.clone()
    with pytest.raises((IndexError, RuntimeError), match="index"):
        ops.append_at(codes, scales, torch.randn(2, 3, 1, 64), torch.tensor([32]), 2)
    assert torch.equal(codes, before)


def test_extend_keeps_the_old_cache_and_quantizes_after_it() -> None:
    torch.manual_seed(0)
    (codes, scales), source = packed(), torch.randn(2, 3, 5, 64)
    before = codes.clone()
    new_codes, new_scales = ops.extend(codes, scales, [0, 4, 20, 32], source, 2)
    kept = [*range(4), *range(20, 32)]
    assert torch.equal(new_codes[:, :, :16], codes[:, :, kept]) and torch.equal(codes, before)
    assert torch.equal(new_scales[:, :, :, :16], scales[:, :, :, kept])
    want_codes, want_scales = reference.quantize(source, 2, 32)
    assert torch.equal(new_codes[:, :, 16:], want_codes) and torch.equal(new_scales[:, :, :, 16:], want_scales)


def test_extend_with_a_range_outside_the_cache_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="tokens 20:33 do not lie within the cache's 32 tokens"):
        ops.extend(*packed(), [20, 33], torch.randn(2, 3, 1, 64), 2)
