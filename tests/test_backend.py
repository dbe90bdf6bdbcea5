"""The backend object: equality, what it passes on, what it reports, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import jkv_compile.backend
from jkv_compile import (
    ConfigurationError,
    NoCachedAttentionError,
    NotRewrittenWarning,
    is_packed,
    jkv_backend,
)
from tests.harness import fresh_backend, relative_error
from tests.models import BrokenAttention, SelfAttention


def run(compiled, model, cache, calls=3):
    """Chunks of 8 tokens; outputs of the compiled model."""
    torch.manual_seed(1)
    with torch.no_grad():
        return [compiled(torch.randn(1, 8, 256), cache, start) for start in range(0, 8 * calls, 8)]


# ---- identity ----


def test_backends_are_equal_where_their_settings_are():
    one, same, other = jkv_backend(bits=4), jkv_backend(bits=4), jkv_backend(bits=4, group_size=64)
    assert one == same and hash(one) == hash(same)
    assert one != other and one != "jkv"
    assert len({one, same, other}) == 2
    assert repr(one).startswith("jkv_backend(Config(bits=4")


def test_equal_backends_share_compiled_code_caches_and_memory():
    model = SelfAttention()
    fresh_backend(bits=4)
    one, same = jkv_backend(bits=4, inner="eager"), jkv_backend(bits=4, inner="eager")
    cache = model.new_cache(1, 64)
    run(torch.compile(model, backend=one), model, cache)
    graphs = len(one.reports)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(torch.compile(model, backend=same), model, cache)
    assert same.memory() == one.memory()
    assert one.memory().adopted == 2
    assert len(same.reports) == graphs
    assert jkv_backend(bits=2, inner="eager").memory().adopted == 0


# ---- by name ----


def test_backend_is_found_by_name_with_its_settings():
    assert "jkv" in torch._dynamo.list_backends()
    model, backend = SelfAttention(), fresh_backend(bits=4, correction="exact")
    cache = model.new_cache(1, 32)
    options = {"bits": 4, "inner": "eager", "correction": "exact"}
    outputs = run(torch.compile(model, backend="jkv", options=options), model, cache)
    assert is_packed(cache["k"])
    assert cache["k"]._store.bits == 4
    assert backend.memory().adopted == 2, "an equal backend object tells of it"
    expected = run(torch.compile(model, backend=backend), model, model.new_cache(1, 32))
    for got, want in zip(outputs, expected):
        torch.testing.assert_close(got, want)


def test_graphs_of_one_model_by_name_know_of_each_other():
    """The write and the attention are two graphs, and two calls of the backend by name."""
    fresh_backend()
    model = BrokenAttention()
    cache, reference = model.new_cache(1, 32), model.new_cache(1, 32)
    outputs = run(torch.compile(model, backend="jkv", options={"bits": 8, "inner": "eager"}), model, cache)
    assert is_packed(cache["k"])
    for got, want in zip(outputs, run(copy.deepcopy(model), model, reference)):
        assert relative_error(got, want) < 0.01


def test_bad_setting_by_name_is_told():
    model = SelfAttention()
    with pytest.raises(BackendCompilerFailed, match="bits=5: expected one of") as caught:
        run(torch.compile(model, backend="jkv", options={"bits": 5}), model, model.new_cache(1, 32))
    assert isinstance(caught.value.inner_exception, ConfigurationError)


# ---- what is passed on ----


@pytest.fixture
def inner_calls(monkeypatch):
    calls = []

    def record(graph, inputs, inner, mode, options):
        calls.append((inner, mode, options))
        return graph.forward

    monkeypatch.setattr(jkv_compile.backend, "compile_inner", record)
    return calls


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_inner_compiler_gets_every_graph_that_runs_more_than_once(inner, inner_calls):
    model, backend = SelfAttention(), fresh_backend(inner=inner)
    run(torch.compile(model, backend=backend), model, model.new_cache(1, 32))
    assert [r.outcome for r in backend.reports] == ["adopted", "packed"]
    assert inner_calls == [(inner, None, {})], "the graph that adopts runs once, and is not compiled"


def test_mode_is_passed_on(inner_calls):
    model, backend = SelfAttention(), fresh_backend(inner="inductor")
    run(torch.compile(model, backend=backend, mode="max-autotune-no-cudagraphs"), model, model.new_cache(1, 32))
    assert inner_calls == [("inductor", "max-autotune-no-cudagraphs", {})]


def test_options_are_passed_on_less_our_own(inner_calls):
    model, backend = SelfAttention(), fresh_backend(inner="inductor")
    run(torch.compile(model, backend=backend, options={"max_autotune": False}), model, model.new_cache(1, 32))
    torch._dynamo.reset()
    options = {"bits": 8, "inner": "inductor", "epilogue_fusion": True}
    run(torch.compile(model, backend="jkv", options=options), model, model.new_cache(1, 32))
    assert inner_calls == [("inductor", None, {"max_autotune": False}), ("inductor", None, {"epilogue_fusion": True})]


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_dynamic_is_obeyed(dynamic):
    model, backend = SelfAttention(), fresh_backend()
    run(torch.compile(model, backend=backend, dynamic=dynamic), model, model.new_cache(1, 64), calls=5)
    packed = [r.outcome for r in backend.reports].count("packed")
    # Positions are Python ints: static ones are compiled each anew, dynamic ones once.
    assert packed == (4 if dynamic is False else 1)


def test_fullgraph_is_obeyed():
    model = BrokenAttention()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        run(torch.compile(model, backend=fresh_backend(), fullgraph=True), model, model.new_cache(1, 32))


# ---- memory ----


@pytest.mark.parametrize("bits, group_size", [(2, 32), (2, 64), ((4, 2), 32), (3, 64), (8, 32)], ids=str)
def test_memory_report_adds_up_to_the_bytes(bits, group_size):
    model, backend = SelfAttention().bfloat16(), fresh_backend(bits=bits, group_size=group_size)
    compiled, caches = torch.compile(model, backend=backend), [model.new_cache(1, 32, torch.bfloat16) for _ in range(3)]
    with torch.no_grad():
        for cache in caches:
            for start in (0, 8):
                compiled(torch.randn(1, 8, 256, dtype=torch.bfloat16), cache, start)
    tensors = [t for cache in caches for t in cache.values()]
    report = backend.memory()
    held = [getattr(t._store, name) for t in tensors for name in ("codes", "scales")]
    assert report.adopted == 6
    assert report.full_precision_bytes == 6 * 32 * 256 * 2
    assert report.active_bytes == 0, "one graph writes and attends: it needs nothing beside the packed data"
    assert report.packed_bytes == sum(t.untyped_storage().nbytes() for t in held)
    pair = bits if isinstance(bits, tuple) else (bits, bits)
    assert report.ratio == pytest.approx(16 / (sum(pair) / 2 + 32 / group_size))
    assert report.to_dict()["ratio"] == report.ratio
    assert f"{report.ratio:.2f}x" in str(report)


def test_memory_counts_the_chunk_that_is_held_in_full_precision():
    model, backend = SelfAttention(), fresh_backend(bits=2)
    cache = model.new_cache(1, 32)
    run(torch.compile(model, backend=backend), model, cache)
    before = backend.memory()
    cache["k"][:, 24:28] = torch.randn(1, 4, 4, 64)  # in eager code
    after = backend.memory()
    assert after.active_bytes == 4 * 4 * 64 * 4
    assert after.packed_bytes == before.packed_bytes + after.active_bytes


def test_memory_forgets_caches_that_are_gone():
    model, backend = SelfAttention(), fresh_backend()
    cache = model.new_cache(1, 32)
    run(torch.compile(model, backend=backend), model, cache)
    assert backend.memory().adopted == 2
    del cache
    gc.collect()
    report = backend.memory()
    assert (report.adopted, report.packed_bytes, report.ratio) == (0, 0, 1.0)


# ---- what is left alone, and how loudly ----


class Plain(nn.Module):
    """Attention without a cache."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_attention_without_a_cache_is_left_alone_in_silence(recwarn):
    backend, x = fresh_backend(), torch.randn(1, 2, 8, 64)
    torch.testing.assert_close(torch.compile(Plain(), backend=backend)(x), Plain()(x))
    assert [r.outcome for r in backend.reports] == ["untouched"]
    assert not [w for w in recwarn if w.category is NotRewrittenWarning]


