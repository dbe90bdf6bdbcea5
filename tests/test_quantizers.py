"""Packed caches whose channels are rotated before they are quantized: they behave like any other, and never mix."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

from jkv_compile import Config, PackedCacheError, PackedKV, materialize, quantization_step
from jkv_compile.adopt import adopt
from jkv_compile.kernels import reference
from jkv_compile.kernels.quantizers import grid_of, rotate, round_unbiased
from jkv_compile.store import rebuild_store

from .caches import AXES, GROUP, assert_same_bits, packed_data


def new_cache(
    quantizer: str = "quarot", bits: int = 2, layout: str = "bshd", tokens: int = 12
) -> tuple[Tensor, Tensor]:
    plain = torch.randn(2, tokens, 3, 64) if layout == "bshd" else torch.randn(2, 3, tokens, 64)
    cache = plain.clone()
    adopt(cache, AXES[layout], bits, Config(bits=bits, group_size=GROUP, quantizer=quantizer))  # type: ignore[arg-type]
    return cache, plain


def quantized(plain: Tensor, bits: int = 2) -> Tensor:
    """What a rotated cache of `[B, S, H, D]` reads as, written out."""
    rotated = rotate(plain.transpose(1, 2))
    return rotate(reference.dequantize(*reference.quantize(rotated, bits, GROUP), bits)).transpose(1, 2)


@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("bits, bound", [(2, 0.4), (4, 0.1), (8, 0.005)])
def test_adopted_values_read_back_in_their_own_basis(layout, bits, bound):
    cache, plain = new_cache(bits=bits, layout=layout)
    assert (materialize(cache) - plain).norm() < bound * plain.norm()


def test_reads_are_what_the_reference_computes():
    cache, plain = new_cache()
    torch.testing.assert_close(materialize(cache), quantized(plain))
    torch.testing.assert_close(materialize(cache[:, 3:7, 1:2]), quantized(plain)[:, 3:7, 1:2])
    torch.testing.assert_close(materialize(cache[..., 5:9]), quantized(plain)[..., 5:9])


def test_what_was_written_last_reads_exactly_and_the_rest_is_rotated():
    cache, plain = new_cache()
    new = torch.randn(2, 4, 3, 64)
    cache[:, 4:8] = new
    assert torch.equal(materialize(cache[:, 4:8]), new)
    cache[:, 8:9] = 0
    torch.testing.assert_close(materialize(cache[:, :4]), quantized(plain)[:, :4])
    cache[:, 9:10] = new[:, :1]
    torch.testing.assert_close(materialize(cache[:, 4:8]), quantized(new))


def test_steps_are_those_of_the_rotated_channels():
    cache, plain = new_cache()
    _, scales = reference.quantize(rotate(plain.transpose(1, 2)), 2, GROUP)
    torch.testing.assert_close(quantization_step(cache), reference.quantization_step(scales, 2).transpose(1, 2))


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 100.0])
def test_fills_read_as_the_constant(value, bits):
    """Zero exactly; others to the precision of float16, which holds the rotated token."""
    cache, _ = new_cache(bits=bits)
    cache[:, 2:5].fill_(value)
    mask = torch.zeros(1, 12, 1, 1, dtype=torch.bool)
    mask[:, 9] = True
    cache.masked_fill_(mask, value)
    for part in (cache[:, 2:5], cache[:, 9:10]):
        read = materialize(part)
        assert (read - value).abs().max() <= abs(value) * 2.0**-10
        assert value or torch.equal(read, torch.zeros_like(read))


def test_copies_moves_and_rolls_keep_every_bit():
    cache, _ = new_cache()
    before = packed_data(cache)
    for same in (cache.clone(), copy.deepcopy(cache), cache[:, torch.arange(12)]):
        assert same._store.quantizer == "quarot"
        assert_same_bits(packed_data(same), before)
    rolled = torch.cat((cache[:, 4:], cache[:, :4]), 1)
    assert_same_bits(packed_data(rolled), (before[0].roll(-4, 2), before[1].roll(-4, 3)))
    cache[:, 0:4] = cache[:, 8:12]
    assert_same_bits(packed_data(cache[:, 0:4]), (before[0][:, :, 8:], before[1][:, :, :, 8:]))


def test_plain_parts_of_a_concatenation_are_rotated_as_well():
    cache, plain = new_cache()
    new = torch.randn(2, 2, 3, 64)
    joined = torch.cat((cache, new), 1)
    assert torch.equal(materialize(joined)[:, 12:], new)
    joined[:, 13:] = 0
    torch.testing.assert_close(materialize(joined)[:, :12], quantized(plain))
    torch.testing.assert_close(materialize(joined)[:, 12:13], quantized(new)[:, :1])


def test_scattered_writes_are_rotated():
    cache, plain = new_cache()
    new = torch.randn(2, 2, 3, 64)
    cache[:, torch.tensor([7, 2])] = new
    torch.testing.assert_close(materialize(cache)[:, [7, 2]], quantized(new))
    torch.testing.assert_close(materialize(cache)[:, 8:], quantized(plain)[:, 8:])


def test_saved_caches_keep_their_quantizer():
    cache, _ = new_cache()
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, PackedKV) and loaded._store.quantizer == "quarot"
    assert torch.equal(materialize(loaded), materialize(cache))


def test_a_file_with_an_unknown_quantizer_is_refused():
    store = new_cache()[0]._store  # type: ignore[attr-defined]
    with pytest.raises(PackedCacheError, match="quantizer 'ternary'"):
        rebuild_store(store.shape, store.strides, store.dtype, 2, store.codes, store.scales, None, "ternary")


def test_caches_of_different_quantizers_never_exchange_codes():
    rotated, _ = new_cache("quarot")
    other, _ = new_cache("rtn")
    read = materialize(other)
    rotated[:, 0:4] = other[:, 0:4]  # dequantized, rotated, quantized again: its values, not its codes
    assert torch.equal(materialize(rotated[:, 0:4]), read[:, 0:4])
    rotated[:, 3:4] = 0
    torch.testing.assert_close(materialize(rotated[:, 0:3]), quantized(read)[:, 0:3])
    joined = torch.cat((rotated, other), 1)
    assert not isinstance(joined, PackedKV)
    torch.testing.assert_close(joined, torch.cat((materialize(rotated), read), 1))
    with pytest.raises(PackedCacheError, match=r"\(2, 32, 'rtn'\) cannot be copied into one of \(2, 32, 'quarot'\)"):
        rotated._store.move(other._store, (0, 0, 0, 0), (0, 0, 0, 0), (2, 3, 4, 64))  # type: ignore[attr-defined]


# ---- without zero points ----


@pytest.mark.parametrize("quantizer", ["symmetric", "symmetric_quarot", "symmetric_unbiased"])
def test_half_of_the_bytes_beside_the_codes_are_gone(quantizer):
    caches = [new_cache(name)[0] for name in ("rtn", quantizer)]
    codes, scales = zip(*(packed_data(cache) for cache in caches))
    assert codes[0].shape == codes[1].shape and scales[0].shape[:4] == scales[1].shape[:4]
    assert (scales[0].shape[4], scales[1].shape[4]) == (2, 1)
    assert caches[0]._store.packed_bytes - caches[1]._store.packed_bytes == scales[1].nbytes
    assert f"quantizer='{quantizer}'" in repr(caches[1])


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_symmetric_caches_hold_every_constant_that_their_steps_do(bits):
    cache, _ = new_cache("symmetric", bits)
    most = reference.symmetric_max(bits)
    for value in (1.0, -2.5, 100.0, 0.0, most):
        cache[:, 2:5].fill_(value)
        torch.testing.assert_close(materialize(cache[:, 2:5]), torch.full((2, 3, 3, 64), value), rtol=2**-11, atol=0)
    before = packed_data(cache)
    for value in (1.01 * most, float("-inf")):
        with pytest.raises(PackedCacheError, match=f"expected a number of at most {most:.0f}"):
            cache.fill_(value)
    assert_same_bits(packed_data(cache), before)


@pytest.mark.parametrize("quantizer", ["symmetric_quarot", "symmetric_unbiased", "symmetric_unbiased/groups"])
def test_rotated_symmetric_caches_refuse_constants_and_take_zeros(quantizer):
    cache, _ = within(quantizer)
    before = packed_data(cache)
    for write in (lambda: cache.fill_(1.5), lambda: cache[:, 2:4].masked_fill_(torch.ones(1, 2, 1, 1).bool(), -1)):
        with pytest.raises(PackedCacheError, match="expected 0, the only constant that quantizer 'symmetric_"):
            write()
    assert_same_bits(packed_data(cache), before)
    cache[:, 3:6].zero_()
    assert not materialize(cache[:, 3:6]).any()
    assert torch.equal(packed_data(cache[:, 6:])[0], before[0][:, :, 6:])


@pytest.mark.parametrize("mine, others", [("rtn", "symmetric"), ("symmetric", "rtn")])
def test_a_file_whose_zero_points_are_missing_or_too_many_is_refused(mine, others):
    store = new_cache(mine)[0]._store  # type: ignore[attr-defined]
    with pytest.raises(PackedCacheError, match="does not fit its data"):
        rebuild_store(store.shape, store.strides, store.dtype, 2, store.codes, store.scales, None, others)


# ---- grids within groups, for keys that are turned after the read ----

GRIDS = [
    "rtn/pairs64", "quarot/groups", "quarot/pairs64", "unbiased/groups", "unbiased/pairs64",
    "symmetric/pairs64", "symmetric_quarot/groups", "symmetric_unbiased/groups", "symmetric_unbiased/pairs64",
]  # fmt: skip


def within(quantizer: str, bits: int = 2) -> tuple[Tensor, Tensor]:
    plain = torch.randn(2, 12, 3, 128)
    cache = plain.clone()
    adopt(cache, AXES["bshd"], bits, Config(bits=bits, group_size=GROUP), quantizer=quantizer)
    return cache, plain


def on_grid(plain: Tensor, quantizer: str, bits: int = 2) -> Tensor:
    """What a cache of `[B, S, H, 128]` reads as, group by group: channels told by hand, rotated, quantized, and back."""
    stored, (_, _, grid) = grid_of(quantizer), quantizer.partition("/")
    out = torch.empty_like(plain)
    for group in range(4):
        first = 64 * (group // 2) + 16 * (group % 2)
        channels = [*range(first, first + 16), *range(first + 32, first + 48)]
        channels = channels if grid.startswith("pairs") else list(range(32 * group, 32 * group + 32))
        x = plain[..., channels].transpose(1, 2)
        y = rotate(x) if stored.rotates else x
        y = round_unbiased(x, bits, GROUP, stored.symmetric) if stored.unbiased else y
        y = reference.dequantize(*reference.quantize(y, bits, GROUP, symmetric=stored.symmetric), bits)
        out[..., channels] = (rotate(y) if stored.rotates else y).transpose(1, 2)
    return out


@pytest.mark.parametrize("quantizer", GRIDS)
def test_a_group_holds_what_it_is_to_hold_and_nothing_leaves_it(quantizer):
    cache, plain = within(quantizer)
    torch.testing.assert_close(materialize(cache), on_grid(plain, quantizer))
    new = torch.randn(2, 4, 3, 128)
    cache[:, 4:8] = new
    assert torch.equal(materialize(cache[:, 4:8]), new)
    cache[:, torch.tensor([9, 1])] = new[:, :2]
    torch.testing.assert_close(materialize(cache)[:, [9, 1]], on_grid(new[:, :2], quantizer))
    torch.testing.assert_close(materialize(cache)[:, 4:8], on_grid(new, quantizer))
    torch.testing.assert_close(materialize(cache[..., 60:70])[:, 10:], on_grid(plain, quantizer)[:, 10:, :, 60:70])
    value = -2.5 if grid_of(quantizer).holds(-2.5) else 0.0
    cache[:, 2:4].fill_(value)
    torch.testing.assert_close(materialize(cache[:, 2:4]), torch.full((2, 2, 3, 128), value), rtol=1e-3, atol=0)


@pytest.mark.parametrize("quantizer", GRIDS)
def test_grids_are_kept_by_copies_moves_and_files(quantizer):
    cache, _ = within(quantizer)
    before = packed_data(cache)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for same in (cache.clone(), copy.deepcopy(cache), torch.load(file, weights_only=True), cache.roll(12, 1)):
        assert same._store.quantizer == quantizer
        assert_same_bits(packed_data(same), before)
        assert torch.equal(materialize(same), materialize(cache))


@pytest.mark.parametrize("quantizer", ["rtn/pairs96", "rtn/pairs32", "rtn/pairs", "rtn/halves", "/pairs64", 3])
def test_a_file_with_a_grid_that_does_not_fit_is_refused(quantizer):
    store = within("rtn/pairs64")[0]._store  # type: ignore[attr-defined]
    with pytest.raises(PackedCacheError, match="does not fit its data"):
        rebuild_store(store.shape, store.strides, store.dtype, 2, store.codes, store.scales, None, quantizer)


@pytest.mark.parametrize("quantizer, bits, bound", [
    ("unbiased", 2, 0.36), ("unbiased", 4, 0.085), ("unbiased", 8, 0.005),
    ("symmetric_unbiased", 2, 0.36), ("symmetric_unbiased", 4, 0.093), ("symmetric_unbiased", 8, 0.0055),
])  # fmt: skip
def test_unbiased_caches_read_back_in_their_own_basis(quantizer, bits, bound):
    symmetric = grid_of(quantizer).symmetric
    cache, plain = new_cache(quantizer, bits)
    assert (materialize(cache) - plain).norm() < bound * plain.norm()
    cache[:, 4:8] = plain[:, :4]
    cache[:, 7:8] = 0
    rounded = round_unbiased(plain[:, :3].transpose(1, 2), bits, GROUP, symmetric)
    rounded = reference.dequantize(*reference.quantize(rounded, bits, GROUP, symmetric=symmetric), bits)
    want = rotate(rounded).transpose(1, 2)
    torch.testing.assert_close(materialize(cache[:, 4:7]), want)
    assert torch.equal(materialize(cache[:, 7:8]), torch.zeros(2, 1, 3, 64))


@pytest.mark.parametrize("quantizer", GRIDS)
def test_operators_of_grids_pass_opcheck_and_undo_each_other(quantizer):
    x = torch.randn(2, 5, 3, 128).transpose(1, 2)
    ops = torch.ops.jkv
    torch.testing.assert_close(ops.from_grid(ops.to_grid(x, quantizer, GROUP), quantizer, GROUP), x)
    query = torch.randn(2, 3, 4, 128)
    scores = ops.to_grid(query, quantizer, GROUP) @ ops.to_grid(x, quantizer, GROUP).mT
    torch.testing.assert_close(scores, query @ x.mT, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(ops.to_grid.default, (x, quantizer, GROUP))
    torch.library.opcheck(ops.from_grid.default, (x, quantizer, GROUP))


def test_other_operators_of_grids_pass_opcheck():
    torch.library.opcheck(torch.ops.jkv.round_rotated.default, (torch.randn(2, 3, 5, 128).bfloat16(), 2, GROUP))
    codes, scales = reference.quantize(torch.randn(2, 3, 5, 128), 2, GROUP)
    torch.library.opcheck(torch.ops.jkv.fill_within.default, (codes, scales, 1, 3, 2, 1.5))
    with pytest.raises(RuntimeError, match="tokens 4:6 of a cache of 5 tokens"):
        torch.ops.jkv.fill_within(codes, scales, 4, 6, 2, 1.5)
