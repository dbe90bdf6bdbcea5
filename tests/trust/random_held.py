"""The random models, with first tokens and newest ones in full precision (`sink=`, `recent=`).

`python -m tests.trust.random_held --cases 2000`: the models are those that `random_models` draws by the same seeds.
"""

from __future__ import annotations

import dataclasses
import random
import sys

from .drawing import draw
from .layers import Case
from .random_models import run, simpler
from .search import search


def draw_held(seed: int) -> Case:
    """The model of a seed, and how many of its cache's tokens are held."""
    rng = random.Random(f"held {seed}")
    sink, recent = rng.choice((0, 1, 3, 4, 6, 10, 100)), rng.choice((0, 0, 1, 3, 4, 8, 30))
    return dataclasses.replace(draw(random.Random(seed)), sink=sink, recent=recent)


if __name__ == "__main__":
    sys.exit(search(__doc__, draw_held, run, simpler))
