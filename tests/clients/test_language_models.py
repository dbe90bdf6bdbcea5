"""transformers: every kind of cache that decodes token by token."""

from __future__ import annotations

import pytest

from .clients import Client, check, graphs_of_plain_compile, run
from .language_models import CLIENTS

COUNTED = CLIENTS[:1]  # at most one graph more than plain torch.compile makes


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_caches(client: Client) -> None:
    result = run(client)
    check(client, result)
    if client in COUNTED:
        assert result.graphs <= graphs_of_plain_compile(client) + 1


def test_inductor() -> None:
    client = next(c for c in CLIENTS if c.compiled == "blocks")
    check(client, run(client, inner="inductor"))
