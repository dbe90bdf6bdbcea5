"""What blocks of a packed cache's tokens have in common: a mean, or centroids (`kernels.block_means`, `.clusters`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import PackedCacheError
from .kernels import block_means as rules

TOKEN = 2
Saved = tuple[Tensor, Tensor, int]


class BlockMeans:
    """The means of a store, or its centroids, and which of its blocks nothing has been written to.

    Boxes are told by their first index and their length per axis (batch, head, token, channel).

    Args:
        data: `[B, H, T, D]`, or tables of centroids `[B, H, T, stages · C · D]`, in the cache's dtype, on its device;
            contiguous, as strides are compiled.
        extents: float64 `[B, H, T, 3]` on the CPU, see `kernels.block_means`.
        tokens: how many share one.
    """

    def __init__(self, data: Tensor, extents: Tensor, tokens: int) -> None:
        self.data, self.extents, self.tokens = data, extents, tokens

    @classmethod
    def empty(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, tokens: int, tables: int
    ) -> BlockMeans:
        """Those of a cache `[B, H, S, D]` that reads as zeros; `tables` vectors for each block."""
        batch, heads, length, head_dim = shape
        with torch.inference_mode(False):  # one kind of tensor, whatever the mode: it outlives it
            data = torch.zeros(
                batch, heads, rules.blocks(length, tokens), head_dim * tables, dtype=dtype, device=device
            )
            return cls(data, rules.nothing_written(batch, heads, length, tokens), tokens)

    @classmethod
    def rebuilt(cls, saved: Saved, shape: Sequence[int], dtype: torch.dtype, tables: int) -> BlockMeans:
        """Those that were `saved`. Raises `PackedCacheError` where they are not a cache's of `shape` and `dtype`."""
        data, extents, tokens = saved
        batch, heads, length, head_dim = shape
        known = isinstance(tokens, int) and tokens > 0
        expected = (batch, heads, rules.blocks(length, tokens if known else 1))
        fits = tuple(data.shape) == (*expected, head_dim * tables) and tuple(extents.shape) == (*expected, 3)
        if not known or not fits or data.dtype != dtype or extents.dtype != torch.float64:
            raise PackedCacheError(
                f"a saved packed cache of {list(shape)}, {dtype}, has means {data.dtype} {list(data.shape)} of every "
                f"{tokens} tokens, and extents {extents.dtype} {list(extents.shape)}; expected {list(expected)}, "
                f"{tables} for each block"
            )
        return cls(data.contiguous(), extents, tokens)

    @property
    def saved(self) -> Saved:
        return self.data, self.extents, self.tokens

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def part(self, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Means and extents of a box's batch entries and heads, all blocks; views."""
        (i, j), (n, m) = starts[:2], lengths[:2]
        return self.data[i : i + n, j : j + m], self.extents[i : i + n, j : j + m]

    def take(self, other: BlockMeans, source: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Blocks of a box become those of another cache, or of this one; both begin with a block."""
        n, a, b = rules.blocks(lengths[TOKEN], self.tokens), source[TOKEN] // self.tokens, starts[TOKEN] // self.tokens
        for mine, theirs in zip(self.part(starts, lengths), other.part(source, lengths)):
            mine[:, :, b : b + n] = theirs[:, :, a : a + n].clone()

    def select(self, axis: int, index: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> BlockMeans:
        """Those of the given indices of batch entries (axis 0) or heads (1) of a box that begins with a block."""
        first, n = starts[TOKEN] // self.tokens, rules.blocks(lengths[TOKEN], self.tokens)
        data, extents = (x[:, :, first : first + n] for x in self.part(starts, lengths))
        return BlockMeans(
            data.index_select(axis, index).contiguous(), extents.index_select(axis, index.cpu()), self.tokens
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> BlockMeans:
        """With the data changed: moved to a device, pinned, copied."""
        return BlockMeans(change(self.data), self.extents.clone(), self.tokens)
