"""Turning the caller's own cache tensor into a packed one, in place, so that its full-precision memory is freed.

A rewritten graph alone frees nothing: the tensor belongs to the caller, who reaches it through a dict, a list or an
attribute. So the object stays, and what it *is* changes: every reference to it is then a reference to the packed cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .block_means import BlockMeans
from .compat import only_view, storage_holders, storage_key, swap_implementation
from .config import Config
from .errors import ConfigurationError
from .geometry import Fold, four_dimensional, memory_order
from .kernels.quantizers import grid_of
from .packed import PackedKV
from .retention import KeptStore, adopt_tokens
from .store import Store

BLOCK = 4096  # tokens quantized at a time, so that adoption needs no second copy of the cache


def obstacle(tensor: Tensor, views: int = 0) -> str | None:
    """Why a plain tensor cannot become packed, or None. `views` is the number of known other views of its storage."""
    if type(tensor) is not Tensor:
        return f"it is a {type(tensor).__name__}, not a plain tensor"
    if tensor.requires_grad:
        return "it requires grad"
    if is_part(tensor, views):
        return None
    if tensor._is_view() and tensor._base is not None and tensor._base.numel() > tensor.numel():
        return "it is a view of a larger tensor"
    if memory_order(tensor.shape, tensor.stride()) is None:
        return "it is expanded or has gaps: several of its elements share their memory, or others lie between them"
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        return "its storage holds more than this tensor"
    if _in_foreign_memory(tensor):
        return "its memory is shared with NumPy, another library or another process"
    return shared(tensor, views)


def is_part(tensor: Tensor, views: int = 0) -> bool:
    """Whether a plain tensor is a slice of a larger one, of which nothing else is held any more: then `adopt` frees it.

    As where a model caches `torch.cat([past, new], 1)[:, -window:]`.
    """
    if views or any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        return False
    larger = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return larger and not _in_foreign_memory(tensor) and shared(tensor) is None


def _in_foreign_memory(tensor: Tensor) -> bool:
    return not tensor.untyped_storage().resizable() or (tensor.device.type == "cpu" and tensor.is_shared())


def shared(tensor: Tensor, views: int = 0) -> str | None:
    """That other tensors live in the memory of a plain one, but for `views` known ones; None where none does."""
    others = storage_holders(tensor) - 1 - views - only_view(tensor)
    if others > 0:
        return (
            "another live tensor shares its memory" if others == 1 else f"{others} other live tensors share its memory"
        )
    return None


def adopt(
    tensor: Tensor,
    axes: Sequence[int],
    bits: int,
    config: Config,
    views: Sequence[Tensor] = (),
    quantizer: str | None = None,
    written: tuple[int, int] | None = None,
    centered: bool = False,
    fold: Fold | None = None,
    mean_tokens: int | None = None,
) -> Store:
    """Pack a plain cache tensor in place; what it holds is quantized.

    Args:
        tensor: three dimensions or more, any order; afterwards a `PackedKV` of the same size, stride and dtype.
        axes: its dimension, as a tensor of four, for each of (batch, head, token, channel).
        views: plain views of the tensor that become windows on the packed cache with it.
        quantizer: as `kernels.quantizers.Grid` spells it; the configuration's, of keys, where it is not given.
        written: the tokens that were written last, where that is known.
        centered: whether tokens are stored less the mean of those that it holds, or of as many as share one.
        fold: how it is seen as a tensor of four, see `geometry.folds`.
        mean_tokens: how many tokens share a mean of their own, or centroids; 0, none do; None, as the configuration
            says.

    Raises:
        ConfigurationError: groups do not tile its head_dim, or it is not told how many tokens share centroids.
    """
    if grid_of(quantizer or config.key_quantizer).clustered and not (mean_tokens or config.center_tokens):
        raise ConfigurationError(
            f"quantizer={config.quantizer!r} with center_tokens=0: expected how many tokens share centroids, where no "
            "graph tells how many are written at a time"
        )
    if is_part(tensor, len(views)):
        _give_own_memory(tensor)
    canonical = in_four_dimensions(tensor, fold).permute(tuple(axes))
    config.check_head_dim(canonical.shape[3])
    quantizer = quantizer or config.key_quantizer
    settings = bits, config.shares(quantizer), tensor.device, quantizer
    if config.budget is not None:
        kept = config.rows(canonical.shape[2]), config.policy
        store: Store = KeptStore.of_budget(canonical.shape, canonical.stride(), tensor.dtype, *settings, *kept)
    else:
        store = Store.empty(canonical.shape, canonical.stride(), tensor.dtype, *settings)
    filled = canonical.shape[2]
    if mean_tokens is None:
        mean_tokens = config.center_tokens if centered or config.clustered else 0
    if mean_tokens:
        tables = store._grid.tables
        store.means = BlockMeans.empty(canonical.shape, tensor.dtype, tensor.device, mean_tokens, tables)
        filled = _filled(canonical)  # what comes after has no part in a mean
    elif centered:
        store.center = _mean(canonical)
    if isinstance(store, KeptStore):
        adopt_tokens(store, canonical, BLOCK)
    else:
        _fill_store(store, canonical[:, :, :filled])
    store.hold(None)  # it was filled with room for an open block alone
    store.window = config.window
    if store.held is not None:
        store.held.write(canonical, (0, 0, 0, 0))
        for first, last in ((0, written[0]), written) if written else ((0, _filled(canonical)),):
            store.held.write(canonical[:, :, first:last], (0, 0, first, 0))
    del canonical
    for target in (*views, tensor):
        with torch.inference_mode(target.is_inference()):
            packed = PackedKV(store, target.size(), target.stride(), int(target.storage_offset()), target.dtype)
        swap_attributes = packed.__dict__
        swap_implementation(target, packed)
        target.__dict__.update(swap_attributes)
        del packed
    return store


def _give_own_memory(tensor: Tensor) -> None:
    """Move what a tensor shows of a larger one into memory of its own, in place."""
    with torch.inference_mode(tensor.is_inference()):
        own = tensor.detach().clone(memory_format=torch.contiguous_format)
    swap_implementation(tensor, own)


def _fill_store(store: Store, canonical: Tensor) -> None:
    """Quantize what a cache holds, a few tokens at a time."""
    rows = max(1, BLOCK // store.unit) * store.unit
    for start in range(0, canonical.shape[2], rows):
        block = canonical[:, :, start : start + rows]
        if block.any():  # an empty store reads as zeros already
            store.write(block, (0, 0, start, 0), keep_active=False)
        elif store.center is not None:
            store.fill(0.0, (0, 0, start, 0), block.shape)


def _mean(canonical: Tensor) -> Tensor:
    """The mean per channel of tokens that are not zero, `[B, H, 1, D]` in the cache's dtype; 0 where there are none."""
    batch, heads, _, head_dim = canonical.shape
    total = torch.zeros(batch, heads, 1, head_dim, dtype=torch.float32, device=canonical.device)
    count = torch.zeros(batch, heads, 1, 1, dtype=torch.float32, device=canonical.device)
    for block in canonical.split(BLOCK, 2):
        count += block.ne(0).any(3, keepdim=True).sum(2, keepdim=True)
        total += block.float().sum(2, keepdim=True)
    mean = (total / count.clamp_min(1)).to(canonical.dtype)
    with torch.inference_mode(False):  # one kind of tensor, whatever the mode: it outlives it
        return torch.where(mean.isfinite(), mean, 0.0).clone()


