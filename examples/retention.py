"""Which tokens to keep of a long history: ``python -m examples.retention``. Resumable: what is on record is not redone.

All clips are continued for nine chunks after three given ones, with caches that keep a half or a third of all tokens
(the chunk at hand among them), chosen by the attention that they have received, by a learned head
(`examples.train_salience`), by age, at random and in even distances; beside caches that keep all of them in fewer bits,
plain INT4, and what takes half of INT4's bytes. Fidelity is to the BF16 rollout from the same noise. A table is
printed, and ``results/retention.json`` written.

``--cost`` measures what each salience adds to one call of attention instead (one CPU thread, least of 15, side by
side).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from examples.data import CLIPS, held_out
from examples.metrics import fidelity
from examples.quality_report import with_interval
from examples.rollout import PROMPT_CHUNKS, Variant, compile_variant, decode, draw_noise, encode, generate, load_models
from examples.train_salience import WEIGHTS as HEAD
from jkv_compile.kernels.quantizers import grid_of
from jkv_compile.kernels.retention import no_places, tell

CHUNKS = 9
SALIENCES = {
    "attention": "attention", "learned head": str(HEAD), "recent": "recent", "random": "random", "even": "even",
}  # fmt: skip
SHARES = {"1/2": 2, "1/3": 3}
# Quantizer, bits of keys and values and of steps, and the share of tokens that takes half of what plain INT4 in groups
# of 64 does, on this model.
HALVES = (
    ("unbiased", (4, 4), 16, 0.48), ("unbiased", (3, 4), 16, 0.535), ("symmetric_unbiased", (4, 4), 8, 0.52),
    ("symmetric_unbiased", (3, 4), 8, 0.59), ("symmetric_unbiased", (3, 3), 8, 0.68),
)  # fmt: skip


def variants(chunk_tokens: int) -> list[tuple[Variant, str, str]]:
    """Each with the share of tokens that it keeps, and by which salience; BF16 first."""
    tokens = (PROMPT_CHUNKS + CHUNKS) * chunk_tokens
    packed = "taylor", "unbiased", "eager"
    chosen = [(Variant("BF16", inner="eager"), "all", "")]
    for bits, shares in ((2, ("1/2", "1/3")), (4, ("1/2",))):
        chosen.append((Variant(f"{bits} bits, all", bits, 64, *packed), "all", ""))
        for share in shares:
            part = SHARES[share]
            for name, salience in SALIENCES.items():
                kept = {"budget": tokens // part, "salience": salience}
                chosen.append((Variant(f"{bits} bits, {share}, {name}", bits, 64, *packed, **kept), share, name))
    chosen.append((Variant("INT4", 4, 64, "none", "rtn", "eager"), "all", ""))
    for quantizer, bits, step_bits, part in HALVES:
        for name in ("attention", "recent", "random", "even"):
            kept = {"budget": int(part * tokens), "salience": SALIENCES[name], "step_bits": step_bits}
            label = f"half of INT4, {quantizer} {_label(bits)}, {name}"
            variant = Variant(label, bits, 64, "taylor", quantizer, "eager", **kept)
            chosen.append((variant, f"{part:.0%}".replace("%", " %"), name))
    return chosen


def _label(bits: int | tuple[int, int]) -> str:
    """As in 2, or 3/4 for keys and values."""
    return "/".join(map(str, dict.fromkeys([bits] if isinstance(bits, int) else bits)))


def measure(seeds: int, out: Path) -> list[dict[str, Any]]:
    """One record per variant, clip and draw of noise; those that `out` has are taken from there."""
    transformer, autoencoder = load_models()
    config = transformer.config
    frames = config.chunk_frames
    prompts = {c: encode(autoencoder, held_out(c)).unflatten(0, (-1, frames))[:PROMPT_CHUNKS] for c in CLIPS}
    videos: dict[tuple[str, int], torch.Tensor] = {}
    records = json.loads(out.read_text()) if out.exists() else []
    done = {(r["cache"], r["clip"], r["seed"]) for r in records}
    chosen = variants(config.chunk_tokens)
    with tqdm(total=len(chosen) * len(prompts) * seeds, unit="rollout") as bar:
        for seed, (variant, share, salience) in itertools.product(range(seeds), chosen):
            torch.compiler.reset()
            compiled, backend = compile_variant(transformer, variant)
            for clip, prompt in prompts.items():
                bar.set_postfix_str(f"{variant.name}, {clip}")
                bar.update()
                if (variant.name, clip, seed) in done:
                    continue
                rollout = generate(transformer, compiled, variant, backend, prompt, draw_noise(config, CHUNKS, seed))
                video = decode(autoencoder, rollout.latents[PROMPT_CHUNKS:])
                if variant.bits is None:
                    videos[clip, seed] = video
                    continue
                scores = fidelity(video, videos[clip, seed], frames)
                records.append({
                    "cache": variant.name, "bits": _label(variant.bits), "quantizer": variant.quantizer, "kept": share,
                    "salience": salience, "clip": clip, "seed": seed, "psnr": round(fmean(scores.psnr), 5),
                    "ssim": round(fmean(scores.ssim), 5), "psnr_last_chunk": round(scores.psnr[-1], 5),
                    "ratio": round(rollout.full_bytes / rollout.cache_bytes, 5),
                })  # fmt: skip
                out.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    return records


def cost() -> str:
    """What one call of attention over kept tokens takes (4 heads of 128, 2 bits), against that over the most recent."""
    lines = ["| query rows | kept tokens | by | ms | against recent |", "|---|---|---|---|---|"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for rows, length in itertools.product((4096, 8192), (144, 512, 1560)):
        torch.manual_seed(0)
        store = [part for _ in "kv" for part in _packed(torch.randn(1, 4, rows, 128))]
        query, key, value = torch.randn(3, 1, 4, length, 128).bfloat16().unbind()
        chosen = torch.arange(2 * rows) % 2 == 0
        least: dict[str, float] = {}
        for _, policy in itertools.product(range(15), ("recent", "attention", "even")):
            places, known = no_places(2 * rows), torch.ones_like(chosen)
            tell(places, chosen, known, torch.zeros_like(chosen))
            state = places, places.clone(), torch.rand(rows), torch.rand(rows)
            settings = key, value, None, False, 128**-0.5, 2, 2, "taylor", policy
            began = time.perf_counter()
            torch.ops.jkv.attention_kept(query, *store, *state, [0, 2 * rows], *settings)
            least[policy] = min(least.get(policy, float("inf")), time.perf_counter() - began)
        for policy, seconds in least.items():
            part = seconds / least["recent"]
            lines.append(f"| {length:,} | {rows:,} | {policy} | {1e3 * seconds:.1f} | {part:.2f} |")
    torch.set_num_threads(threads)
    return "\n".join(lines)


def _packed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of tokens [B, H, S, D] in 2 bits and groups of 64."""
    codes, scales = (torch.zeros(shape, dtype=d) for shape, d in zip(
        grid_of("rtn").store_shapes(x.shape, 2, 64), (torch.uint8, torch.float16), strict=True
    ))  # fmt: skip
    torch.ops.jkv.append(codes, scales, x, 0, 2)
    return codes, scales


def table(records: list[dict[str, Any]]) -> str:
    """Mean and interval per kind of cache."""
    lines = [
        "| quantizer | bits | tokens kept | by | PSNR, dB | SSIM | against BF16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(r["cache"] for r in records):
        group = [r for r in records if r["cache"] == name]
        first, ssim = group[0], fmean(r["ssim"] for r in group)
        psnr = with_interval([r["psnr"] for r in group])
        lines.append(
            f"| `{first['quantizer']}` | {first['bits']} | {first['kept']} | {first['salience']} | {psnr} | {ssim:.4f} "
            f"| {first['ratio']:.2f}× |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the noise")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retention.json")
    parser.add_argument("--cost", action="store_true", help="time of attention instead")
    args = parser.parse_args()
    if args.cost:
        print(cost())
        return
    print(table(measure(args.seeds, args.out)))


if __name__ == "__main__":
    main()
