"""Packed caches on several devices, through `torch.distributed`: partial attention, and caches that move as bytes.

Models that part their heads need nothing of this: every rank packs the heads that it holds. A model that parts the
tokens of its caches calls `sharded_attention` (or `attention` and `merge`, where it communicates by itself) in place of
its own; the others send caches from rank to rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels as _kernels  # noqa: F401  (registers the operators)
from .agreement import allow_different_configurations as allow_different_configurations
from .compat import exchanged, gathered
from .errors import ConfigurationError
from .flat import pack_bytes as pack_bytes
from .flat import unpack_bytes as unpack_bytes
from .packed import PackedKV
from .store import TOKEN

__all__ = [
    "all_gather",
    "allow_different_configurations",
    "attention",
    "context_parallel_attention",
    "exchange",
    "merge",
    "merge_across",
    "pack_bytes",
    "rebalance",
    "recv",
    "send",
    "sharded_attention",
    "unpack_bytes",
]

Group = dist.ProcessGroup | None


# ---- attention over part of the tokens ----


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · query @ keyᵀ + mask) @ value and its log-sum-exp; over a packed cache once it is compiled.

    Args:
        query: `[B, H, L, D]`, float32, float16 or bfloat16.
        key, value: `[B, H_kv, N, D]` and `[B, H_kv, N, Dv]`; H is a multiple of H_kv. N may be 0.
        mask: boolean (True is visible) or additive, broadcastable to `[B, H, L, N]`.
        causal: query i sees key j only if j <= i.
        scale: 1 / sqrt(D) unless given.

    Returns:
        `[B, H, L, Dv]` in query's dtype, and float32 `[B, H, L]`: the logarithm of the sum of exp(score) over these
        keys, the correction of cached ones included, by which results over other keys are merged.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return torch.ops.jkv.sdpa_lse(query, key, value, mask, causal, scale)


def merge(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys out of attention over parts of them, exactly: Σ_i exp(lse_i - lse) · out_i.

    A softmax over disjoint sets of keys is the sum of its parts, each weighed by its share of Σ exp(score)
    (arXiv 2205.14135, section 3.1). Where keys are corrected, exp(score) is, so nothing else is needed.

    Args:
        outs: `[B, H, L, D]` each, in any dtype; they are summed in float32.
        lses: `[B, H, L]` each, natural logarithms; -inf where a query sees no key of a part.

    Returns:
        The result in the dtype of `outs`, and its log-sum-exp in float32, so that results can be merged again.

    Raises:
        ConfigurationError: the numbers of parts, or their shapes, differ.
    """
    outs, lses = list(outs), list(lses)
    shapes = {tuple(out.shape) for out in outs}
    if not outs or len(outs) != len(lses) or len(shapes) > 1 or any(x.shape != outs[0].shape[:-1] for x in lses):
        raise ConfigurationError(
            f"merge of {len(outs)} results {sorted(shapes)} by log-sum-exps {[tuple(x.shape) for x in lses]}: "
            "expected as many of both, results [B, H, L, D] and log-sum-exps [B, H, L]"
        )
    parts = torch.stack([x.float() for x in lses])
    lse = parts.logsumexp(0)
    weights = torch.where(parts == -torch.inf, 0.0, (parts - lse).exp()).unsqueeze(-1)
    out = torch.zeros(outs[0].shape, dtype=torch.float32, device=outs[0].device)
    for part, weight in zip(outs, weights):
        out = out + torch.where(weight > 0, weight * part.float(), 0.0)
    return out.to(outs[0].dtype), lse


def merge_across(out: Tensor, lse: Tensor, group: Group = None) -> tuple[Tensor, Tensor]:
    """`merge` of every rank's result for the same queries; all ranks get the same bits.

    One all-gather of results and one of log-sum-exps: in the graph, where a model is compiled.
    """
    group = dist.group.WORLD if group is None else group
    return merge(gathered(out, group).unbind(0), gathered(lse, group).unbind(0))


def sharded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    group: Group = None,
) -> Tensor:
    """Attention over keys and values whose tokens are parted over the ranks: `attention`, then `merge_across`.

    Args:
        query: `[B, H, L, D]`, the same on every rank.
        key, value: this rank's tokens, `[B, H_kv, N, D]`, as slices of its own cache; N may be 0, and differ by rank.
        mask: of this rank's keys.

    Returns:
        `[B, H, L, D]`, the same on every rank.
    """
    return merge_across(*attention(query, key, value, mask, scale=scale), group)[0]


