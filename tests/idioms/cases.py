"""Every way of holding a cache, as a generator of (compiled, eager) outputs, call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..harness import twins
from .models import (
    CHUNK,
    DIM,
    HEAD_DIM,
    HEADS,
    BranchBuffers,
    CloneEditAttend,
    Composite,
    FixedPast,
    GrowingContext,
    GrowingPast,
    KeysBesideValues,
    LazyBuffers,
    MaskedBuffer,
    PinnedComposite,
    RolledBuffer,
    RollingCache,
    StackedKeysValues,
    TwoCaches,
    TwoParts,
)

TOKENS = 22 * CHUNK
Backend = Any  # what torch.compile takes
Twins = Callable[[nn.Module, Backend], tuple[Callable[..., Any], Any]]  # a model compiled, and what to compare it with
Steps = Iterator[tuple[Tensor, Tensor]]
Case = Callable[..., Steps]


def chunk() -> Tensor:
    return torch.randn(1, CHUNK, DIM)


def caches(tokens: int = TOKENS) -> dict[str, Tensor]:
    return {name: torch.zeros(1, tokens, HEADS, HEAD_DIM) for name in ("k", "v")}


def rolling(backend: Backend, twins: Twins = twins) -> Steps:
    model = RollingCache()
    compiled, eager = twins(model, backend)
    cache, reference_cache = model.new_cache(), model.new_cache()
    for call in range(22):
        x = chunk()
        yield compiled(x, cache, call * CHUNK), eager(x, reference_cache, call * CHUNK)


def fixed_past(*settings: Any, kind: type[FixedPast | TwoParts] = FixedPast) -> Case:
    def steps(backend: Backend, twins: Twins = twins) -> Steps:
        model = kind(*settings)
        compiled, eager = twins(model, backend)
        x = chunk()
        past, reference_past = torch.compile(model.produce, backend=backend)(x), eager.produce(x)
        while True:
            x = chunk()
            yield compiled(x, past), eager(x, reference_past)

    return steps


def clone_edit(write_in_graph: bool) -> Case:
    def steps(backend: Backend, twins: Twins = twins) -> Steps:
        compiled, eager = twins(CloneEditAttend(write_in_graph), backend)
        cache, reference_cache = caches(), caches()
        for call in range(22):
            x, start = chunk(), call * CHUNK
            (got, k, v), (want, k0, v0) = compiled(x, cache, start), eager(x, reference_cache, start)
            if not write_in_graph:
                for name, new, new0 in (("k", k, k0), ("v", v, v0)):
                    cache[name][:, start : start + CHUNK] = new
                    reference_cache[name][:, start : start + CHUNK] = new0
            yield got, want

    return steps


def composite(kind: type[nn.Module] = Composite, first: int = 1) -> Case:
    def steps(backend: Backend, twins: Twins = twins) -> Steps:
        compiled, eager = twins(kind(), backend)
        cache, reference_cache = caches(), caches()
        for call in range(first, 22):
            x = chunk()
            yield compiled(x, cache, call * CHUNK), eager(x, reference_cache, call * CHUNK)

    return steps


def lazy_buffers(backend: Backend, twins: Twins = twins) -> Steps:
    compiled, eager = twins(LazyBuffers(TOKENS), backend)
    for call in range(22):
        x = chunk()
        yield compiled(x, call * CHUNK), eager(x, call * CHUNK)


def branch_buffers(backend: Backend, twins: Twins = twins) -> Steps:
    compiled, eager = twins(BranchBuffers(TOKENS), backend)
    for call in range(22):
        x = chunk()
        outputs = [(compiled(x, call * CHUNK, b), eager(x, call * CHUNK, b)) for b in ("cache", "uncond")]
        yield tuple(torch.cat(side) for side in zip(*outputs))  # type: ignore[misc]


def masked_buffer(**settings: Any) -> Case:
    def steps(backend: Backend, twins: Twins = twins) -> Steps:
        compiled, eager = twins(MaskedBuffer(**settings), backend)
        cache, reference_cache = ({n: torch.zeros(1, HEADS, TOKENS, HEAD_DIM) for n in ("k", "v")} for _ in range(2))
        for call in range(21):
            x, positions = chunk(), torch.arange(call * CHUNK, (call + 1) * CHUNK)
            yield compiled(x, cache, positions), eager(x, reference_cache, positions)

    return steps


def rolled_buffer(edit: bool) -> Case:
    def steps(backend: Backend, twins: Twins = twins) -> Steps:
        compiled, eager = twins(RolledBuffer(edit), backend)
        cache, reference_cache = caches(4 * CHUNK), caches(4 * CHUNK)
        for _ in range(22):
            x = chunk()
            yield compiled(x, cache), eager(x, reference_cache)

    return steps


def growing(kind: type[GrowingPast | GrowingContext]) -> Case:
    def steps(backend: Backend, twins: Twins = twins) -> Steps:
        compiled, eager = twins(kind(), backend)
        past = reference_past = None
        while True:
            x = chunk()
            out, past = compiled(x, past)
            want, reference_past = eager(x, reference_past)
            yield out, want

    return steps


growing_past = growing(GrowingPast)


def keys_beside_values(backend: Backend, twins: Twins = twins) -> Steps:
    compiled, eager = twins(KeysBesideValues(), backend)
    cache, reference_cache = (torch.zeros(TOKENS, HEADS, 2 * HEAD_DIM) for _ in range(2))
    for call in range(21):
        x = chunk()
        yield compiled(x, cache, call * CHUNK), eager(x, reference_cache, call * CHUNK)


def stacked(batch: int = 1) -> Case:
    def steps(backend: Backend, twins: Twins = twins) -> Steps:
        model = StackedKeysValues()
        compiled, eager = twins(model, backend)
        write = torch.compile(model.write, backend=backend)
        cache, reference_cache = (torch.zeros(2, batch, HEADS, TOKENS, HEAD_DIM) for _ in range(2))
        for call in range(21):
            x, start = torch.randn(batch, CHUNK, DIM), call * CHUNK
            write(x, cache, start)
            eager.write(x, reference_cache, start)
            x = torch.randn(batch, CHUNK, DIM)
            yield compiled(x, cache, start + CHUNK), eager(x, reference_cache, start + CHUNK)

    return steps


def two_caches(rope_on_read: bool) -> Case:
    def steps(backend: Backend, twins: Twins = twins) -> Steps:
        compiled, eager = twins(TwoCaches(rope_on_read), backend)
        ours, reference = ((caches(), caches()) for _ in range(2))
        for call in range(1, 22):
            x, places = chunk(), (2 * call, CHUNK * call)
            yield compiled(x, *ours, *places), eager(x, *reference, *places)

    return steps


CASES: dict[str, tuple[Case, int]] = {
    # the way of holding a cache, and from which call on nothing may compile any more
    "eviction by rolling, with a sink": (rolling, 8),
    "a fixed past, concatenated": (fixed_past(), 3),
    "a fixed past, turned after the read": (fixed_past("interleaved"), 3),
    "a fixed past, turned in halves after the read": (fixed_past("half", False, 64), 3),
    "a fixed past, its batch doubled": (fixed_past("", True), 3),
    "a concatenation that grows and is returned": (growing_past, 4),
    "a concatenation that grows and is returned without its last tokens": (growing(GrowingContext), 4),
    "keys beside values in one tensor": (keys_beside_values, 4),
    "keys and values stacked, written by another graph": (stacked(), 3),
    "keys and values stacked, batch of two": (stacked(batch=2), 3),
    "a fixed past of two parts": (fixed_past(kind=TwoParts), 3),
    "two caches, concatenated": (two_caches(rope_on_read=False), 4),
    "two caches, turned after the read": (two_caches(rope_on_read=True), 4),
    "a whole buffer under a boolean mask": (masked_buffer(), 2),
    "a whole buffer under an additive mask": (masked_buffer(additive=True), 2),
    "a whole buffer, heads repeated": (masked_buffer(repeats=2), 2),
    "a buffer rolled and copied back": (rolled_buffer(edit=True), 2),
    "a buffer shifted by cat and copied back": (rolled_buffer(edit=False), 2),
    "a copy edited and attended, written back in the graph": (clone_edit(True), 2),
    "a copy edited and attended, written back in eager code": (clone_edit(False), 3),
    "a concatenation of sink, window and current chunk": (composite(), 4),
    "a concatenation of sink, pinned chunk, window and current, the sink turned": (composite(PinnedComposite, 2), 4),
    "buffers allocated in the first forward": (lazy_buffers, 3),
    "buffers of two guidance branches, chosen ranges": (branch_buffers, 5),
}
