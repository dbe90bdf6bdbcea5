"""Writing to a packed cache quantizes, moves packed data bit for bit, resets, or is refused before anything changes."""

from __future__ import annotations

import contextlib

import pytest
import torch

from jkv_compile import PackedCacheError, materialize, quantization_step
from tests.caches import AXES, assert_agrees, assert_same_bits, new_cache, packed_data

NEW = torch.randn(2, 4, 2, 64, generator=torch.Generator().manual_seed(1))
MODES = {"grad mode": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
ALL = slice(None)


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def mode(request):
    with request.param():
        yield


WRITES = {
    "slice assignment": lambda x: x.__setitem__((ALL, slice(4, 8)), NEW),
    "copy_ to a slice": lambda x: x[:, 4:8].copy_(NEW),
    "copy_ to a permuted view": lambda x: x.transpose(1, 2)[:, :, 4:8].copy_(NEW.transpose(1, 2)),
    "one batch entry": lambda x: x[1, 4:8].copy_(NEW[0]),
    "one head": lambda x: x[:, 4:8, 1].copy_(NEW[:, :, 0]),
    "one token": lambda x: x[:, 4].copy_(NEW[:, 0]),
    "broadcast source": lambda x: x[:, 4:8].copy_(NEW[0, 0]),
    "source in another dtype": lambda x: x[:, 4:8].copy_(NEW.double()),
    "source that is a permuted view": lambda x: x[:, 4:8].copy_(NEW.transpose(0, 2).contiguous().transpose(0, 2)),
    "index_copy_ of a run": lambda x: x.index_copy_(1, torch.arange(4, 8), NEW),
    "index_copy_ of scattered tokens": lambda x: x.index_copy_(1, torch.tensor([9, 2, 15, 0]), NEW),
    "index assignment": lambda x: x.__setitem__((ALL, torch.tensor([9, 2, -1, 0])), NEW),
    "index assignment of batch entries": lambda x: x.__setitem__((torch.tensor([1, 0]), slice(4, 8)), NEW),
    "boolean index assignment": lambda x: x.__setitem__((ALL, torch.arange(16) % 4 == 1), NEW),
    "zero_": lambda x: x.zero_(),
    "zero_ of a slice": lambda x: x[:, 4:8].zero_(),
    "assignment of a number": lambda x: x.__setitem__((ALL, slice(4, 8)), 0),
    "fill_": lambda x: x[:, :5].fill_(1.5),
    "fill_ from a tensor": lambda x: x[:, :5].fill_(torch.tensor(-2.0)),
    "masked_fill_ of tokens": lambda x: x.masked_fill_(torch.arange(16).view(1, 16, 1, 1) < 7, 0),
    "masked reset of tokens per batch entry": lambda x: x.__setitem__(torch.ones(2, 16).tril() > 0, 0),
    "index_fill_": lambda x: x.index_fill_(1, torch.tensor([3, 9]), 0.25),
    "nothing": lambda x: x[:, 16:].copy_(NEW[:, :0]),
    "roll to the left": lambda x: x.__setitem__((ALL, slice(2, 10)), x[:, 6:14].clone()),
    "sink relocation": lambda x: x[:, 12:].copy_(x[:, :4]),
    "one batch entry onto the other": lambda x: x[0].copy_(x[1]),
    "roll of the whole": lambda x: x.copy_(x.roll(3, 1)),
    "move to scattered tokens": lambda x: x.__setitem__((ALL, torch.tensor([15, 1, 6])), x[:, 9:12].clone()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_write_has_the_effect_that_it_has_on_a_plain_tensor(write, mode):
    cache, plain = new_cache()
    for tensor in (cache, plain):
        write(tensor)
    assert_agrees(cache, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_slice_assignment_at_every_width(bits, dtype):
    cache, plain = new_cache(bits=bits, dtype=dtype)
    for tensor in (cache, plain):
        tensor[:, 4:8] = NEW.to(dtype)
        tensor[:, 2:3] = NEW[:, :1].to(dtype)
    assert_agrees(cache, plain, bits)


@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("shift", [-5, -1, 1, 5], ids=lambda n: f"by {n}")
@pytest.mark.parametrize("cloned", [True, False], ids=["cloned source", "overlapping source"])
def test_moving_tokens_keeps_every_bit(layout, shift, cloned):
    """Also where the ranges overlap, which plain tensors refuse: the source is read as if it had been cloned."""
    cache, _ = new_cache(layout, bits=2)
    dim = layout.index("s")
    source = cache.narrow(dim, max(0, -shift), 16 - abs(shift))
    before = packed_data(source)
    target = cache.narrow(dim, max(0, shift), 16 - abs(shift))
    target.copy_(source.clone() if cloned else source)
    assert_same_bits(packed_data(target), before)


def test_moving_between_caches_keeps_every_bit_whatever_their_layouts():
    one, _ = new_cache("bshd", bits=3)
    other, _ = new_cache("bhsd", bits=3)
    one[:, 2:7] = other.transpose(1, 2)[:, 8:13]
    assert_same_bits(packed_data(one[:, 2:7]), packed_data(other[:, :, 8:13]))
    one[:, 7] = other[:, :, 1]  # dimensions of size one, and dropped ones, do not matter
    assert_same_bits(packed_data(one[:, 7]), packed_data(other[:, :, 1:2]))
    one[:1, 9:11] = other.transpose(1, 2)[1, 3:5]
    assert_same_bits(packed_data(one[:1, 9:11]), packed_data(other[1, :, 3:5]))


@pytest.mark.filterwarnings("ignore::jkv_compile.PackedReadWarning")
def test_source_packed_at_another_width_is_quantized_anew():
    cache, plain = new_cache(bits=8)
    other, _ = new_cache(bits=4)
    cache[:, :4] = other[:, 4:8]
    plain[:, :4] = materialize(other)[:, 4:8]
    assert_agrees(cache, plain)


def test_zero_and_fill_are_exact():
    cache, _ = new_cache(bits=2)
    cache[:, 4:8].zero_()
    cache[:, 8:9].fill_(1.5)
    cache[0].masked_fill_(torch.arange(16).view(16, 1, 1) >= 14, -3)
    values = materialize(cache)
    assert not values[:, 4:8].any()
    assert (values[:, 8] == 1.5).all()
    assert (values[0, 14:] == -3).all()
    assert not quantization_step(cache)[:, 4:9].any()


def test_fill_takes_numbers_that_float16_rounds():
    cache, _ = new_cache(dtype=torch.float32)
    cache.fill_(0.1)
    assert (materialize(cache) - 0.1).abs().max() <= 0.1 * 2**-11


REFUSED = {
    "multiplication": (lambda x: x.mul_(2), "aten.mul_.Tensor"),
    "addition": (lambda x: x.__iadd__(1), "aten.add_.Tensor"),
    "out=": (lambda x: torch.add(torch.zeros(x.shape), 1, out=x), "aten.add.out"),
    "foreach": (lambda x: torch._foreach_mul_([x], 2), "aten._foreach_mul_.Scalar"),
    "resize_": (lambda x: x.resize_(4), "aten.resize_.default"),
    "set_": (lambda x: x.set_(), "aten.set_"),
    "scatter_": (lambda x: x.scatter_(1, torch.zeros(2, 4, 2, 64, dtype=torch.int64), NEW), "aten.scatter_"),
    "normal_": (lambda x: x.normal_(), "aten.normal_"),
    "some channels": (lambda x: x[..., :32].copy_(NEW[0, 0, 0, :32]), "shows 32 of 64 channels"),
    "masked channels": (lambda x: x.masked_fill_(torch.arange(64) < 3, 0), "some channels"),
    "merged heads": (lambda x: x[:, 4:8].flatten(2).copy_(NEW.flatten(2)), "is no box"),
    "every other token": (lambda x: x[:, ::2].zero_(), "is no box"),
    "accumulation": (lambda x: x.index_put_((torch.tensor([0]),), NEW[:1, :1], accumulate=True), "accumulate=True"),
    "two indices": (lambda x: x.__setitem__((torch.tensor([0, 1]), torch.tensor([3, 4])), 0), "2 index tensors"),
    "assignment to data": (lambda x: setattr(x, "data", torch.zeros(x.shape)), ".data"),
    "requires_grad_": (lambda x: x.requires_grad_(), "no gradient"),
    "a number beyond float16": (lambda x: x.fill_(1e6), "at most 65504"),
}


@pytest.mark.parametrize("write, message", REFUSED.values(), ids=REFUSED.keys())
def test_write_without_a_packed_meaning_names_itself_and_changes_nothing(write, message, mode):
    cache, _ = new_cache()
    cache[:, 3:5] = NEW[:, :2]  # part of it is held in full precision
    before = materialize(cache), packed_data(cache)
    with pytest.raises(PackedCacheError, match=message.replace(".", r"\.")):
        write(cache)
    assert cache.shape == before[0].shape
    assert torch.equal(materialize(cache), before[0])
    assert_same_bits(packed_data(cache), before[1])


@pytest.mark.parametrize("index", [[16], [-1], [3, 99]], ids=["beyond the end", "negative", "one of two"])
def test_index_out_of_range_changes_nothing(index):
    cache, _ = new_cache()
    before = packed_data(cache)
    with pytest.raises(IndexError, match=r"index out of range of a packed cache: .* size 16"):
        cache.index_copy_(1, torch.tensor(index), NEW[:, : len(index)])
    assert_same_bits(packed_data(cache), before)


def test_source_that_requires_grad_is_refused_where_gradients_would_be_recorded():
    cache, plain = new_cache()
    new = NEW.clone().requires_grad_()
    with pytest.raises(PackedCacheError, match=r"torch.no_grad\(\), or write x.detach\(\)"):
        cache[:, :4] = new
    assert_agrees(cache, plain)
    with torch.no_grad():
        cache[:, :4] = new
    cache[:, 4:8] = new.detach()
    plain[:, :4] = plain[:, 4:8] = NEW
    assert_agrees(cache, plain)
    assert not cache.requires_grad


# ---- the range written last, held in full precision ----

KEPT = {
    "a write elsewhere ends it": (lambda x: x[:, 8:10].copy_(NEW[:, :2]), slice(8, 10)),
    "the same range again renews it": (lambda x: x[:, 4:8].copy_(NEW * 2), slice(4, 8)),
    "a reset of part of it ends it": (lambda x: x[:, 7:9].zero_(), None),
    "a reset elsewhere leaves it": (lambda x: x[:, 9:11].zero_(), slice(4, 8)),
    "a masked reset over it ends it": (lambda x: x.masked_fill_(torch.arange(16).view(-1, 1, 1) == 5, 0), None),
    "tokens moved onto it end it": (lambda x: x[:, 2:6].copy_(x[:, 10:14]), None),
    "tokens moved elsewhere leave it": (lambda x: x[:, 10:12].copy_(x[:, 0:2]), slice(4, 8)),
    "scattered writes end it": (lambda x: x.index_copy_(1, torch.tensor([3, 1]), NEW[:, :2]), None),
    "a write to one batch entry ends it": (lambda x: x[0, 4:8].copy_(NEW[0]), None),
}


@pytest.mark.parametrize("change, held", KEPT.values(), ids=KEPT.keys())
def test_range_held_in_full_precision(change, held):
    cache, plain = new_cache(bits=8)
    for tensor in (cache, plain):
        tensor[:, 4:8] = NEW
        change(tensor)
    assert_agrees(cache, plain)
    step = quantization_step(cache)
    written = torch.zeros(16, dtype=torch.bool)
    if held is not None:
        written[held] = True
        assert torch.equal(materialize(cache)[:, held], plain[:, held])
    in_full = ~step.any(-1).any(-1).any(0)
    reset = ~plain.any(-1).any(-1).any(0)
    assert torch.equal(in_full & ~reset, written)
    assert cache._store.active_bytes == written.sum() * 2 * 2 * 64 * 4


def test_a_past_that_is_written_anew_for_each_chunk_is_not_held_in_full_precision() -> None:
    """`settle` is called where attention adds tokens of its own; a chunk being generated begins where others end."""
    cache, plain = new_cache()
    store = cache._store
    for start, stop, held in ((0, 4, True), (0, 4, True), (4, 8, True), (0, 8, False), (0, 12, False), (0, 4, False)):
        cache[:, start:stop] = plain[:, start:stop]
        store.settle()
        assert (store.active is not None) == held, (start, stop)
    whole, plain = new_cache()
    whole.copy_(plain)
    assert whole._store.active is not None
    whole._store.settle()
    assert whole._store.active is None
