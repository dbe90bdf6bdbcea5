"""Views of a packed cache are windows on the same packed data, and read as the plain tensor's views do."""

from __future__ import annotations

import contextlib

import pytest
import torch

from jkv_compile import PackedCacheError, PackedKV, PackedReadWarning, materialize, quantization_step
from tests.caches import assert_agrees, new_cache

MODES = {"grad mode": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}

VIEWS = {
    "slice of tokens": lambda x: x[:, 3:9],
    "slice to the end": lambda x: x[:, 9:],
    "one token": lambda x: x[:, 5],
    "one token, kept": lambda x: x[:, 5:6],
    "one batch entry": lambda x: x[1],
    "slice of heads": lambda x: x[:, :, 1:],
    "slice of a slice": lambda x: x[:, 2:12][:, 3:5],
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(2, 0, 1, 3),
    "matrix transpose": lambda x: x.mT,
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x[:1].squeeze(0),
    "narrow": lambda x: x.narrow(1, 4, 4),
    "half of the channels": lambda x: x.chunk(2, -1)[1],
    "unbind": lambda x: x.unbind(0)[1],
    "split": lambda x: x.split(5, 1)[-1],
    "every other token": lambda x: x[:, ::2],
    "heads merged": lambda x: x[:, 2:6].flatten(2),
    "expanded": lambda x: x.unsqueeze(0).expand(3, -1, -1, -1, -1),
    "unfolded": lambda x: x.unfold(1, 4, 4),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "ellipsis and None": lambda x: x[None, ..., 3:9, :, :],
    "as_strided": lambda x: x.as_strided((2, 4, 2, 64), x.stride(), 256),
}


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def mode(request):
    with request.param():
        yield


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_view_shows_the_same_store(view, mode):
    cache, plain = new_cache()
    seen, want = view(cache), view(plain)
    assert isinstance(seen, PackedKV)
    assert seen._store is cache._store
    assert (seen.shape, seen.stride(), seen.offset) == (want.shape, want.stride(), want.storage_offset())
    whole = materialize(cache)  # what quantization made of it: views must agree with it exactly
    assert torch.equal(materialize(seen), view(whole))


def test_views_agree_for_a_batch_of_one():
    """Tokens are then the outermost dimension that matters, and a view that is no box reads only those it covers."""
    cache, _ = new_cache(batch=1)
    whole = materialize(cache)
    for name, view in VIEWS.items():
        if name not in ("one batch entry", "unbind", "as_strided"):
            assert torch.equal(materialize(view(cache)), view(whole)), name


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_writes_show_through_views_that_were_taken_before(layout):
    cache, _ = new_cache(layout)
    tokens = 1 if layout == "bshd" else 2
    view = cache.narrow(tokens, 4, 8)
    new = torch.randn(view.narrow(tokens, 0, 4).shape)
    cache.narrow(tokens, 6, 4).copy_(new)
    assert_agrees(view.narrow(tokens, 2, 4), new)


def test_reinterpreting_memory_is_refused():
    cache, _ = new_cache()
    with pytest.raises(PackedCacheError, match=r"view\.dtype"):
        cache.view(torch.int32)


def test_empty_slices_read_as_nothing():
    cache, plain = new_cache()
    for view in (lambda x: x[:, 16:], lambda x: x[:, 4:4], lambda x: x[2:]):
        assert materialize(view(cache)).shape == view(plain).shape


@pytest.mark.parametrize("allocated", [True, False], ids=["allocated in inference mode", "allocated outside"])
@pytest.mark.parametrize("used", [True, False], ids=["sliced in inference mode", "sliced outside"])
def test_views_are_inference_tensors_exactly_if_the_cache_is(allocated, used):
    with torch.inference_mode(allocated):
        cache, plain = new_cache()
    with torch.inference_mode(used):
        view = cache[:, 2:5]
        assert view.is_inference() == plain[:, 2:5].is_inference() == allocated
        if used:
            view.copy_(torch.ones(2, 3, 2, 64))
    if used:
        assert torch.equal(materialize(cache)[:, 2:5], torch.ones(2, 3, 2, 64))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_quantization_step_has_the_shape_of_the_view_with_groups_for_channels(layout):
    cache, plain = new_cache(layout, bits=4)
    step = quantization_step(cache)
    groups = plain.unflatten(-1, (-1, 32))
    want = (groups.amax(-1) - groups.amin(-1)) / 15
    torch.testing.assert_close(step, want, rtol=2**-10, atol=0)
    torch.testing.assert_close(quantization_step(cache[1:]), want[1:], rtol=2**-10, atol=0)


def test_quantization_step_wants_a_packed_cache_and_whole_heads():
    cache, plain = new_cache()
    with pytest.raises(TypeError, match=r"expected a packed cache, got Tensor of shape \(2, 16, 2, 64\)"):
        quantization_step(plain)
    with pytest.raises(PackedCacheError, match="shows 32 of 64 channels"):
        quantization_step(cache.chunk(2, -1)[0])


def test_repr_tells_shape_and_bits_and_dequantizes_nothing(recwarn):
    cache, _ = new_cache(bits=2)
    assert (
        repr(cache)
        == "PackedKV(size=(2, 16, 2, 64), dtype=torch.float32, device=cpu, bits=2, group_size=32, quantizer='rtn')"
    )
    assert not [w for w in recwarn if w.category is PackedReadWarning]
