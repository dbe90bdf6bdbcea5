"""Random programs over caches (`tests.trust.programs`), compiled and held against eager, as `random_models` does."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator

import torch

from jkv_compile import PackedCacheError
from jkv_compile.adopt import adopt

from ..caches import AXES
from ..harness import fresh_backend
from .programs import CHUNK, DIM, FIRST, Interpreter, Program, draw
from .search import BOUND, Outcome, compare, search, told


def run(program: Program, seed: int) -> Outcome:
    """Run a program beside eager. Raises what eager raises: such a program says nothing."""
    torch.manual_seed(seed)
    outcome = Outcome()
    model = Interpreter(program)
    eager = copy.deepcopy(model)
    backend = fresh_backend(group_size=16, quantizer=program.quantizer)
    compiled = torch.compile(model, backend=backend, dynamic=program.dynamic)
    theirs = model.new_caches()
    ours = [(k.clone(), v.clone()) for k, v in theirs]
    if program.packed:
        for cache in [tensor for pair in ours for tensor in pair]:
            adopt(cache, AXES["bhsd" if program.heads_first else "bshd"], 8, backend.config).join(backend._state.stores)
    with torch.inference_mode(program.inference), torch.no_grad():
        for call in range(program.calls):
            start = FIRST + call * CHUNK
            x = torch.randn(program.batch, CHUNK, program.heads * DIM).to(getattr(torch, program.dtype))
            want = eager(x, theirs, start)
            try:
                got = compiled(x, ours, start)
            except PackedCacheError as error:
                outcome.refused = str(error)
                return outcome
            except Exception as error:
                outcome.failure = f"call {call} ({start=}) raised {told(error)}"
                return outcome
            outcome.note(backend)
            pairs = [(f"output {i}", w, g) for i, (w, g) in enumerate(zip(want, got))]
            pairs += [
                (f"cache {i} {name}", t, o)
                for i, (their, our) in enumerate(zip(theirs, ours))
                for name, t, o in zip("kv", their, our)
            ]
            outcome.failure = compare(outcome, pairs, BOUND[program.dtype])
            if outcome.failure:
                outcome.failure = f"call {call} ({start=}): {outcome.failure}"
                return outcome
    return outcome


def simpler(program: Program) -> Iterator[Program]:
    for i in range(len(program.steps)):
        yield dataclasses.replace(program, steps=(*program.steps[:i], *program.steps[i + 1 :]))
    for f in dataclasses.fields(Program)[1:]:
        if getattr(program, f.name) != f.default:
            yield dataclasses.replace(program, **{f.name: f.default})
    if program.calls > 1:
        yield dataclasses.replace(program, calls=program.calls - 1)


if __name__ == "__main__":
    raise SystemExit(search(__doc__, lambda seed: draw(random.Random(seed)), run, simpler))
