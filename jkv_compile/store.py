"""The packed data of one cache, shared by every view of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels as _kernels  # noqa: F401  (registers the operators)
from .errors import PackedCacheError
from .kernels import layout, reference

_ops = torch.ops.jkv


@dataclass
class Active:
    """The range that was written last, in full precision: the chunk being generated is never attended quantized."""

    data: Tensor  # [B, H, stop - start, D]
    start: int
    stop: int


class Store:
    """A packed cache of canonical shape `[B, H, S, D]`.

    Args:
        shape: canonical shape.
        strides: strides, in canonical order, of the full-precision tensor that this replaces: views are located by them.
        dtype: what the cache reads as.
        codes, scales: as `kernels.layout` describes.
    """

    def __init__(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, bits: int, codes: Tensor, scales: Tensor
    ) -> None:
        self.shape, self.strides, self.dtype, self.bits = tuple(shape), tuple(strides), dtype, bits
        self.codes, self.scales = codes, scales
        self.active: Active | None = None

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        bits: int,
        group_size: int,
        device: torch.device,
    ) -> Store:
        """A store that reads as zeros."""
        batch, heads, tokens, head_dim = shape
        with torch.inference_mode(False):  # ordinary tensors may be written inside and outside inference mode
            codes = torch.zeros(batch, heads, tokens, layout.packed_width(head_dim, bits), dtype=torch.uint8, device=device)
            scales = torch.zeros(batch, heads, head_dim // group_size, tokens, 2, dtype=torch.float16, device=device)
        return cls(shape, strides, dtype, bits, codes, scales)

    @property
    def group_size(self) -> int:
        return self.shape[3] // self.scales.shape[2]

    @property
    def packed_bytes(self) -> int:
        """Codes, steps and zero points, and what is held in full precision beside them."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales)) + self.active_bytes

    @property
    def active_bytes(self) -> int:
        return self.active.data.numel() * self.active.data.element_size() if self.active else 0

    @property
    def full_precision_bytes(self) -> int:
        batch, heads, tokens, head_dim = self.shape
        return batch * heads * tokens * head_dim * self.dtype.itemsize

    def write(self, source: Tensor, starts: Sequence[int], keep_active: bool) -> None:
        """Quantize `source` `[b, h, n, D]` into the box that begins at `starts` (batch, head, token, channel).

        With `keep_active`, the range is also held in full precision until the next write.
        """
        batch, heads, tokens, _ = source.shape
        codes, scales = self._box(starts, (batch, heads))
        self.active = None
        _ops.append(codes, scales, source, starts[2], self.bits)
        if keep_active and (batch, heads) == self.shape[:2] and tokens:
            with torch.inference_mode(False):
                held = source.detach().to(self.dtype, copy=True, memory_format=torch.contiguous_format)
            self.active = Active(held, starts[2], starts[2] + tokens)

    def fill(self, value: float, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Set a box to a number exactly; raises where float16 scales cannot hold it."""
        if torch.tensor(value, dtype=torch.float16).double().item() != float(value):
            raise PackedCacheError(
                f"fill_({value}) of a packed cache: only numbers that float16 holds exactly can be stored; "
                "use jkv_compile.materialize(cache) to go back to a plain tensor"
            )
        codes, scales = self._box(starts, lengths)
        window = slice(starts[2], starts[2] + lengths[2])
        codes[:, :, window] = 0
        scales[:, :, :, window, 0] = 0
        scales[:, :, :, window, 1] = value
        self._drop_active(window.start, window.stop)

    def move(self, other: Store, source: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy a box of another store (or of this one) bit for bit; the boxes may overlap."""
        codes, scales = other._box(source, lengths)
        to_codes, to_scales = self._box(starts, lengths)
        n, a, b = lengths[2], source[2], starts[2]
        if other is self and source[:2] == starts[:2]:
            _ops.move(to_codes, to_scales, a, b, n)
        else:
            to_codes[:, :, b : b + n] = codes[:, :, a : a + n].clone()
            to_scales[:, :, :, b : b + n] = scales[:, :, :, a : a + n].clone()
        self._drop_active(b, b + n)

    def read(self, starts: Sequence[int], lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A box in full precision, contiguous `[b, h, n, D]`; the range written last is not quantized."""
        codes, scales = self._box(starts, lengths)
        start, stop = starts[2], starts[2] + lengths[2]
        out = _ops.dequantize(codes, scales, start, stop, self.bits, dtype)
        if self.active is not None:
            a, b = max(start, self.active.start), min(stop, self.active.stop)
            if a < b:
                held = self.active.data[:, :, a - self.active.start : b - self.active.start]
                out[:, :, a - start : b - start] = held[
                    starts[0] : starts[0] + lengths[0], starts[1] : starts[1] + lengths[1]
                ]
        return out[..., starts[3] : starts[3] + lengths[3]]

    def quantization_step(self, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Δ of a box, float32 `[b, h, n, G]`; zero where the range written last is held in full precision."""
        _, scales = self._box(starts, lengths)
        delta = reference.quantization_step(scales[:, :, :, starts[2] : starts[2] + lengths[2]], self.bits)
        if self.active is not None:
            a, b = (min(max(x - starts[2], 0), lengths[2]) for x in (self.active.start, self.active.stop))
            delta[:, :, a:b] = 0
        return delta

    def extract(self, starts: Sequence[int], lengths: Sequence[int]) -> Store:
        """A new store with a copy of whole-channel box; bits, steps and zero points are the same."""
        shape = tuple(lengths)
        order = sorted(range(4), key=lambda axis: -int(self.strides[axis]))
        strides, step = [0] * 4, 1
        for axis in reversed(order):
            strides[axis] = step
            step *= shape[axis]
        new = Store.empty(shape, strides, self.dtype, self.bits, self.group_size, self.codes.device)
        new.move(self, starts, (0, 0, 0, 0), shape)
        if self.active is not None:
            a, b = max(starts[2], self.active.start), min(starts[2] + lengths[2], self.active.stop)
            if a < b:
                box = tuple(slice(s, s + n) for s, n in zip(starts[:2], lengths[:2]))
                held = self.active.data[(*box, slice(a - self.active.start, b - self.active.start))]
                new.active = Active(held.clone(), a - starts[2], b - starts[2])
        return new

    def to(self, device: torch.device) -> Store:
        new = Store(self.shape, self.strides, self.dtype, self.bits, self.codes.to(device), self.scales.to(device))
        if self.active is not None:
            new.active = Active(self.active.data.to(device), self.active.start, self.active.stop)
        return new

    def _box(self, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes and scales of the given batch entries and heads; views."""
        if tuple(starts[:2]) == (0, 0) and tuple(lengths[:2]) == self.shape[:2]:
            return self.codes, self.scales
        box = tuple(slice(s, s + n) for s, n in zip(starts[:2], lengths[:2]))
        return self.codes[box], self.scales[box]

    def _drop_active(self, start: int, stop: int) -> None:
        if self.active is not None and start < self.active.stop and self.active.start < stop:
            self.active = None
