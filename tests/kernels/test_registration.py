"""The operators as PyTorch sees them: eager, under aot_eager and under Inductor, on the CPU and on a GPU alike."""

from __future__ import annotations

import time

import pytest
import torch

from jkv_compile.kernels import reference  # registers the operators

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
OPTIONS = (False, 0.125, 2, 2, "taylor")  # causal, scale, bits of keys and values, correction


def packed(tokens: int, device: str, filled: bool = True):
    data = torch.randn(1, 2, tokens, 64) if filled else torch.zeros(1, 2, tokens, 64)
    return [t.to(device) for t in reference.quantize(data, 2, 32)]


def step(store, query, key, value, start: int):
    """What a rewritten graph does: attend to what is cached and to the chunk, then append the chunk."""
    output = torch.ops.jkv.attention(query, *store, [0, start], key, value, None, *OPTIONS)
    torch.ops.jkv.append_kv(*store, key, value, start, 2, 2)
    return output + 1, torch.ops.jkv.dequantize(*store[:2], 0, start + key.shape[2], 2, torch.float32)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_step_equals_the_eager_one(device, backend):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 10, 64, device=device) for h in (4, 2, 2))
    initial = packed(60, device) + packed(60, device)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for start in (20, 30, 45):  # the second start makes it dynamic
        eager_store, store = ([t.clone() for t in initial] for _ in range(2))
        expected = step(eager_store, query, key, value, start)
        actual = compiled(store, query, key, value, start)
        torch.testing.assert_close(actual, expected)
        assert all(torch.equal(a, b) for a, b in zip(store, eager_store)), "the cache was not written in place alike"
        assert not torch.equal(store[0], initial[0])


@pytest.mark.parametrize("device", DEVICES)
def test_append_kv_passes_opcheck_and_is_two_appends(device):
    torch.manual_seed(0)
    key, value = (torch.randn(1, 2, 7, 64, device=device) for _ in range(2))
    joint, apart = (packed(20, device, filled=False) + packed(20, device, filled=False) for _ in range(2))
    torch.library.opcheck(torch.ops.jkv.append_kv.default, (*joint, key, value, 5, 2, 2))
    torch.ops.jkv.append_kv(*joint, key, value, 5, 2, 2)
    torch.ops.jkv.append(*apart[:2], key, 5, 2)
    torch.ops.jkv.append(*apart[2:], value, 5, 2)
    assert all(torch.equal(a, b) for a, b in zip(joint, apart))


@pytest.mark.parametrize("start", [-1, 14])
def test_append_kv_writes_nothing_where_the_range_does_not_fit(start):
    store = packed(20, "cpu", filled=False) + packed(20, "cpu", filled=False)
    before = [t.clone() for t in store]
    with pytest.raises(RuntimeError, match="do not lie within"):
        torch.ops.jkv.append_kv(*store, torch.randn(1, 2, 7, 64), torch.randn(1, 2, 7, 64), start, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(store, before))


def test_operators_that_read_numbers_from_a_cpu_tensor_are_left_out_of_cuda_graphs():
    names = [name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("jkv::")]
    operators = [getattr(torch.ops.jkv, name).default for name in names]
    told = "active_range", "held_ranges", "extents", "places"
    reading = {op for op in operators if any(a.name.endswith(told) for a in op._schema.arguments)}
    assert len(reading) == 25
    assert {op for op in operators if torch.Tag.cudagraph_unsafe in op.tags} == reading


def test_calling_an_operator_costs_microseconds():
    store = packed(20, "cpu")
    empty = torch.zeros(1, 2, 0, 64)
    call = torch.ops.jkv.append.default
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(100):
            call(*store, empty, 0, 2)
        best = min(best, (time.perf_counter() - begin) / 100)
    assert best < 50e-6, f"{best * 1e6:.1f} µs a call"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("queries", [1, 10, 3000])
def test_a_captured_cuda_graph_replays_on_new_data(queries):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, queries, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    store = packed(4096, "cuda") + packed(4096, "cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(store, query, key, value, 500)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(store, query, key, value, 500)
    query.copy_(torch.randn_like(query))
    graph.replay()
    torch.testing.assert_close(captured[0], step(store, query, key, value, 500)[0])
