"""First tokens and newest ones in full precision (`sink=`, `recent=`) in eager code: copies, files, bytes, resets."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from jkv_compile import PackedCacheError, PackedKV, materialize, quantization_step
from jkv_compile.flat import pack_bytes, unpack_bytes
from jkv_compile.store import rebuild_store

from .caches import assert_held_exactly, new_cache
from .harness import fresh_backend
from .idioms.cases import rolling
from .models import SelfAttention

WINDOW = {"sink": 4, "recent": 3}


def cache(**settings: int) -> tuple[Tensor, Tensor]:
    """A packed cache `[B, H, S, D]` of two bits, of which tokens 6 and 7 are written last, and its plain twin."""
    torch.manual_seed(0)
    packed, plain = new_cache("bhsd", bits=2, **{**WINDOW, **settings})
    for start, n in ((0, 6), (6, 2)):
        new = torch.randn(2, 2, n, 64)
        for x in (packed, plain):
            x[:, :, start : start + n] = new
    return packed, plain


def test_reads_are_exact_where_tokens_are_held_and_their_steps_are_zero() -> None:
    packed, plain = cache()
    packed._store.active = None
    known = assert_held_exactly(packed, plain)
    assert known == [0, 1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(materialize(packed)[:, :, known], plain[:, :, known])
    assert not torch.equal(materialize(packed)[:, :, 8:], plain[:, :, 8:])
    steps = quantization_step(packed[:, :, 2:])
    assert not steps[:, :, :6].any() and steps[:, :, 6:].all()


COPIES = pytest.mark.parametrize("copied", [
    torch.clone, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: unpack_bytes(pack_bytes(x)),
    lambda x: _saved(x), lambda x: x.to("cpu", copy=True), lambda x: x[:, :, :],
], ids=["clone", "deepcopy", "pickle", "bytes", "save", "to", "view"])  # fmt: skip


@COPIES
def test_copies_hold_what_their_original_does_and_go_their_own_way(copied) -> None:
    packed, plain = cache()
    other = copied(packed)
    assert assert_held_exactly(other, plain) == list(range(8))
    if other._store is not packed._store:
        other[:, :, 1:3] = 5.0 + torch.randn(2, 2, 2, 64)
        assert_held_exactly(packed, plain)


@COPIES
@pytest.mark.parametrize("window", [{"sink": 0}, {"recent": 0}, {}, {"sink": 20}], ids=str)
def test_copies_read_the_same_where_batch_entries_hold_different_tokens(copied, window) -> None:
    packed, plain = cache(**window)
    new = torch.randn(2, 3, 64)
    for x in (packed, plain):
        x[1, :, 4:7] = new
    other = copied(packed)
    assert_held_exactly(other, plain)
    assert torch.equal(materialize(other), materialize(packed))
    order = torch.tensor([1, 0, 1])
    assert torch.equal(materialize(packed.index_select(0, order)), materialize(packed)[order])
    assert torch.equal(materialize(packed.index_select(1, order)), materialize(packed)[:, order])
    assert torch.equal(materialize(packed[1:].clone()), materialize(packed)[1:])


def _saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_part_a_gathering_and_a_concatenation_hold_what_belongs_there() -> None:
    packed, plain = cache()
    assert {0, 1, 2, 3} <= set(assert_held_exactly(packed[:, :, 2:9].clone(), plain[:, :, 2:9]))
    order = torch.tensor([1, 0])
    assert assert_held_exactly(packed.index_select(0, order), plain[order]) == list(range(8))
    assert assert_held_exactly(packed[1:].clone(), plain[1:]) == list(range(8))
    new = torch.randn(2, 2, 5, 64)
    joined = torch.cat([packed[:, :, :8], new], 2)
    known = assert_held_exactly(joined, torch.cat([plain[:, :, :8], new], 2))
    assert set(known) == {0, 1, 2, 3, 5, 6, 7, 10, 11, 12}
    assert_held_exactly(torch.cat([packed, packed]), torch.cat([plain, plain]))
    assert_held_exactly(packed[:, :, [3, 1, 5]], plain[:, :, [3, 1, 5]])


def test_a_copy_between_caches_brings_along_what_is_held() -> None:
    packed, plain = cache()
    other, other_plain = cache()
    other[:, :, 2:10].copy_(packed[:, :, 1:9])
    other_plain[:, :, 2:10] = plain[:, :, 1:9]
    assert {0, 1, 2, 3} <= set(assert_held_exactly(other, other_plain))
    bare, _ = new_cache("bhsd", bits=2)
    other.copy_(bare)  # which holds nothing
    assert assert_held_exactly(other, materialize(bare)) == []


@pytest.mark.parametrize("change", [
    lambda x, new: x[:, :, 2:6].copy_(new[:, :, 2:6]), lambda x, new: x[1].copy_(new[1]),
    lambda x, new: x[:, 1:].copy_(new[:, 1:]), lambda x, new: x.index_copy_(2, torch.tensor([5, 1, 7]), new[:, :, :3]),
    lambda x, new: x.index_copy_(0, torch.tensor([1]), new[:1]), lambda x, new: x[:, :, 1:7].zero_(),
    lambda x, new: x[1].fill_(2.0), lambda x, new: x[:, :1].zero_(),
    lambda x, new: x.masked_fill_((torch.arange(16) % 3 == 0)[:, None], 0.0),
    lambda x, new: x[:, :, :8].copy_(x[:, :, 2:10].clone()), lambda x, new: x[0].copy_(x[1].clone()),
    lambda x, new: x[:, 0].copy_(x[:, 1].clone()), lambda x, new: x[:1, :, 4:9].copy_(x[:1, :, 3:8].clone()),
    lambda x, new: x.copy_(x.roll(3, 2)), lambda x, new: x.copy_(new),
], ids=[
    "a slice", "an entry", "a head", "indices", "an entry by index", "a reset", "a fill of an entry", "a reset of a head",
    "a mask", "a move", "another entry", "another head", "a move within an entry", "a roll", "all of it",
])  # fmt: skip
def test_nothing_is_stale_after(change) -> None:
    packed, plain = cache()
    for _ in range(2):
        new = torch.randn(2, 2, 16, 64)
        for x in (packed, plain):
            change(x, new)
        assert_held_exactly(packed, plain)
        read = materialize(packed)
        assert not ((read - plain).abs() > 3).any()  # two bits, but none is of another token


def test_bytes_are_counted_one_by_one() -> None:
    torch.manual_seed(0)
    for settings in ({"sink": 5, "recent": 7}, {"sink": 5}, {"recent": 7}, {"sink": 100}):
        backend = fresh_backend(bits=2, **settings)
        model = SelfAttention()
        kv, compiled = model.new_cache(1, 64, torch.bfloat16), torch.compile(model.bfloat16(), backend=backend)
        with torch.no_grad():
            for start in (0, 8, 16):
                compiled(torch.randn(1, 8, 256).bfloat16(), kv, start)
        memory, rows = backend.memory(), min(64, settings.get("sink", 0)) + 2 * settings.get("recent", 0)
        assert memory.held_bytes == 2 * rows * 4 * 64 * 2
        stores = [kv[name]._store for name in ("k", "v")]
        assert memory.packed_bytes == sum(s.codes.nbytes + s.scales.nbytes for s in stores) + memory.held_bytes
        assert "sink and recent" in str(memory) and memory.to_dict()["held_bytes"] == memory.held_bytes


def test_offloaded_caches_hold_the_same_in_host_memory() -> None:
    results = []
    for offload in (None, "cpu"):
        torch.manual_seed(0)
        backend = fresh_backend(bits=2, sink=4, recent=8, offload=offload)
        with torch.no_grad():
            generator = rolling(backend)
            results.append([next(generator)[0] for _ in range(8)])
            kv = generator.gi_frame.f_locals["cache"]
        memory = backend.memory()
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert isinstance(kv["k"], PackedKV)
    memory = backend.memory()
    kv["k"]._store.host.offload.evict(kv["k"]._store.host)
    before = memory.traffic.from_device
    assert kv["k"]._store.host_bytes == kv["k"]._store.packed_bytes
    materialize(kv["k"])  # nothing of it has changed: no copy goes back
    assert backend.memory().traffic.from_device - before <= kv["k"]._store.held_bytes


def test_a_saved_cache_that_does_not_fit_its_ranges_is_refused() -> None:
    packed, _ = cache()
    _, (*args, (rows, ranges, window)) = packed._store.__reduce__()
    rebuild_store(*args, (rows, ranges, window))
    for row, column, value in ((0, 1, 40), (1, 2, 99), (2, 3, 50), (0, 2, 1), (1, 0, -1)):
        wrong = ranges.clone()
        wrong[:, row, column] = value
        with pytest.raises(PackedCacheError, match="in full precision for good"):
            rebuild_store(*args, (rows, wrong, window))


def test_a_cache_that_is_loaded_without_any_holds_what_is_written_from_then_on() -> None:
    """A file from before, or of a backend without a sink."""
    torch.manual_seed(0)
    model = SelfAttention()
    kv = model.new_cache(1, 64)
    with torch.no_grad():
        compiled = torch.compile(model, backend=fresh_backend(bits=2))
        compiled(torch.randn(1, 8, 256), kv, 0)
        kv = {name: _saved(tensor) for name, tensor in kv.items()}
        backend = fresh_backend(bits=2, sink=12, recent=8)
        compiled, plain = torch.compile(model, backend=backend), {n: materialize(t).clone() for n, t in kv.items()}
        for start in (8, 16, 24):
            x = torch.randn(1, 8, 256)
            compiled(x, kv, start)
            model(x, plain, start)
            known = assert_held_exactly(kv["k"], plain["k"].transpose(1, 2))
        assert kv["k"]._store.held_tokens == (12, 8)
        assert set(range(16, 32)) <= set(known)
