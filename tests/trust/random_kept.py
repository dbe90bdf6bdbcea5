"""The random models, with a budget that has room for all tokens (`budget=`): nothing is dropped, and all is as eager.

`python -m tests.trust.random_kept --cases 2000`: the models are those that `random_models` draws by the same seeds.
"""

from __future__ import annotations

import dataclasses
import random
import sys

from .drawing import draw
from .layers import Case
from .random_models import run, simpler
from .search import search


def draw_kept(seed: int) -> Case:
    """The model of a seed, with a budget."""
    case = draw(random.Random(seed))
    return dataclasses.replace(case, sink=0, recent=0, budget=1_000_000)


if __name__ == "__main__":
    sys.exit(search(__doc__, draw_kept, run, simpler))
