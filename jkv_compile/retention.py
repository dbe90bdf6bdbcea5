"""A packed cache that keeps the most salient of its tokens (`budget=`): `kernels.retention` has the rules."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .errors import PackedCacheError, PackedReadWarning
from .kernels import layout, reference
from .kernels import retention as rules
from .store import CHANNEL, NOTHING, TOKEN, Active, Family, Store, _as_float, rebuild_store

_ops = torch.ops.jkv
_INSTEAD = "write whole tokens as slices, of all batch entries and heads, or use jkv_compile.materialize(cache)"


class KeptStore(Store):
    """A store of canonical shape `[B, H, S, D]` with rows for R of its S tokens.

    Args:
        codes, scales: as of a store of R tokens.
        places: uint8 `[S]` on the CPU; salience: float32 `[R]`, see `kernels.retention`.
        policy: what salience tells.

    What is written gets its rows, for which the least salient of the others are dropped. Those, and tokens that were
    never written, read as zeros; of the former a `PackedReadWarning` tells. Rows are of all batch entries and heads,
    so that writes and resets have to be, too.
    """

    def __init__(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, bits: int, codes: Tensor,
        scales: Tensor, quantizer: str, places: Tensor, salience: Tensor, policy: str,
    ) -> None:  # fmt: skip
        super().__init__(shape, strides, dtype, bits, codes, scales, quantizer)
        self.places, self.salience, self.keeps = places, salience, policy

    @classmethod
    def of_budget(
        cls, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, bits: int, group_size: int,
        device: torch.device, quantizer: str, budget: int, policy: str,
    ) -> KeptStore:  # fmt: skip
        """A store that keeps nothing yet, and reads as zeros."""
        batch, heads, tokens, head_dim = shape
        rows = Store.empty((batch, heads, budget, head_dim), strides, dtype, bits, group_size, device, quantizer)
        with torch.inference_mode(False):
            salience = torch.zeros(budget, dtype=torch.float32, device=device)
            places = rules.no_places(tokens)
        return cls(shape, strides, dtype, bits, *rows.memory, quantizer, places, salience, policy)

    @property
    def codes(self) -> Tensor:
        return self._codes

    @property
    def scales(self) -> Tensor:
        return self._scales

    def data(self) -> tuple[Tensor, Tensor]:
        """There are no codes of all tokens: what needs them is refused."""
        self._refuse("what takes codes of all tokens (pack_bytes, a copy into another kind of cache)")

    def _refuse(self, what: str) -> NoReturn:
        raise PackedCacheError(
            f"{what} cannot be done to a packed cache that keeps {self.budget} of {self.shape[TOKEN]} tokens "
            f"(budget=); nothing was written. Expected slices along tokens: {_INSTEAD}"
        )

    # ---- what it keeps ----

    @property
    def budget(self) -> int:
        """Tokens that there are rows for."""
        return self._codes.shape[2]

    @property
    def retained(self) -> list[Tensor]:
        return [self.places, self.salience]

    @property
    def kept_tokens(self) -> int:
        return int(rules.kept(self.places).sum())

    @property
    def known_tokens(self) -> int:
        return int(rules.known(self.places).sum())

    @property
    def packed_bytes(self) -> int:
        return super().packed_bytes + self.retained_bytes

    @property
    def retained_bytes(self) -> int:
        """The part of `packed_bytes` that tells which tokens are kept, and how salient they are."""
        return self.places.nbytes + self.salience.nbytes

    def kept_among(self, start: int, n: int) -> Tensor:
        """Which of tokens start … start + n - 1 are kept, bool `[n]` on the CPU."""
        return rules.kept(self.places)[start : start + n]

    def dropped_among(self, start: int, n: int) -> Tensor:
        """Which of them have been dropped, bool `[n]` on the CPU. The others that are not kept are zeros."""
        return self.kept_among(start, n) ^ rules.known(self.places)[start : start + n]

    def join(self, family: Family | None) -> None:
        if family is not None and family.offload is not None:
            raise PackedCacheError(
                "a packed cache with a budget cannot live in host memory (offload=), where rows are moved by position; "
                "use a backend without offload for it"
            )
        super().join(family)
        self.window = NOTHING

    @property
    def _state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._codes, self._scales, self.places, self.salience

    def _whole(self, what: str, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Raise unless a box is of all batch entries and heads."""
        if tuple(starts[:2]) != (0, 0) or tuple(lengths[:2]) != self.shape[:2]:
            self._refuse(f"{what} of some batch entries or heads")

    # ---- writing ----

    def write(self, source: Tensor, starts: Sequence[int], keep_active: bool) -> None:
        self._whole("a write", starts, source.shape)
        if (n := source.shape[2]) == 0:
            return
        start = starts[TOKEN]
        _ops.append_kept(*self._state, self._stored(_as_float(source)), start, self.bits, self.keeps)
        self.active = None
        if keep_active:
            with torch.inference_mode(False):
                data = source.detach().to(self.dtype, copy=True, memory_format=torch.contiguous_format)
            self.active = Active(data, start, start + n)

    def fill(self, value: float, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Tokens that are set to zero are kept no more; of any other number they are tokens as others."""
        self._whole("a fill", starts, lengths)
        start, stop = starts[TOKEN], starts[TOKEN] + lengths[TOKEN]
        if self._storable(value):
            self.write(torch.full(tuple(lengths), value, dtype=self.dtype, device=self.device), starts, False)
            return
        _ops.forget_kept(*self._state, start, stop)
        self._drop_active(start, stop)

    def fill_where(self, mask: Tensor, value: float, starts: Sequence[int]) -> None:
        self._refuse("a fill of single tokens")

    def scatter(
        self, source: Tensor | Store, axis: int, index: Tensor, starts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self._refuse("a write by indices")

    def move(self, other: Store, source: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Tokens become those of another such store, or of this one, as far as they are kept there."""
        self._check_meaning(other)
        self._whole("a move", starts, lengths)
        if not isinstance(other, KeptStore) or tuple(other.shape[:2]) != tuple(self.shape[:2]):
            self._refuse("a copy of codes of another cache")
        n, a, b = lengths[TOKEN], source[TOKEN], starts[TOKEN]
        if other is self:
            _ops.move_kept(*self._state, a, b, n, self.keeps)
        else:
            first, last = rules.rows_of(other.places, a, a + n)
            wanted = other.kept_among(a, n)
            begin, end = rules.make_room(*self._state, b, b + n, self.keeps, wanted)
            self._codes[:, :, begin:end] = other._codes[:, :, first:last]
            self._scales[:, :, :, begin:end] = other._scales[:, :, :, first:last]
            self.salience[begin:end] = other.salience[first:last]
            told = rules.known(self.places), rules.attended(self.places)
            for mine, theirs in zip(told, (rules.known(other.places), rules.attended(other.places))):
                mine[b : b + n] = theirs[a : a + n]
            rules.tell(self.places, rules.kept(self.places), *told)
        self._drop_active(b, b + n)

    # ---- reading ----

    def read(self, starts: Sequence[int], lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
        start, n = starts[TOKEN], lengths[TOKEN]
        codes, scales, (first, last), kept = self._rows(starts, lengths)
        rows = self._from_grid(_ops.dequantize(codes, scales, first, last, self.bits, dtype))
        out = rows if last - first == n else rows.new_zeros(*lengths[:2], n, self.shape[CHANNEL])
        if last - first < n:
            out[:, :, kept.nonzero().flatten().to(out.device)] = rows
        if self.dropped_among(start, n).any():
            _warn_of_dropped()
        active = self._active_in(starts, lengths)
        if active is not None:
            out[:, :, active.start : active.stop] = active.data
        return out[..., starts[CHANNEL] : starts[CHANNEL] + lengths[CHANNEL]]

    def quantization_step(self, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
        _, scales, (first, last), kept = self._rows(starts, lengths)
        delta = scales.new_zeros(*lengths[:3], scales.shape[2], dtype=torch.float32)
        told = reference.quantization_step(scales[:, :, :, first:last], self.bits)
        delta[:, :, kept.nonzero().flatten().to(delta.device)] = told
        active = self._active_in(starts, lengths)
        if active is not None:
            delta[:, :, active.start : active.stop] = 0
        return delta

    def _rows(self, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor, tuple[int, int], Tensor]:
        """Codes and scales of a box's batch entries and heads, its rows, and which tokens these are."""
        start, n = starts[TOKEN], lengths[TOKEN]
        codes, scales = self._part_of((self._codes, self._scales), starts, lengths)
        return codes, scales, rules.rows_of(self.places, start, start + n), self.kept_among(start, n)

    # ---- new stores ----

    def extract(self, starts: Sequence[int], lengths: Sequence[int], strides: Sequence[int]) -> KeptStore:
        """A copy of a box, with room for as many tokens as it shows, or as are kept at most."""
        n = lengths[TOKEN]
        with torch.inference_mode(False):
            codes, scales, (first, last), kept = self._rows(starts, lengths)
            rows = min(n, self.budget)
            new_codes, new_scales = (
                t.new_zeros([rows if dim == axis else m for dim, m in enumerate(t.shape)])
                for t, axis in ((codes, 2), (scales, 3))
            )
            new_codes[:, :, : last - first] = codes[:, :, first:last]
            new_scales[:, :, :, : last - first] = scales[:, :, :, first:last]
            salience = self.salience.new_zeros(rows)
            salience[: last - first] = self.salience[first:last]
            places = rules.no_places(n)
            among = slice(starts[TOKEN], starts[TOKEN] + n)
            rules.tell(places, kept, rules.known(self.places)[among], rules.attended(self.places)[among])
        new = self._kind(lengths, strides, new_codes, new_scales, places, salience)
        active = self._active_in(starts, lengths)
        if active is not None:
            with torch.inference_mode(False):
                data = active.data.clone(memory_format=torch.contiguous_format)
            new.active = Active(data, active.start, active.stop)
        new.join(self._family)
        return new

    def map(self, change: Callable[[Tensor], Tensor]) -> KeptStore:
        with torch.inference_mode(False):
            codes, scales, salience = (change(t) for t in (self._codes, self._scales, self.salience))
            new = self._kind(self.shape, self.strides, codes, scales, self.places.clone(), salience)
            if self.active is not None:
                new.active = Active(change(self.active.data), self.active.start, self.active.stop)
        new.join(self._family)
        return new

    def _kind(
        self, shape: Sequence[int], strides: Sequence[int], codes: Tensor, scales: Tensor, places: Tensor,
        salience: Tensor,
    ) -> KeptStore:  # fmt: skip
        data = codes, scales, self.quantizer, places, salience, self.keeps
        new = KeptStore(shape, strides, self.dtype, self.bits, *data)
        new.tells_steps = self.tells_steps
        return new

    def _like(self, shape: Sequence[int], strides: Sequence[int], center: Tensor | None) -> NoReturn:  # type: ignore[override]
        self._refuse("cat, roll or an index along tokens")

    def gather(
        self, axis: int, index: Tensor, starts: Sequence[int], lengths: Sequence[int], strides: Sequence[int]
    ) -> NoReturn:  # type: ignore[override]
        self._refuse("an index")

    def grown(self, codes: Tensor, scales: Tensor, strides: Sequence[int]) -> NoReturn:  # type: ignore[override]
        self._refuse("a concatenation that grows")

    def __reduce__(self) -> tuple[Any, ...]:
        active = None if self.active is None else (self.active.data, self.active.start, self.active.stop)
        layout = self.shape, self.strides, self.dtype, self.bits
        kept = self.places, self.salience, self.keeps
        return rebuild_kept_store, (*layout, self._codes, self._scales, active, self.quantizer, *kept)


def rebuild_kept_store(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, bits: int, codes: Tensor, scales: Tensor,
    active: tuple[Tensor, int, int] | None, quantizer: str, places: Tensor, salience: Tensor, policy: str,
) -> KeptStore:  # fmt: skip
    """Raises `PackedCacheError` where the parts do not fit together: a file may hold anything."""
    rows, places = codes.shape[2] if codes.dim() == 4 else 0, places.cpu()
    batch, heads, tokens, head_dim = shape
    plain = rebuild_store((batch, heads, rows, head_dim), strides, dtype, bits, codes, scales, None, quantizer)
    fits = (
        places.dtype == torch.uint8
        and tuple(places.shape) == (tokens,)
        and salience.dtype == torch.float32
        and tuple(salience.shape) == (rows,)
        and 0 < rows <= tokens
        and layout.token_block(codes, scales) == 1
        and set(places.unique().tolist()) <= {0, rules.KNOWN, rules.KNOWN | rules.KEPT, 7}
        and int(rules.kept(places).sum()) <= rows
        and isinstance(policy, str)
    )
    if not fits:
        raise PackedCacheError(
            f"a saved packed cache of shape {tuple(shape)} keeps {rows} tokens: expected places of uint8 "
            f"[{tokens}], no more of them kept, and as many saliences, not {places.dtype} "
            f"{list(places.shape)} and {salience.dtype} {list(salience.shape)}"
        )
    store = KeptStore(shape, strides, dtype, bits, *plain.memory, quantizer, places, salience, policy)
    if active is not None:
        data, start, stop = active
        if tuple(data.shape) != (batch, heads, stop - start, head_dim) or not 0 <= start <= stop <= tokens:
            raise PackedCacheError(
                f"a saved packed cache holds {list(data.shape)} in full precision for tokens {start}:{stop}"
            )
        store.active = Active(data, start, stop)
    return store


def adopt_tokens(store: KeptStore, canonical: Tensor, block: int) -> None:
    """Keep the newest of the tokens `[B, H, S, D]` that are not zero, as many as there are rows."""
    filled = canonical.new_zeros(canonical.shape[2], dtype=torch.bool)
    for start in range(0, len(filled), block):
        filled[start : start + block] = canonical[:, :, start : start + block].ne(0).any(3).any(1).any(0)
    filled = filled.cpu()
    for run in _runs(filled & (filled.flip(0).cumsum(0).flip(0) <= store.budget)):
        for start in range(run.start, run.stop, block):
            stop = min(start + block, run.stop)
            store.write(canonical[:, :, start:stop], (0, 0, start, 0), keep_active=False)
    store.places |= filled * rules.KNOWN


def _runs(flags: Tensor) -> list[range]:
    """Runs of True."""
    edges = torch.cat((flags.new_zeros(1), flags, flags.new_zeros(1))).int().diff().nonzero().flatten().tolist()
    return [range(a, b) for a, b in zip(edges[::2], edges[1::2])]


def _warn_of_dropped() -> None:
    """Python shows a warning of constant text once per line."""
    from .packed_dispatch import _is_library

    frame = sys._getframe(1)
    while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", ""), frame.f_code.co_filename):
        frame = frame.f_back
    warnings.warn_explicit(
        "tokens of a packed cache are read that its budget has dropped (budget=): they read as zeros",
        PackedReadWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


torch.serialization.add_safe_globals([rebuild_kept_store])
