"""Which part of a cache a view shows, read off its size, stride and storage offset alone.

Every spelling of a view (slices, transpose, permute, narrow, select, chunk, unbind, …) leaves the same trace in a
tensor's metadata, on real tensors, meta tensors and the fake tensors of a captured graph alike. Reading the metadata
covers them all, so that nothing here knows any of them by name. Sizes may be SymInts; comparing them may add guards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode


@dataclass(frozen=True)
class Window:
    """A box of a tensor: per axis its first index and its length.

    `axes[i]` is the axis that dimension i of the view runs along, or None where that dimension has size 1 and stands
    for nothing. Axes of a packed store are (batch, head, token, channel).
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    axes: tuple[int | None, ...]

    def covers(self, shape: Sequence[int], axis: int) -> bool:
        """Whether the window spans the whole of an axis."""
        return same(self.lengths[axis], shape[axis])

    def to_canonical(self, x: Tensor) -> Tensor:
        """`x`, of the view's shape, as `[batch, head, token, channel]`."""
        order = [axis for axis in self.axes if axis is not None]
        x = x.squeeze([i for i, axis in enumerate(self.axes) if axis is None]) if None in self.axes else x
        for axis in range(4):
            if axis not in order:
                x, order = x.unsqueeze(-1), [*order, axis]
        return x.permute([order.index(axis) for axis in range(4)])

    def from_canonical(self, x: Tensor) -> Tensor:
        """`x`, `[batch, head, token, channel]`, in the view's shape; the inverse of `to_canonical`."""
        order = [axis for axis in self.axes if axis is not None]
        dropped = [axis for axis in range(4) if axis not in order]
        x = x.permute([*order, *dropped])
        x = x.squeeze(list(range(len(order), 4))) if dropped else x
        for i, axis in enumerate(self.axes):
            if axis is None:
                x = x.unsqueeze(i)
        return x


def locate(
    size: Sequence[int],
    stride: Sequence[int],
    offset: int,
    shape: Sequence[int],
    strides: Sequence[int],
    anywhere: bool = False,
) -> Window | None:
    """The window that a view `(size, stride, offset)` shows of a tensor with `shape` and `strides`.

    A symbol of the offset is taken for a position along the axis whose stride it is multiplied by, which is guarded on;
    where it may be `anywhere`, as that of a view that enters a graph, whatever it is.

    Returns:
        None where the view is no box of the tensor (steps, expanded or merged dimensions), or where that cannot be told
        before the data is known.
    """
    try:
        return _locate(size, stride, offset, shape, strides, anywhere)
    except GuardOnDataDependentSymNode:
        return None


