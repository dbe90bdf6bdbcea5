"""What ATen's operators do with packed caches: views, then what `HANDLERS` know, then reads, and refused writes."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .compat import is_composite, is_fake, refuse_unknown_sizes
from .errors import PackedCacheError, PackedReadWarning
from .geometry import outermost_first
from .packed import PackedKV
from .store import Store

aten = torch.ops.aten

HANDLERS: dict[Any, Callable[..., Any]] = {}  # operations with a packed meaning; may return NotImplemented


def implements(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what operators of ATen do with packed caches."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        HANDLERS.update(dict.fromkeys(operators, handler))
        return handler

    return register


@torch.compiler.disable  # eager operations between two graphs run within Dynamo's reach
def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator with a `PackedKV` among its arguments."""
    kind = _kind(func)
    if kind == "view" and isinstance(args[0], PackedKV):
        if func is torch.ops.aten.view_as_complex.default and is_fake(args[0]._store.memory[0]):
            return _trace(func, args, kwargs)  # `passes.tracking` sees to it that nobody writes to it
        return _view(func, args[0], args, kwargs)
    if kind == "composite":  # reaches this point whole in inference mode only
        return func.decompose(*args, **kwargs)
    source = next(a for a in _flat((args, tuple(kwargs.values()))) if isinstance(a, PackedKV))
    if is_fake(source._store.memory[0]):
        return _trace(func, args, kwargs)
    if (handler := HANDLERS.get(func)) is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if any(isinstance(x, PackedKV) for x in written_arguments(func, args, kwargs)):
        raise PackedCacheError(
            f"{func} writes to a packed cache in a way that cannot be expressed in it; nothing was written. "
            "Write with slice assignment, copy_, index_copy_, zero_ or fill_, or go back to a plain tensor with "
            "jkv_compile.materialize(cache)"
        )
    warn_of_read(str(func))
    return func(*_map(PackedKV.dequantize_window, args), **_map(PackedKV.dequantize_window, kwargs))


@functools.cache
def _kind(func: Any) -> str:
    if is_composite(func):
        return "composite"
    return "view" if func.is_view else "other"


def new_window(
    source: Tensor, store: Store, size: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype
) -> PackedKV:
    """A window on `store` that is an inference tensor exactly if `source` is one."""
    if source.is_inference() == torch.is_inference_mode_enabled():
        return PackedKV(store, size, stride, offset, dtype)
    with torch.inference_mode(source.is_inference()):
        return PackedKV(store, size, stride, offset, dtype)


def shadow(source: PackedKV) -> Tensor:
    """A tensor without data that has the same geometry, within as much memory as the cache would take."""
    if source._shadow is not None:
        return source._shadow
    store = source._store
    extent = 1 + sum((n - 1) * s for n, s in zip(store.shape, store.strides))
    whole = torch.empty_strided((max(extent, source.offset),), (1,), dtype=source.dtype, device="meta")
    return _remember(source, whole.as_strided(source.size(), source.stride(), source.offset))


def _remember(source: PackedKV, meta: Tensor) -> Tensor:
    if not is_fake(meta):  # what is seen while Dynamo traces does not outlive it
        source._shadow = meta
    return meta


def _view(func: Any, source: PackedKV, args: Any, kwargs: Any) -> Any:
    """Any view operation: do it to a tensor without data, and take over the outcome."""
    refuse_unknown_sizes(func, args)
    result = func(shadow(source), *args[1:], **kwargs)
    if isinstance(result, Tensor):
        return _view_like(func, source, result)
    return type(result)(_view_like(func, source, x) for x in result)


def _view_like(func: Any, source: PackedKV, meta: Tensor) -> PackedKV:
    if meta.dtype != source.dtype or meta.is_neg() or meta.is_conj():
        raise PackedCacheError(f"{func} reinterprets the memory of a packed cache; use jkv_compile.materialize(cache)")
    offset: Any = meta.storage_offset()
    view = new_window(source, source._store, meta.size(), meta.stride(), offset, source.dtype)
    _remember(view, meta)
    return view


def _trace(func: Any, args: Any, kwargs: Any) -> Any:
    """What Dynamo needs to know while it traces: shapes, dtypes, devices. The passes decide what is done."""
    written = list(written_arguments(func, args, kwargs))
    if written and isinstance(written[0], PackedKV):
        return written[0]

    def plain(x: PackedKV) -> Tensor:
        order, back = outermost_first(x)
        return x._store.memory[0].new_empty([x.shape[d] for d in order], dtype=x.dtype).permute(back)

    return func(*_map(plain, args), **_map(plain, kwargs))


def written_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The tensors among the arguments that an operator changes."""
    if func._schema.is_mutable:
        for i, spec in enumerate(func._schema.arguments):
            if spec.is_write:
                yield from _flat([args[i] if i < len(args) else kwargs.get(spec.name)])


def _flat(values: Any) -> Iterator[Any]:
    for x in values:
        if isinstance(x, (list, tuple)):
            yield from _flat(x)
        else:
            yield x


def _map(change: Callable[[PackedKV], Any], x: Any) -> Any:
    """`x`, lists, tuples and dicts included, with every packed window changed."""
    if isinstance(x, PackedKV):
        return change(x)
    if type(x) in (list, tuple):
        return type(x)(_map(change, y) for y in x)
    return {k: _map(change, y) for k, y in x.items()} if type(x) is dict else x


def warn_of_read(what: str) -> None:
    """Tell the user's line that it dequantizes; Python shows a warning of constant text once per line."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", ""), frame.f_code.co_filename):
        frame = frame.f_back
    warnings.warn_explicit(
        f"{what} reads a packed cache in eager code, which dequantizes it here. Inside a region compiled with "
        "jkv_backend it would stay packed; jkv_compile.materialize(cache) is silent.",
        PackedReadWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_library(module: str, filename: str) -> bool:
    return module.partition(".")[0] in ("jkv_compile", "torch") or filename.startswith("<eval_with_key>")


from . import packed_attention, packed_copies, packed_writes  # noqa: E402, F401  (they register what they implement)
