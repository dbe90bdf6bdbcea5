"""Operators for caches whose tokens are stored less centroids (`kernels.clusters`)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from jkv_compile import PackedCacheError
from jkv_compile.kernels import byte_steps, clusters, layout, reference
from jkv_compile.kernels.block_means import blocks, nothing_written
from jkv_compile.kernels.clusters import centroids_of, kmeans, nearest, quantize_odd
from jkv_compile.kernels.quantizers import grid_of

jkv = torch.ops.jkv
HEADS, HEAD_DIM, GROUP, BLOCK, TOKENS = 2, 32, 16, 8, 44  # the last block has four tokens
QUANTIZERS = ("qvg/stages1of1", "qvg/steps8/stages1of3", "qvg/stages3of2", "qvg_asymmetric/stages2of3")


class Cache:
    """A packed cache, and what it is to hold."""

    def __init__(self, bits: int = 8, quantizer: str = QUANTIZERS[2], batch: int = 1, tokens: int = TOKENS):
        self.grid = grid_of(quantizer)
        shape = (batch, HEADS, tokens, HEAD_DIM)
        codes, scales = self.grid.store_shapes(shape, bits, GROUP)
        self.codes = torch.zeros(codes, dtype=torch.uint8)
        self.scales = torch.zeros(scales, dtype=self.grid.scale_dtype)
        self.tables = torch.zeros(batch, HEADS, blocks(tokens, BLOCK), self.grid.tables * HEAD_DIM)
        self.extents = nothing_written(batch, HEADS, tokens, BLOCK)
        self.settings = bits, GROUP, quantizer
        self.plain = torch.zeros(shape)

    @property
    def data(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales, self.tables, self.extents

    def append(self, source: Tensor, start: int) -> None:
        jkv.append_clusters(*self.data, source, start, BLOCK, *self.settings)
        self.plain[:, :, start : start + source.shape[2]] = source

    def fill(self, start: int, stop: int, value: float) -> None:
        jkv.fill_clusters(*self.data, start, stop, BLOCK, *self.settings, value)
        self.plain[:, :, start:stop] = value

    def read(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        stop = self.codes.shape[2] if stop is None else stop
        return jkv.dequantize_clusters(*self.data[:3], [], [], start, stop, BLOCK, *self.settings, dtype)

    def centroids(self, i: int) -> Tensor:
        """Those of a block, `[B, H, stages, C, D]`."""
        return self.tables[:, :, i].unflatten(-1, (self.grid.stages, self.grid.centroids, HEAD_DIM))


def tokens(n: int, batch: int = 1) -> Tensor:
    """Tokens that lie far from zero, each time elsewhere."""
    return torch.randn(batch, HEADS, n, HEAD_DIM) + 5 * torch.randn(batch, HEADS, 1, HEAD_DIM)


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


# ---- against loops ----


def by_hand(cache: Cache, token: Tensor, b: int, h: int, i: int) -> tuple[list[int], Tensor, Tensor]:
    """Which centroids one token is of, the steps of its groups and what it reads as, by loops over a block's tables."""
    bits, rest, of = cache.settings[0], token.clone(), []
    smooth = torch.zeros_like(token)
    for table in cache.centroids(i)[b, h]:
        of.append(min(range(len(table)), key=lambda c, t=table, r=rest: float((r - t[c]).square().sum())))
        rest, smooth = rest - table[of[-1]], smooth + table[of[-1]]
    read, steps = [], []
    for group in rest.split(GROUP):
        if cache.grid.symmetric:
            most = 2 ** (bits - 1) - 1
            scale = (group.abs().max() * 2**bits / most).half().reshape(1, 1, 1, 1, 1)
            if cache.grid.step_bits == 8:
                scale = byte_steps.decode(byte_steps.encode(scale, bits))
            step = scale.float().item() / 2**bits
            read.append((group / step).round().clamp(-most, most) * step if step else 0 * group)
        else:
            codes, scales = reference.quantize(group.reshape(1, 1, 1, -1), bits, GROUP)
            step = reference.quantization_step(scales, bits).item()
            read.append(reference.dequantize(codes, scales, bits).reshape(-1))
        steps.append(step)
    return of, torch.tensor(steps), smooth + torch.cat(read)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_those_of_a_loop_over_tokens_and_stages(quantizer: str, bits: int) -> None:
    torch.manual_seed(0)
    cache = Cache(bits, quantizer)
    source = tokens(20)
    cache.append(source, 8)
    read, steps = cache.read(), reference.quantization_step(cache.scales, bits)
    width = layout.packed_width(HEAD_DIM, bits)
    for head in range(HEADS):
        for token in range(8, 28):
            of, step, want = by_hand(cache, source[0, head, token - 8], 0, head, token // BLOCK)
            assert cache.codes[0, head, token, width:].tolist() == of
            torch.testing.assert_close(steps[0, head, token], step)
            torch.testing.assert_close(read[0, head, token], want, rtol=1e-5, atol=1e-5)


def test_two_bits_of_qvg_are_minus_one_zero_and_one() -> None:
    """The grid of its paper; on it, errors of what is left are no greater than half a step."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 50, HEAD_DIM)
    codes, scales = quantize_odd(x, 2, GROUP, 16)
    unpacked = layout.unpack(codes, 2)
    assert set(unpacked.flatten().tolist()) == {0, 1, 2}
    step = reference.quantization_step(scales, 2).repeat_interleave(GROUP, -1)
    torch.testing.assert_close(
        step, x.unflatten(-1, (-1, GROUP)).abs().amax(-1).repeat_interleave(GROUP, -1), rtol=1e-3, atol=0
    )
    read = (unpacked.float() - 1) * step
    assert ((read - x).abs() <= step / 2 * (1 + 1e-3)).all()
    assert not ((read == 0) & (x.abs() > step * 0.501)).any()


# ---- k-means ----


def test_clusters_that_lie_apart_are_found() -> None:
    torch.manual_seed(0)
    centers = 20 * torch.randn(2, 3, 4, HEAD_DIM)
    which = torch.arange(200) % 4
    x = centers[:, :, which] + 0.01 * torch.randn(2, 3, 200, HEAD_DIM)
    found = kmeans(x, 4)
    assert (found.gather(2, nearest(x, found)[..., None].expand_as(x)) - x).abs().max() < 0.1


@pytest.mark.parametrize("count", [2, 7, 40])
def test_no_token_is_nearer_to_another_centroid_and_centroids_are_means(count: int) -> None:
    """As far as a few iterations go: the distance falls, and lies little above that of ten times as many."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 300, 8)

    def left(centroids: Tensor) -> float:
        return (torch.cdist(x, centroids).amin(-1).square().sum() / x.square().sum()).item()

    found = kmeans(x, count)
    assert torch.equal(nearest(x, found), torch.cdist(x, found).argmin(-1))
    assert left(found) < 0.9 * left(x[:, :, torch.arange(count) * 300 // count])
    more = found
    for _ in range(90):
        more = torch.stack([
            torch.stack([
                x[0, h, nearest(x, more)[0, h] == c].mean(0) if (nearest(x, more)[0, h] == c).any() else more[0, h, c]
                for c in range(count)
            ])
            for h in range(2)
        ])[None]  # fmt: skip
    assert left(more) - 1e-6 <= left(found) < left(more) * 1.06


def test_fewer_tokens_than_centroids_are_centroids_themselves() -> None:
    x = torch.randn(2, 3, 5, HEAD_DIM)
    found = kmeans(x, 8)
    assert torch.equal(found[:, :, :5], x) and not found[:, :, 5:].any()
    assert torch.equal(kmeans(x, 5), x)


def test_long_blocks_are_no_different(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 100, HEAD_DIM)
    want, near = kmeans(x, 6), nearest(x, x[:, :, :6])
    monkeypatch.setattr(clusters, "_AT_A_TIME", 16)
    torch.testing.assert_close(kmeans(x, 6), want)
    assert torch.equal(nearest(x, x[:, :, :6]), near)
    cache = Cache()
    cache.append(tokens(TOKENS), 0)
    read = cache.read(3, 41)
    monkeypatch.undo()
    assert torch.equal(cache.read(3, 41), read)


def test_nothing_is_drawn_from_the_global_generator_and_results_repeat() -> None:
    torch.manual_seed(0)
    source, (one, other) = tokens(TOKENS), (Cache(2), Cache(2))
    state = torch.get_rng_state()
    one.append(source, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    other.append(source, 0)
    assert all(torch.equal(a, b) for a, b in zip(one.data, other.data))


def test_so_many_centroids_as_in_the_paper() -> None:
    assert [centroids_of(n) for n in (8, 111, 224, 4680, 28672, 10**6)] == [1, 1, 2, 41, 256, 256]


# ---- writing ----


@pytest.mark.parametrize("quantizer", [q.replace("/steps8", "") for q in QUANTIZERS])  # too coarse for 8 bits
@pytest.mark.parametrize("seed", range(3))
def test_any_writes_in_any_order_keep_every_token(quantizer: str, seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    cache = Cache(8, quantizer, batch=2)
    for _ in range(20):
        start = draw.randrange(TOKENS)
        stop = min(TOKENS, start + draw.choice((1, 3, 8, 12, 20)))
        before = [x.clone() for x in cache.data]
        if draw.random() < 0.2:
            cache.fill(start, stop, draw.choice((0.0, 1.5)))
        else:
            cache.append(tokens(stop - start, 2), start)
        untouched = [i for i in range(blocks(TOKENS, BLOCK)) if (cache.tables[:, :, i] == before[2][:, :, i]).all()]
        same = [t for t in range(TOKENS) if t // BLOCK in untouched and not start <= t < stop]
        assert torch.equal(cache.codes[:, :, same], before[0][:, :, same])
        assert torch.equal(cache.scales[:, :, :, same], before[1][:, :, :, same])
        assert (cache.read() - cache.plain).abs().max() < 0.4
        assert not cache.plain.any() or error(cache.read(), cache.plain) < 0.02


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_chunks_that_are_written_again_are_as_if_written_once(quantizer: str) -> None:
    torch.manual_seed(0)
    cache, once = Cache(2, quantizer), Cache(2, quantizer)
    for start in range(0, 40, 8):
        for step in range(3):
            chunk = tokens(8)
            cache.append(chunk, start)
            if step == 2:
                once.append(chunk, start)
    assert all(torch.equal(a, b) for a, b in zip(cache.data, once.data))


def test_a_block_that_a_chunk_begins_in_keeps_its_centroids() -> None:
    torch.manual_seed(0)
    cache = Cache(2)
    cache.append(tokens(6), 0)
    before = cache.tables.clone()
    read = cache.read(0, 6)
    cache.append(tokens(10), 6)
    assert torch.equal(cache.tables[:, :, 0], before[:, :, 0]) and not torch.equal(
        cache.tables[:, :, 1], before[:, :, 1]
    )
    assert torch.equal(cache.read(0, 6), read)


def test_stages_and_centroids_leave_less() -> None:
    torch.manual_seed(0)
    source, found = torch.randn(1, HEADS, TOKENS, HEAD_DIM), {}
    for quantizer in ("qvg/stages1of1", "qvg/stages1of4", "qvg/stages2of4", "qvg/stages4of4"):
        cache = Cache(2, quantizer)
        cache.append(source, 0)
        found[quantizer] = error(cache.read(), source)
    assert list(found.values()) == sorted(found.values(), reverse=True) and found["qvg/stages4of4"] < 0.25


def test_two_bits_go_further_where_tokens_are_of_kinds() -> None:
    torch.manual_seed(0)
    kinds = 4 * torch.randn(1, HEADS, 3, HEAD_DIM)
    source = kinds[:, :, torch.arange(40) % 3] + 0.3 * torch.randn(1, HEADS, 40, HEAD_DIM)
    cache = Cache(2, "qvg/steps8/stages1of3")
    cache.append(source, 0)
    plain = reference.dequantize(*reference.quantize(source, 2, GROUP), 2)
    assert error(cache.read(0, 40), source) < 0.15 * error(plain, source)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_numbers_are_exact_in_blocks_that_they_cover(quantizer: str) -> None:
    torch.manual_seed(0)
    cache = Cache(2, quantizer)
    cache.append(tokens(TOKENS), 0)
    cache.fill(8, 24, 1.7)
    cache.fill(40, TOKENS, 0.0)
    assert (cache.read(8, 24) == 1.7).all() and not cache.read(40).any()
    data = [x.clone() for x in cache.data]
    jkv.fill_clusters(*cache.data, 11, 13, BLOCK, *cache.settings, 1.7)  # which they are
    assert all(torch.equal(a, b) for a, b in zip(data, cache.data))
    new, fresh = tokens(BLOCK), Cache(2, quantizer)
    cache.append(new, 16)  # as if nothing had been there
    fresh.append(new, 16)
    assert torch.equal(cache.read(16, 24), fresh.read(16, 24))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_tokens_that_are_no_numbers_stay_in_their_groups(quantizer: str, number: float) -> None:
    torch.manual_seed(0)
    cache, source = Cache(8, quantizer), tokens(BLOCK)
    source[0, 0, 3, 0] = number
    cache.append(source, 0)
    assert cache.tables.isfinite().all()
    damaged = ~cache.read().isfinite()
    assert damaged[0, 0, 3, :GROUP].all() and damaged.sum() == GROUP


def test_entries_and_heads_may_be_written_apart() -> None:
    torch.manual_seed(0)
    cache, new = Cache(batch=2), tokens(5, 2)
    jkv.append_clusters(*(x[1:, :1] for x in cache.data), new[1:, :1], 2, BLOCK, *cache.settings)
    want = torch.zeros(2, HEADS, TOKENS, HEAD_DIM)
    want[1:, :1, 2:7] = new[1:, :1]
    assert error(cache.read(), want) < 0.02 and not cache.read()[0].any()


@pytest.mark.parametrize("start, n", [(-1, 3), (40, 5)])
def test_ranges_outside_of_the_cache_are_refused(start: int, n: int) -> None:
    cache = Cache()
    with pytest.raises(RuntimeError, match=r"append_clusters: tokens .* do not lie within the cache's 44 tokens"):
        jkv.append_clusters(*cache.data, tokens(n), start, BLOCK, *cache.settings)
    with pytest.raises(RuntimeError, match=r"fill_clusters: tokens .* do not lie within the cache's 44 tokens"):
        jkv.fill_clusters(*cache.data, start, start + n, BLOCK, *cache.settings, 0.0)
    assert not cache.codes.any() and not cache.extents.any()


# ---- moving and reading ----


@pytest.mark.parametrize("source, destination, length", [(8, 0, 32), (0, 8, 36), (24, 8, 8), (16, 32, 12), (8, 8, 0)])
def test_whole_blocks_are_moved_bit_for_bit(source: int, destination: int, length: int) -> None:
    torch.manual_seed(0)
    cache = Cache(2)
    cache.append(tokens(30), 0)
    want = cache.read()
    want[:, :, destination : destination + length] = want[:, :, source : source + length].clone()
    jkv.move_means(*cache.data, source, destination, length, BLOCK)
    assert torch.equal(cache.read(), want)
    with pytest.raises(PackedCacheError, match="must be multiples of 8"):
        jkv.move_means(*cache.data, 4, 0, 8, BLOCK)


def test_what_is_held_is_read_as_it_was_written() -> None:
    torch.manual_seed(0)
    cache = Cache(2)
    cache.append(tokens(TOKENS), 0)
    rows = [cache.plain[:, :, 5:9]], [torch.tensor([5, 9])]
    got = jkv.dequantize_clusters(*cache.data[:3], *rows, 3, 20, BLOCK, *cache.settings, torch.float32)
    assert torch.equal(got[:, :, 2:6], cache.plain[:, :, 5:9])
    assert torch.equal(got[:, :, 6:], cache.read(9, 20)) and got.is_contiguous()
    assert cache.read(3, 20, torch.bfloat16).dtype == torch.bfloat16


def test_groups_may_hold_pairs_that_are_turned() -> None:
    """Then what is left lies in groups in another order, and steps are of that."""
    torch.manual_seed(0)
    plain, paired = Cache(2, "qvg/stages2of3"), Cache(2, "qvg/stages2of3/pairs32")
    source = tokens(TOKENS)
    plain.append(source, 0)
    paired.append(source, 0)
    assert torch.equal(plain.tables, paired.tables) and not torch.equal(plain.scales, paired.scales)
    assert abs(error(plain.read(), source) - error(paired.read(), source)) < 0.1 * error(plain.read(), source)


@pytest.mark.parametrize("quantizer, why", [
    ("qvg/stages1of257", "C at most 256"), ("rtn/stages1of4", "expected one of .'qvg', 'qvg_asymmetric'. where"),
    ("qvg/stages0of4", "expected one of"), ("qvg/stages2", "expected one of"), ("qvg/stages1of4/steps8", "in this order"),
])  # fmt: skip
def test_grids_that_are_none(quantizer: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        grid_of(quantizer)


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, "qvg", "qvg_asymmetric/steps8", "qvg/steps8/stages4of256/pairs64"])
def test_grids_are_spelled_as_they_are_read(quantizer: str) -> None:
    assert str(grid_of(quantizer)) == quantizer


# ---- what compilers rely on ----


def written() -> tuple[Any, ...]:
    torch.manual_seed(0)
    cache = Cache(2)
    cache.append(tokens(20), 0)
    return cache.data


GRID = 2, GROUP, QUANTIZERS[2]
CALLS = {
    "append_clusters": lambda: (*written(), tokens(9), 15, BLOCK, *GRID),
    "fill_clusters": lambda: (*written(), 3, 18, BLOCK, *GRID, 1.5),
    "dequantize_clusters": lambda: (*written()[:3], [], [], 3, 20, BLOCK, *GRID, torch.bfloat16),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_are_what_torch_expects_of_them(name: str) -> None:
    torch.library.opcheck(getattr(jkv, name).default, tuple(CALLS[name]()))


def test_every_operator_is_checked() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("jkv::")}
    assert {name for name in names if "_clusters" in name} == {*CALLS}


def test_autocast_does_not_reach_into_them() -> None:
    torch.manual_seed(0)
    cache, other, source = Cache(2), Cache(2), tokens(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        cache.append(source, 0)
        read = cache.read()
    other.append(source, 0)
    assert torch.equal(cache.codes, other.codes) and torch.equal(read, other.read())
