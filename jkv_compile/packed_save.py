"""Packed caches in `pickle`, `copy.deepcopy` and `torch.save`: packed in, packed out, views still views of one cache.

Loading executes nothing but the two constructors here, which `torch.load` is told are safe (`weights_only=True`).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from .errors import PackedCacheError
from .store import Store, rebuild_store

if TYPE_CHECKING:
    from .packed import PackedKV

_OWN = ("_store", "offset", "_first_token", "_shadow", "_told", "_views")


def _attributes(tensor: PackedKV) -> dict[str, Any]:
    """What users have set on the tensor object."""
    return {name: value for name, value in tensor.__dict__.items() if name not in _OWN}


def deepcopy_window(source: PackedKV, memo: dict[int, Any]) -> PackedKV:
    if id(source) in memo:
        return memo[id(source)]
    store = memo.get(id(source._store))
    if store is None:
        store = memo[id(source._store)] = source._store.map(torch.clone)
    result = type(source)(store, source.size(), source.stride(), source.offset, source.dtype)
    memo[id(source)] = result
    result.__dict__.update(copy.deepcopy(_attributes(source), memo))
    return result


def reduce_window(source: PackedKV) -> tuple[Any, ...]:
    place = tuple(source.size()), tuple(source.stride()), source.offset
    return rebuild_window, (source._store, *place, source.dtype, _attributes(source))


def rebuild_window(
    store: Store,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    dtype: torch.dtype,
    attributes: dict[str, Any],
) -> PackedKV:
    from .packed import PackedKV

    span = 1 + sum((n - 1) * s for n, s in zip(store.shape, store.strides))
    last = offset + sum((n - 1) * s for n, s in zip(size, stride))
    if offset < 0 or min((*size, *stride), default=0) < 0 or (0 not in size and last >= span):
        raise PackedCacheError(
            f"a saved window {size}, {stride}, {offset} does not lie within its cache of {store.shape}"
        )
    window = PackedKV(store, size, stride, offset, dtype)
    window.__dict__.update({name: value for name, value in attributes.items() if name not in _OWN})
    return window


torch.serialization.add_safe_globals([rebuild_window, rebuild_store])
