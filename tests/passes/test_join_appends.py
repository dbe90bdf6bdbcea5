"""Keys and values of the same tokens are appended in one call, where what is written first may wait for the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jkv_compile import materialize

from ..harness import fresh_backend, relative_error, rewritten

CHUNK, HEADS, HEAD_DIM = 8, 2, 32
Cache = dict[str, Tensor]


def attend(q: Tensor, cache: Cache, stop: int) -> Tensor:
    k, v = (cache[name][:, :stop].transpose(1, 2) for name in "kv")
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)


def keys_first(q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> Tensor:
    cache["k"][:, start : start + CHUNK] = k
    cache["v"][:, start : start + CHUNK] = v
    return attend(q, cache, start + CHUNK)


def values_first(q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> Tensor:
    cache["v"][:, start : start + CHUNK] = v
    cache["k"][:, start : start + CHUNK] = k * 2
    return attend(q, cache, start + CHUNK)


def keys_read_before_values_are_written(q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> Tensor:
    cache["k"][:, start : start + CHUNK] = k
    mean = cache["k"][:, : start + CHUNK].mean(1, keepdim=True)
    cache["v"][:, start : start + CHUNK] = v
    return attend(q, cache, start + CHUNK) + mean


def values_one_token_later(q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> Tensor:
    cache["k"][:, start : start + CHUNK] = k
    cache["v"][:, start + 1 : start + CHUNK + 1] = v
    return attend(q, cache, start)


def attended_between(q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> Tensor:
    before = attend(q, cache, start)
    cache["k"][:, start : start + CHUNK] = k
    middle = attend(q, cache, start)
    cache["v"][:, start : start + CHUNK] = v
    return before + middle


MODELS: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "keys first": (keys_first, ["append_kv"]),
    "values first": (values_first, ["append_kv"]),
    "keys read before values are written": (keys_read_before_values_are_written, ["append", "append"]),
    "values one token later": (values_one_token_later, ["append", "append"]),
    "attended between": (attended_between, ["append", "append"]),
}


def new_cache() -> Cache:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(1, 64, HEADS, HEAD_DIM, generator=generator) for name in "kv"}


@pytest.mark.parametrize("name", MODELS)
def test_appends_are_joined_only_where_nobody_could_tell(name: str) -> None:
    torch.manual_seed(0)
    model, expected = MODELS[name]
    backend = fresh_backend(bits=8)
    compiled: Any = torch.compile(model, backend=backend)
    cache, reference = new_cache(), new_cache()
    with torch.no_grad():
        for start in (CHUNK, 2 * CHUNK, 3 * CHUNK):
            q, k, v = torch.randn(3, 1, CHUNK, HEADS, HEAD_DIM)
            actual, wanted = compiled(q, k, v, cache, start), model(q, k, v, reference, start)
            assert relative_error(actual, wanted) < 0.02
    for one in "kv":
        assert relative_error(materialize(cache[one]), reference[one]) < 0.02
    appends = [line for line in rewritten(backend).splitlines() if line.startswith("jkv::append")]
    assert [line.partition("(")[0].removeprefix("jkv::") for line in appends] == expected
    if expected == ["append_kv"]:
        stores = [f"l_cache_{one}__{part}" for one in "kv" for part in ("codes", "scales")]
        assert appends[0].startswith(f"jkv::append_kv({', '.join(stores)}, ")
