"""Draws a case: what models do often is drawn often."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from .layers import Case

IDIOMS = (
    "slice",
    "slice",
    "past",
    "rolling",
    "rolling",
    "clone and edit",
    "composite",
    "two caches",
    "masked buffer",
    "stacked",
    "beside",
    "shared",
    "growing",
    "lazy",
    "roll and copy",
    "cat and copy",
    "write last",
)


def draw(rng: random.Random) -> Case:
    def often(usual: Any, others: Sequence[Any], share: float = 0.6) -> Any:
        return usual if rng.random() < share else rng.choice(others)

    idiom = rng.choice(IDIOMS)
    head_dim = rng.choice((16, 16, 32, 64))
    dtype = often("float32", ("float16", "bfloat16"), 0.75)
    tokens = rng.choice((24, 32, 48, 64))
    owner = often("dict", ("list", "buffer", "attribute"))
    if idiom == "lazy" or idiom == "growing":
        owner = often("dict", ("list", "attribute"))
    return Case(
        idiom=idiom,
        heads_first=rng.random() < 0.5,
        batch=often(1, (2, 3)),
        heads=rng.choice((1, 2, 3)),
        queries=often(1, (2, 3), 0.7),
        head_dim=head_dim,
        group_size=rng.choice([g for g in (8, 16, 32, 64) if head_dim % g == 0]),
        dtype=dtype,
        cache_dtype=often(dtype, ("float32", "float16", "bfloat16"), 0.85),
        layers=often(1, (2, 3), 0.65),
        owner=owner,
        position=often("int", ("tensor", "item", "kept"), 0.5),
        write=often("setitem", ("copy_", "index_copy_", "positions", "halves", "twice", "zero first"), 0.55),
        read=often("slice", ("narrow", "ellipsis", "transposed"), 0.6),
        after_read=often("nothing", ("turned", "scaled", "contiguous", "cloned", "normalised"), 0.65),
        attention=often("sdpa", ("matmul", "einsum"), 0.75),
        mask=often("none", ("causal", "sparse", "one row", "batch", "bias", "additive"), 0.6),
        scale=often(None, (0.1, 0.25), 0.75),  # sharper ones have noise choose between two keys
        window=often(0, (6, 12, 20), 0.7),
        breaks=often("none", ("first", "inside", "before attention"), 0.7),
        also_returns=often("nothing", ("view", "copy", "mean", "keys"), 0.8),
        starts_with=often("zeros", ("stale",) if idiom.startswith(("roll", "cat")) else ("stale", "empty"), 0.7),
        grad_mode=often("no_grad", ("inference", "frozen", "grad"), 0.6),
        compiled=often("whole", ("layers",), 0.7),
        dynamic=often(None, (True, False), 0.8),
        quantizer=often("rtn", ("quarot", "unbiased", "symmetric", "symmetric_unbiased", "qvg", "kivi"), 0.7),
        correction=often("taylor", ("none", "exact"), 0.7),
        tokens=tokens,
        events=events(rng, idiom),
    )


def events(rng: random.Random, idiom: str) -> tuple[tuple[int, int, str], ...]:
    usual = rng.choice((1, 2, 3, 4, 4, 5, 8))
    count = rng.randint(3, 7)
    result = []
    between = ("zero", "rewind", "new", "clone", "deepcopy", "save", "edit", "move", "roll", "read", "unpack")
    for i in range(count):
        n = usual if rng.random() < 0.75 else rng.randint(1, 8)
        repeats = 1 if rng.random() < 0.75 else rng.randint(2, 3)
        before = "nothing" if i == 0 or rng.random() < 0.75 else rng.choice(between)
        result.append((n, repeats, before))
    return tuple(result)
