"""What looks like a cache and is none: it is never packed, runs as written, and nobody is warned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from jkv_compile import is_packed
from jkv_compile.reasons import Reason

from ..harness import fresh_backend, twins
from ..idioms.models import CHUNK, DIM, HEAD_DIM, HEADS, Projections, rope

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


class CrossAttention(Projections):
    """Keys and values come from a context (a text), are made once, and kept in a dict for all later calls."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.by_hand = by_hand

    def forward(self, x: Tensor, context: Tensor, cache: dict[str, Any]) -> Tensor:
        q, _, _ = self.project(x)
        if cache["is_init"]:
            k, v = cache["k"], cache["v"]
        else:
            _, k, v = self.project(context)
            cache["k"], cache["v"], cache["is_init"] = k, v, True
        if self.by_hand:
            q, k, v = heads_first(q, k, v)
            return self.out(((q @ k.mT / HEAD_DIM**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.sdpa(q, k, v)


class CrossAttentionHandedOn(Projections):
    """Keys and values of a context come in and are returned as they are."""

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, _, _ = self.project(x)
        return self.sdpa(q, k, v), k, v


class RopeByHalves(Projections):
    """Rotary embedding writes slices of a tensor that it has just made, and concatenates halves."""

    def forward(self, x: Tensor, start: int) -> Tensor:
        q, k, v = self.project(x)
        turned = torch.empty_like(k)
        turned[..., ::2] = -k[..., 1::2]
        turned[..., 1::2] = k[..., ::2]
        return self.sdpa(rope(q, start, interleaved=False), k + turned, v)


class CameraMatrices(Projections):
    """A matrix is put together by slices, and turns the keys."""

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = self.project(x)
        matrix = torch.zeros(1, HEADS, HEAD_DIM, HEAD_DIM)
        matrix[:, :, :16, :16] = rotation
        matrix[:, :, 16:, 16:] = torch.eye(HEAD_DIM - 16)
        return self.sdpa(q, torch.einsum("blhd,bhde->blhe", k, matrix), v)


class QueriesPaddedByACache(Projections):
    """A cache lends nothing but its size: queries are padded in front by as much."""

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        q, k, v = self.project(x)
        q, k, v = (torch.cat([torch.zeros_like(cache), t], 1) for t in (q, k, v))
        return self.sdpa(q, k, v)[:, cache.shape[1] :]


class PaddedForFlex(Projections):
    """Keys are padded by a concatenation to what flex_attention likes."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_first(*self.project(x))
        padding = torch.zeros(1, HEADS, 24, HEAD_DIM)
        k, v = torch.cat([k, padding], 2), torch.cat([v, padding], 2)
        length = q.shape[2]
        o = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(j < length, s, -float("inf")))
        return self.out(o.transpose(1, 2).flatten(2))


class WritesAndNeverReads(Projections):
    """A history that is written slice by slice for somebody else; attention has nothing to do with it."""

    def forward(self, x: Tensor, history: Tensor, start: int) -> Tensor:
        q, k, v = self.project(x)
        history[:, start : start + x.shape[1]] = k
        return self.sdpa(q, k, v)


class CausalConvolution(nn.Module):
    """A video VAE: the last two frames are kept for the next chunk, and concatenated in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        kept = cache["frames"]
        padded = torch.cat([kept, x], 2)
        cache["frames"][:, :, :1] = x[:, :, -2:-1]
        cache["frames"][:, :, 1:] = x[:, :, -1:]
        return self.conv(padded)


class CausalConvolutionWithAttention(CausalConvolution):
    """The same, with attention within the chunk, over frames that come from the convolution."""

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        y = super().forward(x, cache)
        tokens = y.flatten(3).permute(0, 2, 3, 1)  # [B, frame, pixel, channel]
        return y + F.scaled_dot_product_attention(tokens, tokens, tokens).permute(0, 3, 1, 2).view_as(y)


class SelfAttentionByHand(Projections):
    """No cache anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_first(*self.project(x))
        weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2))


class LearnedKeys(Projections):
    """Learned keys and values stand before those of the chunk, in every call the same."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(1, 4, HEADS, HEAD_DIM)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.sdpa(q, torch.cat([self.keys, k], 1), torch.cat([self.values, v], 1))


def chunk() -> Tensor:
    return torch.randn(1, CHUNK, DIM)


def context() -> tuple[Tensor, dict[str, Any]]:
    return torch.randn(1, 12, DIM), {"is_init": False}


def frames() -> tuple[dict[str, Tensor]]:
    return ({"frames": torch.zeros(1, 4, 2, 8, 8)},)


# The model, what it is called with in each call, and what it is called with in all of them.
CASES: dict[str, tuple[nn.Module, Callable[[], Tensor], Callable[[], tuple[Any, ...]]]] = {
    "cross-attention with its own cache": (CrossAttention(), chunk, context),
    "cross-attention by hand": (CrossAttention(by_hand=True), chunk, context),
    "cross-attention that hands its keys on": (
        CrossAttentionHandedOn(), chunk, lambda: tuple(torch.randn(2, 1, 12, HEADS, HEAD_DIM).unbind())
    ),
    "slices of fresh tensors, and concatenations, in RoPE": (RopeByHalves(), chunk, lambda: (8,)),
    "camera matrices": (CameraMatrices(), chunk, lambda: (torch.randn(16, 16),)),
    "queries padded by the size of a cache": (
        QueriesPaddedByACache(), chunk, lambda: (torch.randn(1, 16, HEADS, HEAD_DIM),)
    ),
    "padding before flex_attention": (PaddedForFlex(), chunk, lambda: ()),
    "a history that is written and never read": (
        WritesAndNeverReads(), chunk, lambda: (torch.zeros(1, 64, HEADS, HEAD_DIM), 8)
    ),
    "a causal convolution": (CausalConvolution(), lambda: torch.randn(1, 4, 6, 8, 8), frames),
    "a causal convolution, and attention after it": (
        CausalConvolutionWithAttention(), lambda: torch.randn(1, 4, 6, 8, 8), frames
    ),
    "ordinary self-attention by hand": (SelfAttentionByHand(), chunk, lambda: ()),
    "learned keys": (LearnedKeys(), chunk, lambda: ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_packed(name: str) -> None:
    model, new_input, new_state = CASES[name]
    torch.manual_seed(0)
    backend = fresh_backend(bits=2)
    compiled, eager = twins(model, backend)
    state = new_state()
    reference = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, state)
    with torch.no_grad():
        for _ in range(4):
            x = new_input()
            torch.testing.assert_close(compiled(x, *state), eager(x, *reference))
    tensors = [t for t in torch.utils._pytree.tree_leaves(state) if isinstance(t, Tensor)]
    assert not any(map(is_packed, tensors))
    assert backend.memory().adopted == 0
    assert {(r.outcome, r.after) for r in backend.reports} <= {("untouched", "")}


# What cannot be told from a cache that other code holds is noted, and nobody is warned of it.
NOTED = {
    "cross-attention with its own cache": Reason.ELSEWHERE,
    "cross-attention by hand": Reason.ELSEWHERE,
    "cross-attention that hands its keys on": Reason.ELSEWHERE,
    "a history that is written and never read": Reason.UNATTENDED,
}


@pytest.mark.parametrize("name", CASES)
def test_nobody_is_told_to_change_anything(name: str) -> None:
    """No rejections, either: these are no near misses."""
    model, new_input, new_state = CASES[name]
    backend = fresh_backend(bits=2)
    with torch.no_grad():
        state = new_state()
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            compiled(new_input(), *state)
    assert [r.rejections for r in backend.reports] == [[]] * len(backend.reports)
    notes = {note.kind for report in backend.reports for note in report.notes}
    assert notes == ({NOTED[name]} if name in NOTED else set())
