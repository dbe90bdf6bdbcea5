"""Attention over packed caches in eager code is corrected as compiled attention is."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from jkv_compile import PackedReadWarning, is_packed, materialize, quantization_step
from jkv_compile.kernels import reference
from jkv_compile.kernels.quantizers import grid_of, rotate

from .harness import fresh_backend, relative_error
from .models import SelfAttention

pytestmark = pytest.mark.filterwarnings("ignore::jkv_compile.PackedReadWarning")


def packed_cache(**settings: object) -> dict[str, torch.Tensor]:
    model = SelfAttention()
    compiled = torch.compile(model, backend=fresh_backend(bits=2, **settings))
    cache = model.new_cache(2, 64)
    with torch.no_grad():
        for start in range(0, 48, 8):
            compiled(3 * torch.randn(2, 8, 256), cache, start)
    assert is_packed(cache["k"])
    return cache


@pytest.mark.parametrize("quantizer", ["rtn", "quarot", "unbiased", "symmetric", "symmetric_unbiased"])
@pytest.mark.parametrize("correction", ["taylor", "clamped", "none"])
@pytest.mark.parametrize("inference", [False, True])
def test_is_corrected_as_its_configuration_says(quantizer: str, correction: str, inference: bool) -> None:
    cache = packed_cache(quantizer=quantizer, correction=correction)
    key, value = (cache[n][:, 8:48].transpose(1, 2) for n in "kv")
    query = 6 * torch.randn(2, 4, 5, 64)
    mask = torch.rand(5, 40) > 0.2
    delta = quantization_step(key)
    keys, turned = materialize(key), rotate(query) if grid_of(quantizer).rotates else query
    scores = query @ keys.mT / 8 - reference.correction_bias(turned, delta, 1 / 8, correction)
    want = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ materialize(value)
    with torch.inference_mode(inference):
        got = F.scaled_dot_product_attention(query, key, value, mask)
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("correction", ["taylor", "clamped"])
def test_its_logsumexp_is_that_of_corrected_scores(correction: str) -> None:
    cache = packed_cache(correction=correction)
    key, value = (cache[n][:, :48].transpose(1, 2) for n in "kv")
    query = 9 * torch.randn(2, 4, 5, 64)
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    scores = query @ materialize(key).mT / 8 - reference.correction_bias(
        query, quantization_step(key), 1 / 8, correction
    )
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_the_chunk_that_eager_code_wrote_last_is_not_corrected() -> None:
    cache = packed_cache()
    for name in "kv":
        cache[name][:, 48:56] = 3 * torch.randn(2, 8, 4, 64)
    key, value = (cache[n][:, 48:56].transpose(1, 2) for n in "kv")
    query = 3 * torch.randn(2, 4, 5, 64)
    want = F.scaled_dot_product_attention(query, materialize(key), materialize(value))
    assert relative_error(F.scaled_dot_product_attention(query, key, value), want) < 1e-5


def test_it_says_that_it_reads_in_eager_code() -> None:
    cache = packed_cache()
    key, value = (cache[n][:, :48].transpose(1, 2) for n in "kv")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        F.scaled_dot_product_attention(torch.randn(2, 4, 5, 64), key, value)
    assert [w.category for w in caught] == [PackedReadWarning]
    assert "scaled_dot_product_attention reads a packed cache in eager code" in str(caught[0].message)
