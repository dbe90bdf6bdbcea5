"""Other ways of holding a cache: each stays close to eager, is packed, compiles no more than it must, and is pinned."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import expecttest
import pytest
import torch

from jkv_compile import JKVBackend, is_packed
from jkv_compile.kernels import reference

from ..harness import fresh_backend, relative_error, rewritten, run_beside, twins
from .cases import (
    CASES,
    Steps,
    chunk,
    clone_edit,
    composite,
    fixed_past,
    growing_past,
    keys_beside_values,
    masked_buffer,
    rolled_buffer,
    rolling,
    stacked,
    two_caches,
)
from .models import CHUNK, HEAD_DIM, HEADS, FixedPast, GrowingPast, RollingCache, rope

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")


COMPILED = (  # one of each lowering
    "a fixed past, turned in halves after the read",
    "a concatenation that grows and is returned",
    "keys and values stacked, batch of two",
    "a whole buffer, heads repeated",
)


@pytest.mark.parametrize("name, inner", [(name, "eager") for name in CASES] + [(name, "inductor") for name in COMPILED])
def test_stays_close_to_eager(name: str, inner: str) -> None:
    steps, stable_from = CASES[name]
    torch.manual_seed(0)
    backend = fresh_backend(inner=inner)
    with torch.no_grad():
        generator = steps(backend)  # holds the caches
        run_beside(generator, calls=10 if inner == "eager" else 6, stable_from=stable_from)
    assert backend.memory().adopted in (1, 2, 4)  # keys and values may lie in one tensor, or in two each


def test_rolling_moves_packed_data_bit_for_bit() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2)
    model = RollingCache(sink=4, tokens=32)
    compiled = torch.compile(model, backend=backend)
    cache = model.new_cache()
    with torch.no_grad():
        for call in range(4):
            compiled(chunk(), cache, call * CHUNK)
        store = cache["k"]._store
        codes, scales = store.codes.clone(), store.scales.clone()
        compiled(chunk(), cache, 4 * CHUNK)  # evicts the eight tokens after the sink
    assert torch.equal(store.codes[:, :, :4], codes[:, :, :4])
    assert torch.equal(store.codes[:, :, 4:24], codes[:, :, 12:32])
    assert torch.equal(store.scales[:, :, :, 4:24], scales[:, :, :, 12:32])


@pytest.mark.parametrize("correction", ["none", "taylor", "exact"])
def test_a_past_turned_after_the_read_is_corrected_as_the_reference_is(correction: str) -> None:
    """Interleaved pairs lie within a group, whose norm no rotation changes: turned queries give the right correction."""
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, correction=correction)
    model = FixedPast("interleaved")
    compiled = torch.compile(model, backend=backend)
    past = tuple(2 * torch.randn(1, HEADS, 40, HEAD_DIM) for _ in range(2))
    packed = [reference.quantize(t, 2, 32) for t in past]
    old_k, old_v = (reference.dequantize(*p, 2) for p in packed)
    delta = reference.quantization_step(packed[0][1], 2)
    with torch.no_grad():
        for _ in range(3):  # the past is packed once it is seen again
            x = 2 * chunk()
            got = compiled(x, past)
        q, k, v = (t.transpose(1, 2) for t in model.project(x))
        keys = rope(torch.cat([old_k, k], 2).transpose(1, 2)).transpose(1, 2)
        q = rope(q.transpose(1, 2), 40).transpose(1, 2)
        scores = HEAD_DIM**-0.5 * q @ keys.mT
        scores[..., :40] -= reference.correction_bias(q, delta, HEAD_DIM**-0.5, correction)
        want = model.out((scores.softmax(-1) @ torch.cat([old_v, v], 2)).transpose(1, 2).flatten(2))
    assert is_packed(past[0])
    assert relative_error(got, want) < 1e-4


def test_two_children_of_one_past_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(GrowingPast(), backend)
    with torch.no_grad():
        past = reference_past = None
        for _ in range(3):
            x = chunk()
            _, past = compiled(x, past)
            _, reference_past = eager(x, reference_past)
        assert past is not None and is_packed(past[0])
        before = past[0]._store.codes.clone()
        for _ in range(2):  # both grow from the same past, each in its own way
            x, child, reference_child = chunk(), past, reference_past
            for _ in range(2):
                out, child = compiled(x, child)
                want, reference_child = eager(x, reference_child)
                assert relative_error(out, want) < 0.01
            assert child[0].shape[2] == past[0].shape[2] + 2 * CHUNK
        assert torch.equal(past[0]._store.codes, before)


def test_growing_moves_packed_tokens_bit_for_bit() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2)
    compiled = torch.compile(GrowingPast(), backend=backend)
    past, stores = None, []
    with torch.no_grad():
        for _ in range(5):
            _, past = compiled(chunk(), past)
            stores.append(past[0]._store if is_packed(past[0]) else None)
    assert None not in stores[2:]  # the first past is a slice of a projection, the second their concatenation
    for old, new in itertools.pairwise(stores[2:]):
        n = old.codes.shape[2]
        assert torch.equal(new.codes[:, :, :n], old.codes) and torch.equal(new.scales[:, :, :, :n], old.scales)


class TestGraphs(expecttest.TestCase):
    def graph(self, steps: Callable[[JKVBackend], Steps], calls: int = 4, index: int = 0) -> str:
        backend = fresh_backend(bits=2)
        with torch.no_grad():
            generator = steps(backend)
            for _ in range(calls):
                next(generator)
        lines = rewritten(backend, index=index).splitlines()
        return "\n".join(line for line in lines if "jkv::" in line) + "\n"

    def test_rolling(self) -> None:
        self.assertExpectedInline(
            self.graph(rolling, 7, index=1),
            """\
