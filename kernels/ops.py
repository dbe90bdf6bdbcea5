"""The `jkv::` operators: schemas, shape functions and the choice of a kernel per device.

They are what rewritten graphs call. All state is in tensor arguments (`layout` says how they are laid out), everything
that affects a result is an argument, and mutation is annotated, so torch.compile may functionalise, reorder and cache
around them. Defined with `torch.library.Library` rather than `custom_op`, whose call costs three times as much.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import byte_steps, cpu, cpu_torch, quantizers
from .layout import in_blocks, is_symmetric

library = torch.library.Library("jkv", "DEF")
_TAGS = (torch.Tag.flexible_layout,)  # kernels take any strides: Inductor need not copy inputs into a layout
_HOST_TAGS = (*_TAGS, torch.Tag.cudagraph_unsafe)  # what is launched depends on numbers in a CPU tensor

library.define("append(Tensor(a!) codes, Tensor(b!) scales, Tensor source, SymInt start, int bits) -> ()", tags=_TAGS)
library.define(
    "append_kv(Tensor(a!) key_codes, Tensor(b!) key_scales, Tensor(c!) value_codes, Tensor(d!) value_scales, "
    "Tensor key, Tensor value, SymInt start, int key_bits, int value_bits) -> ()",
    tags=_TAGS,
)
library.define(
    "move(Tensor(a!) codes, Tensor(b!) scales, SymInt source, SymInt destination, SymInt length) -> ()", tags=_TAGS
)
library.define(
    "dequantize(Tensor codes, Tensor scales, SymInt start, SymInt stop, int bits, ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
library.define(
    "attention(Tensor query, Tensor key_codes, Tensor key_scales, Tensor value_codes, Tensor value_scales, "
    "SymInt[] ranges, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, "
    "int key_bits, int value_bits, str correction) -> Tensor",
    tags=_TAGS,
)
library.define(
    "attention_lse(Tensor query, Tensor key_codes, Tensor key_scales, Tensor value_codes, Tensor value_scales, "
    "SymInt[] ranges, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, "
    "int key_bits, int value_bits, str correction) -> (Tensor, Tensor)",
    tags=_TAGS,
)
library.define(
    "sdpa_lse(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale) -> (Tensor, Tensor)",
    tags=_TAGS,
)

library.define("fill(Tensor(a!) codes, Tensor(b!) scales, SymInt start, SymInt stop, float value) -> ()", tags=_TAGS)
library.define(
    "dequantize_active(Tensor codes, Tensor scales, Tensor active, Tensor active_range, SymInt start, SymInt stop, "
    "int bits, ScalarType dtype) -> Tensor",
    tags=_HOST_TAGS,
)
library.define(
    "attention_active(Tensor query, Tensor key_codes, Tensor key_scales, Tensor value_codes, Tensor value_scales, "
    "Tensor key_active, Tensor key_active_range, Tensor value_active, Tensor value_active_range, "
    "SymInt start, SymInt stop, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, "
    "int key_bits, int value_bits, str correction) -> Tensor",
    tags=_HOST_TAGS,
)
library.define(
    "attention_active_lse(Tensor query, Tensor key_codes, Tensor key_scales, Tensor value_codes, Tensor value_scales, "
    "Tensor key_active, Tensor key_active_range, Tensor value_active, Tensor value_active_range, "
    "SymInt start, SymInt stop, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, "
    "int key_bits, int value_bits, str correction) -> (Tensor, Tensor)",
    tags=_HOST_TAGS,
)

library.define("rotate(Tensor x) -> Tensor", tags=_TAGS)
library.define("round_unbiased(Tensor x, int bits, int group_size, bool symmetric=False) -> Tensor", tags=_TAGS)
for _name in ("fill_rotated", "fill_symmetric"):
    library.define(
        f"{_name}(Tensor(a!) codes, Tensor(b!) scales, SymInt start, SymInt stop, int bits, float value) -> ()",
        tags=_TAGS,
    )


def _kernels(device: torch.device):
    """The module that holds the kernels for a device."""
    if device.type == "cuda":
        from . import gpu

        return gpu
    if device.type == "cpu":
        return cpu
    raise NotImplementedError(f"jkv:: operators have no kernels for {device.type} tensors")


def append(codes: Tensor, scales: Tensor, source: Tensor, start: int, bits: int) -> None:
    """Quantize `source` `[B, H, n, D]` into tokens `start … start + n - 1` of a packed cache, in place.

    Args:
        codes: uint8 `[B, H, S, D · bits / 8]`, mutated.
        scales: float16 `[B, H, G, S, 2]`, mutated; or `[B, H, G, S / block, 2]`, where a block of tokens shares its
            steps (with G = D, per-channel steps: KIVI, arXiv 2402.02750). With a last dimension of 1, the grid is
            symmetric; of uint8, steps have 8 bits (`layout`); so for all operators.
        source: float32, float16 or bfloat16, any strides; must not alias the cache.
        start: first token written.
        bits: 2, 3, 4 or 8.

    Raises:
        RuntimeError: the range does not lie within the cache, or is not made of whole blocks; nothing has been written
            then.
    """
    if start < 0 or start + source.shape[2] > codes.shape[2]:
        raise RuntimeError(
            f"jkv::append: tokens {start}:{start + source.shape[2]} "
            f"do not lie within the cache's {codes.shape[2]} tokens"
        )
    if not source.numel():
        return
    if byte_steps.are_bytes(scales):
        _write(codes, scales, start, start + source.shape[2], bits, "append", source, 0, bits)
    else:
        _kernels(codes.device).append(codes, scales, source, start, bits)


def _write(codes: Tensor, scales: Tensor, start: int, stop: int, bits: int, name: str, *arguments: Any) -> None:
    """Have the operator of this name set tokens start … stop - 1, the only ones that it gets, with float16 scales."""
    operator = getattr(torch.ops.jkv, name)
    byte_steps.write(lambda c, s: operator(c, s, *arguments), codes, scales, start, stop, bits)


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
    """`append` for keys and values of the same tokens: one launch on a GPU. Nothing is written if one does not fit."""
    stop = start + key.shape[2]
    if start < 0 or stop > min(key_codes.shape[2], value_codes.shape[2]) or key.shape[:3] != value.shape[:3]:
        raise RuntimeError(
            f"jkv::append_kv: tokens {start}:{stop} do not lie within caches of {key_codes.shape[2]} and "
            f"{value_codes.shape[2]} tokens, or keys {tuple(key.shape)} and values {tuple(value.shape)} differ"
        )
    in_blocks(key_codes, key_scales, start, stop)
    in_blocks(value_codes, value_scales, start, stop)
    halves = not (byte_steps.are_bytes(key_scales) or byte_steps.are_bytes(value_scales))
    if key_codes.device.type == "cuda" and key.numel() and halves:
        _kernels(key_codes.device).append_kv(
            key_codes, key_scales, value_codes, value_scales, key, value, start, key_bits, value_bits
        )
        return
    append(key_codes, key_scales, key, start, key_bits)
    append(value_codes, value_scales, value, start, value_bits)


def move(codes: Tensor, scales: Tensor, source: int, destination: int, length: int) -> None:
    """Copy packed tokens `source … source + length - 1` to `destination …`, bit for bit; the ranges may overlap."""
    for first in (source, destination):
        if first < 0 or length < 0 or first + length > codes.shape[2]:
            raise RuntimeError(
                f"jkv::move: tokens {first}:{first + length} do not lie within the cache's {codes.shape[2]} tokens"
            )
    kernels = cpu_torch if byte_steps.are_bytes(scales) else _kernels(codes.device)
    kernels.move(codes, scales, source, destination, length)


def fill(codes: Tensor, scales: Tensor, start: int, stop: int, value: float) -> None:
    """Set tokens `start … stop - 1` to a number that float16 holds exactly (zero, as a rule).

    Raises:
        RuntimeError: the range does not lie within the cache, or is not made of whole blocks; or the cache is
            symmetric, and the number is not zero (`quantizers.fill_symmetric` takes it).
    """
    if not 0 <= start <= stop <= codes.shape[2]:
        raise RuntimeError(f"jkv::fill: tokens {start}:{stop} do not lie within the cache's {codes.shape[2]} tokens")
    if is_symmetric(scales) and value:
        raise RuntimeError(f"jkv::fill: {value} in a symmetric cache; jkv::fill_symmetric takes other numbers than 0")
    if byte_steps.are_bytes(scales):
        return _write(codes, scales, start, stop, 8, "fill", 0, stop - start, value)  # whatever its bits: steps are 0
    first, last = in_blocks(codes, scales, start, stop)
    codes[:, :, start:stop] = 0
    scales[:, :, :, first:last, 0] = 0
    scales[:, :, :, first:last, 1:] = value


def rotate(x: Tensor) -> Tensor:
    """See `quantizers.rotate`."""
    if x.is_cuda:
        from . import gpu_rotate

        return gpu_rotate.rotate(x)
    return quantizers.rotate(x)


def round_unbiased(x: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Tensor:
    """See `quantizers.round_unbiased`."""
    if x.is_cuda:
        from . import gpu_rotate

        return gpu_rotate.round_unbiased(x, bits, group_size, symmetric)
    return quantizers.round_unbiased(x, bits, group_size, symmetric)


def dequantize(codes: Tensor, scales: Tensor, start: int, stop: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Tokens `start … stop - 1` of a packed cache as a contiguous `[B, H, stop - start, D]` tensor of `dtype`."""
    if not 0 <= start <= stop <= codes.shape[2]:
        raise RuntimeError(
            f"jkv::dequantize: tokens {start}:{stop} do not lie within the cache's {codes.shape[2]} tokens"
        )
    if byte_steps.are_bytes(scales):
        first, [(codes, scales)] = byte_steps.read(start, stop, (codes, scales))
        return torch.ops.jkv.dequantize(codes, scales, start - first, stop - first, bits, dtype)
    return _kernels(codes.device).dequantize(codes, scales, start, stop, bits, dtype)


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
) -> Tensor:
    """softmax over [s·q·k̂_j - b_ij + mask, j cached; s·q·k_j + mask, j in full precision] times the values.

    One softmax over two phases (arXiv 2605.26266): packed tokens, whose scores carry the correction b of
    `reference.correction_bias`, then full-precision keys (the chunk being generated, sinks, windows), which are
    **never** corrected.

    Args:
        query: `[B, H, L, D]`, float32, float16 or bfloat16; H a multiple of the key/value heads H_kv (grouped queries).
        key_codes, key_scales, value_codes, value_scales: packed caches of H_kv heads; their head_dims may differ.
        ranges: `[start, stop, start, stop, …]`, the packed tokens to attend, in the mask's order.
        key, value: full-precision `[B, H_kv, N, D]` and `[B, H_kv, N, Dv]` in query's dtype; N may be 0.
        mask: None, or boolean (True is visible) or additive, broadcastable to `[B, H, L, cached + N]`.
        causal: of the full-precision keys, query i sees key j only if j <= i + N - L; packed tokens are all visible.
        scale: softmax scale s.
        correction: "none", "taylor", "clamped" or "exact".

    Returns:
        `[B, H, L, Dv]` in query's dtype, laid out in memory as `[B, L, H, Dv]`, as PyTorch's flash attention does.

    Raises:
        RuntimeError: a range does not lie within the cache.
    """
    _check_ranges("attention", ranges, key_codes)
    if byte_steps.are_bytes(key_scales) or byte_steps.are_bytes(value_scales):
        store, ranges = _with_halves((key_codes, key_scales), (value_codes, value_scales), ranges)
        return torch.ops.jkv.attention(
            query, *store, ranges, key, value, mask, causal, scale, key_bits, value_bits, correction
        )
    output, _ = _kernels(query.device).attention(
        query, key_codes, key_scales, value_codes, value_scales, ranges, key, value, mask, causal, scale, key_bits,
        value_bits, correction,
    )  # fmt: skip
    return output


