"""What a model with packed caches must compute, by brute force: the eager model itself, on caches of quantized values.

Nothing here knows how a model holds its cache. Between calls every token is quantized and read back by
`kernels.reference`, but for those that were written since the last call, which are still in full precision (doing it
again changes nothing: a token of grid values is quantized to those values). What an error in one channel of a cache
does to the attended keys is found by making that error, and looking at the keys: the correction of each score follows,
whatever the model has done to them in between.

Of tokens that are held in full precision no more is known than where they lie: the first ones are not quantized (but
for those that had been before they were moved there), and the newest are quantized so many calls later.
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

from jkv_compile import PackedKV, is_packed
from jkv_compile.kernels import byte_steps, quantizers, reference


def caches_of(model: nn.Module, args: Any) -> dict[str, Tensor]:
    """The tensors that may be caches: arguments after the first, and attributes, of at least three dimensions."""
    held = {str(i): value for i, value in enumerate(tree_leaves(args[1:]))} | dict(sorted(vars(model).items()))
    found = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    return {name: t for name, t in found.items() if t.is_floating_point() and t.dim() >= 3}


class Watched:
    """A compiled model, what its caches are, and the full-precision memory that they have had."""

    def __init__(self, model: nn.Module, compiled: Callable[..., Any]) -> None:
        self.model, self.compiled = model, compiled
        self.storages: list[StorageWeakRef] = []
        self.quantizers: dict[str, str | None] = {}  # of each cache, None while it is plain

    def __call__(self, *args: Any) -> Any:
        self._look(args)
        result = self.compiled(*args)
        self._look(args)
        return result

    def _look(self, args: Any) -> None:
        caches = caches_of(self.model, args)
        self.storages += [StorageWeakRef(t.untyped_storage()) for t in caches.values() if not is_packed(t)]
        self.quantizers = {n: t._store.quantizer if isinstance(t, PackedKV) else None for n, t in caches.items()}

    @property
    def freed(self) -> bool:
        """Whether there was such memory, none is left, and what the caller holds is packed."""
        packed = bool(self.quantizers) and None not in self.quantizers.values()
        return packed and bool(self.storages) and all(s.expired() for s in self.storages)


class Simulated(nn.Module):
    """The eager model on simulated caches, packed when and as those of its compiled twin are.

    Scores are corrected while `corrects` is set: it takes a call of the model per channel.

    sink, delay: how many first tokens are never quantized, and for how many more calls new ones are not.
    """

    def __init__(
        self,
        model: nn.Module,
        twin: Watched,
        bits: int,
        group_size: int = 32,
        correction: str = "taylor",
        sink: int = 0,
        delay: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.twin = model, twin
        self.bits, self.group_size, self.correction = bits, group_size, correction
        self.corrects = True
        self.known: list[list[Tensor]] = [[]] * (1 + delay)  # caches after the last calls, as they were left
        self.sink = sink
        self.rounded: list[Tensor] = []  # what quantized tokens were read as
        self.produce, self.write = (getattr(model, name, None) for name in ("produce", "write"))

    def forward(self, *args: Any) -> Any:
        caches = caches_of(self.model, args)
        errors = [self._quantize(cache, self.twin.quantizers[name]) for name, cache in caches.items()]
        if self.corrects:
            keys = _attended_keys(self.model, args, lambda _: None)
            shifts: list[list[Tensor]] = [[] for _ in keys]  # per attention, of its keys by each channel's error
            for channel in range(max((len(e) for e in errors), default=0)):
                changed = _attended_keys(self.model, args, functools.partial(_add, errors, channel))
                for shift, new, old in zip(shifts, changed, keys):
                    shift.append(new - old)
            with _Corrected(shifts, self.correction):
                result = self.model(*args)
        else:
            result = self.model(*args)
        held = [*caches_of(self.model, args).values()]
        grown = [t for t in caches_of(self.model, (args[0], result)).values() if not held or _grew(t, held)]
        self.known = [*self.known[1:], [t.clone() for t in (*held, *grown)]]
        return result

    def _quantize(self, cache: Tensor, quantizer: str | None) -> Tensor:
        """Put a cache on its grid, but for tokens written since the last call.

        Returns:
            what it is off by where one of its stored channels is off by Δ, `[D, *cache.shape]`.
        """
        head_dim = cache.shape[-1]
        if quantizer is None:
            return torch.zeros(head_dim, *cache.shape)
        basis = _basis(quantizer, head_dim, self.group_size)  # [channel, stored channel], orthogonal
        stored = (cache.detach() @ basis).reshape(1, 1, -1, head_dim)
        grid = quantizers.grid_of(quantizer)
        if grid.unbiased:
            stored = quantizers.round_rotated(stored, self.bits, self.group_size, grid.symmetric)
        codes, scales = reference.quantize(stored, self.bits, self.group_size, symmetric=grid.symmetric)
        if grid.step_bits == 8:
            scales = byte_steps.decode(byte_steps.encode(scales, self.bits))
        read = reference.dequantize(codes, scales, self.bits).view(cache.shape) @ basis.mT
        step = reference.quantization_step(scales, self.bits).repeat_interleave(self.group_size, -1).view(cache.shape)
        rounded = _are_among(self.rounded, cache)
        old = (_are_among(self.known[0], cache) & ~self._sink(cache)) | rounded
        self.rounded.append(torch.where(old & ~rounded, read, torch.nan))
        cache.copy_(torch.where(old, read, cache))
        return torch.stack([step[..., c, None] * basis[:, c] * old for c in range(head_dim)])

    def _sink(self, cache: Tensor) -> Tensor:
        """Which elements are of the first tokens: of all dimensions but channels, theirs is the longest."""
        axis = max(range(cache.dim() - 1), key=lambda d: cache.shape[d])
        first = torch.arange(cache.shape[axis]) < self.sink
        return first.view([-1 if d == axis else 1 for d in range(cache.dim())]).expand_as(cache)


def _grew(tensor: Tensor, caches: list[Tensor]) -> bool:
    """Whether it is one of them, with tokens after it."""
    shorter = (c for c in caches if c.dim() == tensor.dim() and all(n <= m for n, m in zip(c.shape, tensor.shape)))
    return any(torch.equal(tensor[tuple(map(slice, cache.shape))], cache) for cache in shorter)


def _are_among(known: list[Tensor], cache: Tensor) -> Tensor:
    """Whether heads of tokens are such as others hold somewhere: `[…, 1]`."""
    tokens = cache.reshape(-1, cache.shape[-1])
    found = torch.zeros(len(tokens), dtype=torch.bool)
    for other in known:
        if other.shape[-1] == cache.shape[-1]:
            found |= (tokens[:, None] == other.reshape(-1, cache.shape[-1])).all(-1).any(1)
    return found.view(*cache.shape[:-1], 1)


def _basis(quantizer: str, head_dim: int, group_size: int) -> Tensor:
    grid, basis = quantizers.grid_of(quantizer), torch.eye(head_dim)
    if grid.within or grid.pairs:
        return quantizers.to_grid(basis, quantizer, group_size)
    return quantizers.rotate(basis) if grid.rotates else basis


def _attended_keys(model: nn.Module, args: Any, change: Callable[[list[Tensor]], None]) -> list[Tensor]:
    """The keys of every attention in a call of a copy of the model, on changed copies of the caches."""
    model, args = copy.deepcopy((model, args), {id(p): p for p in model.parameters()})
    change([*caches_of(model, args).values()])
    with _Recorded() as recorded:
        model(*args)
    return recorded.keys


def _add(errors: list[Tensor], channel: int, caches: list[Tensor]) -> None:
    for cache, error in zip(caches, errors):
        if channel < len(error):
            cache += error[channel]


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
