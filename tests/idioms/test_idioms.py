"""Other ways of holding a cache: each stays close to eager, is packed, compiles no more than it must, and is pinned."""

from __future__ import annotations

import itertools

import pytest
import torch

from jkv_compile import is_packed
from jkv_compile.kernels import reference

from ..harness import fresh_backend, relative_error, run_beside, twins
from .cases import (
    CASES,
    chunk,
)
from .models import CHUNK, HEAD_DIM, HEADS, FixedPast, GrowingPast, RollingCache, rope

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")


COMPILED = (  # one of each lowering
    "a fixed past, turned in halves after the read",
    "a concatenation that grows and is returned",
)


@pytest.mark.parametrize("name, inner", [(name, "eager") for name in CASES] + [(name, "inductor") for name in COMPILED])
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


def test_a_past_in_another_dtype_is_cast_at_each_read() -> None:
    """And is made by eager code."""
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(FixedPast("half"), backend)
    with torch.no_grad():
        past = tuple(t.bfloat16() for t in eager.produce(chunk()))  # type: ignore[operator]
        reference_past = tuple(t.clone() for t in past)
        run_beside(((compiled(x, past), eager(x, reference_past)) for x in iter(chunk, None)), stable_from=3)
    assert all(map(is_packed, past)) and past[0].dtype == torch.bfloat16


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
