"""A past that each call puts into a new tensor: packed where its tokens can be told apart, and told of where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jkv_compile
from jkv_compile import NotRewrittenWarning, PackedKV, is_packed
from jkv_compile.reasons import Reason

from ..harness import fresh_backend, relative_error, twins
from ..idioms.models import CHUNK, DIM, HEAD_DIM, HEADS, Projections

TOKENS = 6 * CHUNK
Put = Callable[[Tensor, Tensor, int, int], Tensor]


def by_concatenation(cache: Tensor, new: Tensor, start: int, end: int) -> Tensor:
    return torch.cat([cache[:, :start], new, cache[:, end:]], dim=1)


def by_slice_scatter(cache: Tensor, new: Tensor, start: int, end: int) -> Tensor:
    return torch.slice_scatter(cache, new, 1, start, end)


def by_the_method(cache: Tensor, new: Tensor, start: int, end: int) -> Tensor:
    return cache.slice_scatter(new, dim=1, start=start, end=end)


class Rebuilt(Projections):
    """The whole cache is made anew in each call, and put where the last one was."""

    def __init__(self, put: Put) -> None:
        super().__init__()
        self.put = put

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + CHUNK
        cache["k"], cache["v"] = self.put(cache["k"], k, start, end), self.put(cache["v"], v, start, end)
        return self.sdpa(q, cache["k"][:, :end], cache["v"][:, :end])


def new_cache() -> dict[str, Tensor]:
    return {name: torch.zeros(1, TOKENS, HEADS, HEAD_DIM) for name in ("k", "v")}


@torch.no_grad()
@pytest.mark.parametrize("held", [{}, {"sink": 4, "recent": 8}], ids=["all packed", "sink and recent"])
@pytest.mark.parametrize("put", [by_concatenation, by_slice_scatter, by_the_method])
def test_a_cache_that_is_rebuilt_is_packed(put: Put, held: dict[str, int]) -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=8, inner="eager", **held)
    model, eager = twins(Rebuilt(put), backend)
    ours, plain = new_cache(), new_cache()
    for start in [0, 8, 16, 24, 8, 32, 40, 40]:  # a chunk in their midst is made anew, too
        x = torch.randn(1, CHUNK, DIM)
        assert relative_error(model(x, ours, start), eager(x, plain, start)) < 0.01
        shown = [jkv_compile.materialize(t) if is_packed(t) else t for t in ours.values()]
        for got, want in zip(shown, plain.values()):
            assert relative_error(got, want) < 0.01
    assert all(map(is_packed, ours.values()))
    assert backend.memory().adopted == 2
    assert not any(r.rejections or r.notes for r in backend.reports)


class Stacked(Projections):
    """Keys and values go into one new tensor, which is the past of the next call."""

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.project(x)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        return self.sdpa(q, k, v), torch.stack([k, v])


def is_told_of(reports: list[Any]) -> None:
    assert not any(r.matches for r in reports)
    told = [r for report in reports for r in report.rejections]
    assert told and {r.kind for r in told} == {Reason.REMADE}
    assert "left in full precision: the past that it attends is made anew in each call" in "\n".join(map(str, reports))


@torch.no_grad()
def test_a_past_that_no_call_sees_twice_is_told_of() -> None:
    backend = fresh_backend(inner="eager")
    model, eager = twins(Stacked(), backend)
    ours = plain = None
    with pytest.warns(NotRewrittenWarning, match="is made anew in each call") as warned:
        for _ in range(6):
            x = torch.randn(1, CHUNK, DIM)
            got, ours = model(x, ours)
            want, plain = eager(x, plain)
            assert torch.equal(got, want)
    assert len([w for w in warned if "made anew" in str(w.message)]) == 1
    is_told_of(backend.reports)


@torch.no_grad()
def test_explain_tells_of_it() -> None:
    model, state = Stacked().eval(), {"past": None}

    def step(x: Tensor) -> Tensor:
        out, state["past"] = model(x, state["past"])
        return out

    explanation = jkv_compile.explain(step, torch.randn(1, CHUNK, DIM), calls=4)
    is_told_of(explanation.graphs)


@torch.no_grad()
def test_a_past_that_stays_after_all_is_packed() -> None:
    backend = fresh_backend(bits=8, inner="eager")
    model, eager = twins(Stacked(), backend)
    ours = plain = None
    with pytest.warns(NotRewrittenWarning, match="is made anew in each call"):
        for _ in range(4):
            x = torch.randn(1, CHUNK, DIM)
            (_, ours), (_, plain) = model(x, ours), eager(x, plain)
    for _ in range(3):  # steps of one chunk
        assert relative_error(model(x, ours)[0], eager(x, plain)[0]) < 0.01
    assert is_packed(ours)
    assert any(r.matches for r in backend.reports)
    assert not any(r.rejections for r in backend.reports if r.matches)


def by_index_put(cache: Tensor, new: Tensor, positions: Tensor) -> None:
    cache.index_put_((torch.zeros_like(positions), positions), new[0])


def by_two_indices(cache: Tensor, new: Tensor, positions: Tensor) -> None:
    cache[torch.zeros_like(positions), positions] = new[0]


def by_scatter(cache: Tensor, new: Tensor, positions: Tensor) -> None:
    cache.scatter_(1, positions[None, :, None, None].expand_as(new), new)


class AtPositions(Projections):
    def __init__(self, put: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.put = put

    def forward(self, x: Tensor, cache: dict[str, Tensor], positions: Tensor) -> Tensor:
        q, k, v = self.project(x)
        self.put(cache["k"], k, positions)
        self.put(cache["v"], v, positions)
        mask = torch.arange(TOKENS)[None] <= positions[:, None]
        return self.sdpa(q, cache["k"], cache["v"], mask[None, None])


@torch.no_grad()
@pytest.mark.parametrize("put", [by_index_put, by_two_indices, by_scatter])
def test_writes_at_positions_in_other_words(put: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=8, inner="eager")
    model, eager = twins(AtPositions(put), backend)
    ours, plain = new_cache(), new_cache()
    for start in [0, 8, 16, 24, 8, 32]:
        x, positions = torch.randn(1, CHUNK, DIM), torch.arange(start, start + CHUNK).flip(0)
        assert relative_error(model(x, ours, positions), eager(x, plain, positions)) < 0.01
        for name, t in ours.items():
            assert relative_error(jkv_compile.materialize(t), plain[name]) < 0.01
    assert all(map(is_packed, ours.values()))
    assert not any(r.rejections or r.notes for r in backend.reports)


def test_positions_that_count_from_the_end() -> None:
    def step(cache: dict[str, Tensor], query: Tensor, new: Tensor, positions: Tensor) -> Tensor:
        first = torch.zeros_like(positions)
        cache["k"].index_put_((first, positions), new[0])
        cache["v"][first, positions] = new[0]
        keys, values = (cache[name].transpose(1, 2) for name in ("k", "v"))
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values)

    compiled = torch.compile(step, backend=fresh_backend(bits=8))
    packed = {name: torch.randn(1, 16, 2, 64) for name in ("k", "v")}
    plain = {name: cache.clone() for name, cache in packed.items()}
    with torch.no_grad():
        for positions in ([0, 1], [2, 3], [-2, -1]):
            given = torch.randn(1, 2, 3, 64), torch.randn(1, 2, 2, 64), torch.tensor(positions)
            torch.testing.assert_close(compiled(packed, *given), step(plain, *given), rtol=0.05, atol=0.05)
    assert isinstance(packed["k"], PackedKV) and isinstance(packed["v"], PackedKV)
