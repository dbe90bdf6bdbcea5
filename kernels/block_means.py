"""Caches that are quantized less each channel's mean over a block of tokens: tokens iN … (i + 1)N - 1 share one.

A mean for a whole cache (`centers`) is found once, and later tokens drift away from it. One per block of tokens, as
many as a chunk or a frame has, follows them. Softmax does see that keys are shifted by another vector in each block: by
s·q·m, one number per query and block. So blocks are attended one by one, and merged by their log-sum-exps, to which
that is added (`attention_means`); kernels are the same. Tokens in full precision are not shifted at all.

means: `[B, H, ⌈S / N⌉, D]` in the cache's dtype, in the basis that the model knows.

extents: float64 `[B, H, ⌈S / N⌉, 3]` on the CPU, so that reading it waits for no device: the number that a block's
tokens are to which nothing has been written; and between which the others lie, first and stop, counted from the block's
first (where both are the same, there are none). A block of one number has it for its mean, and zeros for all else.

A write gives a block the mean of what it writes there where nothing else has been written to the block; so each of the
steps that denoise a chunk does. Other blocks keep their mean, as any is right but for rounding. So tokens that are not
written stay what they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PackedCacheError
from . import ops
from .centers import _per_query_head
from .grids import stored
from .held import _HELD, _with_held, dequantize_held, put_over

_STORE = "Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) means, Tensor(d!) extents"
_GRID = "int bits, int group_size, str quantizer"
for _schema in (
    f"append_means({_STORE}, Tensor source, SymInt start, int block, {_GRID}) -> ()",
    f"fill_means({_STORE}, SymInt start, SymInt stop, int block, {_GRID}, float value) -> ()",
    f"move_means({_STORE}, SymInt source, SymInt destination, SymInt length, int block) -> ()",
    f"dequantize_means(Tensor codes, Tensor scales, Tensor means, {_HELD}, SymInt start, SymInt stop, int block, "
    f"{_GRID}, ScalarType dtype) -> Tensor",
    *(
        f"{name}(Tensor query, Tensor key_codes, Tensor key_scales, Tensor value_codes, Tensor value_scales, "
        "Tensor? key_means, int key_block, Tensor? value_means, int value_block, "
        "Tensor[] key_held, Tensor[] key_held_ranges, Tensor[] value_held, Tensor[] value_held_ranges, "
        "SymInt[] ranges, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, int key_bits, "
        f"int value_bits, str correction) -> {result}"
        for name, result in (("attention_means", "Tensor"), ("attention_means_lse", "(Tensor, Tensor)"))
    ),
):
    ops.library.define(_schema, tags=ops._HOST_TAGS)


def blocks(tokens: int, block: int) -> int:
    """How many blocks so many tokens are in."""
    return -(-tokens // block)


def nothing_written(batch: int, heads: int, tokens: int, block: int) -> Tensor:
    """`extents` of a cache of zeros."""
    return torch.zeros(batch, heads, blocks(tokens, block), 3, dtype=torch.float64)


def spread(means: Tensor, start: int, stop: int, block: int) -> Tensor:
    """The means of tokens start … stop - 1, `[B, H, stop - start, D]`."""
    return means.index_select(2, torch.arange(start, stop, device=means.device) // block)


# ---- writing ----


def append_means(
    codes: Tensor, scales: Tensor, means: Tensor, extents: Tensor, source: Tensor, start: int, block: int,
    bits: int, group_size: int, quantizer: str,
) -> None:  # fmt: skip
    """Quantize tokens `source` `[B, H, n, D]`, as the model has them, into tokens start … of a cache, less their means.

    Args:
        codes, scales: as for `ops.append`, a step per token; mutated.
        means, extents: see above; mutated.
        source: float32, float16 or bfloat16; must not alias the cache.
        block: how many tokens share a mean.
        bits, group_size, quantizer: how tokens are quantized, as `quantizers.Grid` spells it.

    Raises:
        RuntimeError: the range does not lie within the cache; nothing has been written then.
    """
    grid = bits, group_size, quantizer

    def mean(new: Tensor) -> Tensor:
        of_block = new.mean(3)
        return torch.where(of_block.isfinite(), of_block, 0.0)

    def put(new: Tensor, first: int) -> None:
        shifted = new.float() - spread(means, first, first + new.shape[2], block).float()
        torch.ops.jkv.append(codes, scales, stored(shifted, *grid), first, bits)

    def number(i: int) -> Tensor:
        return numbers(extents[:, :, i], means)

    write_blocks("append_means", codes.shape[2], means, extents, source, start, block, mean, put, number)


def write_blocks(
    operator: str, tokens: int, tables: Tensor, extents: Tensor, source: Tensor, start: int, block: int,
    fit: Callable[[Tensor], Tensor], put: Callable[[Tensor, int], None], number: Callable[[int], Tensor],
) -> None:  # fmt: skip
    """Write tokens `source` `[B, H, n, D]` to tokens start … of a cache of so many.

    Args:
        operator: what is called, for people.
        tables: `[B, H, T, W]`, what the tokens of each block have in common; mutated.
        extents: see above; mutated.
        fit: makes what W numbers blocks `[B, H, t, n, D]`, float32, are to have, `[B, H, t, W]`.
        put: writes tokens `[B, H, n, D]` to those from a first one on, as their blocks' tables are by then.
        number: the number that tokens of a block are that nothing has been written to, float32 `[B, H, 1, 1]`.

    Raises:
        RuntimeError: the range does not lie within the cache; nothing has been written then.
    """
    stop = start + source.shape[2]
    if start < 0 or stop > tokens:
        raise RuntimeError(f"jkv::{operator}: tokens {start}:{stop} do not lie within the cache's {tokens} tokens")
    if not source.numel():
        return
    for first, last, covered in _runs(start, stop, block, tokens):
        i, whole = first // block, block if covered and (last - first) % block == 0 else last - first
        place = first - i * block, last - i * block
        if not covered and not _all_that_is_written(extents[:, :, i], *place):
            _extend(extents[:, :, i], *place)
            continue
        new = fit(source[:, :, first - start : last - start].float().unflatten(2, (-1, whole)))
        tables[:, :, i : i + new.shape[2]] = new
        for a, b in () if covered else ((i * block, first), (last, min((i + 1) * block, tokens))):
            if a < b:  # these are still the number that they were
                put(number(i).expand(-1, -1, b - a, source.shape[3]), a)
        told = extents[:, :, i : i + new.shape[2], 1:]
        told.copy_(torch.tensor((0, min(block, tokens - first)) if covered else place))
    put(source, start)


def _all_that_is_written(extents: Tensor, start: int, stop: int) -> bool:
    """Whether tokens start … stop - 1 of a block, extents `[B, H, 3]`, are all that has been written to, if any has."""
    first, last = extents[..., 1], extents[..., 2]
    return bool(((first == last) | ((first >= start) & (last <= stop))).all())


def _extend(extents: Tensor, start: int, stop: int) -> None:
    """Tokens start … stop - 1 of a block have been written to, beside others."""
    first, last = extents[..., 1], extents[..., 2]
    nothing = first == last
    first.copy_(torch.where(nothing, start, first.clamp(max=start)))
    last.copy_(torch.where(nothing, stop, last.clamp(min=stop)))


def numbers(extents: Tensor, like: Tensor) -> Tensor:
    """The number of a block, float32 `[B, H, 1, 1]`, on the device of `like`."""
    return extents[..., :1, None].float().to(like.device)


def fill_means(
    codes: Tensor, scales: Tensor, means: Tensor, extents: Tensor, start: int, stop: int, block: int, bits: int,
    group_size: int, quantizer: str, value: float,
) -> None:  # fmt: skip
    """Set tokens start … stop - 1 to a number: exactly in blocks that are covered, else as any token is quantized.

    Raises:
        RuntimeError: the range does not lie within the cache; nothing has been written then.
    """
    value = torch.tensor(value, dtype=means.dtype).double().item()

    def cover(first: int, last: int, covered: slice) -> None:
        torch.ops.jkv.fill(codes, scales, first, last, 0.0)
        means[:, :, covered] = value

    def put(new: Tensor, first: int) -> None:
        shifted = new - spread(means, first, first + new.shape[2], block).float()
        torch.ops.jkv.append(codes, scales, stored(shifted, bits, group_size, quantizer), first, bits)

    fill_blocks("fill_means", codes.shape[2], means, extents, start, stop, block, means.shape[3], value, cover, put)


def fill_blocks(
    operator: str, tokens: int, tables: Tensor, extents: Tensor, start: int, stop: int, block: int, channels: int,
    value: float, cover: Callable[[int, int, slice], None], put: Callable[[Tensor, int], None],
) -> None:  # fmt: skip
    """Set tokens start … stop - 1 of a cache of so many to a number.

    Args:
        channels: of a head.
        cover: sets tokens, first and last + 1, of these blocks, which they cover, to it.
        operator, tables, extents, put: as for `write_blocks`.

    Raises:
        RuntimeError: the range does not lie within the cache; nothing has been written then.
    """
    if not 0 <= start <= stop <= tokens:
        raise RuntimeError(f"jkv::{operator}: tokens {start}:{stop} do not lie within the cache's {tokens} tokens")
    for first, last, covered in _runs(start, stop, block, tokens):
        i, n = first // block, blocks(last, block)
        if covered:
            cover(first, last, slice(i, n))
            extents[:, :, i:n] = torch.tensor((value, 0, 0), dtype=torch.float64)
            continue
        number, begin, end = extents[:, :, i].unbind(-1)
        same = bool((number == value).all())  # as tokens that nothing has been written to are
        if same and bool((begin == end).all()):
            continue
        one = torch.full((1, 1, 1, 1), value, dtype=torch.float32, device=tables.device)
        put(one.expand(*tables.shape[:2], last - first, channels), first)
        if not same:
            _extend(extents[:, :, i], first - i * block, last - i * block)


def _runs(start: int, stop: int, block: int, tokens: int) -> Iterator[tuple[int, int, bool]]:
    """Tokens start … stop - 1 of a cache of so many in runs: blocks that are covered, but for the cache's last one if
    it is short, together; parts of blocks one by one."""
    covered = start + -start % block, stop - stop % block
    bounds = sorted({start, *(p for p in covered if start < p < stop), stop})
    for first, last in itertools.pairwise(bounds):
        yield first, last, first % block == 0 and (last % block == 0 or last == tokens)


def move_means(
    codes: Tensor, scales: Tensor, means: Tensor, extents: Tensor, source: int, destination: int, length: int,
    block: int,
) -> None:  # fmt: skip
    """`ops.move` of whole blocks, bit for bit, whose means come along.

    Raises:
        RuntimeError: a range does not lie within the cache; nothing has been moved then.
        PackedCacheError: a range is not made of whole blocks.
    """
    tokens = codes.shape[2]
    if source % block or destination % block or (length % block and destination + length != tokens):
        raise PackedCacheError(
            f"jkv: tokens {source}:{source + length}, moved to {destination}, must be multiples of {block}, as so many "
            "tokens share a mean; move whole blocks, or choose center_tokens so that it divides what is moved"
        )
    torch.ops.jkv.move(codes, scales, source, destination, length)
    i, j, n = source // block, destination // block, blocks(length, block)
    for x in (means, extents):
        x[:, :, j : j + n] = x[:, :, i : i + n].clone()


# ---- reading ----


def dequantize_means(
    codes: Tensor, scales: Tensor, means: Tensor, held: Sequence[Tensor], held_ranges: Sequence[Tensor], start: int,
    stop: int, block: int, bits: int, group_size: int, quantizer: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Tokens start … stop - 1 as the model knows them, `[B, H, n, D]`; arguments as for `held.dequantize_held`."""
    wide = torch.promote_types(dtype, torch.float32)
    out = dequantize_held(codes, scales, [], [], start, stop, bits, group_size, quantizer, wide)
    out = (out + spread(means, start, stop, block)).to(dtype)
    for tensor, ranges in zip(held, held_ranges):
        put_over(out, tensor, ranges, start)
    return out


