"""Random models, compiled with 8-bit caches and compared with eager, call by call: never silently wrong.

`python -m tests.trust.random_models --cases 2000` draws models by seed (`tests.trust.drawing`), runs each through the
backend and beside it in eager mode, and holds outputs and caches to `BOUND`. A failure is shrunk: every field of its
case that can be set to its simplest value without its passing is, and what is left is printed with its seed.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from jkv_compile import ConfigurationError, PackedCacheError, materialize
from jkv_compile.kernels.quantizers import grid_of

from ..harness import fresh_backend
from .drawing import draw
from .layers import NAMES, Attributes, Case, Layer, Listed, Network
from .search import BOUND, Outcome, compare, search, told

SLIDING = ("rolling", "roll and copy", "cat and copy")


class Side:
    """A network and its caches; the compiled one and its eager twin get the same calls."""

    def __init__(self, case: Case, network: Network) -> None:
        self.case, self.network, self.call = case, network, network
        self.caches: Any = self.new_caches()

    def new_caches(self) -> Any:
        if self.case.owner in ("buffer", "attribute"):
            return None
        caches = [layer.new_cache() for layer in self.layers]
        return caches if self.case.owner == "dict" else [[c.get(name) for name in NAMES] for c in caches]

    @property
    def layers(self) -> list[Layer]:
        return list(self.network.layers)  # type: ignore[arg-type]

    def maps(self) -> Iterator[Any]:
        """Every layer's cache, by name."""
        for i, layer in enumerate(self.layers):
            given = None if self.caches is None else self.caches[i]
            yield given if isinstance(given, dict) else Attributes(layer) if given is None else Listed(given)

    def tensors(self) -> Iterator[tuple[Any, str, Tensor]]:
        for cache in self.maps():
            for name in NAMES[:-1]:
                try:
                    tensor = cache[name]
                except (KeyError, AttributeError):
                    continue
                if isinstance(tensor, Tensor):
                    yield cache, name, tensor

    def move_to(self, position: int) -> None:
        for cache in self.maps():
            if isinstance(cache["end"], Tensor):
                cache["end"].fill_(position)
            else:
                cache["end"] = position

    def prepare(self, what: str, values: Tensor) -> None:
        """What a caller does to the caches between two calls."""
        if what == "new":
            if self.caches is None:
                for layer in self.layers:
                    for name, tensor in layer.new_cache().items():
                        setattr(layer, "cache_" + name, tensor)
            else:
                self.caches = self.new_caches()
            return
        for cache, name, tensor in list(self.tensors()):
            dim = 2 if self.case.heads_first else 1
            dim = dim + 1 if name == "kv" and self.case.idiom == "stacked" else dim
            if what == "zero":
                tensor.zero_()
            elif what == "clone":
                cache[name] = tensor.clone()
            elif what == "deepcopy":
                cache[name] = copy.deepcopy(tensor)
            elif what == "save":
                file = io.BytesIO()
                torch.save(tensor, file)
                file.seek(0)
                cache[name] = torch.load(file, weights_only=True)
            elif what == "edit":
                part = tensor.narrow(dim, 0, min(2, tensor.shape[dim]))
                part.copy_(values[: part.numel()].view(part.shape))
            elif what == "move" and tensor.shape[dim] >= 8:
                tensor.narrow(dim, 0, 4).copy_(tensor.narrow(dim, 3, 4).clone())
            elif what == "roll":
                tensor.copy_(tensor.roll(-1, dim))
            elif what == "read":
                tensor.float().mean()
            elif what == "unpack":
                cache[name] = materialize(tensor).clone()


def steps(case: Case) -> Iterator[tuple[int, int, str]]:
    """(where a chunk begins, how many tokens it has, what is done before), call by call."""
    position = 0
    for n, repeats, before in case.events:
        if before in ("zero", "new", "rewind"):
            position = 0
        if case.idiom not in SLIDING and case.idiom != "growing" and position + n > case.tokens:
            position, before = 0, "rewind"
        for repeat in range(repeats):
            yield (min(position, case.tokens) if case.idiom == "rolling" else position), n, "" if repeat else before
        position += n


