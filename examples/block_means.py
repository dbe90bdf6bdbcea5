"""What a mean per block of tokens brings in rollouts: ``python -m examples.block_means``.

All clips are continued with tokens stored as they are, less one mean for a whole cache (that of the prompt's first
chunk), and less one for each chunk or frame; compared with the BF16 rollout from the same noise. Here, unlike in
``examples.centering``, it is the package that runs. Then attention over packed tokens less means is timed beside
attention without. Tables are printed, and ``results/block_means.json`` written.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from examples.held import measure
from examples.quality_report import with_interval
from examples.quality_settings import FRAME_TOKENS
from examples.rollout import Variant

NONE, ONE, CHUNK, FRAME, KEYS, VALUES = "none", "one", "chunk", "frame", "chunk, of keys", "chunk, of values"
KINDS: tuple[tuple[str, int | tuple[int, int], str, tuple[str, ...]], ...] = (
    ("unbiased", 2, "taylor", (NONE, ONE, CHUNK, FRAME, KEYS, VALUES)),
    ("symmetric_unbiased", 2, "taylor", (NONE, ONE, CHUNK, FRAME)),
    ("unbiased", (2, 3), "taylor", (NONE, CHUNK)),
)
HEADS, HEAD_DIM, CACHED = 4, 128, 8192
ROWS, BLOCKS = (512, 1560), (512, 1560)


def variants(chunk_tokens: int) -> list[Variant]:
    """BF16, then every kind of cache with its choices of means."""
    means: dict[str, tuple[bool | str, int]] = {
        NONE: (False, 0), ONE: (True, 0), CHUNK: (True, chunk_tokens), FRAME: (True, FRAME_TOKENS),
        KEYS: ("keys", chunk_tokens), VALUES: ("values", chunk_tokens),
    }  # fmt: skip
    return [Variant("BF16", inner="eager")] + [
        Variant(
            f"{quantizer}|{bits}|{form}|{name}", bits, 64, form, quantizer, "eager", center=means[name][0],
            center_tokens=means[name][1],
        )
        for quantizer, bits, form, names in KINDS
        for name in names
    ]  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    """Mean and interval per kind and choice, and what it gains over none, run by run."""
    lines = [
        "| `quantizer` | bits | correction | means | PSNR, dB | gain, dB | SSIM | against BF16 |", "|" + "---|" * 8
    ]  # fmt: skip
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["setting"], []).append(record)
    for name, group in groups.items():
        quantizer, bits, form, means = name.split("|")
        before = groups["|".join((quantizer, bits, form, NONE))]
        gain = [a["psnr"] - b["psnr"] for a, b in zip(group, before, strict=True)]
        shown = [
            f"`{quantizer}`", bits, form, means, with_interval([r["psnr"] for r in group]),
            "" if means == NONE else with_interval(gain, sign="+"), f"{fmean(r['ssim'] for r in group):.4f}",
            f"{group[0]['ratio']:.2f}×",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def measure_cost(times: int) -> list[dict[str, Any]]:
    """CPU time of attention over tokens in two bits and a chunk of its own, in ms: least and median, on one thread."""
    jkv, records = torch.ops.jkv, []
    torch.manual_seed(0)
    torch.set_num_threads(1)
    packed: list[torch.Tensor] = []
    for _ in range(2):
        codes = torch.zeros(1, HEADS, CACHED, HEAD_DIM // 4, dtype=torch.uint8)
        scales = torch.zeros(1, HEADS, HEAD_DIM // 64, CACHED, 2, dtype=torch.float16)
        jkv.append(codes, scales, torch.randn(1, HEADS, CACHED, HEAD_DIM), 0, 2)
        packed += [codes, scales]
    for rows in ROWS:
        query, key, value = (torch.randn(1, HEADS, rows, HEAD_DIM).bfloat16() for _ in range(3))
        others = [0, CACHED], key, value, None, False, HEAD_DIM**-0.5, 2, 2, "taylor"
        calls: dict[int, Callable[[], Any]] = {0: lambda others=others, q=query: jkv.attention(q, *packed, *others)}
        for block in BLOCKS:
            means = [torch.randn(1, HEADS, -(-CACHED // block), HEAD_DIM) for _ in range(2)]
            less = means[0], block, means[1], block, [], [], [], []
            calls[block] = lambda less=less, others=others, q=query: jkv.attention_means(q, *packed, *less, *others)
        spent: dict[int, list[float]] = {block: [] for block in calls}
        for _ in range(times):
            for block, call in calls.items():  # one after the other, as the machine may be shared
                began = time.process_time()
                call()
                spent[block].append(1000 * (time.process_time() - began))
        for block, found in spent.items():
            least, middle = round(min(found), 2), round(median(found), 2)
            records.append({"rows": rows, "cached": CACHED, "block": block, "ms": least, "ms_median": middle})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the noise")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "block_means.json")
    args = parser.parse_args()
    kept = "clip", "seed", "psnr", "ssim", "ratio"
    records = [{"setting": r["held"], **{k: r[k] for k in kept}} for r in measure(args.seeds, variants)]
    costs = measure_cost(21)
    args.out.write_text("[\n" + ",\n".join(json.dumps(record) for record in (*records, *costs)) + "\n]\n")
    print(table(records))
    for cost in costs:
        means = f"means of {cost['block']}" if cost["block"] else "no means"
        print(f"{cost['rows']} rows, {cost['cached']} keys, {means}: {cost['ms']} ms, median {cost['ms_median']}")


if __name__ == "__main__":
    main()
