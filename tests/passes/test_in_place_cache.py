"""Caches written in slices and read in slices, as Self-Forcing and CausVid hold them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor, nn

from jkv_compile import NotRewrittenWarning, is_packed
from jkv_compile.kernels import reference

from ..harness import fresh_backend, relative_error, rewritten, run_beside, twins, watch_memory
from ..models import (
    BrokenAttention,
    BufferAttention,
    ItemAttention,
    Network,
    SelfAttention,
    TensorPositionAttention,
)

CHUNK = 8

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")


def plain_tensors(cache: Any) -> list[Tensor]:
    layers = cache if isinstance(cache, list) else [cache]
    return [layer[name] for layer in layers for name in ("k", "v")]


def generate(
    compiled: Any, eager: nn.Module, cache: Any, reference_cache: Any, batch: int, dtype: torch.dtype, repeats: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunk after chunk; every chunk is written `repeats` times, as denoising steps do."""
    layer = eager.layers[0] if isinstance(eager, Network) else eager
    call = 0
    while True:
        x = torch.randn(batch, CHUNK, layer.heads * layer.head_dim, dtype=dtype)
        start = call // repeats * CHUNK
        yield compiled(x, cache, start), eager(x, reference_cache, start)
        call += 1


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


CASES: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "tokens before heads": (SelfAttention(), {}),
    "heads before tokens": (SelfAttention(layout="bhsd"), {}),
    "a read window that moves": (SelfAttention(window=20), {}),
    "a read window over heads before tokens": (SelfAttention(layout="bhsd", window=20), {}),
    "grouped queries": (SelfAttention(kv_heads=2), {}),
    "batch of three": (SelfAttention(), {"batch": 3}),
    "batch of three, heads before tokens": (SelfAttention(layout="bhsd"), {"batch": 3}),
    "inference mode": (SelfAttention(), {"context": torch.inference_mode}),
    "autocast": (SelfAttention(), {"context": autocast}),
    "bfloat16": (SelfAttention(), {"dtype": torch.bfloat16}),
    "float16": (SelfAttention(), {"dtype": torch.float16}),
    "head_dim 96": (SelfAttention(head_dim=96), {}),
    "head_dim 128": (SelfAttention(head_dim=128, heads=2), {}),
    "several layers in one graph": (Network(), {}),
    "a break between write and attention": (BrokenAttention(), {}),
    "a break, inference mode": (BrokenAttention(), {"context": torch.inference_mode}),
    "a break, and a read window that moves": (BrokenAttention(window=20), {}),
    "positions from an earlier graph's item()": (ItemAttention(), {}),
    "three writes of every chunk": (SelfAttention(), {"repeats": 3, "stable_from": 4}),
    "three writes of every chunk, with a break": (BrokenAttention(), {"repeats": 3, "stable_from": 4}),
    "dynamic shapes": (SelfAttention(), {"dynamic": True}),
    "full graph": (SelfAttention(), {"fullgraph": True}),
    "aot_eager": (SelfAttention(), {"inner": "aot_eager"}),
    "inductor": (SelfAttention(), {"inner": "inductor"}),
    "inductor, bfloat16, several layers": (Network(), {"inner": "inductor", "dtype": torch.bfloat16}),
    "inductor, with a break": (BrokenAttention(), {"inner": "inductor"}),
}


@pytest.mark.parametrize("name", CASES)
def test_caches_are_packed_in_place_and_attended_closely(name: str) -> None:
    model, options = CASES[name]
    options = dict(options)
    batch, dtype = options.pop("batch", 1), options.pop("dtype", torch.float32)
    context, repeats = options.pop("context", torch.no_grad), options.pop("repeats", 1)
    stable_from = options.pop("stable_from", 2)
    torch.manual_seed(0)
    backend = fresh_backend(inner=options.pop("inner", "eager"))
    compiled, eager = twins(model.to(dtype), backend, **options)
    with context():
        cache, reference_cache = (model.new_cache(batch, 6 * CHUNK, dtype) for _ in range(2))  # type: ignore[operator]
        freed = watch_memory(plain_tensors(cache))
        run_beside(generate(compiled, eager, cache, reference_cache, batch, dtype, repeats), 6 * repeats, stable_from)
    tensors = plain_tensors(cache)
    assert all(is_packed(t) for t in tensors)
    assert freed()
    report = backend.memory()
    assert report.adopted == len(tensors)
    assert report.full_precision_bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_module_buffers_are_packed_in_place() -> None:
    torch.manual_seed(0)
    backend = fresh_backend()
    model = BufferAttention(tokens=6 * CHUNK)
    compiled, eager = twins(model, backend)

    def steps() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 6 * CHUNK, CHUNK):
            x = torch.randn(1, CHUNK, 256)
            yield compiled(x, start), eager(x, start)

    with torch.no_grad():
        run_beside(steps())
    assert is_packed(model.cache_k) and is_packed(model.cache_v)


