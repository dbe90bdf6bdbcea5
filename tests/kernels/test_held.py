"""What is held in full precision beside a packed cache: never stale, held where it should be, and attended as it is."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from jkv_compile.kernels import held as rules
from jkv_compile.kernels import reference

jkv = torch.ops.jkv
TOKENS, HEAD_DIM = 40, 32


class Beside:
    """Held rows beside a plain cache `[B, H, S, D]` that is written alike."""

    def __init__(self, sink: int, recent: int, batch: int = 1, tokens: int = TOKENS) -> None:
        self.plain = torch.zeros(batch, 2, tokens, HEAD_DIM)
        self.held = torch.zeros(batch, 2, sink + 2 * recent, HEAD_DIM)
        self.ranges = rules.no_ranges(batch, sink, recent)

    def write(self, start: int, n: int, batch: slice = slice(None)) -> None:
        source = torch.randn(self.plain[batch].shape[0], 2, n, HEAD_DIM)
        self.plain[batch, :, start : start + n] = source
        jkv.hold(self.held[batch], self.ranges[batch], source, start)

    def move(self, source: int, destination: int, n: int) -> None:
        self.plain[:, :, destination : destination + n] = self.plain[:, :, source : source + n].clone()
        jkv.hold_moved(self.held, self.ranges, source, destination, n)

    def fill(self, start: int, stop: int, value: float) -> None:
        self.plain[:, :, start:stop] = value
        jkv.hold_number(self.held, self.ranges, start, stop, value)

    def scatter(self, positions: list[int]) -> None:
        source = torch.randn(self.plain.shape[0], 2, len(positions), HEAD_DIM)
        self.plain[:, :, positions] = source
        jkv.hold_at(self.held, self.ranges, source, torch.tensor(positions))

    def of_other_heads(self, start: int, n: int) -> None:
        source = torch.randn(self.plain.shape[0], 1, n, HEAD_DIM)
        self.plain[:, 1:, start : start + n] = source
        rules.refresh(self.held[:, 1:], self.ranges, source, start)

    def change_unseen(self, start: int, n: int) -> None:
        self.plain[:, :, start : start + n] = torch.randn(self.plain.shape[0], 2, n, HEAD_DIM)
        rules.forget(self.ranges, start, start + n)

    def known(self, entry: int = 0) -> list[int]:
        """Tokens that are held of a batch entry."""
        runs = rules.runs_of(self.ranges[entry : entry + 1])
        return sorted({token for run in runs for token in range(run.start, run.stop)})

    def check(self) -> None:
        out = torch.full_like(self.plain, torch.nan)
        rules.put_over(out, self.held, self.ranges, 0)
        for entry, (got, want) in enumerate(zip(out, self.plain)):
            tokens = self.known(entry)
            assert torch.equal(got[:, tokens], want[:, tokens])
            assert got.isnan().any(-1).any(0).sum() == self.plain.shape[2] - len(tokens)


@pytest.mark.parametrize("sink, recent", [(6, 0), (0, 5), (6, 5), (40, 40), (1, 1)])
def test_nothing_that_is_held_is_ever_stale(sink: int, recent: int) -> None:
    rng = random.Random(sink)
    torch.manual_seed(0)
    for _ in range(20):
        beside = Beside(sink, recent, batch=2)
        for _ in range(25):
            n = rng.randint(1, 9)
            start, other = (rng.choice((0, 3, rng.randint(0, TOKENS - n))) for _ in range(2))
            change, *given = rng.choice((
                (beside.write, start, n), (beside.write, start, n), (beside.write, start, n, slice(0, 1)),
                (beside.move, start, other, n), (beside.fill, start, start + n, 1.5),
                (beside.scatter, rng.sample(range(TOKENS), n)), (beside.of_other_heads, start, n),
                (beside.change_unseen, start, n),
            ))  # fmt: skip
            change(*given)
            beside.check()


@pytest.mark.parametrize("chunk, sink, recent", [(4, 6, 4), (4, 4, 8), (9, 3, 4), (4, 0, 3), (1, 2, 5)])
def test_the_first_tokens_and_the_newest_before_a_chunk_are_held(chunk: int, sink: int, recent: int) -> None:
    """However often each chunk is written, whatever its length."""
    beside = Beside(sink, recent)
    for start in range(0, TOKENS - chunk, chunk):
        for _ in range(3):
            beside.write(start, chunk)
            beside.check()
            assert set(range(min(start, sink))) <= set(beside.known())
            assert set(range(max(0, start - recent), start)) <= set(beside.known())
    assert len(beside.known()) <= sink + 2 * recent


def test_rolling_with_a_sink_keeps_both_at_hand() -> None:
    beside = Beside(4, 8)
    for start in range(0, TOKENS, 8):
        beside.write(start, 8)
    for _ in range(4):
        beside.move(12, 4, TOKENS - 12)
        beside.write(TOKENS - 8, 8)
        beside.write(TOKENS - 8, 8)  # and again
        beside.check()
        assert set(range(4)) | set(range(TOKENS - 16, TOKENS - 8)) <= set(beside.known())


def test_rolling_without_a_sink_lets_the_first_tokens_go() -> None:
    beside = Beside(6, 0)
    for start in range(0, TOKENS, 8):
        beside.write(start, 8)
    assert beside.known() == [0, 1, 2, 3, 4, 5]
    beside.move(4, 0, TOKENS - 4)
    beside.check()
    assert beside.known() == [0, 1]
    beside.write(0, 8)
    assert beside.known() == [0, 1, 2, 3, 4, 5]


def test_a_reset_is_held_and_what_is_written_after_it_at_places_that_only_the_data_tells() -> None:
    beside = Beside(6, 0)
    beside.fill(0, TOKENS, 0.0)
    assert beside.known() == [0, 1, 2, 3, 4, 5]
    for first in range(0, 9, 3):
        beside.scatter([first, first + 1, first + 2])
        beside.check()
    assert beside.known() == [0, 1, 2, 3, 4, 5]


def test_where_batch_entries_differ_what_is_held_of_all_of_them_is_attended() -> None:
    beside = Beside(8, 0, batch=2)
    beside.write(0, 4)
    beside.write(4, 3, slice(0, 1))
    assert [len(beside.known(entry)) for entry in (0, 1)] == [7, 4]
    assert [(run.start, run.stop) for run in rules.runs_of(beside.ranges)] == [(0, 4)]
    beside.check()


# ---- operators ----


def arguments(dtype=torch.float32, mask="none", correction="taylor", ranges=(0, 30, 33, 40), batch=1, bits=2, lists=2):
    """Of `attention_held`: a sink of 6, 5 before, and a range written last that overlaps with neither, or with both."""
    torch.manual_seed(0)
    sides = []
    for _ in range(2):
        beside = Beside(6, 5, batch)
        for start in (0, 8, 16):
            beside.write(start, 8)
        packed = reference.quantize(beside.plain, bits, 32)
        last = beside.plain[:, :, 25:29] + 1
        held = [beside.held.to(dtype), last.to(dtype)]
        sides.append((packed, held[:lists], [beside.ranges, torch.tensor([25, 29])][:lists]))
    (keys, key_held, key_ranges), (values, value_held, value_ranges) = sides
    query, key, value = (torch.randn(batch, h, 3, HEAD_DIM).to(dtype) for h in (4, 2, 2))
    columns = sum(ranges[1::2]) - sum(ranges[::2]) + 3
    masks = {
        "none": None,
        "boolean": torch.rand(batch, 1, 3, columns) > 0.3,
        "additive": torch.randn(3, columns).to(dtype),
        "one column": torch.randn(batch, 4, 3, 1).to(dtype),
    }
    return [
        query, *keys, *values, key_held, key_ranges, value_held, value_ranges, list(ranges), key, value, masks[mask],
        False, 0.3, bits, bits, correction,
    ]  # fmt: skip


def expected(given: list) -> tuple[Tensor, Tensor]:
    """Attention with one softmax, each key as it is held, or read and corrected."""
    query, key_codes, key_scales, value_codes, value_scales, *lists, ranges, key, value, mask, _, scale = given[:15]
    bits, correction = given[15], given[17]
    tokens = [t for a, b in zip(ranges[::2], ranges[1::2]) for t in range(a, b)]
    delta = reference.quantization_step(key_scales, bits)
    read = []
    for (codes, scales), tensors, told in (
        ((key_codes, key_scales), lists[0], lists[1]), ((value_codes, value_scales), lists[2], lists[3]),
    ):  # fmt: skip
        whole = reference.dequantize(codes, scales, bits)
        for tensor, ranges_of in zip(tensors, told):
            rules.put_over(whole, tensor.float(), ranges_of, 0)
        read.append(whole[:, :, tokens])
    for ranges_of in lists[1]:
        for run in rules.runs_of(ranges_of):
            delta[:, :, run.start : run.stop] = 0
    keys, values, delta = (
        t.repeat_interleave(2, 1)
        for t in (
            torch.cat((read[0], key.float()), 2), torch.cat((read[1], value.float()), 2), delta[:, :, tokens],
        )
    )  # fmt: skip
    scores = scale * query.float() @ keys.mT
    scores[..., : len(tokens)] -= reference.correction_bias(query, delta, scale, correction)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("correction", ["taylor", "exact", "none"])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "one column"])
@pytest.mark.parametrize("kernel", ["chosen", "torch"])
def test_attention_takes_what_is_held_as_it_is(kernel: str, mask: str, correction: str) -> None:
    given = arguments(mask=mask, correction=correction, batch=2)
    want = expected(given)
    operators = (jkv.attention_held, jkv.attention_held_lse)
    got, (again, lse) = (op(*given) for op in (operators if kernel == "chosen" else (
        rules.attention_held, rules.attention_held_lse
    )))  # fmt: skip
    torch.testing.assert_close(got, want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype: torch.dtype) -> None:
    given = arguments(dtype, mask="boolean")
    torch.testing.assert_close(jkv.attention_held(*given).float(), expected(given)[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("ranges", [(0, 3), (2, 2), (7, 30), (10, 12, 20, 24), (24, 30, 0, 24)])
def test_any_ranges_may_be_attended(ranges: tuple[int, ...]) -> None:
    given = arguments(ranges=ranges, mask="additive")
    torch.testing.assert_close(jkv.attention_held(*given), expected(given)[0], rtol=1e-4, atol=1e-5)


def test_what_is_held_of_keys_or_values_only_is_read_from_codes() -> None:
    given = arguments(lists=1)
    rules.forget(given[8][0], 2, 5)  # of values
    got = jkv.attention_held(*given)
    rules.forget(given[6][0], 2, 5)
    torch.testing.assert_close(got, expected(given)[0], rtol=1e-4, atol=1e-5)


def test_a_cache_of_another_dtype_than_queries_and_entries_that_differ_go_to_python() -> None:
    given = arguments(torch.bfloat16, batch=2)
    given[5], given[7] = ([t.float() for t in given[i]] for i in (5, 7))
    torch.testing.assert_close(jkv.attention_held(*given).float(), expected(given)[0], rtol=0.05, atol=0.02)
    given = arguments(batch=2, lists=1)
    for told in (given[6][0], given[8][0]):
        rules.forget(told[1:], 3, 6)
    shared = [told.clone() for told in (given[6][0], given[8][0])]
    got = jkv.attention_held(*given)
    for told in shared:
        rules.forget(told, 3, 6)
    given[6], given[8] = ([told] for told in shared)
    torch.testing.assert_close(got, expected(given)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantizer", ["rtn", "quarot", "unbiased/groups", "rtn/pairs32"])
def test_what_is_dequantized_is_as_it_was_written_where_it_is_held(quantizer: str) -> None:
    beside = Beside(6, 5)
    beside.write(0, 12)
    codes, scales = reference.quantize(torch.randn(1, 2, TOKENS, HEAD_DIM), 2, 16)
    lists = [beside.held], [beside.ranges]
    out = jkv.dequantize_held(codes, scales, *lists, 3, 20, 2, 16, quantizer, torch.float32)
    assert out.shape == (1, 2, 17, HEAD_DIM) and out.is_contiguous()
    held = [t - 3 for t in beside.known() if t >= 3]
    assert held == [0, 1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(out[:, :, held], beside.plain[:, :, [t + 3 for t in held]])
    others = [t for t in range(17) if t not in held]
    plain = jkv.dequantize_held(codes, scales, [], [], 3, 20, 2, 16, quantizer, torch.float32)
    assert torch.equal(out[:, :, others], plain[:, :, others])


def written(batch: int = 1) -> tuple[Tensor, Tensor]:
    beside = Beside(6, 5, batch)
    beside.write(0, 12)
    return beside.held, beside.ranges


CALLS = {
    "hold": (jkv.hold, lambda: (*written(), torch.randn(1, 2, 4, HEAD_DIM), 12)),
    "hold_at": (jkv.hold_at, lambda: (*written(), torch.randn(1, 2, 3, HEAD_DIM), torch.tensor([1, 9, 30]))),
    "hold_number": (jkv.hold_number, lambda: (*written(), 2, 8, 0.0)),
    "hold_moved": (jkv.hold_moved, lambda: (*written(), 8, 3, 4)),
    "dequantize_held": (
        jkv.dequantize_held,
        lambda: (*reference.quantize(torch.randn(1, 2, 20, HEAD_DIM), 2, 16), *([t] for t in written()), 3, 9, 2, 16,
                 "quarot", torch.float32),
    ),
    "attention_held": (jkv.attention_held, arguments),
    "attention_held_lse": (jkv.attention_held_lse, arguments),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_operators_are_what_torch_expects_of_them(name: str) -> None:
    operator, given = CALLS[name]
    torch.library.opcheck(operator.default, tuple(given()))


def test_operators_that_change_what_is_held_say_so() -> None:
    for name in ("hold", "hold_at", "hold_number", "hold_moved"):
        held, ranges, *others = CALLS[name][1]()
        before = held.clone(), ranges.clone()
        getattr(jkv, name)(held, ranges, *others)
        changes = [argument.is_write for argument in getattr(jkv, name).default._schema.arguments[:2]]
        assert changes == [not torch.equal(a, b) for a, b in zip(before, (held, ranges))]
