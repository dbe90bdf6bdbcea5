"""README.md's table of models of installed packages, from what is seen of them: `python -m tests.clients.support_table`."""

from __future__ import annotations

from . import conftest  # noqa: F401  (before transformers is imported)
from .clients import Client, Outcome, check, run
from .diffusion_models import CLIENTS as DIFFUSION_MODELS
from .language_models import CLIENTS as LANGUAGE_MODELS

HEADER = """| model | cache | held as | compiled | packed | attention | note |
|---|---|---|---|---|---|---|"""


def row(client: Client, outcome: Outcome) -> str:
    lowering = "; ".join(sorted({lowering.partition(":")[0] for lowering in outcome.lowerings})) or "as written"
    note = client.reason or f"error {max(outcome.errors):.1e}, {outcome.graphs} graphs"
    cells = client.model, client.cache, client.idiom, client.compiled, outcome.packed, lowering, note
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print(HEADER)
    for client in (*LANGUAGE_MODELS, *DIFFUSION_MODELS):
        outcome = run(client)
        check(client, outcome)
        print(row(client, outcome), flush=True)


if __name__ == "__main__":
    main()
