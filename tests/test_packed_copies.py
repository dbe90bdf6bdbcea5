"""Copies of packed caches are packed: the same codes, steps and zero points, in memory of their own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from jkv_compile import JKVBackend, PackedCacheError, PackedKV, PackedReadWarning, jkv_backend, materialize
from jkv_compile.store import rebuild_store
from tests.caches import AXES, assert_agrees, assert_same_bits, new_cache, packed_data

NEW = torch.randn(2, 4, 2, 64, generator=torch.Generator().manual_seed(1))


def save_and_load(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


COPIES = {
    "clone": lambda x: x.clone(),
    "clone of a slice": lambda x: x[:, 3:9].clone(),
    "clone of a transposed slice": lambda x: x[:, 3:9].transpose(1, 2).clone(),
    "contiguous": lambda x: x.permute(2, 0, 1, 3).contiguous(),
    "clone of one batch entry": lambda x: x[1].clone(),
    "clone of one token": lambda x: x[:, 5].clone(),
    "to with copy": lambda x: x.to("cpu", copy=True),
    "deepcopy": copy.deepcopy,
    "deepcopy of a slice": lambda x: copy.deepcopy(x[:, 3:9]),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save of a slice": lambda x: save_and_load(x[:, 3:9]),
    "cat of slices": lambda x: torch.cat([x[:, 8:], x[:, :2], x[:, 5:5]], 1),
    "cat of heads": lambda x: torch.cat([x[:, :, 1:], x], 2),
    "cat on batch": lambda x: torch.cat([x, x]),
    "roll": lambda x: x.roll(5, 1),
    "roll backwards by more than once around": lambda x: torch.roll(x, -21, 1),
    "roll of tokens and heads": lambda x: x.roll((3, 1), (1, 2)),
    "index_select of batch entries": lambda x: x.index_select(0, torch.tensor([1, 0, 1])),
    "repeat_interleave of batch entries": lambda x: x.repeat_interleave(2, 0),
    "repeat_interleave of heads": lambda x: x[:, 3:9].repeat_interleave(3, 2),
    "index of tokens": lambda x: x[:, torch.tensor([7, 3, -1])],
    "boolean index of tokens": lambda x: x[:, torch.arange(16) % 3 == 0],
}


@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("name", COPIES)
def test_copy_is_packed_and_equal_bit_for_bit(name, layout, recwarn):
    cache, plain = new_cache(layout, bits=3)
    if layout == "bhsd":  # as a model that keeps heads first would see it
        cache, plain = cache.transpose(1, 2), plain.transpose(1, 2)
    got, want = COPIES[name](cache), COPIES[name](plain)
    assert isinstance(got, PackedKV)
    assert got._store is not cache._store
    assert got._store.codes.data_ptr() != cache._store.codes.data_ptr()
    assert (got.shape, got.stride()) == (want.shape, want.stride())
    assert torch.equal(materialize(got), COPIES[name](materialize(cache)))
    assert_agrees(got, want, bits=3)
    assert not [w for w in recwarn if w.category is PackedReadWarning]


@pytest.mark.parametrize("name", COPIES)
def test_copy_stands_alone(name):
    cache, _ = new_cache()
    got = COPIES[name](cache)
    before = materialize(got)
    cache.zero_()
    assert torch.equal(materialize(got), before)
    got.zero_()
    assert not materialize(got).any()


@pytest.mark.parametrize("made_in", [True, False], ids=["copied in inference mode", "copied outside"])
def test_copy_can_be_written_in_every_mode(made_in):
    cache, _ = new_cache()
    for name, make in COPIES.items():
        with torch.inference_mode(made_in):
            got = make(cache)
        with torch.inference_mode():
            got.fill_(2)
        assert (materialize(got) == 2).all(), name


def test_no_op_moves_are_the_tensor_itself():
    cache, _ = new_cache()
    assert cache.cpu() is cache
    assert cache.to(torch.float32) is cache
    assert cache.contiguous() is cache


def test_meta_copy_has_shapes_only():
    cache, _ = new_cache()
    meta = cache.to("meta")
    assert (meta.device.type, meta.shape, meta.dtype) == ("meta", cache.shape, cache.dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_copies_between_devices_keep_every_bit():
    cache, plain = new_cache(bits=2)
    there = cache.pin_memory().to("cuda", non_blocking=True)
    assert isinstance(there, PackedKV) and there.device.type == "cuda"
    assert_same_bits(packed_data(there.cpu()), packed_data(cache))
    assert_agrees(there.cpu(), plain, bits=2)


# ---- growing by concatenation ----


@pytest.mark.parametrize("layout", AXES)
def test_cat_with_plain_parts_moves_what_is_packed_and_quantizes_the_rest(layout):
    cache, plain = new_cache(layout, bits=2)
    dim = layout.index("s")
    new = NEW if layout == "bshd" else NEW.transpose(1, 2)
    grown = torch.cat([cache, new], dim)
    assert isinstance(grown, PackedKV)
    assert_same_bits(packed_data(grown.narrow(dim, 0, 16)), packed_data(cache))
    assert torch.equal(materialize(grown.narrow(dim, 16, 4)), new), "the newest tokens are held in full precision"
    grown = torch.cat([grown, new], dim)
    assert_agrees(grown, torch.cat([plain, new, new], dim), bits=2)


@pytest.mark.filterwarnings("ignore::jkv_compile.PackedReadWarning")
@pytest.mark.parametrize(
    "parts",
    [
        lambda x: [x, new_cache(bits=2)[0]],
        lambda x: [x, NEW.double()],
        lambda x: [x.chunk(2, -1)[0], NEW[..., :32]],
    ],
    ids=["another width", "another dtype", "part of the channels"],
)
def test_cat_of_what_does_not_fit_is_plain(parts):
    cache, _ = new_cache(bits=8)
    values = parts(cache)
    got = torch.cat(values, 1)
    assert type(got) is torch.Tensor
    assert torch.equal(got, torch.cat([materialize(v) for v in values], 1))


@pytest.mark.parametrize("shift", [0, 1])
def test_roll_of_a_cache_of_one_token_is_a_packed_copy(shift):
    cache, plain = new_cache("bhsd", batch=1, tokens=1)
    rolled = cache.roll(shift, 2)
    assert isinstance(rolled, PackedKV)
    assert_agrees(rolled, plain)


def test_cat_of_wrong_shapes_says_so_as_torch_does():
    cache, _ = new_cache()
    with pytest.warns(PackedReadWarning), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        torch.cat([cache, NEW[:, :, :1]], 1)


# ---- the range held in full precision goes along ----

CARRIED = {
    "clone": (lambda x: x.clone(), slice(4, 8)),
    "clone of a slice": (lambda x: x[:, 3:6].clone(), slice(1, 3)),
    "clone of one batch entry": (lambda x: x[:1].clone(), slice(4, 8)),
    "deepcopy": (copy.deepcopy, slice(4, 8)),
    "torch.save": (save_and_load, slice(4, 8)),
    "roll": (lambda x: x.roll(3, 1), slice(7, 11)),
    "cat": (lambda x: torch.cat([x[:, 6:9], x[:, :2]], 1), slice(0, 2)),
    "index_select of batch entries": (lambda x: x.index_select(0, torch.tensor([1])), slice(4, 8)),
    "clone of other tokens": (lambda x: x[:, 9:12].clone(), slice(0, 0)),
    "index of tokens": (lambda x: x[:, torch.tensor([5, 9])], slice(0, 0)),
}


@pytest.mark.parametrize("make, held", CARRIED.values(), ids=CARRIED.keys())
def test_copies_hold_in_full_precision_what_the_cache_does(make, held):
    cache, plain = new_cache(bits=2)
    for tensor in (cache, plain):
        tensor[:, 4:8] = NEW
    got, want = make(cache), make(plain)
    assert torch.equal(materialize(got)[:, held], want[:, held])
    active = got._store.active
    assert (slice(0, 0) if active is None else slice(active.start, active.stop)) == held


# ---- saving ----


def test_views_saved_together_are_still_views_of_one_cache():
    cache, _ = new_cache()
    for restore in (save_and_load, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        loaded = restore({"cache": cache, "chunk": cache[:, 4:8]})
        loaded["chunk"].zero_()
        assert not materialize(loaded["cache"])[:, 4:8].any()
        assert_same_bits(packed_data(loaded["cache"][:, 8:]), packed_data(cache[:, 8:]))


def test_attributes_that_users_set_are_saved():
    cache, _ = new_cache()
    cache.layer = 7
    assert save_and_load(cache).layer == 7
    assert copy.deepcopy(cache).layer == 7


def test_saved_cache_is_small():
    cache, plain = new_cache(bits=2, tokens=1024)
    packed, full = io.BytesIO(), io.BytesIO()
    torch.save(cache, packed)
    torch.save(plain.half(), full)
    assert full.tell() > 4.5 * packed.tell()  # 3 effective bits at groups of 32, against 16


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"shape": (2, 2, 17, 64)},
        {"scales": torch.zeros(2, 2, 0, 16, 2, dtype=torch.float16)},
        {"active": (torch.zeros(2, 2, 4, 64), 14, 18)},
    ],
    ids=["unknown width", "wrong shape", "no groups", "range beyond the end"],
)
def test_file_whose_parts_do_not_fit_is_refused(change):
    cache, _ = new_cache(bits=4)
    names = ("shape", "strides", "dtype", "bits", "codes", "scales", "active")
    arguments = dict(zip(names, cache._store.__reduce__()[1])) | change
    with pytest.raises(PackedCacheError, match="a saved packed cache"):
        rebuild_store(**arguments)


# ---- accounting ----


def test_copies_are_counted_in_the_memory_of_the_backend_that_packed_the_original():
    backend: JKVBackend = jkv_backend(bits=2, group_size=64, inner="eager")
    cache, _ = new_cache(bits=2)
    cache._store.join(backend._state.stores)
    copies = [make(cache) for make in (torch.clone, copy.deepcopy, lambda x: x.roll(1, 1), lambda x: torch.cat([x, x]))]
    report = backend.memory()
    assert report.adopted == 5
    assert report.full_precision_bytes == 6 * cache.numel() * 4
    data = [t for c in [cache, *copies] for t in (c._store.codes, c._store.scales)]
    assert report.packed_bytes == sum(t.numel() * t.element_size() for t in data)
    del copies, data
    assert backend.memory().adopted == 1
