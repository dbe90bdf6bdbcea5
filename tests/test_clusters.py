"""Quant VideoGen in the packed cache: tokens less centroids (`quantizer="qvg"`, arXiv 2602.02958)."""

from __future__ import annotations

import warnings
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor

import jkv_compile.distributed as parallel
from jkv_compile import (
    Config,
    ConfigurationError,
    NotRewrittenWarning,
    PackedCacheError,
    explain,
    is_packed,
    jkv_backend,
    materialize,
    quantization_step,
)
from jkv_compile.adopt import adopt
from jkv_compile.block_means import BlockMeans
from jkv_compile.kernels import reference
from jkv_compile.store import Store, rebuild_store

from .caches import new_cache
from .harness import fresh_backend, relative_error, rewritten, run_beside, twins
from .idioms.cases import CASES as IDIOMS
from .idioms.models import RollingCache
from .models import BrokenAttention, SelfAttention
from .test_block_means import MOVED, REFUSED, drifting

BOUND = 0.025  # at 8 bits
SMALL: dict[str, Any] = {"quantizer": "qvg", "center_tokens": 8, "centroids": 3, "stages": 2}
PACKED = [name for name in IDIOMS if name not in REFUSED and "eviction" not in name]  # whose sink has four tokens


# ---- graphs ----


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning", "error::jkv_compile.PackedReadWarning")
def test_idioms_stay_close_to_eager(name: str) -> None:
    steps, stable_from = IDIOMS[name]
    torch.manual_seed(0)
    block = 8 if name in MOVED else 12
    backend = fresh_backend(**{**SMALL, "center_tokens": block}, sink=4)
    with torch.no_grad():
        generator = steps(backend)  # which holds the caches
        run_beside(generator, calls=10, stable_from=stable_from + 1)
    assert {store.quantizer.split("/pairs")[0] for store in backend._state.stores} == {"qvg/stages2of3"}
    assert {store.mean_tokens for store in backend._state.stores} == {block}


@pytest.mark.parametrize("name", [*REFUSED, *MOVED])
def test_idioms_that_take_blocks_apart_run_as_written_and_say_why(name: str) -> None:
    steps, _ = IDIOMS[name]
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, quantizer="qvg", center_tokens=12)
    with torch.no_grad(), pytest.warns(NotRewrittenWarning, match={**REFUSED, **MOVED}[name]):
        generator = steps(backend)
        errors = [relative_error(*next(generator)) for _ in range(6)]
    assert max(errors) < 1e-5 and not backend.memory().adopted
    reasons = [r.reason for report in backend.reports for r in report.rejections]
    assert any("quantizer='qvg' stores tokens less centroids that a block of them shares" in r for r in reasons)


