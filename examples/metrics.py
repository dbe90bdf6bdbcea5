"""PSNR and SSIM between two videos, chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor


@dataclass(frozen=True)
class Fidelity:
    """Closeness to a reference video; one number per chunk, mean over its frames. PSNR is in dB, infinite if equal."""

    psnr: list[float]
    ssim: list[float]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Per chunk and mean, with None (JSON null) in place of an infinite PSNR."""
        return {
            name: {"mean": finite(fmean(values)), "per_chunk": [finite(value) for value in values]}
            for name, values in (("psnr", self.psnr), ("ssim", self.ssim))
        }


def finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None


def to_uint8(frames: Tensor) -> np.ndarray:
    """Frames [T, 3, H, W] in [-1, 1] to uint8 [T, H, W, 3]."""
    scaled = (frames.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).numpy()


def fidelity(video: Tensor, reference: Tensor, chunk_frames: int) -> Fidelity:
    """Compare frames [T, 3, H, W] in [-1, 1] as 8-bit images, chunk by chunk."""
    ours, theirs = to_uint8(video), to_uint8(reference)
    psnr, ssim = [], []
    for start in range(0, len(ours), chunk_frames):
        pairs = list(zip(ours[start : start + chunk_frames], theirs[start : start + chunk_frames], strict=True))
        psnr.append(fmean(_psnr(a, b) for a, b in pairs))
        ssim.append(fmean(float(structural_similarity(b, a, channel_axis=-1, data_range=255)) for a, b in pairs))
    return Fidelity(psnr, ssim)


def _psnr(image: np.ndarray, reference: np.ndarray) -> float:
    if np.array_equal(image, reference):
        return math.inf
    return float(peak_signal_noise_ratio(reference, image, data_range=255))
