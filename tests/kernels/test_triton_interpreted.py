"""Runs `test_triton.py` in Triton's interpreter, in a process of its own, where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py runs on the GPU itself")
def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    tests = Path(__file__).with_name("test_triton.py")
    # One BLAS thread: the interpreter's many tiny products are 10 to 60 times slower with more.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=880)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