@pytest.mark.parametrize("kind, settings", [
    (SelfAttention, {}), (SelfAttention, {"quantizer": "qvg_asymmetric"}), (SelfAttention, {"correction": "exact"}),
    (SelfAttention, {"correction": "clamped"}), (SelfAttention, {"correction": "none"}),
    (SelfAttention, {"bits": (3, 2), "sink": 6, "recent": 5}), (SelfAttention, {"stages": 4, "group_size": 16}),
    (BrokenAttention, {}), (BrokenAttention, {"sink": 6, "recent": 5}), (SelfAttention, {"inner": "inductor"}),
], ids=str)  # fmt: skip
def test_two_bits_are_attended_as_they_read(kind: type[SelfAttention], settings: dict[str, Any]) -> None:
    """Corrected by the step of what is left, the chunk at hand in full precision; nothing compiles after two calls."""
    length = 12
    torch.manual_seed(0)
    model = kind(kv_heads=2)
    compiled = torch.compile(model, backend=fresh_backend(**{"bits": 2, **SMALL, **settings}))
    cache = model.new_cache(2, 5 * length + 4)
    correction = settings.get("correction", "taylor")
    with torch.no_grad():
        for call, start in enumerate(range(0, 5 * length, length)):
            x = drifting(call, 2, length)
            with torch.compiler.set_stance("fail_on_recompile" if call > 2 else "default"):
                got = compiled(x, cache, start)
            if not start:
                continue
            q, k, v = (t.transpose(1, 2) for t in model.project(x))
            read, values = (materialize(cache[name]).transpose(1, 2)[:, :, :start] for name in ("k", "v"))
            delta = quantization_step(cache["k"].transpose(1, 2))[:, :, :start]
            assert delta[:, :, 6:-5].count_nonzero() > 0.5 * delta[:, :, 6:-5].numel()
            keys, values, delta = (
                t.repeat_interleave(2, 1) for t in (torch.cat((read, k), 2), torch.cat((values, v), 2), delta)
            )
            scores = q @ keys.mT / 8
            scores[..., :start] -= reference.correction_bias(q, delta, 1 / 8, correction)
            want = model.out((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
            assert relative_error(got, want) < 2e-5


def test_two_bits_go_further_where_tokens_are_of_kinds() -> None:
    errors = {}
    for name, settings in {"rtn": {}, "qvg": {**SMALL, "stages": 1}}.items():
        torch.manual_seed(0)
        model = SelfAttention()
        compiled, eager = twins(model, fresh_backend(bits=2, **settings))
        cache, plain = model.new_cache(1, 64), model.new_cache(1, 64)
        kinds, found = torch.randn(3, 256), []
        with torch.no_grad():
            for call in range(8):
                x = kinds[torch.arange(8) % 3][None] + 0.1 * torch.randn(1, 8, 256)
                found.append((compiled(x, cache, 8 * call), eager(x, plain, 8 * call)))
        errors[name] = relative_error(*(torch.cat(side[2:]) for side in zip(*found)))
    assert errors["qvg"] < 0.5 * errors["rtn"], errors


class TestGraph(expecttest.TestCase):
    def test_caches_are_written_less_centroids_and_attended_as_tensors(self) -> None:
        torch.manual_seed(0)
        backend = fresh_backend(bits=2, quantizer="qvg", center_tokens=16, group_size=64)
        model = SelfAttention(kv_heads=2)
        compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 32)
        with torch.no_grad():
            for start in (0, 8, 16):
                compiled(torch.randn(1, 8, 256), cache, start)
        self.assertExpectedInline(
            rewritten(backend),
            """\
q = linear.view(1, 8, 4, 64)
view_1 = linear_1.view(1, 8, 2, 2, 64)
unbind = view_1.unbind(2)
k = unbind[0]
v = unbind[1]
add = add(l_start_, 8)
permute = k.permute([0, 2, 1, 3])
jkv::append_clusters(l_cache_k__codes, l_cache_k__scales, l_cache_k__means, l_cache_k__extents, permute, l_start_, 16, 2, 64, 'qvg/steps8/stages1of1')
permute_1 = v.permute([0, 2, 1, 3])
jkv::append_clusters(l_cache_v__codes, l_cache_v__scales, l_cache_v__means, l_cache_v__extents, permute_1, l_start_, 16, 2, 64, 'qvg/steps8/stages1of1')
transpose_2 = q.transpose(1, 2)
step = step(l_cache_k__scales)
narrow = narrow(step, 3, 0, l_start_)
float_1 = narrow.float()
transpose = float_1.transpose(2, 3)
mul = mul(transpose, 0.25)
repeat_interleave = mul.repeat_interleave(64, -1)
to = repeat_interleave.to(torch.float32)
permute_2 = k.permute([0, 2, 1, 3])
zeros_like = zeros_like(permute_2)
cat = cat([to, zeros_like], 2)
float_2 = cat.float()
square = float_2.square()
unflatten = square.unflatten(-1, (1, -1))
mean = unflatten.mean(-1)
dequantize_clusters_default = jkv::dequantize_clusters(l_cache_k__codes, l_cache_k__scales, l_cache_k__means, [], [], 0, l_start_, 16, 2, 64, 'qvg/steps8/stages1of1', torch.float32)
permute_3 = k.permute([0, 2, 1, 3])
cat_1 = cat([dequantize_clusters_default, permute_3], 2)
dequantize_clusters_default_1 = jkv::dequantize_clusters(l_cache_v__codes, l_cache_v__scales, l_cache_v__means, [], [], 0, l_start_, 16, 2, 64, 'qvg/steps8/stages1of1', torch.float32)
permute_4 = v.permute([0, 2, 1, 3])
cat_2 = cat([dequantize_clusters_default_1, permute_4], 2)
attention_dense_default = jkv::attention_dense(transpose_2, cat_1, cat_2, mean, None, False, 0.125, 0, 'taylor')
transpose_3 = attention_dense_default.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear_2)
""",
        )


# ---- how many tokens share centroids ----


@pytest.mark.parametrize("kind", [SelfAttention, BrokenAttention])
def test_as_many_tokens_as_are_written_at_a_time_share_centroids(kind: type[SelfAttention]) -> None:
    torch.manual_seed(0)
    model, backend = kind(), fresh_backend(quantizer="qvg")
    compiled, eager = twins(model, backend)
    cache, plain = model.new_cache(1, 700), model.new_cache(1, 700)
    with torch.no_grad():
        for start in (0, 224, 448):
            x = torch.randn(1, 224, 256)
            assert relative_error(compiled(x, cache, start), eager(x, plain, start)) < BOUND
    assert {(s.mean_tokens, s.quantizer) for s in backend._state.stores} == {(224, "qvg/stages1of2")}


def test_chunks_too_short_for_that_are_told_of() -> None:
    torch.manual_seed(0)
    model = SelfAttention()
    for settings in ({}, {"center_tokens": 16}):
        backend = fresh_backend(quantizer="qvg", **settings)
        compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 32)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for start in range(0, 24, 4):
                compiled(torch.randn(1, 4, 256), cache, start)
        told = [str(w.message) for w in caught if issubclass(w.category, NotRewrittenWarning)]
        assert is_packed(cache["k"]) == bool(settings) == (not told)
        assert settings or "give as many tokens as the model writes at a time as center_tokens=" in told[0]


