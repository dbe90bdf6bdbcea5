"""Keys quantized by channel beside keys quantized by token: ``python -m examples.kivi``.

All clips are continued with both at the same bits, the same tokens held in full precision; then attention over
synthetic keys with channels far from zero; then what is lost where tokens of a block are quantized again and again.
Tables are printed, and ``results/kivi.json`` written.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from examples.centering import COLUMNS, HEAD_DIM, KEYS, ROWS, synthetic
from examples.held import measure, table
from examples.rollout import Variant
from examples.simulated import MinMax, bias
from jkv_compile import Config, materialize
from jkv_compile.adopt import adopt

GROUP, BLOCK, NEW = 64, 32, 8


def variants(chunk_tokens: int) -> list[Variant]:
    """BF16, then settings that hold as many tokens."""
    settings = ("kivi", "taylor"), ("kivi", "none"), ("rtn", "taylor"), ("rtn", "none"), ("unbiased", "taylor")
    return [Variant("BF16", inner="eager")] + [
        Variant(f"{quantizer}, {form}", 2, GROUP, form, quantizer, "eager", 0, GROUP - 1)
        for quantizer, form in settings
    ]


def measure_synthetic(seeds: int) -> list[dict[str, Any]]:
    """Relative squared error of attention's output, keys alone quantized in two bits, corrected."""
    records, scale = [], HEAD_DIM**-0.5
    quantizers = {
        "kivi g=64": MinMax(2, 1, block=64), "kivi g=32": MinMax(2, 1, block=32), "rtn g=64": MinMax(2, 64),
        "unbiased g=64": MinMax(2, 64, True, unbiased=True),
    }  # fmt: skip
    for kind in KEYS:
        for seed in range(seeds):
            query, key, value = synthetic(kind, seed)
            cached = key.shape[2] - 2 * ROWS * COLUMNS
            query = query[:, :, cached:]
            wanted = (query @ key.mT * scale).softmax(-1) @ value
            for name, quantize in quantizers.items():
                stored = quantize(key[:, :, :cached])
                scores = query @ torch.cat((stored.values, key[:, :, cached:]), 2).mT * scale
                scores[..., :cached] -= bias(query, stored, scale, "taylor")
                error = (scores.softmax(-1) @ value - wanted).square().sum() / wanted.square().sum()
                records.append({"keys": kind, "quantizer": name, "seed": seed, "output_error": round(error.item(), 5)})
    return records


def measure_again(times: int) -> list[dict[str, Any]]:
    """Relative error of tokens that are quantized again: with others of their blocks, or moved in eager code."""
    records = []
    for how in ("eight other tokens of each block are written", "tokens are rolled by eight in eager code"):
        torch.manual_seed(0)
        plain = torch.randn(1, 4, 10 * BLOCK, 64)
        cache = plain.clone()
        adopt(cache, (0, 1, 2, 3), 2, Config(2, BLOCK, quantizer="kivi"))
        for time in range(times + 1):
            kept = torch.arange(5 * BLOCK)  # what is not held, and has not been written anew
            if how.startswith("eight"):
                kept = kept[kept % BLOCK >= NEW]
            error = _error(materialize(cache)[:, :, kept], plain[:, :, kept])
            records.append({"how": how, "times": time, "error": round(error, 5)})
            for x in (cache, plain):
                if how.startswith("tokens"):
                    x[:, :, :-NEW] = x[:, :, NEW:].clone()
            starts = range(0, 8 * BLOCK, BLOCK) if how.startswith("eight") else [10 * BLOCK - NEW]
            for start in starts:
                new = torch.randn(1, 4, NEW, 64)
                for x in (cache, plain):
                    x[:, :, start : start + NEW] = new
    return records


def _error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the noise")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kivi.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, message=".*reads a packed cache in eager code.*")
    again, made_up, records = measure_again(16), measure_synthetic(args.seeds), measure(args.seeds, variants)
    args.out.write_text("[\n" + ",\n".join(json.dumps(record) for record in (*records, *made_up, *again)) + "\n]\n")
    print(table(records))
    for kind in KEYS:
        errors: dict[str, list[float]] = {}
        for record in (r for r in made_up if r["keys"] == kind):
            errors.setdefault(record["quantizer"], []).append(record["output_error"])
        print(f"{kind}:", ", ".join(f"{name} {fmean(e):.1%}" for name, e in errors.items()))
    for record in again:
        if record["times"] in (0, 1, 4, 16):
            print(f"{record['how']}, {record['times']} times: {record['error']:.3f}")


if __name__ == "__main__":
    main()
