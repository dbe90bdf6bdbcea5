"""Deliberately wrong passes are caught: by random models' comparison with eager, or by the derivation's at 2 bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from jkv_compile import runtime
from jkv_compile.passes import lower_attention, lower_reads, rewrite
from jkv_compile.passes.actions import Append, Move
from jkv_compile.passes.segments import Cached, Fresh, Segment

from .layers import Case
from .oracle import differs_from_derivation
from .random_models import run

TWICE = ((4, 1, "nothing"),) * 2
SLICES = Case(heads=2, head_dim=32, tokens=24, events=TWICE)
WINDOW = Case(window=6, events=((4, 1, "nothing"),) * 3)
ROLLING = Case(idiom="rolling", tokens=16, events=((4, 1, "nothing"),) * 6)
MASKED = Case(mask="sparse", events=TWICE)
SCALED = Case(scale=0.5, events=TWICE)

pytestmark = pytest.mark.filterwarnings("ignore::jkv_compile.NotRewrittenWarning")


def beside_eager(case: Case) -> Callable[[], str]:
    return lambda: run(case, 0).failure


def beside_derivation(**changes: Any) -> Callable[[], str]:
    return lambda: differs_from_derivation(dataclasses.replace(SLICES, **changes))


def attending(change: Callable[[Any], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """A pass that changes what an attention reads before it is lowered."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        right = rewrite.lower_fused

        def wrong(pieces: Any, attend: Any, correction: str) -> None:
            change(attend)
            right(pieces, attend, correction)

        monkeypatch.setattr(rewrite, "lower_fused", wrong)

    return apply


def of_cached(change: Callable[[Segment], Segment]) -> Callable[[Any], None]:
    def apply(attend: Any) -> None:
        for segments in (attend.key, attend.value):
            segments[:] = [change(s) if isinstance(s.content, Cached) else s for s in segments]

    return apply


def range_off_by_one(segment: Segment) -> Segment:
    return dataclasses.replace(segment, content=dataclasses.replace(segment.content, first=segment.content.first + 1))


def window_from_the_start(segment: Segment) -> Segment:
    return dataclasses.replace(segment, content=dataclasses.replace(segment.content, first=0))


def quantized_chunk(attend: Any) -> None:
    """The current chunk is read back from the cache."""
    for segments, cache in ((attend.key, attend.key_cache), (attend.value, attend.value_cache)):
        segments[:] = [
            dataclasses.replace(s, content=Cached(cache, s.start, 0)) if isinstance(s.content, Fresh) else s
            for s in segments
        ]


def uncorrected(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rewrite.lower_fused
    monkeypatch.setattr(rewrite, "lower_fused", lambda pieces, attend, _: right(pieces, attend, "none"))


def steps_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lower_attention._packed_attention

    def wrong(*args: Any) -> Any:
        node = right(*args)
        query, key_codes, key_scales, value_codes, value_scales, *others = node.args
        node.args = (query, key_codes, value_scales, value_codes, key_scales, *others)
        return node

    monkeypatch.setattr(lower_attention, "_packed_attention", wrong)


def current_chunk_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lower_reads._assemble

    def wrong(pieces: Any, read: Any, cached: Any, fresh: Any, put: Any) -> Any:
        wrongly = (lambda node: pieces.call(torch.full_like, node, 0.5)) if fresh.__name__ == "zeros" else fresh
        return right(pieces, read, cached, wrongly, put)

    monkeypatch.setattr(lower_reads, "_assemble", wrong)


def writes(change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A pass that changes, or drops (None), what is written."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        right = rewrite._Rewriter._lower_writes

        def wrong(self: Any, node: Any) -> None:
            self.writes[node] = [w for w in map(change, self.writes[node]) if w is not None]
            right(self, node)

        monkeypatch.setattr(rewrite._Rewriter, "_lower_writes", wrong)

    return apply


def no_eviction(write: Any) -> Any:
    return None if isinstance(write, Move) else write


def one_token_late(write: Any) -> Any:
    late = isinstance(write, Append)
    return dataclasses.replace(write, start=write.start + 1, stop=write.stop + 1) if late else write


def chunk_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The range that another graph has written is forgotten, and attended quantized."""
    monkeypatch.setitem(runtime._READERS, "active_range", lambda cache: torch.tensor((0, 0)))


def without(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A pass that loses an argument of the attention."""

    def change(attend: Any) -> None:
        attend.call = dataclasses.replace(attend.call, **{name: 0.25 if name == "scale" else None})

    return attending(change)


ON_SLICES, AS_DERIVED = beside_eager(SLICES), beside_derivation()

MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], str]]] = {
    "cached range off by one": (attending(of_cached(range_off_by_one)), ON_SLICES),
    "read window begins at token 0": (attending(of_cached(window_from_the_start)), beside_eager(WINDOW)),
    "current chunk attended quantized": (attending(quantized_chunk), AS_DERIVED),
    "current chunk corrected": (current_chunk_corrected, beside_derivation(after_read="scaled")),
    "nothing corrected": (uncorrected, AS_DERIVED),
    "steps of keys and values swapped": (steps_swapped, ON_SLICES),
    "eviction forgotten": (writes(no_eviction), beside_eager(ROLLING)),
    "chunk written one token late": (writes(one_token_late), ON_SLICES),
    "chunk forgotten after a break": (chunk_not_held, beside_derivation(breaks="inside")),
    "mask lost": (without("mask"), beside_eager(MASKED)),
    "scale lost": (without("scale"), beside_eager(SCALED)),
}


@functools.cache
def unchanged(check: Callable[[], str]) -> str:
    """What a check finds where nothing is wrong."""
    return check()


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_pass_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, check = MUTATIONS[name]
    assert not unchanged(check)
    mutate(monkeypatch)
    assert check()
