"""Compiled functions that are handed the new keys and values as tensors, beside the past: the last are the chunk at hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jkv_compile import is_packed, mark_cache

from ..harness import BOUND, fresh_backend, relative_error

SHAPE = 1, 48, 3, 16


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def fixed_past(q, k, v, cache, start):
    return attend(q, torch.cat((cache["k"], k), 1), torch.cat((cache["v"], v), dim=1))


def read_before_write(q, k, v, cache, start):
    keys, values = (torch.cat((cache[name][:, :start], new), -3) for name, new in (("k", k), ("v", v)))
    out = attend(q, keys, values)
    cache["k"][:, start : start + k.shape[1]] = k
    cache["v"][:, start : start + k.shape[1]] = v
    return out


def window(q, k, v, cache, start):
    cache["k"] = torch.cat((cache["k"], k), 1)[:, -48:]
    cache["v"] = torch.cat((cache["v"], v), 1)[:, -48:]
    return attend(q, cache["k"], cache["v"])


def apart() -> list[Tensor]:
    return [torch.randn(1, 8, 3, 16) for _ in range(3)]


def of_one_tensor() -> list[Tensor]:
    return list(torch.randn(1, 8, 3, 3, 16).unbind(2))


@pytest.mark.parametrize("new", [apart, of_one_tensor])
@pytest.mark.parametrize("step", [fixed_past, read_before_write, window])
def test_the_past_is_packed_and_the_chunk_at_hand_is_not(step, new):
    backend = fresh_backend(group_size=16)
    compiled = torch.compile(step, backend=backend)
    cache = {name: torch.randn(SHAPE) for name in "kv"}
    plain = {name: t.clone() for name, t in cache.items()}
    with torch.no_grad():
        for call in range(5):
            torch.compiler.set_stance("fail_on_recompile" if call > 2 else "default")
            x = new()
            got, want = compiled(*x, cache, 8 * call), step(*x, plain, 8 * call)
            assert relative_error(got, want) < BOUND
            assert not any(is_packed(t) for t in x)
        torch.compiler.set_stance("default")
    assert relative_error(got, want) > 1e-4, "nothing was quantized: the test tests nothing"
    assert is_packed(cache["k"]) and is_packed(cache["v"])
    assert {m.lowering for report in backend.reports for m in report.matches} == {"fused"}
    assert not any(report.rejections for report in backend.reports)


def test_the_same_chunk_twice_is_still_the_chunk_at_hand():
    """As a benchmark calls it; keys of it are neither packed nor corrected."""
    compiled = torch.compile(fixed_past, backend=fresh_backend(bits=2, group_size=16))
    cache, x = {name: torch.randn(SHAPE) for name in "kv"}, apart()
    with torch.no_grad():
        for _ in range(4):
            compiled(*x, cache, 0)
    assert is_packed(cache["k"]) and not is_packed(x[1])


def test_a_marked_cache_is_one_wherever_it_stands():
    compiled = torch.compile(fixed_past, backend=fresh_backend(group_size=16))
    cache, (q, k, v) = {name: torch.randn(SHAPE) for name in "kv"}, apart()
    for x in (k, v, *cache.values()):
        mark_cache(x)
    plain = {name: t.clone() for name, t in cache.items()}
    with torch.no_grad():
        want = fixed_past(q, k, v, plain, 0)
        assert relative_error(compiled(q, k, v, cache, 0), want) < BOUND
    assert is_packed(k) and is_packed(cache["k"])
