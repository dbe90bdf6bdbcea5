"""Small attention layers that hold their caches as real models do. They know nothing of this package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Chunk-wise causal attention; the cache is a dict of two tensors that the caller allocates.

    layout "bshd": cache `[B, S, H, D]`; "bhsd": `[B, H, S, D]`. `window` limits how many tokens back it looks.
    """

    def __init__(
        self, heads: int = 4, kv_heads: int | None = None, head_dim: int = 64, layout: str = "bshd", window: int = 0
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim
        self.layout, self.window = layout, window
        dim = heads * head_dim
        self.q, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * self.kv_heads * head_dim)

    def new_cache(self, batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        shape = [batch, tokens, self.kv_heads, self.head_dim]
        if self.layout == "bhsd":
            shape[1], shape[2] = shape[2], shape[1]
        return {name: torch.zeros(shape, dtype=dtype) for name in ("k", "v")}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim)
        k, v = self.kv(x).view(b, n, 2, self.kv_heads, self.head_dim).unbind(2)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != self.kv_heads)
        return self.out(o.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        first = max(0, end - self.window) if self.window else 0
        if self.layout == "bshd":
            cache["k"][:, start:end] = k
            cache["v"][:, start:end] = v
            keys, values = cache["k"][:, first:end].transpose(1, 2), cache["v"][:, first:end].transpose(1, 2)
        else:
            cache["k"][:, :, start:end] = k.transpose(1, 2)
            cache["v"][:, :, start:end] = v.transpose(1, 2)
            keys, values = cache["k"][:, :, first:end], cache["v"][:, :, first:end]
        return self.attend(q.transpose(1, 2), keys, values)


class BrokenAttention(SelfAttention):
    """The write and the attention are captured as two graphs."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        first = max(0, end - self.window) if self.window else 0
        cache["k"][:, start:end] = k
        cache["v"][:, start:end] = v
        keys, values = cache["k"][:, first:end], cache["v"][:, first:end]
        torch._dynamo.graph_break()
        return self.attend(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))


class BufferAttention(SelfAttention):
    """The cache lives in module buffers."""

    def __init__(self, tokens: int, batch: int = 1, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        for name, tensor in self.new_cache(batch, tokens).items():
            self.register_buffer(f"cache_{name}", tensor, persistent=False)

    def forward(self, x: Tensor, start: int) -> Tensor:  # type: ignore[override]
        return super().forward(x, {"k": self.cache_k, "v": self.cache_v}, start)


class Network(nn.Module):
    """Several layers, as whole-model compilation sees them."""

    def __init__(self, layers: int = 3, **kwargs: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfAttention(**kwargs) for _ in range(layers))  # type: ignore[arg-type]

    def new_cache(self, batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
        return [layer.new_cache(batch, tokens, dtype) for layer in self.layers]  # type: ignore[operator]

    def forward(self, x: Tensor, cache: list[dict[str, Tensor]], start: int) -> Tensor:
        for layer, layer_cache in zip(self.layers, cache):
            x = x + layer(x, layer_cache, start)
        return x


class ItemAttention(SelfAttention):
    """The position is held in a tensor, and read with `.item()`."""

    def new_cache(self, batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return super().new_cache(batch, tokens, dtype) | {"end": torch.tensor(0)}

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        position = cache["end"].item()
        cache["end"].fill_(position + x.shape[1])
        return super().forward(x, cache, position)


class TensorPositionAttention(ItemAttention):
    """The position is held in a tensor, and slices are taken with it."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        position = cache["end"].clone()
        cache["end"].fill_(position + x.shape[1])
        return SelfAttention.forward(self, x, cache, position)  # type: ignore[arg-type]
