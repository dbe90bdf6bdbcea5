"""Caches that are quantized less each channel's mean (`center=True`).

Any mean is right, but for rounding. So most tests put random numbers in its place, as large as the tokens are: what is
not shifted, or shifted twice, is far off.
"""

from __future__ import annotations

import copy
import io
import pickle

import expecttest
import pytest
import torch
from torch import Tensor, nn

import jkv_compile.distributed as parallel
from jkv_compile import ConfigurationError, PackedCacheError, PackedKV, jkv_backend, materialize
from jkv_compile import adopt as adoption
from jkv_compile.flat import pack_bytes, unpack_bytes
from jkv_compile.store import rebuild_store

from .caches import new_cache
from .harness import fresh_backend, relative_error, rewritten, run_beside, twins
from .idioms.cases import CASES as IDIOMS
from .models import BrokenAttention, SelfAttention
from .passes.test_in_place_cache import CASES, CHUNK, generate

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")

BOUND = 0.025  # at 8 bits, of tokens that are shifted by their size


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers(canonical: Tensor) -> Tensor:
        batch, heads, _, head_dim = canonical.shape
        return (0.7 * torch.randn(batch, heads, 1, head_dim)).to(canonical.dtype)

    monkeypatch.setattr(adoption, "_mean", numbers)


# ---- graphs ----


@pytest.mark.parametrize("settings", [{}, {"quantizer": "unbiased", "sink": 12}, {"center": "values"}], ids=str)
@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_stay_close_to_eager(name: str, settings: dict[str, object], shifted: None) -> None:
    steps, stable_from = IDIOMS[name]
    torch.manual_seed(0)
    backend = fresh_backend(**{"center": True, **settings})
    with torch.no_grad():
        generator = steps(backend)
        run_beside(generator, calls=10, stable_from=stable_from + 1, bound=BOUND)
    stores = list(backend._state.stores)
    centered = [store.center is not None and bool(store.center.any()) for store in stores]
    assert any(centered) and (all(centered) or "center" in settings)


@pytest.mark.parametrize("name", CASES)
def test_caches_in_slices_stay_close_to_eager(name: str, shifted: None) -> None:
    model, options = CASES[name]
    options = dict(options)
    batch, dtype = options.pop("batch", 1), options.pop("dtype", torch.float32)
    context, repeats = options.pop("context", torch.no_grad), options.pop("repeats", 1)
    stable_from, inner = options.pop("stable_from", 2), options.pop("inner", "eager")
    torch.manual_seed(0)
    backend = fresh_backend(inner=inner, center=True)
    compiled, eager = twins(model.to(dtype), backend, **options)
    with context():
        cache, reference_cache = (model.new_cache(batch, 6 * CHUNK, dtype) for _ in range(2))  # type: ignore[operator]
        steps = generate(compiled, eager, cache, reference_cache, batch, dtype, repeats)
        run_beside(steps, 6 * repeats, stable_from + 1, BOUND if dtype == torch.float32 else 0.04)
    assert backend.memory().adopted


