"""Every test starts from the same random numbers and from a Dynamo without history."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of several processes; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from jkv_compile import backend

settings.register_profile("jkv", deadline=None, derandomize=True, database=None)
settings.load_profile("jkv")


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch._dynamo.reset()
    for state in list(backend._states.values()):  # caches of earlier tests, which may not have been collected yet
        state.stores.clear()
    yield
    torch._dynamo.reset()
