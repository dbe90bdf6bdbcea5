"""diffusers: every transformer with a self-attention K/V cache."""

from __future__ import annotations

import pytest

from .clients import Client, check, graphs_of_plain_compile, run
from .diffusion_models import CLIENTS


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_caches(client: Client) -> None:
    check(client, run(client))


def test_compiles_at_most_one_graph_more_than_plain_torch_compile() -> None:
    client = CLIENTS[0]
    assert run(client).graphs <= graphs_of_plain_compile(client) + 1