class Masked(SelfAttention):
    """Reads the whole buffer under a mask, in which some queries may see nothing."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int, mask: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.project(x)
        cache["k"][:, start : start + x.shape[1]] = k
        cache["v"][:, start : start + x.shape[1]] = v
        keys, values = cache["k"].transpose(1, 2), cache["v"].transpose(1, 2)
        grouped = self.heads != self.kv_heads
        return nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask, enable_gqa=grouped)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_rows_that_see_no_key_are_zero(additive: bool, kv_heads: int, inner: str, shifted: None) -> None:
    torch.manual_seed(0)
    model = Masked(kv_heads=kv_heads)
    compiled, eager = twins(model, fresh_backend(center=True, inner=inner))
    cache, plain = model.new_cache(2, 32), model.new_cache(2, 32)
    with torch.no_grad():
        for start in (0, 8, 16):
            x, mask = torch.randn(2, 8, 256), (torch.arange(32) < start + 8).repeat(2, 1, 8, 1)
            mask[1, :, :3] = False
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf) if additive else mask
            got, want = compiled(x, cache, start, mask), eager(x, plain, start, mask)
            assert not got[1, :, :3].any() and not want[1, :, :3].any()
            assert relative_error(got, want) < BOUND


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("center", [True, "keys", "values"])
@pytest.mark.parametrize("correction", ["none", "taylor"])
def test_the_log_sum_exp_is_that_of_the_keys_themselves(
    kv_heads: int, correction: str, center: bool | str, shifted: None
) -> None:
    def model(x: Tensor, cache: dict[str, Tensor], start: int) -> tuple[Tensor, Tensor]:
        q, k, v = layer.project(x)
        cache["k"][:, start : start + 8], cache["v"][:, start : start + 8] = k, v
        tokens = (cache[name][:, : start + 8].transpose(1, 2) for name in "kv")
        return parallel.attention(q.transpose(1, 2), *tokens)

    torch.manual_seed(0)
    layer = SelfAttention(kv_heads=kv_heads)
    compiled = torch.compile(model, backend=fresh_backend(center=center, correction=correction))
    cache, plain = layer.new_cache(1, 32), layer.new_cache(1, 32)
    with torch.no_grad():
        for start in (0, 8, 16, 24):
            x = torch.randn(1, 8, 256)
            (out, lse), (want, want_lse) = compiled(x, cache, start), model(x, plain, start)
            assert relative_error(out, want) < BOUND
            torch.testing.assert_close(lse, want_lse, rtol=0, atol=0.02)
    assert isinstance(cache["k"], PackedKV)


@pytest.mark.parametrize("value", [0.0, 1.5])
@pytest.mark.parametrize("quantizer", ["rtn", "unbiased"])
def test_fills_in_graphs_and_in_eager_code(value: float, quantizer: str, shifted: None) -> None:
    class Reset(SelfAttention):
        def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
            for tensor in cache.values():
                tensor[:, :4].fill_(value)
            return super().forward(x, cache, start)

    torch.manual_seed(0)
    model = Reset()
    compiled, eager = twins(model, fresh_backend(center=True, quantizer=quantizer))
    cache, plain = model.new_cache(2, 32), model.new_cache(2, 32)
    with torch.no_grad():
        for start in (0, 8, 16, 24):
            x = torch.randn(2, 8, 256)
            assert relative_error(compiled(x, cache, start), eager(x, plain, start)) < BOUND
            for tensors in (cache, plain):
                tensors["v"][1, 5:7].fill_(value)
            assert relative_error(materialize(cache["v"]), plain["v"]) < BOUND
            assert relative_error(materialize(cache["k"]), plain["k"]) < BOUND


def outlying(bias: float) -> SelfAttention:
    """A layer with a few channels of keys and values that lie far from zero."""
    model = SelfAttention()
    with torch.no_grad():
        model.kv.bias[3::16] = bias
    return model


@pytest.mark.parametrize("kind", [SelfAttention, BrokenAttention])
@pytest.mark.parametrize("quantizer", ["rtn", "unbiased"])
def test_two_bits_go_much_further_where_channels_are_outliers(kind: type[SelfAttention], quantizer: str) -> None:
    errors = {}
    for center in (False, True):
        torch.manual_seed(0)
        model = outlying(4.0)
        model.__class__ = kind
        compiled, eager = twins(model, fresh_backend(bits=2, center=center, quantizer=quantizer))
        cache, plain = model.new_cache(1, 64), model.new_cache(1, 64)
        found = []
        with torch.no_grad():
            for start in range(0, 64, 8):
                x = torch.randn(1, 8, 256)
                found.append((compiled(x, cache, start), eager(x, plain, start)))
        got, want = (torch.cat(side[2:]) for side in zip(*found))
        errors[center] = relative_error(got, want)
    assert errors[True] < 0.6 * errors[False], errors


def test_the_mean_is_that_of_what_is_written_first_and_is_counted() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, center=True)
    model = outlying(4.0)
    compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 64)
    with torch.no_grad():
        compiled(torch.randn(1, 8, 256), cache, 0)
        assert not isinstance(cache["k"], PackedKV)  # it holds nothing before that a mean could be taken of
        plain = cache["k"].clone()
        compiled(torch.randn(1, 8, 256), cache, 8)
    store = cache["k"]._store
    torch.testing.assert_close(store.center, plain[:, :8].mean(1, keepdim=True).transpose(1, 2))
    assert store.packed_bytes == store.codes.nbytes + store.scales.nbytes + store.center.nbytes
    assert backend.memory().packed_bytes == 2 * store.packed_bytes
    explained = next(r for r in backend.reports if r.outcome == "adopted")
    assert {use.packed_bytes for match in explained.matches for use in match.caches} == {store.packed_bytes}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_copy_of_some_heads_is_attended(inner: str, shifted: None) -> None:
    """Its mean is part of a larger tensor, whose strides no graph was compiled for."""
    torch.manual_seed(0)
    backend = fresh_backend(center=True, inner=inner)
    wide, narrow = SelfAttention(heads=4), SelfAttention(heads=2)
    cache, plain = wide.new_cache(2, 32), wide.new_cache(2, 32)
    with torch.no_grad():
        compiled = torch.compile(wide, backend=backend)
        for start in (0, 8):
            x = torch.randn(2, 8, 256)
            compiled(x, cache, start), wide(x, plain, start)
        few, few_plain = ({name: x[:, :, 1:3].clone() for name, x in side.items()} for side in (cache, plain))
        compiled = torch.compile(narrow, backend=backend)
        for start in (16, 24):
            x = torch.randn(2, 8, 128)
            assert relative_error(compiled(x, few, start), narrow(x, few_plain, start)) < BOUND
    assert isinstance(few["k"], PackedKV)


def test_caches_that_stay_empty_are_packed_all_the_same() -> None:
    torch.manual_seed(0)
    model = SelfAttention()
    compiled, cache = torch.compile(model, backend=fresh_backend(center=True)), model.new_cache(1, 32)
    with torch.no_grad():
        for _ in range(2):
            for tensor in cache.values():
                tensor.zero_()
            compiled(torch.randn(1, 8, 256), cache, 0)
    assert isinstance(cache["k"], PackedKV) and not cache["k"]._store.center.any()


def test_offloaded_caches_give_the_same_bits(shifted: None) -> None:
    results = []
    for offload in (None, "cpu"):
        torch.manual_seed(0)
        backend = fresh_backend(bits=2, center=True, offload=offload)
        model = SelfAttention()
        compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 32)
        with torch.no_grad():
            outs = [compiled(torch.randn(1, 8, 256), cache, start) for start in (0, 8, 16, 24)]
        results.append(torch.cat([*outs, materialize(cache["k"]).flatten(2), materialize(cache["v"]).flatten(2)], 1))
        memory = backend.memory()
        assert memory.host_bytes == (memory.packed_bytes - 2 * 4 * 64 * 4 if offload else 0)
    assert torch.equal(*results)


class TestGraph(expecttest.TestCase):
    def test_keys_and_values_are_shifted_around_the_kernels(self) -> None:
        torch.manual_seed(0)
        backend = fresh_backend(bits=2, center=True)
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
centered = centered(permute, l_cache_k__center, None)
permute_1 = v.permute([0, 2, 1, 3])
centered_1 = centered(permute_1, l_cache_v__center, None)
jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, centered, centered_1, l_start_, 2, 2)
transpose_2 = q.transpose(1, 2)
permute_2 = k.permute([0, 2, 1, 3])
permute_3 = v.permute([0, 2, 1, 3])
centered_2 = centered(permute_2, l_cache_k__center, torch.float32)
centered_3 = centered(permute_3, l_cache_v__center, torch.float32)
attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, l_start_], centered_2, centered_3, None, False, 0.125, 2, 2, 'taylor')
uncentered = uncentered(attention_default, l_cache_v__center, None)
transpose_3 = uncentered.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear_2)
""",
        )


