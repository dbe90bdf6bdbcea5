"""`offload="cpu"`: packed caches that live in host memory compute the same bits, and only what must moves.

On CPUs "the device" is memory as well, and copies need no stream: slots, eviction, prefetch and the account of bytes are
the same code. What a stream adds is put to the test by lanes that copy as late as they may, and by streams that write
down what they are asked for. Nothing here was run on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from jkv_compile import (
    Config,
    ConfigurationError,
    JKVBackend,
    OffloadWarning,
    PackedCacheError,
    PackedKV,
    is_packed,
    jkv_backend,
    materialize,
)
from jkv_compile.distributed import pack_bytes, unpack_bytes
from jkv_compile.host_memory import HostMemory, Lane
from jkv_compile.offload import Offload, Traffic
from jkv_compile.store import Family, Store
from tests.caches import AXES, assert_same_bits, new_cache, packed_data
from tests.test_packed_state_machine import PackedCacheMachine

from ..harness import fresh_backend, twins
from ..idioms.cases import CASES
from ..models import BrokenAttention, Network, SelfAttention
from .test_bad_input import Faulty

ROOT = Path(__file__).parents[2]
TOKENS, CHUNK, DIM = 64, 8, 128
LAYERS = 4
ROW = 2 * (16 + 2 * 4)  # bytes of a token: two heads of 64 channels at 2 bits, each in two groups
FULL = 2 * 64 * 4  # in float32


def offloaded(**settings: Any) -> JKVBackend:
    """A backend that has moved nothing yet."""
    backend = fresh_backend(bits=2, offload="cpu", **settings)
    backend._state.stores.offload = Offload()
    return backend


def offload_of(backend: JKVBackend) -> Offload:
    offload = backend._state.stores.offload
    assert offload is not None
    return offload


def traffic(backend: JKVBackend) -> Traffic:
    moved = backend.memory().traffic
    assert moved is not None
    return moved


def staged(backend: JKVBackend) -> list[HostMemory]:
    return list(offload_of(backend)._staged)


def take_away(backend: JKVBackend) -> None:
    """Everything leaves the device, and the slots hold garbage."""
    offload = offload_of(backend)
    for host in staged(backend):
        offload.evict(host)
    for slot in (slot for free in offload._free.values() for slot in free):
        slot.codes.fill_(255)
        slot.scales.fill_(torch.nan)
        slot.filled = slot.codes.shape[2]


# ---- the same bits ----

IDIOMS = (
    "eviction by rolling, with a sink",
    "a fixed past, concatenated",
    "a fixed past, turned in halves after the read",
    "a concatenation that grows and is returned",
    "keys beside values in one tensor",
    "keys and values stacked, batch of two",
    "two caches, concatenated",
    "a whole buffer under a boolean mask",
    "a buffer rolled and copied back",
    "a copy edited and attended, written back in the graph",
    "a copy edited and attended, written back in eager code",
    "a concatenation of sink, window and current chunk",
    "buffers allocated in the first forward",
)
COMPILED = ("eviction by rolling, with a sink", "a concatenation that grows and is returned")


def outputs(name: str, backend: JKVBackend, after_call: Callable[[], None], calls: int = 10) -> list[Tensor]:
    steps, stable_from = CASES[name]
    torch.manual_seed(0)
    results, generator = [], steps(backend)
    for call in range(calls):
        stance = torch.compiler.set_stance("fail_on_recompile") if call >= stable_from else contextlib.nullcontext()
        with stance, torch.no_grad():
            results.append(next(generator)[0])
        after_call()
    return results


@pytest.mark.filterwarnings("ignore::jkv_compile.NotRewrittenWarning")
@pytest.mark.parametrize("name, inner", [(n, "eager") for n in IDIOMS] + [(n, "inductor") for n in COMPILED])
def test_every_idiom_computes_the_same_bits_and_compiles_as_often(name: str, inner: str) -> None:
    """Nothing stays on the device between calls, so that everything is brought, and what is not is garbage."""
    want = outputs(name, fresh_backend(bits=2, inner=inner), lambda: None)
    backend = offloaded(inner=inner)
    got = outputs(name, backend, lambda: take_away(backend))
    assert all(map(torch.equal, got, want))
    assert traffic(backend).to_device and traffic(backend).from_device


class Layers:
    """Layers that are compiled one by one, called in their order, and their caches."""

    def __init__(self, backend: JKVBackend | None, layers: int = LAYERS, seed: int = 0, kind: Any = SelfAttention):
        torch.manual_seed(seed)
        models = [kind(heads=2).requires_grad_(False) for _ in range(layers)]
        self.layers = models if backend is None else [torch.compile(model, backend=backend) for model in models]
        self.caches = [model.new_cache(1, TOKENS) for model in models]
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, start: int) -> Tensor:
        x = torch.randn(1, CHUNK, DIM, generator=self.generator)
        for layer, cache in zip(self.layers, self.caches):
            x = layer(x, cache, start)
        return x

    def hosts(self) -> list[tuple[HostMemory, HostMemory]]:
        return [tuple(cache[name]._store.host for name in ("k", "v")) for cache in self.caches]  # type: ignore[misc]


def run(model: Callable[[int], Tensor], chunks: int = 6, passes: int = 2) -> list[Tensor]:
    return [model(chunk * CHUNK) for chunk in range(chunks) for _ in range(passes)]


@pytest.mark.parametrize("kind", [SelfAttention, BrokenAttention], ids=["one graph", "write and attention apart"])
def test_layers_in_turns_compute_the_same_bits(kind: Any) -> None:
    want = run(Layers(fresh_backend(bits=2), kind=kind))
    got = run(Layers(offloaded(), kind=kind))
    assert all(map(torch.equal, got, want))


def test_a_configuration_that_does_not_offload_can_use_what_another_has_offloaded() -> None:
    model, other = Layers(offloaded()), Layers(fresh_backend(bits=2))
    want = run(model, 2)
    model.layers = [
        torch.compile(layer._orig_mod, backend=jkv_backend(bits=2, inner="eager")) for layer in model.layers
    ]
    run(other, 2)
    want, got = run(other, 3, 1), run(model, 3, 1)
    assert all(map(torch.equal, got, want))
    assert all(host is not None for pair in model.hosts() for host in pair)


# ---- what is on the device, and what moves ----


def test_two_layers_are_on_the_device_and_all_others_in_host_memory() -> None:
    backend = offloaded()
    model = Layers(backend)
    run(model)
    one = 2 * TOKENS * ROW
    report = backend.memory()
    assert (report.adopted, report.host_bytes, report.packed_bytes) == (2 * LAYERS, LAYERS * one, LAYERS * one)
    assert report.staging_bytes == 2 * one
    assert {host for host in staged(backend)} == {*model.hosts()[-1], *model.hosts()[0]}, "the last, and the next"
    for cache in model.caches:
        assert all(t.untyped_storage().nbytes() == 0 for name in ("k", "v") for t in cache[name]._store.memory)
        assert cache["k"].device == torch.device("cpu") and is_packed(cache["k"])


def test_bytes_are_counted_exactly() -> None:
    """A layer's tokens so far are brought once per pass; the chunk that it writes goes back; nothing else moves."""
    backend = offloaded()
    model = Layers(backend)
    run(model, chunks=2)
    before, start = traffic(backend), 2 * CHUNK
    model(start)
    now = traffic(backend)
    # The first layer was brought while the last call ran; in its place it is brought for the next one, a chunk longer.
    brought = 2 * ((LAYERS - 1) * start + start + CHUNK)
    assert now.to_device - before.to_device == brought * ROW
    assert now.full_to_device - before.full_to_device == brought * FULL
    assert now.from_device - before.from_device == 2 * LAYERS * CHUNK * ROW
    assert now.full_from_device - before.full_from_device == 2 * LAYERS * CHUNK * FULL


