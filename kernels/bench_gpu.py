"""Attention on a GPU against what one would use without a packed cache, in one process.

    python -m jkv_compile.kernels.bench_gpu [--shapes self_forcing decode] [--bits 2] [--output out/bench_gpu]

Peers, all on the same chunk: `F.scaled_dot_product_attention` on the uncompressed bfloat16 cache (flash, and cuDNN),
FlexAttention with a score modifier that subtracts the correction (the way of arXiv 2605.26266, on an uncompressed
cache), and dequantizing the packed cache for `F.scaled_dot_product_attention`. Implementations take turns, so that
clocks and temperature are the same for all; a ratio is against flash. Writes OUTPUT.json and, with matplotlib,
OUTPUT.png. Without a GPU it says so and does nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import reference

_log = logging.getLogger("jkv_compile.kernels.bench_gpu")


@dataclass(frozen=True)
class Shape:
    """One attention call: `queries` rows attend to `cached` packed tokens and to themselves."""

    heads: int
    kv_heads: int
    queries: int
    cached: int
    head_dim: int = 128
    batch: int = 1


SHAPES = {
    "self_forcing": Shape(12, 12, 4680, 28080),
    "self_forcing_first_chunks": Shape(12, 12, 4680, 4680),
    "krea": Shape(40, 40, 4680, 28080),
    "longcat": Shape(32, 32, 7800, 29640),
    "hy_worldplay": Shape(24, 24, 6240, 49920),
    "magi": Shape(24, 8, 8640, 43200),
    "one_frame": Shape(12, 12, 1560, 31200),
    "short_block": Shape(32, 8, 256, 32768),
    "decode": Shape(32, 8, 1, 32768),
}
"""Of the models of the project's notes: latent frames of 1,560 tokens (Wan at 480p), chunks of three to five frames."""


@dataclass(frozen=True)
class Result:
    """Median milliseconds of one implementation at one shape."""

    shape: str
    implementation: str
    milliseconds: float
    ratio_to_flash: float | None
    difference: float | None  # of what computes the corrected attention, relative, from FlexAttention's output


@contextmanager
def _rows_for_unpack_once(rows: int, device: torch.device):
    """Force one of the two paths by moving the threshold."""
    from . import triton_config

    name = triton_config.architecture_of(device)
    table = triton_config.ARCHITECTURES[name]
    triton_config.ARCHITECTURES[name] = dataclasses.replace(table, unpack_once_rows=rows)
    try:
        yield
    finally:
        triton_config.ARCHITECTURES[name] = table


def implementations(shape: Shape, bits: int, group_size: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Callables that compute `[B, H, L, D]`; those named `jkv_…` and `flex` compute the corrected attention."""
    from . import gpu

    dtype, scale = torch.bfloat16, shape.head_dim**-0.5

    def random(heads: int, tokens: int) -> Tensor:
        data = torch.randn(shape.batch, tokens, heads, shape.head_dim, device=device, dtype=dtype)
        return data.transpose(1, 2)

    query, key, value = (random(h, shape.queries) for h in (shape.heads, shape.kv_heads, shape.kv_heads))
    cached = [random(shape.kv_heads, shape.cached) for _ in range(2)]
    stores = [reference.quantize(x, bits, group_size) for x in cached]
    store = [t for pair in stores for t in pair]
    full_key, full_value = (torch.cat(pair, 2) for pair in zip(cached, (key, value)))
    grouped = shape.heads != shape.kv_heads

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, k, v, scale=scale, enable_gqa=grouped)

    def backend(kind: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(kind):
                return attend(full_key, full_value)

        return call

    def dequantize_then_attend() -> Tensor:
        k, v = (gpu.dequantize(*pair, 0, shape.cached, bits, dtype) for pair in stores)
        return attend(torch.cat((k, key), 2), torch.cat((v, value), 2))

    def ours(rows: int | None) -> Callable[[], Tensor]:
        def call() -> Tensor:
            ranges = [0, shape.cached]
            return gpu.attention(  # type: ignore[call-arg,arg-type]
                query, *store, ranges, key, value, None, False, scale, bits, bits, "taylor"  # type: ignore[arg-type]
            )[0]  # fmt: skip

        def forced() -> Tensor:
            assert rows is not None
            with _rows_for_unpack_once(rows, device):
                return call()

        return call if rows is None else forced

    return {
        "flash": backend(SDPBackend.FLASH_ATTENTION),
        "cudnn": backend(SDPBackend.CUDNN_ATTENTION),
        "flex": _flex(query, stores, bits, key, value, scale, grouped),
        "dequantize_then_sdpa": dequantize_then_attend,
        "jkv": ours(None),
        "jkv_fused": ours(2**30),
        "jkv_unpack_once": ours(1),
    }


def _flex(query, stores, bits, key, value, scale, grouped) -> Callable[[], Tensor]:
    """Compiled FlexAttention over the dequantized cache, corrected by a score modifier."""
    from torch.nn.attention.flex_attention import flex_attention

    (key_codes, key_scales), (value_codes, value_scales) = stores
    keys, values = (
        torch.cat((reference.dequantize(*pair, bits).to(key.dtype), current), 2)
        for pair, current in (((key_codes, key_scales), key), ((value_codes, value_scales), value))
    )
    delta = reference.quantization_step(key_scales, bits)  # [B, H_kv, S, G]
    groups, cached, group = delta.shape[3], delta.shape[2], query.shape[1] // key.shape[1]
    squares = F.pad(delta.square(), (0, 0, 0, key.shape[2]))  # current keys: no correction
    norms = query.float().unflatten(-1, (groups, -1)).square().sum(-1) * (scale**2 / 24)  # [B, H, L, G]
    assert squares.shape[2] == cached + key.shape[2]

    def corrected(score, b, h, i, j):
        for g in range(groups):
            score = score - norms[b, h, i, g] * squares[b, h // group, j, g]
        return score

    compiled = torch.compile(flex_attention)
    return lambda: compiled(query, keys, values, score_mod=corrected, scale=scale, enable_gqa=grouped)


def _measure(callables: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median milliseconds each; in every round each implementation has one turn."""
    times: dict[str, list[float]] = {name: [] for name in callables}
    for name, call in list(callables.items()):
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
        except Exception as error:  # a peer that this GPU or build does not have is left out, and named
            _log.warning("%s is not measured: %s", name, str(error).splitlines()[0] if str(error) else type(error))
            del callables[name]
    for _ in range(rounds):
        for name, call in callables.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: statistics.median(times[name]) for name in callables}