# ---- eager code ----


def centered_cache(**settings: object) -> tuple[Tensor, Tensor]:
    """A packed cache `[B, H, S, D]` of eight bits and its plain twin."""
    torch.manual_seed(0)
    return new_cache("bhsd", center=True, **settings)  # type: ignore[arg-type]


def close(packed: Tensor, plain: Tensor) -> None:
    assert packed.shape == plain.shape
    assert relative_error(materialize(packed), plain) < BOUND
    assert (materialize(packed) - plain).abs().max() < 0.2


def _saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("copied", [
    torch.clone, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: unpack_bytes(pack_bytes(x)),
    _saved, lambda x: x.to("cpu", copy=True), lambda x: x.roll(3, 2).roll(-3, 2),
    lambda x: torch.cat([x[:, :, :5], x[:, :, 5:]], 2), lambda x: torch.cat([x[:1], x[1:]]),
    lambda x: torch.cat([x[:, :1], x[:, 1:]], 1), lambda x: x.index_select(0, torch.tensor([0, 1])),
], ids=[
    "clone", "deepcopy", "pickle", "bytes", "save", "to", "roll", "cat of tokens", "cat of entries", "cat of heads",
    "index",
])  # fmt: skip
@pytest.mark.parametrize("window", [{}, {"sink": 3, "recent": 2}], ids=str)
def test_copies_are_the_same_bits(copied, window: dict[str, int], shifted: None) -> None:
    packed, plain = centered_cache(**window)
    other = copied(packed)
    assert isinstance(other, PackedKV)
    same = torch.equal(materialize(other), materialize(packed))
    assert same or window  # what is held in full precision does not come along everywhere
    new = torch.randn(2, 2, 3, 64)
    for x in (other, plain):
        x[:, :, 4:7] = new
    close(other, plain)