def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, group: Group = None
) -> Tensor:
    """Attention where queries, too, are parted over the ranks, evenly: what a ring computes, with queries that travel.

    Keys and values stay where they are: each rank attends with all ranks' queries to its own, and gets the parts of its
    own queries back. Traffic grows with the chunk, not with the cache.

    Args:
        query: this rank's `[B, H, L, D]`; all ranks have L of them.
        key, value: this rank's tokens, `[B, H_kv, N, D]`, as slices of its own cache; N may be 0, and differ by rank.

    Returns:
        `[B, H, L, D]`, of this rank's queries.
    """
    group = dist.group.WORLD if group is None else group
    out, lse = attention(gather_queries(query, group), key, value, scale=scale)
    return merge_own(out, lse, dist.get_world_size(group), group)


def gather_queries(query: Tensor, group: Group | str) -> Tensor:
    """All ranks' `[B, H, L, D]`, one after the other: `[B, H, ranks · L, D]`."""
    return gathered(query, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def merge_own(out: Tensor, lse: Tensor, ranks: int, group: Group | str) -> Tensor:
    """Merge what all ranks found for this rank's queries: of `[B, H, ranks · L, D]` by rank, `[B, H, L, D]`."""
    outs, lses = (exchanged(t.unflatten(2, (ranks, -1)).movedim(2, 0), group) for t in (out, lse))
    return merge(outs.unbind(0), lses.unbind(0))[0]


# ---- caches from rank to rank ----


def send(cache: Tensor, dst: int, group: Group = None) -> int:
    """Send a packed cache, or a window on one, to rank `dst`, which calls `recv`; returns the number of bytes sent."""
    buffer = pack_bytes(cache)
    dist.send(torch.tensor([buffer.numel()], device=buffer.device), dst, group)
    dist.send(buffer, dst, group)
    return buffer.numel() + 8


def recv(src: int, group: Group = None, device: torch.device | str = "cpu") -> Tensor:
    """The packed cache that rank `src` sends, on `device`."""
    size = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(size, src, group)
    buffer = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.recv(buffer, src, group)
    return unpack_bytes(buffer)


def all_gather(cache: Tensor, group: Group = None) -> list[Tensor]:
    """Every rank's packed cache, by rank; one's own among them as it is. Their shapes may differ."""
    buffer = pack_bytes(cache)
    sizes = _gather_numbers(buffer.numel(), buffer.device, group)
    padded = buffer.new_zeros(max(sizes))
    padded[: buffer.numel()] = buffer
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group)
    own = dist.get_rank(group)
    return [
        cache if i == own else _of_family(unpack_bytes(b[:n]), cache) for i, (b, n) in enumerate(zip(gathered, sizes))
    ]


