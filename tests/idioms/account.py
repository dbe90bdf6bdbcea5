"""How often each way of holding a cache compiles, and what the passes take: ``python -m tests.idioms.account``.

Graphs compiled in 20 calls, by plain `torch.compile` and with packed caches; CPU milliseconds of the passes per 1,000
nodes of the graphs they saw.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from jkv_compile.passes.pipeline import plan_graph

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
    backend, seconds = fresh_backend(), list[float]()

    def timed(*args: Any) -> Any:
        begin = time.process_time()
        try:
            return plan_graph(*args)
        finally:
            seconds.append(time.process_time() - begin)

    with mock.patch("jkv_compile.backend.plan_graph", timed):
        error = _run(steps(backend))
    nodes = sum(r.nodes for r in backend.reports)
    lowerings = {
        m.lowering.split()[0].rstrip(":,") for r in backend.reports for m in r.matches if r.outcome == "packed"
    }
    return {
        "plain": plain.graphs,
        "packed": len(backend.reports),
        "error": error,
        "nodes": nodes,
        "passes": 1e6 * sum(seconds) / nodes,
        "lowering": ", ".join(sorted(lowerings)) or "-",
    }


def _run(generator: Steps) -> float:
    return max(relative_error(*next(generator)) for _ in range(CALLS))


def main() -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    print("| a cache that is ... | lowering | graphs, plain | graphs, packed | error at 8 bits | ms per 1,000 nodes |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name, (steps, _) in tqdm(CASES.items()):
        rows.append(row := account(steps))
        tqdm.write(
            f"| {name} | {row['lowering']} | {row['plain']} | {row['packed']} | {row['error']:.4f} | {row['passes']:.0f} |"
        )
    nodes = sum(row["nodes"] for row in rows)
    passes = sum(row["passes"] * row["nodes"] for row in rows) / nodes
    plain, packed = (sum(row[name] for row in rows) for name in ("plain", "packed"))
    print(f"| all {len(rows)} | | {plain} | {packed} | {max(row['error'] for row in rows):.4f} | {passes:.0f} |")


if __name__ == "__main__":
    main()