@pytest.mark.parametrize("settings, ratio", [
    ({"group_size": 32}, 5 + 1 / 3), ({"group_size": 64}, 6.4), ({"group_size": 64, "preset": "memory"}, 6.4),
    ({"group_size": 64, "preset": "smallest"}, 16 / 2.25),  # four bytes of steps in a row are padded to eight
], ids=str)  # fmt: skip
def test_as_much_less_moves_as_is_stored(settings: dict[str, Any], ratio: float) -> None:
    backend = fresh_backend(bits=2, offload="cpu", **settings)
    backend._state.stores.offload = Offload()
    model = SelfAttention(heads=4).bfloat16().requires_grad_(False)  # steps of a token then take 8 bytes, as rows do
    compiled, caches = torch.compile(model, backend=backend), [model.new_cache(1, TOKENS, torch.bfloat16) for _ in "ab"]
    for start in range(0, 4 * CHUNK, CHUNK):
        for cache in caches:
            compiled(torch.randn(1, CHUNK, 2 * DIM).bfloat16(), cache, start)
    assert traffic(backend).ratio == pytest.approx(ratio)
    assert "moved to the device" in str(backend.memory())
    assert backend.memory().to_dict()["traffic"]["to_device"] == traffic(backend).to_device


def test_only_the_range_that_is_written_goes_back() -> None:
    """Rows outside of it are never touched, not even by the same bytes: here they are others by then."""
    backend = offloaded()
    model = Layers(backend, layers=1)
    run(model, chunks=3)
    ((host, _),) = model.hosts()
    (page,) = host.pages
    page.fill_(7)
    model(3 * CHUNK)
    written = slice(3 * CHUNK, 4 * CHUNK)
    assert (page[: written.start] == 7).all() and (page[written.stop :] == 7).all()
    assert (page[written] != 7).any()


