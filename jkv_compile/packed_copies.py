"""What makes new tensors from packed caches: copies stay packed, and new tensors of the same shape are plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .geometry import Window
from .packed import PackedKV
from .packed_dispatch import aten, implements, shadow, warn_of_read
from .packed_writes import same_steps
from .store import CHANNEL, TOKEN, Store


@implements(aten.clone.default)
def clone(source: PackedKV, memory_format: Any = None) -> Any:
    window = whole_heads(source)
    if window is None:
        repeated = _repeated(source)
        if repeated is not None:
            return repeated
        if source._store.unit > 1:
            warn_of_read("clone()")
        return source.dequantize_window().clone(memory_format=memory_format or torch.preserve_format)
    stride = torch.empty_like(shadow(source), memory_format=memory_format or torch.preserve_format).stride()
    strides = canonical_strides(window, source.shape, stride)
    store = source._store.extract(window.starts, window.lengths, strides)
    return PackedKV(store, source.shape, stride, 0, source.dtype)


def _repeated(source: PackedKV) -> PackedKV | None:
    """A copy of a view in which batch entries or heads stand several times each, as `repeat_interleave` makes it."""
    expanded = [dim for dim, step in enumerate(source.stride()) if step == 0 and source.shape[dim] > 1]
    if len(expanded) != 1 or expanded[0] == 0:
        return None
    dim, times = expanded[0], source.shape[expanded[0]]
    once = source.select(dim, 0)
    window = whole_heads(once)
    axis = None if window is None else window.axes[dim - 1]
    if window is None or axis is None or axis in (TOKEN, CHANNEL):
        return None
    index = torch.arange(once.shape[dim - 1]).repeat_interleave(times)
    merged = torch.empty((*once.shape[: dim - 1], len(index), *once.shape[dim:]), device="meta")
    strides = canonical_strides(window, merged.shape, merged.stride())
    store = source._store.gather(axis, index, window.starts, window.lengths, strides)
    return PackedKV(store, source.shape, torch.empty(source.shape, device="meta").stride(), 0, source.dtype)


@implements(aten._to_copy.default)
def to_copy(
    source: PackedKV, *, dtype: torch.dtype | None = None, layout: Any = None, device: Any = None,
    pin_memory: bool | None = None, non_blocking: bool = False, memory_format: Any = None,
) -> Any:  # fmt: skip
    """`to(device)` moves packed data. A cast is the beginning of a computation, and reads."""
    if dtype not in (None, source.dtype):
        return NotImplemented
    device = source.device if device is None else torch.device(device)
    copied = clone(source, memory_format)
    if device == source.device or not isinstance(copied, PackedKV):
        return copied.to(device)
    return _rehoused(copied, copied._store.map(lambda t: t.to(device, non_blocking=non_blocking)))


@implements(aten._pin_memory.default)
def pin_memory(source: PackedKV, device: Any = None) -> Any:
    copied = clone(source)
    if not isinstance(copied, PackedKV):
        return copied.pin_memory()
    return _rehoused(copied, copied._store.map(Tensor.pin_memory))


@implements(aten.is_pinned.default)
def is_pinned(source: PackedKV, device: Any = None) -> bool:
    host = source._store.host
    return (source._store.memory if host is None else host.pages)[0].is_pinned()


@implements(aten.record_stream.default)
def record_stream(source: PackedKV, stream: Any) -> None:
    if source._store.host is None:
        for t in source._store.memory:
            t.record_stream(stream)


@implements(aten.cat.default)
def cat(parts: Sequence[Tensor], dim: int = 0) -> Any:
    """A packed cache, where all packed parts have the same steps: they are copied bit for bit, plain ones quantized."""
    first = next((p for p in parts if isinstance(p, PackedKV) and p.numel()), None)
    if first is None:
        return NotImplemented
    window = whole_heads(first)
    dim %= first.dim()
    axis = None if window is None else window.axes[dim]
    parts = [p for p in parts if p.shape != (0,)]  # what torch.cat ignores
    if window is None or axis is None or axis == CHANNEL or any(p.dtype != first.dtype for p in parts):
        return NotImplemented
    if axis == TOKEN and first._store.unit > 1:  # blocks of several caches make no blocks of one
        return NotImplemented
    boxes: list[tuple[Store, Sequence[int], Sequence[int]] | Tensor] = []
    for part in parts:
        if part.dim() != first.dim() or any(
            i != dim and n != m for i, (n, m) in enumerate(zip(part.shape, first.shape))
        ):
            return NotImplemented  # torch.cat says what is wrong
        if part.shape[dim] == 0:
            continue
        if not isinstance(part, PackedKV):
            if part.requires_grad and torch.is_grad_enabled():
                return NotImplemented
            boxes.append(window.to_canonical(part.detach().to(first.device)))
            continue
        origin = whole_heads(part)
        if origin is None or not same_steps(part._store, first._store):
            return NotImplemented
        if not all(a == b for a, b, n in zip(origin.axes, window.axes, part.shape) if n != 1):
            return NotImplemented
        here = first._store.alike(part._store, origin.starts, window.starts, (*window.lengths[:2], 0, 0))
        means = [(p._store.centered, p._store.mean_tokens) for p in (first, part)]
        if means[0] != means[1] or (axis == TOKEN and not here):
            boxes.append(window.to_canonical(part.dequantize_window()))  # stored less other means: quantized anew
            continue
        boxes.append((part._store, origin.starts, origin.lengths))
    if not any(not isinstance(box, Tensor) for box in boxes):
        return NotImplemented
    meta = [shadow(p) if isinstance(p, PackedKV) else p.to("meta") for p in parts]
    result = torch.cat(meta, dim)
    store = Store.concatenate(boxes, axis, canonical_strides(window, result.shape, result.stride()))
    return PackedKV(store, result.shape, result.stride(), 0, first.dtype)


@implements(aten.roll.default)
def roll(source: PackedKV, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    window = whole_heads(source)
    axes = [] if window is None else [window.axes[dim] for dim in dims]
    if not axes or None in axes or CHANNEL in axes or source.numel() == 0:
        return NotImplemented  # without dims it is a roll of the flattened tensor
    if TOKEN in axes and source._store.unit > 1:
        return NotImplemented
    for shift, dim in zip(shifts, dims):
        last = shift % source.shape[dim]
        first = source.shape[dim] - last
        source = cat([source.narrow(dim, first, last), source.narrow(dim, 0, first)], dim)
    return source


@implements(aten.index_select.default)
def index_select(source: PackedKV, dim: int, index: Tensor) -> Any:
    window = whole_heads(source) if isinstance(source, PackedKV) else None
    dim %= source.dim()
    axis = None if window is None else window.axes[dim]
    if window is None or axis is None or axis == CHANNEL or index.dim() != 1:
        return NotImplemented
    if axis == TOKEN and source._store.unit > 1:
        return NotImplemented
    shape = [*source.shape[:dim], len(index), *source.shape[dim + 1 :]]
    stride = torch.empty(shape, device="meta").stride()
    strides = canonical_strides(window, shape, stride)
    store = source._store.gather(axis, index, window.starts, window.lengths, strides)
    return PackedKV(store, shape, stride, 0, source.dtype)


@implements(aten.index.Tensor)
def index(source: PackedKV, indices: Sequence[Tensor | None]) -> Any:
    """`cache[:, positions]`: one index of one dimension is a packed copy."""
    used = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    if not isinstance(source, PackedKV) or len(used) != 1 or used[0][1].dim() != 1:
        return NotImplemented
    dim, positions = used[0]
    if positions.dtype in (torch.bool, torch.uint8):
        positions = positions.nonzero().squeeze(1)
    positions = torch.where(positions < 0, positions + source.shape[dim], positions)
    return index_select(source, dim, positions)


_LIKE = (aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like)
_NEW = (aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided)


def _factory(operator: Any) -> None:
    @implements(operator)
    def create(source: Any, *args: Any, **kwargs: Any) -> Any:
        """A plain tensor on the cache's device; the cache's values are not needed for it."""
        if not isinstance(source, PackedKV):
            return NotImplemented
        return operator(shadow(source), *args, **{**kwargs, "device": kwargs.get("device") or source.device})


for _operator in (*_LIKE, *_NEW):
    _factory(_operator.default)


def whole_heads(source: Tensor) -> Window | None:
    """The box of whole heads that a packed tensor shows, or None: what can be copied packed.

    Where tokens share steps, or a mean, it begins with a block of them.
    """
    window = source.find_window() if isinstance(source, PackedKV) else None
    if window is None or not window.covers(source._store.shape, CHANNEL):  # type: ignore[attr-defined]
        return None
    return None if window.starts[TOKEN] % source._store.unit else window  # type: ignore[attr-defined]


def canonical_strides(window: Window, size: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Strides per canonical axis of a new tensor whose dimensions run along the window's axes."""
    extent = max(1, 1 + sum((n - 1) * s for n, s in zip(size, stride)))
    strides = [extent] * 4
    for axis, step in zip(window.axes, stride):
        if axis is not None:
            strides[axis] = max(step, 1)
    return tuple(strides)


def _rehoused(source: PackedKV, store: Store) -> PackedKV:
    return PackedKV(store, source.shape, source.stride(), source.offset, source.dtype)
