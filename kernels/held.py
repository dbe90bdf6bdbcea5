"""Tokens of a packed cache that are held in full precision beside it: its first ones, and the newest before a chunk.

Every token has its codes all the same. What is held is attended as it was written, uncorrected (its Δ is 0); where
something is not known to be held, its codes are right. So nothing here may ever be stale: a range of held tokens grows
by what is written next to it, follows tokens that are moved, and shrinks where anything else happens to them.

held: `[B, H, R, D]` in the cache's dtype, rows of tokens in up to three regions, one after the other: the *sink*, whose
row i is token i; tokens *before* the range that was written last; and the *last* ones of that range, which will be
before the next. So a window of n tokens before the chunk at hand takes 2n rows, however long chunks are.

held_ranges: int64 `[B, regions, 4]` on the CPU, so that reading it waits for no device: per batch entry and region
(start, stop, row, rows): tokens start … stop - 1 lie in rows row …, and the region has so many rows.

What else is held in full precision, the range that another graph or eager code wrote last (`ops`), is told by
`[start, stop]` alone, its rows being those tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops, quantizers

SINK, BEFORE, LAST = range(3)


@dataclass(frozen=True)
class Run:
    """Tokens start … stop - 1, in rows `row` … of a tensor."""

    start: int
    stop: int
    row: int

    def within(self, start: int, stop: int) -> Run:
        """Its tokens among start … stop - 1; it may be empty."""
        first = max(start, self.start)
        return Run(first, max(first, min(stop, self.stop)), self.row + first - self.start)

    def without(self, start: int, stop: int) -> Run:
        """The longer run of its tokens that are not among start … stop - 1."""
        before, after = self.within(self.start, start), self.within(stop, self.stop)
        return before if len(before) >= len(after) else after

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + len(self))


NOTHING = Run(0, 0, 0)


def no_ranges(batch: int, sink: int, recent: int) -> Tensor:
    """`held_ranges` of regions that hold nothing yet."""
    regions = (sink, recent, recent) if recent else (sink,)
    ranges = torch.zeros(batch, len(regions), 4, dtype=torch.int64)
    ranges[:, :, 3] = torch.tensor(regions)
    return ranges


class Regions:
    """What `held_ranges` tell of some batch entries, to be changed and told again.

    Where entries differ, what is held of all of them.
    """

    def __init__(self, ranges: Tensor) -> None:
        self.ranges = ranges
        entries = ranges.tolist()
        told = entries[0] if all(entry == entries[0] for entry in entries) else _common(entries)
        self.runs = [Run(*region[:3]) for region in told]
        self.rows = [region[3] for region in told]

    def first_row(self, region: int) -> int:
        return sum(self.rows[:region])

    def tell(self) -> None:
        self.ranges.copy_(torch.tensor([[run.start, run.stop, run.row, n] for run, n in zip(self.runs, self.rows)]))

    def forget(self, start: int, stop: int) -> None:
        """Tokens start … stop - 1 are not what is held of them any more."""
        self.runs = [run.without(start, stop) for run in self.runs]

    def join_sink(self, start: int, stop: int) -> None:
        """Tokens start … stop - 1 are in their rows of the sink now."""
        known = self.runs[SINK]
        if len(known) and known.start <= stop and start <= known.stop:
            start, stop = min(start, known.start), max(stop, known.stop)
        if stop - start >= len(known):
            self.runs[SINK] = Run(start, stop, start)


def _common(entries: list[list[list[int]]]) -> list[list[int]]:
    common = []
    for regions in zip(*entries):
        start, stop = max(r[0] for r in regions), min(r[1] for r in regions)
        shift = regions[0][2] - regions[0][0]
        alike = start < stop and all(r[2] - r[0] == shift for r in regions)
        common.append([start, stop, start + shift, regions[0][3]] if alike else [0, 0, 0, regions[0][3]])
    return common


def alike(ranges: Tensor) -> bool:
    """Whether the same tokens are held of all batch entries."""
    return ranges.dim() == 1 or bool((ranges == ranges[:1]).all())


def runs_of(ranges: Tensor) -> list[Run]:
    """What is held of all batch entries; of `[start, stop]`, that range."""
    if ranges.dim() == 1:
        start, stop = ranges.tolist()
        return [Run(start, stop, 0)] if start < stop else []
    return [run for run in Regions(ranges).runs if len(run)]


def hold(held: Tensor, held_ranges: Tensor, source: Tensor, start: int) -> None:
    """`source` `[B, H, n, D]` is written to tokens start … of a cache: hold of it what belongs to a region.

    A write within the sink is no chunk: the newest tokens stay those that they are.
    """
    regions, stop = Regions(held_ranges), start + source.shape[2]
    if start == stop:
        return
    sink = regions.rows[SINK]
    if len(regions.runs) > 1 and stop > sink:
        _begin_chunk(held, regions, source, start)
    elif len(regions.runs) > 1:
        regions.runs[BEFORE:] = [run.without(start, stop) for run in regions.runs[BEFORE:]]
    if start < sink:
        last = min(stop, sink)
        held[:, :, start:last] = source[:, :, : last - start]
        regions.join_sink(start, last)
    regions.tell()


def _begin_chunk(held: Tensor, regions: Regions, source: Tensor, start: int) -> None:
    """Tokens start … are the last ones, and what is held of those before them is before."""
    rows, first, last_row = regions.rows[BEFORE], regions.first_row(BEFORE), regions.first_row(LAST)
    known = [run.within(start - rows, start) for run in regions.runs[BEFORE:]]
    known = sorted((run for run in known if len(run)), key=lambda run: run.start)
    if len(known) == 2 and known[0].stop != known[1].start:
        known = known[1:]
    if known != [regions.runs[BEFORE]]:  # otherwise the chunk is written again
        n = sum(map(len, known))
        if known:
            held[:, :, first : first + n] = torch.cat([held[:, :, run.rows] for run in known], 2)
        regions.runs[BEFORE] = Run(known[0].start, known[-1].stop, first) if known else NOTHING
    stop = start + source.shape[2]
    n = min(rows, source.shape[2])
    held[:, :, last_row : last_row + n] = source[:, :, source.shape[2] - n :]
    regions.runs[LAST] = Run(stop - n, stop, last_row)


def refresh(held: Tensor, held_ranges: Tensor, source: Tensor, start: int) -> None:
    """As `hold`, of some heads `held` `[B, h, R, D]` of a token only: what is held stays so, and nothing else is."""
    for batch, run in held_by_entry(held_ranges):
        run = run.within(start, start + source.shape[2])
        held[batch, :, run.rows] = source.expand(len(held), -1, -1, -1)[batch, :, run.start - start : run.stop - start]


def hold_at(held: Tensor, held_ranges: Tensor, source: Tensor, positions: Tensor) -> None:
    """Token i of `source` is written to token `positions[i]`, int `[n]` on the device, which is not waited for.

    So it is not known which tokens are new: what is held is kept up to date, and nothing else is held.
    """
    places = torch.arange(source.shape[2], device=held.device)
    for batch, run in held_by_entry(held_ranges):
        inside = (positions >= run.start) & (positions < run.stop)
        token_of = torch.full((len(run) + 1,), -1, device=held.device)  # and a place for those outside
        token_of.index_copy_(0, torch.where(inside, positions - run.start, len(run)).long(), places)
        token_of = token_of[:-1]
        new = source[batch].index_select(2, token_of.clamp(min=0)).to(held.dtype)
        held[batch, :, run.rows] = torch.where((token_of >= 0)[:, None], new, held[batch, :, run.rows])


def hold_number(held: Tensor, held_ranges: Tensor, start: int, stop: int, value: float) -> None:
    """Tokens start … stop - 1 are set to a number. Nobody attends them as the newest."""
    regions = Regions(held_ranges)
    regions.forget(start, stop)
    last = min(stop, regions.rows[SINK])
    if start < last:
        held[:, :, start:last] = value
        regions.join_sink(start, last)
    regions.tell()


def hold_moved(held: Tensor, held_ranges: Tensor, source: int, destination: int, length: int) -> None:
    """Tokens source … are moved to destination …, as `ops.move` does: the newest go along, and so do those that come to
    lie in the sink."""
    regions, by = Regions(held_ranges), destination - source
    moved = [run.within(source, source + length) for run in regions.runs]
    sink = []
    for run in moved:
        start, stop = max(run.start + by, 0), min(run.stop + by, regions.rows[SINK])
        if start < stop:
            sink.append((start, stop, held[:, :, run.within(start - by, stop - by).rows].clone()))
    regions.forget(destination, destination + length)
    for region in range(BEFORE, len(moved)):
        if len(run := moved[region]):
            regions.runs[region] = Run(run.start + by, run.stop + by, run.row)
    for start, stop, data in sink:
        held[:, :, start:stop] = data
        regions.join_sink(start, stop)
    regions.tell()


def forget(held_ranges: Tensor, start: int, stop: int) -> None:
    """Tokens start … stop - 1 have changed, and only their codes are known."""
    regions = Regions(held_ranges)
    regions.forget(start, stop)
    regions.tell()


def put_over(out: Tensor, held: Tensor, held_ranges: Tensor, start: int) -> None:
    """What is held of tokens start … into `out` `[B, H, n, D]`, which has them in order."""
    for batch, run in held_by_entry(held_ranges):
        run = run.within(start, start + out.shape[2])
        out[batch, :, run.start - start : run.stop - start] = held[batch, :, run.rows]


def held_by_entry(held_ranges: Tensor) -> Iterator[tuple[slice, Run]]:
    """What is held of which batch entries."""
    apart = not alike(held_ranges)
    for i, ranges in enumerate(held_ranges[:, None] if apart else [held_ranges]):
        for run in runs_of(ranges):
            yield slice(i, i + 1) if apart else slice(None), run


def pieces_of(held: Tensor, held_ranges: Tensor, start: int, stop: int) -> list[tuple[int, int, Tensor]]:
    """What is held of tokens start … stop - 1: region, its first token counted from `start`, and the tokens."""
    runs = [run.within(start, stop) for run in Regions(held_ranges).runs]
    return [(region, run.start - start, held[:, :, run.rows]) for region, run in enumerate(runs) if len(run)]


def receive(
    held: Tensor, held_ranges: Tensor, start: int, stop: int, pieces: Sequence[tuple[int, int, Tensor]]
) -> None:
    """Tokens start … stop - 1 become those of another cache, of which `pieces_of` tells what is held.

    The newest tokens come along where none are held here.
    """
    regions = Regions(held_ranges)
    regions.forget(start, stop)
    bare = not any(map(len, regions.runs[BEFORE:]))
    for region, first, tokens in pieces:
        begin, end = start + first, start + first + tokens.shape[2]
        last, sink = min(end, regions.rows[SINK]), regions.runs[SINK]
        if begin < last and (region == SINK or not len(sink) or (begin <= sink.stop and sink.start <= last)):
            held[:, :, begin:last] = tokens[:, :, : last - begin]
            regions.join_sink(begin, last)
        if bare and BEFORE <= region < len(regions.runs):
            n, row = min(regions.rows[region], tokens.shape[2]), regions.first_row(region)
            held[:, :, row : row + n] = tokens[:, :, tokens.shape[2] - n :]
            regions.runs[region] = Run(end - n, end, row)
    regions.tell()


# ---- operators ----

_HELD = "Tensor[] held, Tensor[] held_ranges"
for _schema in (
    "hold(Tensor(a!) held, Tensor(b!) held_ranges, Tensor source, SymInt start) -> ()",
    "hold_at(Tensor(a!) held, Tensor held_ranges, Tensor source, Tensor positions) -> ()",
    "hold_number(Tensor(a!) held, Tensor(b!) held_ranges, SymInt start, SymInt stop, float value) -> ()",
    "hold_moved(Tensor(a!) held, Tensor(b!) held_ranges, SymInt source, SymInt destination, SymInt length) -> ()",
    f"dequantize_held(Tensor codes, Tensor scales, {_HELD}, SymInt start, SymInt stop, int bits, int group_size, "
    "str quantizer, ScalarType dtype) -> Tensor",
    *(
        f"{name}(Tensor query, Tensor key_codes, Tensor key_scales, Tensor value_codes, Tensor value_scales, "
        "Tensor[] key_held, Tensor[] key_held_ranges, Tensor[] value_held, Tensor[] value_held_ranges, "
        "SymInt[] ranges, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, int key_bits, "
        f"int value_bits, str correction) -> {result}"
        for name, result in (("attention_held", "Tensor"), ("attention_held_lse", "(Tensor, Tensor)"))
    ),
):
    ops.library.define(_schema, tags=ops._HOST_TAGS)


def dequantize_held(
    codes: Tensor, scales: Tensor, held: Sequence[Tensor], held_ranges: Sequence[Tensor], start: int, stop: int,
    bits: int, group_size: int, quantizer: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Tokens start … stop - 1 of a cache as the model knows them, `[B, H, n, D]`: what is held as it was written.

    Args:
        held: tensors whose rows are tokens as they were written; later ones may hold what earlier ones do.
        held_ranges: which tokens those are.
        quantizer: as `quantizers.Grid` spells it: what codes were made of is brought back from its basis.
    """
    jkv, grid = torch.ops.jkv, quantizers.grid_of(quantizer)
    out = jkv.dequantize(codes, scales, start, stop, bits, dtype)
    if grid.within:
        out = jkv.from_grid(out, quantizer, group_size)
    elif grid.rotates:
        out = jkv.rotate(out)
    for tensor, ranges in zip(held, held_ranges):
        put_over(out, tensor, ranges, start)
    return out


