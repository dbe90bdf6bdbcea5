"""Several processes under torchrun: what one process computes, within the bound of 8 bits, and bytes where they belong.

All checks of a number of ranks share one launch (`launch`), as starting processes takes longer than most of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TWO = [
    "head_parallel",
    "head_parallel_rewritten",
    "head_parallel_hidden",
    "head_parallel_differentiable",
    "token_parallel_rotated",
    "merged_by_hand",
    "context_parallel_packs",
    "causal_context_parallel_runs_as_written",
    "context_parallel_spares_what_it_does_not_reach",
    "dtensor_cache",
    "dtensors_used_across_ranks",
    "fsdp_per_block",
    "caches_move",
    "example_generates_what_one_process_does",
    "configurations_must_agree",
    "last_rank_dies",
]
FOUR = ["head_parallel", "token_parallel", "context_parallel_packs", "caches_move"]


def launched(ranks: int, names: list[str], folder: Path) -> list[dict[str, str]]:
    """What every rank found, by check."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, "-m", "tests.distributed.launch", str(folder / "found"), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    found = [folder / f"found.{rank}" for rank in range(ranks)]
    assert all(file.exists() for file in found), finished.stderr[-4000:]
    return [json.loads(file.read_text()) for file in found]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return launched(2, TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return launched(4, FOUR, tmp_path_factory.mktemp("four"))


def assert_passed(found: list[dict[str, str]], name: str) -> None:
    for rank, checks in enumerate(found):
        if name == "last_rank_dies" and rank == len(found) - 1:
            continue
        assert checks.get(name, "it was not reached: a check before it failed") == "ok", f"rank {rank}: {checks}"


@pytest.mark.parametrize("name", TWO)
def test_two_ranks(two_ranks: list[dict[str, str]], name: str) -> None:
    assert_passed(two_ranks, name)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(four_ranks: list[dict[str, str]], name: str) -> None:
    assert_passed(four_ranks, name)