def attention_means(*arguments: Any) -> Tensor:
    """As `attention_means_lse`, without the log-sum-exp."""
    return attention_means_lse(*arguments)[0]


def attention_means_lse(
    query: Tensor, key_codes: Tensor, key_scales: Tensor, value_codes: Tensor, value_scales: Tensor,
    key_means: Tensor | None, key_block: int, value_means: Tensor | None, value_block: int,
    key_held: Sequence[Tensor], key_held_ranges: Sequence[Tensor], value_held: Sequence[Tensor],
    value_held_ranges: Sequence[Tensor], ranges: Sequence[int], key: Tensor, value: Tensor, mask: Tensor | None,
    causal: bool, scale: float, key_bits: int, value_bits: int, correction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ops.attention_lse` over tokens that are stored less means of blocks, and over others as they are.

    With m_i the mean of block i, and out_i and lse_i attention over its keys and values as they are stored: scores of
    the keys are s·q·m_i more, hence lse_i is, and values m_i more, hence out_i is. Blocks are parts of one softmax:
    Σ_i exp(lse_i - lse) · (out_i + m_i), of which the means' part is a product of [L, blocks] with [blocks, Dv].

    Args:
        key_means, value_means: `[B, H_kv, T, D]` in the basis that the cache is stored in; None for a cache whose
            tokens are stored as they are.
        key_block, value_block: how many tokens share a mean.
        key_held, …: as for `held.attention_held`.
        ranges and all after them: as for `ops.attention`; neither what is held nor `key` and `value` are less a mean.
    """
    query, *store, ranges, key, value, mask, causal = _with_held(
        query, key_codes, key_scales, value_codes, value_scales, key_held, key_held_ranges, value_held,
        value_held_ranges, ranges, key, value, mask, causal,
    )  # fmt: skip
    jkv, settings = torch.ops.jkv, (scale, key_bits, value_bits, correction)
    nothing = key[:, :, :0], value[:, :, :0]
    shifts = None if key_means is None else _shifts(query, key_means.float(), scale)
    merged, blocks_of_values, columns = _Merged(), [], 0
    for i, j, part in _parts(ranges, key_means, key_block, value_means, value_block):
        n = sum(part[1::2]) - sum(part[::2])
        visible = _columns(mask, columns, columns + n)
        out, lse = jkv.attention_lse(query, *store, part, *nothing, visible, False, *settings)
        merged.add(out, lse if shifts is None else lse + shifts[..., i])
        blocks_of_values.append(j)
        columns += n
    if key.shape[2] or not columns:
        visible = _columns(mask, columns, columns + key.shape[2])
        merged.add(*jkv.attention_lse(query, *store, [], key, value, visible, causal, *settings))
    result = ops._empty_attention_output(query, value.shape[-1])
    if value_means is None or not blocks_of_values:
        return result.copy_(merged.out), merged.lse
    means = _per_query_head(value_means[:, :, blocks_of_values].float(), query)
    weights = torch.stack(merged.weights()[: len(blocks_of_values)], -1)  # [B, H, L, parts]
    return result.copy_(merged.out + weights @ means), merged.lse


def _shifts(query: Tensor, means: Tensor, scale: float) -> Tensor:
    """What each block's scores are more than those of its keys as they are stored: s·q·m, float32 `[B, H, L, T]`."""
    return scale * (query.float() @ _per_query_head(means, query).mT)


def _parts(
    ranges: Sequence[int], key_means: Tensor | None, key_block: int, value_means: Tensor | None, value_block: int
) -> Iterator[tuple[int, int, list[int]]]:
    """The ranges, in order, in runs of tokens that share their means: the mean of keys, of values, and such ranges."""
    sides = [n for n, means in ((key_block, key_means), (value_block, value_means)) if means is not None]
    pieces: list[tuple[int, int]] = []
    for start, stop in zip(ranges[::2], ranges[1::2]):
        cuts = {p for n in sides for p in range(start + -start % n, stop, n)}
        pieces += itertools.pairwise(sorted({start, *cuts, stop}))
    keys, values = (
        [0 if means is None else first // n for first, _ in pieces]
        for n, means in ((key_block, key_means), (value_block, value_means))
    )
    places = zip(keys, values)
    for (i, j), run in itertools.groupby(zip(places, pieces), lambda both: both[0]):
        yield i, j, [p for _, piece in run for p in piece]


def _columns(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    """The part of a mask for some of the keys."""
    return mask if mask is None or mask.shape[-1] == 1 else mask[..., start:stop]


class _Merged:
    """Attention over parts of the keys, put together one by one: Σ_i exp(lse_i - lse) · out_i, in float32."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []  # lse_i, [B, H, L] each
        self.lse, self.out = torch.empty(0), torch.empty(0)  # [B, H, L] and [B, H, L, Dv], once there are some

    def add(self, out: Tensor, lse: Tensor) -> None:
        out, first = out.float(), not self.parts
        self.parts.append(lse)
        self.lse = lse if first else torch.logaddexp(self.lse, lse)
        self.out = out if first else self.out.lerp_(out, self._share(lse).unsqueeze(-1))

    def weights(self) -> list[Tensor]:
        """What each part has of each row, `[B, H, L]`; zero where a row sees nothing."""
        return [self._share(lse) for lse in self.parts]

    def _share(self, lse: Tensor) -> Tensor:
        return torch.where(self.lse == -torch.inf, 0.0, (lse - self.lse).exp())


def _dequantize_means_fake(codes, scales, means, held, held_ranges, start, stop, block, bits, *others):
    batch, heads, _, width = codes.shape
    return codes.new_empty(batch, heads, stop - start, width * 8 // bits, dtype=others[-1])


def _attention_means_fake(query, *others):
    return ops._empty_attention_output(query, others[14].shape[-1])


def _attention_means_lse_fake(query, *others):
    return ops._sdpa_lse_fake(query, others[13], others[14])


def _nothing(*_: Any) -> None:
    return None


_kernels: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("append_means", append_means, _nothing),
    ("fill_means", fill_means, _nothing),
    ("move_means", move_means, _nothing),
    ("dequantize_means", dequantize_means, _dequantize_means_fake),
    ("attention_means", attention_means, _attention_means_fake),
    ("attention_means_lse", attention_means_lse, _attention_means_lse_fake),
)
for _name, _kernel, _fake in _kernels:
    ops.library.impl(_name, ops._without_autocast(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"jkv::{_name}", _fake, lib=ops.library)
