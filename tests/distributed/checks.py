"""What is checked on several ranks: each function runs on every one of them, see `launch`."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import zeros as sharded_zeros
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import examples.distributed as example
import jkv_compile.distributed as parallel
from jkv_compile import PackedKV, agreement, explain, is_packed, materialize
from jkv_compile.reasons import Reason, classify

from ..caches import assert_same_bits, new_cache, packed_data
from ..harness import BOUND, fresh_backend, relative_error
from ..models import Network
from .models import (
    CHUNK,
    DIM,
    HEAD_DIM,
    HEADS,
    HeadParallel,
    MergesByHand,
    SingleProcess,
    TokenParallel,
    all_to_all_in_the_graph,
    differentiable_all_to_all,
    hidden_all_to_all,
    replicated,
    rewritten_all_to_all,
)
from .models import new_cache as plain_cache

ALL_TO_ALLS = {
    f.__name__: f for f in (all_to_all_in_the_graph, rewritten_all_to_all, hidden_all_to_all, differentiable_all_to_all)
}
PACKED_8 = 1 + 4 / 32  # bytes of a channel at 8 bits, a step and a zero point for 32 of them


def beside_one_process(
    step: Callable[[Tensor, int], Tensor], model: nn.Module, part: slice = slice(None), calls: int = 4
) -> list[float]:
    """Errors of `step(chunk, start)` against one process in full precision, of this rank's `part` of the tokens."""
    single, cache = SingleProcess(), plain_cache()
    single.load_state_dict(model.state_dict())
    errors = []
    for call in range(calls):
        x = torch.randn(1, CHUNK, DIM)
        with torch.no_grad():
            want = single(x, cache, call * CHUNK)[:, part]
            got = step(x, call * CHUNK)
        assert got.shape == want.shape
        errors.append(relative_error(got, want))
    assert max(errors) < BOUND, errors
    assert max(errors) > 1e-4, "nothing was quantized: the test tests nothing"
    return errors


# ---- heads parted over the ranks ----


