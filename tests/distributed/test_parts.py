"""What needs one process only: merging partial attention, and packed caches as flat bytes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import jkv_compile.distributed as parallel
from jkv_compile import ConfigurationError, PackedCacheError, PackedKV, is_packed, jkv_backend, materialize
from jkv_compile.kernels import reference

from ..caches import AXES, assert_same_bits, new_cache, packed_data
from ..harness import BOUND, relative_error

# ---- merging ----


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [0, 7], [3, 0, 0, 4]], ids=str)
def test_parts_of_the_keys_merge_to_all_of_them(dtype, tolerance, lengths):
    query = torch.randn(2, 4, 3, 32, dtype=dtype)
    key, value = torch.randn(2, 2, 2, sum(lengths), 32, dtype=dtype)
    parts = [parallel.attention(query, k, v) for k, v in zip(key.split(lengths, 2), value.split(lengths, 2))]
    out, lse = parallel.merge(*zip(*parts))
    whole, whole_lse = parallel.attention(query, key, value)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, whole_lse, rtol=tolerance, atol=tolerance)
    plain = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(whole, plain, rtol=tolerance, atol=tolerance)
    first = parallel.merge(*zip(*parts[:2]))
    again = parallel.merge(*zip(first, *parts[2:]))
    torch.testing.assert_close(again[0], out, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("correction", ["taylor", "exact"])
def test_parts_of_a_packed_cache_merge_to_the_corrected_attention_over_all_of_it(correction):
    """The correction is inside of the log-sum-exp: with it left out there, parts would be weighed wrongly."""
    query = 4 * torch.randn(1, 2, 5, 64)
    codes, scales = reference.quantize(torch.randn(1, 2, 24, 64), 2, 32)
    key = torch.randn(1, 2, 6, 64)
    rest = None, False, 0.125, 2, 2, correction
    want, _ = reference.attention(query, codes, scales, codes, scales, [0, 24], key, key, *rest)

    def part(ranges: list[int], current: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.jkv.attention_lse(query, codes, scales, codes, scales, ranges, current, current, *rest)

    parts = [part([0, 10], key[:, :, :0]), part([10, 24], key[:, :, :2]), part([], key[:, :, 2:])]
    torch.testing.assert_close(parallel.merge(*zip(*parts))[0], want, rtol=2e-4, atol=2e-4)
    uncorrected = torch.ops.jkv.attention_lse(
        query, codes, scales, codes, scales, [0, 10], key[:, :, :0], key[:, :, :0], *rest[:-1], "none"
    )
    wrong = parallel.merge([p[0] for p in parts], [uncorrected[1], parts[1][1], parts[2][1]])[0]
    assert relative_error(wrong, want) > 0.01


def test_a_query_that_no_part_sees_gives_zeros():
    out, lse = parallel.merge([torch.zeros(1, 1, 2, 4)] * 2, [torch.full((1, 1, 2), -math.inf)] * 2)
    assert not out.any() and (lse == -math.inf).all()


@pytest.mark.parametrize("shape", [(1, 2, 4), (1, 2, 3, 1), (2, 2, 3)])
def test_merge_refuses_log_sum_exps_of_other_results(shape):
    with pytest.raises(ConfigurationError, match="expected as many of both"):
        parallel.merge([torch.zeros(1, 2, 3, 8)], [torch.zeros(shape)])
    with pytest.raises(ConfigurationError, match="merge of 0 results"):
        parallel.merge([], [])


@pytest.mark.parametrize("spelling", ["this package's attention", "ATen's flash attention", "after a graph break"])
@pytest.mark.parametrize("quantizer", ["rtn", "quarot", "symmetric_unbiased"])
def test_attention_that_hands_out_its_log_sum_exp_is_packed(spelling, quantizer):
    def forward(x: Tensor, cache: dict[str, Tensor], start: int) -> tuple[Tensor, Tensor]:
        end = start + x.shape[1]
        cache["k"][:, start:end] = x
        cache["v"][:, start:end] = 2 * x
        if spelling == "after a graph break":
            torch._dynamo.graph_break()
        q, k, v = (t.transpose(1, 2) for t in (x, cache["k"][:, :end], cache["v"][:, :end]))
        if spelling == "ATen's flash attention":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=0.2)[:2]
        return parallel.attention(q, k, v, scale=0.2)

    backend = jkv_backend(bits=8, inner="aot_eager", quantizer=quantizer)
    compiled = torch.compile(forward, backend=backend)
    caches = [{name: torch.zeros(1, 40, 4, 32) for name in ("k", "v")} for _ in range(2)]
    for call in range(4):
        x = torch.randn(1, 8, 4, 32)
        (out, lse), (want, want_lse) = compiled(x, caches[0], 8 * call), forward(x, caches[1], 8 * call)
        assert out.stride() == want.stride() and relative_error(out, want) < BOUND
        torch.testing.assert_close(lse, want_lse, atol=5e-3, rtol=0)
    assert is_packed(caches[0]["k"]) and is_packed(caches[0]["v"])
    assert all(match.lowering == "fused" for report in backend.reports for match in report.matches)
    assert "attention_active_lse" in backend.reports[-1].after or "attention_lse" in backend.reports[-1].after


def test_log_sum_exp_over_keys_that_are_changed_after_the_read_is_not_corrected_and_says_so():
    def forward(x: Tensor, cache: dict[str, Tensor], start: int) -> tuple[Tensor, Tensor]:
        end = start + x.shape[2]
        cache["k"][:, :, start:end] = x
        cache["v"][:, :, start:end] = x
        return parallel.attention(x, cache["k"][:, :, :end].flip(-1), cache["v"][:, :, :end])

    backend = jkv_backend(bits=8, inner="eager", group_size=16)
    compiled = torch.compile(forward, backend=backend)
    caches = [{name: torch.zeros(1, 2, 40, 32) for name in ("k", "v")} for _ in range(2)]
    for call in range(3):
        x = torch.randn(1, 2, 8, 32)
        (out, lse), (want, want_lse) = compiled(x, caches[0], 8 * call), forward(x, caches[1], 8 * call)
        assert relative_error(out, want) < BOUND
        torch.testing.assert_close(lse, want_lse, atol=5e-3, rtol=0)
    assert is_packed(caches[0]["k"])
    lowerings = {match.lowering for report in backend.reports for match in report.matches}
    assert lowerings == {"dequantized, not corrected: its log-sum-exp is used"}, lowerings


# ---- flat bytes ----


@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizer", ["rtn", "symmetric", "symmetric_unbiased/groups"])
def test_bytes_are_the_cache_bit_for_bit(layout, bits, dtype, quantizer):
    cache, _ = new_cache(layout, bits, dtype=dtype, quantizer=quantizer)
    back = parallel.unpack_bytes(parallel.pack_bytes(cache))
    assert isinstance(back, PackedKV) and back._store is not cache._store
    assert_same_bits(packed_data(back), packed_data(cache))
    assert (back.shape, back.stride(), back.dtype) == (cache.shape, cache.stride(), dtype)
    token = layout.index("s")
    window = cache.narrow(token, 3, 5)
    assert_same_bits(packed_data(parallel.unpack_bytes(parallel.pack_bytes(window))), packed_data(window))


def test_what_is_held_in_full_precision_comes_along_and_writes_go_on():
    cache, _ = new_cache(bits=2)
    cache[:, 4:7] = torch.randn(2, 3, 2, 64)
    back = parallel.unpack_bytes(parallel.pack_bytes(cache))
    assert torch.equal(materialize(back), materialize(cache))
    for tensor in (cache, back):
        tensor[:, 9:11] = torch.ones(2, 2, 2, 64)
    assert torch.equal(materialize(back), materialize(cache))


@pytest.mark.parametrize("quantizer, bits", [("rtn", 3.0), ("symmetric_unbiased", 2.5)])
def test_bytes_of_caches_of_one_shape_are_equally_many_and_few(quantizer, bits):
    caches = [new_cache("bshd", 2, 1, 1024, 4, 128, torch.bfloat16, quantizer)[0] for _ in range(2)]
    caches[1].zero_()
    sizes = {parallel.pack_bytes(cache).numel() for cache in caches}
    assert len(sizes) == 1
    assert caches[0].numel() * 2 / sizes.pop() == pytest.approx(16 / bits, rel=0.01)


def test_safetensors_can_hold_the_bytes(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    cache, _ = new_cache(bits=3)
    safetensors.save_file({"cache": parallel.pack_bytes(cache)}, tmp_path / "cache.safetensors")
    back = parallel.unpack_bytes(safetensors.load_file(tmp_path / "cache.safetensors")["cache"])
    assert_same_bits(packed_data(back), packed_data(cache))


@pytest.mark.parametrize("place, why", [(0, "is no packed cache"), (9, "is of version"), (13, "is damaged: its header"),
                                        (17, "is damaged: its header"), (70, "is damaged: its header"),
                                        (30, "is damaged: codes"), (1023, "is damaged: its header"),
                                        (1024, "is damaged: codes"), (-1, "is damaged: codes")])  # fmt: skip
def test_a_changed_byte_is_an_error(place, why):
    buffer = parallel.pack_bytes(new_cache(bits=2)[0])
    buffer[place] ^= 16
    with pytest.raises(PackedCacheError, match=f"a buffer of {buffer.numel()} bytes {why}"):
        parallel.unpack_bytes(buffer)


def test_exchanged_words_are_an_error():
    """Their sum is the same: the second checksum tells."""
    buffer = parallel.pack_bytes(new_cache(bits=2)[0])
    words = buffer[1024:].view(torch.int64)
    assert words[0] != words[5]
    words[[0, 5]] = words[[5, 0]]
    with pytest.raises(PackedCacheError, match="is damaged: codes"):
        parallel.unpack_bytes(buffer)


@pytest.mark.parametrize("spoil, why", [
    (lambda b: b[:100], "cut short"), (lambda b: b[:-64], "cut short"), (lambda b: torch.cat((b, b)), "not one cache alone"),
    (lambda b: b.view(torch.float32), "expected the bytes"), (lambda b: b[None], "expected the bytes"),
    (lambda b: b"x" * 4096, "unpack_bytes of bytes"), (lambda b: torch.zeros_like(b), "is no packed cache"),
])  # fmt: skip
def test_what_is_no_such_buffer_is_an_error(spoil, why):
    with pytest.raises(PackedCacheError, match=why):
        parallel.unpack_bytes(spoil(parallel.pack_bytes(new_cache(bits=2)[0])))


def test_plain_tensors_and_parts_of_heads_have_no_packed_bytes():
    with pytest.raises(PackedCacheError, match="expected a packed cache"):
        parallel.pack_bytes(torch.zeros(1, 2, 3, 32))
    with pytest.raises(PackedCacheError, match="whole heads"):
        parallel.pack_bytes(new_cache()[0][..., :32])
