"""Times CPU attention over the packed cache against PyTorch on the full one: `python -m jkv_compile.kernels.bench_cpu`.

All candidates of a shape run interleaved in one process, and the minimum over the repetitions counts, so that other
load on the machine falls on all of them. What is fast depends on the processor's instructions, and by these the kernels
choose their products: the report names both, and only figures of one process are to be compared. Writes `cpu.json` and,
where matplotlib is installed, `cpu.png`; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, cpu_torch, reference

logger = logging.getLogger(__name__)

HEADS, HEAD_DIM = 4, 128
SHAPES = (  # query rows, cached keys, current keys
    (1, 8192, 0), (1, 65536, 0), (4, 8192, 0), (16, 8192, 0), (64, 8192, 0), (512, 8192, 0), (1560, 16384, 0),
    (1560, 16384, 1560),
)  # fmt: skip
COMPILED_PEERS = (
    (1, 8192, 0),
    (64, 8192, 0),
    (512, 8192, 0),
    (1560, 16384, 0),
)  # where those run that must be compiled
FLAGS = (  # of the processor, that kernels or PyTorch make use of
    "avx2", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
)  # fmt: skip
PURE_TORCH_SCORES = 20e6  # above so many scores the pure-torch path is left out


clock = time.perf_counter


@dataclass
class Measurement:
    threads: int
    query_rows: int
    cached: int
    current: int
    milliseconds: dict[str, float] = field(default_factory=dict)
    against_sdpa: dict[str, float] = field(default_factory=dict)  # > 1: faster than SDPA in bf16
    relative_error: dict[str, float] = field(default_factory=dict)  # against float32 on the same packed data
    rate_of_mm: float = 0.0  # the kernel's FLOP/s as a fraction of a large bf16 torch.mm's
    at_mm_rate: float = 0.0  # how many times faster than SDPA the two products alone would be, at that rate
    correction_cost: float = 0.0  # share of the uncorrected kernel's time


def interleaved_minimum(
    candidates: dict[str, Callable[[], object]], budget: float, between: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Shortest time of each, in milliseconds, over rounds through all of them for about `budget` seconds.

    What takes longer than that in its first call, as products in bf16 may on a processor without any, is not repeated.
    """
    best = dict.fromkeys(candidates, float("inf"))
    repeated = dict(candidates)
    for name, candidate in candidates.items():
        before = clock()
        candidate()
        if (seconds := clock() - before) > budget:
            best[name] = 1e3 * seconds
            del repeated[name]
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < budget:
        for name, candidate in sorted(repeated.items(), reverse=rounds % 2 == 1):  # nobody always comes after the same
            between()
            before = clock()
            candidate()
            best[name] = min(best[name], 1e3 * (clock() - before))
        rounds += 1
    return best


def products() -> str:
    kernels = cpu.kernels()
    return kernels.products if kernels else "torch"


