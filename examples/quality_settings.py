"""What the quality study compares: every way of storing a cache, with every correction worth showing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from examples.rollout import Variant
from examples.simulated import FLOAT8_BITS, Clustered, MinMax, Quantized, Ternary
from jkv_compile.config import Correction
from jkv_compile.kernels.quantizers import QUANTIZERS, grid_of

Quantize = Callable[[Tensor], Quantized]
PACKED = tuple(q for q in QUANTIZERS if not (grid_of(q).per_channel or grid_of(q).clustered))
# Quant VideoGen, whose tokens share centroids by chunks: what else is set, of the package's quantizer.
QVG: dict[str, dict[str, Any]] = {
    "qvg": {"quantizer": "qvg"},
    "qvg_4": {"quantizer": "qvg", "centroids": 4},
    "qvg_pro": {"quantizer": "qvg", "stages": 4},
    "qvg_asymmetric": {"quantizer": "qvg_asymmetric"},
}
BYTE_STEPS = ("unbiased/steps8", "symmetric_unbiased/steps8")  # `step_bits=8`
ASYMMETRIC = tuple(q for q in PACKED if not grid_of(q).symmetric)
# Of the example model. Three blocks of them make a chunk, so that KIVI needs no tail here; the package's blocks have
# group_size tokens, which divide no chunk, and hold an open block's tokens in full precision. So KIVI is simulated.
FRAME_TOKENS = 48


@dataclass(frozen=True)
class Setting:
    """One kind of cache. What the package does not pack is simulated: quantized and at once dequantized."""

    quantizer: str
    bits_k: int
    bits_v: int
    group_size: int
    correction: str = "none"

    @property
    def storage(self) -> Setting:
        """The same without a correction."""
        return Setting(self.quantizer, self.bits_k, self.bits_v, self.group_size)

    @property
    def simulated(self) -> bool:
        """Whether the package does not run this."""
        return self.quantizer not in (*PACKED, *BYTE_STEPS, *QVG) or self.correction not in get_args(Correction)

    @property
    def bits(self) -> str:
        """As in INT2, or INT3/2 for keys and values."""
        return f"INT{self.bits_k}" + (f"/{self.bits_v}" if self.bits_v != self.bits_k else "")

    @property
    def name(self) -> str:
        """For progress bars, tables and files."""
        return f"{self.quantizer} {self.bits} g={self.group_size} {self.correction}"

    def variant(self) -> Variant:
        """As the package runs it; without Inductor, whose compilations would take most of the study's time."""
        settings = (self.bits_k, self.bits_v), self.group_size, self.correction
        if self.quantizer in QVG:
            return Variant(self.name, *settings, inner="eager", **QVG[self.quantizer])
        grid = grid_of(self.quantizer)
        return Variant(self.name, *settings, grid.quantizer, inner="eager", step_bits=grid.step_bits)

    def quantizers(self) -> tuple[Quantize, Quantize]:
        """Simulations for keys and for values."""
        return _quantizer(self, self.bits_k, True), _quantizer(self, self.bits_v, False)


def _quantizer(setting: Setting, bits: int, keys: bool) -> Quantize:
    group_size = setting.group_size
    match setting.quantizer:
        case "rtn":
            return MinMax(bits, group_size)
        case "quarot":
            return MinMax(bits, group_size, rotated=True)
        case "symmetric":
            return MinMax(bits, group_size, symmetric=True)
        case "unbiased":
            return MinMax(bits, group_size, rotated=True, unbiased=True)
        case "symmetric_unbiased":
            return MinMax(bits, group_size, rotated=True, unbiased=True, symmetric=True)
        case "unbiased/steps8":
            return MinMax(bits, group_size, rotated=True, unbiased=True, step_bits=8)
        case "symmetric_unbiased/steps8":
            return MinMax(bits, group_size, rotated=True, unbiased=True, symmetric=True, step_bits=8)
        case "centred_quarot":
            return MinMax(bits, group_size, rotated=True, centred=True)
        case "symmetric_quarot":
            return MinMax(bits, group_size, rotated=True, symmetric=True)
        case "ternary":
            return Ternary(group_size)
        case "kivi":
            return MinMax(bits, 1, block=FRAME_TOKENS) if keys else MinMax(bits, group_size)
        case "qvg":
            return Clustered(Ternary(group_size, FLOAT8_BITS), centroids=1)
        case "qvg_4":
            return Clustered(Ternary(group_size, FLOAT8_BITS), centroids=4)
        case "qvg_pro":
            return Clustered(Ternary(group_size, FLOAT8_BITS), centroids=1, stages=4)
        case "qvg_asymmetric":
            return Clustered(MinMax(bits, group_size), centroids=1)
    raise ValueError(f"quantizer={setting.quantizer!r} is not one that the study knows")


def full() -> list[Setting]:
    """What the package packs, then the simulations; with a correction too where keys have two bits."""
    both, plain, guarded = ("none", "taylor"), ("none",), ("none", "taylor", "clamped")
    sizes = (
        ((2, 2, 64), guarded), ((2, 2, 32), both), ((2, 3, 64), both),
        ((3, 2, 64), plain), ((3, 3, 64), plain), ((4, 4, 64), plain),
    )  # fmt: skip
    storages = [((quantizer, *size), forms) for quantizer in ASYMMETRIC for size, forms in sizes]
    storages += [(("unbiased", 2, 4, 64), plain), (("unbiased", 3, 4, 64), plain)]
    storages += [(("symmetric", 2, 2, 64), plain), (("symmetric_quarot", 2, 2, 64), plain)]
    storages += [(("symmetric_unbiased", 2, 2, 64), both), (("symmetric_unbiased", 2, 3, 64), both)]
    storages += [(("symmetric_unbiased", 3, 4, 64), plain)]
    storages += [((name, 2, 2, 64), both) for name in BYTE_STEPS] + [((BYTE_STEPS[1], 2, 3, 64), plain)]
    storages += [((name, 2, 2, 64), both) for name in ("kivi", "ternary", "qvg", "qvg_asymmetric")]
    storages += [((name, 2, 2, 64), plain) for name in ("centred_quarot", "qvg_4")]
    storages += [(("qvg_pro", 2, 2, 16), both)]
    return [Setting(*storage, form) for storage, forms in storages for form in forms]


def corrections() -> list[Setting]:
    """Other corrections, for the teacher-forced study alone."""
    guards = [
        Setting(quantizer, 2, 2, 64, correction)
        for quantizer in (*ASYMMETRIC, "qvg")
        for correction in ("second_moment", "calibrated")
    ]
    guards += [Setting("qvg", 2, 2, 64, "clamped")]
    return [*guards, Setting("rtn", 2, 2, 64, "exact"), Setting("unbiased", 2, 2, 64, "exact")]


def quick() -> list[Setting]:
    """A few of them, from which the order of the others can be guessed."""
    return [
        Setting("rtn", 4, 4, 64),
        *(Setting("rtn", 2, 2, 64, correction) for correction in ("none", "taylor")),
        *(Setting("unbiased", 2, 2, 64, correction) for correction in ("none", "taylor")),
        Setting("unbiased", 2, 3, 64),
        Setting("qvg", 2, 2, 64),
    ]
