"""Any sequence of operations leaves a packed cache with the plain tensor's values, each quantized exactly once.

A value is quantized when it is written, and never again: however it is moved, copied, saved or concatenated later, it
stays within the bound of one quantization (`tests.caches.error_bound`), and moves keep every bit.
"""

from __future__ import annotations

import copy
import io
import pickle

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from jkv_compile import PackedKV, materialize
from jkv_compile.packed_copies import canonical_strides
from tests.caches import AXES, ROUNDING, assert_agrees, assert_held_exactly, assert_same_bits, new_cache, packed_data

MOST_TOKENS = 24
fractions = st.floats(0, 1, exclude_max=True)


class PackedCacheMachine(RuleBasedStateMachine):
    """`cache` is packed, `plain` is a tensor that has undergone the same; tokens are their dimension `dim`."""

    @initialize(
        layout=st.sampled_from(sorted(AXES)),
        batch=st.integers(1, 2),
        seed=st.integers(0, 2**16),
        quantizer=st.sampled_from(["rtn", "rtn/pairs64", "symmetric", "symmetric/pairs64"]),
        sink=st.sampled_from([0, 0, 5, 20]),
        recent=st.sampled_from([0, 0, 3, 20]),
    )
    def allocate(self, layout: str, batch: int, seed: int, quantizer: str, sink: int, recent: int) -> None:
        torch.manual_seed(seed)
        self.parent: tuple[Tensor, Tensor] | None = None
        self.dim = layout.index("s")
        self.cache, self.plain = new_cache(
            layout, batch=batch, tokens=12, heads=2, head_dim=64, quantizer=quantizer, sink=sink, recent=recent
        )

    def range(self, start: float, length: float) -> tuple[int, int]:
        """A range of at least one token."""
        tokens = self.plain.shape[self.dim]
        first = int(start * tokens)
        return first, 1 + int(length * (tokens - first))

    def part(self, x: Tensor, first: int, n: int) -> Tensor:
        return x.narrow(self.dim, first, n)

    def values(self, n: int, scale: float = 1.0) -> Tensor:
        shape = list(self.plain.shape)
        shape[self.dim] = n
        return torch.randn(shape) * scale

    # ---- writing ----

    @rule(start=fractions, length=fractions, scale=st.sampled_from([1e-3, 1.0, 100.0]))
    def write_a_slice(self, start: float, length: float, scale: float) -> None:
        first, n = self.range(start, length)
        new = self.values(n, scale)
        for x in (self.cache, self.plain):
            self.part(x, first, n).copy_(new)

    @rule(start=fractions, length=fractions, batch=st.integers(0, 1))
    def write_one_batch_entry(self, start: float, length: float, batch: int) -> None:
        first, n = self.range(start, length)
        new, entry = self.values(n), batch % self.plain.shape[0]
        for x in (self.cache, self.plain):
            self.part(x, first, n)[entry] = new[entry]

    @rule(data=st.data())
    def write_indices(self, data: st.DataObject) -> None:
        tokens = st.integers(0, self.plain.shape[self.dim] - 1)
        index = torch.tensor(data.draw(st.lists(tokens, min_size=1, max_size=5, unique=True)))
        new = self.values(len(index))
        for x in (self.cache, self.plain):
            x.index_copy_(self.dim, index, new)

    @rule(start=fractions, length=fractions, value=st.sampled_from([0.0, 1.0, -2.5]))
    def reset_a_slice(self, start: float, length: float, value: float) -> None:
        first, n = self.range(start, length)
        for x in (self.cache, self.plain):
            self.part(x, first, n).fill_(value)
        read, symmetric = materialize(self.part(self.cache, first, n)), self.cache._store._grid.symmetric
        assert ((read - value).abs() <= (abs(value) * ROUNDING if symmetric else 0)).all()

    @rule(start=fractions)
    def reset_what_lies_beyond(self, start: float) -> None:
        tokens = self.plain.shape[self.dim]
        mask = torch.arange(tokens) >= int(start * tokens)
        mask = mask.view([-1 if i == self.dim else 1 for i in range(4)])
        for x in (self.cache, self.plain):
            x.masked_fill_(mask, 0)

    # ---- moving ----

    @rule(start=fractions, length=fractions, goal=fractions, cloned=st.booleans())
    def move(self, start: float, length: float, goal: float, cloned: bool) -> None:
        first, n = self.range(start, length)
        to = int(goal * (self.plain.shape[self.dim] - n + 1))
        before = packed_data(self.part(self.cache, first, n))
        source = self.part(self.cache, first, n)
        self.part(self.cache, to, n).copy_(source.clone() if cloned else source)
        self.part(self.plain, to, n).copy_(self.part(self.plain, first, n).clone())
        assert_same_bits(packed_data(self.part(self.cache, to, n)), before)

    @rule(shift=st.integers(-30, 30))
    def roll(self, shift: int) -> None:
        codes, scales = packed_data(self.cache)
        self.cache, self.plain = self.cache.roll(shift, self.dim), self.plain.roll(shift, self.dim)
        assert_same_bits(packed_data(self.cache), (codes.roll(shift, 2), scales.roll(shift, 3)))

    @rule()
    def swap_batch_entries(self) -> None:
        order = torch.arange(self.plain.shape[0]).flip(0)
        self.cache, self.plain = self.cache.index_select(0, order), self.plain.index_select(0, order)

    # ---- copying ----

    @rule()
    def clone(self) -> None:
        self.replace(self.cache.clone())

    @rule()
    def deepcopy(self) -> None:
        self.replace(copy.deepcopy(self.cache))

    @rule()
    def move_to_a_device(self) -> None:
        self.replace(self.cache.to("cpu", copy=True))

    @rule()
    def pickle(self) -> None:
        self.replace(pickle.loads(pickle.dumps(self.cache)))

    @rule()
    def save_and_load(self) -> None:
        file = io.BytesIO()
        torch.save(self.cache, file)
        file.seek(0)
        self.replace(torch.load(file, weights_only=True))

    @rule()
    def change_the_layout(self) -> None:
        """Tokens and heads swap places in memory."""
        self.cache = self.cache.transpose(1, 2).contiguous()
        self.plain = self.plain.transpose(1, 2).contiguous()
        self.dim = 3 - self.dim

    def replace(self, new: Tensor) -> None:
        assert_same_bits(packed_data(new), packed_data(self.cache))
        assert torch.equal(materialize(new), materialize(self.cache))
        self.cache = new

    # ---- growing and shrinking ----

    @rule(start=fractions, length=fractions, new=st.integers(0, 4), front=st.booleans())
    def concatenate(self, start: float, length: float, new: int, front: bool) -> None:
        first, n = self.range(start, length)
        n = min(n, MOST_TOKENS - new)
        before, fresh = packed_data(self.part(self.cache, first, n)), self.values(new)

        def grown(x: Tensor) -> Tensor:
            parts = [self.part(x, first, n), fresh]
            return torch.cat(parts[::-1] if front else parts, self.dim)

        self.cache, self.plain = grown(self.cache), grown(self.plain)
        assert_same_bits(packed_data(self.part(self.cache, new if front else 0, n)), before)

    @rule(new=st.integers(1, 4))
    def grow(self, new: int) -> None:
        """As a compiled graph does that returns the concatenation; what it was made of lives on, until the next time."""
        if self.plain.shape[self.dim] + new > MOST_TOKENS:
            return
        fresh = self.values(new)
        self.parent = self.cache, self.plain.clone()
        new_codes, new_scales = packed_data(torch.cat([self.part(self.cache, 0, 1), fresh], self.dim))
        self.plain = torch.cat([self.plain, fresh], self.dim)
        window = self.cache.window()
        strides = canonical_strides(window, self.plain.shape, self.plain.stride())
        store = self.cache._store.grown(new_codes[:, :, 1:], new_scales[:, :, :, 1:], strides)
        self.cache = PackedKV(store, self.plain.shape, self.plain.stride(), 0, self.plain.dtype)

    # ---- what holds always ----

    @invariant()
    def a_parent_is_left_alone(self) -> None:
        if self.parent is not None:
            assert_agrees(*self.parent)

    @invariant()
    def values_agree(self) -> None:
        assert isinstance(self.cache, PackedKV)
        assert self.cache.stride() == self.plain.stride()
        assert_agrees(self.cache, self.plain)

    @invariant()
    def range_in_full_precision_is_exact(self) -> None:
        active = self.cache._store.active
        if active is not None:
            held = self.part(self.cache, active.start, active.stop - active.start)
            assert torch.equal(materialize(held), self.part(self.plain, active.start, active.stop - active.start))

    @invariant()
    def first_and_newest_tokens_in_full_precision_are_exact(self) -> None:
        window = self.cache.window()
        order = [dim for axis in range(4) for dim in range(4) if window.axes[dim] == axis]
        if len(order) == 4:
            assert_held_exactly(self.cache, self.plain.permute(order))


TestPackedCacheMachine = PackedCacheMachine.TestCase
TestPackedCacheMachine.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
