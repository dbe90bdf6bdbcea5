"""What writes to a packed cache: quantize, move codes bit for bit, or reset. All is checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .errors import PackedCacheError
from .geometry import Window
from .packed import PackedKV
from .packed_dispatch import aten, implements
from .store import CHANNEL, TOKEN, Store

_MATERIALIZE = "use jkv_compile.materialize(cache) first"


@implements(aten.copy_.default)
def copy_(target: Any, source: Tensor, non_blocking: bool = False) -> Any:
    """`cache[:, a:b] = source`: packed sources with the same steps move bit for bit, also onto themselves."""
    if not isinstance(target, PackedKV):
        return NotImplemented  # a plain tensor takes a copy of a packed one: a read
    _refuse_gradients(source)
    if target.numel() == 0:
        return target
    if len(boxes := _boxes(target)) > 1:
        source = source.expand(target.shape)
        for path in boxes:
            copy_(_selected(target, path), _selected(source, path))
        return target
    window, store = target.window(), target._store
    origin = packed_origin(source, target, window)
    if origin is not None:
        store.move(source._store, origin.starts, window.starts, window.lengths)  # type: ignore[attr-defined]
        return target
    store.write(window.to_canonical(_plain(source, target.shape, store)), window.starts, keep_active=True)
    return target


@implements(aten.fill_.Scalar, aten.fill_.Tensor)
def fill_(target: Any, value: Any) -> Any:
    if not isinstance(target, PackedKV):
        return NotImplemented
    for path in _boxes(target):
        part = _selected(target, path)
        window = part.window()
        part._store.fill(float(value), window.starts, window.lengths)
    return target


@implements(aten.zero_.default)
def zero_(target: PackedKV) -> PackedKV:
    return fill_(target, 0.0)


@implements(aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)
def masked_fill_(target: Any, mask: Tensor, value: Any) -> Any:
    """`cache.masked_fill_(mask, 0)`: a reset of whole tokens."""
    if not isinstance(target, PackedKV):
        return NotImplemented
    if len(boxes := _boxes(target)) > 1:
        mask = mask.expand(target.shape)
        for path in boxes:
            masked_fill_(_selected(target, path), _selected(mask, path), value)
        return target
    window = target.window()
    whole = window.to_canonical(mask.expand(target.shape))
    tokens = whole[..., 0]
    if whole.stride(CHANNEL) and not torch.equal(whole, tokens.unsqueeze(-1).expand_as(whole)):
        raise PackedCacheError(f"masked_fill_ of some channels of a packed cache, which share steps; {_MATERIALIZE}")
    target._store.fill_where(tokens, float(value), window.starts)
    return target


@implements(aten.index_fill_.int_Scalar, aten.index_fill_.int_Tensor)
def index_fill_(target: Any, dim: int, index: Tensor, value: Any) -> Any:
    if not isinstance(target, PackedKV):
        return NotImplemented
    dim %= target.dim()
    size = target.shape[dim]
    mask = torch.zeros(size, dtype=torch.bool)
    mask[_checked(index, size)] = True
    return masked_fill_(target, mask.view([-1 if i == dim else 1 for i in range(target.dim())]), value)


@implements(aten.index_copy_.default)
def index_copy_(target: Any, dim: int, index: Tensor, source: Tensor) -> Any:
    if not isinstance(target, PackedKV):
        return NotImplemented
    return _write_indices(target, dim % target.dim(), index.reshape(-1), source)


@implements(aten.index_put_.default, aten._index_put_impl_.default)
def index_put_(
    target: Any, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Any:
    """`cache[:, positions] = source`, and `cache[mask] = number`."""
    if not isinstance(target, PackedKV):
        return NotImplemented
    used = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if accumulate or len(used) != 1:
        raise PackedCacheError(
            f"index assignment to a packed cache with {len(used)} index tensors, accumulate={accumulate}: "
            f"expected one, to be written along one dimension; {_MATERIALIZE}"
        )
    dim, index = used[0]
    if index.dtype in (torch.bool, torch.uint8):
        if values.numel() == 1:
            mask = index.bool().view([1] * dim + list(index.shape) + [1] * (target.dim() - dim - index.dim()))
            return masked_fill_(target, mask, values.item())
        if index.dim() == 1:
            index = index.nonzero().squeeze(1)
    if index.dim() > 1 or index.dtype == torch.bool:
        raise PackedCacheError(
            f"index assignment to a packed cache with an index of {index.dim()} dimensions: expected one; "
            f"{_MATERIALIZE}"
        )
    size = target.shape[dim]
    index = torch.where(index < 0, index + size, index).reshape(-1)
    shape = [*target.shape[:dim], len(index), *target.shape[dim + 1 :]]
    return _write_indices(target, dim, index, values.expand(shape))


Path = list[tuple[int, int]]  # dimensions and indices to select, one after the other


def _boxes(target: PackedKV) -> list[Path]:
    """What to select of a view to have boxes: several where the store has merged dimensions of it.

    Raises:
        PackedCacheError: it consists of no boxes that can be written.
    """
    dim = next(filter(lambda d: _is_merged(target, d), range(target.dim())), None)
    if dim is not None and target.find_window() is None:
        parts = cast("tuple[PackedKV, ...]", target.unbind(dim))
        return [[(dim, i), *path] for i, part in enumerate(parts) for path in _boxes(part)]
    if target.numel():
        target.window()
    return [[]]


def _is_merged(target: PackedKV, dim: int) -> bool:
    """Whether a dimension of a view runs along batch entries or heads, in steps of several."""
    store, step = target._store, target.stride(dim)
    batch, heads, *_ = store.strides
    within = step * target.shape[dim] <= heads * store.shape[1]
    return (step % batch == 0 and step != batch) or (step % heads == 0 and step != heads and within)


def _selected(x: Any, path: Path) -> Any:
    for dim, i in path:
        x = x.select(dim, i)
    return x


def _write_indices(target: PackedKV, dim: int, index: Tensor, source: Tensor) -> PackedKV:
    """Write `source` to the given indices of one dimension; a run of tokens is an ordinary slice assignment."""
    _refuse_gradients(source)
    index = _checked(index, target.shape[dim])
    if len(index) == 0:
        return target
    first, n = int(index[0]), len(index)
    if torch.equal(index, torch.arange(first, first + n)):
        target.narrow(dim, first, n).copy_(source)
        return target
    if len(boxes := _boxes(target)) > 1 and all(d != dim for d, _ in boxes[0]):
        source = source.expand([*target.shape[:dim], n, *target.shape[dim + 1 :]])
        for path in boxes:
            before = sum(d < dim for d, _ in path)
            _write_indices(_selected(target, path), dim - before, index, _selected(source, path))
        return target
    window, store = target.window(), target._store
    axis = window.axes[dim]
    if axis is None or axis == CHANNEL:
        raise PackedCacheError(f"index assignment to channels of a packed cache, which share steps; {_MATERIALIZE}")
    shape = [*target.shape[:dim], n, *target.shape[dim + 1 :]]
    part = Window(window.starts, tuple(n if a == axis else m for a, m in enumerate(window.lengths)), window.axes)
    # Batch entries and heads that are written here and there are stored less means of their own.
    own_means = store.centered or store.mean_tokens
    origin = packed_origin(source, target, part) if axis == TOKEN or not own_means else None
    data: Tensor | Store
    if origin is not None and source.shape == torch.Size(shape):
        moved: Store = source._store  # type: ignore[attr-defined]
        data = moved.extract(origin.starts, origin.lengths, store.strides)
    else:
        data = part.to_canonical(_plain(source, shape, store))
    store.scatter(data, axis, index, window.starts, window.lengths)
    return target


def packed_origin(source: Tensor, target: PackedKV, window: Window) -> Window | None:
    """The box that `source` shows of its own packed cache, where its codes can be copied into `window` as they are."""
    if not isinstance(source, PackedKV) or not same_steps(source._store, target._store):
        return None
    if source.dim() < target.dim():
        source = cast(PackedKV, source.view([1] * (target.dim() - source.dim()) + list(source.shape)))
    origin = source.find_window()
    if origin is None or origin.lengths != window.lengths:
        return None
    agree = all(a == b for a, b, n in zip(origin.axes, window.axes, source.shape) if n != 1)
    agree = agree and target._store.alike(source._store, origin.starts, window.starts, window.lengths)
    return origin if agree else None


def same_steps(one: Store, other: Store) -> bool:
    """Whether codes of two caches mean the same, and lie on the same device."""
    return (one.bits, one.group_size, one.quantizer, one.shape[CHANNEL], one.device.type) == (
        other.bits, other.group_size, other.quantizer, other.shape[CHANNEL], other.device.type,
    )  # fmt: skip


def _plain(source: Tensor, shape: Sequence[int], store: Store) -> Tensor:
    """A full-precision source of a write, broadcast; a packed one that codes cannot be copied of is dequantized."""
    if isinstance(source, PackedKV):
        source = source.dequantize_window()
    return source.detach().to(store.device).expand(*shape)


def _checked(index: Tensor, size: int) -> Tensor:
    index = index.reshape(-1).cpu()
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= size):
        raise IndexError(f"index out of range of a packed cache: {index.tolist()} for a dimension of size {size}")
    return index


def _refuse_gradients(source: Tensor) -> None:
    if source.requires_grad and torch.is_grad_enabled():
        raise PackedCacheError(
            "a tensor that requires grad was to be written to a packed cache, which has no gradient; nothing was "
            "written. Run under torch.no_grad(), or write x.detach()"
        )