def fails_by_itself(case: Case, seed: int, error: Exception) -> bool:
    """Whether torch.compile raises the like with a backend that leaves graphs as they are."""
    torch._dynamo.reset()
    try:
        return type(error).__name__ in run(case, seed, by="eager").failure
    except Exception:
        return False


def run(case: Case, seed: int, by: Any = None) -> Outcome:
    """Run a case beside eager. Raises what eager raises, and torch.compile with any backend: such a case says nothing.

    by: what compiles it, in place of our backend.
    """
    torch.manual_seed(seed)
    outcome = Outcome()
    network = Network(case)
    if case.grad_mode == "grad":
        network.requires_grad_()
    settings = {name: getattr(case, name) for name in ("group_size", "quantizer", "correction", "sink", "recent")}
    grid = grid_of(case.quantizer)
    settings["budget"] = None if grid.per_channel or grid.clustered else case.budget
    bound = max(BOUND[case.dtype], BOUND[case.cache_dtype])
    if grid.clustered:
        settings |= {"center_tokens": 8, "centroids": 3, "stages": 2}
        bound *= 1.5  # what comes later to a block is farther from its centroids, and takes longer steps
    backend = fresh_backend(**settings)
    eager, compiled = Side(case, copy.deepcopy(network)), Side(case, network)
    for (mine, name, _), (_, _, tensor) in zip(list(compiled.tensors()), list(eager.tensors())):
        if compiled.caches is not None:
            mine[name] = tensor.clone()
    if case.compiled == "whole":
        compiled.call = torch.compile(network, backend=by or backend, dynamic=case.dynamic)
    else:
        for layer in network.layers:
            layer.compile(backend=by or backend, dynamic=case.dynamic)
    mode = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(case.grad_mode, torch.enable_grad)
    dtype = getattr(torch, case.dtype)
    with mode():
        for call, (start, n, before) in enumerate(steps(case)):
            x = torch.randn(case.layers, case.batch, n, case.heads * case.queries * case.head_dim).to(dtype)
            values = torch.randn(4096).to(getattr(torch, case.cache_dtype))
            results = []
            state = torch.get_rng_state()
            for side in (eager, compiled):
                torch.set_rng_state(state)
                try:
                    side.prepare(before, values)
                    if before == "rewind" and case.idiom == "growing":
                        for cache in side.maps():
                            cache["k"] = cache["v"] = None
                    side.move_to(start)
                    results.append(side.call(x, side.caches, start))
                except Exception as error:
                    if side is eager:
                        raise
                    told_of = PackedCacheError, ConfigurationError
                    if isinstance(getattr(error, "inner_exception", error), told_of):
                        outcome.refused = str(error)
                        return outcome
                    if by is None and fails_by_itself(case, seed, error):  # whoever compiles it: says nothing of us
                        raise
                    outcome.failure = f"call {call} ({start=}, {n=}, {before=}) raised {told(error)}"
                    return outcome
            outcome.note(backend)
            pairs = [(f"output {i}", w, g) for i, (w, g) in enumerate(zip(*results))]
            for (_, name, w), (_, _, g) in zip(eager.tensors(), compiled.tensors()):
                pairs.append((f"cache {name}", w, g))
            found = compare(outcome, pairs, bound)
            if found:
                outcome.failure = f"call {call} ({start=}, {n=}, {before=}): {found}"
                return outcome
    return outcome


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    events = case.events
    for i, (n, repeats, before) in enumerate(events):
        yield dataclasses.replace(case, events=(*events[:i], *events[i + 1 :]))
        if repeats > 1:
            yield dataclasses.replace(case, events=(*events[:i], (n, 1, before), *events[i + 1 :]))
        if before != "nothing":
            yield dataclasses.replace(case, events=(*events[:i], (n, repeats, "nothing"), *events[i + 1 :]))
    for f in dataclasses.fields(Case):
        if f.name != "events" and getattr(case, f.name) != f.default:
            yield dataclasses.replace(case, **{f.name: f.default})


if __name__ == "__main__":
    sys.exit(search(__doc__, lambda seed: draw(random.Random(seed)), run, simpler))