@pytest.mark.parametrize("correction", ["none", "taylor", "exact"])
@pytest.mark.parametrize("bits", [2, 3, 4, (4, 2)], ids=str)
def test_output_is_what_the_reference_computes(bits: Any, correction: str) -> None:
    """The history quantized, corrected; the chunk that is written attended exactly, and never corrected."""
    torch.manual_seed(0)
    backend = fresh_backend(bits=bits, correction=correction)
    model = SelfAttention(kv_heads=2)
    compiled = torch.compile(model, backend=backend)
    key_bits, value_bits = bits if isinstance(bits, tuple) else (bits, bits)
    cache = model.new_cache(1, 64)
    history: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for start in range(0, 40, CHUNK):
            x = 3 * torch.randn(1, CHUNK, 256)
            q, k, v = (t.transpose(1, 2) for t in model.project(x))
            got = compiled(x, cache, start)
            if history:
                old_k, old_v = (torch.cat(t, 2) for t in zip(*history))
                packed = *reference.quantize(old_k, key_bits, 32), *reference.quantize(old_v, value_bits, 32)
                o, _ = reference.attention(
                    q, *packed, [0, start], k, v, None, False, 1 / 8, key_bits, value_bits, correction
                )
                assert relative_error(got, model.out(o.transpose(1, 2).flatten(2))) < 1e-5
            history.append((k, v))


@pytest.mark.parametrize("capture_scalar_outputs", [False, True])
def test_slices_that_eager_code_takes_show_a_cache_by_growing(capture_scalar_outputs: bool) -> None:
    """Slicing with a tensor breaks the graph: attention sees plain views, and the caches are packed after the second."""
    torch.manual_seed(0)
    backend = fresh_backend()
    compiled, eager = twins(TensorPositionAttention(), backend)
    cache, reference_cache = (eager.new_cache(1, 10 * CHUNK) for _ in range(2))  # type: ignore[operator]

    def steps() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.randn(1, CHUNK, 256)
            yield compiled(x, cache, 0), eager(x, reference_cache, 0)

    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=capture_scalar_outputs):
        if capture_scalar_outputs and torch.__version__ >= (2, 15):  # captures slices of lengths that it does not know
            with pytest.warns(NotRewrittenWarning, match="the model runs as written"):
                torch.testing.assert_close(*next(steps()))
            return
        run_beside(steps(), calls=8, stable_from=5)
    assert is_packed(cache["k"]) and is_packed(cache["v"])


def test_slices_of_what_stays_the_same_are_no_cache() -> None:
    """Keys of a text, computed once and sliced in every call: nothing grows."""
    torch.manual_seed(0)
    backend = fresh_backend(bits=2)
    text = torch.randn(2, 1, 4, 32, 64)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    compiled = torch.compile(attend, backend=backend)
    with torch.no_grad():
        for _ in range(4):
            q = torch.randn(1, 4, CHUNK, 64)
            k, v = text[0, :, :, :20], text[1, :, :, :20]
            torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
    assert not is_packed(text)


def test_memory_ratio_counts_every_byte() -> None:
    for group_size, ratio in ((32, 16 / 3.0), (64, 16 / 2.5)):
        backend = fresh_backend(bits=2, group_size=group_size)
        model = SelfAttention().bfloat16()
        compiled = torch.compile(model, backend=backend)
        cache = model.new_cache(1, 64, torch.bfloat16)
        with torch.no_grad():
            compiled(torch.randn(1, CHUNK, 256, dtype=torch.bfloat16), cache, 0)
        assert backend.memory().ratio == pytest.approx(ratio)