def rebalance(cache: Tensor, dim: int, sizes: Sequence[int] | None = None, group: Group = None) -> Tensor:
    """Part a cache anew along a dimension that its ranks hold parts of, one after the other.

    Args:
        cache: this rank's part, packed; parts differ along `dim` (tokens or heads) only.
        sizes: how much of it each rank is to hold; as even as can be, unless given.

    Returns:
        This rank's new part, packed, a cache of its own: what it held before can be let go. What stays on a rank is not
        sent, and codes, steps and zero points are the same.

    Raises:
        ConfigurationError: the sizes are not those of a partition, or tokens of ranks are stored less other means,
            or share their steps with others ("kivi").
    """
    _check_tokens(cache, dim, "rebalance")
    held = _gather_numbers(cache.shape[dim], cache.device, group)
    ranks, total = len(held), sum(held)
    wanted = [total // ranks + (i < total % ranks) for i in range(ranks)] if sizes is None else list(sizes)
    if len(wanted) != ranks or sum(wanted) != total or min(wanted) < 1:
        raise ConfigurationError(
            f"rebalance of {held} to {wanted} along dimension {dim}: expected {ranks} numbers of at least 1 that sum "
            f"up to {total}"
        )
    own = dist.get_rank(group)
    first = sum(held[:own])
    parts: list[Tensor | None] = []
    for rank in range(ranks):
        start = max(sum(wanted[:rank]), first)
        stop = min(sum(wanted[: rank + 1]), first + held[own])
        parts.append(cache.narrow(dim, start - first, stop - start) if start < stop else None)
    return torch.cat([part for part in _all_to_all(parts, cache, group) if part is not None], dim)


def exchange(cache: Tensor, scatter_dim: int, gather_dim: int, group: Group = None) -> Tensor:
    """Ulysses' all-to-all on a packed cache: parted along `gather_dim` before, along `scatter_dim` after.

    Heads for tokens, say: a cache that holds its tokens of all heads becomes one of all tokens of its heads.

    Raises:
        ConfigurationError: the number of ranks does not divide the size along `scatter_dim`, or tokens of ranks are
            stored less other means, or share their steps with others ("kivi").
    """
    _check_tokens(cache, gather_dim, "exchange")
    _check_tokens(cache, scatter_dim, "exchange", parting=True)
    ranks, size = dist.get_world_size(group), cache.shape[scatter_dim]
    if size % ranks:
        raise ConfigurationError(
            f"exchange along dimension {scatter_dim} of size {size} over {ranks} ranks: expected a multiple; use "
            "rebalance where parts are to differ"
        )
    parts = [cache.narrow(scatter_dim, i * size // ranks, size // ranks) for i in range(ranks)]
    return torch.cat([part for part in _all_to_all(parts, cache, group) if part is not None], gather_dim)


def _check_tokens(cache: Tensor, dim: int, what: str, parting: bool = False) -> None:
    """Refuse to put tokens of several ranks into one cache, or to part them, where codes of it would mean nothing."""
    window = cache.find_window() if isinstance(cache, PackedKV) else None
    if not isinstance(cache, PackedKV) or (window is not None and window.axes[dim] != TOKEN):
        return
    if cache._store.mean_tokens:
        raise ConfigurationError(
            f"{what} along tokens, dimension {dim}, of a cache that was packed with center_tokens="
            f"{cache._store.mean_tokens}: so many tokens share a mean, and those of several ranks make no one cache; "
            "part heads, or use center_tokens=0"
        )
    if cache._store.block > 1:
        raise ConfigurationError(
            f"{what} along tokens, dimension {dim}, of a cache of quantizer {cache._store.quantizer!r}: blocks of "
            f"{cache._store.block} tokens share their steps, and those of several ranks make no one cache; part heads, "
            "or choose another quantizer"
        )
    if cache._store.centered and not parting:
        raise ConfigurationError(
            f"{what} along tokens, dimension {dim}, of a cache that was packed with center=True: each rank stores its "
            "tokens less means of its own, so that codes of several ranks make no one cache; use center=False"
        )


def _all_to_all(parts: Sequence[Tensor | None], cache: Tensor, group: Group) -> list[Tensor | None]:
    """Part i goes to rank i; what is returned came from rank i. One's own part does not move."""
    own = dist.get_rank(group)
    buffers = [
        torch.empty(0, dtype=torch.uint8, device=cache.device) if part is None or i == own else pack_bytes(part)
        for i, part in enumerate(parts)
    ]
    sent = torch.tensor([b.numel() for b in buffers], device=cache.device)
    coming = torch.empty_like(sent)
    dist.all_to_all_single(coming, sent, group=group)
    received = torch.empty(int(coming.sum()), dtype=torch.uint8, device=cache.device)
    dist.all_to_all_single(received, torch.cat(buffers), coming.tolist(), sent.tolist(), group)
    result = [None if len(b) == 0 else _of_family(unpack_bytes(b), cache) for b in received.split(coming.tolist())]
    result[own] = parts[own]
    return result


def _gather_numbers(number: int, device: torch.device, group: Group) -> list[int]:
    numbers = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(numbers, torch.tensor([number], device=device), group)
    return [int(n) for n in numbers]


def _of_family(arrived: Tensor, cache: Tensor) -> Tensor:
    """A cache that has arrived, counted where this rank's own is."""
    assert isinstance(arrived, PackedKV) and isinstance(cache, PackedKV)
    arrived._store.join(cache._store._family)
    return arrived
