"""What a packed cache would save on a model and a GPU, before anything is installed or run.

    python -m jkv_compile.plan --model self-forcing --gpu rtx-4090
    python -m jkv_compile.plan --layers 32 --heads 32 --kv-heads 8 --head-dim 128 --tokens 40000 --chunk 1024 --gpu h100
    python -m jkv_compile.plan --model magi-24b --gpu h100 --devices 8 --sharding heads --seconds 3600
    python -m jkv_compile.plan --quantizer kivi --block-tokens 40 --group-size 64
    python -m jkv_compile.plan --quantizer unbiased --group-size 64 --center --center-tokens 4680
    python -m jkv_compile.plan --quantizer unbiased --group-size 64 --budget 0.5
    python -m jkv_compile.plan --list

Cache sizes are exact: codes and scales as `kernels.layout` stores them, means, rows of a budget, and tokens in full
precision. Times are modelled, never measured; the report
lists what they assume.
"""

from __future__ import annotations

import argparse
import bisect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from .config import Config
from .errors import ConfigurationError
from .kernels.layout import SUPPORTED_BITS
from .kernels.quantizers import QUANTIZERS, grid_of
from .plan_devices import Sharding, Traffic, offload_traffic, share_of, traffic
from .plan_tables import BYTES_FULL, DEFAULT, GIB, GPUS, MODELS, Gpu, Model

MATRIX_UTILISATION = 0.65
"""Part of the peak matrix rate that plain flash attention reaches on long chunks."""

BANDWIDTH_UTILISATION = 0.80
"""Part of the peak memory bandwidth that streaming kernels reach."""

CORRECTION_COLUMNS = 16
"""The correction is one more step of K = 16 in the score product."""

RESERVE = 0.9
"""Part of a GPU's memory that weights and cache may take; activations and the allocator need the rest."""


@dataclass(frozen=True)
class Overhead:
    """Modelled attention time of one layer and chunk, in milliseconds, and bounds of what packing multiplies it by."""

    plain_ms: float
    fused: tuple[float, float]
    unpack_once: tuple[float, float]
    append_ms: float


def attention_overhead(model: Model, gpu: Gpu, key_bits: int, value_bits: int, config: Config = DEFAULT) -> Overhead:
    """Roofline of one layer's attention over a full cache, packed over those tokens of it that a budget keeps.

    The lower bound takes a kernel to be limited by matrix products or memory, whichever takes longer, with the
    correction's columns added; the upper bound takes it to be limited by the instructions it issues.
    """
    keys = model.tokens
    flops = 4 * model.heads * model.chunk * keys * model.head_dim
    bandwidth = gpu.bandwidth_tbs * 1e12 * BANDWIDTH_UTILISATION
    matrix = flops / (gpu.tflops * 1e12 * MATRIX_UTILISATION)
    full = 2 * model.kv_heads * keys * model.head_dim * BYTES_FULL / bandwidth
    plain = max(matrix, full)
    kept = max(model.rows(config), model.chunk)
    cached = kept - model.chunk
    share, matrix = cached / kept, matrix * kept / keys  # of the keys that are packed
    full *= kept / keys
    past = replace(model, tokens=max(1, cached))
    everything = replace(config, budget=None, salience="attention")  # of these
    sides = (("keys", key_bits), ("values", value_bits))
    packed = sum(past.attended_bytes(side, bits, everything) for side, bits in sides) if cached else 0
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


LENGTHS = {"10 s": 10, "1 min": 60, "10 min": 600, "1 h": 3600}


def room_for_cache(model: Model, gpu: Gpu, weights_on: int = 1) -> float:
    """Bytes of a device that a cache may take beside bfloat16 weights, which `weights_on` devices share."""
    return gpu.memory_gb * 1e9 * RESERVE - model.parameters * 1e9 * BYTES_FULL / weights_on


