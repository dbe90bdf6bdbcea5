"""Caches that cannot be packed run as they are written, to the last bit, and `backend.reports` says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jkv_compile import is_packed

from ..harness import fresh_backend, twins
from ..idioms.models import CHUNK, DIM, HEAD_DIM, HEADS, Projections

TOKENS = 48
VIEWS = 4
SHAPE = (1, TOKENS, HEADS, HEAD_DIM)


class Sliced(Projections):
    """Two tensors, however they are held, as keys and values."""

    def forward(self, x: Tensor, state: Any, start: int) -> Tensor:
        q, k, v = self.project(x)
        keys, values = self.open(state)
        end = start + x.shape[1]
        keys[:, start:end] = k
        values[:, start:end] = v
        return self.sdpa(q, keys[:, :end], values[:, :end])

    def open(self, state: Any) -> Iterator[Tensor]:
        return state


class TwoDimensions(Sliced):
    """`[S, H·D]`."""

    def open(self, state: Any) -> Any:
        return (t.view(SHAPE) for t in state)


class OneSlot(Sliced):
    """Only keys are written, and not those that are read."""

    def forward(self, x: Tensor, state: Any, start: int) -> Tensor:
        q, k, _ = self.project(x)
        state[0][:, start : start + x.shape[1]] = k
        return self.sdpa(q, state[0][:, -CHUNK:], state[1][:, -CHUNK:])


class SomeEntries(Sliced):
    """Of what is attended, some batch entries are written."""

    def forward(self, x: Tensor, state: Any, start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        state[0][:1, start:end], state[1][:1, start:end] = k, v
        return self.sdpa(q.expand(3, -1, -1, -1), state[0][:, :end], state[1][:, :end])


class PerView(Sliced):
    """World models that attend within each view: `[B, S, view, H, D]`, and attention over five dimensions."""

    def forward(self, x: Tensor, state: Any, start: int) -> Tensor:
        q, k, v = (t.unflatten(1, (-1, VIEWS)) for t in self.project(x))
        start, end = start // VIEWS, (start + x.shape[1]) // VIEWS
        state[0][:, start:end] = k
        state[1][:, start:end] = v
        q, keys, values = (t.permute(0, 2, 3, 1, 4) for t in (q, state[0][:, :end], state[1][:, :end]))
        o = F.scaled_dot_product_attention(q, keys, values)
        return self.out(o.permute(0, 3, 1, 2, 4).flatten(1, 2).flatten(2))


class PerViewGrown(PerView):
    """The same, as a concatenation that grows."""

    def forward(self, x: Tensor, state: Any, start: int) -> Tensor:
        q, k, v = (t.unflatten(1, (-1, VIEWS)) for t in self.project(x))
        state["k"] = k if state["k"] is None else torch.cat([state["k"], k], 1)
        state["v"] = v if state["v"] is None else torch.cat([state["v"], v], 1)
        q, keys, values = (t.permute(0, 2, 3, 1, 4) for t in (q, state["k"], state["v"]))
        o = F.scaled_dot_product_attention(q, keys, values)
        return self.out(o.permute(0, 3, 1, 2, 4).flatten(1, 2).flatten(2))


HELD: list[Tensor] = []  # what others hold of the memory of caches


def gaps() -> Tensor:
    HELD.append(torch.empty_strided(SHAPE, (TOKENS * 100, 100, HEAD_DIM, 1)).zero_())
    return HELD[-1].detach()


def halves() -> Tensor:
    HELD.append(torch.zeros(2 * TOKENS * HEADS * HEAD_DIM))
    return HELD[-1][TOKENS * HEADS * HEAD_DIM :].view(SHAPE)


CASES: dict[str, tuple[type[Sliced], Callable[[], Any], str, str]] = {
    "views of larger tensors": (Sliced, lambda: (halves(), halves()), "SHARED_MEMORY", "it is a view of a larger tensor"),
    "two views of one tensor": (
        Sliced, lambda: tuple(torch.zeros(2, *SHAPE).unbind()), "SHARED_MEMORY", "it is a view of a larger tensor"
    ),
    "memory with gaps": (Sliced, lambda: (gaps(), gaps()), "SHARED_MEMORY", "it is expanded or has gaps"),
    "two dimensions": (
        TwoDimensions, lambda: tuple(torch.zeros(2, TOKENS, HEADS * HEAD_DIM).clone().unbind()), "LAYOUT",
        "has no three dimensions or more of which one runs",
    ),
    "some batch entries": (
        SomeEntries, lambda: tuple(torch.zeros(3, *SHAPE[1:]) for _ in range(2)), "WRITE",
        "only some of its batch entries, heads or channels are written",
    ),
    "keys that are written beside values that are not": (
        OneSlot, lambda: (torch.zeros(SHAPE), torch.randn(SHAPE)), "NOT_A_CACHE", "only one of key and value"
    ),
    "attention of each view": (
        PerView, lambda: tuple(torch.zeros(1, TOKENS // VIEWS, VIEWS, HEADS, HEAD_DIM) for _ in range(2)), "SPELLING",
        "its query has 5 dimensions",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::jkv_compile.NotRewrittenWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_reason_is_on_record(name: str) -> None:
    kind, make, reason, words = CASES[name]
    torch.manual_seed(0)
    backend = fresh_backend(bits=2)
    compiled, eager = twins(kind(), backend)
    state = make()
    reference = torch.utils._pytree.tree_map(Tensor.clone, state)
    with torch.no_grad():
        for start in range(0, 3 * CHUNK, CHUNK):
            x = torch.randn(1, CHUNK, DIM)
            assert torch.equal(compiled(x, state, start), eager(x, reference, start))
    assert not any(map(is_packed, torch.utils._pytree.tree_leaves(state)))
    for report in backend.reports:  # of each graph, also where its positions are symbols
        assert report.rejections
    first = backend.reports[0].rejections[0]
    assert (first.kind.name, words in first.reason) == (reason, True), first


@pytest.mark.filterwarnings("ignore::jkv_compile.NotRewrittenWarning")
def test_a_past_that_grows_of_each_view_is_left_alone() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2)
    compiled, eager = twins(PerViewGrown(), backend)
    state, reference = ({"k": None, "v": None} for _ in range(2))
    with torch.no_grad():
        for start in range(0, 5 * CHUNK, CHUNK):
            x = torch.randn(1, CHUNK, DIM)
            assert torch.equal(compiled(x, state, start), eager(x, reference, start))
    assert any("its query has 5 dimensions" in r.reason for report in backend.reports for r in report.rejections)
