"""A graph break between the read of a cache and its attention: packed all the same, and said to be uncorrected."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jkv_compile
from jkv_compile import NotRewrittenWarning, is_packed
from jkv_compile.reasons import Reason

from ..harness import fresh_backend, relative_error, run_beside, twins
from ..idioms.models import CHUNK, DIM, HEAD_DIM, HEADS, Projections, rope

TOKENS = 12 * CHUNK


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, H, D] each; returns [B, S, H·D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class KeysBesideValues(Projections):
    """As MAGI-1: keys beside values, read in one graph, attended in the next; written by the last step alone."""

    def new_cache(self) -> tuple[Tensor, ...]:
        return (torch.zeros(TOKENS, HEADS, 2 * HEAD_DIM),)

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, k, v = self.project(x)
        kv = torch.cat([k, v], -1)[0]
        old = cache[0][:start]
        if last:
            cache[0][start : start + kv.shape[0]] = kv
        k, v = (t.contiguous().unsqueeze(0) for t in torch.cat([old, kv]).chunk(2, -1))
        torch._dynamo.graph_break()
        return self.out(attend(q, k, v))


class TurnedElsewhere(Projections):
    """As LongCat-Video when its tables are not yet made: concatenated, turned and attended in three graphs."""

    def new_cache(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, 5 * CHUNK, HEADS, HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        torch._dynamo.graph_break()
        q, k = rope(q, 5 * CHUNK), rope(k)
        torch._dynamo.graph_break()
        return self.out(attend(q, k, v))


class EditedCopy(Projections):
    """As DreamX-World: a copy is edited in one graph and attended in the next; eager code writes the cache."""

    def new_cache(self) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(1, TOKENS, HEADS, HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, *new = self.project(x)
        copies = [c.clone() for c in cache]
        for copy, part in zip(copies, new):
            copy[:, start : start + CHUNK] = part
        torch._dynamo.graph_break()
        k, v = (c[:, : start + CHUNK] for c in copies)
        if last:
            self.commit(cache, new, start)
        return self.out(attend(q, k, v))

    @torch.compiler.disable
    def commit(self, cache: tuple[Tensor, ...], new: list[Tensor], start: int) -> None:
        for whole, part in zip(cache, new):
            whole[:, start : start + CHUNK] = part


class OnlyKeysTurned(Projections):
    """As Wan-Animate-2: keys are turned in one graph; values come as they are to the next, which fills a buffer."""

    def new_cache(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, 5 * CHUNK, HEADS, HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, k, v = self.project(x)
        old = torch.cat([rope(cache[0][:, CHUNK:]), cache[0][:, :CHUNK]], 1)
        q, k = rope(q, 5 * CHUNK), rope(k, 5 * CHUNK)
        torch._dynamo.graph_break()
        buffers = [t.new_zeros(1, 6 * CHUNK, HEADS, HEAD_DIM) for t in (k, v)]
        for buffer, past, new in zip(buffers, (old, cache[1]), (k, v)):
            buffer[:, : 5 * CHUNK] = past
            buffer[:, 5 * CHUNK :] = new
        return self.out(attend(q, *buffers))


def steps(model: Projections, backend: object, caches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    compiled, eager = twins(model, backend)
    cache = model.new_cache()
    reference = tuple(t.clone() for t in cache)
    caches += cache
    for call in range(20):
        x, start, last = torch.randn(1, CHUNK, DIM), call // 2 * CHUNK, call % 2 == 1
        yield compiled(x, cache, start, last), eager(x, reference, start, last)


@pytest.mark.parametrize("model", [KeysBesideValues, TurnedElsewhere, EditedCopy, OnlyKeysTurned])
def test_a_cache_is_packed_across_a_graph_break(model: type[Projections]) -> None:
    backend, caches = fresh_backend(), list[Tensor]()
    uncorrected = pytest.warns(NotRewrittenWarning, match="test_handed.py:.*packed, but read back in another graph")
    with torch.no_grad(), uncorrected:
        run_beside(steps(model(), backend, caches), calls=12, stable_from=6)
    assert all(map(is_packed, caches))
    assert {rejected.kind for report in backend.reports for rejected in report.rejections} == {Reason.GRAPH_BREAK}


def test_what_cannot_be_packed_is_warned_of_with_its_reason() -> None:
    backend = fresh_backend()
    compiled, eager = twins(TurnedElsewhere(), backend)
    cache = TurnedElsewhere().new_cache()
    shown = [t.flatten() for t in cache]
    refused = pytest.warns(NotRewrittenWarning, match="of a cache stays in full precision: another live tensor shares")
    with torch.no_grad(), refused:
        for _ in range(4):
            x = torch.randn(1, CHUNK, DIM)
            assert torch.equal(compiled(x, cache, 0, False), eager(x, cache, 0, False))
    rejected = {rejected.kind for report in backend.reports for rejected in report.rejections}
    assert rejected == {Reason.SHARED_MEMORY} and backend.memory().adopted == 0 and len(shown) == 2


def test_explain_tells_of_it_after_one_call() -> None:
    torch._dynamo.reset()
    model = TurnedElsewhere()
    with torch.no_grad():
        account = jkv_compile.explain(model, torch.randn(1, CHUNK, DIM), model.new_cache(), 0, False, bits=8)
    assert "read from a cache in another graph: packed when it comes again" in str(account)
    assert "TORCH_LOGS=graph_breaks" in str(account)


class FreshEachTime(Projections):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.project(x)
        k, v = torch.cat([context, k], 1), torch.cat([context, v], 1)
        torch._dynamo.graph_break()
        return self.out(attend(q, k, v))


class Angles(Projections):
    """What keys are turned by is concatenated in another graph, too, and is no cache."""

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], angles: tuple[Tensor, ...]) -> Tensor:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        table = torch.cat(angles, 1)
        torch._dynamo.graph_break()
        return self.out(attend(q, k * table.cos(), v))


def test_what_keys_are_turned_by_stays_plain() -> None:
    backend = fresh_backend()
    compiled, eager = twins(Angles(), backend)
    cache = tuple(torch.randn(1, 16, HEADS, HEAD_DIM) for _ in range(2))
    angles = tuple(torch.randn(1, n, 1, HEAD_DIM) for n in (16, CHUNK))
    plain = tuple(t.clone() for t in cache)
    with torch.no_grad(), pytest.warns(NotRewrittenWarning, match="read back in another graph"):
        for _ in range(4):
            x = torch.randn(1, CHUNK, DIM)
            assert relative_error(compiled(x, cache, angles), eager(x, plain, angles)) < 0.01
    assert all(map(is_packed, cache)) and not any(map(is_packed, angles))


class HiddenStates(Projections):
    """What is concatenated are not keys: keys are yet to be made of it."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = torch.cat([context, x], 1)
        torch._dynamo.graph_break()
        q, k, v = self.project(F.layer_norm(x, (DIM,)))
        torch._dynamo.graph_break()
        return self.out(attend(q, k, v))


