"""A few random models and programs (`python -m tests.trust.random_models --cases 2000` runs many), and what they found."""

from __future__ import annotations

import random

import pytest

from . import drawing, programs, random_held, random_kept, random_models, random_programs
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
    "a growing past of another dtype than new keys": Case(
        idiom="cat and copy",
        cache_dtype="float16",
        breaks="before attention",
        events=((4, 1, "nothing"), (8, 2, "nothing")),
    ),
    "index_copy_ along a dimension that is a symbol": Case(
        idiom="masked buffer", position="item", dynamic=True, events=((1, 1, "nothing"),)
    ),
    "guards that ask a growing cache for its scales": Case(
        idiom="composite",
        heads_first=True,
        batch=3,
        queries=2,
        group_size=8,
        cache_dtype="bfloat16",
        position="item",
        read="narrow",
        mask="batch",
        scale=0.1,
        breaks="inside",
        compiled="layers",
        dynamic=True,
        tokens=32,
        events=((2, 1, "nothing"), (8, 1, "edit"), (8, 1, "nothing")),
    ),
    "dynamic=True with groups whose number is a symbol": Case(
        idiom="growing",
        heads_first=True,
        batch=3,
        queries=3,
        head_dim=64,
        cache_dtype="float16",
        owner="list",
        position="kept",
        write="copy_",
        read="narrow",
        after_read="normalised",
        attention="matmul",
        mask="bias",
        dynamic=True,
        tokens=24,
        events=((8, 3, "nothing"), (8, 1, "nothing"), (8, 1, "nothing"), (8, 1, "rewind"), (8, 1, "nothing")),
    ),
    "garbage in a cache without zero points": Case(
        head_dim=64, group_size=64, starts_with="empty", quantizer="symmetric_unbiased", events=TWICE
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_random_models_have_found_stays_right(name: str) -> None:
    outcome = attempt(random_models.run, FOUND[name], 0)
    assert outcome is not None and not outcome.failure, outcome


@pytest.mark.parametrize("seed", (9000, 9002, 9004, 9007))
def test_random_model_is_as_eager_or_refused(seed: int) -> None:
    outcome = attempt(random_models.run, drawing.draw(random.Random(seed)), seed)
    assert outcome is not None and not outcome.failure, outcome


@pytest.mark.parametrize("seed", (9001, 9003, 9005))
def test_random_model_that_holds_tokens_in_full_precision_is_as_eager_or_refused(seed: int) -> None:
    outcome = attempt(random_models.run, random_held.draw_held(seed), seed)
    assert outcome is not None and not outcome.failure, outcome


@pytest.mark.parametrize("seed", (9, 32))
def test_random_model_with_room_for_all_tokens_is_as_eager_or_refused(seed: int) -> None:
    outcome = attempt(random_models.run, random_kept.draw_kept(seed), seed)
    assert outcome is not None and not outcome.failure, outcome


@pytest.mark.parametrize("seed", range(9012, 9020))
def test_random_program_is_as_eager_or_refused(seed: int) -> None:
    outcome = attempt(random_programs.run, programs.draw(random.Random(seed)), seed)
    assert outcome is not None and not outcome.failure, outcome
