"""Keys, and places, that are changed in place after keys were written to a cache: attended as they were written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jkv_compile import is_packed, materialize

from ..harness import BOUND, fresh_backend, relative_error, rewritten

CHUNK = 8
Cache = dict[str, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def computed(q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> Tensor:
    k = k + 1
    cache["k"][:, start : start + CHUNK] = k
    cache["v"][:, start : start + CHUNK] = v
    k.mul_(3)
    return attend(q, cache["k"][:, : start + CHUNK], cache["v"][:, : start + CHUNK]) + k


def given(q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> Tensor:
    cache["k"][:, start : start + CHUNK] = k
    cache["v"][:, start : start + CHUNK] = v
    k[..., :16] = -k[..., 16:]
    return attend(q, cache["k"][:, : start + CHUNK], cache["v"][:, : start + CHUNK])


def joined(q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> Tensor:
    k, v = k + 1, v + 1
    keys = torch.cat((cache["k"][:, :start], k), 1)
    values = torch.cat((cache["v"][:, :start], v), 1)
    k.mul_(3)
    cache["k"][:, start : start + CHUNK] = k
    cache["v"][:, start : start + CHUNK] = v
    return attend(q, keys, values)


@pytest.mark.parametrize("model", [computed, given, joined], ids=lambda model: model.__name__)
def test_attention_sees_what_was_written(model: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=8)
    compiled = torch.compile(model, backend=backend)
    caches = [{name: torch.ones(1, 64, 2, 32) for name in "kv"} for _ in range(2)]
    with torch.no_grad():
        for start in (CHUNK, 2 * CHUNK, 3 * CHUNK):
            q, k, v = (torch.randn(1, CHUNK, 2, 32) for _ in range(3))
            assert relative_error(compiled(q, k.clone(), v, caches[0], start), model(q, k, v, caches[1], start)) < 0.01
    for name in "kv":
        assert relative_error(materialize(caches[0][name]), caches[1][name]) < 0.01
    assert all(map(is_packed, caches[0].values()))


def test_what_does_not_change_is_not_copied() -> None:
    def unchanged(q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> Tensor:
        k = (k + 1).mul_(3)
        cache["k"][:, start : start + CHUNK] = k
        cache["v"][:, start : start + CHUNK] = v
        return attend(q, cache["k"][:, : start + CHUNK], cache["v"][:, : start + CHUNK])

    backend = fresh_backend(bits=8)
    compiled = torch.compile(unchanged, backend=backend)
    cache = {name: torch.zeros(1, 64, 2, 32) for name in "kv"}
    with torch.no_grad():
        for start in (CHUNK, 2 * CHUNK):
            compiled(*(torch.randn(1, CHUNK, 2, 32) for _ in range(3)), cache, start)
    assert "clone" not in rewritten(backend)


def counted(q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> Tensor:
    """A ring that counts on in the tensor that it has written by, and attends to all of it."""
    cache["k"][:, :, cache["places"][: k.shape[2]]] = k
    cache["v"][:, :, cache["places"][: k.shape[2]]] = v
    cache["places"].add_(k.shape[2]).remainder_(cache["k"].shape[2])
    return F.scaled_dot_product_attention(q, cache["k"], cache["v"])


def counted_in_between(q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> Tensor:
    """Values go elsewhere than keys: these are no tokens of one place."""
    cache["k"].index_copy_(2, cache["places"][: k.shape[2]], k)
    cache["places"].add_(k.shape[2]).remainder_(cache["k"].shape[2])
    cache["v"].index_copy_(2, cache["places"][: k.shape[2]], v)
    return F.scaled_dot_product_attention(q, cache["k"], cache["v"])


def gathered(q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> Tensor:
    """The same, oldest tokens first."""
    places = cache["places"][: k.shape[2]]
    cache["k"].index_copy_(2, places, k)
    cache["v"].index_copy_(2, places, v)
    cache["places"].add_(k.shape[2]).remainder_(cache["k"].shape[2])
    return F.scaled_dot_product_attention(q, *(cache[n].index_select(2, cache["places"]) for n in "kv"))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("model", [counted, counted_in_between, gathered], ids=lambda model: model.__name__)
def test_places_that_are_counted_on(model: Callable[..., Tensor], inner: str) -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=8, inner=inner)
    compiled = torch.compile(model, backend=backend)
    caches = [{**{name: torch.zeros(1, 2, 24, 32) for name in "kv"}, "places": torch.arange(24)} for _ in range(2)]
    with torch.no_grad():
        for _ in range(8):
            q, k, v = (torch.randn(1, 2, CHUNK, 32) for _ in range(3))
            assert relative_error(compiled(q, k, v, caches[0]), model(q, k, v, caches[1])) < BOUND
    assert all(is_packed(caches[0][name]) for name in "kv")
    fused = {m.lowering == "fused" for r in backend.reports for m in r.matches}
    assert fused == {model is counted}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_tokens_are_written_from_one_cache_to_another(inner):
    backend = fresh_backend(inner=inner)

    def step(q, k, v, cache, other, start: int):
        end = start + k.shape[1]
        outs = []
        for held in (cache, other):
            held["k"][:, start:end] = k
            held["v"][:, start:end] = v
            seen = (t.transpose(1, 2) for t in (q, held["k"][:, :end], held["v"][:, :end]))
            outs.append(F.scaled_dot_product_attention(*seen))
        for name in ("k", "v"):
            other[name][:, :4].copy_(cache[name][:, start : start + 4])
        return outs

    compiled = torch.compile(step, backend=backend)
    caches, plain = ([{name: torch.zeros(1, 64, 2, 32) for name in "kv"} for _ in range(2)] for _ in range(2))
    with torch.no_grad():
        for start in range(0, 40, 8):
            x = [torch.randn(1, 8, 2, 32) for _ in range(3)]
            for got, want in zip(compiled(*x, *caches, start), step(*x, *plain, start)):
                assert relative_error(got, want) < BOUND
            for mine, expected in zip(caches, plain):
                assert relative_error(materialize(mine["k"]), expected["k"]) < BOUND
    assert all(is_packed(t) for cache in caches for t in cache.values())
