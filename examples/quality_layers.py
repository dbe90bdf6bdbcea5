"""The teacher-forced study: true history is quantized, one chunk is generated, and every attention is looked into.

Rollouts are chaotic: a small error early on is a different video later. Here each setting sees the same queries, keys
and values, those of the model in full precision, so that a difference is the quantizer's or the correction's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from examples.quality_settings import Setting
from examples.rollout import decode, draw_noise
from examples.simulated import Quantized, bias
from examples.simulated_cache import SimulatedCaches, join
from examples.video_model.autoencoder import Autoencoder
from examples.video_model.model import CausalVideoTransformer
from examples.video_model.sampling import Sampler

HISTORY = 6  # chunks
Record = dict[str, Any]


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence along the last dimension, in bits."""
    mean = (p + q) / 2
    ratios = ((x / mean.clamp_min(1e-30)).clamp_min(1e-30).log2() for x in (p, q))
    return sum((x * ratio).sum(-1) for x, ratio in zip((p, q), ratios, strict=True)) / 2  # type: ignore[return-value]


class LayerStudy(TorchFunctionMode):
    """Runs the model in full precision, and compares each attention with what every setting makes of it.

    Args:
        cached: number of cached keys.
        stored: per layer and storage, the quantized keys and values of the history.
        settings: what to compare; each one's storage must be in ``stored``.

    Attributes:
        sums: per setting three tensors [layers, heads]: attention mass on cached keys less that in full precision,
            Jensen-Shannon divergence, and squared error of the output over its square; sums over ``passes`` calls.
    """

    def __init__(
        self, cached: int, stored: list[dict[Setting, tuple[Quantized, Quantized]]], settings: Sequence[Setting]
    ) -> None:
        super().__init__()
        self.cached, self.stored, self.settings = cached, stored, settings
        self.calls = 0
        self.sums: dict[Setting, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (t.float() for t in args)
        scale, cached, layer = query.shape[-1] ** -0.5, self.cached, self.calls % len(self.stored)
        self.calls += 1
        wanted = (query @ key.mT * scale).softmax(-1)
        wanted_output = wanted @ value
        for setting in self.settings:
            quantized_key, quantized_value = self.stored[layer][setting.storage]
            scores = query @ torch.cat((quantized_key.values, key[:, :, cached:]), 2).mT * scale
            scores[..., :cached] -= bias(query, quantized_key, scale, setting.correction)
            got = scores.softmax(-1)
            output = got @ torch.cat((quantized_value.values, value[:, :, cached:]), 2)
            measured = (
                (got - wanted)[..., :cached].sum(-1).mean((0, 2)),
                jensen_shannon(got, wanted).mean((0, 2)),
                (output - wanted_output).square().sum((0, 2, 3)) / wanted_output.square().sum((0, 2, 3)),
            )
            zeros = torch.zeros(3, len(self.stored), query.shape[1])
            self.sums.setdefault(setting, zeros)[:, layer] += torch.stack(measured)
        return wanted_output.to(args[0].dtype)

    @property
    def passes(self) -> int:
        """How often the model was run."""
        return self.calls // len(self.stored)


def store_chunks(setting: Setting, history: dict[str, Tensor], tokens: int) -> tuple[Quantized, Quantized]:
    """Keys and values ``k``, ``v`` [B, H, S, D], each chunk of so many tokens quantized by itself."""
    keys, values = (
        join([quantize(part) for part in history[name].split(tokens, 2)])
        for name, quantize in zip("kv", setting.quantizers(), strict=True)
    )
    return keys, values


@torch.no_grad()
def study_layers(
    transformer: CausalVideoTransformer,
    autoencoder: Autoencoder,
    latents: Tensor,
    settings: Sequence[Setting],
    seed: int,
    on_setting: Callable[[], object],
    store: Callable[[Any, dict[str, Tensor], int], tuple[Quantized, Quantized]] = store_chunks,
) -> list[Record]:
    """Records of one clip, latents bfloat16 [N, F, C, h, w], and one draw of the noise.

    store: how a setting quantizes a layer's history.
    """
    config = transformer.config
    caches = transformer.allocate_cache(1, (HISTORY + 1) * config.chunk_frames)
    sampler = Sampler(transformer, config, caches)
    for chunk in latents[:HISTORY]:
        sampler.prefill(chunk[None])
    noise = draw_noise(config, 1, seed)
    tokens = config.chunk_tokens
    cached = HISTORY * tokens
    history = [{name: cache[name][:, :cached].transpose(1, 2).clone() for name in "kv"} for cache in caches]

    stored: list[dict[Setting, tuple[Quantized, Quantized]]] = [{} for _ in caches]
    for setting in dict.fromkeys(s.storage for s in settings):
        for layer, kept in zip(stored, history, strict=True):
            layer[setting] = store(setting, kept, tokens)
    with LayerStudy(cached, stored, settings) as study:
        reference = decode(autoencoder, sampler.denoise(noise))

    records = []
    for setting in settings:
        for cache, layer in zip(caches, stored, strict=True):
            for name, quantized in zip("kv", layer[setting.storage], strict=True):
                cache[name][:, :cached] = quantized.values.transpose(1, 2)
        simulated = SimulatedCaches(caches, setting)
        simulated.cached, simulated.keys = cached, [[layer[setting.storage][0]] for layer in stored]
        with simulated:
            chunk = decode(autoencoder, sampler.denoise(noise))
        mass, divergence, error = (study.sums[setting] / study.passes).tolist()
        records.append(
            {
                "psnr": -10 * (chunk - reference).square().mean().div(4).log10().item(),
                "mass_shift": mass,
                "divergence": divergence,
                "output_error": error,
            }
        )
        on_setting()
    return records
