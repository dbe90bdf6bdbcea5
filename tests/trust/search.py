"""What random tests have in common: what became of a case, the search for cases that fail, and their simplest form."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jkv_compile import JKVBackend, materialize

from ..harness import relative_error

BOUND = {"float32": 0.025, "float16": 0.03, "bfloat16": 0.04}  # relative error of outputs, and of caches


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

    @property
    def kind(self) -> str:
        if self.failure:
            return "FAILED"
        return "refused" if self.refused else "packed" if self.packed else "as written"

    def note(self, backend: JKVBackend) -> None:
        """What the backend has done so far."""
        self.packed = max(self.packed, backend.memory().adopted)
        self.outcomes = collections.Counter(r.outcome for r in backend.reports)
        self.graphs = sum(self.outcomes.values())
        self.reasons = [r.reason for report in backend.reports for r in report.rejections]


def compare(outcome: Outcome, pairs: list[tuple[str, Tensor, Tensor]], bound: float) -> str:
    """What is not as expected of (name, expected, found); "" where nothing is. Notes every error in `outcome`."""
    for what, want, got in pairs:
        if _layout(want) != _layout(got):
            return f"{what} is {_layout(got)}, expected {_layout(want)}"
        want, got = want.detach(), materialize(got.detach())
        if not want.float().norm():
            if got.numel() and not got.float().abs().max() < 1e-30:  # what a mask hides may weigh 2^-126
                return f"{what} is not zero"
            continue
        error = relative_error(got, want)
        outcome.errors.append(error)
        if not error < bound:
            return f"{what} is off by {error:.3f}"
    return ""


def _layout(x: Tensor) -> tuple[Any, ...]:
    """What must be equal; strides of dimensions of size 1 mean nothing."""
    return x.dtype, tuple(x.shape), tuple(s for n, s in zip(x.shape, x.stride()) if n > 1)


def told(error: Exception) -> str:
    """An error's message, and where in this package, or else at all, it was raised."""
    frames = traceback.extract_tb(error.__cause__.__traceback__ if error.__cause__ else error.__traceback__)
    own = [f for f in frames if "torch/" not in f.filename] or frames
    places = " < ".join(f"{f.filename.rsplit('/', 2)[-1]}:{f.lineno}" for f in reversed(own[-4:]))
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300]} … at {places}\n  {str(error)[:400]}"


def attempt(run: Callable[[Any, int], Outcome], case: Any, seed: int) -> Outcome | None:
    """What becomes of a case; None where eager mode cannot run it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return run(case, seed)
        except Exception:
            return None


def shrink(
    run: Callable[[Any, int], Outcome], simpler: Callable[[Any], Iterator[Any]], case: Any, seed: int, outcome: Outcome
) -> tuple[Any, Outcome]:
    """The simplest case found that still fails."""
    for candidate in simpler(case):
        smaller = attempt(run, candidate, seed)
        if smaller is not None and smaller.failure:
            return shrink(run, simpler, candidate, seed, smaller)
    return case, outcome


def written_out(case: Any) -> str:
    """A case as the call that makes it, without what is at its simplest."""
    shown = [f.name for f in dataclasses.fields(case) if getattr(case, f.name) != f.default]
    return f"{type(case).__name__}({', '.join(f'{name}={getattr(case, name)!r}' for name in shown)})"


def search(
    description: str | None,
    draw: Callable[[int], Any],
    run: Callable[[Any, int], Outcome],
    simpler: Callable[[Any], Iterator[Any]],
) -> int:
    """The command line: run cases by seed, tell what fails, in its simplest form. Returns the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--shrink", action=argparse.BooleanOptionalAction, default=True, help="simplify what fails")
    parser.add_argument("--verbose", action="store_true", help="tell why cases ran as written")
    settings = parser.parse_args()
    from tqdm import tqdm

    torch.set_num_threads(1)
    torch._logging.set_logs(dynamo=logging.ERROR)
    torch._dynamo.config.fake_tensor_cache_enabled = False  # costs more than it saves where every graph is new
    gc.collect()
    gc.freeze()
    tally: collections.Counter[str] = collections.Counter()
    worst = 0.0
    bar = tqdm(range(settings.seed, settings.seed + settings.cases), unit="case")
    for seed in bar:
        case, begin = draw(seed), time.perf_counter()
        outcome = attempt(run, case, seed)
        kind = "invalid" if outcome is None else outcome.kind
        tally[kind] += 1
        if outcome is not None:
            worst = max([worst, *outcome.errors])
            if outcome.failure:
                if settings.shrink:
                    case, outcome = shrink(run, simpler, case, seed, outcome)
                bar.write(f"\nseed {seed} FAILS: {written_out(case)}\n  {outcome.failure}\n")
            elif outcome.refused or (settings.verbose and not outcome.packed) or outcome.graphs > 30:
                why = outcome.refused or "; ".join(dict.fromkeys(outcome.reasons))
                took = f"{outcome.graphs} graphs, {time.perf_counter() - begin:.1f} s"
                bar.write(f"seed {seed} {kind} ({took}): {why}: {written_out(case)}")
        bar.set_postfix({**tally, "worst": f"{worst:.3f}"})
    print(", ".join(f"{count} {kind}" for kind, count in tally.most_common()) + f"; worst error {worst:.4f}")
    return 1 if tally["FAILED"] else 0