def processor() -> dict[str, object]:
    """Its name, and those of its instructions that matter."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    present = fields.get("flags", "").split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return {"machine": name, "flags": [flag for flag in FLAGS if flag in present]}


def in_float32(attend: Callable[[], object]) -> Callable[[], object]:
    """The same, where integers are multiplied, with products in float32."""
    kernels = cpu.kernels()
    assert kernels is not None
    chosen = kernels.few_rows, kernels.half_precision, kernels.byte_products, kernels.in_place

    def call() -> None:
        kernels.configure(0, half_precision=False)
        attend()
        kernels.configure(*chosen)

    return call


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(-1) @ value


def dequantize_then_sdpa(query, key_codes, key_scales, value_codes, value_scales, key, value):
    full_key = torch.cat((reference.dequantize(key_codes, key_scales, 2).to(query.dtype), key), 2)
    full_value = torch.cat((reference.dequantize(value_codes, value_scales, 2).to(query.dtype), value), 2)
    return F.scaled_dot_product_attention(query, full_key, full_value)


def measure(rows: int, cached: int, current: int, group_size: int, budget: float, slow_peers: bool) -> Measurement:
    torch.manual_seed(0)
    result = Measurement(torch.get_num_threads(), rows, cached, current)
    full = [torch.randn(1, HEADS, cached, HEAD_DIM) for _ in range(2)]
    key, value = (torch.randn(1, HEADS, current, HEAD_DIM).bfloat16() for _ in range(2))
    query = torch.randn(1, HEADS, rows, HEAD_DIM).bfloat16()
    store = (*reference.quantize(full[0], 2, group_size), *reference.quantize(full[1], 2, group_size))
    keys, values = (torch.cat((x.bfloat16(), y), 2) for x, y in zip(full, (key, value)))
    keys32, values32, query32 = keys.float(), values.float(), query.float()

    def arguments(correction: str) -> tuple:
        return query, *store, [0, cached], key, value, None, False, HEAD_DIM**-0.5, 2, 2, correction

    side = 2048 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 256  # otherwise its loops take minutes
    square = torch.randn(side, side).bfloat16()
    candidates: dict[str, Callable[[], object]] = {
        "SDPA bf16": lambda: F.scaled_dot_product_attention(query, keys, values),
        "jkv": lambda: cpu.attention(*arguments("taylor")),
        "jkv, uncorrected": lambda: cpu.attention(*arguments("none")),
        "mm": lambda: square @ square,
    }
    if products() == "integer":
        candidates["jkv, float32 products"] = in_float32(candidates["jkv"])
    if HEADS * rows * (cached + current) <= PURE_TORCH_SCORES:
        candidates["jkv, pure torch"] = lambda: cpu_torch.attention(*arguments("taylor"))
    if slow_peers:
        candidates["SDPA fp32"] = lambda: F.scaled_dot_product_attention(query32, keys32, values32)
        candidates["matmul, softmax, matmul"] = lambda: explicit(query, keys, values)
    if slow_peers and (rows, cached, current) in COMPILED_PEERS:
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention, dynamic=False)
        dequantizing = torch.compile(dequantize_then_sdpa, dynamic=False)
        candidates["FlexAttention"] = lambda: flex(query, keys, values)
        candidates["compiled dequantize, SDPA"] = lambda: dequantizing(query, *store, key, value)
    # What caches hold after the other layers of a model; in less, packed data would stay from one candidate to the next
    others = torch.zeros(32 << 20)
    result.milliseconds = interleaved_minimum(candidates, budget, lambda: others.add_(1))
    mm = 2 * side**3 / result.milliseconds.pop("mm")
    result.rate_of_mm = 4 * HEADS * rows * (cached + current) * HEAD_DIM / result.milliseconds["jkv"] / mm
    result.correction_cost = result.milliseconds["jkv"] / result.milliseconds["jkv, uncorrected"] - 1
    result.at_mm_rate = result.milliseconds["SDPA bf16"] / result.milliseconds["jkv"] / result.rate_of_mm
    result.against_sdpa = {k: result.milliseconds["SDPA bf16"] / v for k, v in result.milliseconds.items()}

    few = slice(0, min(rows, 32))
    for name, attend in (("jkv", cpu.attention), ("jkv, pure torch", cpu_torch.attention)):
        if name in candidates:
            expected, _ = reference.attention(query[:, :, few], *arguments("taylor")[1:])
            output = attend(*arguments("taylor"))[0][:, :, few].float()
            result.relative_error[name] = ((output - expected).norm() / expected.norm()).item()
    return result


def measure_append(budget: float) -> dict[str, float]:
    """GB of source (or of packed data moved) per second, over a cache of one video model's layer."""
    source = torch.randn(1, 12, 4680, HEAD_DIM).bfloat16()
    codes, scales = reference.quantize(source, 2, 64)
    moved = (codes.nbytes + scales.nbytes) * 2 / 3
    times = interleaved_minimum(
        {
            "append": lambda: cpu.append(codes, scales, source, 0, 2),
            "move": lambda: cpu.move(codes, scales, 1560, 0, 3120),
            "copy": lambda: source.clone(),
        },
        budget,
    )
    sizes = {"append": source.nbytes, "move": moved, "copy": source.nbytes}
    return {f"{name}, GB/s": sizes[name] / times[name] / 1e6 for name in times}


