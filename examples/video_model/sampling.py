"""Chunk-wise generation: prefill the cache with a prompt, then denoise chunk after chunk with few-step rectified flow.

Rectified flow (arXiv 2209.03003): noisy latents are (1 - t) x + t noise, and sampling integrates the velocity
(noise - x) from t = 1 to t = 0 with Euler steps. The chunk loop with a final clean pass follows Self-Forcing
(arXiv 2506.08009).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .model import KVCache, ModelConfig

Denoiser = Callable[[Tensor, Tensor, list[KVCache], int, int], Tensor]


def timesteps(steps: int, shift: float = 3.0) -> list[float]:
    """Noise levels from 1 down to 0, ``steps`` + 1 of them, spaced more densely where the noise is strong.

    The shift is that of Stable Diffusion 3 (arXiv 2403.03206, section 5.3.2).
    """
    linear = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in linear]


class Sampler:
    """Drives a transformer over the chunks of a video.

    Args:
        transformer: a ``CausalVideoTransformer``, or that module compiled.
        config: the transformer's sizes.
        caches: from ``CausalVideoTransformer.allocate_cache``.
        steps: denoising steps per chunk. Two suffice for a continuation that its history all but determines, and
            more of them let errors build up from chunk to chunk.
        shift: see ``timesteps``.
    """

    def __init__(
        self, transformer: Denoiser, config: ModelConfig, caches: list[KVCache], steps: int = 2, shift: float = 9.0
    ) -> None:
        self.transformer, self.config, self.caches = transformer, config, caches
        self.timesteps = timesteps(steps, shift)
        self.chunks_done = 0

    def _call(self, latents: Tensor, timestep: float) -> Tensor:
        start = self.chunks_done * self.config.chunk_tokens
        level = torch.full((latents.shape[0],), timestep, device=latents.device)
        return self.transformer(latents, level, self.caches, start, start + self.config.chunk_tokens)

    @torch.no_grad()
    def prefill(self, chunk: Tensor) -> None:
        """Append a clean chunk [B, F, C, h, w] to the history: one pass that fills the cache, its output unused."""
        self._call(chunk, 0.0)
        self.chunks_done += 1

    @torch.no_grad()
    def denoise(self, noise: Tensor) -> Tensor:
        """Generate the next chunk [B, F, C, h, w] from noise of that shape, without appending it to the history."""
        latents = noise
        for now, after in zip(self.timesteps[:-1], self.timesteps[1:], strict=True):
            clean = self._call(latents, now)
            velocity = (latents.float() - clean.float()) / now
            latents = (latents.float() + (after - now) * velocity).to(noise.dtype)
        return latents

    def generate(self, noise: Tensor) -> Tensor:
        """Generate the next chunk from noise and append it to the history with a final clean pass."""
        latents = self.denoise(noise)
        self.prefill(latents)
        return latents
