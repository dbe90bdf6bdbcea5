"""What it brings to remove each channel's mean before quantizing: ``python -m examples.centering``.

Scores of keys that are all shifted by the same m shift by q·m, which softmax does not see; attention over shifted
values is shifted by as much. So an offset [B, H, 1, D] could be taken off a cache for nothing but its own bytes. True
history of all clips is quantized in two bits with the mean of each chunk removed, or that of the first chunks alone,
and one chunk generated (simulated in plain torch); then synthetic keys with outlier channels, as large models have.
Tables are printed, and ``results/centering.json`` written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from examples.data import CLIPS, held_out
from examples.quality_layers import HISTORY, study_layers
from examples.quality_report import with_interval
from examples.quality_settings import Setting
from examples.rollout import PROMPT_CHUNKS, encode, load_models
from examples.simulated import MinMax, Quantized, bias
from examples.simulated_cache import join
from examples.video_model.rope import apply_rope, rope_table

Record = dict[str, Any]
QUANTIZERS = ("rtn", "quarot", "unbiased")
CENTRES = {  # whether the mean is removed of keys, of values; over how many of the first chunks, 0: of each its own
    "none": (False, False, 0),
    "each chunk's": (True, True, 0),
    "prompt's, keys": (True, False, PROMPT_CHUNKS),
    "prompt's, values": (False, True, PROMPT_CHUNKS),
    "prompt's, both": (True, True, PROMPT_CHUNKS),
    "first chunk's, both": (True, True, 1),
}


@dataclass(frozen=True)
class Centred(Setting):
    """A kind of cache, and whose mean is removed: one of ``CENTRES``."""

    centre: str = "none"

    @property
    def storage(self) -> Centred:
        """The same without a correction."""
        return replace(self, correction="none")

    @property
    def name(self) -> str:
        """For progress bars."""
        return f"{super().name}, {self.centre}"

    def store(self, history: dict[str, Tensor], tokens: int) -> tuple[Quantized, Quantized]:
        """Keys and values ``k``, ``v`` [B, H, S, D] in chunks of so many tokens, quantized."""
        *wanted, chunks = CENTRES[self.centre]
        keys, values = (
            centred(history[name], quantize, tokens, chunks if want else None)
            for name, quantize, want in zip("kv", self.quantizers(), wanted, strict=True)
        )
        return keys, values


def centred(x: Tensor, quantize: Callable[[Tensor], Quantized], tokens: int, chunks: int | None) -> Quantized:
    """x [B, H, S, D] quantized in chunks of so many tokens.

    chunks: None leaves x as it is, 0 removes each chunk's mean, more the mean of the first so many. Means are stored
    in float16.
    """
    parts = []
    for part in x.float().split(tokens, 2):
        source = x[:, :, : chunks * tokens].float() if chunks else part
        mean = torch.zeros(()) if chunks is None else source.mean(2, keepdim=True).half().float()
        quantized = quantize(part - mean)
        quantized.values += mean
        quantized.bits += mean.numel() * 16 if chunks == 0 else 0  # one for all is a token's worth of bytes
        parts.append(quantized)
    return join(parts)


def settings() -> list[Centred]:
    """Every quantizer, group size and mean; the preset's with its correction, too."""
    kinds = [(quantizer, group_size, "none") for group_size in (64, 32) for quantizer in QUANTIZERS]
    kinds.append(("unbiased", 64, "taylor"))
    return [Centred(q, 2, 2, group_size, form, centre) for q, group_size, form in kinds for centre in CENTRES]


def measure(seeds: int) -> list[Record]:
    """Teacher-forced: one record per setting, clip and draw of noise."""
    transformer, autoencoder = load_models()
    frames, chosen, records = transformer.config.chunk_frames, settings(), []
    with tqdm(total=len(CLIPS) * seeds * len(chosen), unit="setting") as bar:
        for clip in CLIPS:
            latents = encode(autoencoder, held_out(clip)).unflatten(0, (-1, frames))[:HISTORY]
            for seed in range(seeds):
                found = study_layers(transformer, autoencoder, latents, chosen, seed, bar.update, Centred.store)
                for setting, got in zip(chosen, found, strict=True):
                    error = torch.tensor(got["output_error"]).mean().item()
                    records.append({
                        **asdict(setting), "clip": clip, "seed": seed,
                        "psnr": round(got["psnr"], 3), "output_error": round(error, 5),
                    })  # fmt: skip
    return records


# ---- synthetic keys ----