def test_a_graph_that_writes_keeps_its_chunk_exact_until_the_next_write() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2)
    model = BrokenAttention()
    compiled, eager = twins(model, backend)
    with torch.no_grad():
        cache, reference_cache = model.new_cache(1, 64), model.new_cache(1, 64)
        for start in range(0, 32, CHUNK):
            x = torch.randn(1, CHUNK, 256)
            compiled(x, cache, start)
            eager(x, reference_cache, start)
            active = cache["k"]._store.active
            assert (active.start, active.stop) == (start, start + CHUNK)
            torch.testing.assert_close(active.data.transpose(1, 2), reference_cache["k"][:, start : start + CHUNK])
        assert backend.memory().active_bytes == 2 * active.data.numel() * 4


@pytest.mark.parametrize("window", [{}, {"sink": 6, "recent": 8}], ids=str)
def test_inductor_makes_no_copy_of_the_packed_cache(window: dict[str, int]) -> None:
    from torch._inductor.utils import run_and_get_code

    backend = fresh_backend(inner="inductor", bits=2, **window)
    model = SelfAttention()
    compiled = torch.compile(model, backend=backend)
    cache = model.new_cache(1, 48)
    with torch.no_grad():
        compiled(torch.randn(1, CHUNK, 256), cache, 0)
        _, (code,) = run_and_get_code(compiled, torch.randn(1, CHUNK, 256), cache, CHUNK)
    body = code[code.index("def call(") :]
    calls = [line for line in body.splitlines() if "torch.ops.jkv" in line and not line.lstrip().startswith("#")]
    (append,) = [line for line in calls if "append" in line]
    attention = next(line for line in calls if "attention" in line)
    inputs = {name.strip() for name in body[body.index("\n") : body.index(" = args")].split(",")}
    stores = [name.strip() for name in append[append.index("(") + 1 :].split(",")[:4]]
    assert len(set(stores)) == 4 and set(stores) <= inputs, "append works on the caller's memory, not on a copy"
    assert all(name in attention for name in stores)
    held = [line[line.index("(") + 1 :].split(", ")[:2] for line in calls if "jkv.hold." in line]
    assert len(held) == (2 if window else 0)
    assert all(name in inputs and f"[{name}]" in attention for names in held for name in names)


class Untouched(SelfAttention):
    """Ordinary self-attention: no cache anywhere."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.project(x)
        return self.attend(*(t.transpose(1, 2) for t in (q, k, v)))


def test_a_graph_without_a_cache_passes_through_untouched() -> None:
    backend = fresh_backend()
    compiled, eager = twins(Untouched(), backend)
    x = torch.randn(1, CHUNK, 256)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x))
    (report,) = backend.reports
    assert (report.outcome, report.matches, report.after) == ("untouched", [], "")


def test_training_runs_as_written_and_says_so() -> None:
    backend = fresh_backend()
    model = SelfAttention()
    compiled, eager = twins(model, backend)
    cache, reference_cache = model.new_cache(1, 48), model.new_cache(1, 48)
    x = torch.randn(1, CHUNK, 256)
    with pytest.warns(NotRewrittenWarning, match="gradients are required"):
        got = compiled(x, cache, 0)
    got.sum().backward()
    eager(x, reference_cache, 0).sum().backward()
    torch.testing.assert_close(model.q.weight.grad, eager.q.weight.grad)
    assert not is_packed(cache["k"])


def test_group_size_that_does_not_divide_head_dim_is_named() -> None:
    backend = fresh_backend(group_size=48)
    model = SelfAttention()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad(), pytest.raises(Exception, match="group_size=48 does not divide this model's head_dim=64"):
        compiled(torch.randn(1, CHUNK, 256), model.new_cache(1, 48), 0)


class TestGraphs(expecttest.TestCase):
    def graph(self, model: nn.Module, index: int = 0, calls: int = 3) -> str:
        backend = fresh_backend(bits=2)
        compiled = torch.compile(model, backend=backend)
        cache = model.new_cache(1, 64)  # type: ignore[operator]
        with torch.no_grad():
            for call in range(calls):
                compiled(torch.randn(1, CHUNK, model.heads * model.head_dim), cache, call * CHUNK)  # type: ignore[operator]
        return rewritten(backend, index=index)

    def test_slice_write_and_slice_read(self) -> None:
        self.assertExpectedInline(
            self.graph(SelfAttention()),
            """\
