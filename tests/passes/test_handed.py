"""A graph break between the read of a cache and its attention: packed and corrected all the same."""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jkv_compile
from jkv_compile import JKVBackend, NotRewrittenWarning, is_packed
from jkv_compile.passed import Passed
from jkv_compile.reasons import Reason

from ..harness import fresh_backend, relative_error, rewritten, run_beside, twins
from ..idioms.models import CHUNK, DIM, HEAD_DIM, HEADS, Projections, rope

TOKENS = 12 * CHUNK


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, H, D] each; returns [B, S, H·D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class KeysBesideValues(Projections):
    """As MAGI-1: keys beside values, read in one graph, attended in the next; written by the last step alone."""

    def new_cache(self) -> tuple[Tensor, ...]:
        return (torch.zeros(TOKENS, HEADS, 2 * HEAD_DIM),)

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, k, v = self.project(x)
        kv = torch.cat([k, v], -1)[0]
        old = cache[0][:start]
        if last:
            cache[0][start : start + kv.shape[0]] = kv
        k, v = (t.contiguous().unsqueeze(0) for t in torch.cat([old, kv]).chunk(2, -1))
        torch._dynamo.graph_break()
        return self.out(attend(q, k, v))


class TurnedElsewhere(Projections):
    """As LongCat-Video when its tables are not yet made: concatenated, turned and attended in three graphs."""

    def new_cache(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, 5 * CHUNK, HEADS, HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        torch._dynamo.graph_break()
        q, k = rope(q, 5 * CHUNK), rope(k)
        torch._dynamo.graph_break()
        return self.out(attend(q, k, v))


class EditedCopy(Projections):
    """As DreamX-World: a copy is edited in one graph and attended in the next; eager code writes the cache."""

    def new_cache(self) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(1, TOKENS, HEADS, HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, *new = self.project(x)
        copies = [c.clone() for c in cache]
        for copy, part in zip(copies, new):
            copy[:, start : start + CHUNK] = part
        torch._dynamo.graph_break()
        k, v = (c[:, : start + CHUNK] for c in copies)
        if last:
            self.commit(cache, new, start)
        return self.out(attend(q, k, v))

    @torch.compiler.disable
    def commit(self, cache: tuple[Tensor, ...], new: list[Tensor], start: int) -> None:
        for whole, part in zip(cache, new):
            whole[:, start : start + CHUNK] = part


class OnlyKeysTurned(Projections):
    """As Wan-Animate-2: keys are turned in one graph; values come as they are to the next, which fills a buffer."""

    def new_cache(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, 5 * CHUNK, HEADS, HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, k, v = self.project(x)
        old = torch.cat([rope(cache[0][:, CHUNK:]), cache[0][:, :CHUNK]], 1)
        q, k = rope(q, 5 * CHUNK), rope(k, 5 * CHUNK)
        torch._dynamo.graph_break()
        buffers = [t.new_zeros(1, 6 * CHUNK, HEADS, HEAD_DIM) for t in (k, v)]
        for buffer, past, new in zip(buffers, (old, cache[1]), (k, v)):
            buffer[:, : 5 * CHUNK] = past
            buffer[:, 5 * CHUNK :] = new
        return self.out(attend(q, *buffers))


class ViewKept(Projections):
    """As Infinity-RoPE: keys turned after they are read; the view that they are read by lives as long as the call."""

    def new_cache(self) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(1, TOKENS, HEADS, HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, k, v = self.project(x)
        for held, new in zip(cache, (k, v)):
            held[:, start : start + CHUNK] = new
        keys, values = (held[:, : start + CHUNK] for held in cache)
        turned = rope(keys)
        torch._dynamo.graph_break()
        turned[:, :CHUNK] = keys[:, :CHUNK]
        return self.out(attend(q, turned, values))


def steps(model: Projections, backend: object, caches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    compiled, eager = twins(model, backend)
    cache = model.new_cache()
    reference = tuple(t.clone() for t in cache)
    caches += cache
    for call in range(20):
        x, start, last = torch.randn(1, CHUNK, DIM), call // 2 * CHUNK, call % 2 == 1
        yield compiled(x, cache, start, last), eager(x, reference, start, last)


MODELS = [KeysBesideValues, TurnedElsewhere, EditedCopy, OnlyKeysTurned, ViewKept]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")
def test_a_cache_is_packed_across_a_graph_break(model: type[Projections]) -> None:
    backend, caches = fresh_backend(), list[Tensor]()
    with torch.no_grad():
        run_beside(steps(model(), backend, caches), calls=12, stable_from=7)
    assert all(map(is_packed, caches))
    assert not any(report.rejections for report in backend.reports)


def test_sizes_may_change_where_delta_enters_an_inductor_graph() -> None:
    backend, caches = fresh_backend(inner="inductor"), list[Tensor]()
    with torch.no_grad():
        run_beside(steps(KeysBesideValues(), backend, caches), calls=20, stable_from=7)
    assert all(map(is_packed, caches)) and _corrects(backend)


def _corrects(backend: JKVBackend) -> bool:
    return any("jkv::attention_dense" in report.after for report in backend.reports)


def outputs(model: Projections, calls: int, broken: bool, **settings: Any) -> list[Tensor]:
    """What a compiled model returns, call by call, with graph breaks or without."""
    backend = fresh_backend(bits=2, group_size=16, **settings)
    torch.manual_seed(1)
    unbroken = pytest.MonkeyPatch()
    if not broken:
        unbroken.setattr(torch._dynamo, "graph_break", lambda: None)
    with torch.no_grad():
        results = [got for got, _ in itertools.islice(steps(model, backend, []), calls)]
    unbroken.undo()
    return results


@pytest.mark.parametrize("correction", ["taylor", "exact"])
@pytest.mark.parametrize(
    ("model", "quantizer"),
    [
        (TurnedElsewhere, "rtn"),
        (TurnedElsewhere, "unbiased"),
        (EditedCopy, "rtn"),
        (OnlyKeysTurned, "rtn"),
        (OnlyKeysTurned, "unbiased"),
        (ViewKept, "rtn"),
    ],
)
def test_two_bits_are_corrected_as_without_a_break(model: type[Projections], quantizer: str, correction: str) -> None:
    built = model()
    broken, whole, plain = (
        outputs(built, 8, broken=broken, quantizer=quantizer, correction=how)
        for broken, how in ((True, correction), (False, correction), (False, "none"))
    )
    for got, want, uncorrected in list(zip(broken, whole, plain))[4:]:  # both are packed by then
        assert relative_error(got, want) < 2e-6
        assert relative_error(got, uncorrected) > 1e-3


class Squashed(Projections):
    """What is done to keys between the read and the break does not carry errors over as they are."""

    def new_cache(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, 5 * CHUNK, HEADS, HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, k, v = self.project(x)
        k, v = torch.cat([torch.tanh(cache[0]), k], 1), torch.cat([cache[1] * 1.0, v], 1)
        torch._dynamo.graph_break()
        return self.out(attend(q, k, v))


def test_where_delta_is_lost_a_warning_says_so_once() -> None:
    backend, caches = fresh_backend(), list[Tensor]()
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NotRewrittenWarning)
        run_beside(steps(Squashed(), backend, caches), calls=8, stable_from=5)
    assert [w for w in told if issubclass(w.category, NotRewrittenWarning)] and len(told) == 1
    assert re.search("test_handed.py:.*packed, but read back in another graph", str(told[0].message))
    assert all(map(is_packed, caches)) and not _corrects(backend)
    assert {rejected.kind for report in backend.reports for rejected in report.rejections} == {Reason.GRAPH_BREAK}


@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")
def test_nothing_is_told_of_delta_where_no_correction_is_asked_for() -> None:
    backend, caches = fresh_backend(correction="none"), list[Tensor]()
    with torch.no_grad():
        run_beside(steps(OnlyKeysTurned(), backend, caches), calls=8, stable_from=5)
    assert all(map(is_packed, caches)) and not _corrects(backend)
    assert not any(r.rejections or "_steps" in r.after or "quantization_step" in r.after for r in backend.reports)
    assert not backend._state.passed._steps


def test_delta_lives_as_long_as_the_keys_that_it_is_of() -> None:
    backend, caches = fresh_backend(), list[Tensor]()
    told, tell = [], Passed.tell_steps

    def tell_and_note(self: Passed, tensor: Tensor, delta: Tensor, layout: Any) -> None:
        told.append(weakref.ref(delta))
        tell(self, tensor, delta, layout)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Passed, "tell_steps", tell_and_note)
        run_beside(steps(OnlyKeysTurned(), backend, caches), calls=8, stable_from=7)
    gc.collect()
    assert len(told) >= 4 and all(ref() is None for ref in told)
    assert not backend._state.passed._steps


class ChangedInBetween(Squashed):
    """Eager code changes the keys in place, between the graph that reads them and the one that attends to them."""

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0] * 1.0, k], 1), torch.cat([cache[1] * 1.0, v], 1)
        self.change(k)
        return self.out(attend(q, k, v))

    @torch.compiler.disable
    def change(self, k: Tensor) -> None:
        k[:, :CHUNK] = k[:, CHUNK : 2 * CHUNK].square()


def test_keys_that_eager_code_changes_lose_their_delta() -> None:
    backend, caches = fresh_backend(), list[Tensor]()
    with torch.no_grad(), pytest.warns(NotRewrittenWarning, match="packed, but read back in another graph"):
        run_beside(steps(ChangedInBetween(), backend, caches), calls=8, stable_from=5, bound=0.02)
    assert all(map(is_packed, caches)) and not _corrects(backend)


class OneOfTwoLayers(nn.Module):
    """Two layers by the same code, the past of one of which is packed: Δ comes with the keys of that one only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OnlyKeysTurned() for _ in range(2))

    def new_cache(self) -> list[tuple[Tensor, ...]]:
        return [layer.new_cache() for layer in self.layers]  # type: ignore[operator]

    def forward(self, x: Tensor, caches: list[tuple[Tensor, ...]]) -> Tensor:
        for layer, cache in zip(self.layers, caches):
            x = x + layer(x, cache, 0, False)
        return x


def test_one_graph_serves_keys_with_delta_and_without() -> None:
    backend, model = fresh_backend(), OneOfTwoLayers()
    compiled, eager = twins(model, backend)
    caches = model.new_cache()
    plain = [tuple(t.clone() for t in cache) for cache in caches]
    hints = [jkv_compile.ignore(t) for t in caches[0]]
    with torch.no_grad():
        for call in range(10):
            stance = torch.compiler.set_stance("fail_on_recompile") if call > 6 else contextlib.nullcontext()
            x = torch.randn(1, CHUNK, DIM)
            with stance:
                assert relative_error(compiled(x, caches), eager(x, plain)) < 0.01
    assert [list(map(is_packed, cache)) for cache in caches] == [[False, False], [True, True]]
    assert _corrects(backend)
    for hint in hints:
        hint.remove()


class AttendedInAGraphFirst(Projections):
    """A cache that is packed where read and attention are in one graph, and later attended across a break."""

    def new_cache(self) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(1, TOKENS, HEADS, HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], start: int, last: bool) -> Tensor:
        q, *new = self.project(x)
        for whole, part in zip(cache, new):
            whole[:, start : start + CHUNK] = part
        k, v = (whole[:, : start + CHUNK] for whole in cache)
        if start >= 2 * CHUNK:
            q, k = rope(q, start), rope(k)
            torch._dynamo.graph_break()
        return self.out(attend(q, k, v))


@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")
def test_a_cache_that_was_packed_before_tells_delta_too() -> None:
    backend, caches = fresh_backend(), list[Tensor]()
    with torch.no_grad():
        run_beside(steps(AttendedInAGraphFirst(), backend, caches), calls=14, stable_from=10)
    assert all(map(is_packed, caches)) and _corrects(backend)


class TestGraphs(expecttest.TestCase):
    def test_one_graph_returns_delta_and_the_other_is_given_it(self) -> None:
        backend, caches = fresh_backend(bits=2, group_size=16), list[Tensor]()
        with torch.no_grad():
            for _ in itertools.islice(steps(KeysBesideValues(), backend, caches), 8):
                pass
        self.assertExpectedInline(
            rewritten(backend, index=0),
            """\
view = linear.view(1, 8, 3, 2, 32)
unbind = view.unbind(2)
q = unbind[0]
k = unbind[1]
v = unbind[2]
cat = cat([k, v], -1)
kv = cat[0]
select = l_cache_0__scales.select(-1, 0)
narrow = narrow(select, 3, 0, l_start_)
float_1 = narrow.float()
transpose = float_1.transpose(2, 3)
mul = mul(transpose, 0.25)
repeat_interleave = mul.repeat_interleave(16, -1)
_outside = _outside(repeat_interleave, l_cache_0__active_range, 0)
to = _outside.to(torch.float32)
permute = to.permute([2, 1, 3, 0])
squeeze = permute.squeeze(-1)
zeros_like = zeros_like(kv)
cat_2 = cat([squeeze, zeros_like])
dequantize_active_default = jkv::dequantize_active(l_cache_0__codes, l_cache_0__scales, l_cache_0__active, l_cache_0__active_range, 0, l_start_, 2, torch.float32)
permute_1 = dequantize_active_default.permute([2, 1, 3, 0])
squeeze_1 = permute_1.squeeze(-1)
cat_1 = cat([squeeze_1, kv])
chunk_1 = cat_2.chunk(2, -1)
chunk = cat_1.chunk(2, -1)
t_2 = chunk_1[0]
t = chunk[0]
t_3 = chunk_1[1]
t_1 = chunk[1]
contiguous_2 = t_2.contiguous()
contiguous = t.contiguous()
k_2 = contiguous_2.unsqueeze(0)
k_1 = contiguous.unsqueeze(0)
contiguous_3 = t_3.contiguous()
contiguous_1 = t_1.contiguous()
v_2 = contiguous_3.unsqueeze(0)
v_1 = contiguous_1.unsqueeze(0)
contiguous_4 = k_2.contiguous()
contiguous_5 = v_2.contiguous()
return (q, k_1, v_1, contiguous_4, contiguous_5)
""",
        )
        self.assertExpectedInline(
            rewritten(backend, index=1),
            """\
q = l_q_.transpose(1, 2)
k_1 = l_k__steps.transpose(1, 2)
k = l_k_.transpose(1, 2)
v = l_v_.transpose(1, 2)
float_1 = k_1.float()
square = float_1.square()
unflatten = square.unflatten(-1, (2, -1))
mean = unflatten.mean(-1)
attention_dense_default = jkv::attention_dense(q, k, v, mean, None, False, 0.17677669529663687, 0, 'taylor')
transpose_3 = attention_dense_default.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear)
""",
        )


def test_what_cannot_be_packed_is_warned_of_with_its_reason() -> None:
    backend = fresh_backend()
    compiled, eager = twins(TurnedElsewhere(), backend)
    cache = TurnedElsewhere().new_cache()
    shown = [t.flatten() for t in cache]
    refused = pytest.warns(NotRewrittenWarning, match="of a cache stays in full precision: another live tensor shares")
    with torch.no_grad(), refused:
        for _ in range(4):
            x = torch.randn(1, CHUNK, DIM)
            assert torch.equal(compiled(x, cache, 0, False), eager(x, cache, 0, False))
    rejected = {rejected.kind for report in backend.reports for rejected in report.rejections}
    assert rejected == {Reason.SHARED_MEMORY} and backend.memory().adopted == 0 and len(shown) == 2


def test_explain_tells_of_it_after_one_call() -> None:
    torch._dynamo.reset()
    model = TurnedElsewhere()
    with torch.no_grad():
        account = jkv_compile.explain(model, torch.randn(1, CHUNK, DIM), model.new_cache(), 0, False, bits=8)
    assert "read from a cache in another graph: packed when it comes again" in str(account)
    assert "TORCH_LOGS=graph_breaks" in str(account)


class FreshEachTime(Projections):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.project(x)
        k, v = torch.cat([context, k], 1), torch.cat([context, v], 1)
        torch._dynamo.graph_break()
        return self.out(attend(q, k, v))


class Angles(Projections):
    """What keys are turned by is concatenated in another graph, too, and is no cache."""

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], angles: tuple[Tensor, ...]) -> Tensor:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        table = torch.cat(angles, 1)
        torch._dynamo.graph_break()
        return self.out(attend(q, k * table.cos(), v))


def test_what_keys_are_turned_by_stays_plain() -> None:
    backend = fresh_backend()
    compiled, eager = twins(Angles(), backend)
    cache = tuple(torch.randn(1, 16, HEADS, HEAD_DIM) for _ in range(2))
    angles = tuple(torch.randn(1, n, 1, HEAD_DIM) for n in (16, CHUNK))
    plain = tuple(t.clone() for t in cache)
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(1, CHUNK, DIM)
            assert relative_error(compiled(x, cache, angles), eager(x, plain, angles)) < 0.01
    assert all(map(is_packed, cache)) and not any(map(is_packed, angles))


class HiddenStates(Projections):
    """What is concatenated are not keys: keys are yet to be made of it."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = torch.cat([context, x], 1)
        torch._dynamo.graph_break()
        q, k, v = self.project(F.layer_norm(x, (DIM,)))
        torch._dynamo.graph_break()
        return self.out(attend(q, k, v))


@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")
def test_what_comes_once_and_hidden_states_stay_plain() -> None:
    backend = fresh_backend()
    with torch.no_grad():
        compiled, eager = twins(FreshEachTime(), backend)
        for _ in range(4):
            x, context = torch.randn(1, CHUNK, DIM), torch.randn(1, 16, HEADS, HEAD_DIM)
            assert torch.equal(compiled(x, context), eager(x, context))
        compiled, eager = twins(HiddenStates(), backend)
        context = torch.randn(1, 16, DIM)
        for _ in range(4):
            x = torch.randn(1, CHUNK, DIM)
            assert torch.equal(compiled(x, context), eager(x, context))
    assert not is_packed(context) and backend.memory().adopted == 0


def test_ignored_and_learned_tensors_stay_plain_across_a_graph_break() -> None:
    model = TurnedElsewhere()
    compiled, eager = twins(model, fresh_backend())
    ignored, learned = model.new_cache(), tuple(nn.Parameter(t) for t in model.new_cache())
    hints = [jkv_compile.ignore(t) for t in ignored]
    with torch.no_grad():
        for cache in (ignored, learned):
            for _ in range(4):
                x = torch.randn(1, CHUNK, DIM)
                assert relative_error(compiled(x, cache, 0, False), eager(x, cache, 0, False)) < 1e-5
            assert not any(map(is_packed, cache))
    for hint in hints:
        hint.remove()


class MoreEntriesThanUsed(nn.Module):
    """As Llama's reference code: caches for more batch entries than come, moved to the device of what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (torch.zeros(2, TOKENS, HEADS, HEAD_DIM) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        self.k, self.v = self.k.to(q), self.v.to(q)
        self.k[: len(q), start : start + CHUNK] = k
        self.v[: len(q), start : start + CHUNK] = v
        return attend(q, self.k[: len(q), : start + CHUNK], self.v[: len(q), : start + CHUNK])


def test_what_a_graph_refuses_is_not_packed_for_its_being_handed_on() -> None:
    backend = fresh_backend()
    compiled, eager = twins(MoreEntriesThanUsed(), backend)
    with torch.no_grad(), pytest.warns(NotRewrittenWarning, match="only some of its batch entries"):
        for start in range(0, 6 * CHUNK, CHUNK):
            q, k, v = (torch.randn(1, CHUNK, HEADS, HEAD_DIM) for _ in range(3))
            assert compiled(q, k, v, start).equal(eager(q, k, v, start))
    assert backend.memory().adopted == 0


def test_a_view_that_never_goes_is_told_of() -> None:
    torch.manual_seed(0)
    backend = fresh_backend()
    model = ViewKept()
    compiled, caches = torch.compile(model, backend=backend), model.new_cache()
    views = [cache[:, 1:] for cache in caches]
    with torch.no_grad(), pytest.warns(NotRewrittenWarning, match="other live tensors share its memory"):
        for start in range(0, 6 * CHUNK, CHUNK):
            compiled(torch.randn(1, CHUNK, DIM), caches, start, True)
    assert not any(map(is_packed, (*caches, *views)))


class EvictedAndMerged(Projections):
    """As Reward-Forcing: what is evicted is copied before the cache is rolled, and becomes part of the sink later on."""

    SINK = 4

    def forward(self, x: Tensor, cache: dict[str, Tensor], full: bool) -> Tensor:
        q, k, v = self.project(x)
        sink, n = self.SINK, k.shape[1]
        if full:
            evicted = {name: cache[name][:, sink : sink + n].clone() for name in "kv"}
            for name in "kv":
                cache[name][:, sink:-n] = cache[name][:, sink + n :].clone()
            torch._dynamo.graph_break()
            for name in "kv":
                cache[name][:, :sink] = (cache[name][:, :sink] + evicted[name][:, :sink]) / 2
        cache["k"][:, -n:], cache["v"][:, -n:] = k, v
        return self.out(attend(q, cache["k"], cache["v"]))


def test_a_copy_that_is_handed_on_is_of_the_cache_as_it_was() -> None:
    """Not as the graph leaves it, which writes to the cache after it has copied from it."""
    torch.manual_seed(0)
    compiled, eager = twins(EvictedAndMerged(), fresh_backend())
    start = {name: torch.randn(1, 4 + 3 * CHUNK, HEADS, HEAD_DIM) for name in "kv"}
    cache, reference_cache = ({n: t.clone() for n, t in start.items()} for _ in range(2))
    with torch.no_grad():
        for call in range(5):
            x, full = torch.randn(1, CHUNK, DIM), call > 0
            assert relative_error(compiled(x, cache, full), eager(x, reference_cache, full)) < 0.01
    assert all(map(is_packed, cache.values()))
    for name in "kv":
        assert relative_error(jkv_compile.materialize(cache[name]), reference_cache[name]) < 0.01


class CopiedElsewhere(Projections):
    """As MemFlow: a copy of the cache is made, numbers are read from a tensor, and the copy is written and attended."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], end: Tensor) -> Tensor:
        q, k, v = self.project(x)
        keys, values = cache["k"].clone(), cache["v"].clone()
        last = end.item()
        keys[:, last - k.shape[1] : last], values[:, last - k.shape[1] : last] = k, v
        out = self.out(attend(q, keys[:, :last], values[:, :last]))
        cache["k"][:, last - k.shape[1] : last], cache["v"][:, last - k.shape[1] : last] = k, v
        return out


def test_a_copy_that_another_graph_writes_to_is_no_cache_but_what_it_was_copied_from_is() -> None:
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(CopiedElsewhere(), backend)
    cache, reference_cache = ({n: torch.zeros(1, TOKENS, HEADS, HEAD_DIM) for n in "kv"} for _ in range(2))
    with torch.no_grad():
        for call in range(6):
            x, end = torch.randn(1, CHUNK, DIM), torch.tensor((call + 1) * CHUNK)
            assert relative_error(compiled(x, cache, end), eager(x, reference_cache, end)) < 0.01
    assert all(map(is_packed, cache.values()))
    assert {m.lowering for r in backend.reports for m in r.matches} == {"fused"}
