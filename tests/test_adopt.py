"""A cache tensor becomes packed in place: references stay, the full-precision memory goes, and nothing is lost."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from jkv_compile import Config, ConfigurationError, NotRewrittenWarning, PackedKV, is_packed, materialize
from jkv_compile.adopt import BLOCK, adopt, obstacle
from tests.caches import AXES, assert_agrees
from tests.harness import fresh_backend, relative_error
from tests.models import SelfAttention

SHAPE = (1, 32, 4, 64)


def adopted(tensor: torch.Tensor, layout: str = "bshd", bits: int = 8, group_size: int = 32) -> torch.Tensor:
    adopt(tensor, AXES[layout], bits, Config(bits=bits, group_size=group_size))
    return tensor


# ---- what changes, and what does not ----


def test_every_reference_is_the_packed_cache_afterwards():
    cache = torch.zeros(SHAPE)
    holder, listed, identity = {"k": cache}, [cache], id(cache)
    adopted(cache)
    assert holder["k"] is cache and listed[0] is cache and id(cache) == identity
    assert isinstance(cache, PackedKV)


@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_size_stride_dtype_and_content_stay(layout, dtype):
    cache = torch.randn(SHAPE).to(dtype)
    plain = cache.clone()
    adopted(cache, layout)
    assert (cache.shape, cache.stride(), cache.dtype) == (plain.shape, plain.stride(), plain.dtype)
    assert_agrees(cache, plain)


def test_content_beyond_one_block_of_tokens_stays():
    cache = torch.randn(1, BLOCK + 100, 1, 32)
    plain = cache.clone()
    assert_agrees(adopted(cache), plain)


def test_full_precision_memory_is_freed_at_once():
    cache = torch.randn(SHAPE)
    storage = StorageWeakRef(cache.untyped_storage())
    assert not storage.expired()
    adopted(cache)
    assert storage.expired()
    assert cache._store.packed_bytes < cache._store.full_precision_bytes / 3


def test_packed_memory_is_freed_with_the_cache():
    cache = adopted(torch.randn(SHAPE))
    store = weakref.ref(cache._store)
    del cache
    gc.collect()
    assert store() is None


def test_adoption_needs_no_second_copy_of_a_big_cache():
    """Peak resident memory of a process that adopts 64 MiB: it must not come near to twice that."""
    program = """
        import resource
        import torch
        from jkv_compile import Config
        from jkv_compile.adopt import adopt
        torch.set_num_threads(1)
        adopt(torch.ones(1, 2048, 4, 128), (0, 2, 1, 3), 2, Config(group_size=64))  # what code and threads take
        cache = torch.ones(1, 32768, 4, 128)
        cache[..., 0] = 2
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        adopt(cache, (0, 2, 1, 3), 2, Config(group_size=64))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    extra = int(run.stdout) / 1024
    assert extra < 40, f"adoption took {extra:.0f} MiB beside a cache of 64 MiB"


def test_attributes_of_the_tensor_object_stay():
    cache = torch.zeros(SHAPE)
    cache.layer = 7
    adopted(cache)
    assert cache.layer == 7
    cache.step = 3
    assert cache.step == 3


def test_weak_references_stay():
    cache = torch.zeros(SHAPE)
    reference = weakref.ref(cache)
    adopted(cache)
    assert reference() is cache


@pytest.mark.parametrize("inference", [True, False], ids=["allocated in inference mode", "allocated outside"])
def test_inference_tensors_stay_inference_tensors(inference):
    with torch.inference_mode(inference):
        cache = torch.zeros(SHAPE)
    assert adopted(cache).is_inference() == inference


def test_known_views_become_windows_on_the_same_cache():
    cache = torch.randn(SHAPE)
    plain, view = cache.clone(), cache[:, 8:16]
    adopt(cache, AXES["bshd"], 8, Config(bits=8), views=[view])
    assert isinstance(view, PackedKV) and view._store is cache._store
    assert_agrees(view, plain[:, 8:16])


