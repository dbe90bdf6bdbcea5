"""A cache that no graph shows as one stays in full precision, and `backend.reports` and `explain` name it all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import jkv_compile
from jkv_compile import is_packed
from jkv_compile.reasons import Reason

from ..harness import fresh_backend, twins
from ..idioms.models import CHUNK, DIM, HEAD_DIM, HEADS, Projections, rope
from ..models import BrokenAttention

TOKENS = 64
HERE = "test_notes.py"
Pair = tuple[Tensor, Tensor]


def pair(*shape: int) -> Pair:
    return torch.zeros(*shape), torch.zeros(*shape)


def whole() -> Pair:
    return pair(1, TOKENS, HEADS, HEAD_DIM)


def put(cache: Any, k: Tensor, v: Tensor, start: Any) -> tuple[Tensor, Tensor]:
    """Write a chunk; returns what is cached up to and with it."""
    end = start + CHUNK
    for tensor, new in zip(cache, (k, v)):
        tensor[:, start:end] = new
    return cache[0][:, :end], cache[1][:, :end]


class Chunked(Projections):
    """`forward(x, cache, start)`; eager code keeps the cache, and `read` gives what is attended."""

    new_cache: Callable[..., Any] = staticmethod(whole)

    def forward(self, x: Tensor, cache: Any, start: int) -> Tensor:
        q, k, v = self.project(x)
        k, v = torch.compiler.disable(self.read)(cache, k, v, start)
        return self.attend(q, k, v)

    def read(self, cache: Any, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        return put(cache, k, v, start)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Copies(Chunked):
    """Eager code copies what is to be attended."""

    def read(self, cache: Any, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        k, v = put(cache, k, v, start)
        return k.clone(), v.clone()


class TurnedCopies(Copies):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, rope(k), v)


class Growing(Chunked):
    """Eager code concatenates."""

    new_cache = staticmethod(dict)

    def read(self, cache: Any, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        for name, new in (("k", k), ("v", v)):
            cache[name] = torch.cat([cache[name], new], 1) if name in cache else new
        return cache["k"], cache["v"]


class WholeBuffer(Chunked):
    """Eager code writes, and all of the buffer is attended under a mask."""

    def forward(self, x: Tensor, cache: Any, start: int) -> Tensor:
        q, k, v = self.project(x)
        torch.compiler.disable(self.read)(cache, k, v, start)
        q, k, v = (t.transpose(1, 2) for t in (q, *cache))
        seen = torch.arange(TOKENS)[None] < start + CHUNK
        return self.out(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))


class Stacked(Chunked):
    """Keys and values are slices of one tensor."""

    new_cache = staticmethod(lambda: torch.zeros(2, 1, TOKENS, HEADS, HEAD_DIM))


class Flat(Chunked):
    """`[S, H·D]`."""

    new_cache = staticmethod(lambda: pair(TOKENS, HEADS * HEAD_DIM))

    def read(self, cache: Any, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        k, v = put([t.view(1, TOKENS, HEADS, HEAD_DIM) for t in cache], k, v, start)
        return k.view(-1, HEADS * HEAD_DIM), v.view(-1, HEADS * HEAD_DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k.view(1, -1, HEADS, HEAD_DIM), v.view(1, -1, HEADS, HEAD_DIM))


class PositionsInTensors(Projections):
    """A copy is edited and attended at positions that tensors hold, where Dynamo breaks the graph."""

    new_cache = staticmethod(whole)

    def forward(self, x: Tensor, cache: Any, start: int) -> Tensor:
        q, k, v = self.project(x)
        k, v = put([t.clone() for t in cache], k, v, torch.tensor(start))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class StridedChunks(Projections):
    """A list of chunks, each the halves of one tensor `[B, S, H, 2D]`, joined with the current one."""

    new_cache = staticmethod(list)

    def forward(self, x: Tensor, cache: list[Pair], start: int) -> Tensor:
        q, *new = self.project(x)
        k, v = (torch.cat([*old, own], 1) for *old, own in zip(*cache, new))
        out = self.sdpa(q, k, v)
        cache.append(torch.cat(new, -1).chunk(2, -1))  # type: ignore[arg-type]
        return out


class AttendedInEagerCode(Projections):
    """Written in a graph; only the attention is not compiled."""

    new_cache = staticmethod(whole)

    def forward(self, x: Tensor, cache: Any, start: int) -> Tensor:
        q, k, v = self.project(x)
        return torch.compiler.disable(self.sdpa)(q, *put(cache, k, v, start))


class JoinedForEagerCode(Projections):
    """A past is joined with the current chunk in a graph; only the attention is not compiled."""

    new_cache = staticmethod(whole)

    def forward(self, x: Tensor, cache: Any, start: int) -> Tensor:
        q, k, v = self.project(x)
        return torch.compiler.disable(self.sdpa)(q, torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1))


class SpelledStrangely(Projections):
    """Attention that nobody knows as such."""

    new_cache = staticmethod(whole)

    def forward(self, x: Tensor, cache: Any, start: int) -> Tensor:
        q, k, v = self.project(x)
        k, v = put(cache, k, v, start)
        weights = ((q[:, :, None] * k[:, None]).sum(-1) / HEAD_DIM**0.5).exp()  # [B, n, S, H]
        weights = (weights / weights.sum(2, keepdim=True)).unsqueeze(-1)
        return self.out((weights * v[:, None]).sum(2).flatten(2))


# The model, the kind of what is told, words of it, and where.
NOTES: dict[str, tuple[type[Projections], Reason, str, str]] = {
    "copies that eager code takes": (Copies, Reason.ELSEWHERE, "as plain tensors", HERE),
    "copies that eager code takes, turned in the graph": (TurnedCopies, Reason.ELSEWHERE, "as plain tensors", HERE),
    "a past that eager code makes longer": (Growing, Reason.ELSEWHERE, "as plain tensors", HERE),
    "a whole buffer that eager code writes": (WholeBuffer, Reason.ELSEWHERE, "as plain tensors", HERE),
    "a copy edited at positions in tensors": (PositionsInTensors, Reason.ELSEWHERE, "as plain tensors", HERE),
    "slices of one tensor": (Stacked, Reason.ELSEWHERE, "views of one tensor", HERE),
    "slices of two dimensions": (Flat, Reason.ELSEWHERE, "2 dimensions", HERE),
    "written, and attended in eager code": (AttendedInEagerCode, Reason.UNATTENDED, "cache[0] is written here", HERE),
    "joined, and attended in eager code": (JoinedForEagerCode, Reason.UNATTENDED, "cache[0] is read here", HERE),
    "attention that is not known": (SpelledStrangely, Reason.UNATTENDED, "cache[0] is written here", HERE),
}


def run(model: Any, calls: int = 6) -> tuple[jkv_compile.JKVBackend, list[Tensor]]:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2)
    compiled, eager = twins(model, backend)
    cache, reference = model.new_cache(), model.new_cache()
    with torch.no_grad():
        for start in range(0, calls * CHUNK, CHUNK):
            x = torch.randn(1, CHUNK, DIM)
            got, want = compiled(x, cache, start), eager(x, reference, start)
            assert any(map(is_packed, torch.utils._pytree.tree_leaves(cache))) or torch.equal(got, want)
    return backend, torch.utils._pytree.tree_leaves(cache)


@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")
@pytest.mark.parametrize("name", NOTES)
def test_it_is_told_and_nobody_is_warned(name: str) -> None:
    kind, reason, words, where = NOTES[name]
    backend, caches = run(kind())
    assert not any(map(is_packed, caches))
    notes = [note for report in backend.reports for note in report.notes]
    assert notes and {note.kind for note in notes} == {reason}
    assert all(where in note.source for note in notes)
    assert any(words in note.reason for note in notes), notes
    assert not any(report.rejections for report in backend.reports)


@pytest.mark.parametrize("name", NOTES)
def test_explain_tells_it(name: str) -> None:
    kind, reason, words, _ = NOTES[name]
    torch._dynamo.reset()
    model = kind()
    cache = model.new_cache()  # type: ignore[attr-defined]
    with torch.no_grad():
        for start in (0, CHUNK):
            model(torch.randn(1, CHUNK, DIM), cache, start)
        account = jkv_compile.explain(model, torch.randn(1, CHUNK, DIM), cache, 2 * CHUNK)
    assert not account.matches and {note.kind for note in account.notes} == {reason}
    assert words in str(account) and reason.advice in str(account)
    assert reason.advice in account.to_html()
    told = [note["kind"] for graph in account.to_dict()["graphs"] for note in graph["notes"]]
    assert set(told) == {reason.name}
    broken = name != "attention that is not known"
    assert bool(account.breaks) == broken and ("graph break:" in str(account)) == broken


def test_chunks_that_are_halves_of_one_tensor_are_a_near_miss() -> None:
    """They are attended together with new tokens, as only a past is."""
    with pytest.warns(jkv_compile.NotRewrittenWarning, match="views of one tensor"):
        backend, chunks = run(StridedChunks())
    assert not any(map(is_packed, chunks))
    rejected = {r.kind for report in backend.reports for r in report.rejections}
    assert rejected == {Reason.SHARED_MEMORY} and not any(report.notes for report in backend.reports)


def test_a_note_is_settled_when_its_tensors_are_packed() -> None:
    """Slices that eager code takes are known as those of a cache once they move; before, they are not."""
    model, backend = Chunked(), fresh_backend(bits=2)
    compiled, cache = torch.compile(model, backend=backend), whole()
    with torch.no_grad():
        compiled(torch.randn(1, CHUNK, DIM), cache, CHUNK)
        assert [note.kind for report in backend.reports for note in report.notes] == [Reason.ELSEWHERE]
        compiled(torch.randn(1, CHUNK, DIM), cache, 2 * CHUNK)
    assert all(map(is_packed, cache))
    assert not any(report.notes for report in backend.reports)


def test_a_write_parted_from_its_attention_is_no_note_where_both_are_compiled() -> None:
    torch._dynamo.reset()
    model = BrokenAttention()
    with torch.no_grad():
        account = jkv_compile.explain(model, torch.randn(1, 8, 256), model.new_cache(1, 64), 8)
    assert len(account.matches) == 1 and not account.notes


def test_a_chunk_that_attends_to_itself_behind_a_break_is_no_note() -> None:
    class Parted(Projections):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x)
            torch._dynamo.graph_break()
            return self.sdpa(q, k, v)

    backend = fresh_backend(bits=2)
    with torch.no_grad():
        torch.compile(Parted(), backend=backend)(torch.randn(1, CHUNK, DIM))
    assert [report.noted for report in backend.reports] == [[], []]


def test_a_cache_named_ignored_is_not_told_of() -> None:
    model, backend = AttendedInEagerCode(), fresh_backend(bits=2)
    cache = whole()
    hints = [jkv_compile.ignore(t) for t in cache]
    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(1, CHUNK, DIM), cache, 0)
    assert not any(report.noted for report in backend.reports)
    for hint in hints:
        hint.remove()


def scores_joined(q: Tensor, past: Pair, k: Tensor, v: Tensor) -> Tensor:
    """Scores of the past and of new tokens are joined, and each part of the weights meets its own values."""
    past_k, past_v = (t.transpose(1, 2) for t in past)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    p = torch.cat([q @ past_k.mT, q @ k.mT], -1).mul(HEAD_DIM**-0.5).softmax(-1)
    n = past_k.shape[2]
    return (p[..., :n] @ past_v + p[..., n:] @ v).transpose(1, 2)


class SpelledOtherwise(Projections):
    def forward(self, x: Tensor, cache: Pair, start: int) -> Tensor:
        q, k, v = self.project(x)
        past = cache[0][:, :start], cache[1][:, :start]
        out = self.out(scores_joined(q, past, k, v).flatten(2))
        put(cache, k, v, start)
        return out


@torch.no_grad()
def test_attention_in_an_unknown_spelling_is_named() -> None:
    backend = fresh_backend(inner="eager")
    model, eager = twins(SpelledOtherwise(), backend)
    ours, plain = whole(), whole()
    for start in (8, 16, 24):
        x = torch.randn(1, CHUNK, DIM)
        assert torch.equal(model(x, ours, start), eager(x, plain, start))
    notes = [note for report in backend.reports for note in report.notes]
    assert len(notes) >= 2 and {note.kind for note in notes} == {Reason.SPELLING}
    assert all("comes to the softmax of " in n.reason and "scores_joined" in n.reason for n in notes)
