"""The quality study: ``python -m examples.quality``, or ``make quality``.

Two studies over all clips' held-out parts and several draws of noise. *Rollouts* continue each clip for six chunks and
compare the video with that of the BF16 cache. The *teacher-forced* study quantizes true history, generates one chunk,
and looks into every layer and head. What is done is kept under ``--out``, so that an interrupted study goes on where it
stopped; records, tables and plots go to ``--results``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from examples import quality_plots, quality_report
from examples.data import CLIPS, held_out
from examples.metrics import fidelity
from examples.quality_layers import HISTORY, study_layers
from examples.quality_settings import Setting, corrections, full, quick
from examples.rollout import (
    PROMPT_CHUNKS,
    WEIGHTS,
    Rollout,
    compile_variant,
    decode,
    draw_noise,
    encode,
    generate,
    load_models,
)
from examples.simulated_cache import generate_simulated
from examples.video_model.autoencoder import Autoencoder
from examples.video_model.model import CausalVideoTransformer

CHUNKS = 6
EARLY = 2  # generated chunks before rollouts have had time to diverge
Record = dict[str, Any]
Runner = Callable[[Tensor, Tensor], Rollout]


def weights_key() -> str:
    """Tells one set of weights from another: results of older ones are not reused."""
    digest = hashlib.sha256()
    for name in ("transformer", "autoencoder"):
        digest.update((WEIGHTS / f"{name}.safetensors").read_bytes())
    return digest.hexdigest()[:12]


class Study:
    """Models, data and the folder of what is done.

    Args:
        folder: where finished runs are kept.
        clips: names of the clips to continue.
        seeds: how many draws of the noise.
        chunks: how many chunks to generate.
    """

    def __init__(self, folder: Path, clips: list[str], seeds: int, chunks: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.transformer: CausalVideoTransformer
        self.autoencoder: Autoencoder
        self.transformer, self.autoencoder = load_models()
        self.chunk_frames = self.transformer.config.chunk_frames
        self.runs = [(clip, seed) for clip in clips for seed in range(seeds)]
        self.chunks = chunks
        frames = self.chunk_frames
        self.latents = {c: encode(self.autoencoder, held_out(c)).unflatten(0, (-1, frames)) for c in clips}

    def remembered(self, kind: str, setting: str, clip: str, seed: int, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, from its file if it has been made before."""
        path = self.folder / f"{kind}-{setting.replace(' ', '_').replace('/', '')}-{clip}-{seed}.json"
        if not path.exists():
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(make()))
            unfinished.replace(path)
        return json.loads(path.read_text())

    def roll(self, run: Runner, clip: str, seed: int) -> Rollout:
        """One rollout of a clip's prompt."""
        noise = draw_noise(self.transformer.config, self.chunks, seed)
        return run(self.latents[clip][:PROMPT_CHUNKS], noise)

    def baselines(self) -> dict[tuple[str, int], tuple[Tensor, float]]:
        """Videos [T, 3, H, W] of the model with its BF16 cache, and its attention mass on cached keys."""
        videos = {}
        for clip, seed in tqdm(self.runs, desc="baseline", unit="rollout"):
            path = self.folder / f"BF16-{clip}-{seed}.safetensors"
            if not path.exists():
                rollout = self.roll(self.runner(None), clip, seed)
                mass = torch.tensor(rollout.attention_mass)
                save_file({"latents": rollout.latents.contiguous(), "mass": mass}, path)
            kept = load_file(path)
            videos[clip, seed] = decode(self.autoencoder, kept["latents"][PROMPT_CHUNKS:]), kept["mass"].item()
        return videos

    def runner(self, setting: Setting | None) -> Runner:
        """What makes a rollout from prompt and noise: the package, or the simulation of what it cannot run."""
        if setting is None or setting.simulated:
            return lambda prompt, noise: generate_simulated(self.transformer, setting, prompt, noise)
        torch.compiler.reset()
        variant = setting.variant()
        compiled, backend = compile_variant(self.transformer, variant)
        return lambda prompt, noise: generate(self.transformer, compiled, variant, backend, prompt, noise)

    def rollouts(self, settings: list[Setting]) -> list[Record]:
        """One record per setting, clip and draw."""
        baselines = self.baselines()
        records = []
        with tqdm(total=len(settings) * len(self.runs), desc="rollouts", unit="rollout") as bar:
            for setting in settings:
                bar.set_postfix_str(setting.name)
                runner = functools.cache(functools.partial(self.runner, setting))  # compiles once, if at all
                for clip, seed in self.runs:

                    def make(clip: str = clip, seed: int = seed, setting: Setting = setting, runner=runner) -> Record:
                        return self.compare(self.roll(runner(), clip, seed), baselines[clip, seed])

                    measured = self.remembered("rollout", setting.name, clip, seed, make)
                    about = {"simulated": setting.simulated, "clip": clip, "seed": seed}
                    records.append({**asdict(setting), **about, **measured})
                    bar.update()
        return records

    def compare(self, rollout: Rollout, baseline: tuple[Tensor, float]) -> Record:
        """Fidelity to the BF16 video, and what the cache costs, everything counted."""
        reference, mass = baseline
        scores = fidelity(decode(self.autoencoder, rollout.latents[PROMPT_CHUNKS:]), reference, self.chunk_frames)
        ratio = rollout.full_bytes / rollout.cache_bytes
        numbers = {
            "psnr": fmean(scores.psnr),
            "ssim": fmean(scores.ssim),
            "psnr_early": fmean(scores.psnr[:EARLY]),
            "ssim_early": fmean(scores.ssim[:EARLY]),
            "effective_bits": 16 / ratio,
            "ratio": ratio,
            "attention_mass": rollout.attention_mass,
            "attention_mass_bf16": mass,
            "seconds_per_chunk": rollout.seconds_per_chunk,
        }
        rounded = {name: round(value, 5) for name, value in numbers.items()}
        return {**rounded, "psnr_per_chunk": [round(value, 3) for value in scores.psnr]}

    def layers(self, settings: list[Setting]) -> list[Record]:
        """The teacher-forced study: one record per setting and clip, numbers per layer and head; one draw of noise."""
        records = []
        with tqdm(total=len(settings) * len(self.latents), desc="layers", unit="setting") as bar:
            for clip, latents in self.latents.items():
                names = hashlib.sha256("".join(s.name for s in settings).encode()).hexdigest()[:8]
                study = functools.partial(
                    study_layers, self.transformer, self.autoencoder, latents[:HISTORY], settings, 0, bar.update
                )
                measured = self.remembered("layers", names, clip, 0, study)
                records += [
                    {**asdict(setting), "clip": clip, "seed": 0, **record}
                    for setting, record in zip(settings, measured, strict=True)
                ]
                bar.update(len(records) - bar.n)
        return records


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few settings, one draw: under ten minutes")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help='these settings alone, as "rtn INT2 g=64 taylor"')
    parser.add_argument("--seeds", type=int, default=3, help="draws of the noise (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="where finished runs are kept")
    parser.add_argument("--results", type=Path, help="where records and plots go (default: examples/results, or --out)")
    args = parser.parse_args(arguments)
    settings, others = (quick(), []) if args.quick else (full(), corrections())
    if args.only:
        unknown = sorted(set(args.only) - {s.name for s in settings})
        if unknown:
            parser.error(f"--only {', '.join(map(repr, unknown))}: known are {', '.join(s.name for s in settings)}")
        settings, others = [s for s in settings if s.name in args.only], []
    seeds = 1 if args.quick else args.seeds
    results = args.results or (args.out if args.quick or args.only else Path(__file__).parent / "results")
    results.mkdir(parents=True, exist_ok=True)
    study = Study(args.out / weights_key(), list(CLIPS), seeds, CHUNKS)
    rollouts = study.rollouts(settings)
    layers = study.layers(settings + others)
    write_records(results / "quality.json", rollouts)
    summary = quality_report.summarise_layers(layers)
    write_records(results / "quality_layers.json", summary)
    quality_plots.draw(rollouts, summary, results)
    report = quality_report.report(rollouts, summary)
    (results / "quality.md").write_text(f"# Quality, every setting\n\n{report}\n")
    print(report)


def write_records(path: Path, records: list[Record]) -> None:
    """JSON, one record a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")


if __name__ == "__main__":
    main()
