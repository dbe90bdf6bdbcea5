"""Caches that grow by concatenation: appended to in place, copied where another has grown there or is written to."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jkv_compile import is_packed, materialize
from jkv_compile.store import Store
from tests.harness import fresh_backend, relative_error, twins
from tests.idioms.models import CHUNK, DIM, GrowingPast

from .caches import assert_same_bits, new_cache, packed_data


def packed_store(tokens: int, quantizer: str = "rtn") -> Store:
    return new_cache("bhsd", bits=2, tokens=tokens, quantizer=quantizer)[0]._store  # type: ignore[attr-defined]


def grow(store: Store, tokens: int) -> Store:
    """A store with more tokens, all that it is made of checked."""
    new = packed_store(tokens, store.quantizer)
    before, added = ((s.codes.clone(), s.scales.clone()) for s in (store, new))
    child = store.grown(new.codes, new.scales, store.strides)
    assert_same_bits((child.codes[:, :, : store.shape[2]], child.scales[:, :, :, : store.shape[2]]), before)
    assert_same_bits((child.codes[:, :, store.shape[2] :], child.scales[:, :, :, store.shape[2] :]), added)
    assert_same_bits((store.codes, store.scales), before)
    assert child.shape[2] == store.shape[2] + tokens and child.grows
    return child


def same_memory(one: Store, other: Store) -> bool:
    return one.memory[0].data_ptr() == other.memory[0].data_ptr()


def test_tokens_are_appended_in_place_until_the_room_is_used() -> None:
    store = grow(packed_store(40), 8)
    assert store.memory[0].shape[2] == 48 + 12
    for tokens in (5, 6):  # at least one place is kept free
        store, old = grow(store, tokens), store
        assert same_memory(store, old)
    store, old = grow(store, 1), store
    assert not same_memory(store, old)
    assert store.memory[0].shape[2] == store.memory[1].shape[3] == 60 + 7


def test_a_long_line_copies_each_token_a_few_times() -> None:
    store, copied = packed_store(16), 0
    for _ in range(300):
        new = packed_store(8)
        child = store.grown(new.codes, new.scales, store.strides)
        copied += 0 if same_memory(child, store) else store.shape[2]
        store = child
    assert copied < 9 * store.shape[2]
    assert store.memory[0].shape[2] < 1.15 * store.shape[2]


def test_two_children_share_nothing_that_either_writes() -> None:
    parent = grow(packed_store(40), 8)
    first, second = grow(parent, 4), grow(parent, 6)
    assert same_memory(first, parent) and not same_memory(second, parent)
    before = first.codes.clone(), first.scales.clone()
    grow(second, 3)
    third = grow(first, 2)
    assert same_memory(third, first)
    assert_same_bits((first.codes, first.scales), before)


def test_what_was_dropped_leaves_its_room() -> None:
    parent = grow(packed_store(40), 8)
    child = grow(parent, 4)
    assert same_memory(child, parent)
    del child
    assert same_memory(grow(parent, 6), parent)


@pytest.mark.parametrize("which", ["parent", "child"])
def test_a_write_to_one_version_is_not_seen_by_another(which: str) -> None:
    parent = grow(packed_store(40), 8)
    child = grow(parent, 4)
    written, other = (parent, child) if which == "parent" else (child, parent)
    before = other.codes.clone(), other.scales.clone()
    written.fill(1.5, (0, 0, 2, 0), (2, 2, 5, 64))
    written.write(torch.randn(2, 2, 3, 64), (0, 0, 0, 0), keep_active=False)
    written.move(written, (0, 0, 20, 0), (0, 0, 30, 0), (2, 2, 4, 64))
    written.fill_where(torch.ones(2, 2, 3, dtype=torch.bool), 0.0, (0, 0, 8, 0))
    written.scatter(torch.randn(2, 2, 2, 64), 2, torch.tensor([5, 3]), (0, 0, 0, 0), written.shape)
    assert (written.read((0, 0, 2, 0), (2, 2, 1, 64), torch.float32) != 1.5).any()
    assert (written.read((0, 0, 6, 0), (2, 2, 1, 64), torch.float32) == 1.5).all()
    assert_same_bits((other.codes, other.scales), before)
    assert not same_memory(written, other)
    grown = grow(written, 2)  # into memory of its own
    assert same_memory(grown, written) and not same_memory(grown, other)


def test_memory_is_counted_once_and_with_its_room() -> None:
    parent = grow(packed_store(40), 8)
    per_token = 2 * 2 * (16 + 2 * 4)
    assert parent.packed_bytes == (48 + 12) * per_token
    child = grow(parent, 4)
    assert (parent.packed_bytes, child.packed_bytes) == (0, (48 + 12) * per_token)
    del child
    assert parent.packed_bytes == (48 + 12) * per_token


# ---- as models grow them ----


def steps(inner: str, calls: int) -> tuple[Callable[..., Any], tuple[Tensor, Tensor]]:
    """A compiled model after some calls; from the fourth on nothing compiles."""
    torch.manual_seed(0)
    compiled, eager = twins(GrowingPast(), fresh_backend(bits=8, inner=inner))
    past = reference = None
    moved = []
    for call in range(calls):
        x = torch.randn(1, CHUNK, DIM)
        with torch.compiler.set_stance("fail_on_recompile" if call > 3 else "default"):
            out, past = compiled(x, past)
        want, reference = eager(x, reference)
        assert relative_error(out, want) < 0.01
        moved.append(past[0]._store.memory[0].data_ptr() if is_packed(past[0]) else 0)
    assert len(set(moved[3:])) < len(moved[3:])  # memory is kept over calls
    assert past is not None
    return compiled, past


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_line_of_caches_grows_in_place_and_compiles_once(mode) -> None:
    with mode():
        steps("eager", 14)


def test_a_saved_or_copied_cache_leaves_its_room_behind() -> None:
    with torch.no_grad():
        _, past = steps("eager", 10)
    cache = past[0]
    assert cache._store.memory[0].shape[2] > cache.shape[2]
    file = io.BytesIO()
    torch.save(cache, file)
    size = sum(t.numel() * t.element_size() for t in (cache._store.codes, cache._store.scales))
    assert file.tell() < size + 4000
    file.seek(0)
    for other in (torch.load(file, weights_only=True), copy.deepcopy(cache), cache.clone(), cache[:, :, 4:60].clone()):
        assert other._store.memory[0].shape[2] == other.shape[2]
    assert torch.equal(materialize(copy.deepcopy(cache)), materialize(cache))
    assert_same_bits(packed_data(copy.deepcopy(cache)), packed_data(cache))


class Rewinding(torch.nn.Module):
    """Grows a cache, or writes over its first tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = GrowingPast()

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor], older: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = self.grow.project(x)
        n = x.shape[1]
        past[0][:, :, :n] = k.transpose(1, 2)
        past[1][:, :, :n] = v.transpose(1, 2)
        out = self.grow.sdpa(q, past[0].transpose(1, 2), past[1].transpose(1, 2))
        if older is not None:
            out = out + self.grow.sdpa(q, older[0].transpose(1, 2), older[1].transpose(1, 2))
        return out


@pytest.mark.parametrize("inner, together", [("eager", False), ("inductor", True)], ids=["alone", "beside its parent"])
def test_a_graph_that_writes_to_a_child_leaves_its_parent_alone(inner: str, together: bool) -> None:
    with torch.no_grad():
        compiled, past = steps("eager", 9)
        _, child = compiled(torch.randn(1, CHUNK, DIM), past)
        assert same_memory(past[0]._store, child[0]._store)
        before = [packed_data(t) for t in past]
        want_child = [materialize(t) for t in child]
        model = Rewinding()
        rewind = torch.compile(model, backend=fresh_backend(bits=8, inner=inner))
        x = torch.randn(1, CHUNK, DIM)
        got = rewind(x, child, past if together else None)
        want = model(x, want_child, [materialize(t) for t in past] if together else None)
        assert relative_error(got, want) < 0.01
        for tensor, data in zip(past, before):
            assert_same_bits(packed_data(tensor), data)
        for tensor, plain in zip(child, want_child):
            assert relative_error(materialize(tensor), plain) < 0.01
