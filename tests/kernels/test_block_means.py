"""Operators for caches whose tokens are stored less a mean for each block of them (`kernels.block_means`)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from jkv_compile import PackedCacheError
from jkv_compile.kernels import block_means as rules
from jkv_compile.kernels import ops, reference
from jkv_compile.kernels.grids import stored
from jkv_compile.kernels.quantizers import grid_of

jkv = torch.ops.jkv
HEADS, HEAD_DIM, GROUP, BLOCK, TOKENS = 2, 32, 16, 8, 44  # the last block has four tokens


class Cache:
    """A packed cache, and what it is to hold: a mean per block, and tokens less it."""

    def __init__(self, batch: int = 1, bits: int = 8, quantizer: str = "rtn", dtype: torch.dtype = torch.float32):
        shape = (batch, HEADS, TOKENS, HEAD_DIM)
        codes, scales = grid_of(quantizer).store_shapes(shape, bits, GROUP)
        self.codes, self.scales = torch.zeros(codes, dtype=torch.uint8), torch.zeros(scales, dtype=torch.float16)
        self.means = torch.zeros(batch, HEADS, rules.blocks(TOKENS, BLOCK), HEAD_DIM, dtype=dtype)
        self.extents = rules.nothing_written(batch, HEADS, TOKENS, BLOCK)
        self.grid = bits, GROUP, quantizer
        self.plain = torch.zeros(shape, dtype=dtype)  # what it stands for
        self.wanted = torch.zeros_like(self.means)
        self.written: list[set[int]] = [set() for _ in range(self.means.shape[2])]
        self.numbers = [0.0] * self.means.shape[2]  # of tokens that nothing has been written to

    @property
    def data(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales, self.means, self.extents

    def append(self, source: Tensor, start: int) -> set[int]:
        """Returns the blocks that get another mean."""
        jkv.append_means(*self.data, source, start, BLOCK, *self.grid)
        stop, changed = start + source.shape[2], set()
        self.plain[:, :, start:stop] = source
        for i in range(start // BLOCK, rules.blocks(stop, BLOCK)):
            a, b = max(start, i * BLOCK), min(stop, (i + 1) * BLOCK)
            if self.written[i] <= {*range(a, b)}:
                self.wanted[:, :, i] = self.plain[:, :, a:b].float().mean(2)
                changed.add(i)
            self.written[i] |= {*range(a, b)}
        return changed

    def fill(self, start: int, stop: int, value: float) -> None:
        jkv.fill_means(*self.data, start, stop, BLOCK, *self.grid, value)
        self.plain[:, :, start:stop] = value
        for i in range(start // BLOCK, rules.blocks(stop, BLOCK)):
            if start <= i * BLOCK and min((i + 1) * BLOCK, TOKENS) <= stop:
                self.written[i], self.numbers[i], self.wanted[:, :, i] = set(), value, value
            elif self.numbers[i] != value:
                self.written[i] |= {*range(max(start, i * BLOCK), min(stop, (i + 1) * BLOCK))}

    def read(self, start: int = 0, stop: int = TOKENS) -> Tensor:
        return jkv.dequantize_means(
            self.codes, self.scales, self.means, [], [], start, stop, BLOCK, *self.grid, self.plain.dtype
        )


def tokens(n: int, batch: int = 1) -> Tensor:
    """Tokens that lie far from zero, each time elsewhere."""
    return torch.randn(batch, HEADS, n, HEAD_DIM) + 5 * torch.randn(batch, HEADS, 1, HEAD_DIM)


def close(got: Tensor, want: Tensor, bound: float = 0.02) -> None:
    assert (got.float() - want.float()).norm().item() <= bound * want.float().norm().item()


# ---- writing ----


@pytest.mark.parametrize(
    "quantizer", ["rtn", "symmetric", "quarot", "unbiased", "symmetric_unbiased", "unbiased/groups"]
)
@pytest.mark.parametrize("seed", range(3))
def test_any_writes_in_any_order_keep_every_token(quantizer: str, seed: int) -> None:
    """Means are those of what is written to a block that is covered or new, and nothing else changes."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    cache = Cache(2, quantizer=quantizer)
    for _ in range(20):
        start = draw.randrange(TOKENS)
        stop = min(TOKENS, start + draw.choice((1, 3, 8, 12, 20)))
        before = [x.clone() for x in cache.data[:2]]
        changed: set[int] = set()
        if draw.random() < 0.2:
            cache.fill(start, stop, draw.choice((0.0, 1.5)) if quantizer == "rtn" else 0.0)
        else:
            changed = cache.append(tokens(stop - start, 2), start)
        untouched = [t for t in range(TOKENS) if t // BLOCK not in changed and not start <= t < stop]
        assert torch.equal(cache.codes[:, :, untouched], before[0][:, :, untouched])
        assert torch.equal(cache.scales[:, :, :, untouched], before[1][:, :, :, untouched])
        torch.testing.assert_close(cache.means, cache.wanted)
        told = [[number, min(of) % BLOCK, max(of) % BLOCK + 1] if of else [number, 0, 0]
                for number, of in zip(cache.numbers, cache.written)]  # fmt: skip
        assert (cache.extents == torch.tensor(told, dtype=torch.float64)).all()
        assert (cache.read() - cache.plain).abs().max() < 0.25
        close(cache.read(), cache.plain)


def test_codes_are_those_of_tokens_less_the_mean_in_float32() -> None:
    torch.manual_seed(0)
    cache = Cache(bits=2, dtype=torch.bfloat16)
    source = tokens(24).bfloat16()
    cache.append(source, 8)
    mean = source.float().unflatten(2, (3, BLOCK)).mean(3).bfloat16()
    assert torch.equal(cache.means[:, :, 1:4], mean)
    shifted = source.float() - mean.float().repeat_interleave(BLOCK, 2)
    codes, scales = reference.quantize(shifted, 2, GROUP)
    assert torch.equal(cache.codes[:, :, 8:32], codes) and torch.equal(cache.scales[:, :, :, 8:32], scales)
    assert cache.read().dtype == torch.bfloat16


def test_what_is_written_again_has_a_mean_of_its_own_again() -> None:
    """As denoising steps write a chunk that begins and ends inside of blocks; others of its blocks keep theirs."""
    torch.manual_seed(0)
    cache = Cache()
    for _ in range(3):
        first = tokens(6)
        assert cache.append(first, 6) == {0, 1}
    torch.testing.assert_close(cache.means[:, :, 0], first[:, :, :2].mean(2))
    for _ in range(3):
        second = tokens(12)
        assert cache.append(second, 12) == {2}  # and block 1 has tokens of both
    torch.testing.assert_close(cache.means[:, :, 1], first[:, :, 2:].mean(2))
    torch.testing.assert_close(cache.means[:, :, 2], second[:, :, 4:].mean(2))
    close(cache.read(), cache.plain)
    assert (cache.read(0, 6).abs() < 0.1).all()


def test_two_bits_go_further_where_blocks_lie_far_from_zero() -> None:
    torch.manual_seed(0)
    cache, source = Cache(bits=2), torch.cat([tokens(BLOCK) for _ in range(5)], 2)
    cache.append(source, 0)
    plain = reference.dequantize(*reference.quantize(source, 2, GROUP), 2)
    assert (cache.read(0, 40) - source).norm() < 0.5 * (plain - source).norm()


def test_numbers_are_exact_in_blocks_that_they_cover() -> None:
    torch.manual_seed(0)
    cache = Cache(bits=2, quantizer="unbiased")
    cache.append(tokens(TOKENS), 0)
    jkv.fill_means(*cache.data, 8, TOKENS, BLOCK, *cache.grid, 0.7)
    assert (cache.read(8) == 0.7).all() and (cache.extents[:, :, 1:, 0] == torch.tensor(0.7).item()).all()
    data = [x.clone() for x in cache.data]
    jkv.fill_means(*cache.data, 11, 13, BLOCK, *cache.grid, 0.7)  # which they are
    assert all(torch.equal(a, b) for a, b in zip(data, cache.data))
    new = tokens(BLOCK)
    cache.append(new, 16)  # as if nothing had been there
    torch.testing.assert_close(cache.means[:, :, 2], new.mean(2))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_tokens_that_are_no_numbers_stay_in_their_groups(number: float) -> None:
    torch.manual_seed(0)
    cache, source = Cache(), tokens(BLOCK)
    source[0, 0, 3, 0] = number
    cache.append(source, 0)
    assert cache.means.isfinite().all()
    damaged = ~cache.read().isfinite()
    assert damaged[0, 0, 3, :GROUP].all() and damaged.sum() == GROUP


def test_entries_and_heads_may_be_written_apart() -> None:
    torch.manual_seed(0)
    cache = Cache(2)
    new = tokens(5, 2)
    part = [x[1:, :1] for x in cache.data]
    jkv.append_means(*part, new[1:, :1], 2, BLOCK, *cache.grid)
    whole = tokens(4, 2)
    jkv.append_means(*cache.data, whole, 3, BLOCK, *cache.grid)
    want = torch.zeros(2, HEADS, TOKENS, HEAD_DIM)
    want[1:, :1, 2:7] = new[1:, :1]
    want[:, :, 3:7] = whole
    close(cache.read(), want)


@pytest.mark.parametrize("start, n", [(-1, 3), (40, 5)])
def test_ranges_outside_of_the_cache_are_refused(start: int, n: int) -> None:
    cache = Cache()
    with pytest.raises(RuntimeError, match="do not lie within the cache's 44 tokens"):
        cache.append(tokens(n), start)
    with pytest.raises(RuntimeError, match="do not lie within the cache's 44 tokens"):
        jkv.fill_means(*cache.data, start, start + n, BLOCK, *cache.grid, 0.0)
    assert not cache.codes.any()
    cache.append(tokens(0), 3)
    assert not cache.extents.any()


# ---- moves ----


@pytest.mark.parametrize("source, destination, length", [(8, 0, 32), (0, 8, 36), (24, 8, 8), (16, 32, 12), (8, 8, 0)])
def test_whole_blocks_are_moved_bit_for_bit(source: int, destination: int, length: int) -> None:
    torch.manual_seed(0)
    cache = Cache(bits=2)
    cache.append(tokens(30), 0)
    want = cache.read()
    want[:, :, destination : destination + length] = want[:, :, source : source + length].clone()
    jkv.move_means(*cache.data, source, destination, length, BLOCK)
    assert torch.equal(cache.read(), want)


@pytest.mark.parametrize("source, destination, length", [(4, 0, 8), (8, 4, 8), (8, 0, 12)])
def test_parts_of_blocks_are_not_moved(source: int, destination: int, length: int) -> None:
    torch.manual_seed(0)
    cache = Cache()
    cache.append(tokens(TOKENS), 0)
    before = cache.read()
    with pytest.raises(PackedCacheError, match=r"must be multiples of 8.*choose center_tokens"):
        jkv.move_means(*cache.data, source, destination, length, BLOCK)
    with pytest.raises(RuntimeError, match="do not lie within"):
        jkv.move_means(*cache.data, 0, 40, 8, BLOCK)
    assert torch.equal(cache.read(), before)


# ---- attention ----

RANGES = {"blocks": (0, 32), "parts of blocks": (3, 21), "two": (0, 5, 13, 30), "one block": (9, 14), "none": (4, 4)}


def arguments(
    batch: int = 2, bits: int = 2, quantizer: str = "rtn", mask: str = "none", correction: str = "taylor",
    sides: str = "both", ranges: tuple[int, ...] = RANGES["two"], current: int = 3, kv_heads: int = HEADS,
    held: bool = False, causal: bool = False, dtype: torch.dtype = torch.float32,
) -> list[Any]:  # fmt: skip
    """Of `attention_means`: tokens less means of blocks of eight, keys' or values' or both's."""
    torch.manual_seed(0)
    caches, lists = [Cache(batch, bits, quantizer), Cache(batch, bits, quantizer)], []
    for cache in caches:
        for start in range(0, TOKENS, BLOCK):
            cache.append(tokens(min(BLOCK, TOKENS - start), batch) / 3, start)
        rows = cache.plain[:, :, 12:16].clone()
        lists.append(([rows], [torch.tensor([12, 16])]) if held else ([], []))
    key, value = (tokens(current, batch).to(dtype) for _ in range(2))
    query = torch.randn(batch, 2 * HEADS, 5, HEAD_DIM).to(dtype)
    if grid_of(quantizer).rotates:
        query, key, value = (jkv.rotate(x) for x in (query, key, value))
        lists = [([jkv.rotate(x) for x in rows], told) for rows, told in lists]
    means = []
    for side, cache in zip(("keys", "values"), caches):
        of = jkv.rotate(cache.means) if grid_of(quantizer).rotates else cache.means
        means += [of, BLOCK] if sides in (side, "both") else [None, 0]
    columns = sum(ranges[1::2]) - sum(ranges[::2]) + current
    seen = torch.rand(batch, 1, 5, columns) > 0.4
    seen[:, :, 1] = False  # nothing
    masks = {
        "none": None, "boolean": seen, "additive": torch.randn(5, columns).masked_fill(~seen[0, 0], -torch.inf),
        "one column": torch.randn(batch, 4, 5, 1),
    }  # fmt: skip
    packed = [x for cache in caches for x in (cache.codes, cache.scales)]
    (key_held, key_told), (value_held, value_told) = lists
    return [
        query, *packed, *means, key_held, key_told, value_held, value_told, list(ranges), key, value, masks[mask],
        causal, 0.2, bits, bits, correction,
    ]  # fmt: skip


def expected(given: list[Any]) -> tuple[Tensor, Tensor]:
    """One softmax over all keys, each as it reads."""
    query, *packed = given[:5]
    key_means, key_block, value_means, value_block, *held = given[5:13]
    ranges, key, value, mask, causal, scale, bits, _, correction = given[13:]
    read, delta = [], reference.quantization_step(packed[1], bits)
    for (codes, scales), means, block, rows, told in (
        (packed[:2], key_means, key_block, *held[:2]), (packed[2:], value_means, value_block, *held[2:]),
    ):  # fmt: skip
        whole = reference.dequantize(codes, scales, bits)
        if means is not None:
            whole = whole + means.float().repeat_interleave(block, 2)[:, :, : whole.shape[2]]
        for x, (start, stop) in zip(rows, (t.tolist() for t in told)):
            whole[:, :, start:stop] = x
            delta[:, :, start:stop] = 0
        read.append(whole)
    chosen = [t for a, b in zip(ranges[::2], ranges[1::2]) for t in range(a, b)]
    repeats = query.shape[1] // key.shape[1]
    keys, values, delta = (
        t.repeat_interleave(repeats, 1)
        for t in (
            torch.cat((read[0][:, :, chosen], key.float()), 2), torch.cat((read[1][:, :, chosen], value.float()), 2),
            delta[:, :, chosen],
        )
    )  # fmt: skip
    scores = scale * query.float() @ keys.mT
    scores[..., : len(chosen)] -= reference.correction_bias(query, delta, scale, correction)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        current = key.shape[2]
        visible = torch.ones(query.shape[2], current, dtype=torch.bool).tril(current - query.shape[2])
        scores[..., len(chosen) :] = scores[..., len(chosen) :].masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0) @ values, lse


