"""What one packed cache holds in full precision for good: its first tokens and the newest (`sink=`, `recent=`).

`kernels.held` has the rules; here they are applied to boxes, (batch, head, token, channel), as eager code writes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .host_memory import HostMemory, Parked
from .kernels import held as rules

Box = tuple[Sequence[int], Sequence[int]]  # where it begins, and its lengths
Piece = tuple[int, int, Tensor]  # as `kernels.held.pieces_of` tells them
Pieces = list[tuple[int | None, Piece]]  # and of which batch entry of the box; None: of each


class Held:
    """Rows of tokens, and which tokens they are.

    Args:
        data: `[B, H, R, D]` in the cache's dtype, on its device.
        ranges: int64 `[B, 1 or 3, 4]` on the CPU, see `kernels.held`.
    """

    def __init__(self, data: Tensor, ranges: Tensor) -> None:
        self._data: Tensor | Parked = data
        self._copy: Parked | None = None  # in host memory, of what is on the device
        self.ranges = ranges
        sink, *recent = ranges[0, :, 3].tolist()
        self.capacity = sink, recent[0] if recent else 0  # room for so many of the first tokens, and of the newest

    @classmethod
    def nothing(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, sink: int, recent: int) -> Held:
        """Of a cache of canonical shape `[B, H, S, D]`, before anything is written to it."""
        batch, heads, _, head_dim = shape
        with torch.inference_mode(False):  # one kind of tensor, whatever the mode: it outlives it
            data = torch.zeros(batch, heads, sink + 2 * recent, head_dim, dtype=dtype, device=device)
            return cls(data, rules.no_ranges(batch, sink, recent))

    @property
    def data(self) -> Tensor:
        """`[B, H, R, D]`, on the device."""
        if isinstance(self._data, Parked):
            self._copy, self._data = self._data, self._data.back()
        return self._data

    def park(self, host: HostMemory) -> None:
        """Go to host memory, until it is asked for."""
        if not isinstance(self._data, Parked):
            self._data = self._copy or Parked(self._data, host)

    def changing(self) -> None:
        """Rows are about to be written: a copy that is kept elsewhere is none any more."""
        if not isinstance(self._data, Parked):
            self._copy = None
        else:
            self._data, self._copy = self.data, None

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    @property
    def parked_bytes(self) -> int:
        return self.nbytes if isinstance(self._data, Parked) else 0

    # ---- what is done to a box ----

    def write(self, source: Tensor, starts: Sequence[int]) -> None:
        """Tokens `[b, h, n, D]` are written."""
        self.changing()
        data, ranges, whole = self._part((starts, source.shape))
        write = rules.hold if whole else rules.refresh
        write(data, ranges, source.detach(), starts[2])

    def write_at(self, source: Tensor, index: Tensor, starts: Sequence[int]) -> None:
        """Tokens `[b, h, n, D]` are written, to places that `index` tells of a box."""
        self.changing()
        data, ranges, _ = self._part((starts, source.shape))
        rules.hold_at(data, ranges, source.detach(), (index + starts[2]).to(data.device))

    def fill(self, value: float, box: Box) -> None:
        """Tokens are set to a number."""
        self.changing()
        data, ranges, whole = self._part(box)
        (_, _, start, _), (_, _, n, _) = box
        if whole:
            rules.hold_number(data, ranges, start, start + n, value)
        else:
            rules.refresh(data, ranges, data.new_full((1, 1, n, 1), value), start)

    def fill_where(self, mask: Tensor, value: float, starts: Sequence[int]) -> None:
        """Tokens are set to a number where `mask`, bool `[b, h, n]`, is True."""
        self.changing()
        data, ranges, _ = self._part((starts, mask.shape))
        for batch, run in rules.held_by_entry(ranges):
            run = run.within(starts[2], starts[2] + mask.shape[2])
            chosen = mask[batch, :, run.start - starts[2] : run.stop - starts[2]]
            data[batch, :, run.rows].masked_fill_(chosen.unsqueeze(-1), value)

    def move(self, box: Box, destination: int) -> None:
        """Tokens are moved along their axis."""
        self.changing()
        data, ranges, whole = self._part(box)
        (_, _, start, _), (_, _, n, _) = box
        if whole:
            rules.hold_moved(data, ranges, start, destination, n)
        else:
            rules.forget(ranges, destination, destination + n)

    def forget(self, box: Box) -> None:
        """Tokens have changed, and only their codes are known."""
        _, ranges, _ = self._part(box)
        (_, _, start, _), (_, _, n, _) = box
        rules.forget(ranges, start, start + n)

    def pieces(self, box: Box) -> Pieces:
        """What is held of a box."""
        data, ranges, _ = self._part(box)
        (_, _, start, _), (_, _, n, _) = box
        return [
            (entry, piece)
            for entry, part in _entries(len(data), rules.alike(ranges))
            for piece in rules.pieces_of(data[part], ranges[part], start, start + n)
        ]

    def receive(self, box: Box, pieces: Pieces) -> None:
        """A box becomes one of another cache, of which this is held."""
        self.changing()
        data, ranges, whole = self._part(box)
        (_, _, start, _), (_, _, n, _) = box
        for entry, part in _entries(len(data), rules.alike(ranges) and all(of is None for of, _ in pieces)):
            own = [(region, at, x if of == entry else x[part]) for of, (region, at, x) in pieces if of in (None, entry)]
            rules.receive(data[part], ranges[part], start, start + n, own if whole else [])

    def part(self, box: Box) -> tuple[Tensor, Tensor]:
        """Rows of a box's batch entries and heads, and which tokens they are, to be read."""
        data, ranges, _ = self._part(box)
        return data, ranges

    def put_over(self, out: Tensor, starts: Sequence[int]) -> None:
        """What is held into `out` `[b, h, n, D]`, which has the other tokens of a box."""
        data, ranges, _ = self._part((starts, out.shape))
        rules.put_over(out, data, ranges, starts[2])

    def zero_steps(self, delta: Tensor, starts: Sequence[int]) -> None:
        """Δ `[b, h, n, G]` of a box is 0 where tokens are held."""
        _, ranges, _ = self._part((starts, delta.shape))
        for batch, run in rules.held_by_entry(ranges):
            run = run.within(starts[2], starts[2] + delta.shape[2])
            delta[batch, :, run.start - starts[2] : run.stop - starts[2]] = 0

    def _part(self, box: Box) -> tuple[Tensor, Tensor, bool]:
        """Rows and ranges of a box's batch entries and heads, and whether these are all heads."""
        (i, j, *_), (n, m, *_) = box
        data = self.data
        return data[i : i + n, j : j + m], self.ranges[i : i + n], m == data.shape[1]


def _entries(batch: int, alike: bool) -> list[tuple[int | None, slice]]:
    """Batch entries, one by one unless all are alike."""
    return [(None, slice(None))] if alike else [(i, slice(i, i + 1)) for i in range(batch)]


def select(pieces: Pieces, axis: int, index: Tensor) -> Pieces:
    """What is held of the given indices, on its device, of batch entries (axis 0) or heads (1)."""
    chosen: Pieces = []
    for entry, (region, at, tokens) in pieces:
        if axis == 0 and entry is not None:
            chosen += [(new, (region, at, tokens)) for new, old in enumerate(index.tolist()) if old == entry]
        else:
            chosen.append((entry, (region, at, tokens.index_select(axis, index))))
    return chosen