def test_memory_is_counted_byte_by_byte() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {**SMALL, "bits": 2, "center_tokens": 24}
    backend, model = fresh_backend(**settings), SelfAttention(kv_heads=2).bfloat16()
    compiled, cache = torch.compile(model, backend=backend), model.new_cache(3, 100, torch.bfloat16)
    with torch.no_grad():
        for start in (0, 8):
            compiled(torch.randn(3, 8, 256).bfloat16(), cache, start)
    # Codes, steps in bytes and two ids of a token; and five tables of two times three centroids.
    packed = 3 * 2 * 100 * (64 // 4 + 64 // 32 + 2) + 3 * 2 * 5 * 6 * 64 * 2
    assert cache["k"]._store.packed_bytes == packed and backend.memory().packed_bytes == 2 * packed
    explained = next(r for r in backend.reports if r.outcome == "adopted")
    assert {use.packed_bytes for match in explained.matches for use in match.caches} == {packed}
    with torch.no_grad():
        new = model.new_cache(3, 100, torch.bfloat16)
        report = explain(model, torch.randn(3, 8, 256).bfloat16(), new, 8, **settings)
    assert {use.packed_bytes for match in report.matches for use in match.caches} == {packed}
    assert "tokens are stored less centroids" in str(report)


def test_the_published_size() -> None:
    """2.33 bits a channel, 6.9 times less than 16, over 28,672 tokens (arXiv 2602.02958)."""
    config = jkv_backend(preset="qvg").config.in_blocks_of(28672)
    assert config.key_quantizer == "qvg/steps8/stages1of256"
    shape, kind = (1, 1, 28672, 128), (2, 64, torch.device("cpu"), config.key_quantizer)
    store = Store.empty(shape, (0, 0, 0, 0), torch.bfloat16, *kind)
    store.means = BlockMeans.empty(shape, torch.bfloat16, store.device, 28672, store._grid.tables)
    assert store.full_precision_bytes / store.packed_bytes == pytest.approx(6.87, abs=0.01)


# ---- moves, and what is kept outside ----


@pytest.mark.parametrize("settings", [{}, {"sink": 8, "recent": 8}], ids=str)
def test_whole_blocks_roll_bit_for_bit(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = RollingCache(sink=8, tokens=48)
    compiled, eager = twins(model, fresh_backend(**SMALL, **settings))
    cache, plain = model.new_cache(), model.new_cache()
    with torch.no_grad():
        for call in range(14):
            x = torch.randn(1, 8, 64)
            store = cache["k"]._store if call > 6 else None
            before = None if store is None else [t.clone() for t in (*store.data(), store.means.data)]
            with torch.compiler.set_stance("fail_on_recompile" if call > 7 else "default"):
                assert relative_error(compiled(x, cache, 8 * call), eager(x, plain, 8 * call)) < BOUND
            if before is not None:
                assert torch.equal(store.codes[:, :, 8:40], before[0][:, :, 16:])
                assert torch.equal(store.scales[:, :, :, 8:40], before[1][:, :, :, 16:])
                assert torch.equal(store.means.data[:, :, 1:5], before[2][:, :, 2:])


def test_other_rolls_are_refused_before_anything_is_moved() -> None:
    torch.manual_seed(0)
    model = RollingCache(sink=4, tokens=48)
    compiled = torch.compile(model, backend=fresh_backend(**{**SMALL, "bits": 2}))
    cache = model.new_cache()
    with torch.no_grad():
        for call in range(6):
            compiled(torch.randn(1, 8, 64), cache, 8 * call)
        before = materialize(cache["k"])
        with pytest.raises(PackedCacheError, match=r"must be multiples of 8, .* choose center_tokens"):
            compiled(torch.randn(1, 8, 64), cache, 48)
    assert torch.equal(materialize(cache["k"]), before)


def test_files_that_lack_centroids_are_refused() -> None:
    packed, _ = new_cache("bhsd", tokens=20, center=True, center_tokens=8, quantizer="qvg/stages2of3")
    build, arguments = packed._store.__reduce__()
    assert build is rebuild_store and isinstance(arguments[-1], tuple)
    for without in (arguments[:-1], (*arguments[:-1], None)):
        with pytest.raises(PackedCacheError, match="does not fit its data"):
            build(*without)
    data, extents, tokens = arguments[-1]
    with pytest.raises(PackedCacheError, match="6 for each block"):
        build(*arguments[:-1], (data[..., :64], extents, tokens))
    untold = [a if a != "qvg/stages2of3" else "qvg" for a in arguments]
    with pytest.raises(PackedCacheError, match="does not fit its data"):
        build(*untold)


def test_caches_of_other_tables_exchange_tokens_and_not_codes() -> None:
    (one, plain), (other, twin) = (
        new_cache("bhsd", tokens=20, center=True, center_tokens=8, quantizer=q)
        for q in ("qvg/stages2of3", "qvg/stages1of3")
    )
    one[:, :, 8:16], plain[:, :, 8:16] = other[:, :, :8], twin[:, :, :8]
    assert relative_error(materialize(one), plain) < BOUND


def test_tokens_of_ranks_make_no_one_cache() -> None:
    packed, _ = new_cache("bhsd", tokens=20, center=True, center_tokens=8, quantizer="qvg/stages2of3")
    with pytest.raises(ConfigurationError, match="center_tokens=8"):
        parallel.rebalance(packed, 2)


# ---- settings ----


@pytest.mark.parametrize("settings, message", [
    ({"quantizer": "qvg", "stages": 0}, "stages=0: expected a number from 1 to 16"),
    ({"quantizer": "qvg", "stages": 2.0}, "stages=2.0: expected a number from 1 to 16"),
    ({"quantizer": "qvg", "centroids": 300}, "centroids=300: expected a number from 1 to 256"),
    ({"quantizer": "qvg", "centroids": True}, "centroids=True: expected a number from 1 to 256"),
    ({"stages": 2}, "stages=2 with quantizer='rtn': expected one of .'qvg', 'qvg_asymmetric'."),
    ({"centroids": 16}, "centroids=16 with quantizer='rtn'"),
    ({"quantizer": "qvg", "center": True}, "center=True with quantizer='qvg'.*expected no center"),
    ({"quantizer": "qvg", "offload": "cpu"}, "offload='cpu' with quantizer='qvg'.*expected no offload"),
    ({"quantizer": "qvg", "budget": 0.5}, "quantizer='qvg' with budget=0.5"),
    ({"quantizer": "qvg", "center_tokens": 4}, "center_tokens=4: expected a number of tokens of at least 8"),
    ({"quantizer": "qvg", "bits": 8, "step_bits": 8}, "step_bits=8 with bits=8"),
])  # fmt: skip
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        jkv_backend(**settings)


def test_steps_have_eight_bits_unless_asked_for_or_too_coarse() -> None:
    assert jkv_backend(quantizer="qvg").config.step_bits == 8
    assert jkv_backend(quantizer="qvg", bits=8).config.step_bits == 16
    assert jkv_backend(quantizer="qvg", step_bits=16).config.step_bits == 16
    assert jkv_backend().config.step_bits == 16


def test_presets_are_those_of_the_paper() -> None:
    one, pro = jkv_backend(preset="qvg").config, jkv_backend(preset="qvg_pro").config
    assert (one.stages, one.group_size, one.bits) == (1, 64, 2) and (pro.stages, pro.group_size, pro.bits) == (4, 16, 2)
    assert jkv_backend(preset="qvg", stages=2).config.stages == 2


def test_loading_a_cache_needs_no_configuration(tmp_path: Any) -> None:
    packed, plain = new_cache("bhsd", tokens=20, center=True, center_tokens=8, quantizer="qvg/stages2of3")
    torch.save(packed, tmp_path / "cache.pt")
    again = torch.load(tmp_path / "cache.pt", weights_only=True)
    assert torch.equal(materialize(again), materialize(packed)) and relative_error(materialize(again), plain) < BOUND


def test_attention_in_eager_code_is_corrected_by_what_is_left() -> None:
    torch.manual_seed(0)
    packed, _ = new_cache("bhsd", tokens=20, bits=2, center=True, center_tokens=8, quantizer="qvg/stages2of3")
    value: Tensor = torch.randn(2, 2, 20, 64)
    q = torch.randn(2, 2, 5, 64)
    with pytest.warns(UserWarning, match="reads a packed cache in eager code"):
        got = torch.nn.functional.scaled_dot_product_attention(q, packed, value)
    bias = reference.correction_bias(q, quantization_step(packed), 1 / 8, "taylor")
    assert bias.mean() > 0.01
    want = torch.nn.functional.scaled_dot_product_attention(q, materialize(packed), value, -bias)
    assert relative_error(got, want) < 1e-5


def test_a_cache_without_a_graph_has_to_be_told() -> None:
    cache = torch.randn(1, 2, 20, 64)
    with pytest.raises(ConfigurationError, match="quantizer='qvg' with center_tokens=0: expected how many tokens"):
        adopt(cache, (0, 1, 2, 3), 2, Config(quantizer="qvg"))
    assert type(cache) is Tensor
