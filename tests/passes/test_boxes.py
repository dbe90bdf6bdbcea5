"""One tensor of which a graph uses boxes: a smaller batch, some heads, keys and values, or the caches of all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jkv_compile import NotRewrittenWarning, is_packed, materialize

from ..harness import fresh_backend, relative_error, twins
from ..idioms.models import CHUNK, DIM, HEAD_DIM, HEADS, Projections

LAYERS, CALLS = 2, 6
TOKENS = CALLS * CHUNK
Caches = list[tuple[Tensor, Tensor]]  # by layer: keys and values `[B, S, H, D]` that the model writes to and reads

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")


class Layers(nn.Module):
    """Layers that open their caches from one state."""

    def __init__(self, opened: Callable[[Any, int], Caches]) -> None:
        super().__init__()
        self.opened = opened
        self.layers = nn.ModuleList(Projections() for _ in range(LAYERS))

    def forward(self, x: Tensor, state: Any, start: int) -> Tensor:
        end = start + x.shape[1]
        for layer, (keys, values) in zip(self.layers, self.opened(state, x.shape[0])):
            q, k, v = layer.project(x)
            keys[:, start:end], values[:, start:end] = k, v
            x = x + layer.sdpa(q, keys[:, :end], values[:, :end])
        return x


def smaller_batch(state: Any, batch: int) -> Caches:
    return [(k[:batch], v[:batch]) for k, v in state]


def some_heads(state: Any, batch: int) -> Caches:
    return [(k[:, :, 1 : 1 + HEADS], v[:, :, 1 : 1 + HEADS]) for k, v in state]


def by_layer_first(state: Tensor, batch: int) -> Caches:
    return [(state[i, 0].transpose(1, 2), state[i, 1].transpose(1, 2)) for i in range(LAYERS)]


def unbound(state: Tensor, batch: int) -> Caches:
    return [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in state.unbind()]


def beside_heads(state: Tensor, batch: int) -> Caches:
    return [(layer[:, :, 0], layer[:, :, 1]) for layer in state]


def layers_of_two(state: Any, batch: int) -> Caches:
    return [(state[0][i], state[1][i]) for i in range(LAYERS)]


def pairs(*shape: int) -> Callable[[int], Any]:
    return lambda layers: [tuple(torch.zeros(shape) for _ in range(2)) for _ in range(layers)]


STATES: dict[str, tuple[Callable[[Any, int], Caches], Callable[[int], Any], tuple[int, ...]]] = {
    # what opens the caches, what makes the state, and the batch of each call
    "a smaller batch": (smaller_batch, pairs(4, TOKENS, HEADS, HEAD_DIM), (2,)),
    "a batch that changes": (smaller_batch, pairs(4, TOKENS, HEADS, HEAD_DIM), (4, 2, 3, 1)),
    "some heads": (some_heads, pairs(1, TOKENS, HEADS + 2, HEAD_DIM), (1,)),
    "[L, 2, B, H, S, D]": (by_layer_first, lambda n: torch.zeros(n, 2, 2, HEADS, TOKENS, HEAD_DIM), (2,)),
    "[L, 2, B, H, S, D], unbound": (unbound, lambda n: torch.zeros(n, 2, 1, HEADS, TOKENS, HEAD_DIM), (1,)),
    "[L, B, S, 2, H, D]": (beside_heads, lambda n: torch.zeros(n, 2, TOKENS, 2, HEADS, HEAD_DIM), (2,)),
    "[L, B, S, H, D], twice": (
        layers_of_two, lambda n: tuple(torch.zeros(n, 2, TOKENS, HEADS, HEAD_DIM) for _ in range(2)), (2,),
    ),
}  # fmt: skip


def beside(name: str, **settings: Any) -> Iterator[tuple[Tensor, Tensor, Any, Any, Any]]:
    """(compiled, eager, backend, both states), call by call."""
    options = {key: settings.pop(key) for key in ("dynamic",) if key in settings}
    opened, make, batches = STATES[name]
    torch.manual_seed(0)
    backend = fresh_backend(**settings)
    compiled, eager = twins(Layers(opened), backend, **options)
    state, plain = make(LAYERS), make(LAYERS)
    for call in range(CALLS):
        for _ in range(2):  # a chunk is written again at each denoising step
            x = torch.randn(batches[call % len(batches)], CHUNK, DIM)
            yield compiled(x, state, call * CHUNK), eager(x, plain, call * CHUNK), backend, state, plain


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
@pytest.mark.parametrize("name", STATES)
def test_boxes_of_one_tensor_are_caches(name: str, dynamic: bool | None) -> None:
    calls = list(beside(name, dynamic=dynamic))
    assert 0 < max(relative_error(got, want) for got, want, *_ in calls) < 0.01
    *_, backend, state, plain = calls[-1]
    tensors = torch.utils._pytree.tree_leaves(state)
    assert all(map(is_packed, tensors)) and backend.memory().adopted == len(tensors)
    assert all(
        relative_error(materialize(a), b) < 0.01 for a, b in zip(tensors, torch.utils._pytree.tree_leaves(plain))
    )
    assert {m.lowering for report in backend.reports for m in report.matches} == {"fused"}
    assert not any(report.rejections for report in backend.reports)
    assert len(backend.reports) <= 4


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"sink": 4, "recent": 8}, {"center": True}, {"offload": "cpu"}, {"quantizer": "unbiased"}], ids=str
)
@pytest.mark.parametrize("name", ["a smaller batch", "[L, 2, B, H, S, D]", "[L, B, S, 2, H, D]"])
def test_under_other_settings(name: str, settings: dict[str, Any]) -> None:
    if "sink" in settings and "S, 2" in name:
        pytest.skip("refused, see below")
    calls = list(beside(name, **settings))
    assert all(relative_error(got, want) < 0.01 for got, want, *_ in calls)
    assert all(map(is_packed, torch.utils._pytree.tree_leaves(calls[-1][3])))


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n, (*_, batches) in STATES.items() if len(batches) == 1])
def test_at_two_bits_they_are_what_caches_of_their_own_are(name: str) -> None:
    opened, make, (batch,) = STATES[name]
    torch.manual_seed(0)
    model = Layers(opened)
    own = Layers(lambda state, batch: state)
    own.load_state_dict(model.state_dict())
    compiled, other = (torch.compile(m, backend=fresh_backend(bits=2)) for m in (model, own))
    state, apart = make(LAYERS), pairs(batch, TOKENS, HEADS, HEAD_DIM)(LAYERS)
    for call in range(CALLS):
        x = torch.randn(batch, CHUNK, DIM)
        torch.testing.assert_close(compiled(x, state, call * CHUNK), other(x, apart, call * CHUNK))


class Parted(Projections):
    """A graph break lies between write and attention, or none."""

    def __init__(self, parted: bool) -> None:
        super().__init__()
        self.parted = parted

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        batch, end = x.shape[0], start + x.shape[1]
        cache[0][:batch, start:end], cache[1][:batch, start:end] = k, v
        if self.parted:
            torch._dynamo.graph_break()
        return self.sdpa(q, cache[0][:batch, :end], cache[1][:batch, :end])


@torch.no_grad()
def test_written_in_one_graph_and_attended_in_another() -> None:
    """The chunk at hand is attended in full precision all the same."""
    torch.manual_seed(0)
    parted, whole = Parted(True), Parted(False)
    whole.load_state_dict(parted.state_dict())
    apart, together = (torch.compile(m, backend=fresh_backend(bits=2)) for m in (parted, whole))
    cache, other = (tuple(torch.zeros(4, TOKENS, HEADS, HEAD_DIM) for _ in range(2)) for _ in range(2))
    for call in range(CALLS):
        x = torch.randn(2, CHUNK, DIM)
        torch.testing.assert_close(apart(x, cache, call * CHUNK), together(x, other, call * CHUNK))
    assert all(map(is_packed, (*cache, *other)))


@torch.no_grad()
def test_of_some_heads_no_tokens_are_held_in_full_precision() -> None:
    """Which tokens are held is known of all heads together."""
    with pytest.warns(NotRewrittenWarning, match="sink and recent hold tokens of all heads"):
        for got, want, _, state, _ in beside("[L, B, S, 2, H, D]", sink=4, recent=8):
            assert torch.equal(got, want) and not is_packed(state)


@torch.no_grad()
@pytest.mark.parametrize("name", ["[L, 2, B, H, S, D]", "[L, B, S, 2, H, D]"])
def test_eager_code_resets_and_writes_what_the_store_has_merged(name: str) -> None:
    *_, state, plain = list(beside(name))[-1]
    for change in (
        lambda t: t[:, :, 1].zero_(),
        lambda t: t.__setitem__((slice(None), 1), torch.linspace(-1, 1, t[:, 1].numel()).view(t[:, 1].shape)),
        lambda t: t[1].fill_(2.0),
        lambda t: t[0].masked_fill_(torch.tensor([True, False]).view(2, 1, 1, 1, 1), 0.0),
        lambda t: t.zero_(),
    ):
        for tensor in (state, plain):
            change(tensor)
        assert is_packed(state) and (materialize(state) - plain).abs().max() < 0.05


class Frames(Projections):
    """A dimension of frames beside that of a frame's tokens, `[B, F, N, H, D]`; the newest frames are attended."""

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], frame: int) -> Tensor:
        q, k, v = self.project(x)
        cache[0][:, frame], cache[1][:, frame] = k, v
        first = max(0, frame - 3)
        return self.sdpa(q, *(t[:, first : frame + 1].flatten(1, 2) for t in cache))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_frames_and_their_tokens_are_two_dimensions(batch: int) -> None:
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(Frames(), backend)
    cache, plain = (tuple(torch.zeros(batch, CALLS, CHUNK, HEADS, HEAD_DIM) for _ in range(2)) for _ in range(2))
    for frame in range(CALLS):
        x = torch.randn(batch, CHUNK, DIM)
        assert relative_error(compiled(x, cache, frame), eager(x, plain, frame)) < 0.01
    assert all(map(is_packed, cache))
    assert {m.lowering for report in backend.reports for m in report.matches} == {"fused"}


