"""What the packed cache costs besides quality: time as the history grows, compile time, overhead per call, memory.

    python -m examples.cost

Times are against plain `torch.compile`, taken side by side in one process; memory is the resident set of a process of
its own for each variant (Linux), caches full. The model itself allocates its caches in full precision, before this
package sees them: that moment has the same peak in both. Writes `cost.json` and `cost.png` to `out/`, and to
`examples/results/` unless `--quick`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from examples.video_model.model import Block, KVCache, ModelConfig
from jkv_compile import jkv_backend

MEMORY_LAYERS, MEMORY_CHUNK = 48, 512
HISTORIES = tuple(1024 * 2**i for i in range(6))  # cached tokens, up to 32k


class Layer(nn.Module):
    """Chunk-wise causal attention over a dict cache `[B, S, H, D]`, as Self-Forcing writes it."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(heads * head_dim, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, heads * head_dim)

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.head_dim).unbind(2)
        end = start + n
        cache["k"][:, start:end] = k
        cache["v"][:, start:end] = v
        keys, values = cache["k"][:, :end], cache["v"][:, :end]
        o = F.scaled_dot_product_attention(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        return x + self.out(o.transpose(1, 2).flatten(2))


class Network(nn.Module):
    def __init__(self, layers: int, heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(heads, head_dim) for _ in range(layers))
        self.shape = heads, head_dim

    def new_caches(self, tokens: int) -> list[dict[str, Tensor]]:
        heads, head_dim = self.shape
        return [
            {name: torch.zeros(1, tokens, heads, head_dim, dtype=torch.bfloat16) for name in ("k", "v")}
            for _ in self.layers
        ]

    def forward(self, x: Tensor, caches: list[dict[str, Tensor]], start: int) -> Tensor:
        for layer, cache in zip(self.layers, caches):
            x = layer(x, cache, start)
        return x


def backend(variant: str) -> Any:
    return "inductor" if variant == "BF16" else jkv_backend(bits=2)


def compile_seconds(layers: int, repeats: int) -> dict[str, float]:
    """Seconds from `torch.compile` to the third chunk, after which nothing compiles any more; medians."""
    seconds: dict[str, list[float]] = {"BF16": [], "INT2": []}
    torch.compile(Network(1).bfloat16())(torch.randn(1, 8, 512, dtype=torch.bfloat16), Network(1).new_caches(64), 0)
    with torch._inductor.config.patch(force_disable_caches=True):
        for _ in tqdm(range(repeats), desc="compile time"):
            for variant, times in seconds.items():
                torch._dynamo.reset()
                model = Network(layers).bfloat16()
                compiled, caches = torch.compile(model, backend=backend(variant)), model.new_caches(256)
                x = torch.randn(1, 32, 512, dtype=torch.bfloat16)
                begin = time.perf_counter()
                for start in (0, 32, 64):
                    compiled(x, caches, start)
                times.append(time.perf_counter() - begin)
    return {variant: statistics.median(times) for variant, times in seconds.items()}


def call_microseconds(calls: int) -> dict[str, float]:
    """Microseconds of one call of one layer on 8 tokens with 64 cached, where Python is all that counts; minima."""
    runs = {}
    for variant in ("BF16", "INT2"):
        torch._dynamo.reset()
        model = Network(1, heads=2).bfloat16()
        compiled, caches = torch.compile(model, backend=backend(variant)), model.new_caches(256)
        x = torch.randn(1, 8, 128, dtype=torch.bfloat16)
        for start in (0, 32, 64, 64):
            compiled(x, caches, start)
        runs[variant] = (compiled, x, caches)
    best = dict.fromkeys(runs, float("inf"))
    for _ in tqdm(range(calls), desc="overhead"):
        for variant, (compiled, x, caches) in runs.items():
            begin = time.perf_counter()
            for _ in range(20):
                compiled(x, caches, 64)
            best[variant] = min(best[variant], (time.perf_counter() - begin) / 20 * 1e6)
    return best


def block_milliseconds(histories: tuple[int, ...], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of one block of the example model on one chunk, with so many tokens cached before it; minima."""
    config = ModelConfig()
    tokens = config.chunk_tokens
    block = Block(config).bfloat16().eval().requires_grad_(False)
    x, modulation = torch.randn(1, tokens, config.dim).bfloat16(), torch.randn(1, 6, config.dim).bfloat16()
    rope = torch.rand(tokens, 2, config.head_dim // 2)
    shape = 1, max(histories) + tokens, config.heads, config.head_dim
    runs = {}
    torch._dynamo.reset()
    for variant in ("BF16", "INT2"):
        cache: KVCache = {name: torch.randn(shape).bfloat16() for name in ("k", "v")}
        runs[variant] = torch.compile(block, backend=backend(variant)), cache
        for start in (0, tokens, *histories):  # the first two compile, for a fixed and for any history
            runs[variant][0](x, modulation, rope, cache, start, start + tokens)
    best: dict[str, list[float]] = {variant: [] for variant in runs}
    for start in tqdm(histories, desc="history"):
        times = dict.fromkeys(runs, float("inf"))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for variant, (compiled, cache) in runs.items():
                begin = time.perf_counter()
                compiled(x, modulation, rope, cache, start, start + tokens)
                times[variant] = min(times[variant], 1e3 * (time.perf_counter() - begin))
        for variant, shortest in times.items():
            best[variant].append(shortest)
    return best


def plot_history(histories: tuple[int, ...], milliseconds: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for variant, times in milliseconds.items():
        axes.plot(histories, times, marker="o", label=f"{variant} cache")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(histories, [f"{tokens // 1024}k" for tokens in histories])
    axes.set_yticks(ticks := [2.0**i for i in range(-1, 9)], [f"{tick:g}" for tick in ticks])
    values = [time for times in milliseconds.values() for time in times]
    axes.set_ylim(min(values) / 1.3, max(values) * 1.3)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("milliseconds per block and chunk")
    threads = torch.get_num_threads()
    axes.set_title(f"One block of the example model, {threads} CPU thread{'s' * (threads > 1)}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def resident_bytes(variant: str, layers: int, tokens: int) -> int:
    """How much larger this process is with all layers' caches full than before they were allocated."""
    model = Network(layers).bfloat16()
    blocks = [torch.compile(layer, backend=backend(variant)) for layer in model.layers]
    x = torch.randn(1, MEMORY_CHUNK, 512, dtype=torch.bfloat16)

    def generate(caches: list[dict[str, Tensor]], until: int) -> None:
        for start in range(0, until, MEMORY_CHUNK):
            for block, cache in zip(blocks, caches):
                block(x, cache, start)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    generate(Network(1).new_caches(tokens), 3 * MEMORY_CHUNK)  # compile first: that takes memory of its own
    before = resident()
    caches = model.new_caches(tokens)
    generate(caches, tokens)
    return resident() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="layers of the network that is compiled")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per cache where memory is measured")
    parser.add_argument("--seconds", type=float, default=8.0, help="per length of the history")
    parser.add_argument("--quick", action="store_true", help="little of each, to see that it works")
    parser.add_argument("--resident", choices=("BF16", "INT2"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if args.resident:
        json.dump(resident_bytes(args.resident, MEMORY_LAYERS, args.tokens), sys.stdout)
        return
    if args.quick:
        args.layers, args.repeats, args.tokens, args.seconds = 1, 1, 3 * MEMORY_CHUNK, 0.5
    block = block_milliseconds(HISTORIES, args.seconds)
    compiled = compile_seconds(args.layers, args.repeats)
    call = call_microseconds(5 if args.quick else 60)
    memory = {}
    for variant in tqdm(("BF16", "INT2"), desc="memory"):
        command = [sys.executable, "-m", "examples.cost", "--resident", variant, "--tokens", str(args.tokens)]
        # glibc keeps freed blocks below a threshold that it raises by itself: fix it, so that what is freed goes back.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        memory[variant] = json.loads(done.stdout)
    cache = MEMORY_LAYERS * 2 * args.tokens * 512 * 2
    result = {
        "threads": torch.get_num_threads(),
        "history_tokens": HISTORIES,
        "block_milliseconds": block,
        "compile_seconds": compiled,
        "compile_ratio": compiled["INT2"] / compiled["BF16"],
        "call_microseconds": call,
        "call_overhead_microseconds": call["INT2"] - call["BF16"],
        "cache_bytes_bf16": cache,
        "resident_bytes": memory,
    }
    for folder in (Path("out"), *(() if args.quick else (Path(__file__).parent / "results",))):
        folder.mkdir(exist_ok=True)
        (folder / "cost.json").write_text(json.dumps(result, indent=1) + "\n")
        plot_history(HISTORIES, block, folder / "cost.png")
        print(f"written to {folder}/cost.json and cost.png")
    for tokens, plain, packed in zip(HISTORIES, block["BF16"], block["INT2"]):
        print(f"a block, {tokens:6,} cached BF16 {plain:.2f} ms, INT2 {packed:.2f} ms: {plain / packed:.2f}x faster")
    ratio, overhead = compiled["INT2"] / compiled["BF16"], call["INT2"] - call["BF16"]
    print(f"compile time      BF16 {compiled['BF16']:.1f} s, INT2 {compiled['INT2']:.1f} s: {ratio:.2f}x")
    print(f"a call of a layer BF16 {call['BF16']:.0f} µs, INT2 {call['INT2']:.0f} µs: {overhead:+.0f} µs")
    print(
        f"resident memory for caches of {cache / 2**20:.0f} MiB in BF16: "
        f"BF16 {memory['BF16'] / 2**20:.0f} MiB, INT2 {memory['INT2'] / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
