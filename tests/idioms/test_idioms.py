"""Other ways of holding a cache: each stays close to eager, is packed, compiles no more than it must, and is pinned."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor

from jkv_compile import JKVBackend, is_packed
from jkv_compile.kernels import reference

from ..harness import fresh_backend, relative_error, rewritten, run_beside, twins
from .models import (
    CHUNK,
    DIM,
    HEAD_DIM,
    HEADS,
    CloneEditAttend,
    Composite,
    FixedPast,
    GrowingPast,
    KeysBesideValues,
    LazyBuffers,
    MaskedBuffer,
    RolledBuffer,
    RollingCache,
    StackedKeysValues,
    TwoCaches,
    TwoParts,
    rope,
)

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")
Steps = Iterator[tuple[Tensor, Tensor]]


def chunk() -> Tensor:
    return torch.randn(1, CHUNK, DIM)


def caches(tokens: int = 96) -> dict[str, Tensor]:
    return {name: torch.zeros(1, tokens, HEADS, HEAD_DIM) for name in ("k", "v")}


def rolling(backend: JKVBackend) -> Steps:
    model = RollingCache()
    compiled, eager = twins(model, backend)
    cache, reference_cache = model.new_cache(), model.new_cache()
    for call in range(99):
        x = chunk()
        yield compiled(x, cache, call * CHUNK), eager(x, reference_cache, call * CHUNK)


def fixed_past(*settings: Any, kind: type[FixedPast | TwoParts] = FixedPast) -> Callable[[JKVBackend], Steps]:
    def steps(backend: JKVBackend) -> Steps:
        model = kind(*settings)
        compiled, eager = twins(model, backend)
        x = chunk()
        past, reference_past = torch.compile(model.produce, backend=backend)(x), eager.produce(x)
        while True:
            x = chunk()
            yield compiled(x, past), eager(x, reference_past)

    return steps


def clone_edit(write_in_graph: bool) -> Callable[[JKVBackend], Steps]:
    def steps(backend: JKVBackend) -> Steps:
        compiled, eager = twins(CloneEditAttend(write_in_graph), backend)
        cache, reference_cache = caches(), caches()
        for call in range(99):
            x, start = chunk(), call * CHUNK
            (got, k, v), (want, k0, v0) = compiled(x, cache, start), eager(x, reference_cache, start)
            if not write_in_graph:
                for name, new, new0 in (("k", k, k0), ("v", v, v0)):
                    cache[name][:, start : start + CHUNK] = new
                    reference_cache[name][:, start : start + CHUNK] = new0
            yield got, want

    return steps


def composite(backend: JKVBackend) -> Steps:
    compiled, eager = twins(Composite(), backend)
    cache, reference_cache = caches(), caches()
    for call in range(1, 99):
        x = chunk()
        yield compiled(x, cache, call * CHUNK), eager(x, reference_cache, call * CHUNK)


def lazy_buffers(backend: JKVBackend) -> Steps:
    compiled, eager = twins(LazyBuffers(tokens=96), backend)
    for call in range(99):
        x = chunk()
        yield compiled(x, call * CHUNK), eager(x, call * CHUNK)


def masked_buffer(**settings: Any) -> Callable[[JKVBackend], Steps]:
    def steps(backend: JKVBackend) -> Steps:
        compiled, eager = twins(MaskedBuffer(**settings), backend)
        cache, reference_cache = ({n: torch.zeros(1, HEADS, 96, HEAD_DIM) for n in ("k", "v")} for _ in range(2))
        for call in range(12):
            x, positions = chunk(), torch.arange(call * CHUNK, (call + 1) * CHUNK)
            yield compiled(x, cache, positions), eager(x, reference_cache, positions)

    return steps


def rolled_buffer(edit: bool) -> Callable[[JKVBackend], Steps]:
    def steps(backend: JKVBackend) -> Steps:
        compiled, eager = twins(RolledBuffer(edit), backend)
        cache, reference_cache = caches(4 * CHUNK), caches(4 * CHUNK)
        for _ in range(99):
            x = chunk()
            yield compiled(x, cache), eager(x, reference_cache)

    return steps


def growing_past(backend: JKVBackend) -> Steps:
    compiled, eager = twins(GrowingPast(), backend)
    past = reference_past = None
    while True:
        x = chunk()
        out, past = compiled(x, past)
        want, reference_past = eager(x, reference_past)
        yield out, want


def keys_beside_values(backend: JKVBackend) -> Steps:
    compiled, eager = twins(KeysBesideValues(), backend)
    cache, reference_cache = (torch.zeros(96, HEADS, 2 * HEAD_DIM) for _ in range(2))
    for call in range(12):
        x = chunk()
        yield compiled(x, cache, call * CHUNK), eager(x, reference_cache, call * CHUNK)


def stacked(batch: int = 1) -> Callable[[JKVBackend], Steps]:
    def steps(backend: JKVBackend) -> Steps:
        model = StackedKeysValues()
        compiled, eager = twins(model, backend)
        write = torch.compile(model.write, backend=backend)
        cache, reference_cache = (torch.zeros(2, batch, HEADS, 96, HEAD_DIM) for _ in range(2))
        for call in range(12):
            x, start = torch.randn(batch, CHUNK, DIM), call * CHUNK
            write(x, cache, start)
            eager.write(x, reference_cache, start)
            x = torch.randn(batch, CHUNK, DIM)
            yield compiled(x, cache, start + CHUNK), eager(x, reference_cache, start + CHUNK)

    return steps


def two_caches(rope_on_read: bool) -> Callable[[JKVBackend], Steps]:
    def steps(backend: JKVBackend) -> Steps:
        compiled, eager = twins(TwoCaches(rope_on_read), backend)
        ours, reference = ((caches(), caches()) for _ in range(2))
        for call in range(1, 12):
            x, places = chunk(), (2 * call, CHUNK * call)
            yield compiled(x, *ours, *places), eager(x, *reference, *places)

    return steps


CASES: dict[str, tuple[Callable[[JKVBackend], Steps], int]] = {
    # the way of holding a cache, and from which call on nothing may compile any more
    "eviction by rolling, with a sink": (rolling, 8),
    "a fixed past, concatenated": (fixed_past(), 3),
    "a fixed past, turned after the read": (fixed_past("interleaved"), 3),
    "a fixed past, turned in halves after the read": (fixed_past("half"), 3),
    "a fixed past, its batch doubled": (fixed_past("", True), 3),
    "a concatenation that grows and is returned": (growing_past, 4),
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
    "a concatenation of sink, window and current chunk": (composite, 4),
    "buffers allocated in the first forward": (lazy_buffers, 3),
}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("name", CASES)
def test_stays_close_to_eager(name: str, inner: str) -> None:
    steps, stable_from = CASES[name]
    torch.manual_seed(0)
    backend = fresh_backend(inner=inner)
    with torch.no_grad():
        generator = steps(backend)  # holds the caches
        run_beside(generator, calls=10 if inner == "eager" else 6, stable_from=stable_from)
    assert backend.memory().adopted in (1, 2, 4)  # keys and values may lie in one tensor, or in two each


def test_rolling_moves_packed_data_bit_for_bit() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2)
    model = RollingCache(sink=4, tokens=32)
    compiled = torch.compile(model, backend=backend)
    cache = model.new_cache()
    with torch.no_grad():
        for call in range(4):
            compiled(chunk(), cache, call * CHUNK)
        store = cache["k"]._store
        codes, scales = store.codes.clone(), store.scales.clone()
        compiled(chunk(), cache, 4 * CHUNK)  # evicts the eight tokens after the sink
    assert torch.equal(store.codes[:, :, :4], codes[:, :, :4])
    assert torch.equal(store.codes[:, :, 4:24], codes[:, :, 12:32])
    assert torch.equal(store.scales[:, :, :, 4:24], scales[:, :, :, 12:32])


@pytest.mark.parametrize("correction", ["none", "taylor", "exact"])
def test_a_past_turned_after_the_read_is_corrected_as_the_reference_is(correction: str) -> None:
    """Interleaved pairs lie within a group, whose norm no rotation changes: turned queries give the right correction."""
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, correction=correction)
    model = FixedPast("interleaved")
    compiled = torch.compile(model, backend=backend)
    past = tuple(2 * torch.randn(1, HEADS, 40, HEAD_DIM) for _ in range(2))
    packed = [reference.quantize(t, 2, 32) for t in past]
    old_k, old_v = (reference.dequantize(*p, 2) for p in packed)
    delta = reference.quantization_step(packed[0][1], 2)
    with torch.no_grad():
        for _ in range(3):  # the past is packed once it is seen again
            x = 2 * chunk()
            got = compiled(x, past)
        q, k, v = (t.transpose(1, 2) for t in model.project(x))
        keys = rope(torch.cat([old_k, k], 2).transpose(1, 2)).transpose(1, 2)
        q = rope(q.transpose(1, 2), 40).transpose(1, 2)
        scores = HEAD_DIM**-0.5 * q @ keys.mT
        scores[..., :40] -= reference.correction_bias(q, delta, HEAD_DIM**-0.5, correction)
        want = model.out((scores.softmax(-1) @ torch.cat([old_v, v], 2)).transpose(1, 2).flatten(2))
    assert is_packed(past[0])
    assert relative_error(got, want) < 1e-4


def test_two_children_of_one_past_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(GrowingPast(), backend)
    with torch.no_grad():
        past = reference_past = None
        for _ in range(3):
            x = chunk()
            _, past = compiled(x, past)
            _, reference_past = eager(x, reference_past)
        assert past is not None and is_packed(past[0])
        before = past[0]._store.codes.clone()
        for _ in range(2):  # both grow from the same past, each in its own way
            x, child, reference_child = chunk(), past, reference_past
            for _ in range(2):
                out, child = compiled(x, child)
                want, reference_child = eager(x, reference_child)
                assert relative_error(out, want) < 0.01
            assert child[0].shape[2] == past[0].shape[2] + 2 * CHUNK
        assert torch.equal(past[0]._store.codes, before)


def test_growing_moves_packed_tokens_bit_for_bit() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2)
    compiled = torch.compile(GrowingPast(), backend=backend)
    past, stores = None, []
    with torch.no_grad():
        for _ in range(5):
            _, past = compiled(chunk(), past)
            stores.append(past[0]._store if is_packed(past[0]) else None)
    assert None not in stores[2:]  # the first past is a slice of a projection, the second their concatenation
    for old, new in itertools.pairwise(stores[2:]):
        n = old.codes.shape[2]
        assert torch.equal(new.codes[:, :, :n], old.codes) and torch.equal(new.scales[:, :, :, :n], old.scales)


class TestGraphs(expecttest.TestCase):
    def graph(self, steps: Callable[[JKVBackend], Steps], calls: int = 4, index: int = 0) -> str:
        backend = fresh_backend(bits=2)
        with torch.no_grad():
            generator = steps(backend)
            for _ in range(calls):
                next(generator)
        lines = rewritten(backend, index=index).splitlines()
        return "\n".join(line for line in lines if "jkv::" in line) + "\n"

    def test_rolling(self) -> None:
        self.assertExpectedInline(
            self.graph(rolling, 7, index=1),
            """\
