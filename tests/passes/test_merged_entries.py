"""Attention by hand on batch entries and heads that are one dimension, and on keys `[…, D, S]`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jkv_compile import is_packed

from ..harness import fresh_backend, relative_error, twins
from ..idioms.models import CHUNK, DIM, HEAD_DIM, HEADS, Projections

BATCH, CALLS = 2, 6
TOKENS = CALLS * CHUNK
SCALE = HEAD_DIM**-0.5
Past = tuple[Tensor, Tensor]

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")


class Merged(Projections):
    """BLOOM: keys `[B·H, D, S]` and values `[B·H, S, D]` that grow, ALiBi in `baddbmm`, a mask on `[B, H, L, S]`."""

    def forward(self, x: Tensor, past: Past | None, keep: Tensor) -> tuple[Tensor, Past]:
        b, n, _ = x.shape
        q, k, v = self.project(x)
        q, v = (t.transpose(1, 2).reshape(b * HEADS, n, HEAD_DIM) for t in (q, v))
        k = k.permute(0, 2, 3, 1).reshape(b * HEADS, HEAD_DIM, n)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 1)
        keys = k.shape[2]
        alibi = (torch.arange(keys, dtype=x.dtype) / 10)[None, None].expand(b * HEADS, 1, keys)
        scores = alibi.baddbmm(batch1=q, batch2=k, beta=1.0, alpha=SCALE).view(b, HEADS, n, keys)
        scores = torch.masked_fill(scores, ~keep[:, None, None, :keys], torch.finfo(x.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype).view(b * HEADS, n, keys)
        o = torch.bmm(weights, v).view(b, HEADS, n, HEAD_DIM)
        return self.out(o.transpose(1, 2).flatten(2)), (k, v)


class ChannelsFirst(Projections):
    """MPT: keys `[B, H, D, S]` that grow."""

    def forward(self, x: Tensor, past: Past | None, keep: Tensor) -> tuple[Tensor, Past]:
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        k = k.mT
        if past is not None:
            k, v = torch.cat((past[0], k), 3), torch.cat((past[1], v), 2)
        scores = q.matmul(k) * SCALE
        scores = scores.masked_fill(~keep[:, None, None, : k.shape[3]], float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), (k, v)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Merged, ChannelsFirst])
def test_a_past_that_grows(kind: Callable[[], Projections], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(kind().to(dtype), backend)
    keep = torch.rand(BATCH, TOKENS) > 0.3
    keep[:, 0] = True
    past = plain = None
    for _ in range(CALLS):
        x = torch.randn(BATCH, CHUNK, DIM).to(dtype)
        (got, past), (want, plain) = compiled(x, past, keep), eager(x, plain, keep)
        assert relative_error(got, want) < (0.01 if dtype == torch.float32 else 0.02)
        assert [t.shape for t in past] == [t.shape for t in plain]
    assert all(map(is_packed, past))
    assert {m.lowering for report in backend.reports for m in report.matches} == {"fused"}


class InSlices(Projections):
    """The same layouts, written and read in slices."""

    def new_cache(self) -> Past:
        shape = BATCH * HEADS, TOKENS, HEAD_DIM
        return torch.zeros(shape).mT.contiguous(), torch.zeros(shape)

    def forward(self, x: Tensor, cache: Past, start: int) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.project(x)
        end = start + n
        q, v = (t.transpose(1, 2).reshape(b * HEADS, n, HEAD_DIM) for t in (q, v))
        cache[0][:, :, start:end] = k.permute(0, 2, 3, 1).reshape(b * HEADS, HEAD_DIM, n)
        cache[1][:, start:end] = v
        weights = (torch.bmm(q, cache[0][:, :, :end]) * SCALE).softmax(-1)
        o = torch.bmm(weights, cache[1][:, :end]).view(b, HEADS, n, HEAD_DIM)
        return self.out(o.transpose(1, 2).flatten(2))


class Megatron(Projections):
    """`[S, B, H, D]` of the largest batch; queries and keys meet as `[B·H, L, D]` in `baddbmm`, masked as `[B, H, …]`."""

    def new_cache(self) -> Past:
        return tuple(torch.zeros(TOKENS, BATCH + 1, HEADS, HEAD_DIM) for _ in range(2))  # type: ignore[return-value]

    def forward(self, x: Tensor, cache: Past, start: int) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.transpose(0, 1) for t in self.project(x))
        end = start + n
        cache[0][start:end, :b], cache[1][start:end, :b] = k, v
        keys, values = (t[:end, :b].reshape(end, b * HEADS, HEAD_DIM).transpose(0, 1) for t in cache)
        q = q.reshape(n, b * HEADS, HEAD_DIM).transpose(0, 1)
        room = torch.empty(b * HEADS, n, end)
        scores = torch.baddbmm(room, q, keys.transpose(1, 2), beta=0.0, alpha=SCALE).view(b, HEADS, n, end)
        seen = torch.arange(end) <= torch.arange(start, end)[:, None]
        scores = scores.masked_fill(~seen, -10000.0)
        o = torch.bmm(scores.softmax(-1).view(b * HEADS, n, end), values).view(b, HEADS, n, HEAD_DIM)
        return self.out(o.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("kind", [InSlices, Megatron])
def test_a_buffer_written_in_slices(kind: type[InSlices] | type[Megatron]) -> None:
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(kind(), backend)
    cache, plain = eager.new_cache(), eager.new_cache()
    for call in range(CALLS):
        x = torch.randn(BATCH, CHUNK, DIM)
        assert relative_error(compiled(x, cache, call * CHUNK), eager(x, plain, call * CHUNK)) < 0.01
    assert all(map(is_packed, cache))
    assert {m.lowering for report in backend.reports for m in report.matches} == {"fused"}
