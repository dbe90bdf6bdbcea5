"""The packed data of one cache, shared by every view of it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor

from . import kernels as _kernels  # noqa: F401  (registers the operators)
from .block_means import BlockMeans, Saved
from .errors import PackedCacheError
from .held import Held, select
from .host_memory import HostMemory, Parked
from .kernels import layout, reference
from .kernels.grids import stored
from .kernels.quantizers import grid_of, grid_within
from .offload import Offload

_ops = torch.ops.jkv
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what `jkv::append` takes
NOTHING = 0, 0
TOKEN, CHANNEL = 2, 3  # canonical axes are (batch, head, token, channel)


class Active:
    """The range that was written last, in full precision: the chunk being generated is never attended quantized."""

    def __init__(self, data: Tensor, start: int, stop: int) -> None:
        self._data: Tensor | Parked = data  # [B, H, stop - start, D]
        self.start, self.stop = start, stop

    @property
    def data(self) -> Tensor:
        """`[B, H, stop - start, D]`, on the device."""
        if isinstance(self._data, Parked):
            self._data = self._data.back()
        return self._data

    def park(self, host: HostMemory) -> None:
        """Go to host memory, until it is asked for."""
        if not isinstance(self._data, Parked):
            self._data = Parked(self._data, host)

    @property
    def parked_bytes(self) -> int:
        return self.nbytes if isinstance(self._data, Parked) else 0

    @property
    def nbytes(self) -> int:
        return self._data.nbytes


class Line:
    """Caches that grew out of one another, in the same memory: each holds the first tokens of the next.

    used: how many tokens of the memory belong to one of them. Nobody writes to those but the last that is left.
    """

    def __init__(self) -> None:
        self.used = 0
        self.stores: weakref.WeakSet[Store] = weakref.WeakSet()

    def join(self, store: Store) -> None:
        self.stores.add(store)
        self.used = store.shape[TOKEN]


class Family(weakref.WeakSet["Store"]):
    """The stores of one configuration, how it corrects attention, and whether they live in host memory.

    window: how many tokens it holds in full precision, of the first ones and of the newest.
    """

    def __init__(self, correction: str, offload: Offload | None = None, window: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.correction, self.offload, self.window = correction, offload, window


class Store:
    """A packed cache of canonical shape `[B, H, S, D]`.

    Args:
        shape: canonical shape.
        strides: strides, in canonical order, of the tensor that this replaces: views are located by them.
        dtype: what the cache reads as.
        codes, scales: as `kernels.layout` describes; symmetric ones where the quantizer is, and in whole blocks of
            tokens where it is per channel.
        quantizer: what a token goes through before it is quantized, as `kernels.quantizers.Grid` spells it.

    Boxes are told by their first index and their length per axis, (batch, head, token, channel). Packed data knows no
    part of a head: boxes that are written, moved or copied must span all channels, which callers see to.
    """

    def __init__(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        bits: int,
        codes: Tensor,
        scales: Tensor,
        quantizer: str = "rtn",
    ) -> None:
        self.shape, self.strides, self.dtype, self.bits = tuple(shape), tuple(strides), dtype, bits
        self._codes, self._scales, self.quantizer = codes, scales, quantizer
        self._line: Line | None = None  # where its memory has room for more tokens, and who else lives there
        self._grid = grid_of(quantizer)
        self._active: Active | None = None
        self.host: HostMemory | None = None  # where its data lives; then `_codes` and `_scales` have no memory
        self.keeps = ""  # what tells which tokens it keeps, where it has a budget (`retention`)
        self.grows = False  # whether it is one of a line of caches, each longer than the one it was made of
        self.tells_steps = False  # whether graphs tell Δ of what they read of it, for another graph to correct by
        self._family: Family | None = None
        self.window = NOTHING  # how many tokens are to be held in full precision, of the first ones and of the newest
        self.center: Tensor | None = None  # [B, H, 1, D] in `dtype`: what is stored are tokens less this
        self._told_center = False  # that there is one, where it is told rather than known
        self.means: BlockMeans | None = None  # what is stored are tokens less these
        self._told_mean_tokens = 0  # how many tokens share one, where it is told rather than known
        self._held: Held | None = None
        self._room: tuple[int, int] | None = None  # for as many, where it is told rather than known
        self._renewed = 0  # how far the range written last has reached from the first token; -1, it has grown

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        bits: int,
        group_size: int,
        device: torch.device,
        quantizer: str = "rtn",
    ) -> Store:
        """A store that reads as zeros."""
        grid = grid_of(quantizer)
        codes_shape, scales_shape = grid.store_shapes(shape, bits, group_size)
        with torch.inference_mode(False):  # one kind of tensor, whatever the mode: packed data outlives it
            codes = torch.zeros(codes_shape, dtype=torch.uint8, device=device)
            scales = torch.zeros(scales_shape, dtype=grid.scale_dtype, device=device)
        new = cls(shape, strides, dtype, bits, codes, scales, quantizer)
        new.window = 0, new._grid.open_tokens(group_size)
        return new

    def of_this_kind(self, shape: Sequence[int], strides: Sequence[int], codes: Tensor, scales: Tensor) -> Store:
        """A store of other data of the same batch and heads, that reads and is quantized as this one."""
        new = Store(shape, strides, self.dtype, self.bits, codes, scales, self.quantizer)
        new.tells_steps, new.window, new.center = self.tells_steps, self.window, self.center
        return new

    @property
    def device(self) -> torch.device:
        return self._codes.device

    @property
    def codes(self) -> Tensor:
        return self.data()[0]

    @property
    def scales(self) -> Tensor:
        return self.data()[1]

    def data(self) -> tuple[Tensor, Tensor]:
        """Codes and scales; of an offloaded cache, a copy on the device, which writes do not reach."""
        if self.host is not None:
            return self.host.read(0, self.shape[TOKEN])
        if self._line is None:
            return self._codes, self._scales
        return self._codes.narrow(2, 0, self.shape[TOKEN]), self._scales.narrow(3, 0, self.shape[TOKEN])

    @property
    def memory(self) -> tuple[Tensor, Tensor]:
        """Codes and scales with the room behind them for more tokens, as Dynamo sees them.

        Those of an offloaded cache have no memory: they are to be asked for sizes, strides and their device only.
        """
        return self._codes, self._scales

    @property
    def staged(self) -> tuple[Tensor, Tensor]:
        """What compiled graphs are given for `memory`; of an offloaded cache, between `offload.stage` and `release`."""
        if self.host is None:
            return self._codes, self._scales
        assert self.host.slot is not None
        return self.host.slot.codes, self.host.slot.scales

    @property
    def active(self) -> Active | None:
        return self._active

    @active.setter
    def active(self, active: Active | None) -> None:
        self._active = active
        if active is not None and self.host is not None and self.host.slot is None:  # otherwise with the slot
            active.park(self.host)

    @property
    def held(self) -> Held | None:
        """What is held in full precision for good: the first tokens and the newest, as far as they are known."""
        if self._held is None and any(self.window):
            self._held = Held.nothing(self.shape, self.dtype, self.device, *self.held_tokens)
        return self._held

    @property
    def held_tokens(self) -> tuple[int, int]:
        """How many of the first tokens, and of the newest before a chunk, are held in full precision."""
        if self._held is not None:
            return self._held.capacity
        if self._room is not None or self.window == NOTHING:
            return self._room or NOTHING
        sink, recent = self.window
        return (sink, recent) if self.grows else (min(sink, self.shape[TOKEN]), min(recent, self.shape[TOKEN]))

    def hold(self, held: Held | None) -> None:
        """Hold this instead; it belongs to this store alone."""
        self._held = held
        self.put_away()

    def put_away(self) -> None:
        """What is held of an offloaded cache goes to host memory, until it is asked for."""
        if self._held is not None and self.host is not None and self.host.slot is None:  # otherwise with the slot
            self._held.park(self.host)

    @property
    def settings(self) -> tuple[Any, ...]:
        """What compiled graphs depend on, but for its shape and strides."""
        centered = self.center is not None or self._told_center
        held = self.held_tokens
        return self.dtype, self.bits, self.quantizer, self.tells_steps, held, centered, self.mean_tokens, self.keeps

    def told_of(self, held_tokens: tuple[int, int], centered: bool, mean_tokens: int, keeps: str) -> None:
        """Of a store without data, as Dynamo sees it: how many tokens the real one holds in full precision, whether it
        stores them less a mean, how many share a mean of their own, and what tells which tokens it keeps."""
        self._room, self._told_center, self._told_mean_tokens = held_tokens, centered, mean_tokens
        self.keeps = keeps

    @property
    def centered(self) -> bool:
        """Whether what is stored are tokens less a mean, see `kernels.centers`."""
        return self.center is not None or self._told_center

    @property
    def mean_tokens(self) -> int:
        """How many tokens share a mean that they are stored less; 0 where there are none, see `kernels.block_means`."""
        return self._told_mean_tokens if self.means is None else self.means.tokens

    def center_of(self, starts: Sequence[int], lengths: Sequence[int]) -> Tensor | None:
        """The mean of a box's batch entries and heads, `[b, h, 1, D]`."""
        if self.center is None:
            return None
        (i, j), (n, m) = starts[:2], lengths[:2]
        return self.center[i : i + n, j : j + m]

    def alike(self, other: Store, source: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> bool:
        """Whether a box of another store (or of this one) is stored less the same means as one of this, or ones that
        come along."""
        if self.mean_tokens or other.mean_tokens:
            return self.mean_tokens == other.mean_tokens
        one, two = self.center_of(starts, lengths), other.center_of(source, lengths)
        if one is None or two is None:
            return one is two
        return one.device == two.device and torch.equal(one, two)

    @property
    def owner(self) -> object:
        """The same for all stores that lie in the same memory."""
        return self._line or self

    # ---- accounting ----

    @property
    def group_size(self) -> int:
        """Channels that share a step, or tokens of a channel, where the grid is per channel."""
        if self._grid.per_channel:
            return layout.token_block(self._codes, self._scales)
        return self.shape[CHANNEL] // self._scales.shape[2]

    @property
    def block(self) -> int:
        """Tokens that share their steps, which codes are written and moved in."""
        return self.group_size if self._grid.per_channel else 1

    @property
    def unit(self) -> int:
        """Tokens that are moved and copied together: they share their steps, or a mean."""
        return self.mean_tokens or self.block

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def packed_bytes(self) -> int:
        """Codes, steps and zero points, room for more, and what is held in full precision beside them.

        Memory that several caches of a line share is the longest one's.
        """
        shared = self._line is not None and any(s.shape[TOKEN] > self.shape[TOKEN] for s in self._line.stores)
        lies = self.memory if self.host is None else self.host.pages
        own = 0 if shared else sum(t.nbytes for t in lies) + self.center_bytes
        return own + self.active_bytes + self.held_bytes

    @property
    def retained(self) -> list[Tensor]:
        """Which tokens it keeps, where it has a budget, and how salient they are."""
        return []

    @property
    def center_bytes(self) -> int:
        return sum(x.nbytes for x in (self.center, self.means) if x is not None)

    @property
    def active_bytes(self) -> int:
        return self.active.nbytes if self.active else 0

    @property
    def held_bytes(self) -> int:
        """The part of `packed_bytes` that is there for the first tokens and the newest."""
        return self._held.nbytes if self._held else 0

    @property
    def host_bytes(self) -> int:
        """The part of `packed_bytes` that lies in host memory since the cache is offloaded."""
        whole = [x for x in (self.active, self._held) if x]
        on_device = sum(x.nbytes - x.parked_bytes for x in whole) + self.center_bytes
        return 0 if self.host is None else self.packed_bytes - on_device

    @property
    def full_precision_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def correction(self) -> str:
        """How attention over it is corrected in eager code: as its configuration says."""
        return self._family.correction if self._family is not None else "taylor"

    @property
    def is_counted(self) -> bool:
        return self._family is not None

    def join(self, family: Family | None) -> None:
        """Be counted in `family`, with every store that is made from this one (copies, moves to devices, cats).

        Where its configuration says so, the data goes to host memory.
        """
        if family is not None and family.offload is not None and self.unit > 1:
            raise PackedCacheError(
                f"a packed cache of {self._of_blocks} cannot live in host memory (offload=), where caches are moved "
                "token by token; use a backend without offload for it"
            )
        self._family = family
        if family is None:
            return
        family.add(self)
        if not any(self.window):
            self.window = family.window  # of a cache that was loaded from a file, say
        holds_data = self.numel > 0 and self.device.type != "meta"
        if family.offload is not None and self.host is None and holds_data:
            full_row = self.full_precision_bytes // max(1, self.shape[TOKEN])
            self._live_in(HostMemory.of(self._codes, self._scales, full_row, family.offload))

    def _live_in(self, host: HostMemory) -> None:
        host.stores.add(self)
        self.host, self._codes, self._scales = host, host.codes, host.scales
        self.active = self.active  # which goes to host memory, too
        self.put_away()

    # ---- growing ----

    def grown(self, codes: Tensor, scales: Tensor, strides: Sequence[int]) -> Store:
        """This cache and packed tokens after it, as a cache of its own.

        It lies in the same memory where that has room, and nothing else has grown into it: what is copied are the new
        tokens. Otherwise it gets new memory, with room for an eighth more (a quarter, where as many tokens come at a
        time), so that on the average a token is copied a few times however long the cache grows.
        """
        self._refuse_blocks("tokens are added at the end", "write to a cache that has room for them")
        batch, heads, tokens, head_dim = self.shape
        total, line = tokens + codes.shape[2], self._line
        if line is not None and len(line.stores) == 1:
            line.used = tokens  # what once grew out of this is gone
        # Room for at least one token is left: Dynamo takes two sizes for one where they are equal when it compiles.
        if line is None or line.used != tokens or total >= self._codes.shape[2]:
            line, room = Line(), max(2, total // 8, min(2 * codes.shape[2] + 1, total // 4))
            new_codes, new_scales, host = self._with_room(codes, scales, total + room)
        else:
            (new_codes, new_scales), host = self.memory, self.host
        if host is None:
            new_codes[:, :, tokens:total], new_scales[:, :, :, tokens:total] = codes, scales
        else:
            host.write(tokens, codes, scales)
        new = self.of_this_kind((batch, heads, total, head_dim), strides, new_codes, new_scales)
        if host is not None:
            new._live_in(host)
        new._line, new.grows = line, True
        line.join(new)
        new.join(self._family)
        if self.held is not None:
            new.take(self, (0, 0, 0, 0), (0, 0, 0, 0), self.shape)
        return new

    def _with_room(self, codes: Tensor, scales: Tensor, room: int) -> tuple[Tensor, Tensor, HostMemory | None]:
        """A copy of its tokens in memory for `room` of them; `codes` and `scales` tell what those are like."""
        batch, heads, tokens, _ = self.shape
        if self.host is not None:
            host = self.host.copy(tokens, room)
            return host.codes, host.scales, host
        with torch.inference_mode(False):
            new_codes = codes.new_zeros(batch, heads, room, codes.shape[3])
            new_scales = scales.new_zeros(batch, heads, scales.shape[2], room, scales.shape[4])
        new_codes[:, :, :tokens], new_scales[:, :, :, :tokens] = self.data()
        return new_codes, new_scales, None

    def own(self) -> None:
        """Before a write: take memory of its own, as large, where other caches lie in this one's."""
        if self._line is not None and len(self._line.stores) > 1:
            if self.host is not None:
                self.host.stores.discard(self)
                self._live_in(self.host.copy(self.shape[TOKEN], self._codes.shape[2]))
            else:
                with torch.inference_mode(False):
                    self._codes, self._scales = self._codes.clone(), self._scales.clone()
            self._line.stores.discard(self)
            self._line = Line()
            self._line.join(self)

    # ---- writing ----

    def changing(self) -> None:
        """A compiled graph is about to write to it: what is held of the chunk at hand is so no longer."""
        self.active = None
        if self._held is not None:
            self._held.changing()

    def write(self, source: Tensor, starts: Sequence[int], keep_active: bool) -> None:
        """Quantize `source` `[b, h, n, D]` into the box that begins at `starts` (batch, head, token, channel).

        With `keep_active`, the range is also held in full precision until the next write.
        """
        batch, heads, tokens, _ = source.shape
        self.own()
        self.active = None
        center = self.center_of(starts, source.shape)
        if self.means is not None:
            append = _ops.append_clusters if self._grid.clustered else _ops.append_means
            append(*self._less_means(starts, source.shape), _as_float(source), starts[TOKEN], *self._meaning)
        elif self.block > 1:
            self._append_blocks(_as_float(source), starts)
        else:
            with self._changing(starts, (batch, heads, tokens), anew=True) as (codes, scales):
                stored = _as_float(source) if center is None else _as_float(source - center)
                _ops.append(codes, scales, self._stored(stored), 0, self.bits)
        if self.held is not None:
            self.held.write(source, starts)
            self.put_away()
        if keep_active and (batch, heads) == self.shape[:2] and tokens:
            with torch.inference_mode(False):
                held = source.detach().to(self.dtype, copy=True, memory_format=torch.contiguous_format)
            self.active = Active(held, starts[TOKEN], starts[TOKEN] + tokens)

    def _less_means(self, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, ...]:
        """Codes, scales, means and extents of a box's batch entries and heads; views."""
        assert self.means is not None
        return *self._box(starts, lengths), *self.means.part(starts, lengths)

    @property
    def _meaning(self) -> tuple[int, int, int, str]:
        """What operators of `kernels.block_means` and `kernels.clusters` are told."""
        return self.mean_tokens, self.bits, self.group_size, self.quantizer

    def _append_blocks(self, source: Tensor, starts: Sequence[int]) -> None:
        """Quantize `source` `[b, h, n, D]` into blocks of tokens, see `kernels.blocks`."""
        held = [] if self.held is None else [self.held.part((starts, source.shape))]
        told = [rows for rows, _ in held], [ranges for _, ranges in held]
        box = self._box(starts, source.shape)
        _ops.append_blocks(*box, *told, source, starts[TOKEN], self.shape[TOKEN], self.bits)

    def settle(self) -> None:
        """Called where attention adds tokens of its own to these: is the range written last a chunk being generated?

        It is not where it is the whole cache, nor where it begins at the first token again and again, and reaches
        further: a model that computes its past anew for each chunk (AnyFlow-FAR). Then it need not be held.
        """
        if self.active is None or self.active.start:
            return
        if self._renewed and self.active.stop > self._renewed:
            self._renewed = -1  # from here on
        elif not self._renewed:
            self._renewed = self.active.stop
        if self._renewed < 0 or self.active.stop == self.shape[TOKEN]:
            self.active = None

    def scatter(
        self, source: Tensor | Store, axis: int, index: Tensor, starts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Write `source`, to be quantized or packed as this is, to some indices of one axis of a box."""
        if axis == TOKEN:
            self._refuse_blocks("tokens are written one by one", "write them as slices")
        if self.means is not None and isinstance(source, Tensor):
            for i, place in enumerate(index.tolist()):
                at = [first + place * (a == axis) for a, first in enumerate(starts)]
                self.write(source.narrow(axis, i, 1), at, keep_active=False)
            return
        self._tokens(starts[TOKEN], lengths[TOKEN], changing=True)
        if self.held is not None:
            if isinstance(source, Tensor) and axis == TOKEN:
                self.held.write_at(source, index, starts)
            else:
                self.held.forget((starts, lengths))
            self.put_away()
        if isinstance(source, Tensor):
            center = self.center_of(starts, lengths)
            if center is not None and axis != TOKEN:
                center = center.index_select(axis, index.to(center.device))
            quantized = self._like(tuple(source.shape), self.strides, center)
            quantized.window = 0, 0
            quantized.write(source, (0, 0, 0, 0), keep_active=False)
            source = quantized
        self.own()
        with self._changing(starts, lengths) as box:
            for target, new, dim in zip(box, source.data(), _dims(axis)):
                target.index_copy_(dim, index.to(target.device), new)
        self.active = None

    def fill(self, value: float, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Set a box to a number: exactly where float16 holds it, as zero and all small integers; less a mean, or in a
        block with other tokens, as any other token."""
        self.own()
        if self.means is not None:
            start, value = starts[TOKEN], self._storable(value)
            fill = _ops.fill_clusters if self._grid.clustered else _ops.fill_means
            fill(*self._less_means(starts, lengths), start, start + lengths[TOKEN], *self._meaning, value)
        elif self.block > 1:
            number = torch.full((1, 1, 1, 1), self._storable(value), dtype=self.dtype, device=self.device)
            self._append_blocks(_as_float(number).expand(tuple(lengths)), starts)
        else:
            codes_of_value, scales_of_value = self._constant(value, starts, lengths)
            with self._changing(starts, lengths, anew=True) as (codes, scales):
                codes.copy_(codes_of_value.expand_as(codes))
                scales.copy_(scales_of_value.expand_as(scales))
        if self.held is not None:
            self.held.fill(value, (starts, lengths))
            self.put_away()
        self._drop_active(starts[TOKEN], starts[TOKEN] + lengths[TOKEN])

    def fill_where(self, mask: Tensor, value: float, starts: Sequence[int]) -> None:
        """Set the tokens of a box where `mask`, bool `[b, h, n]`, is True to a number, as `fill` does."""
        self._refuse_blocks("tokens are set to a number one by one", "fill slices")
        self.own()
        codes_of_value, scales_of_value = self._constant(value, starts, mask.shape)
        mask = mask.to(self.device)
        with self._changing(starts, mask.shape) as (codes, scales):
            codes.copy_(torch.where(mask.unsqueeze(-1), codes_of_value, codes))
            scales.copy_(torch.where(mask[:, :, None, :, None], scales_of_value, scales))
        if self.held is not None:
            self.held.fill_where(mask, value, starts)
            self.put_away()
        self._drop_active(starts[TOKEN], starts[TOKEN] + mask.shape[2])

    def move(self, other: Store, source: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy a box of another store (or of this one) bit for bit; the boxes may overlap.

        Raises:
            PackedCacheError: codes of the other store mean something else here, or tokens share steps with others.
        """
        self._check_meaning(other)
        if not self.alike(other, source, starts, lengths):
            raise PackedCacheError(
                "codes of a packed cache cannot be copied where tokens are stored less other means (center=True, or "
                f"center_tokens={other.mean_tokens} beside {self.mean_tokens}); "
                "write jkv_compile.materialize(source) instead"
            )
        n, a, b = lengths[TOKEN], source[TOKEN], starts[TOKEN]
        other._tokens(a, n)
        tokens, _ = self._tokens(b, n, changing=True)
        self.own()
        if other is self and tuple(source[:2]) == tuple(starts[:2]) and self.host is None:
            codes, scales = self._box(starts, lengths)
            _ops.move(codes, scales, a, b, tokens.stop - tokens.start)
        else:
            new = other._whole_box(source, lengths)
            with self._changing(starts, lengths, anew=True) as box:
                for to, data in zip(box, new):
                    to.copy_(data.clone() if other is self else data)
        if self.means is not None and other.means is not None:
            self.means.take(other.means, source, starts, lengths)
        self.take(other, source, starts, lengths)
        self._drop_active(b, b + n)

    def take(self, other: Store, source: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """A box becomes that of another store (or of this one): what that holds of it in full precision comes along,
        where it belongs to what is held here."""
        if self.held is None:
            return
        if other is self and tuple(source[:2]) == tuple(starts[:2]):
            self.held.move((source, lengths), starts[TOKEN])
        else:
            self.held.receive((starts, lengths), other.held.pieces((source, lengths)) if other.held else [])
            other.put_away()
        self.put_away()

    # ---- reading ----

    def read(self, starts: Sequence[int], lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A box in full precision, contiguous `[b, h, n, D]`; the range written last is not quantized."""
        codes, scales, first = self._around(starts, lengths)
        if self.means is not None:
            data = codes, scales, self.means.part(starts, lengths)[0]
            read = _ops.dequantize_clusters if self._grid.clustered else _ops.dequantize_means
            out = read(*data, [], [], first, first + lengths[TOKEN], *self._meaning, dtype)
        else:
            out = self._from_grid(_ops.dequantize(codes, scales, first, first + lengths[TOKEN], self.bits, dtype))
        center = self.center_of(starts, lengths)
        if center is not None:
            out += center
        if self.held is not None:
            self.held.put_over(out, starts)
            self.put_away()
        held = self._active_in(starts, lengths)
        if held is not None:
            out[:, :, held.start : held.stop] = held.data
        return out[..., starts[CHANNEL] : starts[CHANNEL] + lengths[CHANNEL]]

    def quantization_step(self, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Δ of a box as stored, float32 `[b, h, n, G]`; zero where the range written last is held in full precision."""
        codes, scales, first = self._around(starts, lengths)
        scales = reference.scales_between(codes, scales, first, first + lengths[TOKEN])
        delta = reference.quantization_step(scales, self.bits)
        if self.held is not None:
            self.held.zero_steps(delta, starts)
            self.put_away()
        held = self._active_in(starts, lengths)
        if held is not None:
            delta[:, :, held.start : held.stop] = 0
        return delta

    # ---- new stores with the same packed data ----

    def extract(self, starts: Sequence[int], lengths: Sequence[int], strides: Sequence[int]) -> Store:
        """A copy of a box: bits, steps and zero points are the same."""
        new = self._like(lengths, strides, self.center_of(starts, lengths))
        new.insert(self, starts, (0, 0, 0, 0), lengths)
        return new

    def insert(self, other: Store, source: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """As `move`, from another store, and what that holds in full precision of the box comes along."""
        self.move(other, source, starts, lengths)
        held = other._active_in(source, lengths)
        if held is not None and tuple(lengths[:2]) == self.shape[:2]:
            with torch.inference_mode(False):
                data = held.data.clone(memory_format=torch.contiguous_format)
            self.active = Active(data, held.start + starts[TOKEN], held.stop + starts[TOKEN])

    def gather(
        self, axis: int, index: Tensor, starts: Sequence[int], lengths: Sequence[int], strides: Sequence[int]
    ) -> Store:
        """A new store of the given indices of one axis (batch, head or token) of a box."""
        if axis == TOKEN:
            self._refuse_blocks("tokens are chosen one by one", "copy slices")
        shape = [*lengths[:axis], len(index), *lengths[axis + 1 :]]
        index = index.to(self.device)
        with torch.inference_mode(False):
            codes, scales = (
                t.index_select(dim, index) for t, dim in zip(self._whole_box(starts, lengths), _dims(axis))
            )
            new = self.of_this_kind(shape, strides, codes, scales)
            new.center = self.center_of(starts, lengths)
            if self.means is not None:
                new.means = self.means.select(axis, index, starts, lengths)
            if new.center is not None and axis != TOKEN:
                new.center = new.center.index_select(axis, index)
            held = self._active_in(starts, lengths)
            if held is not None and axis != TOKEN:
                new.active = Active(held.data.index_select(axis, index), held.start, held.stop)
            if self.held is not None and new.held is not None and axis != TOKEN:
                pieces = select(self.held.pieces((starts, lengths)), axis, index)
                new.held.receive(((0, 0, 0, 0), shape), pieces)
                self.put_away()
        new.join(self._family)
        return new

    @classmethod
    def concatenate(
        cls, parts: Sequence[tuple[Store, Sequence[int], Sequence[int]] | Tensor], axis: int, strides: Sequence[int]
    ) -> Store:
        """A new store of boxes `(store, starts, lengths)`, copied bit for bit, and tensors, quantized, along one axis.

        The last run of tokens that some part has in full precision is held so here.
        """
        boxes = [p for p in parts if not isinstance(p, Tensor)]
        lengths = [tuple(p.shape) if isinstance(p, Tensor) else tuple(p[2]) for p in parts]
        shape = [sum(n[a] for n in lengths) if a == axis else lengths[0][a] for a in range(4)]
        centers = [p[0].center_of(*p[1:]) for p in boxes]
        center = centers[0]
        if center is not None and axis != TOKEN:
            blank = [center.new_zeros(*n[:2], 1, n[CHANNEL]) for n in lengths]
            known = iter(centers)
            with torch.inference_mode(False):
                center = torch.cat([b if isinstance(p, Tensor) else next(known) for p, b in zip(parts, blank)], axis)  # type: ignore[misc]
        new = boxes[0][0]._like(shape, strides, center)
        new.grows = new.grows or axis == TOKEN
        place = [0, 0, 0, 0]
        for part, n in zip(parts, lengths):
            if isinstance(part, Tensor):
                new.write(part, place, keep_active=True)
            else:
                new.insert(part[0], part[1], place, n)
            place[axis] += n[axis]
        return new

    def map(self, change: Callable[[Tensor], Tensor]) -> Store:
        """A new store with every tensor of this one changed: moved to a device, pinned, copied."""
        with torch.inference_mode(False):
            codes, scales = (change(t if self._line is None else t.contiguous()) for t in self.data())
            new = self.of_this_kind(self.shape, self.strides, codes, scales)
            new.center = None if self.center is None else change(self.center)
            new.means = None if self.means is None else self.means.map(change)
            if self.active is not None:
                new.active = Active(change(self.active.data), self.active.start, self.active.stop)
            if self._held is not None:
                new.hold(Held(change(self._held.data), self._held.ranges.clone()))
                self.put_away()
        new.grows = self.grows
        new.join(self._family)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        held = self.active
        active = None if held is None else (held.data, held.start, held.stop)
        layout = self.shape, self.strides, self.dtype, self.bits
        codes, scales = (t if self._line is None else t.contiguous() for t in self.data())  # no room
        if self.host is not None and get_spawning_popen() is not None:
            self._inherited = codes, scales  # a process that is being spawned takes them over from this one
        args = (*layout, codes, scales, active, self.quantizer)
        rows = None if self._held is None else (self._held.data, self._held.ranges, self.window)
        if self.means is not None:
            return rebuild_store, (*args, rows, None, self.means.saved)
        if self.center is not None:
            return rebuild_store, (*args, rows, self.center)
        return rebuild_store, args if rows is None else (*args, rows)

    # ---- pieces ----

    def _like(self, shape: Sequence[int], strides: Sequence[int], center: Tensor | None) -> Store:
        """An empty store that reads and is quantized as this one, less the mean of its own batch entries and heads."""
        new = Store.empty(shape, strides, self.dtype, self.bits, self.group_size, self.device, self.quantizer)
        new.grows, new.tells_steps, new.window, new.center = self.grows, self.tells_steps, self.window, center
        if self.mean_tokens:
            new.means = BlockMeans.empty(shape, self.dtype, self.device, self.mean_tokens, self._grid.tables)
        new.join(self._family)
        return new

    def _from_grid(self, x: Tensor) -> Tensor:
        """A tensor `[b, h, n, D]` of stored channels as the model knows them."""
        if self._grid.within:
            return _ops.from_grid(x, self.quantizer, self.group_size)
        return _ops.rotate(x) if self._grid.rotates else x

    def _stored(self, x: Tensor) -> Tensor:
        """What is quantized of a tensor `[b, h, n, D]`, see `kernels.quantizers`."""
        return stored(x, self.bits, self.group_size, self.quantizer)

    def _check_meaning(self, other: Store) -> None:
        mine, theirs = ((s.bits, s.group_size, s.quantizer) for s in (self, other))
        if mine != theirs:
            raise PackedCacheError(
                f"codes of a packed cache of (bits, group_size, quantizer) {theirs} cannot be copied into one of "
                f"{mine}; write jkv_compile.materialize(source) instead"
            )

    def _constant(self, value: float, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes `[1, 1, 1, W]` and scales `[1, 1, G, 1, 2]` of a token whose channels all are one number.

        Less a mean, it is another for each of a box's batch entries and heads.
        """
        center = self.center_of(starts, lengths)
        if center is not None:
            batch, heads, groups = *lengths[:2], self._scales.shape[2]
            codes = self._codes.new_zeros(batch, heads, 1, self._codes.shape[3])
            scales = self._scales.new_zeros(batch, heads, groups, 1, self._scales.shape[4])
            _ops.append(codes, scales, self._stored(_as_float(value - center)), 0, self.bits)
            return codes, scales
        value = self._storable(value)
        width, (_, _, groups, _, numbers) = self._codes.shape[3], self._scales.shape
        codes, scales = self._codes.new_zeros(1, 1, 1, width), self._scales.new_zeros(1, 1, groups, 1, numbers)
        if value and (name := self._grid.fill_operator) is not None:
            getattr(_ops, name)(codes, scales, 0, 1, self.bits, value)
        else:
            _ops.fill(codes, scales, 0, 1, value)
        return codes, scales

    def _box(self, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes and scales of the given batch entries and heads, all tokens; views."""
        return self._part_of(self.data(), starts, lengths)

    def _part_of(
        self, data: tuple[Tensor, Tensor], starts: Sequence[int], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The given batch entries and heads of codes and scales."""
        if tuple(starts[:2]) == (0, 0) and tuple(lengths[:2]) == self.shape[:2]:
            return data
        box = tuple(slice(s, s + n) for s, n in zip(starts[:2], lengths[:2]))
        return data[0][box], data[1][box]

    def _whole_box(self, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes `[b, h, n, W]` and scales `[b, h, G, n, 2]` of a box, to be read; where tokens share steps, of all
        blocks that it begins with the first of (`_tokens`)."""
        start, n = starts[TOKEN], lengths[TOKEN]
        if self.host is not None:
            return self._part_of(self.host.read(start, start + n), starts, lengths)
        codes, scales = self._box(starts, lengths)
        tokens, steps = self._tokens(start, n)
        return codes[:, :, tokens], scales[:, :, :, steps]

    def _around(self, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        """Codes and scales that a box's tokens are in, and the place of the first of these."""
        if self.host is not None:
            return *self._whole_box(starts, lengths), 0
        return *self._box(starts, lengths), starts[TOKEN]

    def _tokens(self, start: int, n: int, changing: bool = False) -> tuple[slice, slice]:
        """Where tokens start … start + n - 1 are in codes and in scales.

        Where tokens share steps, these are whole blocks. The last one may have other tokens after these unless they
        are `changing`; then it ends with them, or with the cache.

        Raises:
            PackedCacheError: they are not.
        """
        block, unit, stop = self.block, self.unit, start + n
        if unit > 1 and (start % unit or (changing and stop % unit and stop != self.shape[TOKEN])):
            raise PackedCacheError(
                f"tokens {start}:{stop} of a packed cache of {self._of_blocks} and {self.shape[TOKEN]} "
                f"tokens: expected multiples of {unit}, or its end, as codes of so many tokens share {self._shared}; "
                "copy whole blocks, write jkv_compile.materialize(source), which quantizes anew, or choose another "
                + ("center_tokens" if self.mean_tokens else "quantizer or block_tokens")
            )
        if block == 1:
            return slice(start, stop), slice(start, stop)
        blocks = slice(start // block, -(-stop // block))
        return slice(start, blocks.stop * block), blocks

    def _refuse_blocks(self, what: str, instead: str) -> None:
        """Raise `PackedCacheError` where tokens share their steps, or a mean."""
        if self.unit > 1:
            raise PackedCacheError(
                f"{what} of a packed cache of {self._of_blocks}, {self.unit} of which share {self._shared}; "
                f"nothing was written. Expected ranges of tokens: {instead}, or choose "
                + ("center_tokens=0" if self.mean_tokens and not self._grid.clustered else "another quantizer")
            )

    @property
    def _of_blocks(self) -> str:
        """What makes tokens share something, for people."""
        centers = f"center_tokens={self.mean_tokens}" if self.mean_tokens else ""
        quantizer = "" if self.mean_tokens and not self._grid.clustered else f"quantizer {self.quantizer!r}"
        return " and ".join(filter(None, (quantizer, centers)))

    @property
    def _shared(self) -> str:
        return "centroids" if self._grid.clustered else "a mean" if self.mean_tokens else "their steps"

    @contextmanager
    def _changing(
        self, starts: Sequence[int], lengths: Sequence[int], anew: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `_whole_box`, to be changed in place; with `anew`, all of it is, and what it holds does not matter."""
        if self.host is None:
            yield self._whole_box(starts, lengths)
            return
        start, n = starts[TOKEN], lengths[TOKEN]
        whole_rows = tuple(lengths[:2]) == self.shape[:2]
        data = self.host.blank(n) if anew and whole_rows else self.host.read(start, start + n)
        yield self._part_of(data, starts, lengths)
        self.host.write(start, *data)

    def _active_in(self, starts: Sequence[int], lengths: Sequence[int]) -> Active | None:
        """The part of a box that is held in full precision, its range told from the box's first token; all channels."""
        if self.active is None:
            return None
        start, stop = starts[TOKEN], starts[TOKEN] + lengths[TOKEN]
        a, b = max(start, self.active.start), min(stop, self.active.stop)
        if a >= b:
            return None
        (i, j), (n, m) = starts[:2], lengths[:2]
        data = self.active.data[i : i + n, j : j + m, a - self.active.start : b - self.active.start]
        return Active(data, a - start, b - start)

    def _drop_active(self, start: int, stop: int) -> None:
        """Forget what is held in full precision of a range that has changed, and the rest of it."""
        if self.active is not None and start < self.active.stop and self.active.start < stop:
            self.active = None

    def _storable(self, value: float) -> float:
        value = torch.tensor(value, dtype=self.dtype).double().item()
        if not self._grid.holds(value):
            raise PackedCacheError(
                f"a fill of a packed cache with {value}: expected 0, the only constant that quantizer "
                f"{self.quantizer!r} holds, as it rotates tokens and its grids have no level that is exactly zero; "
                "choose a quantizer with zero points and 16-bit steps, or go back to a plain tensor with "
                "jkv_compile.materialize(cache)"
            )
        symmetric = self._grid.symmetric
        most = reference.symmetric_max(self.bits) if symmetric else reference.FLOAT16_MAX
        if abs(value) > most and (symmetric or not math.isinf(value)):
            raise PackedCacheError(
                f"a fill of a packed cache with {value}: expected a number of at most {most:.0f}, which its float16 "
                "scales can hold; use jkv_compile.materialize(cache) to go back to a plain tensor"
            )
        return value


def rebuild_store(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    bits: int,
    codes: Tensor,
    scales: Tensor,
    active: tuple[Tensor, int, int] | None,
    quantizer: str = "rtn",
    held: tuple[Tensor, Tensor, tuple[int, int]] | None = None,
    center: Tensor | None = None,
    means: Saved | None = None,
) -> Store:
    """Raises `PackedCacheError` where the parts do not fit together: a file may hold anything."""
    batch, heads, tokens, head_dim = shape
    try:
        grid = grid_of(quantizer)
    except (TypeError, ValueError):
        grid = None
    sound = codes.dim() == 4 and scales.dim() == 5 and scales.shape[2] > 0 and head_dim % scales.shape[2] == 0
    group_size = head_dim // scales.shape[2] if sound else 0
    if sound and grid is not None and grid.per_channel:
        group_size = layout.token_block(codes, scales)
    fits = (
        bits in layout.SUPPORTED_BITS
        and grid is not None
        and group_size > 0
        and codes.dtype == torch.uint8
        and scales.dtype == grid.scale_dtype
        and (tuple(codes.shape), tuple(scales.shape)) == grid.store_shapes(shape, bits, group_size)
        and grid.clustered == (grid.stages > 0)
        and not (grid.clustered and means is None)
        and (not grid.pairs or grid_within(quantizer, head_dim, group_size, grid.pairs) == grid)
        and len(strides) == 4
    )
    if not fits:
        raise PackedCacheError(
            f"a saved packed cache of shape {tuple(shape)} at {bits} bits, quantizer {quantizer!r}, "
            f"does not fit its data: codes {codes.dtype} {list(codes.shape)}, "
            f"scales {scales.dtype} {list(scales.shape)}"
        )
    store = Store(shape, strides, dtype, bits, codes, scales, quantizer)
    store.window = 0, store._grid.open_tokens(store.group_size)
    if center is not None:
        if tuple(center.shape) != (batch, heads, 1, head_dim) or center.dtype != dtype:
            raise PackedCacheError(
                f"a saved packed cache of {list(shape)}, {dtype}, has means {center.dtype} {list(center.shape)}"
            )
        store.center = center
    if means is not None:
        if center is not None or store.block > 1:
            raise PackedCacheError(
                f"a saved packed cache of quantizer {quantizer!r} has means of blocks of tokens beside "
                + ("a mean of all of them" if center is not None else "steps of blocks; expected one of both")
            )
        store.means = BlockMeans.rebuilt(means, shape, dtype, store._grid.tables)
    if active is not None:
        data, start, stop = active
        if tuple(data.shape) != (batch, heads, stop - start, head_dim) or not 0 <= start <= stop <= tokens:
            raise PackedCacheError(
                f"a saved packed cache holds {list(data.shape)} in full precision for tokens {start}:{stop}"
            )
        store.active = Active(data, start, stop)
    if held is not None:
        rows, ranges, window = held
        if not _fit(rows, ranges, shape):
            raise PackedCacheError(
                f"a saved packed cache of {list(shape)} holds {list(rows.shape)} in full precision for good, which its "
                f"ranges {ranges.tolist()} do not tell tokens of"
            )
        store.window = (window[0], window[1])
        store.hold(Held(rows, ranges))
    return store


def _fit(rows: Tensor, ranges: Tensor, shape: Sequence[int]) -> bool:
    """Whether each range of tokens lies within a cache of `shape`, and its rows within their region."""
    batch, heads, tokens, head_dim = shape
    if ranges.dtype != torch.int64 or ranges.dim() != 3 or tuple(ranges.shape) not in ((batch, 1, 4), (batch, 3, 4)):
        return False
    sizes = ranges[0, :, 3].tolist()
    if min(sizes) < 0 or tuple(rows.shape) != (batch, heads, sum(sizes), head_dim) or sizes[1:2] != sizes[2:]:
        return False
    for entry in ranges.tolist():
        first = 0
        for i, (start, stop, row, n) in enumerate(entry):
            inside = first <= row and row + stop - start <= first + n and (i > 0 or row == start)
            if n != sizes[i] or not 0 <= start <= stop <= tokens or (start < stop and not inside):
                return False
            first += n
    return True


def _as_float(source: Tensor) -> Tensor:
    return source if source.dtype in _FLOATS else source.float()


def _dims(axis: int) -> tuple[int, int]:
    """The dimensions of codes and of scales that hold a canonical axis other than channels."""
    return axis, axis + (axis == TOKEN)