def tokens_that_fit(model: Model, gpu: Gpu, bits: int | None, config: Config = DEFAULT, weights_on: int = 1) -> int:
    """Cached tokens that fit beside bfloat16 weights; bits None is the uncompressed cache. Never negative."""
    room = room_for_cache(model, gpu, weights_on)
    lengths = range(1, 2**40)
    return bisect.bisect_right(lengths, room, key=lambda n: replace(model, tokens=n).bytes_of(bits, config))


@dataclass(frozen=True)
class Devices:
    """How many devices, how they part the cache, and whether they part the weights too."""

    count: int = 1
    sharding: Sharding = "none"
    weights: bool = False


def report(model: Model, gpu: Gpu, config: Config = DEFAULT, devices: Devices | None = None) -> str:
    """The plan as text, for caches stored as `config` says, but for their bits."""
    window = config.window
    devices = devices or Devices()
    count = devices.count
    share, weights_on = share_of(model, count, devices.sharding), count if devices.weights else 1
    parted = count if devices.sharding == "tokens" else 1  # as many devices hold different tokens
    room = room_for_cache(model, gpu, weights_on)
    several = "" if count == 1 else f"{count} x "
    lines = [
        f"{model.name} on {several}{gpu.name}: {model.layers} layers x {model.kv_heads} key/value heads x "
        f"{model.head_dim}, {model.tokens:,} tokens cached, {model.chunk:,} per chunk, batch 1, {_stored(config)}",
    ]
    if any(window):
        lines += [
            f"in full precision beside: the first {window[0]:,} tokens, and {window[1]:,} before the chunk at hand "
            f"(twice, for the next): {share.held_bytes(*window) / GIB:.2f} GiB"
        ]
    if count > 1:
        held = {"heads": f"{share.kv_heads} heads", "tokens": f"{share.tokens:,} tokens", "none": "the whole cache"}
        lines += [f"each device: {held[devices.sharding]}, {'its part of' if devices.weights else 'all'} weights"]
    which = "cache" if count == 1 else "on a device"
    lines += [
        "",
        f"{which:>14} {'bits/elem':>10} {'GiB':>8} {'smaller':>8} {'fits':>5} {'tokens that fit':>16}",
    ]
    for bits in (None, *sorted(SUPPORTED_BITS, reverse=True)):
        size = share.bytes_of(bits, config)
        lines.append(
            f"{_name(bits):>14} {16 * size / share.full_bytes:10.2f} {size / GIB:8.2f} {share.full_bytes / size:7.2f}x "
            f"{'yes' if size <= room else 'no':>5} "
            f"{parted * tokens_that_fit(share, gpu, bits, config, weights_on):16,}"
        )
    if model.tokens_per_second:
        lines += ["", *_lengths(model, config, devices, room)]
    if count > 1:
        received = traffic(model, count, devices.sharding, 2, config)
        lines += ["", *_moved("a device receives, GiB", received)]
    if _offloads(config):
        at_hand = [2 * share.bytes_of(bits, config) / share.layers / GIB for bits in (None, 2)]
        lines += [
            "",
            *_moved('with offload="cpu", GiB', offload_traffic(share, 2, config)),
            f"{'two layers on the device':>28} {at_hand[0]:10.2f} {at_hand[1]:10.2f}",
        ]
    if share.chunk <= share.tokens:
        overhead = attention_overhead(share, gpu, 2, 2, config)
        lines += [
            "",
            f"attention, one layer and chunk over the full cache: {overhead.plain_ms:.2f} ms plain (modelled)",
            f"  unpack-once, 2 bits: {overhead.unpack_once[0]:.2f}-{overhead.unpack_once[1]:.2f}x of it",
            f"  fused, 2 bits:       {overhead.fused[0]:.2f}-{overhead.fused[1]:.2f}x of it",
            f"  quantizing the chunk, once per layer: {overhead.append_ms:.3f} ms",
        ]
    return "\n".join([*lines, "", *_assumptions(model, gpu, devices)])


