"""What moves per chunk when packed caches live in host memory, and what that costs on a CPU.

    python -m examples.offload

The example model continues a clip with the cache in memory and with `offload="cpu"`, chunk by chunk in turns, its
blocks compiled one by one; then four of its blocks take turns over longer histories. Bytes are what
`backend.memory().traffic` counts, next to what the same tokens take in BF16. On a CPU both sides of a copy are memory
and nothing overlaps: times tell what copies and bookkeeping cost, not what a GPU would wait for. Prints a table, and
writes `offload.json` to `out/`, and to `examples/results/` unless `--quick`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.rollout import draw_noise, load_models
from examples.video_model.model import Block, KVCache, ModelConfig
from examples.video_model.sampling import Sampler
from jkv_compile import JKVBackend, jkv_backend

VARIANTS: dict[str, str | None] = {"in memory": None, "offloaded": "cpu"}
HISTORIES = 4096, 16384, 32768  # cached tokens
BLOCKS = 4  # two of them find their caches where they are
MIB = 2**20


def backend_of(offload: str | None) -> JKVBackend:
    return jkv_backend(preset="memory", offload=offload)


def moved(backend: JKVBackend) -> dict[str, int]:
    traffic = backend.memory().traffic
    assert traffic is not None
    return asdict(traffic)


def continue_clip(chunks: int, seconds: float) -> dict[str, Any]:
    """What every chunk moves, and the least seconds of the last one, which is generated again and again.

    The latents must be the same bits.
    """
    samplers: dict[str, Sampler] = {}
    backend = backend_of("cpu")
    for variant, offload in VARIANTS.items():
        transformer, _ = load_models()
        for block in transformer.blocks:
            block.compile(backend=backend_of(offload))
        config = transformer.config
        caches = transformer.allocate_cache(1, chunks * config.chunk_frames)
        samplers[variant] = Sampler(transformer, config, caches)
    noise = draw_noise(config, chunks, seed=0)
    traffic = []
    for n in tqdm(range(chunks), desc="chunks"):
        before = moved(backend)
        latents = {variant: sampler.generate(noise[n : n + 1]) for variant, sampler in samplers.items()}
        assert torch.equal(*latents.values()), "offloading changed the result"
        traffic.append({name: now - before[name] for name, now in moved(backend).items()})
    best = dict.fromkeys(samplers, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for variant, sampler in samplers.items():
            sampler.chunks_done -= 1
            began = time.perf_counter()
            sampler.generate(noise[-1:])
            best[variant] = min(best[variant], time.perf_counter() - began)
    report = backend.memory()
    return {
        "chunk_tokens": config.chunk_tokens,
        "seconds": best,
        "traffic": traffic,
        "host_bytes": report.host_bytes,
        "staging_bytes": report.staging_bytes,
    }


def block_milliseconds(tokens: int, seconds: float) -> dict[str, Any]:
    """Milliseconds per call of blocks in turns, with so many tokens cached before the chunk; minima."""
    config = ModelConfig()
    chunk = config.chunk_tokens
    x, modulation = torch.randn(1, chunk, config.dim).bfloat16(), torch.randn(1, 6, config.dim).bfloat16()
    rope = torch.rand(chunk, 2, config.head_dim // 2)
    shape = 1, tokens + chunk, config.heads, config.head_dim
    runs: dict[str, list[tuple[Any, KVCache]]] = {}
    torch._dynamo.reset()
    for variant, offload in VARIANTS.items():
        blocks = [Block(config).bfloat16().eval().requires_grad_(False) for _ in range(BLOCKS)]
        caches: list[KVCache] = [{name: torch.randn(shape).bfloat16() for name in ("k", "v")} for _ in blocks]
        runs[variant] = [(torch.compile(b, backend=backend_of(offload)), c) for b, c in zip(blocks, caches)]
        for start in (0, chunk, tokens, tokens):
            for block, cache in runs[variant]:
                block(x, modulation, rope, cache, start, start + chunk)

    def call(variant: str) -> float:
        began = time.perf_counter()
        for block, cache in runs[variant]:
            block(x, modulation, rope, cache, tokens, tokens + chunk)
        return (time.perf_counter() - began) / BLOCKS * 1e3

    best = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for variant in runs:
            best[variant] = min(best[variant], call(variant))
    before = moved(backend_of("cpu"))
    call("offloaded")
    now = moved(backend_of("cpu"))
    return {"tokens": tokens, "milliseconds": best, "traffic": {name: now[name] - before[name] for name in now}}


def amounts(traffic: dict[str, int]) -> str:
    """Columns of a table: to the device and back, packed and in BF16, and the ratio of all."""
    packed, full = ([traffic[f"{kind}{way}"] for way in ("to_device", "from_device")] for kind in ("", "full_"))
    cells = [f"{p / MIB:.2f} ({f / MIB:.2f})" for p, f in zip(packed, full)]
    return " | ".join([*cells, f"{sum(full) / sum(packed):.2f}x"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row of the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="little of each, to see that it works")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.quick:
        args.chunks, args.seconds = 4, 0.5
    clip = continue_clip(args.chunks, args.seconds)
    histories = [block_milliseconds(tokens, args.seconds) for tokens in tqdm(HISTORIES, desc="history")]
    record = {"threads": torch.get_num_threads(), "clip": clip, "blocks": histories}
    for folder in (Path("out"), *(() if args.quick else (Path(__file__).parent / "results",))):
        folder.mkdir(exist_ok=True)
        (folder / "offload.json").write_text(json.dumps(record, indent=1) + "\n")
    host, device = (clip[name] / MIB for name in ("host_bytes", "staging_bytes"))
    print(f"{record['threads']} threads; caches in host memory {host:.2f} MiB, on the device {device:.2f} MiB")
    print("| | in memory | offloaded | MiB to the device (BF16) | back (BF16) | less |\n|---|---|---|---|---|---|")
    times = " | ".join(f"{1e3 * seconds:.0f} ms" for seconds in clip["seconds"].values())
    cached = (args.chunks - 1) * clip["chunk_tokens"]
    print(f"| a chunk, {cached:,} cached | {times} | {amounts(clip['traffic'][-1])} |")
    for entry in histories:
        times = " | ".join(f"{ms:.1f} ms" for ms in entry["milliseconds"].values())
        each = {name: n // BLOCKS for name, n in entry["traffic"].items()}
        print(f"| a block, {entry['tokens']:,} cached | {times} | {amounts(each)} |")


if __name__ == "__main__":
    main()