def check(given: list[Any], tolerance: float = 1e-4) -> None:
    want, want_lse = expected(given)
    got, lse = jkv.attention_means_lse(*given)
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, want_lse, rtol=tolerance, atol=tolerance)
    assert torch.equal(jkv.attention_means(*given), got) and got.dtype == given[0].dtype
    if tolerance == 1e-4:
        moved = [None if x is None else x + 1 for x in (given[5], given[7])]
        other = jkv.attention_means(*given[:5], moved[0], given[6], moved[1], *given[8:])
        assert sum(given[13][1::2]) == sum(given[13][::2]) or (other - got).abs().max() > 0.01


@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "one column"])
@pytest.mark.parametrize("ranges", RANGES)
def test_attention_is_that_of_tokens_as_they_read(ranges: str, mask: str) -> None:
    check(arguments(ranges=RANGES[ranges], mask=mask))


@pytest.mark.parametrize("settings", [
    {"correction": "none"}, {"correction": "clamped"}, {"correction": "exact"}, {"sides": "keys"}, {"sides": "values"},
    {"held": True}, {"held": True, "mask": "boolean"}, {"held": True, "mask": "additive", "ranges": (0, 14)},
    {"quantizer": "quarot", "bits": 4}, {"quantizer": "unbiased", "bits": 3, "held": True}, {"current": 0},
    {"current": 0, "mask": "boolean"}, {"causal": True}, {"causal": True, "current": 5}, {"current": 0, "ranges": ()},
], ids=str)  # fmt: skip
def test_attention_of_every_kind(settings: dict[str, Any]) -> None:
    given = arguments(**settings)
    if given[0].numel() and not settings.get("ranges", True):
        got, lse = jkv.attention_means_lse(*given)
        assert not got.any() and (lse == -torch.inf).all()
        return
    check(given)


