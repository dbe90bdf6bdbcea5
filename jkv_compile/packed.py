"""`PackedKV`: a tensor that reads and writes like the cache it replaced, and stores it packed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .compat import is_fake
from .errors import PackedCacheError, PackedReadWarning
from .geometry import Window, locate
from .store import Store

aten = torch.ops.aten


class PackedKV(torch.Tensor):
    """A window on a packed cache, of any view shape; `dtype`, `size` and `stride` are those of the tensor it replaced.

    Views are windows on the same `Store`. Writing quantizes; writing from another packed window moves the codes bit for
    bit; anything that only reads dequantizes, and warns once per line of code, as it is better done in compiled code.
    A write that has no packed meaning raises `PackedCacheError` before anything is changed.
    """

    _store: Store
    _first_token: Tensor | None

    @staticmethod
    def __new__(cls, store: Store, size: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype) -> PackedKV:
        return torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, storage_offset=offset, dtype=dtype, device=store.codes.device
        )

    def __init__(self, store: Store, size: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype) -> None:
        self._store = store
        self._first_token = None

    # What torch.compile sees. A token offset reaches Dynamo as a *size*, of a tensor without bytes, since sizes are all
    # that it makes dynamic; everything else that a graph depends on is in the (constant) context.

    @property
    def codes(self) -> Tensor:
        return self._store.codes

    @property
    def scales(self) -> Tensor:
        return self._store.scales

    @property
    def first_token(self) -> Tensor:
        if self._first_token is None:
            offset, row = self.storage_offset(), self._store.strides[2]
            with torch.inference_mode(False):  # the same kind of tensor wherever it is asked for
                self._first_token = self._store.codes.new_empty((offset // row, offset % row, 0))
        return self._first_token

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        store = self._store
        return ["codes", "scales", "first_token"], (store.shape, store.strides, store.dtype, store.bits, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[Any, ...], size: Sequence[int], stride: Sequence[int]
    ) -> PackedKV:
        shape, strides, store_dtype, bits, dtype = context
        store = Store(shape, strides, store_dtype, bits, inner["codes"], inner["scales"])
        tokens, rest, _ = inner["first_token"].shape
        packed = PackedKV(store, size, stride, tokens * strides[2] + rest, dtype)
        packed._first_token = inner["first_token"]
        return packed

    # A packed window is not a view to autograd: nothing here is differentiable, and Dynamo takes no views of subclasses.
    def _is_view(self) -> bool:
        return False

    @property
    def _base(self) -> None:
        return None

    def window(self) -> Window:
        """The box of the store that this shows; raises `PackedCacheError` where it is none."""
        window = self.find_window()
        if window is None:
            raise PackedCacheError(
                f"a view of size {tuple(self.shape)}, stride {self.stride()} and offset {self.storage_offset()} is no "
                f"box of the packed cache of [batch, head, token, channel] = {list(self._store.shape)}; "
                "use jkv_compile.materialize(cache) first"
            )
        return window

    def find_window(self) -> Window | None:
        store = self._store
        return locate(self.size(), self.stride(), self.storage_offset(), store.shape, store.strides)

    def dequantize_window(self) -> Tensor:
        """A plain tensor with this one's values, shape and dtype."""
        window = self.find_window()
        if window is not None:
            return window.from_canonical(self._store.read(window.starts, window.lengths, self.dtype))
        whole = whole_cache(self._store)
        return whole.dequantize_window().as_strided(self.size(), self.stride(), self.storage_offset()).to(self.dtype)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return (
            f"PackedKV(size={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, bits={self._store.bits}, "
            f"group_size={self._store.group_size})"
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func.is_view and isinstance(args[0], PackedKV):
            return _view(func, args, kwargs)
        written = [a for a, spec in zip(args, func._schema.arguments) if spec.is_write and isinstance(a, PackedKV)]
        written += [v for v in kwargs.values() if func._schema.is_mutable and isinstance(v, PackedKV)]
        if written:
            raise PackedCacheError(
                f"{func} writes to a packed cache in a way that cannot be expressed in it; nothing was written. "
                "Write with slice assignment, copy_, zero_ or fill_, or use jkv_compile.materialize(cache) first"
            )
        return _read(func, args, kwargs)


def whole_cache(store: Store) -> PackedKV:
    """The window on all of a store, dimensions in the order of the tensor that it replaced."""
    order = sorted(range(4), key=lambda axis: (-int(store.strides[axis]), axis))
    size, stride = [store.shape[a] for a in order], [store.strides[a] for a in order]
    return PackedKV(store, size, stride, 0, store.dtype)


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """Any view operation: do it to a tensor without data that has the same geometry, and take over the outcome."""
    source: PackedKV = args[0]
    rows = source._store.strides[2]  # a positive offset of whole rows keeps a meta tensor's bounds checks meaningful
    del rows
    extent = 1 + sum((n - 1) * abs(s) for n, s in zip(source.size(), source.stride()) if n)
    shadow = torch.empty_strided((source.storage_offset() + extent,), (1,), dtype=source.dtype, device="meta")
    shadow = shadow.as_strided(source.size(), source.stride(), source.storage_offset())
    result = func(shadow, *args[1:], **kwargs)

    def window(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        with torch.inference_mode(source.is_inference()):
            return PackedKV(source._store, x.size(), x.stride(), x.storage_offset(), source.dtype)

    return type(result)(map(window, result)) if isinstance(result, (list, tuple)) else window(result)


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    def plain(x: Any) -> Any:
        if isinstance(x, PackedKV):
            return _fake_read(x) if is_fake(x._store.codes) else x.dequantize_window()
        return type(x)(map(plain, x)) if type(x) in (list, tuple) else x

    packed = next((a for a in _tensors(args) if isinstance(a, PackedKV)), None)
    if packed is not None and not is_fake(packed._store.codes):
        _warn_once(func, packed)
    return func(*map(plain, args), **{k: plain(v) for k, v in kwargs.items()})


def _tensors(args: Any) -> Any:
    for a in args:
        if isinstance(a, (list, tuple)):
            yield from _tensors(a)
        else:
            yield a


def _fake_read(x: PackedKV) -> Tensor:
    """What Dynamo needs to know of a read while it traces: shape, dtype, device."""
    return x._store.codes.new_empty(x.shape, dtype=x.dtype)


def _warn_once(func: Any, packed: PackedKV) -> None:
    """One warning per line of the user's code."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("jkv_compile", "torch"):
        frame = frame.f_back
    warnings.warn_explicit(
        f"{func} reads a packed cache of size {tuple(packed.shape)} in eager code, which dequantizes it here. "
        "Inside a region compiled with jkv_backend it would stay packed; jkv_compile.materialize(cache) is silent.",
        PackedReadWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


# ---- operations with a packed meaning -------------------------------------------------------------------------------


def _copy_(target: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, PackedKV):
        return NotImplemented  # a plain tensor takes a copy of a packed one: a read
    if is_fake(target._store.codes):
        return target
    window, store = target.window(), target._store
    if not window.covers(store.shape, 3):
        raise PackedCacheError(
            f"a write to {window.lengths[3]} of {store.shape[3]} channels of a packed cache; whole heads must be written, "
            "since channels share steps; use jkv_compile.materialize(cache) first"
        )
    if isinstance(source, PackedKV):
        origin = source.find_window()
        same = (source._store.bits, source._store.group_size) == (store.bits, store.group_size)
        if origin is not None and same and source.shape == target.shape and origin.axes == window.axes:
            store.move(source._store, origin.starts, window.starts, window.lengths)
            return target
        source = source.dequantize_window()
    source = source.detach().to(store.codes.device).expand(target.shape)
    store.write(window.to_canonical(source), window.starts, keep_active=True)
    return target


def _fill_(target: PackedKV, value: Any) -> PackedKV:
    if not is_fake(target._store.codes):
        window = target.window()
        if not window.covers(target._store.shape, 3):
            raise PackedCacheError("fill_ of some channels of a packed cache; whole heads must be filled")
        target._store.fill(float(value), window.starts, window.lengths)
    return target


def _clone(source: PackedKV, memory_format: Any = None) -> Any:
    if is_fake(source._store.codes):
        return _detach(source)
    window = source.find_window()
    if window is None or not window.covers(source._store.shape, 3):
        return source.dequantize_window().clone()
    store = source._store.extract(window.starts, window.lengths)
    order = [axis for axis in window.axes if axis is not None]
    size, stride = list(source.shape), [0] * source.dim()
    for i, axis in enumerate(window.axes):
        stride[i] = 1 if axis is None else store.strides[axis]
    del order
    with torch.inference_mode(source.is_inference()):
        return PackedKV(store, size, stride, 0, source.dtype)


def _detach(source: PackedKV) -> PackedKV:
    with torch.inference_mode(source.is_inference()):
        return PackedKV(source._store, source.size(), source.stride(), source.storage_offset(), source.dtype)


def _to_copy(source: PackedKV, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Any:
    if dtype not in (None, source.dtype) or is_fake(source._store.codes):
        return NotImplemented
    clone = _clone(source)
    if not isinstance(clone, PackedKV) or device is None:
        return clone
    return PackedKV(clone._store.to(torch.device(device)), clone.size(), clone.stride(), 0, clone.dtype)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.copy_.default: _copy_,
    aten.fill_.Scalar: _fill_,
    aten.fill_.Tensor: _fill_,
    aten.zero_.default: lambda target: _fill_(target, 0.0),
    aten.clone.default: _clone,
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten._to_copy.default: _to_copy,
}


# ---- public accessors -----------------------------------------------------------------------------------------------


def is_packed(tensor: Tensor) -> bool:
    """Whether a cache tensor is stored packed."""
    return isinstance(tensor, PackedKV)


def materialize(tensor: Tensor) -> Tensor:
    """A plain, contiguous, full-precision tensor with the values of a packed one; plain tensors come back as they are."""
    return tensor.dequantize_window().contiguous() if isinstance(tensor, PackedKV) else tensor


def quantization_step(tensor: Tensor) -> Tensor:
    """Δ of each token and channel group of a packed cache, or of a view of it that keeps four dimensions.

    Returns:
        float32, of the tensor's shape but with groups in place of channels; zero where values are held in full
        precision (the range that was written last outside of a compiled graph).

    Raises:
        TypeError: the tensor is not packed.
        PackedCacheError: the view splits channels.
    """
    if not isinstance(tensor, PackedKV):
        raise TypeError(f"expected a packed cache, got {type(tensor).__name__} of shape {tuple(tensor.shape)}")
    window = tensor.window()
    if not window.covers(tensor._store.shape, 3):
        raise PackedCacheError("quantization_step of a view that splits channels; take whole heads")
    return window.from_canonical(tensor._store.quantization_step(window.starts, window.lengths))
