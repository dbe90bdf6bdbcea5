"""Published models, for several chunks of several denoising steps: close to eager, and packed, however they compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jkv_compile
from jkv_compile import is_packed

from ..harness import BOUND, fresh_backend, relative_error
from .published import (
    CHUNK,
    DIM,
    FRAME,
    HEAD_DIM,
    Far,
    HunyuanVideo,
    LightX2V,
    LongLive,
    MatrixGame,
    MatrixGame2,
    MemFlow,
    Pool,
    RewardForcing,
    RollingSink,
    SelfForcing,
    Var,
    Wan,
)

STEPS = 2
Calls = Iterator[tuple[Tensor, list[Tensor]]]  # what is generated, and the caches as they are
Compile = Callable[[nn.Module], Any]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan(kind: Callable[[], Any], tokens: int = 8 * FRAME, seed: int = 0) -> Callable[..., Calls]:
    def calls(compiled: Compile) -> Calls:
        torch.manual_seed(seed)
        model = Wan(kind())
        caches, model = model.new_caches(tokens), compiled(model)
        for chunk in range(5):
            for step in range(STEPS):
                clean = step == STEPS - 1
                x = noise(1, CHUNK, DIM, seed=STEPS * chunk + step)
                out, updates = model(x, caches, CHUNK * chunk, clean)
                if clean and kind is HunyuanVideo:
                    caches = updates
                yield out, [cache[name] for cache in caches for name in ("k", "v")]

    return calls


def var(compiled: Compile) -> Calls:
    torch.manual_seed(0)
    layers = [Var(), Var()]
    model = compiled(nn.Sequential(*layers))
    for image in range(2):
        for layer in layers:
            layer.cached_k = layer.cached_v = None
        for side in range(1, 6):
            out = model(noise(2, side * side, DIM, seed=10 * image + side))
            yield out, [t for layer in layers for t in (layer.cached_k, layer.cached_v) if t is not None]


def far(compiled: Compile) -> Calls:
    torch.manual_seed(0)
    cache: dict[str, Any] = {}
    model = compiled(Far())
    places = torch.arange(8 * FRAME)[:, None] / 100 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = places.repeat_interleave(2, 1)
    for frame in range(1, 8):
        for step in range(STEPS):
            x = noise(1, (1 + (step == 0)) * FRAME, DIM, seed=STEPS * frame + step)
            yield model(x, angles[: (frame + 1) * FRAME], cache, step == 0), [cache["k"], cache["v"]]


def lightx2v(compiled: Compile) -> Calls:
    torch.manual_seed(0)
    model, pool = compiled(LightX2V()), Pool(2, 8 * FRAME, FRAME)
    for chunk in range(6):
        for step in range(STEPS):
            yield model(noise(CHUNK, DIM, seed=STEPS * chunk + step), pool, CHUNK * chunk), [pool.k, pool.v]


# By model: its calls, how many graphs it may compile (Dynamo breaks where numbers are read from tensors), and how its
# attention reads the cache.
PUBLISHED: dict[str, tuple[Callable[[Compile], Calls], int, str]] = {
    "Self-Forcing": (wan(SelfForcing), 14, "fused"),
    "LongLive": (wan(LongLive), 19, "fused"),
    "Infinity-RoPE": (wan(lambda: LongLive(relative=True)), 26, "reconstructed"),
    "Reward-Forcing": (wan(RewardForcing), 33, "reconstructed"),
    "Rolling-Sink": (wan(RollingSink), 21, "fused"),
    "MemFlow": (wan(MemFlow, 6 * CHUNK, seed=3), 10, "fused"),  # no two frames are about as fit as each other
    "Matrix-Game": (wan(MatrixGame), 10, "fused"),
    "Matrix-Game 2": (wan(MatrixGame2), 23, "reconstructed"),
    "HunyuanVideo 1.5": (wan(HunyuanVideo), 15, "reconstructed"),
    "VAR": (var, 3, "fused"),
    "FAR": (far, 5, "reconstructed"),
    "LightX2V": (lightx2v, 24, "fused"),
}
DYNAMIC = {"quantizer": "unbiased", "dynamic": True}
CASES = {name: (name, {}) for name in PUBLISHED} | {
    f"{name}, unbiased and dynamic": (name, DYNAMIC) for name in ("Self-Forcing", "LongLive", "MemFlow", "VAR", "FAR")
}


@pytest.mark.parametrize("name", CASES)
def test_published_model_is_as_eager_and_packed(name: str) -> None:
    name, settings = CASES[name][0], dict(CASES[name][1])
    calls, graphs, lowering = PUBLISHED[name]
    dynamic = settings.pop("dynamic", None)
    backend = fresh_backend(**settings)
    torch._dynamo.utils.counters.clear()
    errors, caches = [], []
    with torch.no_grad():
        ours = calls(lambda model: torch.compile(model, backend=backend, dynamic=dynamic))
        for (got, held), (want, _) in zip(ours, calls(lambda model: model)):
            errors.append(relative_error(got, want))
            caches = held
        assert max(errors) < BOUND, errors
        assert max(errors) > 0 and caches and all(map(is_packed, caches))
    assert lowering in {m.lowering.split(":")[0] for r in backend.reports for m in r.matches}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs


@pytest.mark.parametrize("name", ["Matrix-Game 2", "FAR"])
def test_published_model_is_packed_by_enable_too(name: str) -> None:
    torch._dynamo.reset()
    calls, caches = PUBLISHED[name][0], []
    with torch.no_grad(), jkv_compile.enable(bits=8, inner="eager") as backend:
        for (got, held), (want, _) in zip(calls(torch.compile), calls(lambda model: model)):
            assert relative_error(got, want) < BOUND
            caches = held
        assert all(map(is_packed, caches)) and backend.memory().adopted
