"""Runs a compiled model beside its eager twin, call by call, and holds it to what every model is promised."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from jkv_compile import JKVBackend, jkv_backend

BOUND = 0.01  # relative error of an 8-bit cache, against eager in full precision


def fresh_backend(**settings: Any) -> JKVBackend:
    """A backend with no history, on a Dynamo with none."""
    torch._dynamo.reset()
    backend = jkv_backend(**{"bits": 8, "inner": "eager", **settings})
    backend._state.reports.clear()
    backend._state.stores.clear()
    return backend


def twins(model: nn.Module, backend: JKVBackend, **compile_options: Any) -> tuple[Callable[..., Any], nn.Module]:
    """The model compiled, and an eager copy with the same weights."""
    return torch.compile(model, backend=backend, **compile_options), copy.deepcopy(model)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def run_beside(
    steps: Iterator[tuple[Tensor, Tensor]], calls: int = 6, stable_from: int = 2, bound: float = BOUND
) -> list[float]:
    """Advance `steps`, which yield (compiled, eager) outputs; from call `stable_from` on nothing may recompile."""
    errors = []
    for call in range(calls):
        stance = torch.compiler.set_stance("fail_on_recompile") if call >= stable_from else contextlib.nullcontext()
        with stance:
            got, want = next(steps)
        assert got.shape == want.shape and got.dtype == want.dtype
        errors.append(relative_error(got, want))
    assert max(errors) < bound, errors
    assert max(errors) > 0, "nothing was quantized: the test tests nothing"
    return errors


def watch_memory(tensors: list[Tensor]) -> Callable[[], bool]:
    """Whether the memory that plain tensors hold now has been freed, to be asked later."""
    storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
    return lambda: all(s.expired() for s in storages)


def rewritten(backend: JKVBackend, outcome: str = "packed", index: int = 0) -> str:
    """The text of a rewritten graph, without inputs and without the linear layers around the attention."""
    reports = [r for r in backend.reports if r.outcome == outcome]
    lines = reports[index].after.splitlines()[1:]
    return "\n".join(line for line in lines if "linear(" not in line) + "\n"
