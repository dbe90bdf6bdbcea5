"""Keys quantized by channel beside keys quantized by token: ``python -m examples.kivi``.

All clips are continued with both at the same bits, the same tokens held in full precision; then attention over
synthetic keys with channels far from zero; over keys that rotary embeddings turn after they are read, corrected in
several ways; then what is lost where tokens of a block are quantized again and again.
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
from examples.video_model.rope import apply_rope, rope_table
from jkv_compile import Config, materialize
from jkv_compile.adopt import adopt
from jkv_compile.kernels.turned import bias_of

GROUP, BLOCK, NEW = 64, 32, 8
TURNED_KEYS = {"channels alike": 1.0, "eight of 128 eight times as large": 8.0}


def variants(chunk_tokens: int) -> list[Variant]:
    """BF16, then settings that hold as many tokens."""
    settings = ("kivi", "taylor"), ("kivi", "none"), ("rtn", "taylor"), ("rtn", "none"), ("unbiased", "taylor")
    return (
        [Variant("BF16", inner="eager")]
        + [
            Variant(f"{quantizer}, {form}", 2, GROUP, form, quantizer, "eager", 0, GROUP - 1)
            for quantizer, form in settings
        ]
        + [Variant("kivi in blocks of 48, taylor", 2, GROUP, "taylor", "kivi", "eager", 0, 0, block_tokens=48)]
    )


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


def measure_turned(seeds: int) -> list[dict[str, Any]]:
    """Keys that are turned after they are read: what is left of them on average in the log of what all cached keys
    weigh, and in single ones, and the squared error of attention over them; 2 bits, blocks of 32."""
    records, scale, tokens, queries = [], HEAD_DIM**-0.5, 2048, 64
    table = rope_table(tokens + queries, 1, 1, (HEAD_DIM, 0, 0), 10_000.0)
    pairs, first = [*range(HEAD_DIM)], torch.arange(HEAD_DIM) % 2 == 0

    def turn(x: Tensor, start: int = 0) -> Tensor:
        return apply_rope(x.transpose(1, 2), table[start : start + x.shape[2]]).transpose(1, 2)

    for kind in TURNED_KEYS:
        for seed in range(seeds):
            torch.manual_seed(seed)
            wide = torch.ones(HEAD_DIM)
            wide[torch.randperm(HEAD_DIM)[:8]] = TURNED_KEYS[kind]
            key = torch.randn(1, 1, tokens, HEAD_DIM) * wide / wide.square().mean().sqrt()
            query, value = 2 * torch.randn(1, 1, queries, HEAD_DIM), torch.randn(1, 1, tokens, HEAD_DIM)
            stored, query = MinMax(2, 1, block=BLOCK)(key), turn(query, tokens)
            kinds = turn(stored.step * first), turn(stored.step * ~first)
            exact = bias_of(query, *kinds, pairs, scale, "taylor")
            of_pairs = (kinds[0].square() + kinds[1].square()).unflatten(-1, (-1, 2)).mean(-1)
            forms = {
                "none": torch.zeros_like(exact),
                "the mean of a pair's": scale**2 / 24 * query.square().unflatten(-1, (-1, 2)).sum(-1) @ of_pairs.mT,
                "turned as a key": scale**2 / 24 * query.square() @ turn(stored.step).square().mT,
                "as packed": exact,
            }
            scores = scale * query @ turn(key).mT
            wanted = scores.softmax(-1) @ value
            for form, correction in forms.items():
                got = scale * query @ turn(stored.values).mT - correction
                error = (got.softmax(-1) @ value - wanted).square().sum() / wanted.square().sum()
                mass = got.logsumexp(-1) - scores.logsumexp(-1)
                off = (correction - exact).norm() / exact.norm()
                records.append({
                    "turned": kind, "correction": form, "seed": seed, "log_mass": round(mass.mean().item(), 5),
                    "off": round(off.item(), 5), "output_error": round(error.item(), 5),
                })  # fmt: skip
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
    again, made_up, turned = measure_again(16), measure_synthetic(args.seeds), measure_turned(2 * args.seeds)
    records = measure(args.seeds, variants)
    lines = [json.dumps(record) for record in (*records, *made_up, *turned, *again)]
    args.out.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(table(records))
    for kind in TURNED_KEYS:
        for form in dict.fromkeys(r["correction"] for r in turned):
            group = [r for r in turned if r["turned"] == kind and r["correction"] == form]
            mass, off, error = (fmean(r[name] for r in group) for name in ("log_mass", "off", "output_error"))
            print(f"{kind}, turned, {form}: log mass {mass:+.3f}, corrections off by {off:.0%}, error {error:.1%}")
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