def _moved(title: str, rows: Sequence[Traffic]) -> list[str]:
    """A table of what goes from one memory to another."""
    lines = [f"{title:>28} {'bfloat16':>10} {'2 bits':>10} {'less':>7}"]
    for row in rows:
        less = f"{row.full / row.packed:.2f}x" if row.full != row.packed else "same"
        lines.append(f"{row.what:>28} {row.full / GIB:10.2f} {row.packed / GIB:10.2f} {less:>7}")
    return lines


def _lengths(model: Model, config: Config, devices: Devices, room: float) -> list[str]:
    """A table of videos all of whose tokens are kept."""
    lines = [f"{'all of a video':>14} {'tokens':>13} {'bfloat16, GiB':>15} {'fits':>5} {'2 bits, GiB':>13} {'fits':>5}"]
    for name, seconds in LENGTHS.items():
        long = replace(model, tokens=int(seconds * model.tokens_per_second))
        share = share_of(long, devices.count, devices.sharding)
        sizes = [share.bytes_of(bits, config) for bits in (None, 2)]
        full, packed = (f"{size / GIB:,.1f}" for size in sizes)
        fits = ["yes" if size <= room else "no" for size in sizes]
        lines.append(f"{name:>14} {long.tokens:13,} {full:>15} {fits[0]:>5} {packed:>13} {fits[1]:>5}")
    return lines


def _assumptions(model: Model, gpu: Gpu, devices: Devices) -> list[str]:
    lines = [
        f"Assumes bfloat16 weights, {model.parameters:g} billion, and {RESERVE:.0%} of memory for weights and cache;",
        f"{MATRIX_UTILISATION:.0%} of {gpu.tflops:g} TFLOP/s in plain attention, {BANDWIDTH_UTILISATION:.0%} of "
        f"{gpu.bandwidth_tbs:g} TB/s in streaming;",
        "lower bounds: limited by matrix products, the correction's 16 columns included, or by memory;",
        "upper bounds: limited by instructions, at the kernels' static counts. Nothing here was measured on a GPU.",
        f"Offloaded caches: {model.passes} passes per chunk, each brings every layer's full cache; the bus's time",
        "is not modelled.",
    ]
    if model.tokens_per_second:
        lines.append(
            f"A second of video is {model.tokens_per_second:,.0f} tokens; models that evict keep fewer than all."
        )
    if devices.count > 1:
        lines += [
            f"Traffic: what one device receives, {model.passes} passes per chunk, all layers. A chunk's own queries,",
            "keys, values and results travel in bfloat16 whether or not caches are packed, log-sum-exps in float32.",
            "Times on a link are not modelled, nor what of them is hidden behind computation.",
        ]
    return lines


def _name(bits: int | None) -> str:
    return "bfloat16" if bits is None else f"{bits} bits"


def _offloads(config: Config) -> bool:
    """Whether such caches can live in host memory."""
    try:
        replace(config, offload="cpu")
    except ConfigurationError:
        return False
    return True


def _stored(config: Config) -> str:
    grid = grid_of(config.key_quantizer)
    words = (" without zero points" if grid.symmetric else ""), (" with 8-bit steps" if grid.step_bits == 8 else "")
    parts = [f"groups of {config.group_size}" + " and".join(word for word in words if word)]
    if grid.per_channel:
        parts = [f"keys by channel in blocks of {config.shares(config.key_quantizer)} tokens, values in {parts[0]}"]
    if config.center:
        of = "" if config.center is True else f"{config.center} "
        parts.append(
            f"{of}less a mean" + (f" of every {config.center_tokens:,} tokens" if config.center_tokens else "")
        )
    if config.clustered:
        parts.append(
            f"less {grid.stages} of {grid.centroids} centroids that {config.center_tokens:,} tokens share; they are "
            "dequantized for each attention, whose time below is that of others"
        )
    if config.budget is not None:
        part = f"{config.budget:.0%} of" if isinstance(config.budget, float) else f"{config.budget:,}"
        parts.append(f"{part} tokens kept")
    return ", ".join(parts)


