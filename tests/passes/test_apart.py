"""Keys and values in one tensor `[2, …]` that a graph writes, joins and reads together: packed as those apart are."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jkv_compile import is_packed

from ..harness import BOUND, fresh_backend, relative_error, rewritten

CHUNK, TOKENS = 8, 48


def visible(tokens: int) -> Tensor:
    return (torch.arange(TOKENS) < tokens).expand(CHUNK, TOKENS)


def sliced(q: Tensor, kv: Tensor, cache: Tensor, start: int) -> Tensor:
    cache[:, :, :, start : start + CHUNK] = kv
    k, v = cache[:, :, :, : start + CHUNK]
    return F.scaled_dot_product_attention(q, k, v)


def copied(q: Tensor, kv: Tensor, cache: Tensor, start: int) -> Tensor:
    cache[:, :, :, start : start + CHUNK].copy_(kv)
    k, v = cache[:, :, :, : start + CHUNK].unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


def to_places(q: Tensor, kv: Tensor, cache: Tensor, start: int) -> Tensor:
    places = start + torch.arange(CHUNK)
    cache.index_copy_(3, places, kv)
    return F.scaled_dot_product_attention(q, *cache, attn_mask=visible(start + CHUNK))


def indexed(q: Tensor, kv: Tensor, cache: Tensor, start: int) -> Tensor:
    cache[:, :, :, start + torch.arange(CHUNK)] = kv
    return F.scaled_dot_product_attention(q, *cache, attn_mask=visible(start + CHUNK))


def to_places_twice(q: Tensor, kv: Tensor, cache: Tensor, start: int) -> Tensor:
    """First to a place of its own at the end, which it is attended at; then to where it belongs."""
    cache.index_copy_(3, TOKENS - CHUNK + torch.arange(CHUNK), kv)
    cache.index_copy_(3, start + torch.arange(CHUNK), kv)
    mask = visible(start) | ~visible(TOKENS - CHUNK)
    return F.scaled_dot_product_attention(q, *cache, attn_mask=mask)


def reset_first(q: Tensor, kv: Tensor, cache: Tensor, start: int) -> Tensor:
    cache[:, :, :, start:] = 0
    return sliced(q, kv, cache, start)


def in_turns(q: Tensor, kv: Tensor, cache: Tensor, start: int) -> Tensor:
    """Read as a whole, its second half first."""
    cache[:, :, :, start : start + CHUNK] = kv
    k, v = torch.cat([cache[:, :, :, start : start + CHUNK], cache[:, :, :, :start]], 3)
    return F.scaled_dot_product_attention(q, k, v)


def read_by_others(q: Tensor, kv: Tensor, cache: Tensor, start: int) -> Tensor:
    result = sliced(q, kv, cache, start)
    return result + (2 * cache[:, :, :, : start + CHUNK]).mean()


def joined(q: Tensor, kv: Tensor, cache: Tensor, start: int) -> Tensor:
    """Nothing but the chunk at hand is written; the past stands before it."""
    k, v = torch.cat([cache[:, :, :, :start], kv], 3)
    cache[:, :, :, start : start + CHUNK] = kv
    return F.scaled_dot_product_attention(q, k, v)


MODELS = [sliced, copied, to_places, indexed, to_places_twice, reset_first, in_turns, read_by_others, joined]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_is_packed_and_close(model: Callable[..., Tensor], inner: str) -> None:
    torch.manual_seed(0)
    backend = fresh_backend(inner=inner)
    compiled = torch.compile(model, backend=backend)
    cache, reference = torch.zeros(2, 1, 2, TOKENS, 32), torch.zeros(2, 1, 2, TOKENS, 32)
    with torch.no_grad():
        for start in range(CHUNK, TOKENS - CHUNK, CHUNK):
            q, kv = torch.randn(1, 2, CHUNK, 32), torch.randn(2, 1, 2, CHUNK, 32)
            assert relative_error(compiled(q, kv, cache, start), model(q, kv, reference, start)) < BOUND
    assert is_packed(cache)
    assert {r.outcome for r in backend.reports} <= {"adopted", "packed"}


def test_two_layers_in_one_tensor_are_no_keys_and_values() -> None:
    """What is taken for keys and values may be anything of two: each half is a cache of its own."""
    torch.manual_seed(0)

    def layers(x: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        new = torch.stack([x, x + 1])
        keys[:, :, :, start : start + CHUNK] = new
        values[:, :, :, start : start + CHUNK] = -new
        for k, v in zip(keys, values):
            x = x + F.scaled_dot_product_attention(x, k[:, :, : start + CHUNK], v[:, :, : start + CHUNK])
        return x

    compiled = torch.compile(layers, backend=fresh_backend())
    ours, reference = ([torch.zeros(2, 1, 2, TOKENS, 32) for _ in range(2)] for _ in range(2))
    with torch.no_grad():
        for start in range(0, TOKENS, CHUNK):
            x = torch.randn(1, 2, CHUNK, 32)
            assert relative_error(compiled(x, *ours, start), layers(x, *reference, start)) < BOUND
    assert all(map(is_packed, ours))


class TestGraphs(expecttest.TestCase):
    def test_joined(self) -> None:
        backend = fresh_backend(bits=2)
        compiled = torch.compile(joined, backend=backend)
        cache = torch.zeros(2, 1, 2, TOKENS, 32)
        with torch.no_grad():
            for start in (CHUNK, 2 * CHUNK):
                compiled(torch.randn(1, 2, CHUNK, 32), torch.randn(2, 1, 2, CHUNK, 32), cache, start)
        self.assertExpectedInline(
            rewritten(backend),
            """\
select_1 = l_kv_.select(0, 0)
select_3 = l_kv_.select(0, 1)
sym_sum = sym_sum([8, l_start_])
select_5 = l_kv_.select(0, 0)
narrow = narrow(l_cache__codes, 0, 0, 1)
narrow_1 = narrow(l_cache__scales, 0, 0, 1)
jkv::append(narrow, narrow_1, select_5, l_start_, 2)
select_7 = l_kv_.select(0, 1)
narrow_2 = narrow(l_cache__codes, 0, 1, 1)
narrow_3 = narrow(l_cache__scales, 0, 1, 1)
jkv::append(narrow_2, narrow_3, select_7, l_start_, 2)
narrow_4 = narrow(l_cache__codes, 0, 0, 1)
narrow_5 = narrow(l_cache__scales, 0, 0, 1)
narrow_6 = narrow(l_cache__codes, 0, 1, 1)
narrow_7 = narrow(l_cache__scales, 0, 1, 1)
attention_default = jkv::attention(l_q_, narrow_4, narrow_5, narrow_6, narrow_7, [0, l_start_], select_1, select_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
contiguous = attention_default.contiguous()
return (contiguous)
""",
        )
