"""Copies of cached tokens that a graph makes, as holders of their own."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from ..geometry import Window
from .actions import Holder
from .contents import CANNOT_FOLLOW, Contents, Unsupported, token_dimension
from .nodes import CONCATENATIONS, copied, example, joined_along, name_of, repeated
from .segments import Fresh, Segment, cut, shift


def copy_of_tokens(contents: Contents, node: Node, time: int) -> Holder | None:
    """What a node copies, where its result is whole tokens of a cache, rolled, repeated or concatenated with others."""
    if not isinstance(example(node), Tensor):
        return None
    try:
        return _repeated(contents, node, time) or _rolled(contents, node, time) or _concatenated(contents, node, time)
    except CANNOT_FOLLOW:
        return None  # it reads something else than whole tokens


def _rolled(contents: Contents, node: Node, time: int) -> Holder | None:
    """`roll` along tokens."""
    if name_of(node) != "roll" or (source := contents.holder(node.args[0])) is None:
        return None
    arguments = {**dict(zip(("shifts", "dims"), node.args[1:])), **node.kwargs}
    given = arguments.get("shifts"), arguments.get("dims")
    shift_by, dims = (x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x for x in given)
    value = example(node)
    window, segments = contents.content(example(node.args[0]), source, time)
    token_axis = token_dimension(window, source)
    if not isinstance(dims, int) or not isinstance(shift_by, int) or dims % value.dim() != token_axis:
        return None
    tokens = value.shape[token_axis]
    split = -shift_by % tokens if isinstance(tokens, int) else -shift_by if shift_by < 0 else tokens - shift_by
    rolled = shift(cut(segments, split, tokens), -split) + shift(cut(segments, 0, split), tokens - split)
    return _copy_of(node, source, window, token_axis, rolled)


def _repeated(contents: Contents, node: Node, time: int) -> Holder | None:
    """A copy in which each head stands several times, as grouped queries have it."""
    if (found := repeated(node)) is None:
        return None
    shown, _, dim, times = found
    source = contents.of(shown)
    if source is None:
        return None
    window, segments = contents.content(shown, source, time)
    token_axis = token_dimension(window, source)
    if example(node).dim() != 4 or {token_axis, dim} != {1, 2} or source.repeats != 1:
        return None
    copy = _copy_of(node, source, window, token_axis, segments)
    copy.repeats = times
    return copy


def _concatenated(contents: Contents, node: Node, time: int) -> Holder | None:
    """`cat` along tokens, or a plain copy."""
    value, parts = example(node), copied(node)
    source = next((h for p in parts if (h := contents.holder(p)) is not None), None)
    if source is None or value.dim() != example(parts[0]).dim() or value.device != example(parts[0]).device:
        return None
    concatenated = node.target in CONCATENATIONS
    dim = joined_along(node) if concatenated else None
    if concatenated and dim is None:
        raise Unsupported("it is concatenated along a dimension that is not known")
    segments: list[Segment] = []
    first_window, token_axis, length = None, 0, 0
    for part in parts:
        holder, shown = contents.holder(part), example(part)
        if holder is None:
            if contents.sources(part):
                raise Unsupported("cached tokens that have been changed")
            axes = tuple(range(shown.dim()))
            n = shown.shape[dim]
            segments.append(Segment(length, length + n, Fresh(part, axes, 0)))
        else:
            window, content = contents.content(shown, holder, time)
            token_axis = token_dimension(window, holder)
            if concatenated and token_axis != dim % shown.dim():
                return None
            if holder.repeats != source.repeats:
                return None
            first_window = first_window or window
            segments += shift(content, length)
            n = shown.shape[token_axis]
        length = length + n
    if source.repeats != 1 and any(h is None for h in map(contents.holder, parts)):
        return None
    assert first_window is not None
    copy = _copy_of(node, source, first_window, token_axis, segments)
    copy.repeats = source.repeats
    return copy


def _copy_of(node: Node, source: Holder, window: Window, token_axis: int, segments: list[Segment]) -> Holder:
    value, axes = example(node), window.axes
    if source.root is not None:
        axes = tuple(None if a is None else source.root_axes[a] for a in axes)
    shape, strides = tuple(value.shape), value.stride()
    return Holder(node, shape, strides, value.dtype, token_axis, source.cache, axes, segments)
