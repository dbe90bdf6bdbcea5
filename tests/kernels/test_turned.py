"""Corrected attention over keys whose channels have steps of their own, and were turned two by two."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jkv_compile.kernels import reference

ops = torch.ops.jkv
SCALE = 0.2


def turn(x: Tensor, angle: Tensor, pairs: list[int]) -> Tensor:
    """Channels pairs[2i] and pairs[2i + 1] of `x` `[…, S, D]`, turned by `angle` `[S, D / 2]`."""
    a, b = x[..., pairs[::2]], x[..., pairs[1::2]]
    out = torch.empty_like(x)
    out[..., pairs[::2]], out[..., pairs[1::2]] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return out


def case(
    pairs: list[int], heads: int = 4, kv_heads: int = 2, length: int = 5, tokens: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:  # fmt: skip
    """Queries, turned keys, values, Δ as it is in the cache, and angles."""
    torch.manual_seed(0)
    head_dim = len(pairs)
    query = torch.randn(2, heads, length, head_dim).to(dtype)
    key, value = (torch.randn(2, kv_heads, tokens, head_dim).to(dtype) for _ in range(2))
    delta = torch.rand(2, kv_heads, 1, head_dim).square() * 2 * torch.ones(tokens, 1)
    delta[:, :, -length:] = 0  # the current chunk
    angle = torch.rand(tokens, head_dim // 2) * 2 * math.pi
    return query, key, value, delta, angle


def of_kinds(delta: Tensor, angle: Tensor, pairs: list[int]) -> tuple[Tensor, Tensor]:
    """Δ of the first channel of every pair, turned, and of the second."""
    kept = torch.zeros(delta.shape[-1])
    kept[pairs[::2]] = 1
    return turn(delta * kept, angle, pairs), turn(delta * (1 - kept), angle, pairs)


def expected_bias(query: Tensor, delta: Tensor, angle: Tensor, pairs: list[int], correction: str) -> Tensor:
    """Channel by channel of the cache: what an error of ±Δ/2 there does to scores."""
    bias = torch.zeros(*query.shape[:3], delta.shape[2])
    for channel in range(delta.shape[-1]):
        alone = torch.zeros_like(delta)
        alone[..., channel] = delta[..., channel]
        alpha = (
            SCALE
            / 2
            * query.float()
            @ turn(alone, angle, pairs).repeat_interleave(query.shape[1] // delta.shape[1], 1).mT
        )
        bias += reference.log_sinhc(alpha) if correction == "exact" else alpha.square() / 6
    return bias.clamp_max(1) if correction == "clamped" else bias


ORDERS = {
    "neighbours": [*range(16)],
    "halves": [c for pair in zip(range(8), range(8, 16)) for c in pair],
    "first and last": [c for i in range(8) for c in (i, 15 - i)],
}


@pytest.mark.parametrize("correction", ["taylor", "clamped", "exact"])
@pytest.mark.parametrize("hidden", ["nothing", "boolean", "additive", "causal"])
@pytest.mark.parametrize("name", ORDERS)
def test_is_what_the_errors_of_single_channels_add_up_to(correction: str, hidden: str, name: str) -> None:
    pairs = ORDERS[name]
    query, key, value, delta, angle = case(pairs)
    query = 6 * query  # so that some corrections are above 1
    mask = {"boolean": torch.rand(2, 1, 5, 24) > 0.3, "additive": torch.randn(5, 24)}.get(hidden)
    kinds = of_kinds(delta, angle, pairs)
    got = ops.attention_turned(query, key, value, *kinds, pairs, mask, hidden == "causal", SCALE, correction)
    bias = expected_bias(query, delta, angle, pairs, correction)
    assert bias.max() >= 1
    scores = SCALE * query @ key.repeat_interleave(2, 1).mT - bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if hidden == "causal":
        scores = scores.masked_fill(~torch.ones(5, 24, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(got, scores.softmax(-1) @ value.repeat_interleave(2, 1), atol=3e-5, rtol=3e-5)
    assert got.stride() == (5 * 4 * 16, 16, 4 * 16, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("correction", ["taylor", "clamped", "exact"])
def test_half_precision(dtype: torch.dtype, correction: str) -> None:
    pairs = ORDERS["halves"]
    query, key, value, delta, angle = case(pairs, dtype=dtype)
    kinds = [x.to(dtype) for x in of_kinds(delta, angle, pairs)]
    got = ops.attention_turned(query, key, value, *kinds, pairs, None, False, SCALE, correction)
    assert got.dtype == dtype
    scores = SCALE * query.float() @ key.float().repeat_interleave(2, 1).mT
    scores -= expected_bias(query, delta, angle, pairs, correction)
    want = scores.softmax(-1) @ value.float().repeat_interleave(2, 1)
    assert ((got.float() - want).norm() / want.norm()).item() < 0.01


def test_many_rows_at_once_are_the_same_as_few() -> None:
    pairs = ORDERS["neighbours"]
    query, key, value, delta, angle = case(pairs, length=24, tokens=300)
    query, mask = query.repeat(1, 1, 25, 1), torch.randn(600, 300)  # 600 rows: three blocks
    kinds = of_kinds(delta, angle, pairs)
    for correction in ("exact", "clamped"):
        got = ops.attention_turned(query, key, value, *kinds, pairs, mask, False, SCALE, correction)
        few = ops.attention_turned(
            query[:, :, 290:300], key, value, *kinds, pairs, mask[290:300], False, SCALE, correction
        )
        torch.testing.assert_close(got[:, :, 290:300], few)


@pytest.mark.parametrize("name", ORDERS)
def test_the_mean_bias_over_draws_of_the_errors_vanishes(name: str) -> None:
    """Over uniform errors of ±Δ/2 in the cache, E exp(s·q·R(k + ε) - b) is exp(s·q·R k), whatever the angles."""
    pairs = ORDERS[name]
    query, key, _, delta, angle = case(pairs, heads=2, tokens=12)
    delta, draws = 1.5 * delta, 20000
    errors = (torch.rand(draws, *key.shape) - 0.5) * delta
    exact = expected_bias(query, delta, angle, pairs, "exact")
    weights = torch.exp(SCALE * query @ turn(errors, angle, pairs).mT).mean(0)  # of what they are without errors
    cached = slice(0, 12 - 5)
    assert weights[..., cached].log().mean() > 0.02
    assert (weights.log() - exact).abs().max() < 0.05
    # The Taylor form, as the operator has it: scores that all are zero, and values that tell keys from one another.
    kinds = of_kinds(delta, angle, pairs)
    share = ops.attention_turned(
        query, torch.zeros_like(key), torch.eye(12).expand(2, 2, 12, 12), *kinds, pairs, None, False, SCALE, "taylor"
    )
    bias = (share[..., -1:] / share).log()  # b of the last token is 0: it was never quantized
    left = weights.log() - bias
    assert left[..., cached].mean().abs() < 0.1 * weights[..., cached].log().mean()


def test_unknown_corrections_are_refused() -> None:
    pairs = ORDERS["halves"]
    query, key, value, delta, angle = case(pairs)
    with pytest.raises(ValueError, match="correction is 'twice'; expected"):
        ops.attention_turned(query, key, value, *of_kinds(delta, angle, pairs), pairs, None, False, SCALE, "twice")
