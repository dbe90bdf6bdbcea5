"""What each rank runs: `torchrun --standalone --nproc-per-node RANKS -m tests.distributed.launch FILE CHECK...`.

A rank whose check fails leaves at once, so that nobody waits for it; each writes what it found to `FILE.rank`, as
`{check: "ok" or a traceback}`.
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

from . import checks

TIMEOUT = timedelta(seconds=40)  # of a collective; nothing here takes seconds unless a rank is gone


def main(file: str, *names: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, ranks = dist.get_rank(), dist.get_world_size()
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
    main(*sys.argv[1:])