def test_parts_are_stored_less_means_of_their_own(shifted: None) -> None:
    packed, plain = centered_cache()
    read, order = materialize(packed), torch.tensor([1, 0, 1])
    for got, want in (
        (packed[1:].clone(), read[1:]), (packed[:, 1:].clone(), read[:, 1:]),
        (packed.index_select(0, order), read[order]), (packed.index_select(1, order), read[:, order]),
        (packed.repeat_interleave(2, 0), read.repeat_interleave(2, 0)), (torch.cat([packed, packed]), torch.cat([read, read])),
        (packed[:, :, [3, 1]], read[:, :, [3, 1]]),
    ):  # fmt: skip
        assert isinstance(got, PackedKV) and torch.equal(materialize(got), want)
    mixed = torch.cat([packed, plain])
    assert isinstance(mixed, PackedKV)
    close(mixed, torch.cat([plain, plain]))


@pytest.mark.parametrize("change", [
    lambda x, new: x[:, :, 2:6].copy_(new[:, :, 2:6]), lambda x, new: x[1].copy_(new[1]),
    lambda x, new: x[:, 1:].copy_(new[:, 1:]), lambda x, new: x.index_copy_(2, torch.tensor([5, 1, 7]), new[:, :, :3]),
    lambda x, new: x.index_copy_(0, torch.tensor([1]), new[:1]), lambda x, new: x[:, :, 1:7].zero_(),
    lambda x, new: x[1].fill_(2.0), lambda x, new: x[:, :1].zero_(),
    lambda x, new: x.masked_fill_((torch.arange(16) % 3 == 0)[:, None], 0.0),
    lambda x, new: x[:, :, :8].copy_(x[:, :, 2:10].clone()), lambda x, new: x[0].copy_(x[1].clone()),
    lambda x, new: x[:, 0].copy_(x[:, 1].clone()), lambda x, new: x[:1, :, 4:9].copy_(x[:1, :, 3:8].clone()),
    lambda x, new: x.index_copy_(0, torch.tensor([1, 0]), x.clone()), lambda x, new: x.copy_(x.flip(0)),
    lambda x, new: x.copy_(x[[1, 0]]), lambda x, new: x.copy_(x.roll(3, 2)), lambda x, new: x.copy_(new),
], ids=[
    "a slice", "an entry", "a head", "indices", "an entry by index", "a reset", "a fill of an entry", "a reset of a head",
    "a mask", "a move", "another entry", "another head", "a move within an entry", "entries in turn", "a flip",
    "entries by index", "a roll", "all of it",
])  # fmt: skip
@pytest.mark.parametrize("window", [{}, {"sink": 3, "recent": 2}], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_writes_are_read_back(change, window: dict[str, int], shifted: None) -> None:
    packed, plain = centered_cache(**window)
    for _ in range(2):
        new = torch.randn(2, 2, 16, 64)
        for x in (packed, plain):
            change(x, new)
        close(packed, plain)


def test_caches_of_other_means_exchange_tokens_and_not_codes(shifted: None) -> None:
    (one, plain), (other, other_plain), (bare, bare_plain) = centered_cache(), centered_cache(), new_cache("bhsd")
    assert not torch.equal(one._store.center, other._store.center) or torch.manual_seed(1)
    other._store.center = other._store.center + 1
    other.copy_(other_plain)
    with pytest.raises(PackedCacheError, match="other means"):
        one._store.move(other._store, (0, 0, 0, 0), (0, 0, 0, 0), (2, 2, 4, 64))
    for source, twin in ((other, other_plain), (bare, bare_plain)):
        for target, held in ((one, plain), (bare, bare_plain)):
            target[:, :, 2:10], held[:, :, 2:10] = source[:, :, 1:9], twin[:, :, 1:9].clone()
            close(target, held)
        close(torch.cat([one, source], 2), torch.cat([plain, twin], 2))
        close(torch.cat([source, one], 2), torch.cat([twin, plain], 2))
        close(torch.cat([one, source], 0), torch.cat([plain, twin], 0))
        close(torch.cat([source, one], 1), torch.cat([twin, plain], 1))


def test_files_with_means_of_another_shape_are_refused(shifted: None) -> None:
    store = centered_cache()[0]._store
    build, arguments = store.__reduce__()
    assert build is rebuild_store
    with pytest.raises(PackedCacheError, match="means"):
        build(*arguments[:-1], arguments[-1][:1])


def test_tokens_of_ranks_with_means_of_their_own_make_no_one_cache(shifted: None) -> None:
    packed, _ = centered_cache()
    with pytest.raises(ConfigurationError, match="center=True"):
        parallel.rebalance(packed, 2)
    with pytest.raises(ConfigurationError, match="center=True"):
        parallel.exchange(packed.transpose(1, 2), 2, 1)


def test_settings() -> None:
    with pytest.raises(ConfigurationError, match="center"):
        jkv_backend(center="both")
    assert jkv_backend(center=True) != jkv_backend() and jkv_backend(center=False) == jkv_backend()
