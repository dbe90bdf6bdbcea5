"""How many tokens share the steps of a channel of keys, where that is not the number of channels in a group."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from jkv_compile import Config, NotRewrittenWarning, PackedCacheError, explain, is_packed, materialize
from jkv_compile.adopt import adopt
from jkv_compile.flat import pack_bytes, unpack_bytes
from jkv_compile.kernels import reference

from .caches import assert_held_exactly, assert_same_bits
from .harness import fresh_backend, relative_error
from .idioms.models import RollingCache
from .models import SelfAttention
from .test_kivi import chunks, in_whole_blocks, read, simulated
from .test_kivi_turned import TURNS, Turned
from .test_kivi_turned import simulated as turned


@pytest.mark.parametrize("correction", ["taylor", "exact", "none"])
@pytest.mark.parametrize("block, length", [(40, 24), (120, 48), (36, 36), (9, 16), (8, 20)])
def test_two_bits_are_what_brute_force_computes(block: int, length: int, correction: str) -> None:
    torch.manual_seed(0)
    model, tokens = SelfAttention(kv_heads=2), max(8 * length, 3 * block)
    backend = fresh_backend(bits=2, quantizer="kivi", block_tokens=block, correction=correction)
    compiled, cache, plain = (
        torch.compile(model, backend=backend),
        model.new_cache(2, tokens),
        model.new_cache(2, tokens),
    )
    errors = []
    with torch.no_grad():
        for call, (start, stop) in enumerate(chunks(tokens - tokens % length, length, 2)):
            x = 2 * torch.randn(2, stop - start, 256)
            with torch.compiler.set_stance("fail_on_recompile" if call > 4 else "default"):
                got = compiled(x, cache, start)
            full = model(x, plain, start)
            want = simulated(model, x, plain, start, 2, correction, block - 1, block=block)
            assert relative_error(got, want) < 1e-5
            errors.append(relative_error(got, full))
    assert max(errors) > 1e-3
    store = cache["k"]._store
    assert (store.block, store.group_size, store.window) == (block, block, (0, block - 1))
    assert cache["v"]._store.group_size == 32 and cache["v"]._store.window == (0, block - 1)
    assert_held_exactly(cache["k"], plain["k"].transpose(1, 2))


@pytest.mark.parametrize("block", [40, 120])
def test_keys_that_are_turned_after_they_are_read(block: int) -> None:
    torch.manual_seed(0)
    model = Turned(TURNS["halves"], heads=2, head_dim=32)
    backend = fresh_backend(bits=2, quantizer="kivi", block_tokens=block)
    compiled, cache, plain = torch.compile(model, backend=backend), model.new_cache(1, 360), model.new_cache(1, 360)
    with torch.no_grad():
        for start in range(0, 336, 24):
            x = 2 * torch.randn(1, 24, 64)
            got, full = compiled(x, cache, start), model(x, plain, start)
            assert relative_error(got, turned(model, x, plain, start, 2, "taylor", block - 1, block)) < 1e-5
    assert relative_error(got, full) > 1e-3


class Evicting(RollingCache):
    """Drops the oldest chunk behind the sink, so many tokens, as soon as the cache is full."""

    def __init__(self, sink: int, tokens: int, chunk: int) -> None:
        super().__init__(sink, tokens)
        self.chunk = chunk

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        last = min(start, self.tokens - self.chunk)
        if start > last:
            for name in ("k", "v"):
                old = cache[name][:, self.sink + self.chunk :].clone()
                cache[name][:, self.sink : self.tokens - self.chunk] = old
        cache["k"][:, last : last + self.chunk], cache["v"][:, last : last + self.chunk] = k, v
        return self.sdpa(q, cache["k"][:, : last + self.chunk], cache["v"][:, : last + self.chunk])


@pytest.mark.parametrize("block, sink, chunk", [(40, 40, 120), (120, 120, 240), (39, 78, 39)])
def test_chunks_that_blocks_divide_roll_bit_for_bit(block: int, sink: int, chunk: int) -> None:
    """As 4,680 tokens do, of which 32 and 64 are no divisors, and these are."""
    assert 4680 % block == 0
    torch.manual_seed(0)
    model = Evicting(sink, sink + 3 * chunk, chunk)
    compiled = torch.compile(model, backend=fresh_backend(bits=2, quantizer="kivi", block_tokens=block))
    cache, plain = model.new_cache(), model.new_cache()
    with torch.no_grad():
        compiled(torch.zeros(1, chunk, 64), cache, 0), model(torch.zeros(1, chunk, 64), plain, 0)
        for call in range(6):
            x, start = torch.randn(1, chunk, 64), sink + chunk * call
            with torch.compiler.set_stance("fail_on_recompile" if call > 4 else "default"):
                compiled(x, cache, start)
            model(x, plain, start)
            keys = plain["k"].transpose(1, 2)[:, :, : min(start, sink + 2 * chunk) + chunk]
            codes, scales = reference.quantize(keys, 2, 1, block)
            store = cache["k"]._store
            blocks = keys.shape[2] // block
            assert_same_bits(
                (store.codes[:, :, : keys.shape[2]], store.scales[:, :, :, :blocks].contiguous()), (codes, scales)
            )
            assert_held_exactly(cache["k"], plain["k"].transpose(1, 2))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_other_rolls_are_refused_and_the_way_out_is_named(inner: str) -> None:
    torch.manual_seed(0)
    model = Evicting(40, 160, 60)
    compiled = torch.compile(model, backend=fresh_backend(quantizer="kivi", block_tokens=40, inner=inner))
    cache = model.new_cache()
    with torch.no_grad():
        for start in (0, 60, 90):
            compiled(torch.randn(1, 60, 64), cache, start)
        before = materialize(cache["k"])
        with pytest.raises(PackedCacheError, match=r"must be multiples of 40, .* another number \(block_tokens="):
            compiled(torch.randn(1, 60, 64), cache, 150)
    assert torch.equal(materialize(cache["k"]), before)


def test_a_roll_by_another_number_in_the_first_graph_is_no_reason_to_fail() -> None:
    torch.manual_seed(0)
    model = Evicting(40, 160, 60)
    backend = fresh_backend(quantizer="kivi", block_tokens=40)
    compiled, cache, plain = torch.compile(model, backend=backend), model.new_cache(), model.new_cache()
    with torch.no_grad(), pytest.warns(NotRewrittenWarning, match="that 40 divides, not .*; choose block_tokens= so"):
        x = torch.randn(1, 60, 64)
        assert relative_error(compiled(x, cache, 300), model(x, plain, 300)) < 1e-5
    assert not is_packed(cache["k"])


def packed(block: int = 40, tokens: int = 100, bits: int = 2) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    plain = torch.randn(2, 2, tokens, 64)
    cache = plain.clone()
    adopt(cache, (0, 1, 2, 3), bits, Config(bits, quantizer="kivi", block_tokens=block))
    return cache, plain


@pytest.mark.parametrize("block, tokens", [(40, 100), (120, 100), (120, 250), (9, 100)])
def test_saved_and_sent_caches_keep_their_blocks(block: int, tokens: int) -> None:
    cache, plain = packed(block, tokens)
    assert_same_bits(cache._store.data(), reference.quantize(in_whole_blocks(plain, block), 2, 1, block))
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=True), unpack_bytes(pack_bytes(cache)), cache.clone()):
        assert_same_bits(other._store.data(), cache._store.data())
        assert (other._store.block, other._store.window) == (block, (0, block - 1))
        assert torch.equal(materialize(other), materialize(cache))


def test_eager_writes_inside_of_blocks() -> None:
    cache, plain = packed(40, 100, 8)
    for start, stop in ((0, 3), (35, 85), (95, 100), (40, 80)):
        new = torch.randn(2, 2, stop - start, 64)
        cache[:, :, start:stop], plain[:, :, start:stop] = new, new
        assert (materialize(cache) - plain).abs().max() < 0.05
        assert_held_exactly(cache, plain)
    with pytest.raises(PackedCacheError, match=r"multiples of 40, .* choose another quantizer or block_tokens"):
        cache[:, :, :30].copy_(cache[:, :, 10:40])


def test_reports_count_every_byte_and_name_the_blocks() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, quantizer="kivi", block_tokens=40)
    model = SelfAttention(kv_heads=2).bfloat16()
    compiled, cache = torch.compile(model, backend=backend), model.new_cache(2, 210, torch.bfloat16)
    with torch.no_grad():
        for start in (0, 50):
            compiled(torch.randn(2, 50, 256).bfloat16(), cache, start)
        told = explain(model, torch.randn(2, 50, 256).bfloat16(), cache, 100, bits=2, quantizer="kivi", block_tokens=40)
    rows = 2 * 2 * 2 * 39 * 64 * 2
    keys, values = 2 * 2 * (240 * 16 + 6 * 64 * 4), 2 * 2 * 210 * (16 + 2 * 4)
    assert backend.memory().packed_bytes == keys + values + 2 * rows
    report = next(r for r in backend.reports if r.outcome == "adopted")
    uses = [use for match in report.matches for use in match.caches]
    assert [use.packed_bytes for use in uses] == [keys + rows, values + rows]
    assert [str(use).split(" bits ")[1].split(",")[0] for use in uses] == [
        "by channel in blocks of 40 tokens",
        "in groups of 32",
    ]
    assert {use.recent for match in told.matches for use in match.caches} == {39}


def test_group_size_says_how_many_unless_it_is_given() -> None:
    assert Config(quantizer="kivi", group_size=64).window == (0, 63)
    assert Config(quantizer="kivi", group_size=64, block_tokens=40).window == (0, 39)
    assert Config(quantizer="kivi", block_tokens=120, recent=200, sink=3).window == (3, 200)
    assert Config(quantizer="kivi", block_tokens=40) != Config(quantizer="kivi")
    keys, _ = read(torch.randn(1, 1, 45, 8), 8, 40)
    assert keys.shape[2] == 45
