"""What holding the first and the newest tokens in full precision brings: ``python -m examples.held``.

All clips are continued with preset "memory" and a chunk's tokens of `sink`, of `recent`, of both and of neither;
compared with the BF16 rollout from the same noise. A table is printed, and ``results/held.json`` written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from examples.data import CLIPS, held_out
from examples.metrics import fidelity
from examples.quality_report import with_interval
from examples.rollout import PROMPT_CHUNKS, Variant, compile_variant, decode, draw_noise, encode, generate, load_models

CHUNKS = 6


def variants(chunk_tokens: int) -> list[Variant]:
    """BF16, then the preset with each choice of what is held."""
    held = {"neither": (0, 0), "`sink`": (1, 0), "`recent`": (0, 1), "both": (1, 1)}
    return [Variant("BF16", inner="eager")] + [
        Variant(name, 2, 64, "taylor", "unbiased", "eager", sink * chunk_tokens, recent * chunk_tokens)
        for name, (sink, recent) in held.items()
    ]


def measure(seeds: int, choose: Callable[[int], list[Variant]] = variants) -> list[dict[str, Any]]:
    """One record per variant, clip and draw of noise. `choose` gives them by the tokens of a chunk, BF16 first."""
    transformer, autoencoder = load_models()
    config = transformer.config
    frames = config.chunk_frames
    prompts = {c: encode(autoencoder, held_out(c)).unflatten(0, (-1, frames))[:PROMPT_CHUNKS] for c in CLIPS}
    videos: dict[tuple[str, int], torch.Tensor] = {}
    records = []
    chosen = choose(config.chunk_tokens)
    with tqdm(total=len(chosen) * len(prompts) * seeds, unit="rollout") as bar:
        for variant in chosen:
            torch.compiler.reset()
            compiled, backend = compile_variant(transformer, variant)
            for clip, prompt in prompts.items():
                for seed in range(seeds):
                    bar.set_postfix_str(f"{variant.name}, {clip}")
                    noise = draw_noise(config, CHUNKS, seed)
                    rollout = generate(transformer, compiled, variant, backend, prompt, noise)
                    video = decode(autoencoder, rollout.latents[PROMPT_CHUNKS:])
                    reference = videos.setdefault((clip, seed), video)  # BF16 comes first
                    bar.update()
                    if variant.bits is None:
                        continue
                    scores = fidelity(video, reference, frames)
                    records.append({
                        "held": variant.name, "sink": variant.sink, "recent": variant.recent, "clip": clip,
                        "seed": seed, "psnr": round(fmean(scores.psnr), 5), "ssim": round(fmean(scores.ssim), 5),
                        "ratio": round(rollout.full_bytes / rollout.cache_bytes, 5),
                    })  # fmt: skip
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Mean and interval per choice."""
    lines = ["| held | PSNR, dB | SSIM | against BF16 |", "|---|---|---|---|"]
    for name in dict.fromkeys(r["held"] for r in records):
        group = [r for r in records if r["held"] == name]
        ssim = fmean(r["ssim"] for r in group)
        lines.append(
            f"| {name} | {with_interval([r['psnr'] for r in group])} | {ssim:.4f} | {group[0]['ratio']:.2f}× |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the noise")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "held.json")
    args = parser.parse_args()
    records = measure(args.seeds)
    args.out.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    print(table(records))


if __name__ == "__main__":
    main()
