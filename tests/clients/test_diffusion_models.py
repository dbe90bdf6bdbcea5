"""diffusers: every transformer with a self-attention K/V cache."""

from __future__ import annotations

import pytest

from .clients import Client, check, run
from .diffusion_models import CLIENTS


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_caches(client: Client) -> None:
    check(client, run(client))
