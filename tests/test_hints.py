"""What a user knows and a graph does not show: `mark_cache` and `ignore`."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jkv_compile
from jkv_compile import ConfigurationError, hints, is_packed

from .harness import BOUND, fresh_backend, relative_error, twins
from .idioms.models import CHUNK, DIM, HEAD_DIM, HEADS, FixedPast, LazyBuffers, Projections
from .models import BufferAttention, SelfAttention

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")


@pytest.fixture(autouse=True)
def _no_hints():
    yield
    hints._tensors.clear()
    hints._attributes.clear()


def past() -> tuple[Tensor, Tensor]:
    return torch.randn(1, HEADS, 24, HEAD_DIM), torch.randn(1, HEADS, 24, HEAD_DIM)


class Reader(Projections):
    """Attends to keys and values that it is given, and to nothing else: nothing shows whether they are a cache."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, _, _ = self.project(x)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values)
        return self.out(o.transpose(1, 2).flatten(2))


def errors(compiled: Any, eager: nn.Module, *arguments: Any, calls: int = 4) -> list[float]:
    with torch.no_grad():
        inputs = [torch.randn(1, CHUNK, DIM) for _ in range(calls)]
        copies = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, arguments)
        return [relative_error(compiled(x, *arguments), eager(x, *copies)) for x in inputs]


# ---- ignore ----


def test_an_ignored_cache_stays_in_full_precision_and_so_does_its_partner() -> None:
    model = SelfAttention()
    compiled, eager = twins(model, fresh_backend(bits=2))
    cache, reference = model.new_cache(1, 64), model.new_cache(1, 64)
    jkv_compile.ignore(cache["k"])
    with torch.no_grad():
        for start in range(0, 32, 8):
            x = torch.randn(1, 8, 256)
            torch.testing.assert_close(compiled(x, cache, start), eager(x, reference, start))
    assert not is_packed(cache["k"]) and not is_packed(cache["v"])


@pytest.mark.parametrize("ignored_first", [False, True], ids=["packed first", "ignored first"])
def test_the_same_compiled_graph_packs_one_cache_and_leaves_another_that_is_ignored(ignored_first: bool) -> None:
    model = SelfAttention()
    compiled = torch.compile(model, backend=fresh_backend(bits=8))
    packed, ignored = model.new_cache(1, 64), model.new_cache(1, 64)
    jkv_compile.ignore(ignored["v"])
    with torch.no_grad():
        for start in range(0, 32, 8):
            for cache in (ignored, packed) if ignored_first else (packed, ignored):
                compiled(torch.randn(1, 8, 256), cache, start)
    assert is_packed(packed["k"]) and is_packed(packed["v"])
    assert not is_packed(ignored["k"]) and not is_packed(ignored["v"])


def test_keys_that_come_again_are_packed_unless_they_are_ignored() -> None:
    compiled, eager = twins(FixedPast(), fresh_backend(bits=2))
    text = past()
    jkv_compile.ignore(text[0])
    assert max(errors(compiled, eager, text)) < 1e-5
    assert not any(map(is_packed, text))
    other = past()
    assert max(errors(compiled, eager, other)) > 1e-3
    assert all(map(is_packed, other))


@pytest.mark.parametrize(
    "model, name, arguments",
    [(BufferAttention(tokens=64), "cache_k", (8,)), (LazyBuffers(), "v_cache", (8,))],
    ids=["a buffer", "an attribute that the first call allocates"],
)
def test_attributes_can_be_ignored(model: nn.Module, name: str, arguments: Any) -> None:
    compiled = torch.compile(model, backend=fresh_backend(bits=2))
    jkv_compile.ignore(compiled, name)
    dim = DIM if isinstance(model, LazyBuffers) else 256
    with torch.no_grad():
        for _ in range(4):
            compiled(torch.randn(1, 8, dim), *arguments)
    names = ("k_cache", "v_cache") if isinstance(model, LazyBuffers) else ("cache_k", "cache_v")
    assert not any(is_packed(getattr(model, n)) for n in names)


def test_explain_says_that_it_was_asked_for() -> None:
    model = SelfAttention()
    cache = model.new_cache(1, 64)
    jkv_compile.ignore(cache["v"])
    with torch.no_grad():
        explanation = jkv_compile.explain(model, torch.randn(1, 8, 256), cache, 8)
    assert explanation.matches == []
    assert {r.kind.name for r in explanation.rejections} == {"IGNORED"}


# ---- mark_cache ----