def test_keys_and_values_may_have_means_of_blocks_of_other_lengths() -> None:
    given = arguments(ranges=(2, 41))
    given[7], given[8] = torch.randn(2, HEADS, 4, HEAD_DIM), 12
    check(given)


def test_attention_in_half_precision() -> None:
    check(arguments(dtype=torch.bfloat16, mask="boolean"), 0.03)


def test_what_is_held_is_read_as_it_was_written() -> None:
    torch.manual_seed(0)
    cache = Cache(bits=2, quantizer="unbiased")
    cache.append(tokens(TOKENS), 0)
    settings = BLOCK, *cache.grid, torch.float32
    rows = [cache.plain[:, :, 5:9]], [torch.tensor([5, 9])]
    got = jkv.dequantize_means(cache.codes, cache.scales, cache.means, *rows, 3, 20, *settings)
    assert torch.equal(got[:, :, 2:6], cache.plain[:, :, 5:9])
    assert torch.equal(got[:, :, 6:], cache.read(9, 20)) and got.is_contiguous()


# ---- what compilers rely on ----


def written() -> tuple[Any, ...]:
    torch.manual_seed(0)
    cache = Cache(bits=2)
    cache.append(tokens(20), 0)
    return cache.data


GRID = 2, GROUP, "rtn"
CALLS = {
    "append_means": lambda: (*written(), tokens(9), 15, BLOCK, *GRID),
    "fill_means": lambda: (*written(), 3, 18, BLOCK, *GRID, 1.5),
    "move_means": lambda: (*written(), 8, 0, 16, BLOCK),
    "dequantize_means": lambda: (*written()[:3], [], [], 3, 20, BLOCK, *GRID, torch.bfloat16),
    "attention_means": lambda: arguments(1, held=True, mask="boolean"),
    "attention_means_lse": lambda: arguments(1, sides="values"),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_are_what_torch_expects_of_them(name: str) -> None:
    torch.library.opcheck(getattr(jkv, name).default, tuple(CALLS[name]()))


def test_every_operator_is_checked() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("jkv::")}
    assert {name for name in names if "_means" in name} == {*CALLS}


def test_operators_that_write_say_so() -> None:
    for name in ("append_means", "fill_means", "move_means"):
        *data, _ = [x.clone() for x in written()], None
        given = CALLS[name]()
        getattr(jkv, name)(*given)
        changed = [not torch.equal(a, b) for a, b in zip(data[0], given)]
        declared = [argument.is_write for argument in getattr(jkv, name).default._schema.arguments[:4]]
        assert all(declared) and any(changed)


def test_autocast_does_not_reach_into_them() -> None:
    given = arguments(1)
    with torch.autocast("cpu", torch.bfloat16):
        got = jkv.attention_means(*given)
    torch.testing.assert_close(got, expected(given)[0], rtol=1e-4, atol=1e-4)
    assert stored(torch.ones(1, 1, 1, 16), 2, 16, "rtn").dtype == torch.float32 and ops is not None