def _locate(
    size: Sequence[int],
    stride: Sequence[int],
    offset: int,
    shape: Sequence[int],
    strides: Sequence[int],
    anywhere: bool,
) -> Window | None:
    ndim = len(shape)
    axes: list[int | None] = [None] * len(size)
    free = list(range(ndim))
    for i, (n, step) in enumerate(zip(size, stride)):
        if n == 1:
            continue
        axis = next((a for a in free if shape[a] != 1 and step == strides[a] and _fits(n, shape[a])), None)
        if axis is None:
            return None
        axes[i] = axis
        free.remove(axis)
    lengths: list[int] = [1] * ndim
    for n, axis in zip(size, axes):
        if axis is not None:
            lengths[axis] = n
    # A dimension of size 1 can stand for any axis of which one index is left; its step tells which one it was.
    for i in reversed(range(len(size))):
        found = [a for a in free if same(stride[i], strides[a])] if axes[i] is None else []
        if found:
            axes[i] = found[-1]
            free.remove(found[-1])
    for i, axis in enumerate(axes):
        if axis is None and free:
            axes[i] = free.pop(0)
    starts: list[int] = [0] * ndim
    partial = [a for a in range(ndim) if not same(lengths[a], shape[a])]
    partial.sort(key=lambda a: hint(strides[a]), reverse=True)
    if any(same(strides[a], 0) for a in partial):  # an expanded axis: any of its indices is any other
        return None
    for i, a in enumerate(partial):
        known = all(not isinstance(n, torch.SymInt) or n.node.has_hint() for n in (offset, strides[a]))
        along = known and not anywhere and i + 1 < len(partial)
        starts[a] = constant(_steps(offset, strides[a]) if along else offset // strides[a])
        offset = offset - starts[a] * strides[a]
    if offset != 0 or any(_outside(starts[a], lengths[a], shape[a]) for a in partial):
        return None
    return Window(tuple(starts), tuple(lengths), tuple(axes))


def _steps(offset: int, stride: int) -> int:
    """How many times an axis' stride goes into an offset, of which a part is along axes with smaller ones."""
    if not isinstance(offset, torch.SymInt) and not isinstance(stride, torch.SymInt):
        return offset // stride
    value = 0
    if isinstance(offset, torch.SymInt):
        step = stride.node.expr if isinstance(stride, torch.SymInt) else stride
        parts = [term / step for term in offset.node.expr.expand().as_ordered_terms() if not term.is_number]
        whole = sum(part for part in parts if part.as_numer_denom()[1] == 1)
        value = offset.node.shape_env.create_symintnode(whole, hint=None) if whole != 0 else 0
    value = value + (hint(offset) // hint(stride) - hint(value))
    rest = offset - value * stride
    bool(rest >= 0), bool(rest < stride)  # guards: it is a number of calls with other positions, too
    return value


def _outside(start: int, length: int, limit: int) -> bool:
    """Whether a range is known not to lie within an axis."""
    end = start + length
    known = all(isinstance(constant(n), int) for n in (start, end, limit))
    return known and (start < 0 or end > limit)


def _fits(n: int, limit: int) -> bool:
    """n <= limit in the call at hand; what is not known fits (a slice of a cache never exceeds it)."""
    known = all(not isinstance(m, torch.SymInt) or m.node.has_hint() for m in (n, limit))
    return hint(n) <= hint(limit) if known else True


def constant(n: int) -> int:
    """A SymInt whose expression is a number as an int; anything else as it is."""
    if isinstance(n, torch.SymInt):
        expression = n.node.expr
        return int(expression) if expression.is_number else n
    return n


def same(a: int, b: int) -> bool:
    """Whether two sizes are equal whatever values symbols take; adds no guard."""
    difference = constant(a - b)
    return isinstance(difference, int) and difference == 0


Fold = tuple[int, int, int, int]  # how many dimensions of a tensor, in order, each of four axes is made of


def folds(ndim: int) -> Iterator[Fold]:
    """The ways to see `ndim` dimensions as four axes, of which the last is the last dimension: as many as there are.

    Three have a batch put in front. Of five and more, neighbours are merged; first come those in the front.
    """
    if ndim in (3, 4):
        yield ndim - 3, 1, 1, 1
    for first in range(ndim - 3, 0, -1) if ndim > 4 else ():
        for second in range(ndim - 2 - first, 0, -1):
            yield first, second, ndim - 1 - first - second, 1


def four_dimensional(
    shape: Sequence[int], strides: Sequence[int], fold: Fold | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and strides of the same memory in four dimensions, by a fold; by the first one where none is given.

    Returns:
        None where there are fewer than three dimensions, or those that would be one do not follow each other in memory.
    """
    fold = fold or next(folds(len(shape)), None)
    if fold is None:
        return None
    if fold[0] == 0:
        return (1, *shape), (shape[0] * strides[0], *strides)
    merged, at = list[tuple[int, int]](), 0
    for count in fold:
        size, step = shape[at + count - 1], strides[at + count - 1]
        for n, stride in reversed(list(zip(shape, strides))[at : at + count - 1]):
            if same(size, 1):
                size, step = n, stride
            elif not same(n, 1):
                if not same(stride, size * step):
                    return None
                size = n * size
        merged.append((size, step))
        at += count
    return tuple(n for n, _ in merged), tuple(step for _, step in merged)


def folded_axis(dim: int, fold: Fold) -> int:
    """The axis that a dimension is, or is part of."""
    return dim + 1 if fold[0] == 0 else next(i for i in range(4) if dim < sum(fold[: i + 1]))


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """The axes from outermost to innermost in memory, where they fill it without gaps; None where they do not."""
    order = tuple(sorted(range(len(shape)), key=lambda a: (shape[a] > 1, -strides[a], a)))
    dense = dense_strides(shape, order)
    return order if all(n == 1 or s == d for n, s, d in zip(shape, strides, dense)) else None


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose axes lie in memory in this order, the outermost first."""
    strides, step = [1] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step = step * shape[axis]
    return tuple(strides)


def outermost_first(tensor: torch.Tensor) -> tuple[list[int], list[int]]:
    """A tensor's dimensions as they lie in memory, gaps or not, and the permutation back from that order; no guards."""
    strides, sizes = tensor.stride(), tensor.shape
    order = sorted(range(tensor.dim()), key=lambda d: (-hint(strides[d]), -hint(sizes[d])))
    return order, [order.index(d) for d in range(tensor.dim())]


def hint(n: int) -> int:
    """A size, or what a symbolic one is in the call that is traced; adds no guard.

    Raises:
        GuardOnDataDependentSymNode: that is not known before the data is.
    """
    return int(n.node.hint) if isinstance(n, torch.SymInt) and n.node.has_hint() else int(n)
