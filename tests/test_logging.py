"""`TORCH_LOGS=+jkv_compile` shows what was done to each graph."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch, jkv_compile
from tests.models import SelfAttention
model = SelfAttention()
compiled = torch.compile(model, backend=jkv_compile.jkv_backend(inner="eager"))
cache = model.new_cache(1, 64)
with torch.no_grad():
    for start in (0, 8):
        compiled(torch.randn(1, 8, 256), cache, start)
"""


@pytest.mark.parametrize("setting, expected", [("+jkv_compile", True), ("", False)], ids=["on", "off"])
def test_torch_logs_shows_the_account_of_each_graph(setting: str, expected: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_LOGS"} | (
        {"TORCH_LOGS": setting} if setting else {}
    )
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    account = [line for line in run.stderr.splitlines() if "jkv_compile" in line or "tests/models.py" in line]
    assert bool(account) is expected
    for part in (
        "adopted, its caches are packed when it is called",
        "packed, it works on packed caches",
        "lowering: fused",
    ):
        assert (part in run.stderr) is expected