def test_uninitialised_tail_poisons_no_neighbour():
    cache = torch.randn(SHAPE)
    cache[:, 20:] = float("nan")
    cache[0, 3, 2, 5] = float("inf")
    plain = cache.clone()
    adopted(cache, bits=4)
    finite = plain.isfinite().unflatten(-1, (-1, 32)).all(-1, keepdim=True).expand(-1, -1, -1, -1, 32).flatten(-2)
    values = materialize(cache)
    assert torch.equal(values.isfinite(), finite), "only groups that held something else than numbers are lost"
    cache[:, 20:] = 0
    cache[0, 3] = 0
    assert materialize(cache).isfinite().all()


def test_groups_must_tile_the_heads():
    cache = torch.zeros(1, 8, 2, 96)
    with pytest.raises(ConfigurationError, match=r"group_size=64 does not divide this model's head_dim=96; use one of"):
        adopted(cache, group_size=64)
    assert not is_packed(cache)


# ---- refusals ----


def grown_view(kept: list[torch.Tensor]) -> torch.Tensor:
    kept.append(torch.zeros(4, *SHAPE))
    return kept[-1][1]


def with_storage_to_spare(kept: list[torch.Tensor]) -> torch.Tensor:
    kept.append(torch.zeros(2 * 8192))
    return torch.empty(0).set_(kept[-1].untyped_storage(), 0, SHAPE)


def kept_alive_elsewhere(kept: list[torch.Tensor]) -> torch.Tensor:
    cache = torch.zeros(SHAPE)
    kept.extend((cache[:, :4], cache[:, 4:]))
    return cache


KEPT: list[torch.Tensor] = []
OBSTACLES = {
    "parameter": (lambda: nn.Parameter(torch.zeros(SHAPE)), "it is a Parameter, not a plain tensor"),
    "requires grad": (lambda: torch.zeros(SHAPE, requires_grad=True), "it requires grad"),
    "result of a differentiable computation": (lambda: torch.zeros(SHAPE, requires_grad=True) * 2, "it requires grad"),
    "view of a larger tensor": (lambda: grown_view(KEPT), "it is a view of a larger tensor"),
    "part of a storage": (lambda: with_storage_to_spare(KEPT), "its storage holds more than this tensor"),
    "views that are alive": (lambda: kept_alive_elsewhere(KEPT), "2 other live tensors share its memory"),
    "memory of NumPy's": (lambda: torch.from_numpy(np.zeros(SHAPE, np.float32)), "its memory is shared with NumPy"),
    "memory of several processes": (lambda: torch.zeros(SHAPE).share_memory_(), "or another process"),
}


@pytest.mark.parametrize("make, reason", OBSTACLES.values(), ids=OBSTACLES.keys())
def test_tensor_that_cannot_be_packed_has_its_reason(make, reason):
    found = obstacle(make())
    assert found is not None and reason in found


def test_a_view_is_packed_where_nothing_else_reaches_its_memory():
    """As eager code leaves keys: a projection split into heads, of which only the view is kept."""
    torch.manual_seed(0)
    made = torch.randn(1, 8, 64)
    plain, cache = made.clone(), made.view(1, 8, 2, 32)
    assert obstacle(cache) == "another live tensor shares its memory"
    storage = StorageWeakRef(made.untyped_storage())
    del made
    assert obstacle(cache) is None
    adopt(cache, AXES["bshd"], 8, Config(bits=8))
    assert_agrees(cache, plain.view(1, 8, 2, 32))
    gc.collect()
    assert storage.expired()


PARTS = {
    "a slice along tokens": lambda: torch.randn(1, 64, 4, 64)[:, 8:40],
    "a slice along tokens, after the heads": lambda: torch.randn(1, 4, 64, 64)[:, :, :-32].transpose(1, 2),
    "one of several": lambda: torch.randn(4, 1, 32, 4, 64)[1],
    "memory with gaps": lambda: torch.empty_strided((1, 32, 4, 64), (32 * 300, 300, 64, 1)).normal_(),
}


