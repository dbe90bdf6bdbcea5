"""A causal video diffusion transformer: full attention inside a chunk of frames, cached attention to earlier chunks.

The blocks follow DiT (arXiv 2212.09748) with one timestep modulation shared by all layers plus a small per-layer table
(PixArt-alpha, arXiv 2310.00426). Chunk-wise generation with a key/value cache follows Self-Forcing (arXiv 2506.08009),
teacher forcing with independently noised chunks Diffusion Forcing (arXiv 2407.01392).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .rope import apply_rope, rope_table
from .teacher_forcing import block_causal_attention

KVCache = dict[str, Tensor]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transformer. A token is one ``patch`` x ``patch`` square of one latent frame."""

    latent_channels: int = 16
    latent_height: int = 12
    latent_width: int = 16
    patch: int = 2
    chunk_frames: int = 3
    max_frames: int = 48
    dim: int = 256
    layers: int = 7
    heads: int = 4
    head_dim: int = 64
    mlp_ratio: int = 4
    rope_dims: tuple[int, int, int] = (16, 24, 24)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a frame."""
        return self.latent_height // self.patch, self.latent_width // self.patch

    @property
    def chunk_tokens(self) -> int:
        """Tokens in one chunk."""
        return self.chunk_frames * self.grid[0] * self.grid[1]


class CausalSelfAttention(nn.Module):
    """Self-attention with RMS-normalised, rotated queries and keys; keys are rotated before they are cached."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        inner = config.heads * config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * inner)
        self.norm_q = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.out = nn.Linear(inner, config.dim)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, S, H, D], from x [B, S, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        return apply_rope(self.norm_q(q), rope).to(v.dtype), apply_rope(self.norm_k(k), rope).to(v.dtype), v

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache, start: int, end: int) -> Tensor:
        """Attend from one chunk to itself and to all cached tokens before it.

        Args:
            x: [B, S, C], the chunk, with S = end - start.
            rope: [S, 2, D / 2], angles of the chunk's tokens.
            cache: ``k`` and ``v``, each [B, capacity, H, D]; tokens start to end are overwritten.
        """
        q, k, v = self.project(x, rope)
        cache["k"][:, start:end] = k
        cache["v"][:, start:end] = v
        k, v = cache["k"][:, :end], cache["v"][:, :end]
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(x.transpose(1, 2).flatten(2))

    def forward_train(self, x: Tensor, rope: Tensor) -> Tensor:
        """The same attention for all chunks of a video at once, with true history.

        Args:
            x: [B, 2, N, S, C]; on the second axis, index 0 is chunks 0 to N-1 as history, index 1 chunks 1 to N, noisy.
            rope: [2 * N * S, 2, D / 2], angles in the same order.

        History chunk n sees history 0 to n; the noisy chunk n + 1 beside it sees history 0 to n and itself.
        """
        batch, _, chunks, tokens, _ = x.shape
        qkv = self.project(x.flatten(1, 3), rope)
        q, k, v = (t.unflatten(1, (2, chunks, tokens)).permute(1, 0, 4, 2, 3, 5) for t in qkv)  # [2, B, H, N, S, D]
        attended = block_causal_attention(q, k, v).permute(1, 0, 3, 4, 2, 5)
        return self.out(attended.reshape(batch, 2, chunks, tokens, -1))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the timestep."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.attention = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.mlp_ratio * config.dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_ratio * config.dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.randn(6, config.dim) / config.dim**0.5)

    def modulate(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Split modulation [..., 6, C] plus this layer's table into six tensors [..., 1, C] for all tokens."""
        return tuple(part.unsqueeze(-2) for part in (modulation + self.modulation).unbind(-2))

    def forward(self, x: Tensor, modulation: Tensor, rope: Tensor, cache: KVCache, start: int, end: int) -> Tensor:
        """One chunk x [B, S, C] with modulation [B, 6, C]; see ``CausalSelfAttention.forward``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(modulation)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, rope, cache, start, end)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def forward_train(self, x: Tensor, modulation: Tensor, rope: Tensor) -> Tensor:
        """All chunks x [B, 2, N, S, C] with modulation [B, 2, N, 6, C]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(modulation)
        x = x + gate1 * self.attention.forward_train(self.norm1(x) * (1 + scale1) + shift1, rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the noise level, then an MLP: [...] in [0, 1] to [..., C]."""

    def __init__(self, dim: int, frequencies: int = 128) -> None:
        super().__init__()
        table = torch.exp(-math.log(10_000) * torch.arange(frequencies) / frequencies)
        self.register_buffer("table", table, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, timestep: Tensor) -> Tensor:
        angles = 1000.0 * timestep.float().unsqueeze(-1) * self.table.float()
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class CausalVideoTransformer(nn.Module):
    """Predicts the clean latents of a chunk from noisy ones, their noise level, and the cache of earlier chunks."""

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        patch_dim = config.latent_channels * config.patch**2
        self.patch_in = nn.Linear(patch_dim, config.dim)
        self.timestep = TimestepEmbedding(config.dim)
        self.modulation = nn.Linear(config.dim, 6 * config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(config.dim, 2 * config.dim)
        self.patch_out = nn.Linear(config.dim, patch_dim)
        nn.init.zeros_(self.patch_out.weight)
        nn.init.zeros_(self.patch_out.bias)
        self.register_buffer(
            "rope", rope_table(config.max_frames, *config.grid, axis_dims=config.rope_dims), persistent=False
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalVideoTransformer:
        # Angles stay float32 when the weights are cast to bfloat16: eight bits of mantissa are too few for positions.
        rope = self.rope
        super()._apply(fn, recurse)
        self.rope = rope.to(self.rope.device)
        return self

    def allocate_cache(self, batch: int, frames: int) -> list[KVCache]:
        """Zeroed ``k`` and ``v`` per layer, each [B, frames * tokens per frame, H, D], in the weights' dtype."""
        rows, columns = self.config.grid
        shape = (batch, frames * rows * columns, self.config.heads, self.config.head_dim)
        weight = self.patch_in.weight
        return [
            {name: torch.zeros(shape, dtype=weight.dtype, device=weight.device) for name in ("k", "v")}
            for _ in self.blocks
        ]

    def patchify(self, latents: Tensor) -> Tensor:
        """[B, F, C, h, w] to tokens [B, F * rows * columns, C * patch^2]."""
        patch = self.config.patch
        x = latents.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # [B, F, C, rows, p, columns, p]
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Inverse of ``patchify``."""
        patch, (rows, columns) = self.config.patch, self.config.grid
        x = tokens.unflatten(-1, (-1, patch, patch)).unflatten(1, (-1, rows, columns))
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(-2).flatten(-3, -2)

    def head(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Tokens x [..., S, C] and timestep embedding [..., C] to patches [..., S, C * patch^2]."""
        shift, scale = self.modulation_out(embedding).unsqueeze(-2).chunk(2, dim=-1)
        return self.patch_out(self.norm_out(x) * (1 + scale) + shift)

    def forward(self, latents: Tensor, timestep: Tensor, caches: list[KVCache], start: int, end: int) -> Tensor:
        """Denoise one chunk, writing its keys and values into the caches on the way.

        Args:
            latents: [B, chunk_frames, C, h, w], noisy (or clean, for the pass that leaves the final keys and values).
            timestep: [B], noise level in [0, 1]; 1 is pure noise.
            caches: one dict per layer, see ``allocate_cache``.
            start, end: token positions of the chunk in the video and in the cache.

        Returns:
            Predicted clean latents, [B, chunk_frames, C, h, w].
        """
        x = self.patch_in(self.patchify(latents))
        embedding = self.timestep(timestep)
        modulation = self.modulation(embedding).unflatten(-1, (6, -1))
        rope = self.rope[start:end]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, modulation, rope, cache, start, end)
        return self.unpatchify(self.head(x, embedding))

    def forward_train(self, history: Tensor, history_level: Tensor, noisy: Tensor, noisy_level: Tensor) -> Tensor:
        """Denoise chunks 1 to N of a video at once, each from the history before it.

        Args:
            history: [B, N, F, C, h, w], chunks 0 to N-1, clean or slightly noisy.
            history_level: [B, N], their noise levels.
            noisy: [B, N, F, C, h, w], chunks 1 to N at the levels noisy_level [B, N].

        Returns:
            Predicted clean latents of chunks 1 to N, [B, N, F, C, h, w].
        """
        batch, chunks = history_level.shape
        both = torch.stack([history, noisy], dim=1)  # [B, 2, N, F, C, h, w]
        x = self.patch_in(self.patchify(both.flatten(0, 2))).unflatten(0, (batch, 2, chunks))
        embedding = self.timestep(torch.stack([history_level, noisy_level], dim=1))
        modulation = self.modulation(embedding).unflatten(-1, (6, -1))
        tokens = self.config.chunk_tokens
        rope = torch.cat([self.rope[: chunks * tokens], self.rope[tokens : (chunks + 1) * tokens]])
        for block in self.blocks:
            x = block.forward_train(x, modulation, rope)
        return self.unpatchify(self.head(x[:, 1], embedding[:, 1]).flatten(0, 1)).unflatten(0, (batch, chunks))
