"""README.md's tables have a row for every client and idiom, which says of it what the tests hold it to."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..idioms.cases import CASES
from .clients import Client
from .diffusion_models import CLIENTS as DIFFUSION_MODELS
from .language_models import CLIENTS as LANGUAGE_MODELS
from .support_table import HEADER, cells

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_header_is_what_is_printed() -> None:
    assert HEADER in README


@pytest.mark.parametrize("client", (*LANGUAGE_MODELS, *DIFFUSION_MODELS), ids=str)
def test_every_client_has_a_row(client: Client) -> None:
    assert README.count(f"\n{cells(client)} ") == 1


@pytest.mark.parametrize("name", CASES)
def test_every_way_of_holding_a_cache_has_a_row(name: str) -> None:
    assert README.count(f"\n| {name} | ") == 1