q = linear.view(1, 8, 4, 64)
view_1 = linear_1.view(1, 8, 2, 4, 64)
unbind = view_1.unbind(2)
k = unbind[0]
v = unbind[1]
add = add(l_start_, 8)
permute = k.permute([0, 2, 1, 3])
permute_1 = v.permute([0, 2, 1, 3])
jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, permute, permute_1, l_start_, 2, 2)
transpose_2 = q.transpose(1, 2)
permute_2 = k.permute([0, 2, 1, 3])
permute_3 = v.permute([0, 2, 1, 3])
attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [0, l_start_], permute_2, permute_3, None, False, 0.125, 2, 2, 'taylor')
transpose_3 = attention_default.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear_2)
""",
        )

    def test_read_window(self) -> None:
        graph = self.graph(SelfAttention(layout="bhsd", window=20))
        sums = "add = add(l_start_, 8)\n", "sub = sub(add, 20)\n", "sym_max = sym_max(0, sub)\n"
        for line in sums:  # releases of torch put them at different places
            assert graph.count(line) == 1
            graph = graph.replace(line, "")
        self.assertExpectedInline(
            graph,
            """\
q = linear.view(1, 8, 4, 64)
view_1 = linear_1.view(1, 8, 2, 4, 64)
unbind = view_1.unbind(2)
k = unbind[0]
v = unbind[1]
transpose = k.transpose(1, 2)
transpose_1 = v.transpose(1, 2)
jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, transpose, transpose_1, l_start_, 2, 2)
transpose_2 = q.transpose(1, 2)
attention_default = jkv::attention(transpose_2, l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, [sym_max, l_start_], transpose, transpose_1, None, False, 0.125, 2, 2, 'taylor')
transpose_3 = attention_default.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear_2)
""",
        )

    def test_write_before_a_break_hands_out_its_chunk(self) -> None:
        self.assertExpectedInline(
            self.graph(BrokenAttention()),
            """\
q = linear.view(1, 8, 4, 64)
view_1 = linear_1.view(1, 8, 2, 4, 64)
unbind = view_1.unbind(2)
k = unbind[0]
v = unbind[1]
add = add(l_start_, 8)
permute = k.permute([0, 2, 1, 3])
permute_1 = v.permute([0, 2, 1, 3])
jkv::append_kv(l_cache_k__codes, l_cache_k__scales, l_cache_v__codes, l_cache_v__scales, permute, permute_1, l_start_, 2, 2)
permute_2 = k.permute([0, 2, 1, 3])
clone = permute_2.clone(memory_format=torch.contiguous_format)
permute_3 = v.permute([0, 2, 1, 3])
clone_1 = permute_3.clone(memory_format=torch.contiguous_format)
return (q, 1, add, 4, 64, 16384, 256, 64, 1, 0, 1, add, 4, 64, 16384, 256, 64, 1, 0, clone, l_start_, add, clone_1, l_start_, add)
""",
        )

    def test_attention_after_a_break_attends_the_active_chunk(self) -> None:
        self.assertExpectedInline(
            self.graph(BrokenAttention(), index=1),
            """\
transpose = l_q_.transpose(1, 2)
add = add(-2, l_keys__first_token)
add_1 = add(-2, s22)
add_2 = add(add_1, l_keys__first_token)
new_empty_default = aten::new_empty(transpose, [1, 4, 0, 64])
new_empty_default_1 = aten::new_empty(transpose, [1, 4, 0, 64])
attention_active_default = jkv::attention_active(transpose, l_keys__codes, l_keys__scales, l_values__codes, l_values__scales, l_keys__active, l_keys__active_range, l_values__active, l_values__active_range, add, add_2, new_empty_default, new_empty_default_1, None, False, 0.125, 2, 2, 'taylor')
transpose_3 = attention_active_default.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear)
""",
        )
