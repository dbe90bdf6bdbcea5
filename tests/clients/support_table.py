"""README.md's table of models of installed packages, from what is seen of them: `python -m tests.clients.support_table`."""

from __future__ import annotations

from . import conftest  # noqa: F401  (before transformers is imported)
from .clients import Client, Outcome, check, run
from .diffusion_models import CLIENTS as DIFFUSION_MODELS
from .language_models import CLIENTS as LANGUAGE_MODELS

HEADER = """| model | cache | held as | compiled | packed | read | error, 8 bits | graphs |
|---|---|---|---|---|---|---|---|"""


def cells(client: Client) -> str:
    """What a row begins with: all that the tests hold without a figure."""
    packed = client.packed + (f" ({client.reason})" if client.reason else "")
    return f"| {' | '.join((client.model, client.cache, client.idiom, client.compiled, packed))} |"


def row(client: Client, outcome: Outcome) -> str:
    lowering = "; ".join(sorted({lowering.partition(":")[0] for lowering in outcome.lowerings})) or "dequantized"
    lowering = lowering if outcome.packed != "none" else "as written"
    return f"{cells(client)} {lowering} | {100 * max(outcome.errors):.2g} % | {outcome.graphs} |"


def main() -> None:
    print(HEADER)
    for client in (*LANGUAGE_MODELS, *DIFFUSION_MODELS):
        outcome = run(client)
        check(client, outcome)
        print(row(client, outcome), flush=True)


if __name__ == "__main__":
    main()
