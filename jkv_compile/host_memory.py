"""The packed data of a cache in host memory, and the copies between there and its device.

A token is a row of bytes: its codes `[B, H, W]`, then its scales `[B, H, G, 2]` (of a symmetric cache `[B, H, G, 1]`),
each padded to `ALIGNMENT`. So any range of tokens is one run of bytes, in pages of up to `PAGE` bytes: a copy moves the
tokens that it has to and no others, in one piece per page. What reorders them to and from the kernels' layout runs on
the device.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .compat import storage_holders
from .kernels.layout import scale_word, scale_words

if TYPE_CHECKING:
    from .offload import Offload, Slot
    from .store import Store

PAGE = 2**24  # bytes of host memory allocated, and copied, at a time: torch rounds pinned memory up to a power of two
ALIGNMENT = 8
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class Lane:
    """The stream that copies to and from one device run on; on CPUs they run when they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = None if device.type == "cpu" else torch.Stream(device)

    def run(self, copy: Callable[[], object]) -> Any:
        """Copy, after all that the current stream has been asked for; returns what `hand_over` takes."""
        with torch.inference_mode(False), torch.no_grad():
            if self.stream is None:
                copy()
                return None
            self.stream.wait_stream(torch.accelerator.current_stream(self.device))
            with self.stream:
                copy()
            return self.stream.record_event()

    def hand_over(self, copied: Any, *tensors: Tensor) -> None:
        """Have the current stream wait for a copy, and these tensors live until it has done with them."""
        if self.stream is not None:
            current = torch.accelerator.current_stream(self.device)
            current.wait_event(copied)
            for tensor in tensors:
                tensor.record_stream(current)

    def lend(self, *tensors: Tensor) -> None:
        """Have tensors of the current stream live until copies that are asked for now have done with them."""
        if self.stream is not None:
            for tensor in tensors:
                tensor.record_stream(self.stream)

    def free(self, tensor: Tensor) -> None:
        """Free the memory of a tensor of the current stream, once copies have done with it."""
        self.lend(tensor)
        tensor.untyped_storage().resize_(0)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Device memory that belongs to copies."""
        with torch.inference_mode(False), self.stream or contextlib.nullcontext():
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def finish(self) -> None:
        """Wait on the host until all copies are done, before it touches rows itself."""
        if self.stream is not None:
            self.stream.synchronize()


class HostMemory:
    """The packed data of one memory, a row of bytes per token.

    Args:
        codes, scales: what Dynamo sees of it: `[B, H, S, W]` and `[B, H, G, S, 2]` on the device, without memory.
        full_row: bytes of a token in full precision.
    """

    def __init__(self, codes: Tensor, scales: Tensor, full_row: int, offload: Offload) -> None:
        self.codes, self.scales, self.full_row, self.offload = codes, scales, full_row, offload
        self.lane = offload.lane(codes.device)
        self.filled = 0  # tokens behind these are zero, on the device too, and need not be moved
        self.stores: weakref.WeakSet[Store] = weakref.WeakSet()
        self.slot: Slot | None = None
        self.ready: Any = None  # the last copy to or from the slot
        self.users = 0  # calls that are using the slot
        self.stale = False  # whether the slot was overtaken by a write to the rows meanwhile
        self.brought_by = 0  # the thread that the slot is there for
        self.next: tuple[weakref.ref[HostMemory], ...] = ()  # what was used after it the last time
        batch, heads, tokens, width = codes.shape
        self._codes_bytes = _aligned(batch * heads * width)
        self._scale_bytes = batch * heads * scales.shape[2] * scale_word(scales).itemsize
        self.row = self._codes_bytes + _aligned(self._scale_bytes)
        self._per_page = max(1, PAGE // max(1, self.row))
        pinned = codes.device.type != "cpu"
        with torch.inference_mode(False):
            self.pages = [
                torch.zeros(min(self._per_page, tokens - first), self.row, dtype=torch.uint8, pin_memory=pinned)
                for first in range(0, tokens, self._per_page)
            ]

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, full_row: int, offload: Offload) -> HostMemory:
        """Move packed data to host memory, and free its own."""
        codes, scales, filled = codes.contiguous(), scales.contiguous(), _filled(codes, scales)
        host = cls(codes, scales, full_row, offload)
        host.write(0, codes[:, :, :filled], scales[:, :, :, :filled])
        host.codes, host.scales = (_without_memory(t, host.lane) for t in (codes, scales))
        return host

    def copy(self, tokens: int, room: int) -> HostMemory:
        """The first tokens in memory of their own, which is for `room` of them."""
        shapes = [list(t.shape) for t in (self.codes, self.scales)]
        shapes[0][2] = shapes[1][3] = room
        with torch.inference_mode(False):
            codes, scales = (t.new_empty(shape) for t, shape in zip((self.codes, self.scales), shapes))
        codes, scales = (_without_memory(t, self.lane) for t in (codes, scales))
        new = HostMemory(codes, scales, self.full_row, self.offload)
        new.filled, new.next = min(self.filled, tokens), self.next
        self.lane.finish()
        for rows, a, b in self._rows(0, new.filled):
            for target, start, stop in new._rows(a, b):
                target.copy_(rows[start - a : stop - a])
        return new

    @property
    def nbytes(self) -> int:
        return sum(page.nbytes for page in self.pages)

    # ---- what eager code does ----

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A copy of tokens `start … stop - 1` on the device."""
        codes, scales = self.blank(stop - start)
        self.count(stop - start, to_device=True)
        self.lane.hand_over(self.lane.run(lambda: self.copy_in(codes, scales, start, stop)), codes, scales)
        return codes, scales

    def write(self, start: int, codes: Tensor, scales: Tensor) -> None:
        """Put tokens from the device to `start …`."""
        codes, scales = codes.contiguous(), scales.contiguous()
        stop = start + codes.shape[2]
        with self.offload.lock:
            self.stale = self.users > 0
            if self.slot is not None and not self.users:
                self.offload.evict(self)
            self.filled = max(self.filled, stop)
            self.count(stop - start, to_device=False)
            self.lane.lend(codes, scales)
            self.lane.run(lambda: self.copy_out(codes, scales, 0, start, stop))

    def blank(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Device memory for so many tokens."""
        batch, heads, _, width = self.codes.shape
        _, _, groups, _, numbers = self.scales.shape
        codes = self.lane.empty((batch, heads, tokens, width), torch.uint8)
        return codes, self.lane.empty((batch, heads, groups, tokens, numbers), self.scales.dtype)

    # ---- rows ----

    def count(self, tokens: int, to_device: bool) -> None:
        """Tokens that are moved."""
        self.offload.count(to_device, tokens * self.row, tokens * self.full_row)

    def copy_in(self, codes: Tensor, scales: Tensor, start: int, stop: int) -> None:
        """Tokens `start … stop - 1` to the first ones of `codes` and `scales`."""
        for rows, a, b in self._rows(start, stop):
            here = rows.to(self.lane.device, non_blocking=True)
            for source, target in zip(self._in_row(here), _by_token(codes, scales, a - start, b - start)):
                target.copy_(source)

    def copy_out(self, codes: Tensor, scales: Tensor, first: int, start: int, stop: int) -> None:
        """Tokens `first …` of `codes` and `scales` to rows `start … stop - 1`."""
        for rows, a, b in self._rows(start, stop):
            here = rows if rows.device == self.lane.device else torch.empty_like(rows, device=self.lane.device)
            sources = _by_token(codes, scales, first + a - start, first + b - start)
            for source, target in zip(sources, self._in_row(here)):
                target.copy_(source)
            if here is not rows:
                rows.copy_(here, non_blocking=True)

    def _rows(self, start: int, stop: int) -> Iterator[tuple[Tensor, int, int]]:
        """Rows of tokens `a … b - 1`, page by page."""
        while start < stop:
            page, at = divmod(start, self._per_page)
            end = min(stop, (page + 1) * self._per_page)
            yield self.pages[page][at : at + end - start], start, end
            start = end

    def _in_row(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[n, B, H, W]` and scales `[n, B, H, G]`, both in words, within rows."""
        batch, heads, _, width = self.codes.shape
        groups, at = self.scales.shape[2], self._codes_bytes
        codes, scales = rows[:, : batch * heads * width], rows[:, at : at + self._scale_bytes]
        codes = codes.view(_word(width)).view(len(rows), batch, heads, -1)
        return codes, scales.view(scale_word(self.scales)).view(len(rows), batch, heads, groups)


class Parked:
    """A range held in full precision, `[B, H, n, D]`, in host memory."""

    def __init__(self, data: Tensor, host: HostMemory) -> None:
        self.nbytes, self.host = data.nbytes, host
        with torch.inference_mode(False):
            self.rows = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.device.type != "cpu")
        host.offload.count(False, self.nbytes)
        host.lane.lend(data)
        host.lane.run(lambda: self.rows.copy_(data, non_blocking=True))

    def back(self) -> Tensor:
        data = self.host.lane.empty(self.rows.shape, self.rows.dtype)
        self.host.offload.count(True, self.nbytes)
        copied = self.host.lane.run(lambda: data.copy_(self.rows, non_blocking=True))
        self.host.lane.hand_over(copied, data)
        return data


def _by_token(codes: Tensor, scales: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """As `HostMemory._in_row`, tokens `start … stop - 1` of codes and scales as the kernels know them."""
    words = codes.view(_word(codes.shape[3]))[:, :, start:stop]
    return words.permute(2, 0, 1, 3), scale_words(scales)[:, :, :, start:stop].permute(3, 0, 1, 2)


def _word(width: int) -> torch.dtype:
    """The largest integers that a head's codes are made of: copies move words."""
    return _WORDS[next(size for size in _WORDS if width % size == 0)]


def _filled(codes: Tensor, scales: Tensor) -> int:
    """How many tokens there are up to the last one that is not zero."""
    used = codes.any(3).any(1).any(0) | (scale_words(scales) != 0).any(2).any(1).any(0)
    places = used.nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def _without_memory(tensor: Tensor, lane: Lane) -> Tensor:
    """The tensor, its memory freed; another of its sizes where others hold that memory too, or it belongs to a file."""
    if storage_holders(tensor) > 1 or not tensor.untyped_storage().resizable():
        with torch.inference_mode(False):
            tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    lane.free(tensor)
    return tensor


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
