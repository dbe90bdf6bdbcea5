"""transformers: every kind of cache that decodes token by token."""

from __future__ import annotations

import pytest

from .clients import Client, check, graphs_of_plain_compile, run
from .language_models import CLIENTS


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_caches(client: Client) -> None:
    check(client, run(client))


@pytest.mark.parametrize("client", CLIENTS[:2], ids=str)
def test_compiles_at_most_one_graph_more_than_plain_torch_compile(client: Client) -> None:
    assert run(client).graphs <= graphs_of_plain_compile(client) + 1


def test_inductor() -> None:
    client = next(c for c in CLIENTS if c.compiled == "blocks")
    check(client, run(client, inner="inductor"))