def test_strict_raises_where_no_attention_reads_a_cache():
    with pytest.raises(BackendCompilerFailed, match="strict=True, and no attention of this graph") as caught:
        torch.compile(Plain(), backend=fresh_backend(strict=True))(torch.randn(1, 2, 8, 64))
    assert isinstance(caught.value.inner_exception, NoCachedAttentionError)


def test_strict_is_content_with_a_cache_and_with_graphs_that_hold_no_attention():
    model, backend = SelfAttention(), fresh_backend(strict=True)
    run(torch.compile(model, backend=backend), model, model.new_cache(1, 32))
    assert torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2)).tolist() == [1, 1]


def test_model_that_needs_gradients_runs_as_written_with_right_gradients_audibly():
    model, backend = SelfAttention(), fresh_backend()
    twin = copy.deepcopy(model)
    cache, reference = model.new_cache(1, 32), twin.new_cache(1, 32)
    x = torch.randn(1, 8, 256)
    with pytest.warns(NotRewrittenWarning, match="gradients are required of it"):
        loss = torch.compile(model, backend=backend)(x, cache, 0).square().sum()
    want = twin(x, reference, 0).square().sum()
    torch.testing.assert_close(loss, want)
    loss.backward()
    want.backward()
    for (name, got), expected in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)
    assert not is_packed(cache["k"])


def test_training_after_generation_and_generation_after_training():
    """The same compiled module: caches are packed without gradients, and other ones are left alone with them."""
    model, backend = SelfAttention(), fresh_backend()
    compiled = torch.compile(model, backend=backend)
    packed = model.new_cache(1, 32)
    run(compiled, model, packed)
    assert is_packed(packed["k"])
    plain = model.new_cache(1, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotRewrittenWarning)
        compiled(torch.randn(1, 8, 256), plain, 0).sum().backward()
    assert model.q.weight.grad is not None and not is_packed(plain["k"])
    model.zero_grad()
    again = model.new_cache(1, 32)
    run(compiled, model, again)
    assert is_packed(again["k"])
