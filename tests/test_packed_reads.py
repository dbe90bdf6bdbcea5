"""Reading a packed cache in eager code works, dequantizes, and says where."""

from __future__ import annotations

import contextlib
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F

from jkv_compile import PackedCacheError, PackedKV, PackedReadWarning, materialize
from tests.caches import new_cache

READS = {
    "arithmetic": lambda x: x + 1,
    "arithmetic from the right": lambda x: 1 - x,
    "comparison": lambda x: x == x[:, :1],
    "reduction": lambda x: x.sum(1),
    "cast": lambda x: x.double(),
    "einsum": lambda x: torch.einsum("bshd,bthd->bhst", x, x),
    "stack": lambda x: torch.stack([x, x]),
    "repeat": lambda x: x.repeat(2, 1, 1, 1),
    "flip": lambda x: x.flip(1),
    "gather": lambda x: x.gather(1, torch.zeros(2, 3, 2, 64, dtype=torch.int64)),
    "boolean mask": lambda x: x[x > 0],
    "attention": lambda x: F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3),
    "copy into a plain tensor": lambda x: torch.empty(x.shape).copy_(x),
    "out of a plain tensor": lambda x: torch.add(x, 1, out=torch.empty(x.shape)),
    "cat with another dtype": lambda x: torch.cat([x, torch.zeros(2, 1, 2, 64, dtype=torch.float64)], 1),
}
MODES = {"grad mode": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_gives_what_the_dequantized_cache_would(read, mode):
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", PackedReadWarning)
        cache, _ = new_cache()
        got, want = read(cache), read(materialize(cache))
        assert torch.equal(materialize(got), want)


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_gives_a_plain_tensor_and_a_warning(read):
    cache, _ = new_cache()
    with pytest.warns(PackedReadWarning, match="dequantizes it here"):
        result = read(cache)
    assert type(result) is torch.Tensor


def test_warning_names_the_line_that_reads_once():
    cache, _ = new_cache()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            line = inspect.currentframe().f_lineno + 1
            F.softmax(cache, -1)
        cache.sum()
    reads = [w for w in caught if w.category is PackedReadWarning]
    assert [(w.filename, w.lineno) for w in reads] == [(__file__, line), (__file__, line + 1)]


def test_materialize_is_silent_and_contiguous(recwarn):
    cache, plain = new_cache()
    got = materialize(cache.transpose(1, 2))
    assert type(got) is torch.Tensor
    assert got.is_contiguous()
    assert materialize(plain) is plain
    assert not [w for w in recwarn if w.category is PackedReadWarning]


FACTORIES = {
    "empty_like": lambda x: torch.empty_like(x),
    "zeros_like": lambda x: torch.zeros_like(x),
    "zeros_like in another dtype": lambda x: torch.zeros_like(x, dtype=torch.float16),
    "ones_like": lambda x: torch.ones_like(x),
    "full_like": lambda x: torch.full_like(x, 3.0),
    "new_zeros": lambda x: x.new_zeros(3, 2),
    "new_empty": lambda x: x.new_empty(3, 2),
}


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES.keys())
def test_new_tensors_like_a_cache_are_plain_and_read_nothing(make, recwarn):
    cache, plain = new_cache("bhsd")
    got, want = make(cache.transpose(1, 2)), make(plain.transpose(1, 2))
    assert type(got) is torch.Tensor
    assert (got.shape, got.dtype, got.device, got.stride()) == (want.shape, want.dtype, want.device, want.stride())
    assert not [w for w in recwarn if w.category is PackedReadWarning]


@pytest.mark.filterwarnings("ignore::jkv_compile.PackedReadWarning")
def test_values_leave_for_python_and_numpy():
    cache, _ = new_cache()
    plain = materialize(cache)
    assert cache[0, 1, 1, 2].item() == plain[0, 1, 1, 2].item()
    assert cache[0, 1, 1, :3].tolist() == plain[0, 1, 1, :3].tolist()
    assert (cache.numpy() == plain.numpy()).all()
    assert float(cache[0, 0, 0, 0]) == float(plain[0, 0, 0, 0])
    assert (cache == plain).all()
    assert torch.equal(cache, plain)


def test_there_is_no_memory_to_point_at():
    cache, _ = new_cache()
    for take in (lambda: cache.data_ptr(), lambda: torch.from_dlpack(cache)):
        with pytest.raises(PackedCacheError, match="no memory in the layout of its shape"):
            take()


def test_range_written_last_reads_as_it_was_written():
    cache, _ = new_cache(bits=2)
    new = torch.randn(2, 4, 2, 64)
    cache[:, 4:8] = new
    assert torch.equal(materialize(cache)[:, 4:8], new)
    assert torch.equal(materialize(cache[:, 6:10])[:, :2], new[:, 2:])
    cache[:, 8:12] = torch.randn(2, 4, 2, 64)
    assert not torch.equal(materialize(cache)[:, 4:8], new)  # two bits are all that is left of it
    assert isinstance(cache, PackedKV)