def _with_halves(
    keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], ranges: list[int]
) -> tuple[tuple[Tensor, ...], list[int]]:
    """Codes and float16 scales of keys and of values, as far as `ranges` reach, and where these are there."""
    first, (keys, values) = byte_steps.read(min(ranges, default=0), max(ranges, default=0), keys, values)
    return (*keys, *values), [token - first for token in ranges]


def _check_ranges(name: str, ranges: list[int], codes: Tensor) -> None:
    for start, stop in zip(ranges[::2], ranges[1::2]):
        if not 0 <= start <= stop <= codes.shape[2]:
            raise RuntimeError(
                f"jkv::{name}: tokens {start}:{stop} do not lie within the cache's {codes.shape[2]} tokens"
            )


def attention_lse(
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
    """As `attention`, and the log-sum-exp of each row's scores: results over disjoint keys can be merged exactly.

    With scores S_i over the keys of part i, softmax over all of them is Σ_i exp(lse_i - lse) · out_i, with
    lse = log Σ_i exp(lse_i) (`jkv_compile.distributed.merge`). The correction is in the scores, hence in lse.

    Returns:
        The result of `attention`, and float32 `[B, H, L]`, the natural logarithm. A query that sees no key, as where a
        part holds no tokens yet, has a result of zeros and a log-sum-exp of -inf, and adds nothing to a merge.

    Raises:
        RuntimeError: a range does not lie within the cache.
    """
    _check_ranges("attention_lse", ranges, key_codes)
    if sum(ranges[1::2]) - sum(ranges[::2]) + key.shape[2] == 0:
        output = _empty_attention_output(query, value.shape[-1])
        return output.zero_(), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    if byte_steps.are_bytes(key_scales) or byte_steps.are_bytes(value_scales):
        store, ranges = _with_halves((key_codes, key_scales), (value_codes, value_scales), ranges)
        return torch.ops.jkv.attention_lse(
            query, *store, ranges, key, value, mask, causal, scale, key_bits, value_bits, correction
        )
    output, lse = _kernels(query.device).attention(
        query, key_codes, key_scales, value_codes, value_scales, ranges, key, value, mask, causal, scale, key_bits,
        value_bits, correction,
    )  # fmt: skip
    if mask is not None or causal:
        output.masked_fill_((lse == -torch.inf).unsqueeze(-1), 0)
    return output, lse


def sdpa_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over keys and values in full precision, and its log-sum-exp; see `attention_lse`.

    What a graph's attention over part of the tokens is before its cache is packed; `passes` replaces it. query
    `[B, H, L, D]`, key `[B, H_kv, N, D]`, value `[B, H_kv, N, Dv]`; causal: query i sees key j only if j <= i.
    """
    if causal:  # of `attention_lse` the other corner is meant
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = visible if mask is None else mask & visible if mask.dtype == torch.bool else (
            mask.masked_fill(~visible, -torch.inf)
        )  # fmt: skip
    nothing = [t.new_empty(*t.shape[:2], 0, t.shape[3] // 4, dtype=torch.uint8) for t in (key, value)]
    scales = [t.new_empty(*t.shape[:2], 1, 0, 2, dtype=torch.float16) for t in (key, value)]
    return attention_lse(
        query, nothing[0], scales[0], nothing[1], scales[1], [], key, value, mask, False, scale, 2, 2, "none"
    )


# A cache that was written in another graph, or in eager code, holds the range written last in full precision too
# (`active`, `[B, H, n, D]`; `active_range`, int64 `[start, stop]` on the CPU, so that reading it waits for no device).
# A CUDA graph would replay the range it was captured with: by their tags, Inductor captures around these operators.


def dequantize_active(
    codes: Tensor, scales: Tensor, active: Tensor, active_range: Tensor, start: int, stop: int, bits: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `dequantize`, with the active range as it was written."""
    out = dequantize(codes, scales, start, stop, bits, dtype)
    first, last = (min(max(p, start), stop) for p in active_range.tolist())
    if first < last:
        offset = int(active_range[0])
        out[:, :, first - start : last - start] = active[:, :, first - offset : last - offset]
    return out


def attention_active(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    key_active: Tensor,
    key_active_range: Tensor,
    value_active: Tensor,
    value_active_range: Tensor,
    start: int,
    stop: int,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    key_bits: int,
    value_bits: int,
    correction: str,
) -> Tensor:
    """As `attention` over tokens `start … stop - 1`, the active range among them in full precision and uncorrected.

    Where the active ranges of keys and values differ (only one of them has been written since), neither is used.
    """
    return attention(*_with_active(
        query, key_codes, key_scales, value_codes, value_scales, key_active, key_active_range, value_active,
        value_active_range, start, stop, key, value, mask, causal, scale, key_bits, value_bits, correction,
    ))  # fmt: skip


def attention_active_lse(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As `attention_active`, and the log-sum-exp, see `attention_lse`."""
    return attention_lse(*_with_active(*arguments))


def _with_active(
    query: Tensor, key_codes: Tensor, key_scales: Tensor, value_codes: Tensor, value_scales: Tensor,
    key_active: Tensor, key_active_range: Tensor, value_active: Tensor, value_active_range: Tensor,
    start: int, stop: int, key: Tensor, value: Tensor, mask: Tensor | None, *settings: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `attention` in which the active range is among the keys in full precision."""
    written = key_active_range.tolist()
    first, last = (min(max(p, start), stop) for p in written)
    store = key_codes, key_scales, value_codes, value_scales
    if written != value_active_range.tolist() or first >= last:
        return (query, *store, [start, stop], key, value, mask, *settings)
    held = slice(first - written[0], last - written[0])
    key, value = (
        torch.cat((active[:, :, held].to(x.dtype), x), 2) for active, x in ((key_active, key), (value_active, value))
    )
    if mask is not None and last < stop and mask.shape[-1] > 1:  # columns follow: packed, then full precision
        a, b, end = first - start, last - start, stop - start
        mask = torch.cat((mask[..., :a], mask[..., b:end], mask[..., a:b], mask[..., end:]), -1)
    return (query, *store, [start, first, last, stop], key, value, mask, *settings)


def _empty_attention_output(query: Tensor, head_dim: int) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _attention_fake(query, key_codes, key_scales, value_codes, value_scales, ranges, key, value, *_):
    return _empty_attention_output(query, value.shape[-1])


def _attention_lse_fake(query, key_codes, key_scales, value_codes, value_scales, ranges, key, value, *_):
    return _sdpa_lse_fake(query, key, value)


def _sdpa_lse_fake(query, key, value, *_):
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return _empty_attention_output(query, value.shape[-1]), lse


def _attention_active_fake(query, *others):
    return _empty_attention_output(query, others[11].shape[-1])


def _attention_active_lse_fake(query, *others):
    return _sdpa_lse_fake(query, others[10], others[11])


def _dequantize_active_fake(codes, scales, active, active_range, start, stop, bits, dtype):
    return _dequantize_fake(codes, scales, start, stop, bits, dtype)


def _dequantize_fake(codes, scales, start, stop, bits, dtype):
    batch, heads, _, width = codes.shape
    return codes.new_empty(batch, heads, stop - start, width * 8 // bits, dtype=dtype)


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels choose their own precisions: autocast must not reach into them."""

    @functools.wraps(kernel)
    def run(first: Tensor, *args: Any) -> Any:
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return kernel(first, *args)
        with torch.autocast(device, enabled=False):
            return kernel(first, *args)

    return run


for _name, _kernel, _fake in (
    ("append", append, lambda *_: None),
    ("append_kv", append_kv, lambda *_: None),
    ("move", move, lambda *_: None),
    ("dequantize", dequantize, _dequantize_fake),
    ("attention", attention, _attention_fake),
    ("attention_lse", attention_lse, _attention_lse_fake),
    ("sdpa_lse", sdpa_lse, _sdpa_lse_fake),
    ("fill", fill, lambda *_: None),
    ("dequantize_active", dequantize_active, _dequantize_active_fake),
    ("attention_active", attention_active, _attention_active_fake),
    ("attention_active_lse", attention_active_lse, _attention_active_lse_fake),
    ("rotate", rotate, torch.empty_like),
    ("round_unbiased", round_unbiased, lambda x, *_: x.new_empty(x.shape, dtype=torch.float32)),
    ("fill_rotated", quantizers.fill_rotated, lambda *_: None),
    ("fill_symmetric", quantizers.fill_symmetric, lambda *_: None),
):
    # For every device; where there are kernels in C++ (`cpu_cpp`), they take precedence once they are installed.
    library.impl(_name, _without_autocast(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"jkv::{_name}", _fake, lib=library)
