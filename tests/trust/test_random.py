"""A few random models and programs (`python -m tests.trust.random_models --cases 2000` runs many), and what they found."""

from __future__ import annotations

import random

import pytest

from . import drawing, programs, random_models, random_programs
from .layers import Case
from .search import attempt

TWICE, THRICE = (((4, 1, "nothing"),) * n for n in (2, 3))

FOUND = {
    "a dequantized attention with one head": Case(idiom="shared", attention="matmul", read="transposed", events=TWICE),
    "a range that is computed by division": Case(position="kept", write="halves", grad_mode="grad", events=THRICE),
    "keys and values read together": Case(idiom="stacked", also_returns="mean", events=TWICE),
    "dynamic=True with a step per channel group": Case(
        heads_first=True, queries=2, group_size=8, write="index_copy_", breaks="first", dynamic=True, events=TWICE
    ),
    "one cache, repeated as often as it has heads": Case(
        idiom="shared", batch=3, heads=3, queries=3, attention="einsum", breaks="before attention", events=TWICE
    ),
    "a copy of a cache that is returned": Case(heads=3, also_returns="copy", events=((8, 1, "nothing"),)),
    "positions counted between two tensors": Case(
        position="tensor", write="positions", events=((5, 1, "nothing"), (1, 1, "nothing"), (5, 1, "nothing"))
    ),
    "a concatenation along a dimension that is a symbol": Case(
        idiom="two caches", position="item", dynamic=True, events=((3, 1, "nothing"),)
    ),
    "a part of a cache that is copied and written back": Case(
        idiom="rolling",
        position="tensor",
        write="copy_",
        tokens=24,
        events=tuple((n, 1, "nothing") for n in (5, 5, 8, 5, 5)),
    ),
    "rows that see no key": Case(mask="one row", batch=2, events=TWICE),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_random_models_have_found_stays_right(name: str) -> None:
    outcome = attempt(random_models.run, FOUND[name], 0)
    assert outcome is not None and not outcome.failure, outcome


@pytest.mark.parametrize("seed", (9000, 9002, 9004, 9007))
def test_random_model_is_as_eager_or_refused(seed: int) -> None:
    outcome = attempt(random_models.run, drawing.draw(random.Random(seed)), seed)
    assert outcome is not None and not outcome.failure, outcome


@pytest.mark.parametrize("seed", range(9012, 9020))
def test_random_program_is_as_eager_or_refused(seed: int) -> None:
    outcome = attempt(random_programs.run, programs.draw(random.Random(seed)), seed)
    assert outcome is not None and not outcome.failure, outcome