HEADS, HEAD_DIM, FRAMES, ROWS, COLUMNS = 4, 128, 8, 8, 16
ROPE_DIMS = 44, 42, 42  # Wan's
OUTLIERS = 6  # channels of a head
KEYS = {  # size of the outliers in standard deviations, which channels, and whether embeddings turn them
    "no outliers": (0, "any", False),
    "outliers of 4 σ": (4, "any", False),
    "outliers of 10 σ": (10, "any", False),
    "outliers of 10 σ, turned": (10, "any", True),
    "outliers of 10 σ in slow channels, turned": (10, "slow", True),
}


def synthetic(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one video: normal, and keys with an offset in some channels; [1, H, S, D] each."""
    size, where, turned = KEYS[kind]
    torch.manual_seed(seed)
    tokens = FRAMES * ROWS * COLUMNS
    query, key, value = (torch.randn(1, HEADS, tokens, HEAD_DIM) for _ in range(3))
    table = rope_table(FRAMES, ROWS, COLUMNS, ROPE_DIMS, theta=10_000)  # [S, 2, D / 2]
    turned_by = (1 - table[:, 0]).amax(0)  # cosines of at least 1 - so much
    pairs = turned_by.argsort()[: 2 * OUTLIERS] if where == "slow" else torch.arange(HEAD_DIM // 2)
    for head in range(HEADS):
        chosen = pairs[torch.randperm(len(pairs))[:OUTLIERS]] * 2  # the first channel of a pair
        key[:, head, :, chosen] += size * torch.randn(OUTLIERS).sign()
    if turned:
        query, key = (apply_rope(x.transpose(1, 2), table).transpose(1, 2) for x in (query, key))
    return 2 * query, key, value  # scores of a standard deviation of 2 and more, as trained models have


def measure_synthetic(seeds: int) -> list[Record]:
    """Relative squared error of attention's output, keys alone quantized in two bits, groups of 64."""
    records, chunk = [], 2 * ROWS * COLUMNS
    for kind in KEYS:
        for seed in range(seeds):
            query, key, value = synthetic(kind, seed)
            scale, cached = HEAD_DIM**-0.5, key.shape[2] - chunk
            query = query[:, :, cached:]
            wanted = (query @ key.mT * scale).softmax(-1) @ value
            for quantizer in QUANTIZERS:
                quantize = MinMax(2, 64, quantizer != "rtn", unbiased=quantizer == "unbiased")
                for centre, chunks in (("none", None), ("each chunk's", 0), ("first chunk's", 1)):
                    stored = centred(key[:, :, :cached], quantize, chunk, chunks)
                    for form in ("none", "taylor"):
                        scores = query @ torch.cat((stored.values, key[:, :, cached:]), 2).mT * scale
                        scores[..., :cached] -= bias(query, stored, scale, form)
                        error = (scores.softmax(-1) @ value - wanted).square().sum() / wanted.square().sum()
                        records.append({
                            "keys": kind, "quantizer": quantizer, "centre": centre, "correction": form, "seed": seed,
                            "output_error": round(error.item(), 5),
                        })  # fmt: skip
    return records


# ---- report ----


def tables(records: list[Record], made_up: list[Record]) -> str:
    """Mean and interval per setting; what removing a mean gains, run by run; synthetic keys."""
    lines = ["| quantizer | g | correction | mean removed | PSNR, dB | gain, dB | output error |", "|" + "---|" * 7]
    names = "quantizer", "group_size", "correction"
    of: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        of.setdefault((*(r[n] for n in names), r["centre"]), []).append(r)
    for (*kind, centre), group in of.items():
        psnr = [r["psnr"] for r in group]
        gain = [a - b["psnr"] for a, b in zip(psnr, of[(*kind, "none")], strict=True)]
        error = fmean(r["output_error"] for r in group)
        shown = with_interval(gain, sign="+") if centre != "none" else ""
        lines.append(f"| {' | '.join(map(str, kind))} | {centre} | {with_interval(psnr)} | {shown} | {error:.2%} |")
    lines += ["", "| keys | quantizer | correction | none | each chunk's | first chunk's |", "|" + "---|" * 6]
    errors: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for r in made_up:
        row = errors.setdefault((r["keys"], r["quantizer"], r["correction"]), {})
        row.setdefault(r["centre"], []).append(r["output_error"])
    lines += [
        f"| {' | '.join(k)} | " + " | ".join(f"{fmean(e):.1%}" for e in v.values()) + " |" for k, v in errors.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="draws of the noise")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "centering.json")
    args = parser.parse_args()
    made_up = measure_synthetic(args.seeds)
    records = measure(args.seeds)
    args.out.write_text("[\n" + ",\n".join(json.dumps(r) for r in [*records, *made_up]) + "\n]\n")
    print(tables(records, made_up))


if __name__ == "__main__":
    main()
