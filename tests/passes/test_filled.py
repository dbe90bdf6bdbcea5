"""A past and the current chunk that are put side by side in a new tensor: packed as if they were concatenated."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jkv_compile import is_packed, materialize, quantization_step
from jkv_compile.kernels.reference import correction_bias

from ..harness import fresh_backend, relative_error, rewritten

PAST, CHUNK = 24, 8
Model = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def by_slices(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    buffers = [t.new_empty(1, PAST + CHUNK, 2, 32) for t in (k, v)]
    for buffer, past, new in zip(buffers, (past_k, past_v), (k, v)):
        buffer[:, :PAST] = past
        buffer[:, PAST:] = new
    return attend(q, *buffers)


def by_copies_into_views(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    both = []
    for past, new in ((past_k, k), (past_v, v)):
        buffer = torch.zeros(1, PAST + CHUNK, 2, 32)
        behind, before = buffer[:, PAST:], buffer.narrow(1, 0, PAST)
        behind.copy_(new)
        before.copy_(past)
        both.append(buffer)
    return attend(q, *both)


def of_other_dtypes(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    both = []
    for past, new in ((past_k, k), (past_v, v)):
        buffer = torch.empty(1, PAST + CHUNK, 2, 32, dtype=torch.float64)
        buffer[:, :PAST], buffer[:, PAST:] = past, new
        both.append(buffer.float())
    return attend(q, *both)


def by_heads_first(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    both = []
    for past, new in ((past_k, k), (past_v, v)):
        buffer = torch.empty(1, 2, PAST + CHUNK, 32)
        buffer[:, :, :PAST] = past.transpose(1, 2)
        buffer[:, :, PAST:] = new.transpose(1, 2)
        both.append(buffer)
    return F.scaled_dot_product_attention(q.transpose(1, 2), *both).transpose(1, 2)


def past_changes_between(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    both, once = [], past_k * 2
    for past, new in ((once, k), (past_v, v)):
        buffer = torch.empty(1, PAST + CHUNK, 2, 32)
        buffer[:, :PAST] = past
        once.mul_(3)
        buffer[:, PAST:] = new
        both.append(buffer)
    return attend(q, *both)


def parts_overlap(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    both = []
    for past, new in ((past_k, k), (past_v, v)):
        buffer = torch.empty(1, PAST + CHUNK - 4, 2, 32)
        buffer[:, :PAST] = past
        buffer[:, PAST - 4 :] = new
        both.append(buffer)
    return attend(q, *both)


def a_gap_stays(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    both = []
    for past, new in ((past_k, k), (past_v, v)):
        buffer = torch.zeros(1, PAST + CHUNK + 2, 2, 32)
        buffer[:, :PAST] = past
        buffer[:, PAST + 2 :] = new
        both.append(buffer)
    return attend(q, *both)


def read_before_it_is_full(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    both, sums = [], []
    for past, new in ((past_k, k), (past_v, v)):
        buffer = torch.zeros(1, PAST + CHUNK, 2, 32)
        buffer[:, :PAST] = past
        sums.append(buffer.sum())
        buffer[:, PAST:] = new
        both.append(buffer)
    return attend(q, *both) + 1e-3 * sum(sums)


def changed_afterwards(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    both = []
    for past, new in ((past_k, k), (past_v, v)):
        buffer = torch.zeros(1, PAST + CHUNK, 2, 32)
        buffer[:, :PAST] = past
        buffer[:, PAST:] = new
        buffer.mul_(0.5)
        both.append(buffer)
    return attend(q, *both)


def spread_over_tokens(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    both = []
    for past, new in ((past_k, k), (past_v, v)):
        buffer = torch.zeros(1, PAST + CHUNK, 2, 32)
        buffer[:, :PAST] = past
        buffer[:, PAST:] = new.mean(1, keepdim=True)
        both.append(buffer)
    return attend(q, *both)


def parts_are_channels(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    turned = past_k.new_empty(past_k.shape)
    turned[..., :16], turned[..., 16:] = -past_k[..., 16:], past_k[..., :16]
    return attend(q, torch.cat((turned, k), 1), torch.cat((past_v, v), 1))


def run(model: Model, calls: int = 5) -> tuple[object, list[Tensor]]:
    """The backend, and the caches; every call is held to eager."""
    torch.manual_seed(0)
    backend = fresh_backend(bits=8)
    compiled = torch.compile(model, backend=backend)
    caches = [torch.randn(1, PAST, 2, 32) for _ in range(2)]
    plain = [cache.clone() for cache in caches]
    with torch.no_grad():
        for _ in range(calls):
            q, k, v = (torch.randn(1, CHUNK, 2, 32) for _ in range(3))
            assert relative_error(compiled(q, k, v, *caches), model(q, k, v, *plain)) < 0.01
    return backend, caches


def _name(model: Model) -> str:
    return model.__name__


@pytest.mark.parametrize("model", [by_slices, by_copies_into_views, by_heads_first, of_other_dtypes], ids=_name)
def test_attention_is_fused_as_over_a_concatenation(model: Model) -> None:
    backend, caches = run(model)
    assert all(map(is_packed, caches))
    after = rewritten(backend)  # type: ignore[arg-type]
    assert "jkv::attention_active(" in after and "dequantize" not in after
    assert "new_empty(" not in after and "zeros(" not in after


def test_halves_of_channels_that_are_put_side_by_side_are_turned_keys() -> None:
    backend, caches = run(parts_are_channels)
    assert all(map(is_packed, caches))
    assert "jkv::attention_dense(" in rewritten(backend)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "model",
    [
        past_changes_between,
        parts_overlap,
        a_gap_stays,
        read_before_it_is_full,
        changed_afterwards,
        spread_over_tokens,
    ],
    ids=_name,
)
def test_what_is_no_concatenation_is_left_to_the_rules_for_writes(model: Model) -> None:
    backend, _ = run(model)
    for report in backend.reports:  # type: ignore[attr-defined]
        assert "jkv::attention(" not in report.after and "jkv::attention_active(" not in report.after


class TestGraphs(expecttest.TestCase):
    def test_the_new_tensor_is_gone(self) -> None:
        backend, _ = run(by_slices)
        self.assertExpectedInline(
            rewritten(backend),
            """\
