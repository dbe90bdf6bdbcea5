"""The study behind the README's table: ``python -m examples.figures``; several seeds, all clips, group sizes 32 and 64.

Every rollout is stored as soon as it is done, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from examples.data import CLIPS, held_out
from examples.metrics import fidelity
from examples.rollout import (
    PROMPT_CHUNKS,
    Rollout,
    Variant,
    compile_variant,
    decode,
    draw_noise,
    encode,
    generate,
    load_models,
)

BASELINE = Variant("BF16")
CHUNKS = 6


def study_variants() -> list[Variant]:
    """The baseline first, since every other rollout is compared with it."""
    low_bit = [
        Variant(f"INT{bits} g={group_size} {correction}", bits, group_size, correction)
        for bits in (2, 4)
        for group_size in (32, 64)
        for correction in ("none", "taylor")
    ]
    return [BASELINE, *low_bit]


def rollout_path(folder: Path, variant: Variant, clip: str, seed: int) -> Path:
    """Where one rollout is stored."""
    return folder / f"{variant.name.replace(' ', '_').replace('=', '')}-{clip}-{seed}.safetensors"


def store(path: Path, rollout: Rollout) -> None:
    """Latents as a tensor, the costs as metadata."""
    costs = {
        "seconds_per_chunk": rollout.seconds_per_chunk,
        "cache_bytes": rollout.cache_bytes,
        "full_bytes": rollout.full_bytes,
        "attention_mass": rollout.attention_mass,
    }
    unfinished = path.with_suffix(".tmp")
    save_file({"latents": rollout.latents.contiguous()}, unfinished)
    path.with_suffix(".json").write_text(json.dumps(costs))
    unfinished.replace(path)


def run_rollouts(folder: Path, variants: list[Variant], seeds: int) -> None:
    """Generate what is not stored yet; one compilation serves all clips and seeds of a variant."""
    transformer, autoencoder = load_models()
    config = transformer.config
    frames = PROMPT_CHUNKS * config.chunk_frames
    prompts = {
        clip: encode(autoencoder, held_out(clip)[:frames]).unflatten(0, (-1, config.chunk_frames)) for clip in CLIPS
    }
    todo = [(v, clip, seed) for v in variants for clip in CLIPS for seed in range(seeds)]
    current: Variant | None = None
    for variant, clip, seed in tqdm(todo, desc="rollouts", unit="rollout"):
        path = rollout_path(folder, variant, clip, seed)
        if path.exists():
            continue
        if variant != current:
            torch.compiler.reset()
            compiled, backend = compile_variant(transformer, variant)
            current = variant
        store(path, generate(transformer, compiled, variant, backend, prompts[clip], draw_noise(config, CHUNKS, seed)))


def compare(folder: Path, variants: list[Variant], seeds: int) -> list[dict[str, Any]]:
    """One record per variant, clip and seed."""
    _, autoencoder = load_models()
    records: list[dict[str, Any]] = []
    for clip in CLIPS:
        for seed in range(seeds):
            videos, costs = {}, {}
            for variant in variants:
                path = rollout_path(folder, variant, clip, seed)
                latents = load_file(path)["latents"]
                videos[variant.name] = decode(autoencoder, latents[PROMPT_CHUNKS:])
                costs[variant.name] = json.loads(path.with_suffix(".json").read_text())
            chunk_frames = latents.shape[1]
            for variant in variants[1:]:
                scores = fidelity(videos[variant.name], videos[BASELINE.name], chunk_frames)
                cost, base = costs[variant.name], costs[BASELINE.name]
                records.append(
                    {
                        "variant": variant.name,
                        "clip": clip,
                        "seed": seed,
                        "psnr": fmean(scores.psnr),
                        "ssim": fmean(scores.ssim),
                        "psnr_per_chunk": scores.psnr,
                        "mass_shift": cost["attention_mass"] - base["attention_mass"],
                        "attention_mass_bf16": base["attention_mass"],
                        "cache_ratio": cost["full_bytes"] / cost["cache_bytes"],
                        "seconds_per_chunk": cost["seconds_per_chunk"],
                    }
                )
    return records


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean and standard deviation."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"


def markdown(records: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over clips and seeds, and each clip's PSNR."""
    lines = [
        "| cache | ratio | PSNR dB | SSIM | attention mass, shift | " + " | ".join(CLIPS) + " |",
        "|---|---|---|---|---|" + "---|" * len(CLIPS),
    ]
    for name in dict.fromkeys(record["variant"] for record in records):
        mine = [record for record in records if record["variant"] == name]
        by_clip = [f"{fmean(r['psnr'] for r in mine if r['clip'] == clip):.2f}" for clip in CLIPS]
        cells = [
            str(name),
            f"{mine[0]['cache_ratio']:.2f}x",
            spread([r["psnr"] for r in mine], 2),
            spread([r["ssim"] for r in mine], 4),
            spread([r["mass_shift"] for r in mine], 4, "+"),
            *by_clip,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/figures.json"))
    args = parser.parse_args()
    folder = args.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    variants = study_variants()
    run_rollouts(folder, variants, args.seeds)
    records = compare(folder, variants, args.seeds)
    args.out.write_text(json.dumps(records, indent=2) + "\n")
    print(markdown(records))


if __name__ == "__main__":
    main()
