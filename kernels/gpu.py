"""Kernels for CUDA and HIP tensors: what `ops` calls, in terms of the Triton kernels.

Two paths for cached keys, one threshold per architecture (`Architecture.unpack_once_rows`):

* **fused** (few query rows): codes are unpacked in registers, nothing but the packed cache is read;
* **unpack-once** (many query rows, as video chunks have): a slab of heads is dequantized to float16 scratch of at most
  `SLAB_BYTES`, which plain flash attention with the correction's columns then reads.

Few rows and many keys (decode) are split over the keys, and joined by their log-sum-exp.

Safe to capture in a CUDA graph: what is launched and allocated depends on shapes and on the integers a caller passes,
never on values in a tensor; nothing synchronises with the host, and scratch comes from the caching allocator, whose
capture pool gives replays the same addresses. (Operators that take an active range read it from a CPU tensor; they are
tagged, and Inductor leaves them out of its captures.) Under Triton's interpreter the same functions take CPU tensors.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from . import reference
from .layout import in_blocks, scale_words, token_block
from .triton_append import append_kernel
from .triton_attention import Meta, attention_kernel
from .triton_config import (
    APPEND_BLOCK,
    ARCHITECTURES,
    DEQUANTIZE_BLOCK,
    MAX_FUSED_RANGES,
    MAX_MOVE_STEPS,
    MAX_SPLITS,
    MOVE_BLOCK,
    SLAB_BYTES,
    architecture_of,
    eighth_lanes,
    processors_of,
    tile,
)
from .triton_correction import prepare_kernel
from .triton_dequantize import dequantize_kernel
from .triton_merge import merge_kernel
from .triton_move import move_kernel


def append(codes: Tensor, scales: Tensor, source: Tensor, start: int, bits: int) -> None:
    """Quantize `source` into tokens `start …` of one cache; see `ops.append`."""
    _append(codes, scales, source, codes, scales, source, start, bits, bits, 1)


def append_kv(
    key_codes: Tensor,
    key_scales: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    key_bits: int,
    value_bits: int,
) -> None:
    """`append` for keys and values in one launch."""
    _append(key_codes, key_scales, key, value_codes, value_scales, value, start, key_bits, value_bits, 2)


def _append(key_codes, key_scales, key, value_codes, value_scales, value, start, key_bits, value_bits, stores) -> None:
    batch, heads, length, head_dim = key.shape
    blocks = token_block(key_codes, key_scales), token_block(value_codes, value_scales)
    for codes, scales in ((key_codes, key_scales), (value_codes, value_scales)):
        in_blocks(codes, scales, start, length)
    if length == 0 or batch * heads == 0:
        return
    key_words, value_words = _words(key_scales), _words(value_scales)
    least = min(APPEND_BLOCK if block == 1 else block for block in blocks)
    append_kernel[(_ceil_div(length, least), batch * heads, stores)](
        key_codes, key_words, key, value_codes, value_words, value,
        _code_strides(key_codes), key_words.stride()[:3], key.stride(),
        _code_strides(value_codes), value_words.stride()[:3], value.stride(),
        heads, length, start, APPEND_BLOCK,
        key_bits, key_scales.shape[2], head_dim, eighth_lanes(head_dim),
        value_bits, value_scales.shape[2], value.shape[3], eighth_lanes(value.shape[3]), *blocks,
    )  # fmt: skip


def move(codes: Tensor, scales: Tensor, source: int, destination: int, length: int) -> None:
    """Copy tokens `source …` to `destination …`, bit for bit; see `ops.move`."""
    first, to, count = in_blocks(codes, scales, source, destination, length)
    distance = min(abs(source - destination), length)
    if distance == 0 or codes.numel() == 0:
        return
    if length > MAX_MOVE_STEPS * distance:  # too little is moved at a time: aside and back, with the whole device
        codes[:, :, destination : destination + length] = codes[:, :, source : source + length].clone()
        scales[:, :, :, to : to + count] = scales[:, :, :, first : first + count].clone()
        return
    batch, heads, _, width = codes.shape
    words, groups = _words(scales), scales.shape[2]
    move_kernel[(_ceil_div(distance, MOVE_BLOCK), batch * heads, 2)](
        codes, words, _code_strides(codes), words.stride()[:3], heads, source, destination, length, distance,
        width, _power_of_2(width), groups, _power_of_2(groups), token_block(codes, scales), MOVE_BLOCK,
    )  # fmt: skip


def dequantize(codes: Tensor, scales: Tensor, start: int, stop: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Tokens `start … stop - 1` as a contiguous tensor of `dtype`; see `ops.dequantize`."""
    batch, heads, _, width = codes.shape
    output = codes.new_empty(batch, heads, stop - start, width * 8 // bits, dtype=dtype)
    if output.numel():
        _dequantize(codes, scales, output, codes, scales, output, output, start, stop, 0, bits, bits, 1, 0)
    return output


def _dequantize(key_codes, key_scales, key, value_codes, value_scales, value, columns, start, stop, first, key_bits,
                value_bits, stores, n_columns) -> None:  # fmt: skip
    batch, heads, total, head_dim = key.shape
    key_words, value_words = _words(key_scales), _words(value_scales)
    dequantize_kernel[(_ceil_div(stop - start, DEQUANTIZE_BLOCK), batch * heads, stores)](
        key_codes, key_words, key, columns, value_codes, value_words, value,
        _code_strides(key_codes), key_words.stride()[:3], key.stride()[:3],
        _code_strides(value_codes), value_words.stride()[:3], value.stride()[:3],
        heads, start, stop - start, first, total, DEQUANTIZE_BLOCK,
        key_bits, key_scales.shape[2], head_dim, eighth_lanes(head_dim),
        value_bits, value_scales.shape[2], value.shape[3], eighth_lanes(value.shape[3]),
        token_block(key_codes, key_scales), token_block(value_codes, value_scales), n_columns,
    )  # fmt: skip


def attention(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    ranges: list[int],
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    key_bits: int,
    value_bits: int,
    correction: str,
) -> tuple[Tensor, Tensor]:
    """As `ops.attention`; also returns the log-sum-exp `[B, H, L]` in float32.

    A row whose every key is masked gives zeros and a log-sum-exp of -inf, as `F.scaled_dot_product_attention` does.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, n_current, value_dim = key.shape[1], key.shape[2], value.shape[3]
    output = query.new_empty(batch, length, heads, value_dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    if not output.numel():
        return output, lse
    if scale <= 0:  # the online softmax takes the maximum before scaling
        query, scale = (query * -1, -scale) if scale < 0 else (query * 0, 1.0)
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    spans = [(a, b) for a, b in zip(ranges[::2], ranges[1::2]) if b > a]
    n_cached = sum(b - a for a, b in spans)
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        mask = _aligned(mask, n_cached + n_current).expand(batch, heads, length, n_cached + n_current)

    rows = heads // kv_heads * length
    architecture = architecture_of(query.device)
    per_channel = token_block(key_codes, key_scales) > 1 or token_block(value_codes, value_scales) > 1
    groups = 1 if per_channel else key_scales.shape[2]
    meta, options = tile(architecture, head_dim, value_dim, _power_of_2(rows), query.dtype == torch.float32)
    crowded = mask is not None or 3 in (key_bits, value_bits)  # a tile of the mask, a second plane: registers too
    meta = _variant(
        meta,
        BLOCK_N=min(meta.BLOCK_N, 64) if crowded else meta.BLOCK_N,
        KEY_BITS=key_bits,
        VALUE_BITS=value_bits,
        KEY_GROUPS=groups,
        VALUE_GROUPS=value_scales.shape[2],
        COLUMNS=max(16, 2 * _power_of_2(groups)),
        CURRENT=n_current > 0 or n_cached == 0,
        MASK="none" if mask is None else "boolean" if mask.dtype == torch.uint8 else "additive",
        CAUSAL=causal,
    )
    arguments = (query, key, value, mask, output, lse, scale, options)
    if n_cached == 0:
        _launch(meta, *arguments)
        return output, lse

    form = "taylor" if correction == "clamped" else correction
    meta = _variant(meta, CLAMPED=correction == "clamped" and not per_channel)
    long = rows >= ARCHITECTURES[architecture].unpack_once_rows or len(spans) > MAX_FUSED_RANGES
    if per_channel or (long and correction != "exact"):
        meta = _variant(meta, CACHED="dense", CORRECTION="block" if per_channel and correction != "none" else form)
        _unpack_once(meta, (key_codes, key_scales, value_codes, value_scales), spans, arguments, correction)
    else:
        meta = _variant(meta, CACHED="packed", CORRECTION=form)
        _fused(meta, (key_codes, key_scales, value_codes, value_scales), spans, arguments)
    return output, lse


def _fused(meta: Meta, store, spans, arguments) -> None:
    """Attend to the packed store as it is; more than `MAX_FUSED_RANGES` ranges in parts, which are merged."""
    query, key, value, mask, output, lse, scale, options = arguments
    parts = [spans[i : i + MAX_FUSED_RANGES] for i in range(0, len(spans), MAX_FUSED_RANGES)]
    if len(parts) == 1:
        _launch(_variant(meta, RANGES=len(spans)), *arguments, store=store, spans=spans)  # type: ignore[misc]
        return
    batch, heads, length, _ = query.shape
    partial = query.new_empty(len(parts), batch, heads, length, meta.VALUE_DIM, dtype=torch.float32)
    partial_lse = query.new_empty(len(parts), batch, heads, length, dtype=torch.float32)
    column = 0
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        stop = None if last else column + sum(b - a for a, b in part)
        current = slice(None if last else 0)
        _launch(
            _variant(meta, RANGES=len(part), CURRENT=meta.CURRENT and last), query, key[:, :, current],
            value[:, :, current], None if mask is None else mask[..., column:stop], partial[i], partial_lse[i], scale,
            options, store=store, spans=part,
        )  # fmt: skip
        column = stop or column
    _merge(partial, partial_lse, output, lse)


def _merge(partial: Tensor, partial_lse: Tensor, output: Tensor, lse: Tensor) -> None:
    """Join `[parts, B, H, L, Dv]` into output `[B, H, L, Dv]`."""
    splits, batch, heads, length, value_dim = partial.shape
    merge_kernel[(_ceil_div(heads * length, 16), batch)](
        partial, partial_lse, output, lse, output.stride()[:3], lse.stride(0), splits, heads * length, length,
        value_dim, 8 * eighth_lanes(value_dim), 16,
    )  # fmt: skip


def _unpack_once(meta: Meta, store, spans, arguments, correction: str) -> None:
    """Dequantize a slab of key/value heads at a time, and attend to it."""
    query, key, value, mask, output, lse, scale, options = arguments
    key_codes, key_scales, _, _ = store
    batch, kv_heads = key_codes.shape[:2]
    n_cached = sum(b - a for a, b in spans)
    columns = meta.COLUMNS if meta.CORRECTION == "taylor" else 0
    width = meta.HEAD_DIM + meta.VALUE_DIM + columns
    block = token_block(key_codes, key_scales)
    group = query.shape[1] // kv_heads
    per_head = 2 * batch * n_cached * width
    if meta.CORRECTION == "block":
        first_block = min(a for a, _ in spans) // block
        blocks = slice(first_block, _ceil_div(max(b for _, b in spans), block))
        per_head += 4 * batch * group * query.shape[2] * (blocks.stop - blocks.start)
        rows = [torch.arange(a, b, dtype=torch.int32, device=query.device) for a, b in spans]
        block_of_row = torch.cat(rows) // block - first_block
    heads = min(kv_heads, max(1, SLAB_BYTES // per_head))
    scratch = query.new_empty(batch * heads * n_cached * width, dtype=torch.float16)
    for first in range(0, kv_heads, heads):
        count = min(heads, kv_heads - first)
        own, queries = slice(first, first + count), slice(first * group, (first + count) * group)
        sizes = [batch * count * n_cached * w for w in (meta.HEAD_DIM, meta.VALUE_DIM, columns)]
        keys, values, deltas = scratch[: sum(sizes)].split(sizes)
        keys = keys.view(batch, count, n_cached, meta.HEAD_DIM)
        values = values.view(batch, count, n_cached, meta.VALUE_DIM)
        deltas = deltas.view(batch, count, n_cached, columns)
        slab = [t[:, own] for t in store]
        row = 0
        for start, stop in spans:
            _dequantize(  # type: ignore[call-arg]
                *slab[:2], keys, *slab[2:], values, deltas, start, stop, row, meta.KEY_BITS, meta.VALUE_BITS, 2,
                columns,
            )  # fmt: skip
            row += stop - start
        bias = None
        if meta.CORRECTION == "block":
            bias = _block_bias(query[:, queries], key_scales[:, own, :, blocks], meta.KEY_BITS, scale, correction)
            deltas = block_of_row.expand(batch, count, n_cached).unsqueeze(-1)
        _launch(
            meta, query[:, queries], key[:, own], value[:, own], None if mask is None else mask[:, queries],
            output[:, queries], lse[:, queries], scale, options, store=(keys, deltas, values, values),
            spans=[(0, n_cached)], bias=bias,
        )  # fmt: skip


def _launch(meta: Meta, query, key, value, mask, output, lse, scale, options, store=None, spans=((0, 0),),
            bias=None) -> None:  # fmt: skip
    """One attention over the given heads, split over the keys where there are too few rows to fill the device."""
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    grouped = heads > kv_heads and length < meta.BLOCK_M
    grid_heads, rows = (kv_heads, heads // kv_heads * length) if grouped else (heads, length)
    n_cached = sum(b - a for a, b in spans)
    grid_rows = _ceil_div(rows, meta.BLOCK_M)
    tiles = _ceil_div(n_cached, meta.BLOCK_N) + _ceil_div(key.shape[2], meta.BLOCK_N)
    splits = splits_of(grid_rows * batch * grid_heads, tiles, processors_of(query.device))
    per_split = _ceil_div(tiles, splits)
    splits = _ceil_div(tiles, per_split) if tiles else 1

    meta = _variant(meta, GROUPED=grouped)
    bias = query if bias is None else bias
    prepared = query
    arch = ARCHITECTURES[architecture_of(query.device)]
    if arch.prepared and meta.CACHED != "none" and meta.BLOCK_M >= 64:
        meta = _variant(meta, PREPARED=True)
        prepared = query.new_empty(batch, heads, length, meta.HEAD_DIM + meta.COLUMNS, dtype=torch.float16)
        prepare_kernel[(_ceil_div(length, 64), batch * heads)](
            query, prepared, query.stride()[:3], heads, length, scale, 64, meta.HEAD_DIM, meta.KEY_EIGHTH,
            meta.KEY_GROUPS, meta.COLUMNS,
        )  # fmt: skip

    target, target_lse = output, lse
    output_strides = (0, *output.stride()[:3])
    lse_strides = (0, lse.stride(0))
    if splits > 1:
        meta = _variant(meta, SPLIT=True)
        target = query.new_empty(splits, batch, heads, length, meta.VALUE_DIM, dtype=torch.float32)
        target_lse = query.new_empty(splits, batch, heads, length, dtype=torch.float32)
        output_strides, lse_strides = target.stride()[:4], target_lse.stride()[:2]
    key_store, key_scales, value_store, value_scales = store or (query, query, query, query)
    shifts, column = [], 0
    for start, stop in spans:
        shifts += [start - column, column + stop - start]
        column += stop - start
    shifts = (shifts + [0] * 7)[:7]
    if meta.CACHED == "packed":
        key_scales, value_scales = _words(key_scales), _words(value_scales)
    attention_kernel[(grid_rows, batch * grid_heads, splits)](
        query, key_store, key_scales, value_store, value_scales, prepared, bias, key, value,
        query if mask is None else mask, target, target_lse,
        query.stride()[:3], prepared.stride()[:2], _code_strides(key_store), _code_strides(key_scales),
        _code_strides(value_store), _code_strides(value_scales),
        bias.stride()[:3], key.stride()[:3], value.stride()[:3],
        (0, 0, 0, 0) if mask is None else mask.stride(), output_strides, lse_strides,
        grid_heads, heads // kv_heads, rows, length, key.shape[2], n_cached, *shifts, per_split, scale, meta, **options,
    )  # fmt: skip
    if splits > 1:
        _merge(target, target_lse, output, lse)


def _block_bias(query: Tensor, scales: Tensor, bits: int, scale: float, correction: str) -> Tensor:
    """b / s `[B, H, L, T]`: with per-channel steps the correction is one number per query and block of tokens."""
    delta = reference.quantization_step(scales, bits).repeat_interleave(query.shape[1] // scales.shape[1], 1)
    return reference.correction_bias(query, delta, scale, correction) / scale


def splits_of(programs: int, tiles: int, processors: int) -> int:
    """Splits of the keys that fill `processors` with `programs` row blocks; each keeps at least two tiles."""
    if programs >= processors or tiles < 4:
        return 1
    return max(1, min(MAX_SPLITS, tiles // 2, math.ceil(2 * processors / programs)))


def _aligned(mask: Tensor, columns: int) -> Tensor:
    """The mask with its broadcast dimensions, in rows that start at multiples of 16 elements; copied only if need be.

    Rows that cannot be loaded in vectors make Triton compute the whole softmax in the layout of the mask's loads, which
    spills. A mask is small beside the scores it covers: as a rule all heads share it.
    """
    mask = mask.expand(*mask.shape[:-1], columns)
    outer = [stride for size, stride in zip(mask.shape[:-1], mask.stride()) if size > 1]
    if mask.stride(-1) == 1 and not any(stride % 16 for stride in outer) and mask.data_ptr() % 16 == 0:
        return mask
    padded = mask.new_empty(*mask.shape[:-1], _ceil_div(columns, 16) * 16)
    padded[..., :columns] = mask
    return padded[..., :columns]


@functools.cache
def _variant(meta: Meta, **fields: Any) -> Meta:
    """`meta._replace`, remembered: it is asked for at every call, and costs as much as the rest of a launch."""
    return meta._replace(**fields)


def _ceil_div(a: int, b: int) -> int:  # triton.cdiv costs ten microseconds outside a kernel
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << max(0, n - 1).bit_length()


def _code_strides(codes: Tensor) -> tuple[int, ...]:
    if codes.stride(3) != 1:
        raise ValueError(f"a packed cache's innermost stride is 1; found {codes.stride()}")
    return codes.stride()[:3]


def _words(scales: Tensor) -> Tensor:
    """Scales as words, see `triton_tiles`: `[B, H, G, T]`, token by token."""
    numbers, strides = scales.shape[4], scales.stride()
    together = strides[3] == numbers and (numbers == 1 or strides[4] == 1)
    if not together or any(s % numbers for s in (*strides[:3], scales.storage_offset())):
        raise ValueError(f"scales {list(scales.shape)} are stored token by token; found strides {strides}")
    return scale_words(scales)