transpose = l_q_.transpose(1, 2)
permute = l_k_.permute([0, 2, 1, 3])
permute_1 = l_v_.permute([0, 2, 1, 3])
attention_active_default = jkv::attention_active(transpose, l_past_k__codes, l_past_k__scales, l_past_v__codes, l_past_v__scales, l_past_k__active, l_past_k__active_range, l_past_v__active, l_past_v__active_range, 0, 24, permute, permute_1, None, False, 0.17677669529663687, 8, 8, 'taylor')
transpose_3 = attention_active_default.transpose(1, 2)
return (transpose_3)
""",
        )  # type: ignore[arg-type]


def scattered(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    """As Wan-Animate-2: parts go to places of their own, some of them by views that were taken before."""
    past_k, past_v = (torch.cat((past[:, :8] * 1.0, past[:, 8:]), 1) for past in (past_k, past_v))
    torch._dynamo.graph_break()
    both = []
    for past, new in ((past_k, k), (past_v, v)):
        buffer = new.new_zeros(1, PAST + CHUNK + 8, 2, 32)
        early, first = buffer[:, 4:8], buffer[:, :PAST].view(1, 3, PAST // 3, 2, 32)
        first[:, :] = past.view(1, 3, PAST // 3, 2, 32)
        buffer[:, PAST : PAST + CHUNK] = new
        early.copy_(new[:, :4])  # instead of cached tokens
        both.append(buffer)
    return attend(q, *both)


def test_tokens_in_places_of_a_larger_tensor_are_corrected_where_they_are_cached() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, group_size=16)
    compiled = torch.compile(scattered, backend=backend)
    caches = [torch.randn(1, PAST, 2, 32) for _ in range(2)]
    with torch.no_grad():
        for _ in range(6):
            q, k, v = (torch.randn(1, CHUNK, 2, 32) for _ in range(3))
            got = compiled(q, k, v, *caches)
    assert all(map(is_packed, caches))
    keys, values = (materialize(cache) for cache in caches)
    delta = quantization_step(caches[0])  # [B, S, H, G]
    buffers = [torch.zeros(1, PAST + CHUNK + 8, 2, 32) for _ in range(2)]
    for buffer, past, new in zip(buffers, (keys, values), (k, v)):
        buffer[:, :PAST], buffer[:, PAST : PAST + CHUNK], buffer[:, 4:8] = past, new, new[:, :4]
    steps = torch.zeros(1, PAST + CHUNK + 8, 2, delta.shape[-1])
    steps[:, :PAST] = delta
    steps[:, 4:8] = 0
    scores = q.transpose(1, 2) @ buffers[0].permute(0, 2, 3, 1) * 32**-0.5
    scores = scores - correction_bias(q.transpose(1, 2), steps.transpose(1, 2), 32**-0.5, "taylor")
    want = (scores.softmax(-1) @ buffers[1].transpose(1, 2)).transpose(1, 2)
    assert relative_error(got, want) < 1e-5