def test_a_cache_that_moves_as_a_whole_goes_back_as_a_whole() -> None:
    """Eviction: the tokens that moved and the new ones, all that lie behind a sink of 4."""
    name = "eviction by rolling, with a sink"
    backend, counted = offloaded(), []

    def count() -> None:
        (store, *_) = backend._state.stores
        counted.append((traffic(backend).from_device, store.shape[2], store.host.row))

    outputs(name, backend, count, calls=8)
    (before, capacity, row), (now, *_) = counted[-2:]
    assert now - before == 2 * (capacity - 4) * row


def test_reads_in_eager_code_bring_what_they_show() -> None:
    backend = offloaded()
    model = Layers(backend, layers=2)
    run(model, chunks=3)
    take_away(backend)
    before, cache = traffic(backend), model.caches[0]["k"]
    materialize(cache[:, 4:10])
    assert traffic(backend).to_device - before.to_device == 6 * ROW
    cache[:, 2:4] = torch.ones(2, 2, 64)
    moved = traffic(backend)
    assert moved.from_device - before.from_device == 2 * ROW + 2 * FULL, "packed, and held in full precision"
    cache[:, 2:4].zero_()
    assert traffic(backend).from_device - moved.from_device == 2 * ROW


def test_learned_order_brings_the_next_layer_while_a_layer_runs() -> None:
    backend = offloaded()
    model = Layers(backend)
    run(model, chunks=2)
    seen: list[list[bool]] = []

    def watch(layer: Any) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            seen.append([pair[0].slot is not None for pair in model.hosts()])
            return layer(*args)

        return call

    model.layers = [watch(layer) for layer in model.layers]
    model(2 * CHUNK)
    assert seen == [[True, False, False, True], [True, True, False, False], [False, True, True, False], [False, False, True, True]]  # fmt: skip


def test_growing_caches_append_to_host_memory() -> None:
    name = "a concatenation that grows and is returned"
    backend, counted = offloaded(), []

    def count() -> None:
        capacity = max((s.memory[0].shape[2] for s in backend._state.stores if s.grows), default=0)
        counted.append((traffic(backend).from_device, capacity))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs(name, backend, count)
    capacities = {capacity for _, capacity in counted}
    steps = {b - a for (a, _), (b, _) in pairwise(counted[3:])}
    assert len(capacities) > 2 and len(steps) == 1, "new tokens alone, also where memory is outgrown"