def head_parallel(rank: int, ranks: int, all_to_all: str = "all_to_all_in_the_graph") -> None:
    backend = fresh_backend()
    model, cache = HeadParallel(ranks, ALL_TO_ALLS[all_to_all]), plain_cache(heads=HEADS // ranks)
    compiled = torch.compile(model, backend=backend)
    part = slice(rank * CHUNK // ranks, (rank + 1) * CHUNK // ranks)
    beside_one_process(lambda x, start: compiled(x[:, part], cache, start), model, part)
    full = 2 * 64 * HEADS // ranks * HEAD_DIM * 4
    assert is_packed(cache["k"]) and is_packed(cache["v"])
    assert backend.memory().full_precision_bytes == full
    assert backend.memory().packed_bytes - backend.memory().active_bytes == full / 4 * PACKED_8, (
        "this rank's heads only"
    )


def head_parallel_rewritten(rank: int, ranks: int) -> None:
    head_parallel(rank, ranks, "rewritten_all_to_all")


def head_parallel_hidden(rank: int, ranks: int) -> None:
    head_parallel(rank, ranks, "hidden_all_to_all")


def head_parallel_differentiable(rank: int, ranks: int) -> None:
    head_parallel(rank, ranks, "differentiable_all_to_all")


# ---- tokens parted over the ranks ----


def token_parallel(rank: int, ranks: int, kind: type[TokenParallel] = TokenParallel, **settings: Any) -> None:
    backend = fresh_backend(**settings)
    model, cache, held = kind(), plain_cache(tokens=128 // ranks), 0
    compiled = torch.compile(model, backend=backend)

    def step(x: Tensor, start: int) -> Tensor:
        nonlocal held
        mine = start // CHUNK % ranks == rank
        held += CHUNK * mine
        out = compiled(x, cache, held, mine)
        dist.all_gather(outs := [torch.empty_like(out) for _ in range(ranks)], out)
        assert all(torch.equal(out, other) for other in outs), "ranks go on from the same bits"
        return out

    beside_one_process(step, model, calls=ranks + 3)
    assert is_packed(cache["k"]) and is_packed(cache["v"])
    assert all(match.lowering == "fused" for report in backend.reports for match in report.matches)


def token_parallel_rotated(rank: int, ranks: int) -> None:
    token_parallel(rank, ranks, quantizer="unbiased", inner="aot_eager")


def merged_by_hand(rank: int, ranks: int) -> None:
    """Every rank writes half of each chunk: none is ever without tokens."""
    backend = fresh_backend()
    model, cache = MergesByHand(), plain_cache()
    compiled, own = torch.compile(Halves(model, rank, ranks), backend=backend), CHUNK // ranks
    beside_one_process(lambda x, start: compiled(x, cache, start // CHUNK * own + own), model)
    assert is_packed(cache["k"]) and is_packed(cache["v"])


class Halves(nn.Module):
    """Each rank keeps its part of every chunk, and all queries."""

    def __init__(self, model: TokenParallel, rank: int, ranks: int) -> None:
        super().__init__()
        self.model, self.rank, self.ranks = model, rank, ranks

    def forward(self, x: Tensor, cache: dict[str, Tensor], held: int) -> Tensor:
        model, own = self.model, x.shape[1] // self.ranks
        q, k, v = model.project(x)
        part = slice(self.rank * own, self.rank * own + own)
        cache["k"][:, held - own : held] = k[:, part]
        cache["v"][:, held - own : held] = v[:, part]
        q, k, v = (t.transpose(1, 2) for t in (q, cache["k"][:, :held], cache["v"][:, :held]))
        return model.out(model.attend(q, k, v).transpose(1, 2).flatten(2))


class ContextParallel(Halves):
    """Each rank has its part of every chunk, of its queries too, and attends to all of it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor, cache: dict[str, Tensor], held: int) -> Tensor:
        own = x.shape[1] // self.ranks
        q, k, v = self.model.project(x[:, self.rank * own : self.rank * own + own])
        cache["k"][:, held - own : held] = k
        cache["v"][:, held - own : held] = v
        q, k, v = (t.transpose(1, 2) for t in (q, cache["k"][:, :held], cache["v"][:, :held]))
        return self.model.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class ContextParallelByCall(ContextParallel):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel.context_parallel_attention(q, k, v)


class OwnTokensOnly(ContextParallel):
    attend = staticmethod(F.scaled_dot_product_attention)  # PyTorch's own, whatever takes its place for a while


class CausalContextParallel(ContextParallel):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def shards(ranks: int) -> Any:
    """torch's own context parallelism, in which attention is that of all ranks' tokens."""
    return context_parallel(init_device_mesh("cpu", (ranks,)), buffers=[torch.zeros(1, CHUNK)], buffer_seq_dims=[1])


def context_parallel_packs(rank: int, ranks: int) -> None:
    """Tokens stay packed where they are, and queries travel: torch's own, and a model that calls ours."""
    own = CHUNK // ranks
    for kind, around in ((ContextParallel, shards), (ContextParallelByCall, contextlib.nullcontext)):
        backend = fresh_backend(inner="aot_eager")
        model, cache = TokenParallel().requires_grad_(False), plain_cache()
        compiled = torch.compile(kind(model, rank, ranks), backend=backend)

        def step(x: Tensor, start: int, compiled=compiled, cache=cache, around=around) -> Tensor:
            with around(ranks):
                return compiled(x, cache, start // CHUNK * own + own)

        beside_one_process(step, model, slice(rank * own, (rank + 1) * own))
        assert is_packed(cache["k"]) and is_packed(cache["v"])
        assert all(match.lowering == "fused" for report in backend.reports for match in report.matches)
        assert not any(report.rejections for report in backend.reports)


def causal_context_parallel_runs_as_written(rank: int, ranks: int) -> None:
    """Ranks hold tokens in an order of torch's own there."""
    backend, own = fresh_backend(), CHUNK // ranks
    model = CausalContextParallel(TokenParallel().requires_grad_(False), rank, ranks)
    compiled, cache, other, x = (
        torch.compile(model, backend=backend),
        plain_cache(),
        plain_cache(),
        torch.randn(1, 8, DIM),
    )
    with shards(ranks), torch.no_grad():
        torch.testing.assert_close(compiled(x, cache, own), model(x, other, own))
    assert not is_packed(cache["k"])
    assert ["a causal mask" in r.reason for report in backend.reports for r in report.rejections] == [True]


def context_parallel_spares_what_it_does_not_reach(rank: int, ranks: int) -> None:
    """Neither the model's attention nor what takes its place asks other ranks for anything."""
    backend, own = fresh_backend(inner="aot_eager"), CHUNK // ranks
    model = OwnTokensOnly(TokenParallel().requires_grad_(False), rank, ranks)
    compiled, cache, other = torch.compile(model, backend=backend), plain_cache(), plain_cache()
    with shards(ranks), torch.no_grad():
        for call in range(1, 4):
            x = torch.randn(1, CHUNK, DIM)
            assert relative_error(compiled(x, cache, call * own), model(x, other, call * own)) < BOUND
    assert is_packed(cache["k"]) and is_packed(cache["v"])


# ---- DTensors and FSDP ----


def dtensor_cache(rank: int, ranks: int) -> None:
    """Tensor parallelism with caches that are DTensors: packed shard by shard, and still DTensors to the model."""
    backend = fresh_backend(inner="aot_eager")
    mesh, model = init_device_mesh("cpu", (ranks,)), SingleProcess().requires_grad_(False)
    plain = copy.deepcopy(model)
    columns = {name: ColwiseParallel(use_local_output=False) for name in ("query", "key", "value")}
    parallelize_module(model, mesh, {**columns, "out": RowwiseParallel()})
    explained = explain(model, torch.randn(1, CHUNK, DIM), dtensors(mesh), 0, bits=8)
    assert len(explained.matches) == 1 and not explained.rejections, explained
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    caches = [dtensors(mesh) for _ in range(2)]  # the second comes when the first is packed
    for cache in caches:
        shards = {name: t._local_tensor for name, t in cache.items()}
        beside_one_process(lambda x, start, cache=cache: compiled(x, cache, start), plain)
        for name, tensor in cache.items():
            assert type(tensor) is DTensor and tensor.shape == (1, 64, HEADS, HEAD_DIM)
            assert tensor._local_tensor is shards[name] and is_packed(shards[name])
    assert backend.memory().packed_bytes == 2 * 2 * 64 * HEADS // ranks * HEAD_DIM * PACKED_8
    assert all(match.lowering == "fused" for report in backend.reports for match in report.matches)
    window = caches[0]["k"][:, 2:4]
    assert type(window) is DTensor and isinstance(window.to_local(), PackedKV), "slices in eager code stay packed"


def dtensors(mesh: Any, dim: int = 2) -> dict[str, Tensor]:
    shape = 1, 64, HEADS, HEAD_DIM
    return {name: sharded_zeros(*shape, device_mesh=mesh, placements=[Shard(dim)]) for name in ("k", "v")}


def dtensors_used_across_ranks(rank: int, ranks: int) -> None:
    """Caches that are sharded on tokens, or changed through a view that no shard has by itself, run as written."""
    mesh = init_device_mesh("cpu", (ranks,))

    def whole(q: Tensor, k: Tensor, v: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        cache["k"].copy_(k)
        cache["v"].copy_(v)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, cache["k"], cache["v"])))

    def changed(q: Tensor, k: Tensor, v: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        cache["k"][:, start : start + 8] = k
        cache["v"][:, start : start + 8] = v
        cache["k"].view(1, 64, HEADS * HEAD_DIM).mul_(1.5)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, cache["k"], cache["v"])))

    for step, dim in ((whole, 1), (changed, 2)):
        backend, cache, other = fresh_backend(), dtensors(mesh, dim), dtensors(mesh, dim)
        compiled = torch.compile(step, backend=backend)
        for call in range(2):
            tokens = 64 if step is whole else 8
            x = torch.randn(3, 1, tokens, HEADS, HEAD_DIM)
            arguments = [replicated(t, mesh).redistribute(placements=[Shard(dim)]) for t in x]
            with torch.no_grad():
                got, want = (f(*arguments, c, 8 * call).full_tensor() for f, c in ((compiled, cache), (step, other)))
            torch.testing.assert_close(got, want)
        assert not is_packed(cache["k"]._local_tensor)
        kinds = {classify(r.reason) for report in backend.reports for r in report.rejections}
        assert Reason.SHARDED in kinds, [report.rejections for report in backend.reports]


def fsdp_per_block(rank: int, ranks: int) -> None:
    backend = fresh_backend()
    model = Network(2, heads=2, head_dim=32)
    plain = copy.deepcopy(model)
    for layer in model.layers:
        layer.compile(backend=backend)
        fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
    fully_shard(model)
    cache, reference = model.new_cache(1, 64), plain.new_cache(1, 64)
    for call in range(4):
        x = torch.randn(1, 8, 64)
        with torch.no_grad():
            got, want = model(x, cache, 8 * call), plain(x, reference, 8 * call)
        assert relative_error(got, want) < BOUND
    assert isinstance(model.layers[0].q.weight, DTensor), "parameters are sharded between calls"
    assert all(is_packed(t) for layer in cache for t in layer.values())


# ---- caches from rank to rank ----


class Wire:
    """Counts what is handed to torch's collectives."""

    def __enter__(self) -> Wire:
        self.bytes, self.known = 0, (dist.send, dist.all_gather, dist.all_to_all_single)
        send, all_gather, all_to_all_single = self.known

        def counting(function: Callable[..., Any], argument: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.bytes += args[argument].nbytes
                return function(*args, **kwargs)

            return call

        dist.send, dist.all_gather = counting(send, 0), counting(all_gather, 1)
        dist.all_to_all_single = counting(all_to_all_single, 1)
        return self

    def __exit__(self, *_: object) -> None:
        dist.send, dist.all_gather, dist.all_to_all_single = self.known


def caches_move(rank: int, ranks: int) -> None:
    """Sent, gathered and parted anew, bit for bit, in 6.4 times fewer bytes than bfloat16 takes."""
    torch.manual_seed(rank)
    cache, _ = new_cache(bits=2, batch=1, tokens=512 + 16 * rank, heads=4, dtype=torch.bfloat16)
    with Wire() as wire:
        everyone = parallel.all_gather(cache)
    assert [t.shape[1] for t in everyone] == [512 + 16 * r for r in range(ranks)] and everyone[rank] is cache
    longest = 512 + 16 * (ranks - 1)
    assert longest * 4 * 64 * 2 / wire.bytes > 5.2, "5.33 in groups of 32, less the header"
    if rank == 0:
        with Wire() as wire:
            sent = parallel.send(cache[:, 8:520], 1)
        assert sent == wire.bytes
        assert 512 * 4 * 64 * 2 / sent > 5.2
    elif rank == 1:
        got = parallel.recv(0)
        assert_same_bits(packed_data(got), packed_data(everyone[0][:, 8:520]))
        assert got.dtype == torch.bfloat16 and got.shape == (1, 504, 4, 64)
    whole = torch.cat(everyone, 1)

    even = parallel.rebalance(cache, 1)
    sizes = [len(part) for part in torch.arange(whole.shape[1]).tensor_split(ranks)]
    first = sum(sizes[:rank])
    assert_same_bits(packed_data(even), packed_data(whole[:, first : first + sizes[rank]]))
    first_keeps_most = [whole.shape[1] - 3 * (ranks - 1), *[3] * (ranks - 1)]
    with Wire() as wire:
        moved = parallel.rebalance(cache, 1, first_keeps_most)
    assert moved.shape[1] == first_keeps_most[rank]
    assert_same_bits(packed_data(moved), packed_data(whole.split(first_keeps_most, 1)[rank]))
    assert rank or wire.bytes < 8192, "what stays is not sent"

    heads = parallel.exchange(cache, scatter_dim=2, gather_dim=1)
    own = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    assert_same_bits(packed_data(heads), packed_data(whole[:, :, own]))
    back = parallel.rebalance(parallel.exchange(heads, scatter_dim=1, gather_dim=2), 1, [t.shape[1] for t in everyone])
    assert_same_bits(packed_data(back), packed_data(cache))
    assert torch.equal(materialize(back), materialize(cache))


# ---- the example ----


def example_generates_what_one_process_does(rank: int, ranks: int) -> None:
    os.environ["WORLD_SIZE"] = str(ranks)
    lines = example.compare(example.parse_arguments(["--chunks", "1"]))
    one, heads, tokens = lines
    assert one.difference == 0 and heads.difference < 1e-3 and tokens.difference < 1e-3
    for line in (heads, tokens):
        assert line.packed_bytes == [one.packed_bytes[0] // ranks] * ranks
    assert one.outcome.full_bytes / one.outcome.packed_bytes == 6.4
    text = example.table(lines)
    assert f"tokens on {ranks}" in text and "6.40x" in text


# ---- ranks that differ, and ranks that die ----


def configurations_must_agree(rank: int, ranks: int) -> None:
    """Whoever comes later is told, and whoever came first when it next compiles; nobody waits."""

    def forward(x: Tensor) -> Tensor:
        return x + 1

    def message(backend: Any) -> str:
        torch._dynamo.reset()
        try:
            torch.compile(forward, backend=backend)(torch.ones(3))
        except Exception as error:
            return str(error)
        return ""

    dist.barrier()
    backend = fresh_backend(bits=3 if rank == 0 else 4)
    if rank == 0:  # no other rank has used it: nothing waits
        assert message(backend) == ""
    dist.barrier()
    if rank > 0:
        text = message(backend)
        assert "different configurations" in text and f"rank {rank} has Config(bits=4" in text, text
        assert "rank 0 has Config(bits=3" in text
    dist.barrier()
    assert "different configurations" in message(backend)
    parallel.allow_different_configurations()
    assert message(backend) == ""
    agreement._allowed = False
    agreement.default_store().delete_key(agreement._CONFLICT)
    dist.barrier()


def last_rank_dies(rank: int, ranks: int) -> None:
    """The others meet torch's own error."""
    backend = fresh_backend()
    model, cache = HeadParallel(ranks), plain_cache(heads=HEADS // ranks)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(torch.randn(1, CHUNK // ranks, DIM), cache, 0)
        if rank == ranks - 1:
            os._exit(0)
        try:
            for call in (1, 2):
                compiled(torch.randn(1, CHUNK // ranks, DIM), cache, call * CHUNK)
        except RuntimeError as error:
            assert "onnection" in str(error) or "imed out" in str(error), error
            return
    raise AssertionError("a collective without one of its ranks went on")
