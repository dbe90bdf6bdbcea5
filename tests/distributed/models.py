"""Attention layers as models have them that run on several devices. They know nothing of this package, but one."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

import jkv_compile.distributed as parallel

HEADS, HEAD_DIM, CHUNK = 4, 32, 8
DIM = HEADS * HEAD_DIM


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each `[B, n, H, D]`."""
        shape = *x.shape[:2], HEADS, HEAD_DIM
        return self.query(x).view(shape), self.key(x).view(shape), self.value(x).view(shape)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All `[B, n, H, D]`."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


class SingleProcess(Projections):
    """What every layer below computes."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        cache["k"][:, start:end] = k
        cache["v"][:, start:end] = v
        return self.out(attend(q, cache["k"][:, :end], cache["v"][:, :end]).flatten(2))


@torch.compiler.disable
def hidden_all_to_all(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


def all_to_all_in_the_graph(x: Tensor) -> Tensor:
    return collectives.all_to_all_single(x, None, None, dist.group.WORLD)


def rewritten_all_to_all(x: Tensor) -> Tensor:
    """Dynamo makes a functional collective of it."""
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


def differentiable_all_to_all(x: Tensor) -> Tensor:
    """`torch.distributed.nn`'s own."""
    return differentiable.all_to_all_single(torch.empty_like(x), x)


class HeadParallel(Projections):
    """Ulysses (MAGI-1, LongCat-Video, HY-WorldPlay): tokens are parted outside of the attention, heads within."""

    def __init__(self, ranks: int, all_to_all=all_to_all_in_the_graph) -> None:
        super().__init__()
        self.ranks, self.all_to_all = ranks, all_to_all

    def to_heads(self, x: Tensor) -> Tensor:
        """`[B, n / P, H, D]` to `[B, n, H / P, D]`."""
        b, n, h, d = x.shape
        x = x.view(b, n, self.ranks, h // self.ranks, d).permute(2, 0, 1, 3, 4).contiguous()
        return self.all_to_all(x).transpose(0, 1).reshape(b, self.ranks * n, h // self.ranks, d)

    def to_tokens(self, x: Tensor) -> Tensor:
        b, n, h, d = x.shape
        x = x.view(b, self.ranks, n // self.ranks, h, d).transpose(0, 1).contiguous()
        return self.all_to_all(x).permute(1, 2, 0, 3, 4).reshape(b, n // self.ranks, self.ranks * h, d)

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        q = self.to_heads(q)
        k = self.to_heads(k)
        v = self.to_heads(v)
        end = start + k.shape[1]
        cache["k"][:, start:end] = k
        cache["v"][:, start:end] = v
        out = attend(q, cache["k"][:, :end], cache["v"][:, :end])
        return self.out(self.to_tokens(out).flatten(2))


class TokenParallel(Projections):
    """Chunks go to ranks in turn; every rank attends to its own tokens, and results are merged by one documented call."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], held: int, mine: bool) -> Tensor:
        """`held` tokens of this rank's cache are filled, the chunk at hand included where it is `mine`."""
        q, k, v = self.project(x)
        if mine:
            cache["k"][:, held - x.shape[1] : held] = k
            cache["v"][:, held - x.shape[1] : held] = v
        q, k, v = (t.transpose(1, 2) for t in (q, cache["k"][:, :held], cache["v"][:, :held]))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel.sharded_attention(q, k, v)


class MergesByHand(TokenParallel):
    """The same, with ATen's flash attention and a merge of the model's own: it knows nothing of this package."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
        gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
        outs = gather(out.contiguous()[None], 0, dist.group.WORLD)
        lses = gather(lse.contiguous()[None], 0, dist.group.WORLD)
        return (lses.softmax(0).unsqueeze(-1) * outs).sum(0)


@register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
def _attention_of_dtensors(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    """torch (2.13) knows how to shard attention on GPUs only: on heads here, or on queries, beside whole keys."""
    whole, heads, queries = Replicate(), Shard(1), Shard(2)
    return [
        ([whole, whole], [whole, whole, whole, None, None]),
        ([heads, heads], [heads, heads, heads, None, None]),
        ([queries, queries], [queries, whole, whole, None, None]),
    ]


def new_cache(tokens: int = 64, heads: int = HEADS) -> dict[str, Tensor]:
    return {name: torch.zeros(1, tokens, heads, HEAD_DIM) for name in ("k", "v")}


def replicated(x: Tensor, mesh) -> DTensor:
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False)