def attention_held(*arguments: Any) -> Tensor:
    """As `ops.attention`, where some of the packed tokens are held in full precision, and attended so: uncorrected.

    Args (after query, codes and scales):
        key_held, value_held: tensors whose rows are tokens, in the basis that the cache is stored in.
        key_held_ranges, value_held_ranges: which tokens those are. What is held of keys only, or values, is not used.
        ranges and all after them: as for `ops.attention`.
    """
    return torch.ops.jkv.attention(*_with_held(*arguments))


def attention_held_lse(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As `attention_held`, and the log-sum-exp, see `ops.attention_lse`."""
    return torch.ops.jkv.attention_lse(*_with_held(*arguments))


Place = tuple[int, int]  # which tensor, and the first row in it
Piece = tuple[int, int, tuple[Place, Place] | None]  # tokens start … stop - 1, and where they are held


def _with_held(
    query: Tensor, key_codes: Tensor, key_scales: Tensor, value_codes: Tensor, value_scales: Tensor,
    key_held: Sequence[Tensor], key_held_ranges: Sequence[Tensor], value_held: Sequence[Tensor],
    value_held_ranges: Sequence[Tensor], ranges: Sequence[int], key: Tensor, value: Tensor, mask: Tensor | None,
    *settings: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `ops.attention` in which what is held is among the keys in full precision."""
    store = key_codes, key_scales, value_codes, value_scales
    sides = [
        [(which, run) for which, told in enumerate(tensors) for run in runs_of(told)]
        for tensors in (key_held_ranges, value_held_ranges)
    ]
    pieces = list(_pieces(ranges, *sides))
    if not any(places for _, _, places in pieces):
        return (query, *store, ranges, key, value, mask, *settings)
    packed = [(start, stop) for start, stop, places in pieces if places is None]
    parts: list[list[Tensor]] = [[], []]
    for start, stop, places in pieces:
        for part, (which, row), tensors, like in zip(parts, places or (), (key_held, value_held), (key, value)):
            part.append(tensors[which][:, :, row : row + stop - start].to(like.dtype))
    key, value = (torch.cat((*part, x), 2) for part, x in zip(parts, (key, value)))
    order = [places is not None for _, _, places in pieces]
    if mask is not None and mask.shape[-1] > 1 and order != sorted(order):  # columns follow: packed, then the others
        ends = torch.tensor([0, *(stop - start for start, stop, _ in pieces)]).cumsum(0).tolist()
        columns = [mask[..., a:b] for a, b in itertools.pairwise(ends)]
        chosen = [[c for c, is_held in zip(columns, order) if is_held is wanted] for wanted in (False, True)]
        mask = torch.cat((*chosen[0], *chosen[1], mask[..., ends[-1] :]), -1)
    return (query, *store, [p for pair in packed for p in pair], key, value, mask, *settings)


def _pieces(ranges: Sequence[int], *sides: list[tuple[int, Run]]) -> Iterator[Piece]:
    """The ranges, in order, cut where tokens begin or cease to be held of both keys and values."""
    bounds = sorted({bound for side in sides for _, run in side for bound in (run.start, run.stop)})
    for start, stop in zip(ranges[::2], ranges[1::2]):
        begin, cuts = start, [b for b in bounds if start < b < stop]
        for a, b in zip((start, *cuts), (*cuts, stop)):
            key, value = (_place(side, a) for side in sides)
            if key is None or value is None:
                continue
            if begin < a:
                yield begin, a, None
            yield a, b, (key, value)
            begin = b
        if begin < stop:
            yield begin, stop, None


def _place(side: list[tuple[int, Run]], token: int) -> Place | None:
    """Where a token is held."""
    return next(((i, run.row + token - run.start) for i, run in side if run.start <= token < run.stop), None)


def _dequantize_held_fake(codes, scales, held, held_ranges, start, stop, bits, group_size, quantizer, dtype):
    return ops._dequantize_fake(codes, scales, start, stop, bits, dtype)


def _attention_held_fake(query, *others):
    return ops._empty_attention_output(query, others[10].shape[-1])


def _attention_held_lse_fake(query, *others):
    return ops._sdpa_lse_fake(query, others[9], others[10])


def _nothing(*_: Any) -> None:
    return None


_kernels: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("hold", hold, _nothing),
    ("hold_at", hold_at, _nothing),
    ("hold_number", hold_number, _nothing),
    ("hold_moved", hold_moved, _nothing),
    ("dequantize_held", dequantize_held, _dequantize_held_fake),
    ("attention_held", attention_held, _attention_held_fake),
    ("attention_held_lse", attention_held_lse, _attention_held_lse_fake),
)
for _name, _kernel, _fake in _kernels:
    ops.library.impl(_name, ops._without_autocast(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"jkv::{_name}", _fake, lib=ops.library)
