"""Generate the continuation of a clip with one kind of cache, and measure what it cost."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import jkv_compile
from examples.attention_mass import AttentionMass
from examples.data import FRAME_HEIGHT, FRAME_WIDTH
from examples.video_model.autoencoder import DOWNSAMPLE, Autoencoder
from examples.video_model.model import CausalVideoTransformer, KVCache, ModelConfig
from examples.video_model.sampling import Denoiser, Sampler
from jkv_compile.kernels.quantizers import rotates

WEIGHTS = Path(__file__).parent / "weights"
PROMPT_CHUNKS = 3

Backend = Callable[..., Any] | str  # what torch.compile takes


@dataclass(frozen=True)
class Variant:
    """How a rollout keeps its cache: ``bits`` None is plain ``torch.compile`` with the cache in BF16.

    sink, recent: tokens in full precision beside the packed ones.
    center, center_tokens: whether tokens are stored less a mean, and how many share one.
    stages, centroids: of "qvg", how many centroids tokens are stored less, each one of how many.
    budget, salience: how many tokens are kept (None: all), and what tells which.
    block_tokens: how many tokens share the steps of a channel of keys, with "kivi".
    """

    name: str
    bits: int | tuple[int, int] | None = None
    group_size: int = 32
    correction: str = "none"
    quantizer: str = "rtn"
    inner: str = "inductor"
    sink: int = 0
    recent: int = 0
    step_bits: int | None = None
    center: bool | str = False
    center_tokens: int = 0
    stages: int = 1
    centroids: int | None = None
    budget: int | float | None = None
    salience: str = "attention"
    block_tokens: int | None = None

    def backend(self) -> Backend:
        """What to hand to ``torch.compile(backend=...)``.

        Raises:
            jkv_compile.ConfigurationError: the settings are not ones that the library knows.
        """
        if self.bits is None:
            return self.inner
        return jkv_compile.jkv_backend(
            bits=self.bits,
            group_size=self.group_size,
            correction=self.correction,
            quantizer=self.quantizer,
            inner=self.inner,
            step_bits=self.step_bits,
            sink=self.sink,
            recent=self.recent,
            center=self.center,
            center_tokens=self.center_tokens,
            stages=self.stages,
            centroids=self.centroids,
            budget=self.budget,
            salience=self.salience,
            block_tokens=self.block_tokens,
        )


@dataclass
class Rollout:
    """A continued clip and its cost.

    Attributes:
        latents: bfloat16 [N, F, C, h, w], prompt and generated chunks.
        seconds: per generated chunk, the compilation of the first one included.
        cache_bytes: bytes of all layers' caches at the end; ``full_bytes`` the same in BF16.
        attention_mass: share of the last chunk's attention that lies on cached keys; NaN where tokens are dropped,
            which the probe knows nothing of.
    """

    latents: Tensor
    seconds: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    full_bytes: int = 0
    attention_mass: float = 0.0

    @property
    def seconds_per_chunk(self) -> float:
        """Median, which compilation during the first chunks does not touch."""
        return median(self.seconds)


def load_models(dtype: torch.dtype = torch.bfloat16) -> tuple[CausalVideoTransformer, Autoencoder]:
    """The trained transformer and autoencoder in ``dtype``, ready for inference."""
    transformer, autoencoder = CausalVideoTransformer(ModelConfig()), Autoencoder()
    transformer.load_state_dict(load_file(WEIGHTS / "transformer.safetensors"))
    autoencoder.load_state_dict(load_file(WEIGHTS / "autoencoder.safetensors"))
    for module in (transformer, autoencoder):
        module.to(dtype).eval().requires_grad_(False)
    return transformer, autoencoder.to(memory_format=torch.channels_last)


@torch.no_grad()
def encode(autoencoder: Autoencoder, frames: Tensor) -> Tensor:
    """Frames [T, 3, H, W] in [-1, 1] to latents [T, C, h, w] in the autoencoder's dtype."""
    dtype = next(autoencoder.parameters()).dtype
    return torch.cat([autoencoder.encode(part) for part in frames.to(dtype).split(8)]).contiguous()


@torch.no_grad()
def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Latents [N, F, C, h, w] to float32 frames [N * F, 3, H, W] in [-1, 1]."""
    parts = [autoencoder.decode(part).float() for part in latents.flatten(0, 1).split(8)]
    return torch.cat(parts).clamp(-1, 1).contiguous()


def draw_noise(config: ModelConfig, chunks: int, seed: int) -> Tensor:
    """The noise of every generated chunk, bfloat16 [N, F, C, h, w]: the same for all variants."""
    height, width = FRAME_HEIGHT // DOWNSAMPLE, FRAME_WIDTH // DOWNSAMPLE
    shape = (chunks, config.chunk_frames, config.latent_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def cache_bytes(caches: list[KVCache]) -> int:
    """Bytes of plain cache tensors."""
    return sum(tensor.nbytes for cache in caches for tensor in cache.values())


def generate(
    transformer: CausalVideoTransformer,
    compiled: Denoiser,
    variant: Variant,
    backend: Backend,
    prompt: Tensor,
    noise: Tensor,
    on_chunk: Callable[[], object] = lambda: None,
) -> Rollout:
    """Prefill with prompt [P, F, C, h, w], then generate one chunk per noise [N, F, C, h, w].

    Args:
        transformer: the eager module, for the attention probe.
        compiled: the same module compiled with ``backend``.
        on_chunk: called after every chunk, for a progress bar.
    """
    config = transformer.config
    caches = transformer.allocate_cache(1, (len(prompt) + len(noise)) * config.chunk_frames)
    full_bytes = cache_bytes(caches)
    sampler = Sampler(compiled, config, caches)
    chunks = list(prompt)
    for chunk in prompt:
        sampler.prefill(chunk[None])
        on_chunk()
    seconds = []
    for n in range(len(noise)):
        began = time.perf_counter()
        chunks.append(sampler.generate(noise[n : n + 1])[0])
        seconds.append(time.perf_counter() - began)
        on_chunk()
    rollout = Rollout(torch.stack(chunks), seconds, full_bytes, full_bytes)
    if variant.bits is not None:
        gc.collect()  # the caches of earlier rollouts would be counted while they live
        rollout.cache_bytes = backend.memory().packed_bytes
    told = variant.budget is None
    rollout.attention_mass = probe(transformer, variant, caches, sampler.chunks_done, noise[-1:]) if told else math.nan
    return rollout


def probe(
    transformer: CausalVideoTransformer, variant: Variant, caches: list[KVCache], chunks_done: int, noise: Tensor
) -> float:
    """Attention mass on cached keys while the last chunk is denoised once more, by the eager module."""
    sampler = Sampler(transformer, transformer.config, caches)
    sampler.chunks_done = chunks_done - 1
    cached = sampler.chunks_done * transformer.config.chunk_tokens
    steps = None
    if variant.correction != "none":
        steps = [jkv_compile.quantization_step(cache["k"]) for cache in caches]
    with AttentionMass(cached, steps, rotates(variant.quantizer)) as mass:
        sampler.denoise(noise)
    return mass.mean


def compile_variant(transformer: nn.Module, variant: Variant) -> tuple[Denoiser, Backend]:
    """The compiled transformer and the backend that compiled it."""
    backend = variant.backend()
    return torch.compile(transformer, backend=backend), backend