def test_what_is_only_read_is_packed_when_it_is_marked() -> None:
    keys, values = past()
    compiled, eager = twins(Reader(), fresh_backend(bits=8))
    assert max(errors(compiled, eager, keys, values)) < 1e-6
    assert not is_packed(keys)
    compiled, eager = twins(Reader(), fresh_backend(bits=8))
    for tensor in (keys, values):
        jkv_compile.mark_cache(tensor)
    assert 1e-6 < max(errors(compiled, eager, keys, values)) < BOUND
    assert is_packed(keys) and is_packed(values)


def test_a_marked_past_is_packed_at_its_first_use() -> None:
    compiled, eager = twins(FixedPast(), fresh_backend(bits=8))
    marked = past()
    for tensor in marked:
        jkv_compile.mark_cache(tensor)
    (error,) = errors(compiled, eager, marked, calls=1)
    assert 0 < error < BOUND
    assert all(map(is_packed, marked))


def test_the_graph_compiled_for_a_marked_tensor_leaves_others_alone() -> None:
    compiled, eager = twins(Reader(), fresh_backend(bits=2))
    marked, other = past(), past()
    for tensor in marked:
        jkv_compile.mark_cache(tensor)
    errors(compiled, eager, *marked, calls=1)
    assert max(errors(compiled, eager, *other)) < 1e-6
    assert all(map(is_packed, marked)) and not any(map(is_packed, other))


def test_containers_in_attributes_can_be_marked() -> None:
    class Holder(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.past = {"text": past()}

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, *self.past["text"])

    model = Holder()
    compiled = torch.compile(model, backend=fresh_backend(bits=8))
    jkv_compile.mark_cache(model, "past")
    with torch.no_grad():
        compiled(torch.randn(1, CHUNK, DIM))
    assert all(map(is_packed, model.past["text"]))


def test_one_marked_tensor_alone_is_not_enough() -> None:
    keys, values = past()
    compiled, eager = twins(Reader(), fresh_backend(bits=2))
    jkv_compile.mark_cache(keys)
    assert max(errors(compiled, eager, keys, values)) < 1e-6
    assert not is_packed(keys)


# ---- hints themselves ----


def test_hints_can_be_taken_back_and_end_with_their_tensor() -> None:
    keys, values = past()
    with jkv_compile.ignore(keys):
        assert hints.is_ignored(keys) and hints.is_ignored(keys[:, :, :4]) and not hints.is_ignored(values)
    assert not hints.is_ignored(keys)
    jkv_compile.mark_cache(keys)
    assert hints.is_marked(keys)
    del keys
    gc.collect()
    assert not hints._tensors
    model = LazyBuffers()
    jkv_compile.mark_cache(model, "k_cache")
    del model
    gc.collect()
    assert not hints._attributes


def test_hints_that_cannot_be_meant_are_refused() -> None:
    keys, _ = past()
    with pytest.raises(ConfigurationError, match=r"LazyBuffers\.cache: the module has no such attribute"):
        jkv_compile.ignore(LazyBuffers(), "cache")
    with pytest.raises(ConfigurationError, match="expected a tensor, or a module and the name of its attribute"):
        jkv_compile.ignore(LazyBuffers())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="expected a tensor, or a module and the name of its attribute"):
        jkv_compile.mark_cache({"k": keys})  # type: ignore[arg-type]
    with pytest.raises(
        ConfigurationError, match=r"shape \(3,\) \(torch.int64, 1 dimensions\): expected keys or values"
    ):
        jkv_compile.mark_cache(torch.tensor([1, 2, 3]))
    with pytest.raises(ConfigurationError, match=r"\(a parameter\): expected keys or values"):
        jkv_compile.mark_cache(nn.Parameter(torch.zeros(1, 2, 3, 4)))
    with (
        jkv_compile.ignore(keys),
        pytest.raises(ConfigurationError, match=r"jkv_compile\.ignore was called for the same"),
    ):
        jkv_compile.mark_cache(keys)


def test_what_is_packed_already_cannot_be_ignored() -> None:
    model = SelfAttention()
    compiled, cache = torch.compile(model, backend=fresh_backend()), model.new_cache(1, 64)
    with torch.no_grad():
        compiled(torch.randn(1, 8, 256), cache, 0)
    with pytest.raises(
        ConfigurationError, match=r"it is packed already; put jkv_compile\.materialize\(tensor\) in its place"
    ):
        jkv_compile.ignore(cache["k"])
    plain = jkv_compile.materialize(cache["k"])
    assert type(plain) is Tensor and not is_packed(plain)
    jkv_compile.ignore(plain)
