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
from jkv_compile.kernels.quantizers import grid_of

from ..harness import fresh_backend, relative_error
from .cases import CASES, Case, fixed_past
from .simulated import Simulated, Watched

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")


TURNED: dict[str, tuple[Case, str]] = {  # what is done to keys after they are read, and the grid that suits it
    "interleaved pairs": (fixed_past("interleaved", False, 64), "rtn"),
    "halves": (fixed_past("half", False, 64), "rtn/pairs64"),
    "halves, by rotate_half": (fixed_past("rotate_half", False, 64), "rtn/pairs64"),
    "halves, by slice assignment": (fixed_past("assigned halves", False, 64), "rtn/pairs64"),
    "halves of half the head": (fixed_past("half of half", False, 64), "rtn/pairs32"),
}


@dataclass
class Run:
    """One way of holding a cache, run until nothing compiles any more, and twice after that."""

    error: float  # of the last output, beside the simulation's
    freed: bool  # whether the caller's full-precision memory was
    effective_bits: float  # of all that its caches still hold
    quantizers: list[str | None]
    graphs: list[tuple[str, str]]  # before and after, where caches are packed


@functools.cache
def run(name: str, **settings: Any) -> Run:
    steps, stable_from = CASES[name]
    return run_beside_simulation(steps, stable_from, **settings)


def run_beside_simulation(
    steps: Case, stable_from: int, group_size: int = 32, simulated: str = "taylor", held: dict[str, int] | None = None,
    **settings: Any,
) -> Run:  # fmt: skip
    """`held`: what the simulation is told of tokens in full precision."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    watched: list[Watched] = []
    simulations: list[Simulated] = []

    def twins(model: nn.Module, backend: JKVBackend) -> tuple[Callable[..., Any], nn.Module]:
        watched.append(Watched(model, torch.compile(model, backend=backend)))
        simulations.append(Simulated(copy.deepcopy(model), watched[-1], 2, group_size, simulated, **(held or {})))
        return watched[-1], simulations[-1]

    backend = fresh_backend(bits=2, group_size=group_size, **settings)
    with torch.no_grad():
        generator = steps(backend, twins)  # holds the caches
        for call in range(stable_from + 2):
            stance = "fail_on_recompile" if call >= stable_from else "default"
            for twin in simulations:
                twin.corrects = call == stable_from + 1  # slow, and what is attended changes nothing later
            with torch.compiler.set_stance(stance):
                got, want = next(generator)
    memory = backend.memory()
    return Run(
        relative_error(got, want),
        watched[0].freed,
        32 * (memory.packed_bytes - memory.active_bytes) / memory.full_precision_bytes,
        [*watched[0].quantizers.values()],
        [(r.before, r.after) for r in backend.reports if r.outcome == "packed"],
    )


@pytest.mark.parametrize("quantizer", ["rtn", "symmetric"])
@pytest.mark.parametrize("name", CASES)
def test_two_bits_are_what_the_reference_computes(name: str, quantizer: str) -> None:
    """And the last two calls compile nothing."""
    assert run(name, quantizer=quantizer).error < 1e-5


@pytest.mark.parametrize("quantizer, effective", [("rtn", 3), ("symmetric", 2.5)])
@pytest.mark.parametrize("name", CASES)
def test_full_precision_memory_is_freed(name: str, quantizer: str, effective: float) -> None:
    outcome = run(name, quantizer=quantizer)
    bits = outcome.effective_bits  # with steps and zero points
    assert outcome.freed
    assert bits == effective or ("grows" in name and effective < bits <= effective * 1.25)  # with room for more tokens


@pytest.mark.parametrize("name", [*[*CASES][::3], "a concatenation that grows and is returned"])
def test_steps_of_eight_bits_are_what_the_reference_computes(name: str) -> None:
    outcome = run(name, quantizer="symmetric_unbiased", step_bits=8)
    assert outcome.error < 1e-5
    bits = outcome.effective_bits
    assert outcome.freed and (bits == 2.25 or ("grows" in name and 2.25 < bits <= 2.25 * 1.25))
    assert {grid_of(q).step_bits for q in outcome.quantizers if q} == {8}


@pytest.mark.parametrize("rope", ["", "interleaved"], ids=["on packed keys", "on dequantized keys"])
def test_a_missing_correction_would_be_seen(rope: str) -> None:
    assert run_beside_simulation(fixed_past(rope), 3, correction="none").error > 1e-3


@pytest.mark.parametrize("quantizer, correction", [
    ("rtn", "taylor"), ("rtn", "exact"), ("quarot", "taylor"), ("unbiased", "taylor"), ("unbiased", "exact"), ("rtn", "clamped"),
    ("symmetric", "taylor"), ("symmetric_unbiased", "taylor"), ("unbiased/steps8", "taylor"),
])  # fmt: skip
@pytest.mark.parametrize("turned", TURNED)
def test_keys_changed_after_the_read_are_corrected_score_by_score(turned: str, quantizer: str, correction: str) -> None:
    steps, grid = TURNED[turned]
    settings = {
        "quantizer": quantizer,
        "correction": correction,
        "group_size": 16 if "half of" in turned or "of half" in turned else 32,
    }
    if quantizer.endswith("/steps8"):
        settings |= {"quantizer": quantizer.removesuffix("/steps8"), "step_bits": 8}
    outcome = run_beside_simulation(steps, 3, simulated=correction, **settings)
    assert outcome.error < 2e-5
    keys, values = outcome.quantizers
    apart = grid.removeprefix("rtn") or ("/groups" if grid_of(quantizer).rotates else "")
    assert keys == quantizer + apart
    assert values == quantizer