def _filled(canonical: Tensor) -> int:
    """How many tokens there are up to the last one that is not zero."""
    places = canonical.ne(0).any(3).any(1).any(0).nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def in_four_dimensions(tensor: Tensor, fold: Fold | None = None) -> Tensor:
    """A view of a cache with a batch in front, or neighbouring dimensions merged; see `geometry.folds`."""
    geometry = four_dimensional(tensor.shape, tensor.stride(), fold)
    assert geometry is not None
    return tensor.detach().as_strided(*geometry)


def place_of(view: Tensor, cache: Tensor) -> int:
    """Where a plain view begins in its cache's memory, in elements."""
    return int(view.storage_offset() - cache.storage_offset())


class Written:
    """Plain tensors that compiled graphs have written slices of: caches, if attention is found to read them elsewhere.

    Keyed by storage, since the attention may only ever see a view.
    """

    def __init__(self) -> None:
        import weakref

        self._ref = weakref.ref
        self._records: dict[int, tuple[object, int, int]] = {}

    def record(self, tensor: Tensor, start: int, stop: int) -> None:
        """Remember that a graph wrote tokens `start … stop - 1` of a plain tensor."""
        key = storage_key(tensor)
        self._records[key] = (self._ref(tensor, lambda _: self._records.pop(key, None)), start, stop)

    def owner(self, view: Tensor) -> Tensor | None:
        """The tensor written whose storage a plain tensor shares."""
        record = self._records.get(storage_key(view))
        owner = None if record is None else record[0]()  # type: ignore[operator]
        return owner if owner is not None and not isinstance(owner, PackedKV) else None

    def last_range(self, owner: Tensor) -> tuple[int, int]:
        _, start, stop = self._records[storage_key(owner)]
        return start, stop
