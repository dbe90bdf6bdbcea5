"""Caches that eager code writes: all that compiled attention ever sees of them are slices, longer in each call.

Where a model takes a slice of its cache in eager code (positions held in tensors, a disabled function, a graph break),
the graph's input is a plain view. A view of the same tensor that shows other tokens than in the call before is one on a
cache; the tensor is packed *after* that call, so that the chunk that was just written has been attended as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .adopt import adopt, obstacle
from .config import Config
from .errors import ConfigurationError
from .geometry import four_dimensional, locate
from .hints import is_ignored


@dataclass(frozen=True)
class Glimpse:
    """Two arguments that attention reads as keys and as values, and the dimension of each that runs along tokens."""

    key: int
    value: int
    key_tokens: int
    value_tokens: int


class Sightings:
    """Which tokens of plain tensors were shown last."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[weakref.ref[Tensor], tuple[int, int]]] = {}

    def moved(self, base: Tensor, tokens: tuple[int, int]) -> bool:
        """Whether other tokens of this tensor were shown before; remembers these."""
        known = self._last.get(id(base))
        key = id(base)
        self._last[key] = weakref.ref(base, lambda _: self._last.pop(key, None)), tokens
        return known is not None and known[0]() is base and known[1] != tokens


def glimpsing_call(
    inner: Callable[..., Any], glimpses: Sequence[Glimpse], config: Config, stores: Any, sightings: Sightings
) -> Callable[..., Any]:
    """Call `inner`; afterwards pack the tensors whose slices it was given, once they have shown to be caches."""

    def call(*args: Any) -> Any:
        outputs = inner(*args)
        for glimpse in glimpses:
            _look(args, glimpse, config, stores, sightings)
        return outputs

    return call


def _look(args: Sequence[Any], glimpse: Glimpse, config: Config, stores: Any, sightings: Sightings) -> None:
    if config.clustered and not config.center_tokens:
        return  # how many tokens the model writes at a time is not seen here
    found = []
    for argument, dim, bits, quantizer, side in (
        (glimpse.key, glimpse.key_tokens, config.key_bits, config.key_quantizer, "keys"),
        (glimpse.value, glimpse.value_tokens, config.value_bits, config.value_quantizer, "values"),
    ):
        place = _place(args[argument], dim)
        if place is None:
            return
        base, axes, tokens = place
        centered, moved = config.centers(side), sightings.moved(base, tokens)
        found.append((base, args[argument], axes, bits, quantizer, centered, moved))
    keys, values = found
    if keys[0] is values[0] or not (keys[-1] and values[-1]):
        return
    for base, view, *_ in found:
        if is_ignored(base) or obstacle(base, views=1) is not None or view.requires_grad:
            return
        try:
            config.check_head_dim(base.shape[-1])
        except ConfigurationError:
            return
    for base, view, axes, bits, quantizer, centered, _ in found:
        adopt(base, axes, bits, config, [view], quantizer, centered=centered).join(stores)


def _place(view: Any, dim: int) -> tuple[Tensor, tuple[int, ...], tuple[int, int]] | None:
    """(the tensor a view is taken of, its axes by role, the tokens shown), where the view is a slice along tokens."""
    if type(view) is not Tensor or not view._is_view() or view._base is None:
        return None
    base = view._base
    geometry = four_dimensional(base.shape, base.stride())
    if geometry is None or base.numel() == view.numel():
        return None
    window = locate(view.size(), view.stride(), int(view.storage_offset() - base.storage_offset()), *geometry)
    token = None if window is None else window.axes[dim]
    if window is None or token is None or token == 3:
        return None
    batch, head = (axis for axis in range(3) if axis != token)
    if not all(window.covers(geometry[0], axis) for axis in (batch, head, 3)):
        return None
    return base, (batch, head, token, 3), (window.starts[token], window.lengths[token])
