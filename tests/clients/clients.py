"""Runs a model of an installed package as its users do, compiled beside eager, and tells what became of its caches."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from jkv_compile import JKVBackend, NotRewrittenWarning, is_packed

from ..harness import BOUND, fresh_backend, relative_error

Compile = Callable[[nn.Module], nn.Module]  # puts a model's forward, or parts of it, through torch.compile


class Step(NamedTuple):
    """One call of the model: what it gave compiled and in eager mode, and the compiled model's caches afterwards."""

    got: Tensor
    want: Tensor
    caches: list[Tensor]
    inputs: tuple[Tensor, ...] = ()  # what comes in every call and is no cache


@dataclass(frozen=True)
class Client:
    """A model, how its cache is held and how its forward is compiled.

    Attributes:
        idiom: how the cache is held, as README.md's table has it.
        steps: the calls, one after another.
        compiled: what is compiled, "model" or "blocks".
        packed: which of its caches are, "all", "some" or "none"; with none it runs as it is written, to the last bit.
        reason: why not all are, as `backend.reports` says it; "" where that says nothing.
        stable_from: the first call that compiles nothing any more.
        calls: how many calls there are.
        exact: most of what is attended is in full precision: it was written last, or is of the current chunk.
        ratio: how much smaller its caches are in the end, at least.
        graphs: how many graphs Dynamo may make of one function.
    """

    model: str
    cache: str
    idiom: str
    steps: Callable[[Compile], Iterator[Step]]
    compiled: str = "model"
    packed: str = "all"
    reason: str = ""
    stable_from: int = 4
    calls: int = 6
    exact: bool = False
    ratio: float = 3.0  # 8 bits with steps and zero points of groups of 32, of float32
    graphs: int = torch._dynamo.config.recompile_limit

    def __str__(self) -> str:
        return f"{self.model}, {self.cache}" + (", per block" if self.compiled == "blocks" else "")


@dataclass
class Outcome:
    """What was seen of a client."""

    errors: list[float]
    packed: str  # which cache tensors of the last call are
    graphs: int
    ratio: float
    lowerings: list[str]
    reasons: list[str]
    warned: bool


def whole(backend: Any) -> Compile:
    return lambda model: torch.compile(model, backend=backend)  # type: ignore[return-value]


def blocks(backend: Any) -> Compile:
    """Each of the model's repeated blocks: `compile_repeated_blocks` in diffusers, a loop in transformers."""

    def compile_blocks(model: nn.Module) -> nn.Module:
        if hasattr(model, "compile_repeated_blocks"):
            model.compile_repeated_blocks(backend=backend)  # type: ignore[operator]
        else:
            for layer in model.model.layers:  # type: ignore[union-attr]
                layer.compile(backend=backend)  # type: ignore[operator]
        return model

    return compile_blocks


COMPILE = {"model": whole, "blocks": blocks}


def run(client: Client, **settings: Any) -> Outcome:
    """Every call of a client with an 8-bit cache; from `stable_from` on, one that compiles anything raises."""
    backend = fresh_backend(**settings)
    torch.manual_seed(0)
    counters.clear()
    errors: list[float] = []
    limit = torch._dynamo.config.patch(recompile_limit=client.graphs)
    with torch.no_grad(), limit, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = client.steps(COMPILE[client.compiled](backend))
        for call in range(client.calls):
            stable = call >= client.stable_from
            with torch.compiler.set_stance("fail_on_recompile") if stable else contextlib.nullcontext():
                step = next(steps)
            assert step.got.shape == step.want.shape and step.got.dtype == step.want.dtype
            assert not any(map(is_packed, step.inputs))
            errors.append(relative_error(step.got, step.want))
    return Outcome(
        errors,
        _how_many([is_packed(cache) for cache in step.caches]),
        counters["stats"]["unique_graphs"],
        backend.memory().ratio,
        sorted({m.lowering for r in backend.reports for m in r.matches}),
        _reasons(backend),
        any(issubclass(w.category, NotRewrittenWarning) for w in caught),
    )


def _how_many(packed: list[bool]) -> str:
    return "all" if all(packed) else "some" if any(packed) else "none"


def _reasons(backend: JKVBackend) -> list[str]:
    return sorted({r.reason for report in backend.reports for r in report.rejections})


def graphs_of_plain_compile(client: Client) -> int:
    """How many graphs `torch.compile` makes of a client by itself."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    counters.clear()
    with torch.no_grad():
        steps = client.steps(COMPILE[client.compiled]("eager"))
        for _ in range(client.calls):
            next(steps)
    return counters["stats"]["unique_graphs"]


def check(client: Client, outcome: Outcome) -> None:
    """Packed and close to eager; or as it was written, to the last bit, with the reason on record."""
    assert outcome.packed == client.packed, outcome.reasons
    assert max(outcome.errors) < BOUND, outcome.errors
    assert any(client.reason in reason for reason in outcome.reasons) or not client.reason, outcome.reasons
    if client.packed == "all":
        assert client.exact or max(outcome.errors) > BOUND / 20, "the caches hardly matter: the test tests nothing"
        assert outcome.ratio > client.ratio, outcome.ratio
    elif client.packed == "none":
        assert max(outcome.errors) == 0
