"""What a mean per block of tokens brings in rollouts: ``python -m examples.block_means``.

All clips are continued in two bits with tokens stored as they are, less one mean for a whole cache (that of the first
chunk of the prompt), and less one for each chunk or frame; compared with the BF16 rollout from the same noise. Here,
unlike in ``examples.centering``, it is the package that runs. A table is printed, and ``results/block_means.json``
written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.held import measure
from examples.quality_report import with_interval
from examples.quality_settings import FRAME_TOKENS
from examples.rollout import Variant

KINDS = ("unbiased", "taylor"), ("unbiased", "none"), ("symmetric_unbiased", "taylor")
NONE = "none"


def variants(chunk_tokens: int) -> list[Variant]:
    """BF16, then every kind of cache with each choice of means."""
    means = {NONE: (False, 0), "one": (True, 0), "chunk": (True, chunk_tokens), "frame": (True, FRAME_TOKENS)}
    return [Variant("BF16", inner="eager")] + [
        Variant(f"{quantizer}, {form}, {name}", 2, 64, form, quantizer, "eager", 0, 0, *centred)
        for quantizer, form in KINDS
        for name, centred in means.items()
    ]


def table(records: list[dict[str, Any]]) -> str:
    """Mean and interval per kind and choice, and what it gains over none, run by run."""
    lines = ["| `quantizer` | correction | means | PSNR, dB | gain, dB | SSIM | against BF16 |", "|" + "---|" * 7]
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["means"], []).append(record)
    for name, group in groups.items():
        quantizer, form, means = name.split(", ")
        before = groups[f"{quantizer}, {form}, {NONE}"]
        gain = [a["psnr"] - b["psnr"] for a, b in zip(group, before, strict=True)]
        shown = [
            f"`{quantizer}`", form, means, with_interval([r["psnr"] for r in group]),
            "" if means == NONE else with_interval(gain, sign="+"), f"{fmean(r['ssim'] for r in group):.4f}",
            f"{group[0]['ratio']:.2f}×",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the noise")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "block_means.json")
    args = parser.parse_args()
    kept = "clip", "seed", "psnr", "ssim", "ratio"
    records = [{"means": r["held"], **{k: r[k] for k in kept}} for r in measure(args.seeds, variants)]
    args.out.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    print(table(records))


if __name__ == "__main__":
    main()