def _differences(callables: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Relative difference of our implementations from FlexAttention, which is not ours."""
    if "flex" not in callables:
        return {}
    expected = callables["flex"]().float()
    return {
        name: ((call().float() - expected).norm() / expected.norm()).item()
        for name, call in callables.items()
        if name.startswith("jkv")
    }


def measure(names: Sequence[str], bits: int, group_size: int, rounds: int, device: torch.device) -> list[Result]:
    """Results of all implementations at the named shapes."""
    results = []
    for name in names:
        torch.manual_seed(0)
        callables = implementations(SHAPES[name], bits, group_size, device)
        times = _measure(callables, rounds)
        differences = _differences(callables)
        flash = times.get("flash")
        results += [
            Result(name, key, round(t, 4), round(t / flash, 4) if flash else None, differences.get(key))
            for key, t in times.items()
        ]
        del callables
        torch.cuda.empty_cache()
    return results


def _plot(results: list[Result], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes, kinds = (list(dict.fromkeys(getattr(r, field) for r in results)) for field in ("shape", "implementation"))
    figure, axes = pyplot.subplots(figsize=(1.5 * len(shapes) + 4, 4), layout="constrained")
    for i, kind in enumerate(kinds):
        points = [
            (shapes.index(r.shape) + (i - len(kinds) / 2) * 0.11, r.ratio_to_flash)
            for r in results
            if r.implementation == kind and r.ratio_to_flash is not None
        ]
        axes.bar([x for x, _ in points], [y for _, y in points], width=0.1, label=kind)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xticks=range(len(shapes)), xticklabels=shapes, ylabel="time / flash on uncompressed bf16", title=title)
    axes.set_yscale("log")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jkv_compile.kernels.bench_gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--bits", type=int, default=2, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("out/bench_gpu"))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench_gpu: no GPU here; nothing was measured.")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    results = measure(options.shapes, options.bits, options.group_size, options.rounds, device)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "device": name,
        "torch": torch.__version__,
        "bits": options.bits,
        "group_size": options.group_size,
        "results": [dataclasses.asdict(r) for r in results],
    }
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    for r in results:
        ratio = f"{r.ratio_to_flash:7.3f}x" if r.ratio_to_flash else " " * 8
        print(f"{r.shape:26s} {r.implementation:22s} {r.milliseconds:10.3f} ms {ratio}")
    try:
        _plot(
            results, options.output.with_suffix(".png"), f"{name}, {options.bits} bits, groups of {options.group_size}"
        )
    except ImportError:
        _log.warning("no plot: matplotlib is not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
