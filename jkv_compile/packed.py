"""`PackedKV`: a tensor that reads and writes like the cache it replaced, and stores it packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .compat import is_fake, mark_static, maybe_mark_dynamic, never_traced
from .errors import PackedCacheError
from .geometry import Window, dense_strides, locate, memory_order, outermost_first
from .store import CHANNEL, Store

# Dynamo is told that windows begin this many tokens later: sizes of 0 and 1 are extents to it, so that a slice that
# begins at token 0 in one call and elsewhere in the next would be compiled twice.
MARGIN = 2


class PackedKV(torch.Tensor):
    """A window on a packed cache, of any view shape; `dtype`, `size` and `stride` are those of the tensor it replaced.

    Views are windows on the same `Store`. Writing quantizes; writing from another packed window moves the codes bit for
    bit; copies (`clone`, `cat`, `roll`, `to(device)`, …) are packed; anything else that only reads dequantizes, and
    warns once per line of code, as it is better done in compiled code. A write that has no packed meaning raises
    `PackedCacheError` before anything is changed.
    """

    _store: Store
    offset: int
    _first_token: Tensor | None
    _shadow: Tensor | None
    _told: tuple[Any, Any] | None
    _views: dict[str, Tensor] | None

    @staticmethod
    def __new__(
        cls, store: Store, size: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype
    ) -> PackedKV:
        return torch.Tensor._make_wrapper_subclass(cls, size, strides=stride, dtype=dtype, device=store.device)

    def __init__(
        self, store: Store, size: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype
    ) -> None:
        self._store = store
        self.offset = offset  # elements from where the tensor begins that the store replaces
        self._first_token = self._shadow = self._told = self._views = None
        if not store.grows and not is_fake(store.memory[0]):  # `dynamic=True` is meant for what does change
            for component in store.memory:
                mark_static(component)

    # What torch.compile sees. Where a window begins reaches Dynamo as a *size*, of a tensor without bytes: sizes become
    # dynamic one by one, while storage offsets that are equal are taken to be one symbol. Everything else that a graph
    # depends on is in the (constant) context.

    @property
    def codes(self) -> Tensor:
        return self._own("codes", 2)

    @property
    def scales(self) -> Tensor:
        return self._own("scales", 3)

    def _own(self, name: str, tokens: int) -> Tensor:
        """A component of the store; of a growing one a tensor on the same memory that belongs to this window alone.

        Dynamo (2.13) loses sizes that are dynamic where two of its inputs have one and the same tensor inside.
        """
        tensor = self._store.memory[name == "scales"]
        if not self._store.grows or is_fake(tensor):
            return tensor
        if self._views is None:
            self._views = {}
        known = self._views.get(name)
        if known is None or known.data_ptr() != tensor.data_ptr():  # the store may have taken memory of its own
            with torch.inference_mode(tensor.is_inference()):
                known = self._views[name] = tensor.data  # no view: sizes of its own
            maybe_mark_dynamic(known, tokens)
        return known

    @property
    def first_token(self) -> Tensor:
        if self._first_token is None:
            offset, row = self.offset, self._store.strides[2]
            with torch.inference_mode(False):  # the same kind of tensor wherever it is asked for
                self._first_token = self._store.memory[0].new_empty((MARGIN + offset // row, offset % row, 0))
            # Where a slice begins is likely to move; a whole cache stays where it is (but is not marked as if it did: a
            # slice may come to show all of it).
            if not is_fake(self._first_token) and self.numel() != self._store.numel:
                maybe_mark_dynamic(self._first_token, 0)
        return self._first_token

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        told = self._told or self._layout  # guards ask in every call
        return ["codes", "scales", "first_token"], (*told, *self._store.settings, self.dtype)

    @property
    def _layout(self) -> tuple[Any, Any]:
        """The store's shape and strides; of a window on all of a growing cache, which dimension of it is which axis.

        Such a cache has a new shape in every call, which the window's own size tells.
        """
        if self._told is None:
            store = self._store
            window, order = None, None
            if store.grows and not is_fake(store.memory[0]):
                window, order = self.find_window(), memory_order(store.shape, store.strides)
            if window is None or order is None or not all(window.covers(store.shape, a) for a in range(CHANNEL)):
                self._told = store.shape, store.strides
            else:
                dims = tuple(window.axes.index(a) if a in window.axes else None for a in range(CHANNEL))
                self._told = dims, (store.shape[CHANNEL], order)
        return self._told

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[Any, ...], size: Sequence[int], stride: Sequence[int]
    ) -> PackedKV:
        shape, strides, store_dtype, bits, quantizer, tells_steps, held_tokens, centered, means, keeps, dtype = context
        if len(shape) == CHANNEL:
            dims, (channels, order) = shape, strides
            shape = [*(1 if d is None else size[d] for d in dims), channels]
            strides = dense_strides(shape, order)
        store = Store(shape, strides, store_dtype, bits, inner["codes"], inner["scales"], quantizer)
        store.tells_steps = tells_steps
        store.told_of(held_tokens, centered, means, keeps)
        tokens, rest, _ = inner["first_token"].shape
        packed = PackedKV(store, size, stride, (tokens - MARGIN) * store.strides[2] + rest, dtype)
        packed._first_token, packed._told = inner["first_token"], context[:2]
        return packed

    # A packed window is no view to autograd: nothing here is differentiable, and Dynamo takes no views of subclasses.
    def _is_view(self) -> bool:
        return False

    @property
    def _base(self) -> None:  # type: ignore[override]
        return None

    # ---- geometry and values ----

    def find_window(self) -> Window | None:
        """The box of the store that this shows, or None where it is no box."""
        store = self._store
        return locate(self.size(), self.stride(), self.offset, store.shape, store.strides)

    def window(self) -> Window:
        """The box of the store that this shows; raises `PackedCacheError` where it is none, or splits channels."""
        window, shape = self.find_window(), self._store.shape
        if window is None or not window.covers(shape, CHANNEL):
            shows = "is no box" if window is None else f"shows {window.lengths[CHANNEL]} of {shape[CHANNEL]} channels"
            geometry = f"size {tuple(self.shape)}, stride {self.stride()}, offset {self.offset}"
            raise PackedCacheError(
                f"a view ({geometry}) {shows} of the packed cache of [batch, head, token, channel] = {list(shape)}; "
                "packed data can be written, and its steps told, for whole heads over a range of tokens; "
                "use jkv_compile.materialize(cache) first"
            )
        return window

    def whole_blocks(self) -> PackedKV:
        """This window, or one on the whole cache where tokens share something: what a write to this one may change."""
        store = self._store
        return self if store.unit == 1 else PackedKV(store, store.shape, store.strides, 0, store.dtype)

    def dequantize_window(self) -> Tensor:
        """A plain tensor with this one's values, shape and dtype, and with its order of dimensions in memory."""
        if self.numel() == 0:
            return self._store.memory[1].new_empty(self.shape, dtype=self.dtype)
        window = self.find_window()
        if window is not None:
            read = window.from_canonical(self._store.read(window.starts, window.lengths, self.dtype))
            order, back = outermost_first(self)
            return read if read.permute(order).is_contiguous() else read.permute(order).contiguous().permute(back)
        store, offset = self._store, self.offset
        last = offset + sum((n - 1) * s for n, s in zip(self.size(), self.stride()))
        first, n = 0, store.shape[2]
        if store.strides[2] == max(s for s, m in zip(store.strides, store.shape) if m > 1):  # tokens are outermost
            first = offset // store.strides[2]
            n = last // store.strides[2] - first + 1
            offset -= first * store.strides[2]
        box = store.read((0, 0, first, 0), (*store.shape[:2], n, store.shape[3]), self.dtype)
        with torch.inference_mode(box.is_inference()):
            memory = torch.empty_strided(box.shape, store.strides, dtype=self.dtype, device=box.device).copy_(box)
        return memory.as_strided(self.size(), self.stride(), offset).clone()

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return (
            f"PackedKV(size={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, bits={self._store.bits}, "
            f"group_size={self._store.group_size}, quantizer={self._store.quantizer!r})"
        )

    # ---- what torch would do with memory that is not there ----

    def numpy(self, *, force: bool = False) -> Any:
        packed_dispatch.warn_of_read("numpy()")
        return self.dequantize_window().numpy(force=force)

    def tolist(self) -> Any:
        packed_dispatch.warn_of_read("tolist()")
        return self.dequantize_window().tolist()

    def data_ptr(self) -> NoReturn:
        raise PackedCacheError(
            "data_ptr() of a packed cache: it has no memory in the layout of its shape; "
            "use jkv_compile.materialize(cache)"
        )

    def __dlpack__(self, **_: Any) -> NoReturn:
        self.data_ptr()

    @property
    def data(self) -> Tensor:
        """A window on the same packed cache."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise PackedCacheError(
            "assignment to .data of a packed cache; nothing was written. Write values with cache.copy_(…), or bind the "
            "name to the new tensor"
        )

    def requires_grad_(self, requires_grad: bool = True) -> PackedKV:
        if requires_grad:
            raise PackedCacheError(
                "requires_grad_() of a packed cache: quantization has no gradient; use materialize first"
            )
        return self

    def is_shared(self) -> bool:
        return self._store.host is None and all(t.is_shared() for t in self._components())

    def share_memory_(self) -> PackedKV:
        if self._store.host is not None:
            raise PackedCacheError(
                "share_memory_() of an offloaded cache: its host memory belongs to this process; send it to others as "
                "it is (they get a copy), or use jkv_compile.materialize first"
            )
        for component in self._components():
            component.share_memory_()
        return self

    def _components(self) -> list[Tensor]:
        """All memory that a write changes."""
        held = self._store.held
        center = [] if self._store.center is None else [self._store.center]
        center += [] if self._store.means is None else [self._store.means.data, self._store.means.extents]
        beside = [*([] if held is None else [held.data, held.ranges]), *self._store.retained]
        return [*self._store.memory, *center, *beside]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedKV:
        return packed_save.deepcopy_window(self, memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return packed_save.reduce_window(self)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return packed_dispatch.dispatch(func, args, kwargs or {})


# ---- public accessors -----------------------------------------------------------------------------------------------


for _name in ("codes", "scales", "first_token", "_own", "_layout", "__tensor_flatten__"):
    _member = vars(PackedKV)[_name]
    never_traced(getattr(_member, "fget", _member))  # of a property, its function


def is_packed(tensor: Tensor) -> bool:
    """Whether a cache tensor is stored packed."""
    return isinstance(tensor, PackedKV)


def materialize(tensor: Tensor) -> Tensor:
    """A plain, contiguous, full-precision tensor with the values of a packed one; a plain tensor as it is."""
    return tensor.dequantize_window().contiguous() if isinstance(tensor, PackedKV) else tensor


def quantization_step(tensor: Tensor) -> Tensor:
    """Δ of each token and channel group of a packed cache, or of a view of it that keeps four dimensions.

    Returns:
        float32, of the tensor's shape but with groups in place of channels ("kivi": one for each channel); zero where
        values are held in full precision (the range that was written last outside of a compiled graph).

    Raises:
        TypeError: the tensor is not packed.
        PackedCacheError: the view splits channels.
    """
    if not isinstance(tensor, PackedKV):
        raise TypeError(f"expected a packed cache, got {type(tensor).__name__} of shape {tuple(tensor.shape)}")
    window = tensor.window()
    return window.from_canonical(tensor._store.quantization_step(window.starts, window.lengths))


from . import packed_dispatch, packed_save  # noqa: E402  (they need the class)