def measure_calls(budget: float) -> dict[str, float]:
    """Microseconds per call of the operators, in the smallest useful case."""
    from . import ops  # noqa: F401  (registers them)

    source = torch.randn(1, 1, 64, 64)
    codes, scales = reference.quantize(source, 2, 64)
    x = torch.randn(1, 1, 1, 64).bfloat16()
    call = (x, codes, scales, codes, scales, [0, 1], x, x, None, False, 0.125, 2, 2, "taylor")
    times = interleaved_minimum(
        {
            "attention": lambda: torch.ops.jkv.attention(*call),
            "append": lambda: torch.ops.jkv.append(codes, scales, x, 0, 2),
            "SDPA": lambda: F.scaled_dot_product_attention(x, x, x),
        },
        budget,
    )
    return {f"{name}, µs": 1e3 * value for name, value in times.items()}


def plot(measurements: list[Measurement], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        logger.info("no matplotlib: no plot")
        return
    names = [name for name in dict.fromkeys(n for m in measurements for n in m.milliseconds) if name != "SDPA bf16"]
    threads = list(dict.fromkeys(m.threads for m in measurements))
    figure, rows = pyplot.subplots(len(threads), figsize=(11, 3.2 * len(threads)), sharey=True, squeeze=False)
    for n, axes in zip(threads, rows[:, 0]):
        shown = [m for m in measurements if m.threads == n]
        for i, name in enumerate(names):
            heights = [m.against_sdpa.get(name, 0.0) for m in shown]
            axes.bar([x + 0.8 * i / len(names) for x in range(len(heights))], heights, 0.8 / len(names), label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        labels = [f"{m.query_rows} × {m.cached // 1024}k" + (f" + {m.current}" if m.current else "") for m in shown]
        axes.set_xticks([x + 0.4 for x in range(len(labels))], labels, fontsize=8)
        axes.set_ylabel(f"× SDPA in bf16, {n} thread{'s' * (n > 1)}")
    rows[0, 0].set_title(
        f"CPU attention over a 2-bit cache, {HEADS} heads of {HEAD_DIM}: query rows × keys, times faster"
    )
    rows[0, 0].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rows", type=int, nargs="+", help="only shapes with so many query rows")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds per shape and number of threads")
    parser.add_argument("--quick", action="store_true", help="up to 8k keys, without the peers that are slow")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for machines with other work")
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock, options.threads = time.thread_time, [1]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_grad_enabled(False)

    measurements, other = [], {}
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            if (options.rows and shape[0] not in options.rows) or (options.quick and shape[1] > 8192):
                continue
            torch.compiler.reset()
            m = measure(*shape, options.group_size, options.budget, not options.quick)
            measurements.append(m)
            ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in m.against_sdpa.items() if name != "SDPA bf16")
            logger.info("%d threads, %d rows, %d+%d keys: SDPA %.3f ms; times faster: %s; error %s; of mm's rate %.2f, "
                        "at which it would be %.1f times faster; correction %+.1f %%",
                        m.threads, m.query_rows, m.cached, m.current, m.milliseconds["SDPA bf16"], ratios,
                        ", ".join(f"{e:.1e}" for e in m.relative_error.values()), m.rate_of_mm, m.at_mm_rate,
                        100 * m.correction_cost)  # fmt: skip
        other[threads] = {**measure_append(options.budget), **measure_calls(options.budget / 3)}
        logger.info(
            "%d threads: %s", threads, ", ".join(f"{name} {value:.2f}" for name, value in other[threads].items())
        )

    options.out.mkdir(parents=True, exist_ok=True)
    report = {
        "torch": torch.__version__,
        **processor(),
        "products": products(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "group_size": options.group_size,
        "clock": "CPU time" if options.cpu_time else "wall clock",
        "attention": [asdict(m) for m in measurements],
        "other": other,
    }
    (options.out / "cpu.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(measurements, options.out / "cpu.png")


if __name__ == "__main__":
    main()
