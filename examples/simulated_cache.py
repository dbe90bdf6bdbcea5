"""Runs the eager model with simulated quantized caches: history is quantized chunk by chunk, attention corrected."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from examples.quality_settings import Setting
from examples.rollout import Rollout, cache_bytes
from examples.simulated import Quantized, bias
from examples.video_model.model import CausalVideoTransformer, KVCache
from examples.video_model.sampling import Sampler


def join(parts: Sequence[Quantized]) -> Quantized:
    """Quantized chunks [B, H, S, D], one after the other."""
    values, step, excess = (torch.cat([getattr(p, name) for p in parts], 2) for name in ("values", "step", "excess"))
    return Quantized(values, step, excess, parts[0].rotated, sum(p.bits for p in parts))


class SimulatedCaches(TorchFunctionMode):
    """While active, attention corrects the scores of cached keys, and ``settle`` quantizes a finished chunk in place.

    Args:
        caches: plain caches per layer, [B, S, H, D].
        setting: None leaves the caches as they are, and measures the attention mass.

    Attributes:
        bits: of what has been quantized; ``elements`` how many numbers that were.
        mass: attention mass on cached keys, one number per attention call.
    """

    def __init__(self, caches: list[KVCache], setting: Setting | None) -> None:
        super().__init__()
        self.caches, self.setting = caches, setting
        self.keys: list[list[Quantized]] = [[] for _ in caches]
        self.bits, self.elements, self.cached, self.calls = 0.0, 0, 0, 0
        self.mass: list[float] = []

    def settle(self, start: int, stop: int) -> None:
        """Tokens start to stop are history from now on."""
        self.cached = stop
        if self.setting is None:
            return
        for cache, keys in zip(self.caches, self.keys, strict=True):
            for name, quantize in zip("kv", self.setting.quantizers(), strict=True):
                quantized = quantize(cache[name][:, start:stop].transpose(1, 2))
                cache[name][:, start:stop] = quantized.values.transpose(1, 2)
                self.bits += quantized.bits
                self.elements += quantized.values.numel()
                if name == "k":
                    keys.append(quantized)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (t.float() for t in args)
        scale = query.shape[-1] ** -0.5
        scores = query @ key.mT * scale
        layer, cached = self.calls % len(self.caches), self.cached
        self.calls += 1
        if self.setting is not None and cached:
            scores[..., :cached] -= bias(query, join(self.keys[layer]), scale, self.setting.correction)
        weights = scores.softmax(-1)
        self.mass.append(weights[..., :cached].sum(-1).mean().item())
        return (weights @ value).to(args[0].dtype)


@torch.no_grad()
def generate_simulated(
    transformer: CausalVideoTransformer, setting: Setting | None, prompt: Tensor, noise: Tensor
) -> Rollout:
    """As ``rollout.generate``, by the eager model: prompt [P, F, C, h, w], noise [N, F, C, h, w]."""
    config = transformer.config
    caches = transformer.allocate_cache(1, (len(prompt) + len(noise)) * config.chunk_frames)
    full_bytes = cache_bytes(caches)
    chunks, seconds = list(prompt), []
    with SimulatedCaches(caches, setting) as simulated:
        sampler = Sampler(transformer, config, caches)
        for n, chunk in enumerate([*prompt, *noise]):
            began = time.perf_counter()
            if n < len(prompt):
                sampler.prefill(chunk[None])
            else:
                chunks.append(sampler.generate(chunk[None])[0])
                seconds.append(time.perf_counter() - began)
            if n + 1 < len(prompt) + len(noise):  # the last chunk is nobody's history
                simulated.settle(n * config.chunk_tokens, (n + 1) * config.chunk_tokens)
    mass = fmean(simulated.mass[-3 * len(caches) : -len(caches)])  # of the last chunk's two denoising steps
    ratio = 16 * simulated.elements / simulated.bits if setting is not None else 1.0
    return Rollout(torch.stack(chunks), seconds, round(full_bytes / ratio), full_bytes, mass)
