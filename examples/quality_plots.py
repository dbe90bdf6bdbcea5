"""Plots of the quality study: quality against bits, bias per layer and head, error over chunks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from examples.quality_report import Key, bits_name, by_setting, interval, key, label

Record = dict[str, Any]
COLOURS = {
    "rtn": "tab:gray", "quarot": "tab:blue", "kivi": "tab:green", "qvg": "tab:red",
    "qvg_4": "tab:red", "qvg_pro": "tab:red", "qvg_asymmetric": "tab:pink", "ternary": "tab:brown",
    "symmetric_quarot": "tab:cyan", "centred_quarot": "tab:purple", "unbiased": "black",
    "symmetric_unbiased": "tab:orange",
    "unbiased/steps8": "dimgray", "symmetric_unbiased/steps8": "gold", "symmetric": "tab:olive",
}  # fmt: skip


def draw(rollouts: Sequence[Record], layers: Sequence[Record], folder: Path) -> None:
    """Write the three pictures as PNG."""
    for name, figure in (("pareto", pareto(rollouts)), ("layers", bias_maps(layers)), ("chunks", chunks(rollouts))):
        figure.savefig(folder / f"quality_{name}.png", dpi=90, bbox_inches="tight")
        plt.close(figure)


def pareto(rollouts: Sequence[Record]) -> plt.Figure:
    """PSNR against effective bits, for rollouts and for their first chunks; filled with a correction, open without."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharex=True)
    for axis, metric, title in zip(axes, ("psnr_early", "psnr"), ("first two chunks", "all six chunks"), strict=True):
        points: list[tuple[float, float]] = []
        named: set[str] = set()
        for k, group in by_setting(rollouts).items():
            if k[4] not in ("none", "taylor"):
                continue
            values = [r[metric] for r in group]
            x, y = group[0]["effective_bits"], fmean(values)
            low, high = interval(values)
            points.append((x, y))
            colour = COLOURS[k[0]]
            axis.errorbar(
                x, y, yerr=[[y - low], [high - y]], fmt="s" if group[0]["simulated"] else "o", color=colour,
                mfc=colour if k[4] == "taylor" else "white", ms=6, lw=1, label=k[0] if k[0] not in named else None,
            )  # fmt: skip
            named.add(k[0])
            if k[4] == "none":
                text = f"{bits_name(k[1], k[2])} g{k[3]}"
                axis.annotate(text, (x, y), textcoords="offset points", xytext=(5, -9), fontsize=6, color=colour)
        front = [p for p in points if not any(x <= p[0] and y > p[1] for x, y in points)]
        axis.plot(*zip(*sorted(front), strict=True), color="gray", lw=0.8, ls=":", zorder=0)
        axis.set(title=f"PSNR to the BF16 rollout, {title}", xlabel="effective bits per element", ylabel="dB")
        axis.grid(alpha=0.3)
        axis.set_xlim(right=4.9)
    axes[1].legend(fontsize=7, title="filled: corrected\nsquare: simulated", title_fontsize=7)
    return figure


def bias_maps(layers: Sequence[Record]) -> plt.Figure:
    """Attention mass gained by cached keys, per layer and head, without and with correction."""
    seen = {key(r): r for r in layers}
    wanted: list[Key] = [
        (quantizer, 2, 2, 64, correction)
        for quantizer in ("rtn", "quarot", "unbiased", "qvg")
        for correction in ("none", "taylor")
    ]
    shown = [k for k in wanted if k in seen]
    shifts = sorted(abs(v) for k in shown for layer in seen[k]["mass_shift"] for v in layer)
    limit = shifts[int(0.93 * len(shifts))]  # a few heads of ternary grids lie far beyond, and would hide the others
    figure, axes = plt.subplots(1, len(shown), figsize=(2.2 * len(shown), 3.4), sharey=True, squeeze=False)
    for axis, k in zip(axes[0], shown, strict=True):
        image = axis.imshow(seen[k]["mass_shift"], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set(title=f"{label(k)}\n{k[4]}", xlabel="head")
        axis.title.set_fontsize(8)
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0], extend="both", label="attention mass on cached keys, less BF16's")
    return figure


def chunks(rollouts: Sequence[Record]) -> plt.Figure:
    """PSNR chunk by chunk: how rollouts diverge."""
    groups = by_setting(rollouts)
    figure, axis = plt.subplots(figsize=(7, 4.5))
    wanted: list[Key] = [
        ("rtn", 4, 4, 64, "none"), ("unbiased", 3, 4, 64, "none"), ("unbiased", 2, 3, 64, "none"),
        ("unbiased", 2, 2, 64, "none"), ("unbiased", 2, 2, 64, "taylor"), ("symmetric_unbiased", 2, 2, 64, "none"),
        ("quarot", 2, 2, 64, "none"),
        ("rtn", 2, 2, 64, "none"), ("rtn", 2, 2, 64, "taylor"), ("qvg", 2, 2, 64, "none"),
    ]  # fmt: skip
    for k in wanted:
        if k not in groups:
            continue
        by_chunk = [fmean(values) for values in zip(*(r["psnr_per_chunk"] for r in groups[k]), strict=True)]
        text = f"{label(k)} {k[4]}, {groups[k][0]['effective_bits']:.2f} bits"
        axis.plot(range(1, len(by_chunk) + 1), by_chunk, marker="o", ms=4, label=text)
    axis.set(xlabel="generated chunk", ylabel="PSNR to the BF16 rollout, dB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