# ---- eager code ----

FAMILY = Family("taylor", Offload())


class OffloadedMachine(PackedCacheMachine):
    """All that `PackedCacheMachine` does, with the cache and all that is made of it in host memory."""

    @initialize(
        layout=st.sampled_from(sorted(AXES)),
        batch=st.integers(1, 2),
        seed=st.integers(0, 2**16),
        quantizer=st.sampled_from(["rtn", "rtn/pairs64", "symmetric", "symmetric/pairs64"]),
        sink=st.sampled_from([0, 0, 5, 20]),
        recent=st.sampled_from([0, 0, 3, 20]),
    )
    def allocate(self, layout: str, batch: int, seed: int, quantizer: str, sink: int, recent: int) -> None:
        super().allocate(layout, batch, seed, quantizer, sink, recent)
        self.cache._store.join(FAMILY)

    @rule()
    def take_away(self) -> None:
        for host in list(FAMILY.offload._staged):  # type: ignore[union-attr]
            FAMILY.offload.evict(host)  # type: ignore[union-attr]


TestOffloadedMachine = OffloadedMachine.TestCase
TestOffloadedMachine.settings = settings(max_examples=25, stateful_step_count=15, deadline=None, derandomize=True)


def both(**arguments: Any) -> tuple[Tensor, Tensor]:
    """The same cache offloaded and not."""
    torch.manual_seed(0)
    here, _ = new_cache(bits=2, **arguments)
    torch.manual_seed(0)
    away, _ = new_cache(bits=2, **arguments)
    away._store.join(Family("taylor", Offload()))  # type: ignore[attr-defined]
    return away, here


def saved(cache: Tensor) -> Tensor:
    file = BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file)


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": torch.clone,
    "clone of a slice": lambda c: c[:, 3:9].clone(),
    "deepcopy": copy.deepcopy,
    "to its device": lambda c: c.to("cpu", copy=True),
    "saved and loaded": saved,
    "as flat bytes": lambda c: unpack_bytes(pack_bytes(c)),
    "cat": lambda c: torch.cat([c[:, :5], c[:, 8:]], 1),
    "rolled": lambda c: c.roll(3, 1),
    "batch entries chosen": lambda c: c.index_select(0, torch.tensor([1, 0])),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_have_the_same_bits(copied: Callable[[Tensor], Tensor]) -> None:
    away, here = both()
    away[:, 2:6], here[:, 2:6] = (torch.ones(2, 4, 2, 64) for _ in range(2))  # also held in full precision
    got, want = copied(away), copied(here)
    assert is_packed(got)
    assert_same_bits(packed_data(got), packed_data(want))
    assert torch.equal(materialize(got), materialize(want))


def test_flat_bytes_are_the_same() -> None:
    away, here = both()
    assert torch.equal(pack_bytes(away), pack_bytes(here))


def test_a_loaded_cache_is_offloaded_when_a_graph_uses_it() -> None:
    backend = offloaded()
    model = Layers(backend, layers=1)
    run(model, chunks=3)
    loaded = {name: saved(cache) for name, cache in model.caches[0].items()}
    assert loaded["k"]._store.host is None
    x = torch.randn(1, CHUNK, DIM)
    want = model.layers[0](x, model.caches[0], 3 * CHUNK)
    assert torch.equal(model.layers[0](x, loaded, 3 * CHUNK), want)
    assert loaded["k"]._store.host is not None and backend.memory().adopted == 4


def test_sharing_its_memory_with_other_processes_is_refused() -> None:
    away, _ = both()
    with pytest.raises(PackedCacheError, match=r"share_memory_\(\) of an offloaded cache"):
        away.share_memory_()
    assert not away.is_shared() and not away.is_pinned()


# ---- exceptions, threads, several models ----


