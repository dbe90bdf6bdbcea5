"""Every way of holding a cache, at 2 bits: what the reference computes, in no full-precision memory, compiled once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from jkv_compile import JKVBackend

from ..harness import fresh_backend, relative_error
from .cases import CASES
from .simulated import Simulated, Watched

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")


@dataclass
class Run:
    """One way of holding a cache, run until nothing compiles any more, and twice after that."""

    error: float  # of the last output, beside the simulation's
    freed: bool  # whether the caller's full-precision memory was
    effective_bits: float  # of all that its caches still hold
    graphs: list[tuple[str, str]]  # before and after, where caches are packed


@functools.cache
def run(name: str, **settings: Any) -> Run:
    steps, stable_from = CASES[name]
    torch.manual_seed(0)
    torch._dynamo.reset()
    watched: list[Watched] = []
    simulated: list[Simulated] = []

    def twins(model: nn.Module, backend: JKVBackend) -> tuple[Callable[..., Any], nn.Module]:
        watched.append(Watched(model, torch.compile(model, backend=backend)))
        simulated.append(Simulated(copy.deepcopy(model), 2))
        return watched[-1], simulated[-1]

    backend = fresh_backend(bits=2, **settings)
    with torch.no_grad():
        generator = steps(backend, twins)  # holds the caches
        for call in range(stable_from + 2):
            stance = "fail_on_recompile" if call >= stable_from else "default"
            for twin in simulated:
                twin.corrects = call == stable_from + 1  # slow, and what is attended changes nothing later
            with torch.compiler.set_stance(stance):
                got, want = next(generator)
    memory = backend.memory()
    return Run(
        relative_error(got, want),
        watched[0].freed,
        32 * (memory.packed_bytes - memory.active_bytes) / memory.full_precision_bytes,
        [(r.before, r.after) for r in backend.reports if r.outcome == "packed"],
    )


@pytest.mark.parametrize("name", CASES)
def test_two_bits_are_what_the_reference_computes(name: str) -> None:
    """And the last two calls compile nothing."""
    assert run(name).error < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_full_precision_memory_is_freed(name: str) -> None:
    assert run(name).freed
    assert run(name).effective_bits == 3  # with steps and zero points


@pytest.mark.parametrize("name", ["a fixed past, concatenated", "a fixed past, turned after the read"])
def test_a_missing_correction_would_be_seen(name: str) -> None:
    assert run(name, correction="none").error > 100 * 1e-5