@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("returns", [False, True], ids=["", "and a window on it is returned"])
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_a_part_of_what_nothing_else_holds_is_packed_and_the_rest_freed(make, returns, inference):
    """As where `torch.cat([past, new], 1)[:, -window:]` is cached. Windows that are returned show that very memory."""
    torch.manual_seed(0)
    model = SelfAttention()

    def step(x, cache, start):
        out = model(x, cache, start)
        return (out, cache["k"][:, 4 : start + 8]) if returns else (out, out)

    compiled = torch.compile(step, backend=fresh_backend())
    with torch.inference_mode(inference), torch.no_grad():
        cache = {name: make() for name in ("k", "v")}
        reference = {name: tensor.clone() for name, tensor in cache.items()}
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in cache.values()]
        for start in (0, 8, 16):
            x = torch.randn(1, 8, 256)
            for got, want in zip(compiled(x, cache, start), step(x, reference, start)):
                got = materialize(got) if is_packed(got) else got
                assert relative_error(got, want) < 0.01
    gc.collect()
    for tensor, storage in zip(cache.values(), storages):
        assert is_packed(tensor) == storage.expired() == (not returns)


def test_plain_caches_have_no_obstacle_whatever_refers_to_the_object():
    cache = torch.zeros(SHAPE)
    holder = {"k": cache, "list": [cache]}
    assert obstacle(holder["k"]) is None
    view = cache[:, :4]
    assert obstacle(cache) == "another live tensor shares its memory"
    assert obstacle(cache, views=1) is None
    del view
    assert obstacle(cache) is None


# ---- through torch.compile ----


@pytest.mark.parametrize("kind", ["a view that the user keeps", "a slice of one tensor for all layers"])
def test_model_runs_as_written_where_a_cache_cannot_be_packed(kind):
    backend, model = fresh_backend(), SelfAttention()
    compiled = torch.compile(model, backend=backend)
    memory = {name: torch.zeros(2, 1, 32, 4, 64) for name in ("k", "v")}
    if kind.startswith("a view"):
        cache = model.new_cache(1, 32)
        kept = cache["k"][:, :8]
    else:
        cache = {name: tensor[0] for name, tensor in memory.items()}
        kept = memory["k"][0, :, :8]
    reference = model.new_cache(1, 32)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for start in (0, 8, 16):
            x = torch.randn(1, 8, 256)
            torch.testing.assert_close(compiled(x, cache, start), model(x, reference, start))
    assert not is_packed(cache["k"])
    assert torch.equal(kept, cache["k"][:, :8]) and kept.any(), "the user's view shows what the model wrote"
    messages = [str(w.message) for w in caught if w.category is NotRewrittenWarning]
    assert any("another live tensor shares its memory" in m or "larger tensor" in m for m in messages), messages


def test_stale_tail_of_a_cache_never_reaches_the_output():
    """Real caches are allocated with torch.empty; what lies beyond the last token written is never attended."""
    model = SelfAttention()
    compiled = torch.compile(model, backend=fresh_backend())
    cache, reference = model.new_cache(1, 32), model.new_cache(1, 32)
    for tensor in cache.values():
        tensor.fill_(float("nan"))
    with torch.no_grad():
        for start in (0, 8, 16):
            x = torch.randn(1, 8, 256)
            torch.testing.assert_close(compiled(x, cache, start), model(x, reference, start), rtol=0.05, atol=0.02)
    assert is_packed(cache["k"])


def test_content_from_before_the_first_call_is_attended():
    model = SelfAttention()
    compiled = torch.compile(model, backend=fresh_backend())
    cache, reference = model.new_cache(1, 32), model.new_cache(1, 32)
    with torch.no_grad():
        for start in (0, 8):  # a prompt, in eager code
            x = torch.randn(1, 8, 256)
            model(x, cache, start)
            model(x, reference, start)
        x = torch.randn(1, 8, 256)
        torch.testing.assert_close(compiled(x, cache, 16), model(x, reference, 16), rtol=0.05, atol=0.02)
    assert is_packed(cache["k"])
