"""A long run with eviction: does anything grow, drift, recompile or break?

    python -m examples.soak --chunks 2000

The example model continues a held-out clip for as many chunks as asked, far beyond its cache of eight: before each new
chunk the oldest one is evicted by moving what lies after it, in eager code; the first chunk is kept as a sink. After
a warm-up nothing may compile, resident memory may grow by 1 % at most, latents must stay finite, and the share of
attention on the cache must not drift. That share follows what the video shows, so it is measured beside a control: the
same model, in full precision, whose cache is filled with the very chunks that the packed run generates. What may not
drift is the difference. `results/soak.json` and `results/soak.png` are written; the exit status says whether all of
that held.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm

import jkv_compile
from examples.attention_mass import AttentionMass
from examples.data import CLIPS, held_out
from examples.rollout import PROMPT_CHUNKS, Variant, draw_noise, encode, load_models
from examples.video_model.model import KVCache
from examples.video_model.sampling import Sampler
from jkv_compile.kernels.quantizers import rotates

CAPACITY, SINK = 8, 1  # chunks that the cache holds, and of them those that are never evicted
WARM_UP = 40  # chunks; all that compiles has then been compiled, and allocators have seen every size
GROWTH = 0.01
DRIFT = 0.05  # of attention mass less the control's, between the means of the first and the last quarter


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def evict(caches: list[KVCache], chunk_tokens: int) -> None:
    """Forget the oldest chunk after the sink: what follows it moves down, bit for bit where it is packed."""
    first = SINK * chunk_tokens
    for cache in caches:
        for tensor in cache.values():
            tensor[:, first:-chunk_tokens] = tensor[:, first + chunk_tokens :].clone()


def attention_mass(sampler: Sampler, transformer: Any, variant: Variant, noise: Tensor) -> float:
    """Share of attention on cached keys in one denoising of the next chunk by the eager model."""
    cached = sampler.chunks_done * sampler.config.chunk_tokens
    steps = None
    if variant.bits is not None:
        steps = [jkv_compile.quantization_step(cache["k"]) for cache in sampler.caches]
    copies = [{name: tensor.clone() for name, tensor in cache.items()} for cache in sampler.caches]
    eager = Sampler(transformer, sampler.config, copies)
    eager.chunks_done = sampler.chunks_done
    with AttentionMass(cached, steps, rotates(variant.quantizer)) as mass, warnings.catch_warnings():
        warnings.simplefilter("ignore", jkv_compile.PackedReadWarning)
        eager.denoise(noise)
    return mass.mean


def soak(chunks: int, variant: Variant, every: int) -> dict[str, Any]:
    """Generate, and note what the module's docstring names.

    Returns:
        The record: per measured chunk, resident bytes and attention mass, also the control's; per chunk, seconds and
        the latents' standard deviation; what compiled when; and `verdict`, a failure per line.
    """
    torch.manual_seed(0)
    transformer, autoencoder = load_models()
    config = transformer.config
    prompt = encode(autoencoder, held_out(next(iter(CLIPS)))[: PROMPT_CHUNKS * config.chunk_frames])
    prompt = prompt.unflatten(0, (PROMPT_CHUNKS, config.chunk_frames))
    del autoencoder
    backend = variant.backend()
    plain = Variant("BF16", inner=variant.inner)
    sampler, control = (
        Sampler(
            torch.compile(transformer, backend=b), config, transformer.allocate_cache(1, CAPACITY * config.chunk_frames)
        )
        for b in (backend, plain.backend())
    )
    for chunk in prompt:
        sampler.prefill(chunk[None])
        control.prefill(chunk[None])
    record: dict[str, Any] = {"chunks": chunks, "variant": vars(variant), "capacity": CAPACITY, "sink": SINK}
    record |= {"at": [], "resident": [], "mass": [], "control": [], "seconds": [], "deviation": [], "compiled_at": []}
    graphs = len(backend.reports)  # type: ignore[union-attr]
    for n in tqdm(range(chunks), unit="chunk", mininterval=2):
        noise = draw_noise(config, 1, seed=n)
        if sampler.chunks_done == CAPACITY:
            for each in (sampler, control):
                evict(each.caches, config.chunk_tokens)
                each.chunks_done -= 1
        if n % every == 0 and n >= CAPACITY:
            record["mass"].append(attention_mass(sampler, transformer, variant, noise))
            record["control"].append(attention_mass(control, transformer, plain, noise))
            record["resident"].append(resident_bytes())
            record["at"].append(n)
        began = time.perf_counter()
        latents = sampler.generate(noise)
        record["seconds"].append(time.perf_counter() - began)
        control.prefill(latents)
        record["deviation"].append(latents.float().std().item())
        if not latents.isfinite().all():
            break
        if len(backend.reports) != graphs:  # type: ignore[union-attr]
            graphs = len(backend.reports)  # type: ignore[union-attr]
            record["compiled_at"].append(n)
    record["cache_bytes"] = backend.memory().packed_bytes  # type: ignore[union-attr]
    record["verdict"] = verdict(record)
    return record


def verdict(record: dict[str, Any]) -> list[str]:
    """What did not hold."""
    failures = []
    if len(record["seconds"]) < record["chunks"] or record["deviation"][-1] != record["deviation"][-1]:
        failures.append(f"latents are not finite at chunk {len(record['seconds'])}")
    late = [n for n in record["compiled_at"] if n >= WARM_UP]
    if late:
        failures.append(f"compiled anew at chunks {late}")
    after = [i for i, n in enumerate(record["at"]) if n >= WARM_UP]
    if len(after) >= 8:
        first, last = after[: len(after) // 4], after[-(len(after) // 4) :]
        resident, mass, control = (
            [statistics.fmean(record[name][i] for i in quarter) for quarter in (first, last)]
            for name in ("resident", "mass", "control")
        )
        record["resident_change"] = resident[1] / resident[0] - 1
        record["mass_change"], record["control_change"] = mass[1] - mass[0], control[1] - control[0]
        record["mass_over_control"] = [mass[0] - control[0], mass[1] - control[1]]
        drift = record["mass_change"] - record["control_change"]
        if record["resident_change"] > GROWTH:
            failures.append(f"resident memory grew by {record['resident_change']:+.4f}, more than {GROWTH}")
        if abs(drift) > DRIFT:
            failures.append(f"attention on the cache less the control's drifted by {drift:+.4f}, more than {DRIFT}")
    return failures


def draw(record: dict[str, Any], path: Path) -> None:
    """Resident memory, attention mass and seconds per chunk over the run, as a PNG."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(9, 7), sharex=True)
    resident = [n / 2**20 for n in record["resident"]]
    axes[0].plot(record["at"], resident)
    axes[0].set_ylabel("resident memory, MiB")
    axes[0].set_ylim(0, 1.2 * max(resident))
    axes[1].plot(record["at"], record["mass"], label="INT2, corrected")
    axes[1].plot(record["at"], record["control"], label="BF16, the same video")
    axes[1].set_ylabel("attention on the cache")
    axes[1].set_ylim(0, 1)
    axes[1].legend(loc="lower right")
    axes[2].semilogy(record["seconds"], linewidth=0.5)
    axes[2].set_ylabel("seconds per chunk")
    axes[2].set_xlabel("chunk")
    for n in record["compiled_at"]:
        axes[2].axvline(n, color="tab:red", linewidth=0.5)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--every", type=int, default=10, help="chunks between two measurements")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    variant = Variant("INT2", bits=2, group_size=64, correction="taylor", quantizer="unbiased", inner=args.inner)
    record = soak(args.chunks, variant, args.every)
    (args.out / "soak.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, args.out / "soak.png")
    seconds = statistics.median(record["seconds"])
    print(f"{len(record['seconds'])} chunks of {seconds:.3f} s; compiled at {record['compiled_at']}")
    if "mass_change" in record:
        print(f"resident memory {record['resident_change']:+.4f}")
        print(f"attention on the cache {record['mass_change']:+.4f}, the control's {record['control_change']:+.4f}")
        print("over the control, first and last quarter: {:+.4f}, {:+.4f}".format(*record["mass_over_control"]))
    print("\n".join(record["verdict"]) or "all held")
    return 1 if record["verdict"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