def test_an_exception_inside_a_call_leaves_the_cache_as_it_was() -> None:
    """Better than without offloading: what a failed call wrote, it wrote to a slot, and that never goes back."""
    backend = offloaded()
    model = Faulty(heads=2)
    compiled, eager = twins(model, backend)
    reference = torch.compile(eager, backend=jkv_backend(bits=2, inner="eager"))
    ours, theirs = model.new_cache(1, TOKENS), model.new_cache(1, TOKENS)
    fine, missing = torch.tensor([1]), torch.tensor([9])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for start in (0, CHUNK):
            x = torch.randn(1, CHUNK, DIM)
            assert torch.equal(compiled(x, ours, start, fine), reference(x, theirs, start, fine))
        before, moved = packed_data(ours["k"]), traffic(backend).from_device
        x = torch.randn(1, CHUNK, DIM)
        with pytest.raises((RuntimeError, IndexError)):
            compiled(x, ours, 2 * CHUNK, missing)
        assert traffic(backend).from_device == moved and not staged(backend)
        assert_same_bits(packed_data(ours["k"]), before)
        assert torch.equal(compiled(x, ours, 2 * CHUNK, fine), reference(x, theirs, 2 * CHUNK, fine))
    assert all(host.users == 0 for host in staged(backend))


def test_a_copy_that_fails_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = offloaded()
    model = Layers(backend, layers=2)
    run(model, chunks=2)
    take_away(backend)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room for a slot")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(HostMemory, "copy_in", full)
        model(2 * CHUNK)
    model.generator.manual_seed(1)
    got = model(2 * CHUNK)
    other = Layers(fresh_backend(bits=2), layers=2)
    run(other, chunks=2)
    other.generator.manual_seed(1)
    assert torch.equal(got, other(2 * CHUNK))


def test_threads_with_a_model_each_share_a_backend() -> None:
    """Each thread has its own order of layers, and takes slots from none of the others."""

    def generate(backend: JKVBackend, threads: bool) -> list[list[Tensor]]:
        models = [Layers(backend, seed=i) for i in range(3)]
        results = [run(model, chunks=2) for model in models]  # compiled by now

        def work(i: int) -> None:
            results[i] += [models[i](chunk * CHUNK) for chunk in range(2, 6) for _ in range(2)]

        workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for worker in workers:
            worker.start() if threads else worker.run()
        for worker in workers if threads else ():
            worker.join()
        return results

    want = generate(fresh_backend(bits=2), threads=False)
    backend = offloaded()
    got = generate(backend, threads=True)
    assert all(torch.equal(a, b) for a, b in zip(chain(*got), chain(*want), strict=True))
    assert backend.memory().staging_bytes <= 4 * 2 * 2 * TOKENS * ROW  # this thread's, too


def test_two_models_in_turns_share_slots() -> None:
    want = [run(Layers(fresh_backend(bits=2), seed=i)) for i in range(2)]
    backend = offloaded()
    models = [Layers(backend, seed=i) for i in range(2)]
    got: list[list[Tensor]] = [[], []]
    for start in range(0, 6 * CHUNK, CHUNK):
        for _ in range(2):
            for results, model in zip(got, models):
                results.append(model(start))
    assert all(map(torch.equal, chain(*got), chain(*want)))
    assert backend.memory().staging_bytes == 2 * 2 * TOKENS * ROW
    assert backend.memory().adopted == 4 * LAYERS


ONE_RANK = """
import warnings
import torch.distributed as dist
from tests.distributed import checks
from tests.harness import fresh_backend
warnings.simplefilter("ignore")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
made = []
checks.fresh_backend = lambda **settings: made.append(fresh_backend(offload="cpu", **settings)) or made[-1]
checks.dtensor_cache(0, 1)
assert made[-1].memory().traffic.from_device > 0
dist.destroy_process_group()
"""


