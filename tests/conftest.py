"""Every test starts from the same random numbers and from a Dynamo without history."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("jkv", deadline=None, derandomize=True, database=None)
settings.load_profile("jkv")


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