jkv::move(l_cache_k__codes, l_cache_k__scales, add_2, 4, 20)
jkv::move(l_cache_v__codes, l_cache_v__scales, add_2, 4, 20)
jkv::append(l_cache_k__codes, l_cache_k__scales, permute, sub_5, 2)
jkv::append(l_cache_v__codes, l_cache_v__scales, permute_1, sub_5, 2)
attention_default = jkv::attention(transpose, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 4, 4, 24], permute_2, permute_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
""",
        )

    def test_fixed_past(self) -> None:
        self.assertExpectedInline(
            self.graph(fixed_past()),
            """\
attention_active_default = jkv::attention_active(q_1, l_past_0__codes, l_past_0__scales, l_past_1__codes, l_past_1__scales, l_past_0__active, l_past_0__active_range, l_past_1__active, l_past_1__active_range, 0, 8, transpose, transpose_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
""",
        )

    def test_clone_edit_attend(self) -> None:
        self.assertExpectedInline(
            self.graph(clone_edit(True)),
            """\
attention_default = jkv::attention(transpose, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, l_start_], permute, permute_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
jkv::append(l_cache_k__codes, l_cache_k__scales, permute_2, l_start_, 2)
jkv::append(l_cache_v__codes, l_cache_v__scales, permute_3, l_start_, 2)
""",
        )

    def test_composite(self) -> None:
        self.assertExpectedInline(
            self.graph(composite),
            """\
attention_default = jkv::attention(transpose, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 4, sym_max, l_start_], permute, permute_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
jkv::append(l_cache_k__codes, l_cache_k__scales, permute_2, l_start_, 2)
jkv::append(l_cache_v__codes, l_cache_v__scales, permute_3, l_start_, 2)
""",
        )

    def test_a_past_turned_after_the_read(self) -> None:
        self.assertExpectedInline(
            self.graph(fixed_past("half")),
            """\
dequantize_active_default = jkv::dequantize_active(l_past_0__codes, l_past_0__scales, l_past_0__active, l_past_0__active_range, 0, 8, 2, torch.float32)
dequantize_active_default_1 = jkv::dequantize_active(l_past_1__codes, l_past_1__scales, l_past_1__active, l_past_1__active_range, 0, 8, 2, torch.float32)
attention_dense_default = jkv::attention_dense(q_2, k_2, v_1, mean, None, False, 0.17677669529663687, False, 'taylor')
""",
        )

    def test_a_growing_concatenation(self) -> None:
        self.assertExpectedInline(
            self.graph(growing_past, 5),
            """\
attention_active_default = jkv::attention_active(transpose_2, l_past_0__codes, l_past_0__scales, l_past_1__codes, l_past_1__scales, l_past_0__active, l_past_0__active_range, l_past_1__active, l_past_1__active_range, 0, s69, k_1, v_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
extend_default = jkv::extend(l_past_0__codes, l_past_0__scales, [0, s69], k_1, 2)
extend_default_1 = jkv::extend(l_past_1__codes, l_past_1__scales, [0, s89], v_1, 2)
""",
        )

    def test_keys_beside_values(self) -> None:
        self.assertExpectedInline(
            self.graph(keys_beside_values, 5, index=1),
            """\
jkv::append(l_cache__codes, l_cache__scales, permute, l_start_, 2)
extend_default = jkv::extend(l_cache__codes, l_cache__scales, [0, l_start_], permute_1, 2)
""",
        )
        self.assertExpectedInline(
            self.graph(keys_beside_values, 5, index=0),
            """\
dequantize_active_default = jkv::dequantize_active(l_keys__codes, l_keys__scales, l_keys__active, l_keys__active_range, 0, s23, 2, torch.float32)
dequantize_active_default_1 = jkv::dequantize_active(l_values__codes, l_values__scales, l_values__active, l_values__active_range, 0, s59, 2, torch.float32)
attention_dense_default = jkv::attention_dense(transpose, narrow_2, narrow_3, mean, None, False, 0.17677669529663687, False, 'taylor')
""",
        )

    def test_stacked_keys_and_values(self) -> None:
        self.assertExpectedInline(
            self.graph(stacked(), 5, index=0),
            """\
jkv::append(narrow, narrow_1, transpose, l_start_, 2)
jkv::append(narrow_2, narrow_3, transpose_1, l_start_, 2)
""",
        )
        self.assertExpectedInline(
            self.graph(stacked(), 5, index=1),
            """\
attention_active_default = jkv::attention_active(transpose_2, narrow, narrow_1, narrow_2, narrow_3, narrow_4, l_cache__active_range, narrow_5, l_cache__active_range, 0, l_length_, transpose, transpose_1, None, False, 0.17677669529663687, 2, 2, 'taylor')
""",
        )

    def test_two_caches(self) -> None:
        self.assertExpectedInline(
            self.graph(two_caches(rope_on_read=True), 5),
            """\
dequantize_default = jkv::dequantize(l_old_k__codes, l_old_k__scales, 0, l_n_old_, 2, torch.float32)
dequantize_default_1 = jkv::dequantize(l_new_k__codes, l_new_k__scales, 0, l_n_new_, 2, torch.float32)
dequantize_default_2 = jkv::dequantize(l_old_v__codes, l_old_v__scales, 0, l_n_old_, 2, torch.float32)
dequantize_default_3 = jkv::dequantize(l_new_v__codes, l_new_v__scales, 0, l_n_new_, 2, torch.float32)
attention_dense_default = jkv::attention_dense(transpose, transpose_1, transpose_2, mean, None, False, 0.17677669529663687, False, 'taylor')
jkv::append(l_old_k__codes, l_old_k__scales, permute, l_n_old_, 2)
jkv::append(l_old_v__codes, l_old_v__scales, permute_1, l_n_old_, 2)
jkv::append(l_new_k__codes, l_new_k__scales, permute_2, l_n_new_, 2)
jkv::append(l_new_v__codes, l_new_v__scales, permute_3, l_n_new_, 2)
""",
        )

    def test_a_masked_buffer(self) -> None:
        self.assertExpectedInline(
            self.graph(masked_buffer()),
            """\
jkv::append_at(l_cache_k__codes, l_cache_k__scales, transpose, l_positions_, 2)
jkv::append_at(l_cache_v__codes, l_cache_v__scales, transpose_1, l_positions_, 2)
attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 176], transpose, transpose_1, cat, False, 0.17677669529663687, 2, 2, 'taylor')
""",
        )

    def test_a_buffer_copied_back(self) -> None:
        self.assertExpectedInline(
            self.graph(rolled_buffer(edit=False)),
            """\
jkv::move(l_cache_k__codes, l_cache_k__scales, 8, 0, 24)
jkv::append(l_cache_k__codes, l_cache_k__scales, permute, 24, 2)
jkv::move(l_cache_v__codes, l_cache_v__scales, 8, 0, 24)
jkv::append(l_cache_v__codes, l_cache_v__scales, permute_1, 24, 2)
attention_default = jkv::attention(transpose, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 24], permute_2, permute_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
""",
        )
        self.assertExpectedInline(
            self.graph(rolled_buffer(edit=True)),
            """\
jkv::move(l_cache_k__codes, l_cache_k__scales, 8, 0, 24)
jkv::append(l_cache_k__codes, l_cache_k__scales, permute, 24, 2)
jkv::move(l_cache_v__codes, l_cache_v__scales, 8, 0, 24)
jkv::append(l_cache_v__codes, l_cache_v__scales, permute_1, 24, 2)
attention_default = jkv::attention(transpose, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, 24], permute_2, permute_3, None, False, 0.17677669529663687, 2, 2, 'taylor')
""",
        )