def test_shards_of_dtensors_are_offloaded() -> None:
    """The check of `tests.distributed`, by a process that holds all heads."""
    done = subprocess.run([sys.executable, "-c", ONE_RANK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_slots_and_rows_go_with_the_caches() -> None:
    backend = offloaded()
    model = Layers(backend)
    run(model, chunks=2)
    del model.caches
    assert not staged(backend) and backend.memory().host_bytes == 0


@pytest.mark.filterwarnings("ignore::jkv_compile.PackedReadWarning")
def test_a_write_in_eager_code_is_seen_by_a_layer_that_was_brought_before() -> None:
    backends = fresh_backend(bits=2), offloaded()
    results = []
    for backend in backends:
        model = Layers(backend)
        run(model, chunks=3)  # the first layer is there already, for the next call
        model.caches[0]["v"][:, 4:8] = 2.0
        model.caches[0]["v"][:, 12:14].zero_()
        results.append(model(3 * CHUNK))
    assert torch.equal(*results)


# ---- streams ----


class LateLane(Lane):
    """Copies are done as late as they may: when computation waits for them, or their memory is freed."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.asked: list[Callable[[], object]] = []
        self.done = 0

    def run(self, copy: Callable[[], object]) -> int:
        self.asked.append(copy)
        return len(self.asked)

    def hand_over(self, copied: int, *tensors: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for copy in self.asked[self.done : copied]:
                copy()
        self.done = max(self.done, copied)

    def free(self, tensor: Tensor) -> None:
        self.finish()
        super().free(tensor)

    def finish(self) -> None:
        self.hand_over(len(self.asked))


@pytest.mark.filterwarnings("ignore::jkv_compile.NotRewrittenWarning")
@pytest.mark.parametrize("name", IDIOMS)
def test_computation_waits_for_all_that_it_needs(name: str) -> None:
    want = outputs(name, fresh_backend(bits=2), lambda: None)
    backend = offloaded()
    offload_of(backend)._lanes[torch.device("cpu")] = LateLane(torch.device("cpu"))
    assert all(map(torch.equal, outputs(name, backend, lambda: None), want))


def test_computation_does_not_wait_for_what_comes_next() -> None:
    """While a layer runs, the next one's copy is pending; nothing but the next call waits for it."""
    want = run(Layers(fresh_backend(bits=2)))
    backend = offloaded()
    lane = offload_of(backend)._lanes[torch.device("cpu")] = LateLane(torch.device("cpu"))
    model = Layers(backend)
    run(model, chunks=2)
    pending: list[int] = []

    def watch(layer: Any) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            result = layer(*args)
            pending.append(len(lane.asked) - lane.done)
            return result

        return call

    model.layers = [watch(layer) for layer in model.layers]
    got = [model(chunk * CHUNK) for chunk in range(2, 6) for _ in range(2)]
    assert all(map(torch.equal, got, want[4:]))
    assert min(pending) >= 4, "the next layer's keys and values, and what this one has written of both"


class Journal(list[str]):
    """What streams were asked for."""


class FakeStream:
    """A stream that copies at once, and writes down what it is asked for."""

    def __init__(self, name: str, journal: Journal) -> None:
        self.name, self.journal = name, journal

    def __enter__(self) -> None:
        self.journal.append(f"{self.name}: copy")

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: FakeStream) -> None:
        self.journal.append(f"{self.name}: wait for {other.name}")

    def record_event(self) -> str:
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.journal.append(f"{self.name}: wait for {event}")

    def synchronize(self) -> None:
        self.journal.append(f"host: wait for {self.name}")


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    journal = Journal()
    compute, copies = FakeStream("compute", journal), FakeStream("copies", journal)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: compute)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: journal.append(f"{stream.name}: holds memory"))
    monkeypatch.setattr(Lane, "__init__", lambda self, device: self.__dict__.update(device=device, stream=copies))
    yield journal


def test_streams_wait_for_each_other_and_the_host_for_neither(journal: Journal) -> None:
    """Every copy waits for what was computed before it; a call waits for its own caches alone."""
    backend = offloaded()
    model = Layers(backend)
    want = run(Layers(None), chunks=1, passes=1)
    run(model, chunks=2)
    journal.clear()
    model(2 * CHUNK)
    assert want[0].shape == (1, CHUNK, DIM)
    lines = [line for line in journal if "memory" not in line]
    assert "host: wait for copies" not in lines
    copied = [i for i, line in enumerate(lines) if line == "copies: copy"]
    waits = [i for i, line in enumerate(lines) if line == "copies: wait for compute"]
    assert waits and all(any(w < c for w in waits) for c in copied)
    assert lines.count("compute: wait for event of copies") == 2 * LAYERS, "for keys and values of each layer"


