"""Steps of 8 bits (`step_bits=8`): what a float16 step of three fewer digits' precision would be, everywhere."""

from __future__ import annotations

import copy
import io
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor

import jkv_compile.distributed as parallel
from jkv_compile import Config, ConfigurationError, PackedCacheError, jkv_backend, materialize, quantization_step
from jkv_compile.adopt import adopt
from jkv_compile.kernels import byte_steps, reference
from jkv_compile.kernels.quantizers import CLUSTERED, QUANTIZERS, Grid

from .caches import AXES
from .harness import fresh_backend
from .models import SelfAttention

ops = torch.ops.jkv
TOKENWISE = [q for q in QUANTIZERS if q not in ("kivi", *CLUSTERED)]


def every_step() -> Tensor:
    """All finite positive float16 numbers, zero among them."""
    return torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16)


def packed(quantizer: str, bits: int = 2, tokens: int = 24, step_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Codes and scales of a cache `[2, 3, tokens, 64]` in groups of 32."""
    grid = Grid(quantizer, step_bits=step_bits)
    codes_shape, scales_shape = grid.store_shapes((2, 3, tokens, 64), bits, 32)
    return torch.zeros(codes_shape, dtype=torch.uint8), torch.zeros(scales_shape, dtype=grid.scale_dtype)


def written(quantizer: str, bits: int = 2, tokens: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Such a cache full of tokens, and the same codes with the float16 scales that its bytes stand for."""
    torch.manual_seed(0)
    codes, scales = packed(quantizer, bits, tokens)
    ops.append(codes, scales, torch.randn(2, 3, tokens, 64).to(dtype), 0, bits)
    return codes, scales, byte_steps.decode(scales)


# ---- the format ----


def test_steps_are_rounded_to_the_nearest_that_a_byte_holds():
    steps = every_step()
    held = byte_steps.step(byte_steps.encode(steps[:, None], 2)).double()
    holdable = byte_steps.step(torch.arange(0xF8, dtype=torch.uint8)[:, None]).double()
    nearest = (holdable[None] - steps[::37, None].double()).abs().amin(1)
    torch.testing.assert_close((held - steps.double()).abs()[::37], nearest, rtol=0, atol=0)
    normal = (steps >= 2.0**-14) & (steps <= 61440)
    assert ((held - steps.double()).abs() <= steps.double() / 16)[normal].all()
    assert held.max() == 61440 and held[0] == 0


def test_what_a_byte_holds_is_kept_as_it_is():
    scales = torch.arange(0xF8, dtype=torch.uint8)[:, None]
    assert torch.equal(byte_steps.encode(byte_steps.decode(scales), 2), scales)


def test_a_nan_stays_one_and_an_infinity_too():
    scales = torch.tensor([[torch.nan, torch.nan], [torch.inf, 0]], dtype=torch.float16)
    read = byte_steps.decode(byte_steps.encode(scales, 2))
    assert read[0].isnan().all() and read[1, 0] == torch.inf


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_middle_of_the_levels_stays_where_it_was(bits):
    torch.manual_seed(0)
    scales = torch.stack((torch.rand(1000) + 0.1, torch.randn(1000)), -1).half()
    read = byte_steps.decode(byte_steps.encode(scales, bits))
    middle = 1 + (2**bits - 1) / 2 / 2**bits
    before, after = (s[:, 1].double() + middle * s[:, 0].double() for s in (scales, read))
    assert (before - after).abs().max() < 2e-3  # the zero point's own rounding
    assert (scales[:, 0] != read[:, 0]).any()


def test_zero_points_that_are_moved_stay_finite():
    scales = torch.tensor([[60000.0, -65504.0], [65504.0, -65504.0]], dtype=torch.float16)
    read = byte_steps.decode(byte_steps.encode(scales, 2))
    assert read.isfinite().all() and read[:, 0].tolist() == [61440.0, 61440.0]


# ---- operators ----


@pytest.mark.parametrize("quantizer", TOKENWISE)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_those_of_sixteen_bits_and_steps_the_nearest(quantizer, bits):
    torch.manual_seed(0)
    source = torch.randn(2, 3, 7, 64)
    codes, scales = packed(quantizer, bits)
    codes16, scales16 = packed(quantizer, bits, step_bits=16)
    ops.append(codes, scales, source, 5, bits)
    ops.append(codes16, scales16, source, 5, bits)
    assert torch.equal(codes, codes16)
    assert torch.equal(scales, byte_steps.encode(scales16, bits))
    assert not scales[:, :, :, :5].any() and not scales[:, :, :, 12:].any()


@pytest.mark.parametrize("quantizer", ["rtn", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_they_add_little_to_the_error(quantizer, bits):
    torch.manual_seed(0)
    source, errors = torch.randn(2, 3, 200, 64), []
    for step_bits in (16, 8):
        codes, scales = packed(quantizer, bits, 200, step_bits)
        ops.append(codes, scales, source, 0, bits)
        errors.append((ops.dequantize(codes, scales, 0, 200, bits, torch.float32) - source).square().mean())
    assert errors[1] < errors[0] * {2: 1.03, 3: 1.05, 4: 1.15}[bits]


@pytest.mark.parametrize("quantizer", ["rtn", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_read_as_with_the_float16_steps_that_bytes_stand_for(quantizer, dtype):
    codes, scales, halves = written(quantizer, dtype=dtype)
    for start, stop in ((0, 24), (5, 17), (9, 9)):
        want = ops.dequantize(codes, halves, start, stop, 2, dtype)
        assert torch.equal(ops.dequantize(codes, scales, start, stop, 2, dtype), want)
    assert torch.equal(reference.quantization_step(scales, 2), reference.quantization_step(halves, 2))


@pytest.mark.parametrize("quantizer", ["rtn", "symmetric"])
@pytest.mark.parametrize("correction", ["none", "taylor", "clamped", "exact"])
@pytest.mark.parametrize("ranges", [[0, 24], [4, 9, 13, 20], []])
def test_attention_is_that_over_the_float16_steps_that_bytes_stand_for(quantizer, correction, ranges):
    codes, scales, halves = written(quantizer)
    query, key, value = (torch.randn(2, 6, 5, 64), torch.randn(2, 3, 4, 64), torch.randn(2, 3, 4, 64))
    rest = ranges, key, value, None, True, 0.125, 2, 2, correction
    for name in ("attention", "attention_lse"):
        got, want = (getattr(ops, name)(query, codes, s, codes, s, *rest) for s in (scales, halves))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_keys_and_values_need_not_have_the_same():
    codes, scales, halves = written("rtn")
    query, none = torch.randn(2, 3, 5, 64), torch.randn(2, 3, 0, 64)
    rest = [3, 20], none, none, None, False, 0.125, 2, 2, "taylor"
    want = ops.attention(query, codes, halves, codes, halves, *rest)
    for keys, values in ((scales, halves), (halves, scales)):
        torch.testing.assert_close(ops.attention(query, codes, keys, codes, values, *rest), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantizer", ["rtn", "symmetric"])
def test_what_else_writes_tokens(quantizer):
    codes, scales, _ = written(quantizer)
    before = codes.clone(), scales.clone()
    ops.move(codes, scales, 2, 6, 10)  # overlapping
    assert torch.equal(codes[:, :, 6:16], before[0][:, :, 2:12])
    assert torch.equal(scales[:, :, :, 6:16], before[1][:, :, :, 2:12])
    ops.fill(codes, scales, 3, 5, 0.0)
    read = ops.dequantize(codes, scales, 0, 24, 2, torch.float32)
    assert not read[:, :, 3:5].any() and read[:, :, 2].any() and read[:, :, 5].any()
    source, places = torch.randn(2, 3, 2, 64), torch.tensor([9, 1])
    ops.append_at(codes, scales, source, places, 2)
    other = packed(quantizer)
    ops.append(*other, source, 0, 2)
    assert torch.equal(scales[:, :, :, places], other[1][:, :, :, :2])
    _, longer_scales = ops.extend(codes, scales, [0, 4, 9, 10], source, 2)
    assert longer_scales.dtype == torch.uint8 and torch.equal(longer_scales[:, :, :, 5:], other[1][:, :, :, :2])
    assert torch.equal(longer_scales[:, :, :, :4], scales[:, :, :, :4])


def test_constants():
    codes, scales = packed("rtn")
    ops.fill(codes, scales, 0, 4, 2.5)
    assert (ops.dequantize(codes, scales, 0, 4, 2, torch.float32) == 2.5).all()
    codes, scales = packed("symmetric")
    ops.fill_symmetric(codes, scales, 0, 4, 2, -2.5)
    assert ((ops.dequantize(codes, scales, 0, 4, 2, torch.float32) + 2.5).abs() <= 2.5 / 16).all()
    for name in ("fill_rotated", "fill_within"):
        codes, scales, _ = written("quarot")
        getattr(ops, name)(codes, scales, 0, 4, 2, 0.0)
        assert not ops.dequantize(codes, scales, 0, 4, 2, torch.float32).any()
        with pytest.raises(RuntimeError, match="can be filled with zeros only"):
            getattr(ops, name)(codes, scales, 0, 4, 2, 1.0)


@pytest.mark.parametrize("quantizer", ["rtn", "symmetric"])
@pytest.mark.parametrize("name", ["append", "append_kv", "move", "fill", "dequantize", "attention", "attention_lse"])
def test_operators_are_sound(name, quantizer):
    codes, scales, _ = written(quantizer)
    query, key = torch.randn(2, 3, 5, 64), torch.randn(2, 3, 4, 64)
    arguments: dict[str, tuple[Any, ...]] = {
        "append": (codes, scales, key, 3, 2),
        "append_kv": (codes, scales, codes.clone(), scales.clone(), key, key.clone(), 3, 2, 2),
        "move": (codes, scales, 1, 4, 8),
        "fill": (codes, scales, 1, 4, 0.0),
        "dequantize": (codes, scales, 1, 9, 2, torch.float32),
    }
    attention = query, codes, scales, codes, scales, [2, 20], key, key, None, False, 0.125, 2, 2, "taylor"
    torch.library.opcheck(getattr(ops, name).default, arguments.get(name, attention))


def test_a_range_outside_of_the_cache_is_refused_and_nothing_written():
    codes, scales, _ = written("rtn")
    before = scales.clone()
    with pytest.raises(RuntimeError, match="do not lie within"):
        ops.append(codes, scales, torch.randn(2, 3, 4, 64), 22, 2)
    assert torch.equal(scales, before)


# ---- caches ----


def new_cache(quantizer: str, **settings: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    plain = torch.randn(2, 12, 3, 64)
    cache = plain.clone()
    adopt(cache, AXES["bshd"], 2, Config(group_size=32, quantizer=quantizer, step_bits=8, **settings))
    return cache, plain


@pytest.mark.parametrize("quantizer", TOKENWISE)
def test_copies_and_files_hold_the_same_bytes(quantizer):
    cache, plain = new_cache(quantizer)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    others = [
        cache.clone(), copy.deepcopy(cache), cache[:, :], torch.load(file, weights_only=True), torch.cat((cache, cache), 1),
        parallel.unpack_bytes(parallel.pack_bytes(cache)),
    ]  # fmt: skip
    for other in others:
        assert other._store.scales.dtype == torch.uint8
        torch.testing.assert_close(materialize(other)[:, :12], materialize(cache), rtol=0, atol=0)
    assert (materialize(cache) - plain).norm() < 0.6 * plain.norm()
    steps = byte_steps.step(cache._store.scales).float().transpose(2, 3) / 4
    torch.testing.assert_close(quantization_step(cache).transpose(1, 2), steps)


def test_bytes_are_counted():
    for quantizer, bits in (("symmetric", 2 + 8 / 32), ("rtn", 2 + 24 / 32)):
        cache, plain = new_cache(quantizer)
        assert cache._store.packed_bytes * 8 == bits * plain.numel()


def test_caches_of_other_steps_do_not_mix():
    cache, _ = new_cache("rtn")
    other = torch.randn(2, 12, 3, 64)
    adopt(other, AXES["bshd"], 2, Config(group_size=32))
    with pytest.raises(PackedCacheError, match="steps8"):
        cache._store.move(other._store, (0, 0, 0, 0), (0, 0, 0, 0), (2, 3, 4, 64))


@pytest.mark.parametrize("quantizer", ["quarot", "unbiased"])
def test_a_rotated_cache_is_filled_with_zeros_only(quantizer):
    cache, _ = new_cache(quantizer)
    cache[:, 2:5].zero_()
    assert not materialize(cache[:, 2:5]).any()
    with pytest.raises(PackedCacheError, match="no level that is exactly zero"):
        cache[:, 2:5].fill_(1.0)


def test_blocks_of_keys_too():
    cache, plain = new_cache("kivi")
    assert cache._store.scales.shape == (2, 3, 64, 1, 3)
    whole = materialize(cache)
    assert (whole - plain).norm() < 0.6 * plain.norm()


@pytest.mark.parametrize("quantizer", ["symmetric", "symmetric_unbiased"])
def test_offloaded_caches_are_the_same(quantizer):
    results = []
    for offload in (None, "cpu"):
        torch.manual_seed(0)
        model, backend = SelfAttention(), fresh_backend(bits=2, quantizer=quantizer, step_bits=8, offload=offload)
        compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 48)
        with torch.no_grad():
            for start in range(0, 40, 8):
                result = compiled(torch.randn(1, 8, 256), cache, start)
        results.append((result, materialize(cache["k"])))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_settings_that_cannot_be():
    with pytest.raises(ConfigurationError, match="step_bits=4: expected one of"):
        jkv_backend(step_bits=4)
    with pytest.raises(ConfigurationError, match="step_bits=8 with bits=8"):
        jkv_backend(bits=8, step_bits=8)
    with pytest.raises(ConfigurationError, match="step_bits=8 with bits="):
        jkv_backend(bits=(2, 8), step_bits=8)
    with pytest.raises(ConfigurationError, match="3 bytes, which caches in host memory"):
        jkv_backend(step_bits=8, offload="cpu")
    assert jkv_backend(step_bits=8) != jkv_backend()


class TestGraph(expecttest.TestCase):
    def test_a_rewritten_graph_is_that_of_float16_steps(self) -> None:
        texts = []
        for step_bits in (16, 8):
            backend = fresh_backend(step_bits=step_bits, bits=2)
            model = SelfAttention()
            compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 48)
            with torch.no_grad():
                for start in (0, 8, 16):
                    compiled(torch.randn(1, 8, 256), cache, start)
            texts.append([r.after for r in backend.reports if r.outcome == "packed"])
        self.assertEqual(*texts)
        self.assertTrue(texts[0])
