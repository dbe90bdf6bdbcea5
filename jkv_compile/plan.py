"""What a packed cache would save on a model and a GPU, before anything is installed or run.

    python -m jkv_compile.plan --model self-forcing --gpu rtx-4090
    python -m jkv_compile.plan --layers 32 --heads 32 --kv-heads 8 --head-dim 128 --tokens 40000 --chunk 1024 --gpu h100
    python -m jkv_compile.plan --list

Cache sizes are exact: codes and scales as `kernels.layout` stores them. Times are modelled, never measured; the report
lists what they assume.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .kernels.layout import SUPPORTED_BITS, packed_bytes

GIB = 2**30
BYTES_FULL = 2  # bfloat16

MATRIX_UTILISATION = 0.65
"""Part of the peak matrix rate that plain flash attention reaches on long chunks."""

BANDWIDTH_UTILISATION = 0.80
"""Part of the peak memory bandwidth that streaming kernels reach."""

CORRECTION_COLUMNS = 16
"""The correction is one more step of K = 16 in the score product."""

RESERVE = 0.9
"""Part of a GPU's memory that weights and cache may take; activations and the allocator need the rest."""


@dataclass(frozen=True)
class Model:
    """Published shape of a model's K/V cache. `tokens` is the full cache, `chunk` what one pass generates."""

    name: str
    parameters: float  # billions
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    chunk: int

    @property
    def full_bytes(self) -> int:
        """Bytes of the cache in bfloat16, keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.tokens * BYTES_FULL

    def cache_bytes(self, key_bits: int, value_bits: int, group_size: int, tokens: int | None = None) -> int:
        """Bytes of the packed cache: codes and scales."""
        shape = (1, self.kv_heads, self.tokens if tokens is None else tokens, self.head_dim)
        return self.layers * sum(packed_bytes(shape, bits, group_size) for bits in (key_bits, value_bits))


@dataclass(frozen=True)
class Gpu:
    """Vendor figures: memory, its bandwidth, dense bfloat16 matrix rate; and our kernels' static counts.

    `fused` and `unpack_once`: hot-loop instructions over plain flash attention's (`kernels.inspector`, triton 3.7.1).
    """

    name: str
    memory_gb: float
    bandwidth_tbs: float
    tflops: float
    fused: float
    unpack_once: float


MODELS = {
    m.name: m
    for m in (
        Model("self-forcing", 1.3, 30, 12, 12, 128, 32760, 4680),
        Model("krea-14b", 14, 40, 40, 40, 128, 32760, 4680),
        Model("longcat-video", 13.6, 48, 32, 32, 128, 29640, 7800),
    )
}

GPUS = {
    g.name: g
    for g in (
        Gpu("a100-80gb", 80, 2.04, 312, 1.203, 1.071),
        Gpu("h100", 80, 3.35, 989, 1.322, 1.026),
        Gpu("h200", 141, 4.8, 989, 1.322, 1.026),
        Gpu("b200", 180, 8.0, 2250, 1.371, 1.077),
        Gpu("rtx-4090", 24, 1.01, 165, 1.203, 1.071),
        Gpu("rtx-5090", 32, 1.79, 210, 1.353, 1.057),
        Gpu("l40s", 48, 0.86, 362, 1.203, 1.071),
        Gpu("mi300x", 192, 5.3, 1307, 1.723, 1.0),
        Gpu("mi355x", 288, 8.0, 2300, 1.841, 1.034),
    )
}


@dataclass(frozen=True)
class Overhead:
    """Modelled attention time of one layer and chunk, in milliseconds, and bounds of what packing multiplies it by."""

    plain_ms: float
    fused: tuple[float, float]
    unpack_once: tuple[float, float]
    append_ms: float


def attention_overhead(model: Model, gpu: Gpu, key_bits: int, value_bits: int, group_size: int) -> Overhead:
    """Roofline of one layer's attention over a full cache.

    The lower bound takes a kernel to be limited by matrix products or memory, whichever takes longer, with the
    correction's columns added; the upper bound takes it to be limited by the instructions it issues.
    """
    cached, keys = model.tokens - model.chunk, model.tokens
    flops = 4 * model.heads * model.chunk * keys * model.head_dim
    bandwidth = gpu.bandwidth_tbs * 1e12 * BANDWIDTH_UTILISATION
    matrix = flops / (gpu.tflops * 1e12 * MATRIX_UTILISATION)
    full = 2 * model.kv_heads * keys * model.head_dim * BYTES_FULL / bandwidth
    plain = max(matrix, full)
    share = cached / keys  # of the keys that are packed
    packed = sum(
        packed_bytes((1, model.kv_heads, cached, model.head_dim), bits, group_size) for bits in (key_bits, value_bits)
    )
    current = 2 * model.kv_heads * model.chunk * model.head_dim * BYTES_FULL
    corrected = matrix * (1 + share * CORRECTION_COLUMNS / (2 * model.head_dim))
    streamed = (packed + current) / bandwidth
    fused = max(corrected, streamed), max(matrix * (1 + share * (gpu.fused - 1)), streamed)
    scratch = model.kv_heads * cached * (2 * model.head_dim + CORRECTION_COLUMNS) * BYTES_FULL
    unpacking = (packed + scratch) / bandwidth  # written once; read back from the second-level cache, slab by slab
    once = max(corrected, full) + unpacking, max(matrix * (1 + share * (gpu.unpack_once - 1)), full) + unpacking
    append = 2 * model.kv_heads * model.chunk * model.head_dim * BYTES_FULL / bandwidth

    def over_plain(bounds: tuple[float, float]) -> tuple[float, float]:
        low, high = sorted(b / plain for b in bounds)
        return low, high

    return Overhead(1e3 * plain, over_plain(fused), over_plain(once), 1e3 * append)


def tokens_that_fit(model: Model, gpu: Gpu, bits: int | None, group_size: int) -> int:
    """Cached tokens that fit beside bfloat16 weights; bits None is the uncompressed cache. Never negative."""
    room = gpu.memory_gb * 1e9 * RESERVE - model.parameters * 1e9 * BYTES_FULL
    per_token = model.full_bytes / model.tokens if bits is None else model.cache_bytes(bits, bits, group_size, 1)
    return max(0, int(room / per_token))


def report(model: Model, gpu: Gpu, group_size: int) -> str:
    """The plan as text."""
    lines = [
        f"{model.name} on {gpu.name}: {model.layers} layers x {model.kv_heads} key/value heads x {model.head_dim}, "
        f"{model.tokens:,} tokens cached, {model.chunk:,} per chunk, batch 1, groups of {group_size}",
        "",
        f"{'cache':>14} {'bits/elem':>10} {'GiB':>8} {'smaller':>8} {'fits':>5} {'tokens that fit':>16}",
    ]
    room = gpu.memory_gb * 1e9 * RESERVE - model.parameters * 1e9 * BYTES_FULL
    for bits in (None, *sorted(SUPPORTED_BITS, reverse=True)):
        size = model.full_bytes if bits is None else model.cache_bytes(bits, bits, group_size)
        name = "bfloat16" if bits is None else f"{bits} bits"
        lines.append(
            f"{name:>14} {16 * size / model.full_bytes:10.2f} {size / GIB:8.2f} {model.full_bytes / size:7.2f}x "
            f"{'yes' if size <= room else 'no':>5} {tokens_that_fit(model, gpu, bits, group_size):16,}"
        )
    overhead = attention_overhead(model, gpu, 2, 2, group_size)
    lines += [
        "",
        f"attention, one layer and chunk over the full cache: {overhead.plain_ms:.2f} ms plain (modelled)",
        f"  unpack-once, 2 bits: {overhead.unpack_once[0]:.2f}-{overhead.unpack_once[1]:.2f}x of it",
        f"  fused, 2 bits:       {overhead.fused[0]:.2f}-{overhead.fused[1]:.2f}x of it",
        f"  quantizing the chunk, once per layer: {overhead.append_ms:.3f} ms",
        "",
        f"Assumes bfloat16 weights, {model.parameters:g} billion, and {RESERVE:.0%} of memory for weights and cache;",
        f"{MATRIX_UTILISATION:.0%} of {gpu.tflops:g} TFLOP/s in plain attention, {BANDWIDTH_UTILISATION:.0%} of "
        f"{gpu.bandwidth_tbs:g} TB/s in streaming;",
        "lower bounds: limited by matrix products, the correction's 16 columns included, or by memory;",
        "upper bounds: limited by instructions, at the kernels' static counts. Nothing here was measured on a GPU.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jkv_compile.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the models and GPUs in the tables")
    parser.add_argument("--model", choices=MODELS, default="self-forcing")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--group-size", type=int, default=32)
    for name, kind in (
        ("parameters", float), ("layers", int), ("heads", int), ("kv-heads", int), ("head-dim", int), ("tokens", int),
        ("chunk", int),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, help=f"{name.replace('-', '_')} instead of the model's")
    options = parser.parse_args(arguments)
    if options.list:
        print("models:", *MODELS, "\nGPUs:  ", *GPUS)
        return 0
    model = MODELS[options.model]
    own = {
        field: getattr(options, field)
        for field in ("parameters", "layers", "heads", "kv_heads", "head_dim", "tokens", "chunk")
        if getattr(options, field) is not None
    }
    if own:
        model = Model(**{**model.__dict__, **own, "name": f"{model.name} changed"})
    for what, wrong in (
        (f"group size {options.group_size} does not divide head_dim {model.head_dim}",
         options.group_size < 1 or model.head_dim % max(options.group_size, 1)),
        (f"a chunk of {model.chunk} does not lie within {model.tokens} tokens", not 0 < model.chunk <= model.tokens),
        (f"{model.heads} heads are no multiple of {model.kv_heads} key/value heads", model.heads % model.kv_heads),
    ):  # fmt: skip
        if wrong:
            parser.error(what)
    print(report(model, GPUS[options.gpu], options.group_size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