class Together(Projections):
    """flash-attn's inference: `[B, S, 2, H, D]` of the largest batch, keys and values written at once."""

    def forward(self, x: Tensor, cache: Tensor, start: int) -> Tensor:
        q, k, v = self.project(x)
        batch, end = x.shape[0], start + x.shape[1]
        cache[:batch, start:end] = torch.stack((k, v), 2)
        kv = cache[:batch, :end]
        return self.sdpa(q, kv[:, :, 0], kv[:, :, 1])


@torch.no_grad()
@pytest.mark.parametrize("length", [1, CHUNK])
def test_keys_and_values_written_together_before_heads(length: int) -> None:
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(Together(), backend)
    cache, plain = (torch.zeros(3, TOKENS, 2, HEADS, HEAD_DIM) for _ in range(2))
    for call in range(CALLS):
        x = torch.randn(2, length, DIM)
        assert relative_error(compiled(x, cache, call * length), eager(x, plain, call * length)) < 0.01
    assert is_packed(cache)
    assert {m.lowering for report in backend.reports for m in report.matches} == {"fused"}


class AtPositions(Projections):
    """Positions of a tensor within some batch entries, which may count from the end."""

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        batch = x.shape[0]
        cache[0][:batch, :, positions], cache[1][:batch, ..., positions, :] = k, v
        o = torch.nn.functional.scaled_dot_product_attention(q, cache[0][:batch], cache[1][:batch])
        return self.out(o.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_places_within_a_smaller_batch_that_count_from_the_end() -> None:
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(AtPositions(), backend)
    cache = tuple(torch.randn(3, HEADS, TOKENS, HEAD_DIM) for _ in range(2))
    plain = tuple(t.clone() for t in cache)
    for call in range(CALLS):
        x, positions = torch.randn(2, CHUNK, DIM), torch.arange(CHUNK) + call * CHUNK - TOKENS * (call % 2)
        assert relative_error(compiled(x, cache, positions), eager(x, plain, positions)) < 0.01
    assert all(map(is_packed, cache)) and len(backend.reports) == 2
    assert all(relative_error(materialize(a), b) < 0.01 for a, b in zip(cache, plain))


class OneToken(Projections):
    """A token is written, and read, without a dimension along tokens."""

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], at: int) -> tuple[Tensor, Tensor]:
        q, k, v = self.project(x)
        cache[0][:, at], cache[1][:, at] = k.squeeze(1), v[:, 0]
        return self.sdpa(q, cache[0][:, : at + 1], cache[1][:, : at + 1]), cache[0][:, at].clone()


@torch.no_grad()
def test_single_tokens_need_no_dimension() -> None:
    torch.manual_seed(0)
    compiled, eager = twins(OneToken(), fresh_backend())
    cache, plain = (tuple(torch.zeros(2, CALLS, HEADS, HEAD_DIM) for _ in range(2)) for _ in range(2))
    for at in range(CALLS):
        x = torch.randn(2, 1, DIM)
        for got, want in zip(compiled(x, cache, at), eager(x, plain, at)):
            assert relative_error(got, want) < 0.01
    assert all(map(is_packed, cache))
