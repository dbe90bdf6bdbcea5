"""What the quality study's records say: tables, and the statements that they were made to test, with intervals."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

Record = dict[str, Any]
Key = tuple[str, int, int, int, str]
RESAMPLES = 2000


def key(record: Record) -> Key:
    """What identifies a setting."""
    return (
        record["quantizer"], record["bits_k"], record["bits_v"], record["group_size"], record["correction"],
    )  # fmt: skip


def by_setting(records: Sequence[Record]) -> dict[Key, list[Record]]:
    """Records grouped by setting, each group in the order of clips and draws."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return {k: sorted(group, key=lambda r: (r["clip"], r["seed"])) for k, group in groups.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval of the mean at 95 %, from a fixed seed."""
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def with_interval(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean and interval."""
    low, high = interval(values)
    return f"{fmean(values):{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def summarise_layers(records: Sequence[Record]) -> list[Record]:
    """One record per setting: PSNR of every run, and means over runs per layer and head."""
    summary = []
    for group in by_setting(records).values():
        first = {name: group[0][name] for name in ("quantizer", "bits_k", "bits_v", "group_size", "correction")}
        first["psnr"] = [round(r["psnr"], 3) for r in group]
        for name in ("mass_shift", "divergence", "output_error"):
            layers = zip(*(r[name] for r in group), strict=True)
            first[name] = [[round(fmean(heads), 5) for heads in zip(*layer, strict=True)] for layer in layers]
        summary.append(first)
    return summary


def overall(summary: Record, name: str) -> float:
    """Mean over layers and heads."""
    return fmean(value for layer in summary[name] for value in layer)


def bits_name(bits_k: int, bits_v: int) -> str:
    """INT2, or INT3/2."""
    return f"INT{bits_k}" if bits_k == bits_v else f"INT{bits_k}/{bits_v}"


def label(k: Key, simulated: bool = False) -> str:
    """A setting in words."""
    return f"{k[0]}{'*' if simulated else ''} {bits_name(k[1], k[2])} g={k[3]}"


def table(rollouts: Sequence[Record], layers: Sequence[Record]) -> str:
    """Every setting, fewest bits first."""
    seen = {key(r): r for r in layers}
    lines = [
        "| cache | correction | effective bits | ratio | PSNR, first two chunks | PSNR, all six | SSIM | mass "
        "| one chunk, PSNR | JSD, mbit | output error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups = sorted(by_setting(rollouts).items(), key=lambda item: (item[1][0]["effective_bits"], item[0]))
    for k, group in groups:
        mass = [r["attention_mass"] - r["attention_mass_bf16"] for r in group]
        layer = seen[k]
        cells = [
            label(k, group[0]["simulated"]),
            k[4],
            f"{group[0]['effective_bits']:.2f}",
            f"{group[0]['ratio']:.2f}×",
            with_interval([r["psnr_early"] for r in group]),
            with_interval([r["psnr"] for r in group]),
            f"{fmean(r['ssim'] for r in group):.4f}",
            f"{fmean(mass):+.4f}",
            with_interval(layer["psnr"]),
            f"{1000 * overall(layer, 'divergence'):.2f}",
            f"{100 * overall(layer, 'output_error'):.2f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gain(rollouts: Sequence[Record], better: Key, worse: Key, metric: str = "psnr") -> list[float] | None:
    """Run by run, by how much one setting beats another; None where one was not measured."""
    groups = by_setting(rollouts)
    if better not in groups or worse not in groups:
        return None
    return [a[metric] - b[metric] for a, b in zip(groups[better], groups[worse], strict=True)]


def corrections(rollouts: Sequence[Record], layers: Sequence[Record]) -> str:
    """What each correction changes, against none: dB over rollouts, early and all, and of one teacher-forced chunk."""
    lines = [
        "| cache | correction | PSNR, all chunks | first two | one chunk, true history | output error | mass |",
        "|---|---|---|---|---|---|---|",
    ]
    seen = {key(r): r for r in layers}
    for k, layer in seen.items():
        plain = (*k[:4], "none")
        if k == plain or plain not in seen:
            continue
        rolled = (gain(rollouts, k, plain, metric) for metric in ("psnr", "psnr_early"))
        one = [a - b for a, b in zip(layer["psnr"], seen[plain]["psnr"], strict=True)]
        ratio = overall(layer, "output_error") / overall(seen[plain], "output_error") - 1
        cells = [
            label(k),
            k[4],
            *("" if values is None else with_interval(values, 2, "+") for values in rolled),
            with_interval(one, 2, "+"),
            f"{100 * ratio:+.1f} %",
            f"{overall(seen[plain], 'mass_shift'):+.4f} → {overall(layer, 'mass_shift'):+.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def statements(rollouts: Sequence[Record]) -> str:
    """Pairs that were to be compared: PSNR of the first less that of the second, and on each clip."""
    int2 = {q: (q, 2, 2, 64) for q in ("rtn", "quarot", "unbiased", "symmetric", "ternary", "kivi", "qvg")}
    int4, mixed, smallest = ("rtn", 4, 4, 64), ("unbiased", 2, 3, 64), ("symmetric_unbiased", 2, 2, 64)
    byte_steps = ("symmetric_unbiased/steps8", 2, 2, 64)
    pairs: list[tuple[str, Key, Key]] = [
        (name, (*better, corrected[0]), (*worse, corrected[1]))
        for name, better, worse, corrected in (
            ("corrected INT2 g=64 against INT4 g=64", int2["rtn"], int4, ("taylor", "none")),
            ("asymmetric against ternary", int2["rtn"], int2["ternary"], ("none", "none")),
            ("the same, both corrected", int2["rtn"], int2["ternary"], ("taylor", "taylor")),
            ("KIVI against RTN, both corrected", int2["kivi"], int2["rtn"], ("taylor", "taylor")),
            ("QVG corrected against QVG", int2["qvg"], int2["qvg"], ("taylor", "none")),
            ("QuaRot against RTN", int2["quarot"], int2["rtn"], ("none", "none")),
            ("unbiased against QuaRot", int2["unbiased"], int2["quarot"], ("none", "none")),
            ("unbiased (6.4×) against QVG (6.8×)", int2["unbiased"], int2["qvg"], ("none", "none")),
            ("symmetric unbiased (7.1×) against QVG", smallest, int2["qvg"], ("none", "none")),
            ("the same, corrected", smallest, int2["qvg"], ("taylor", "none")),
            ("symmetric unbiased (7.1×) against unbiased", smallest, int2["unbiased"], ("none", "none")),
            ("the same, both corrected", smallest, int2["unbiased"], ("taylor", "taylor")),
            ("symmetric (7.1×) against RTN", int2["symmetric"], int2["rtn"], ("none", "none")),
            ("symmetric unbiased against symmetric", smallest, int2["symmetric"], ("none", "none")),
            ("5.3×: unbiased INT2/3 against RTN INT2 g=32", mixed, ("rtn", 2, 2, 32), ("none", "none")),
            ("5.3×: values with the third bit against keys", mixed, ("unbiased", 3, 2, 64), ("none", "none")),
            ("unbiased INT2 g=64 against INT4 g=64", int2["unbiased"], int4, ("none", "none")),
            ("unbiased INT2/3 against INT4 g=64", mixed, int4, ("none", "none")),
            ("symmetric unbiased against INT4 g=64, twice as large", smallest, int4, ("none", "none")),
            ("the same with 8-bit steps (7.5×) against 16-bit ones", byte_steps, smallest, ("none", "none")),
            ("the same, both corrected", byte_steps, smallest, ("taylor", "taylor")),
        )
    ]
    lines = ["| statement | PSNR difference, dB | per clip |", "|---|---|---|"]
    for name, better, worse in pairs:
        values = gain(rollouts, better, worse)
        if values is None:
            continue
        group = by_setting(rollouts)[better]
        lines.append(f"| {name} | {with_interval(values, 2, '+')} | {per_clip(group, values, fmean)} |")
    return "\n".join(lines)


def per_clip(group: Sequence[Record], values: Sequence[float], reduce: Callable[[list[float]], float]) -> str:
    """One number per clip."""
    clips: dict[str, list[float]] = {}
    for record, value in zip(group, values, strict=True):
        clips.setdefault(record["clip"], []).append(value)
    return ", ".join(f"{clip} {reduce(v):+.2f}" for clip, v in clips.items())


def report(rollouts: Sequence[Record], layers: Sequence[Record]) -> str:
    """All tables, in Markdown."""
    notes = (
        "PSNR in dB and SSIM against the BF16 rollout from the same noise; mean [95 % bootstrap interval] over clips "
        "and draws of noise. *Mass*: attention on cached keys less that of the BF16 rollout. *One chunk*: true history "
        "quantized, one chunk generated; *JSD*: Jensen-Shannon divergence of attention; *output "
        "error*: squared, relative; both mean over layers and heads. *: simulated in plain torch, not packed."
    )
    parts = [notes, table(rollouts, layers), "## Corrections, against none", corrections(rollouts, layers)]
    return "\n\n".join([*parts, "## Statements", statements(rollouts)])