@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")
def test_what_comes_once_and_hidden_states_stay_plain() -> None:
    backend = fresh_backend()
    with torch.no_grad():
        compiled, eager = twins(FreshEachTime(), backend)
        for _ in range(4):
            x, context = torch.randn(1, CHUNK, DIM), torch.randn(1, 16, HEADS, HEAD_DIM)
            assert torch.equal(compiled(x, context), eager(x, context))
        compiled, eager = twins(HiddenStates(), backend)
        context = torch.randn(1, 16, DIM)
        for _ in range(4):
            x = torch.randn(1, CHUNK, DIM)
            assert torch.equal(compiled(x, context), eager(x, context))
    assert not is_packed(context) and backend.memory().adopted == 0


def test_ignored_and_learned_tensors_stay_plain_across_a_graph_break() -> None:
    model = TurnedElsewhere()
    compiled, eager = twins(model, fresh_backend())
    ignored, learned = model.new_cache(), tuple(nn.Parameter(t) for t in model.new_cache())
    hints = [jkv_compile.ignore(t) for t in ignored]
    with torch.no_grad():
        for cache in (ignored, learned):
            for _ in range(4):
                x = torch.randn(1, CHUNK, DIM)
                assert relative_error(compiled(x, cache, 0, False), eager(x, cache, 0, False)) < 1e-5
            assert not any(map(is_packed, cache))
    for hint in hints:
        hint.remove()
