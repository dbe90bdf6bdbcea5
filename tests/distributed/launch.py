"""Runs checks on several ranks: `python -m tests.distributed.launch RANKS FILE CHECK...`.

What a rank needs is imported once, and ranks are forked from there: imports are most of a small check's time. A rank
whose check fails leaves at once, so that the others meet torch's own error instead of waiting; each writes what it found
to `FILE.rank`, as `{check: "ok" or a traceback}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import checks

TIMEOUT = timedelta(seconds=40)  # of a collective; nothing here takes seconds unless a rank is gone


def run_rank(rank: int, ranks: int, file: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=ranks, timeout=TIMEOUT)
    found: dict[str, str] = {}
    for name in names:
        torch.manual_seed(0)
        torch._dynamo.reset()
        began = time.perf_counter()
        try:
            getattr(checks, name)(rank, ranks)
            found[name] = "ok"
        except BaseException:
            found[name] = traceback.format_exc()
        print(f"rank {rank}: {name} took {time.perf_counter() - began:.1f} s", flush=True)
        Path(f"{file}.{rank}").write_text(json.dumps(found))
        if found[name] != "ok":
            os._exit(1)
    if "last_rank_dies" not in names:
        dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    ranks, file, *names = sys.argv[1:]
    mp.start_processes(run_rank, (int(ranks), file, names), int(ranks), start_method="fork")
