"""What a model with packed caches must compute, by brute force: the eager model itself, on caches of quantized values.

Nothing here knows how a model holds its cache. Between calls every token is quantized and read back by
`kernels.reference`, but for those that were written since the last call, which are still in full precision (doing it
again changes nothing: a token of grid values is quantized to those values). What an error in one channel of a cache
does to the attended keys is found by making that error, and looking at the keys: the correction of each score follows,
whatever the model has done to them in between.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from jkv_compile import is_packed
from jkv_compile.kernels import reference


def caches_of(model: nn.Module, args: Any) -> list[Tensor]:
    """The tensors that may be caches: arguments after the first, and attributes, of at least three dimensions."""
    attributes = [value for _, value in sorted(vars(model).items()) if isinstance(value, Tensor)]
    found = [t for t in (*tree_leaves(args[1:]), *attributes) if isinstance(t, Tensor)]
    return [t for t in found if t.is_floating_point() and t.dim() >= 3]


class Simulated(nn.Module):
    """The eager model on simulated caches. `group_size` channels of the last dimension share a step.

    Scores are corrected while `corrects` is set: it takes a call of the model per channel.
    """

    def __init__(self, model: nn.Module, bits: int, group_size: int = 32, correction: str = "taylor") -> None:
        super().__init__()
        self.model, self.bits, self.group_size, self.correction = model, bits, group_size, correction
        self.corrects = True
        self.known: list[Tensor] = []  # caches after the last call: as they were left, token by token
        self.produce, self.write = (getattr(model, name, None) for name in ("produce", "write"))

    def forward(self, *args: Any) -> Any:
        caches = caches_of(self.model, args)
        steps = [self._quantize(cache) for cache in caches]
        if self.corrects:
            keys = _attended_keys(self.model, args, lambda _: None)
            shifts: list[list[Tensor]] = [[] for _ in keys]  # per attention, of its keys by each channel's error
            for channel in range(max((s.shape[-1] for s in steps), default=0)):
                changed = _attended_keys(self.model, args, functools.partial(_add, steps, channel))
                for shift, new, old in zip(shifts, changed, keys):
                    shift.append(new - old)
            with _Corrected(shifts, self.correction):
                result = self.model(*args)
        else:
            result = self.model(*args)
        self.known = [t.clone() for t in caches_of(self.model, (*args, result))]
        return result

    def _quantize(self, cache: Tensor) -> Tensor:
        """Put a cache on its grid, but for tokens written since the last call; Δ of each channel."""
        tokens = cache.detach().reshape(1, 1, -1, cache.shape[-1])
        codes, scales = reference.quantize(tokens, self.bits, self.group_size)
        step = reference.quantization_step(scales, self.bits).repeat_interleave(self.group_size, -1).view(cache.shape)
        old = torch.zeros(cache.shape, dtype=torch.bool)
        for known in self.known:
            if known.shape == cache.shape:
                old |= (known == cache).all(-1, keepdim=True)
        cache.copy_(torch.where(old, reference.dequantize(codes, scales, self.bits).view(cache.shape), cache))
        return step * old


def _attended_keys(model: nn.Module, args: Any, change: Callable[[list[Tensor]], None]) -> list[Tensor]:
    """The keys of every attention in a call of a copy of the model, on changed copies of the caches."""
    model, args = copy.deepcopy((model, args), {id(p): p for p in model.parameters()})
    change(caches_of(model, args))
    with _Recorded() as recorded:
        model(*args)
    return recorded.keys


def _add(steps: list[Tensor], channel: int, caches: list[Tensor]) -> None:
    for cache, step in zip(caches, steps):
        if channel < cache.shape[-1]:
            cache[..., channel] += step[..., channel]


class _Recorded(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.keys.append(args[1])
        return func(*args, **(kwargs or {}))


class _Corrected(TorchFunctionMode):
    """Explicit softmax, less the correction: a channel of errors ±Δ/2 that moves a key by t moves a score by s·q·t."""

    def __init__(self, shifts: list[list[Tensor]], correction: str) -> None:
        super().__init__()
        self.shifts, self.correction = iter(shifts), correction

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attention(*args, **(kwargs or {}))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        scale = q.shape[-1] ** -0.5
        scores = scale * q @ k.mT
        for shift in next(self.shifts):
            alpha = scale / 2 * q @ shift.mT
            scores = scores - (alpha.square() / 6 if self.correction == "taylor" else reference.log_sinhc(alpha))
        if attn_mask is not None:
            hide = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if hide else scores + attn_mask
        return scores.softmax(-1) @ v


class Watched:
    """A compiled model, and the full-precision memory that its caches have had."""

    def __init__(self, model: nn.Module, compiled: Callable[..., Any]) -> None:
        self.model, self.compiled = model, compiled
        self.storages: list[StorageWeakRef] = []
        self.packed = False

    def __call__(self, *args: Any) -> Any:
        self._look(args)
        result = self.compiled(*args)
        self._look(args)
        return result

    def _look(self, args: Any) -> None:
        caches = caches_of(self.model, args)
        self.storages += [StorageWeakRef(t.untyped_storage()) for t in caches if not is_packed(t)]
        self.packed = bool(caches) and all(is_packed(t) for t in caches)

    @property
    def freed(self) -> bool:
        """Whether there was such memory, none is left, and what the caller holds is packed."""
        return self.packed and bool(self.storages) and all(s.expired() for s in self.storages)
