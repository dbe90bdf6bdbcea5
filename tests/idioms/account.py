"""How often each way of holding a cache compiles, and what the passes take: ``python -m tests.idioms.account``.

Graphs compiled in 20 calls, by plain `torch.compile` and with packed caches; milliseconds of the passes per 1,000 nodes
of the graphs they saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from ..harness import fresh_backend, relative_error
from .cases import CASES, Steps

CALLS = 20


class Plain:
    """A backend that compiles nothing and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return gm.forward


def account(steps: Callable[[Any], Steps]) -> dict[str, Any]:
    """Graphs of both, the worst 8-bit error against eager, and the passes' milliseconds per 1,000 nodes."""
    torch._dynamo.reset()
    plain = Plain()
    _run(steps(plain))
    backend = fresh_backend()
    error = _run(steps(backend))
    nodes, seconds = (sum(getattr(r, name) for r in backend.reports) for name in ("nodes", "seconds"))
    lowerings = {
        m.lowering.split()[0].rstrip(":,") for r in backend.reports for m in r.matches if r.outcome == "packed"
    }
    return {
        "plain": plain.graphs,
        "packed": len(backend.reports),
        "error": error,
        "passes": 1e6 * seconds / nodes,
        "lowering": ", ".join(sorted(lowerings)) or "-",
    }


def _run(generator: Steps) -> float:
    return max(relative_error(*next(generator)) for _ in range(CALLS))


def main() -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    print("| a cache that is ... | lowering | graphs, plain | graphs, packed | error at 8 bits | ms per 1,000 nodes |")
    print("|---|---|---|---|---|---|")
    for name, (steps, _) in tqdm(CASES.items()):
        row = account(steps)
        tqdm.write(
            f"| {name} | {row['lowering']} | {row['plain']} | {row['packed']} | {row['error']:.4f} | {row['passes']:.0f} |"
        )


if __name__ == "__main__":
    main()
