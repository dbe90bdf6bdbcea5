"""Random models, compiled with 8-bit caches and compared with eager, call by call: never silently wrong.

`python -m tests.trust.random_models --cases 2000` draws models by seed (`tests.trust.drawing`), runs each through the
backend and beside it in eager mode, and holds outputs and caches to `BOUND`. A failure is shrunk: every field of its
case that can be set to its simplest value without its passing is, and what is left is printed with its seed.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import io
import logging
import random
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import jkv_compile
from jkv_compile import PackedCacheError, is_packed, materialize

from ..harness import fresh_backend, relative_error
from .drawing import draw
from .layers import NAMES, Attributes, Case, Layer, Listed, Network

BOUND = {"float32": 0.025, "float16": 0.03, "bfloat16": 0.04}  # relative error of outputs, and of caches
SLIDING = ("rolling", "roll and copy", "cat and copy")


@dataclass
class Outcome:
    """What became of a case. failure: "" where all is well, else what was found."""

    failure: str = ""
    errors: list[float] = field(default_factory=list)
    packed: int = 0
    graphs: int = 0
    refused: str = ""
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    reasons: list[str] = field(default_factory=list)


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


def run(case: Case, seed: int) -> Outcome:
    """Run a case beside eager. Raises what eager raises: such a case says nothing."""
    torch.manual_seed(seed)
    outcome = Outcome()
    network = Network(case)
    if case.grad_mode == "grad":
        network.requires_grad_()
    backend = fresh_backend(group_size=case.group_size, quantizer=case.quantizer, correction=case.correction)
    eager, compiled = Side(case, copy.deepcopy(network)), Side(case, network)
    for (mine, name, _), (_, _, tensor) in zip(list(compiled.tensors()), list(eager.tensors())):
        if compiled.caches is not None:
            mine[name] = tensor.clone()
    if case.compiled == "whole":
        compiled.call = torch.compile(network, backend=backend, dynamic=case.dynamic)
    else:
        for layer in network.layers:
            layer.compile(backend=backend, dynamic=case.dynamic)
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
                    if isinstance(error, PackedCacheError):
                        outcome.refused = str(error)
                        return outcome
                    outcome.failure = f"call {call} ({start=}, {n=}, {before=}) raised {_told(error)}"
                    return outcome
            outcome.packed = max(outcome.packed, backend.memory().adopted)
            outcome.graphs = len(backend.reports)
            outcome.reasons = [r.reason for report in backend.reports for r in report.rejections]
            outcome.outcomes = collections.Counter(r.outcome for r in backend.reports)
            found = _compare(case, outcome, results, eager, compiled)
            if found:
                outcome.failure = f"call {call} ({start=}, {n=}, {before=}): {found}"
                return outcome
    return outcome


def _compare(case: Case, outcome: Outcome, results: list[list[Tensor]], eager: Side, compiled: Side) -> str:
    want, got = results
    pairs = [(f"output {i}", w, g) for i, (w, g) in enumerate(zip(want, got))]
    for (_, name, w), (_, _, g) in zip(eager.tensors(), compiled.tensors()):
        pairs.append((f"cache {name}", w, g))
    for what, w, g in pairs:
        if _layout(w) != _layout(g):
            return f"{what} is {_layout(g)}, expected {_layout(w)}"
        w, g = w.detach(), materialize(g.detach())
        if not w.float().norm():
            if g.any():
                return f"{what} is not zero"
            continue
        error = relative_error(g, w)
        outcome.errors.append(error)
        bound = max(BOUND[case.dtype], BOUND[case.cache_dtype])
        if not error < bound:
            return f"{what} is off by {error:.3f}"
    return ""


def _layout(x: Tensor) -> tuple[Any, ...]:
    """What must be equal; strides of dimensions of size 1 mean nothing."""
    return x.dtype, tuple(x.shape), tuple(s for n, s in zip(x.shape, x.stride()) if n > 1)


def _told(error: Exception) -> str:
    """An error's message, and where in this package, or else at all, it was raised."""
    frames = traceback.extract_tb(error.__cause__.__traceback__ if error.__cause__ else error.__traceback__)
    own = [f for f in frames if "torch/" not in f.filename] or frames
    places = " < ".join(f"{f.filename.rsplit('/', 2)[-1]}:{f.lineno}" for f in reversed(own[-4:]))
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300]} … at {places}\n  {str(error)[:400]}"


