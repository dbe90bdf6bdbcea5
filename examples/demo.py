"""Continue held-out video with the cache in BF16, INT4, INT2 and corrected INT2: ``python -m examples.demo``.

All variants start from the same prompt and the same noise: every difference from the BF16 video is the cache's doing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import jkv_compile
from examples.contact_sheet import contact_sheet, error_map, side_by_side
from examples.data import CLIPS, VideoError, crop_and_resize, held_out, read_frames
from examples.metrics import fidelity, finite, to_uint8
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
from examples.video_model.model import ModelConfig


class Parser(argparse.ArgumentParser):
    """Reports bad input in one line and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of the demo."""
    parser = Parser(prog="demo", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--clip", help=f"a video file, or one of {', '.join(CLIPS)} (default: these three)")
    parser.add_argument("--bits", type=int, default=2, help="bits of the low-bit cache (default: 2)")
    parser.add_argument("--group-size", type=int, default=32, help="channels that share a step (default: 32)")
    parser.add_argument("--correction", default="taylor", help="taylor (default), exact, or none")
    parser.add_argument("--chunks", type=int, default=6, help="chunks to generate, three frames each (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where pictures and metrics go")
    args = parser.parse_args(arguments)
    config = ModelConfig()
    most = config.max_frames // config.chunk_frames - PROMPT_CHUNKS
    if not 1 <= args.chunks <= most:
        parser.error(f"--chunks {args.chunks}: expected 1 to {most}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed}: expected 0 to 2**63 - 1")
    if args.group_size < 1 or config.head_dim % args.group_size:
        parser.error(f"--group-size {args.group_size} does not divide this model's head_dim, {config.head_dim}")
    try:
        args.clips = {args.clip: load_clip(args.clip)} if args.clip else {name: held_out(name) for name in CLIPS}
        args.variants = variants(args.bits, args.group_size, args.correction)
        for variant in args.variants:
            variant.backend()
    except (VideoError, jkv_compile.ConfigurationError) as error:
        parser.error(" ".join(str(error).split()))
    return args


def load_clip(name: str) -> Tensor:
    """Frames [T, 3, 96, 128] of a shipped clip's held-out part, or of any video file from its beginning.

    Raises:
        VideoError: the file is missing, not a video, or shorter than the prompt.
    """
    if name in CLIPS:
        return held_out(name)
    config = ModelConfig()
    frames = read_frames(Path(name), stop=config.max_frames)
    needed = PROMPT_CHUNKS * config.chunk_frames
    if len(frames) < needed:
        raise VideoError(f"too short: {name} has {len(frames)} frames, and the prompt alone takes {needed}")
    return crop_and_resize(frames)


def variants(bits: int, group_size: int, correction: str) -> list[Variant]:
    """BF16, the milder INT4 (where it is milder), the low-bit cache without and with correction, and a preset.

    The preset is "memory": fewer bytes than INT2 in groups of 32, and a better quantizer.
    """
    chosen = [Variant("BF16")]
    if bits < 4:
        chosen.append(Variant("INT4", 4, group_size, correction))
    chosen.append(Variant(f"INT{bits} naive", bits, group_size, "none"))
    if correction != "none":
        chosen.append(Variant(f"INT{bits} corrected", bits, group_size, correction))
    if bits == 2:
        chosen.append(Variant("INT2 preset", 2, 64, "taylor", "unbiased"))
    return chosen


def measure(rollouts: dict[str, Rollout], videos: dict[str, Tensor], chunk_frames: int) -> dict[str, dict[str, Any]]:
    """What ``metrics.json`` says of one clip, per variant; fidelity is to the BF16 rollout, over generated chunks."""
    prompt_frames = PROMPT_CHUNKS * chunk_frames
    reference = videos["BF16"][prompt_frames:]
    return {
        name: {
            **fidelity(videos[name][prompt_frames:], reference, chunk_frames).as_dict(),
            "cache_bytes": rollout.cache_bytes,
            "cache_ratio": rollout.full_bytes / rollout.cache_bytes,
            "seconds_per_chunk": rollout.seconds_per_chunk,
            "attention_mass": rollout.attention_mass,
        }
        for name, rollout in rollouts.items()
    }


def draw(name: str, truth: np.ndarray, videos: dict[str, np.ndarray], chunk_frames: int, folder: Path) -> None:
    """Contact sheet and side-by-side video of one clip; videos are uint8 [T, H, W, 3], ground truth may end early."""
    reference = videos["BF16"]
    shown = np.full_like(reference, 128)
    shown[: len(truth)] = truth[: len(shown)]
    rows = {"ground truth": shown}
    for label, frames in videos.items():
        rows[label] = frames
        if label == "BF16":
            known = min(len(truth), len(frames))
            error = np.full_like(frames, 128)
            error[:known] = error_map(frames[:known], truth[:known])
            rows["BF16: error\nto ground truth"] = error
        else:
            rows[f"{label}:\nerror to BF16"] = error_map(frames, reference)
    columns = []
    for chunk in range(len(reference) // chunk_frames):
        kind = "prompt" if chunk < PROMPT_CHUNKS else "generated"
        index = (chunk + 1) * chunk_frames - 1
        columns.append((index, f"{kind}, frame {index}"))
    contact_sheet(rows, columns, folder / f"{name}.png")
    side_by_side({"ground truth": shown, **videos}, folder / f"{name}.mp4")


def table(metrics: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The closing table."""
    head = ("clip", "cache", "PSNR dB", "SSIM", "cache KiB", "ratio", "s/chunk", "mass on cache")
    lines = [head]
    for clip, by_variant in metrics.items():
        for name, m in by_variant.items():
            psnr = m["psnr"]["mean"]
            lines.append(
                (
                    clip,
                    name,
                    "same" if psnr is None else f"{psnr:.2f}",
                    f"{m['ssim']['mean']:.4f}",
                    f"{m['cache_bytes'] / 1024:.0f}",
                    f"{m['cache_ratio']:.2f}x",
                    f"{m['seconds_per_chunk']:.2f}",
                    f"{m['attention_mass']:.4f}",
                )
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rows = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    transformer, autoencoder = load_models()
    config = transformer.config
    noise = draw_noise(config, args.chunks, args.seed)
    latents = {clip: encode(autoencoder, frames) for clip, frames in args.clips.items()}
    prompts = {
        clip: x[: PROMPT_CHUNKS * config.chunk_frames].unflatten(0, (-1, config.chunk_frames))
        for clip, x in latents.items()
    }

    rollouts: dict[str, dict[str, Rollout]] = {clip: {} for clip in args.clips}
    total = len(args.variants) * len(args.clips) * (PROMPT_CHUNKS + args.chunks)
    with tqdm(total=total, unit="chunk", file=sys.stderr) as bar:
        for variant in args.variants:
            torch.compiler.reset()
            compiled, backend = compile_variant(transformer, variant)
            for clip, prompt in prompts.items():
                bar.set_description(f"{variant.name}, {Path(clip).stem}")
                rollouts[clip][variant.name] = generate(
                    transformer, compiled, variant, backend, prompt, noise, on_chunk=bar.update
                )

    metrics: dict[str, dict[str, dict[str, Any]]] = {}
    ground_truth: dict[str, float | None] = {}
    for clip, by_variant in rollouts.items():
        videos = {name: decode(autoencoder, rollout.latents) for name, rollout in by_variant.items()}
        label = Path(clip).stem
        metrics[label] = measure(by_variant, videos, config.chunk_frames)
        truth = args.clips[clip]
        first, last = PROMPT_CHUNKS * config.chunk_frames, min(len(truth), len(videos["BF16"]))
        if last > first:
            scores = fidelity(videos["BF16"][first:last], truth[first:last], config.chunk_frames)
            ground_truth[label] = finite(sum(scores.psnr) / len(scores.psnr))
        draw(label, to_uint8(truth), {name: to_uint8(v) for name, v in videos.items()}, config.chunk_frames, args.out)

    settings = {key: getattr(args, key) for key in ("bits", "group_size", "correction", "chunks", "seed")}
    tokens = (PROMPT_CHUNKS + args.chunks) * config.chunk_tokens
    document = {
        "settings": settings,
        "cached_tokens_per_layer": tokens,
        "bf16_psnr_to_ground_truth": ground_truth,
        "clips": metrics,
    }
    (args.out / "metrics.json").write_text(json.dumps(document, indent=2) + "\n")
    print(table(metrics))
    print(f"\nPSNR and SSIM are against the BF16 rollout; {tokens} cached tokens per layer. Files: {args.out}/")


if __name__ == "__main__":
    main()