jkv::move(l_cache_k__codes, l_cache_k__scales, add_2, 4, 20)
jkv::move(l_cache_v__codes, l_cache_v__scales, add_2, 4, 20)
jkv::append(l_cache_k__codes, l_cache_k__scales, permute, sub_5, 2)
jkv::append(l_cache_v__codes, l_cache_v__scales, permute_1, sub_5, 2)
attention_default = jkv::attention(transpose, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 4, 4, 24], permute_2, permute_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
""",
        )

    def test_fixed_past(self) -> None:
        self.assertExpectedInline(
            self.graph(fixed_past()),
            """\
attention_active_default = jkv::attention_active(q_1, l_past_0__codes, l_past_0__scales, l_past_1__codes, l_past_1__scales, l_past_0__active, l_past_0__active_range, l_past_1__active, l_past_1__active_range, 0, 8, transpose, transpose_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
""",
        )

    def test_clone_edit_attend(self) -> None:
        self.assertExpectedInline(
            self.graph(clone_edit(True)),
            """\
attention_default = jkv::attention(transpose, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, l_start_], permute, permute_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
jkv::append(l_cache_k__codes, l_cache_k__scales, permute_2, l_start_, 2)
jkv::append(l_cache_v__codes, l_cache_v__scales, permute_3, l_start_, 2)
""",
        )

    def test_composite(self) -> None:
        self.assertExpectedInline(
            self.graph(composite),
            """\
attention_default = jkv::attention(transpose, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 4, sym_max, l_start_], permute, permute_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
jkv::append(l_cache_k__codes, l_cache_k__scales, permute_2, l_start_, 2)
jkv::append(l_cache_v__codes, l_cache_v__scales, permute_3, l_start_, 2)
""",
        )