def shrink(case: Case, seed: int) -> tuple[Case, Outcome]:
    """The simplest case found that still fails."""
    simplest = Case()
    outcome = attempt(case, seed)
    changed = True
    while changed:
        changed = False
        candidates = [
            dataclasses.replace(case, events=(*case.events[:i], *case.events[i + 1 :])) for i in range(len(case.events))
        ]
        candidates += [
            dataclasses.replace(case, events=(*case.events[:i], (n, 1, before), *case.events[i + 1 :]))
            for i, (n, repeats, before) in enumerate(case.events)
            if repeats > 1
        ]
        candidates += [
            dataclasses.replace(case, events=(*case.events[:i], (n, repeats, "nothing"), *case.events[i + 1 :]))
            for i, (n, repeats, before) in enumerate(case.events)
            if before != "nothing"
        ]
        for f in dataclasses.fields(Case):
            if f.name != "events" and getattr(case, f.name) != getattr(simplest, f.name):
                candidates.append(dataclasses.replace(case, **{f.name: getattr(simplest, f.name)}))
        for candidate in candidates:
            smaller = attempt(candidate, seed)
            if smaller is not None and smaller.failure:
                case, outcome, changed = candidate, smaller, True
                break
    assert outcome is not None
    return case, outcome


def attempt(case: Case, seed: int) -> Outcome | None:
    """What becomes of a case; None where eager mode cannot run it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return run(case, seed)
        except Exception:
            return None


def differing(case: Case) -> str:
    """A case as the call that makes it, without what is at its simplest."""
    simplest = Case()
    fields = [f.name for f in dataclasses.fields(Case) if getattr(case, f.name) != getattr(simplest, f.name)]
    return f"Case({', '.join(f'{name}={getattr(case, name)!r}' for name in fields)})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--idiom", help="only cases of this way of holding a cache")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="tell why cases ran as written")
    settings = parser.parse_args(arguments)
    from tqdm import tqdm

    torch.set_num_threads(1)
    torch._logging.set_logs(dynamo=logging.ERROR)
    failures, invalid, tally = 0, 0, collections.Counter[str]()
    worst = 0.0
    bar = tqdm(range(settings.seed, settings.seed + settings.cases), unit="case")
    for seed in bar:
        case = draw(random.Random(seed))
        if settings.idiom and case.idiom != settings.idiom:
            continue
        begin = time.perf_counter()
        outcome = attempt(case, seed)
        if outcome is None:
            invalid += 1
            tally[f"invalid: {case.idiom}"] += 1
            continue
        tally[f"{case.idiom}: {'refused' if outcome.refused else 'packed' if outcome.packed else 'as written'}"] += 1
        worst = max([worst, *outcome.errors])
        seconds = time.perf_counter() - begin
        if outcome.graphs > 30:
            bar.write(f"seed {seed}: {outcome.graphs} graphs {dict(outcome.outcomes)}, {seconds:.1f} s: {differing(case)}")
        if settings.verbose and not outcome.packed and not outcome.failure:
            bar.write(f"seed {seed} as written: {list(dict.fromkeys(outcome.reasons))}: {differing(case)}")
        if outcome.refused:
            bar.write(f"seed {seed} refused: {outcome.refused[:150]}: {differing(case)}")
        if outcome.failure:
            failures += 1
            if not settings.no_shrink:
                case, outcome = shrink(case, seed)
            bar.write(f"\nseed {seed} FAILS: {differing(case)}\n  {outcome.failure}\n")
        bar.set_postfix(failures=failures, invalid=invalid, worst=f"{worst:.3f}")
    for kind, count in sorted(tally.items()):
        print(f"{count:6} {kind}")
    print(f"{failures} failures, {invalid} cases that eager mode cannot run, worst error {worst:.4f}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
