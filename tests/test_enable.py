"""The scoped opt-in leaves no trace."""

from __future__ import annotations

import threading

import pytest
import torch

import jkv_compile
from jkv_compile import ConfigurationError, NotRewrittenWarning, is_packed, materialize

from .models import SelfAttention


def run(compiled: object, cache: dict[str, torch.Tensor], start: int) -> torch.Tensor:
    with torch.no_grad():
        return compiled(torch.randn(1, 8, 256), cache, start)  # type: ignore[operator]


def test_caches_are_packed_inside_and_readable_outside() -> None:
    torch._dynamo.reset()
    model = SelfAttention()
    compiled = torch.compile(model, backend="eager")
    cache = model.new_cache(1, 64)
    with jkv_compile.enable(bits=8, inner="eager") as backend:
        run(compiled, cache, 0)
        run(compiled, cache, 8)
        assert backend.memory().adopted == 2
    assert is_packed(cache["k"])
    assert materialize(cache["k"])[:, :16].abs().sum() > 0


def test_outside_the_original_backend_is_back() -> None:
    torch._dynamo.reset()
    calls: list[str] = []

    def mine(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls.append("mine")
        return gm.forward

    model = SelfAttention()
    compiled = torch.compile(model, backend=mine)
    with jkv_compile.enable(bits=2, inner="eager"):
        run(compiled, model.new_cache(1, 64), 0)
    assert calls == []
    cache = model.new_cache(1, 64)
    run(compiled, cache, 0)
    assert calls == ["mine"] and not is_packed(cache["k"])


def test_threads_that_run_inside_are_reached_as_by_set_stance() -> None:
    torch._dynamo.reset()
    model = SelfAttention()
    compiled, cache = torch.compile(model, backend="eager"), model.new_cache(1, 64)
    thread = threading.Thread(target=lambda: [run(compiled, cache, start) for start in (0, 8)])
    with jkv_compile.enable(bits=8, inner="eager"):
        thread.start()
        thread.join()
    assert is_packed(cache["k"])


def test_nested_contexts_restore_the_outer_configuration() -> None:
    torch._dynamo.reset()
    model = SelfAttention()
    compiled = torch.compile(model, backend="eager")
    caches = [model.new_cache(1, 64) for _ in range(3)]
    with jkv_compile.enable(bits=4, inner="eager"):
        run(compiled, caches[0], 0)
        with jkv_compile.enable(bits=2, inner="eager"):
            run(compiled, caches[1], 0)
        run(compiled, caches[2], 0)
    assert [c["k"]._store.bits for c in caches] == [4, 2, 4]


def test_an_impossible_setting_raises_before_anything_runs() -> None:
    with pytest.raises(ConfigurationError, match="bits=5"), jkv_compile.enable(bits=5):
        pass


def test_a_context_that_packs_nothing_says_so() -> None:
    torch._dynamo.reset()
    model = SelfAttention()
    settings = {"bits": 3, "group_size": 16, "inner": "eager"}  # those of no other test
    uncompiled = pytest.warns(NotRewrittenWarning, match="nothing that ran inside is wrapped in torch.compile")
    with uncompiled as caught, jkv_compile.enable(**settings) as backend:
        backend._state.reports.clear()
        run(model, model.new_cache(1, 64), 0)
    assert caught[0].filename == __file__
    without_cache = pytest.warns(NotRewrittenWarning, match="no cache was packed; jkv_compile.explain")
    with without_cache, jkv_compile.enable(**settings):
        torch.compile(torch.nn.Linear(4, 4))(torch.zeros(1, 4))


def test_the_account_of_memory_points_to_explain_where_it_is_empty() -> None:
    assert "explain" in str(jkv_compile.jkv_backend(bits=3, group_size=24).memory())