def _budget(text: str) -> int | float:
    """A number of tokens, or a fraction of them."""
    return float(text) if "." in text else int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jkv_compile.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the models and GPUs in the tables")
    parser.add_argument("--model", choices=list(MODELS), default="self-forcing")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument(
        "--quantizer", choices=QUANTIZERS, default="rtn",
        help="symmetric ones store no zero points; kivi stores whole blocks, and holds all tokens but one of a block",
    )  # fmt: skip
    parser.add_argument("--block-tokens", type=int, help="tokens that share a channel's steps, with kivi (group-size)")
    parser.add_argument(
        "--center", nargs="?", choices=("both", "keys", "values"), const="both", help="store tokens less a mean"
    )
    parser.add_argument(
        "--center-tokens", type=int, default=0,
        help="tokens that share a mean (default: all), or centroids, with qvg (default: a chunk's)",
    )  # fmt: skip
    parser.add_argument("--stages", type=int, default=1, help="centroids that a token is stored less, with qvg")
    parser.add_argument("--centroids", type=int, help="of how many each is one (default: a 112th of the tokens, 256)")
    parser.add_argument("--budget", type=_budget, help="tokens that are kept: a number, or a fraction as in 0.5")
    parser.add_argument("--step-bits", type=int, choices=(8, 16), help="bits of a group's step (16; with qvg 8)")
    parser.add_argument("--sink", type=int, default=0, help="first tokens that are held in full precision")
    parser.add_argument("--recent", type=int, default=0, help="tokens before a chunk that are held in full precision")
    for name, kind in (
        ("parameters", float), ("layers", int), ("heads", int), ("kv-heads", int), ("head-dim", int), ("tokens", int),
        ("chunk", int), ("passes", int),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, help=f"{name.replace('-', '_')} instead of the model's")
    parser.add_argument("--seconds", type=float, help="cache all tokens of so much video, instead of --tokens")
    parser.add_argument("--devices", type=int, default=1, help="devices that work on one video (default: 1)")
    parser.add_argument("--sharding", choices=get_args(Sharding), help="what they part of the cache (default: heads)")
    parser.add_argument("--shard-weights", action="store_true", help="they part the weights, too")
    options = parser.parse_args(arguments)
    if options.list:
        print("models:", *MODELS, "\nGPUs:  ", *GPUS)
        return 0
    model = MODELS[options.model]
    own = {
        field: getattr(options, field)
        for field in ("parameters", "layers", "heads", "kv_heads", "head_dim", "tokens", "chunk", "passes")
        if getattr(options, field) is not None
    }
    if options.seconds is not None:
        own["tokens"] = int(options.seconds * model.tokens_per_second)
    if own:
        model = Model(**{**model.__dict__, **own, "name": f"{model.name} changed"})
    for what, wrong in (
        (f"group size {options.group_size} does not divide head_dim {model.head_dim}",
         options.group_size < 1 or model.head_dim % max(options.group_size, 1)),
        (f"a chunk of {model.chunk} does not lie within {model.tokens} tokens", not 0 < model.chunk <= model.tokens),
        (f"--devices {options.devices}: expected at least 1", options.devices < 1),
        (f"--sink {options.sink} --recent {options.recent}: expected numbers of tokens of at least 0",
         min(options.sink, options.recent) < 0),
        (f"{model.heads} heads are no multiple of {model.kv_heads} key/value heads", model.heads % model.kv_heads),
    ):  # fmt: skip
        if wrong:
            parser.error(what)
    sharding: Sharding = options.sharding or ("heads" if options.devices > 1 else "none")
    devices = Devices(options.devices, sharding, options.shard_weights)
    try:
        config = Config(
            group_size=options.group_size, quantizer=options.quantizer, step_bits=options.step_bits,
            sink=options.sink, recent=options.recent, center_tokens=options.center_tokens, budget=options.budget,
            center=True if options.center == "both" else options.center or False, block_tokens=options.block_tokens,
            stages=options.stages, centroids=options.centroids,
        )  # fmt: skip
        if config.clustered and not config.center_tokens:
            config = config.in_blocks_of(model.chunk)
        print(report(model, GPUS[options.gpu], config, devices))
    except ConfigurationError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