# ---- what is refused, and settings ----


def test_a_whole_model_in_one_graph_is_warned_of() -> None:
    network = Network(layers=3, heads=2).requires_grad_(False)
    compiled, cache = torch.compile(network, backend=offloaded()), network.new_cache(1, TOKENS)
    with pytest.warns(OffloadWarning, match="one graph uses 6 caches: while it runs, all of them are on the device"):
        for start in (0, CHUNK):
            compiled(torch.randn(1, CHUNK, DIM), cache, start)


@pytest.mark.parametrize("settings", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}])
def test_cuda_graphs_are_refused(settings: dict[str, Any]) -> None:
    model = SelfAttention(heads=2)
    compiled = torch.compile(model, backend=offloaded(inner="inductor"), **settings)
    with pytest.raises(BackendCompilerFailed, match=r"offload='cpu' with CUDA graphs.*use another mode") as caught:
        compiled(torch.randn(1, CHUNK, DIM), model.new_cache(1, TOKENS), 0)
    assert isinstance(caught.value.inner_exception, ConfigurationError)


@pytest.mark.parametrize("value", ["disk", "cuda", True, 0, ["cpu"]])
def test_bad_values_are_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"offload=.*: expected one of \(None, 'cpu'\)"):
        Config(offload=value)


def test_it_is_part_of_the_configuration() -> None:
    one, other = jkv_backend(offload="cpu"), jkv_backend()
    assert one != other and hash(one) != hash(other) and one == jkv_backend(offload="cpu")
    assert "offload='cpu'" in repr(one)
    assert other.memory().traffic is None and "moved" not in str(other.memory())


def test_by_name() -> None:
    model = SelfAttention(heads=2).requires_grad_(False)
    compiled = torch.compile(model, backend="jkv", options={"bits": 2, "inner": "eager", "offload": "cpu"})
    cache = model.new_cache(1, TOKENS)
    compiled(torch.randn(1, CHUNK, DIM), cache, 0)
    assert isinstance(cache["k"], PackedKV) and cache["k"]._store.host is not None


# ---- pieces ----


@pytest.mark.parametrize("page", [1, 200, 2**24], ids=["a token a page", "a few tokens a page", "one page"])
@pytest.mark.parametrize("bits, heads, head_dim", [(2, 1, 32), (3, 2, 64), (8, 3, 96), (4, 1, 160)])
@pytest.mark.parametrize("quantizer", ["rtn", "symmetric"])
def test_rows_hold_any_range(
    page: int, bits: int, heads: int, head_dim: int, quantizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jkv_compile.host_memory.PAGE", page)
    shape, strides = (2, heads, 20, head_dim), (1, 1, 1, 1)
    store = Store.empty(shape, strides, torch.float32, bits, 32, torch.device("cpu"), quantizer)
    store.write(torch.randn(2, heads, 16, head_dim), (0, 0, 0, 0), keep_active=False)
    codes, scales = (t.clone() for t in store.data())
    store.join(Family("none", Offload()))
    assert store.host is not None and store.host.filled == 16
    for start, stop in ((0, 20), (3, 4), (5, 17), (18, 20), (7, 7)):
        got = store.host.read(start, stop)
        assert_same_bits(got, (codes[:, :, start:stop], scales[:, :, :, start:stop]))
    grown = store.host.copy(16, 40)
    assert_same_bits(grown.read(0, 20), (codes, scales))
    assert grown.codes.shape[2] == 40 and not grown.read(20, 40)[0].any()


def ranges(*pairs: tuple[int, int]) -> Sequence[tuple[int, int]]:
    from jkv_compile.offload import _merged

    return _merged(pairs)


def test_ranges_that_touch_move_as_one() -> None:
    assert ranges((4, 8), (0, 2), (6, 12), (2, 4), (20, 20), (30, 31)) == [(0, 12), (30, 31)]
