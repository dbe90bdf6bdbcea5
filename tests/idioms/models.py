"""One small model per way of holding a cache, each written as the models that use it write it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_DIM, CHUNK = 2, 32, 8
DIM = HEADS * HEAD_DIM


class Projections(nn.Module):
    def __init__(self, heads: int = HEADS, head_dim: int = HEAD_DIM) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv, self.out = (
            nn.Linear(heads * head_dim, 3 * heads * head_dim),
            nn.Linear(heads * head_dim, heads * head_dim),
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each `[B, n, H, D]`."""
        b, n, _ = x.shape
        return self.qkv(x).view(b, n, 3, self.heads, self.head_dim).unbind(2)  # type: ignore[return-value]

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """All `[B, n, H, D]`."""
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return self.out(o.transpose(1, 2).flatten(2))


def rope(x: Tensor, start: int = 0, interleaved: bool = True, kind: str = "") -> Tensor:
    """Rotary embedding of `[B, n, H, D]` at positions `start …`; `kind` is another spelling of half-split ones."""
    if kind == "half of half":  # of the first half of the channels
        return torch.cat([rope(x[..., : x.shape[-1] // 2], start, False), x[..., x.shape[-1] // 2 :]], -1)
    n, d = x.shape[1], x.shape[-1]
    freqs = 1.0 / 100 ** (torch.arange(0, d, 2, device=x.device) / d)
    angle = torch.outer(torch.arange(n, device=x.device) + start, freqs)[None, :, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    if kind == "rotate_half":
        return x * torch.cat((cos, cos), -1) + torch.cat((-b, a), -1) * torch.cat((sin, sin), -1)
    if kind == "assigned halves":
        out = torch.empty_like(x)
        out[..., : d // 2] = a * cos - b * sin
        out[..., d // 2 :] = a * sin + b * cos
        return out
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class RollingCache(Projections):
    """A′ (Self-Forcing): end indices in tensors, a full buffer evicts by rolling and keeps a sink."""

    def __init__(self, sink: int = 4, tokens: int = 32) -> None:
        super().__init__()
        self.sink, self.tokens = sink, tokens

    def new_cache(self) -> dict[str, Tensor]:
        cache = {name: torch.zeros(1, self.tokens, self.heads, self.head_dim) for name in ("k", "v")}
        return cache | {name: torch.tensor([0], dtype=torch.long) for name in ("global_end", "local_end")}

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        q, k = rope(q, start), rope(k, start)
        n, end = q.shape[1], start + q.shape[1]
        global_end, local_end = cache["global_end"].item(), cache["local_end"].item()
        if end > global_end and n + local_end > self.tokens:
            evicted = n + local_end - self.tokens
            kept = local_end - evicted - self.sink
            for name in ("k", "v"):
                old = cache[name][:, self.sink + evicted : self.sink + evicted + kept].clone()
                cache[name][:, self.sink : self.sink + kept] = old
            local_end = local_end - evicted
        last = local_end + end - global_end
        cache["k"][:, last - n : last] = k
        cache["v"][:, last - n : last] = v
        out = self.sdpa(q, cache["k"][:, :last], cache["v"][:, :last])
        cache["global_end"].fill_(end)
        cache["local_end"].fill_(last)
        return out


class FixedPast(Projections):
    """B (LongCat-Video, HY-WorldPlay): a past that an earlier call produced is concatenated at each read."""

    def __init__(self, rope_on_read: str = "", double: bool = False, head_dim: int = HEAD_DIM) -> None:
        super().__init__(DIM // head_dim, head_dim)
        self.rope_on_read, self.double = rope_on_read, double

    def produce(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, k, v = self.project(x)
        return k.transpose(1, 2).clone(), v.transpose(1, 2).clone()

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.project(x)
        past_k, past_v = past[0].to(k.dtype), past[1].to(v.dtype)
        if self.double:  # classifier-free guidance: one past for both branches
            q, k, v = (torch.cat([t, 2 * t]) for t in (q, k, v))
            past_k, past_v = past_k.repeat(2, 1, 1, 1), past_v.repeat(2, 1, 1, 1)
        k = torch.cat([past_k, k.transpose(1, 2)], dim=2)
        v = torch.cat([past_v, v.transpose(1, 2)], dim=2)
        q = q.transpose(1, 2)
        if self.rope_on_read:
            how = self.rope_on_read == "interleaved", self.rope_on_read
            k = rope(k.transpose(1, 2), 0, *how).transpose(1, 2)
            q = rope(q.transpose(1, 2), past[0].shape[2], *how).transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v)
        return self.out(o.transpose(1, 2).flatten(2))


class TwoParts(Projections):
    """B (HY-WorldPlay): a head's channels are two parts side by side, each attended by itself."""

    def produce(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, k, v = self.project(x)
        return torch.cat([k, rope(k)], -1).clone(), torch.cat([v, 2 * v], -1).clone()

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.project(x)
        n = past[0].shape[1]
        first_k, second_k = past[0].to(x.dtype).chunk(2, -1)
        first_v, second_v = past[1].to(x.dtype).chunk(2, -1)
        first = self.sdpa(rope(q, n), rope(torch.cat([first_k, k], 1)), torch.cat([first_v, v], 1))
        second = self.sdpa(q, torch.cat([second_k, k], 1), torch.cat([second_v, v], 1))
        return first + second


class CloneEditAttend(Projections):
    """C (LongLive): a temporary copy is edited and attended; the cache itself is written below, or after the call."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        temp_k, temp_v = cache["k"].clone(), cache["v"].clone()
        temp_k[:, start:end] = k
        temp_v[:, start:end] = v
        out = self.sdpa(q, temp_k[:, :end], temp_v[:, :end])
        if self.write:
            cache["k"][:, start:end] = k
            cache["v"][:, start:end] = v
        return out, k, v


class KeysBesideValues(Projections):
    """D (MAGI-1): one tensor `[S, H, 2 D]`, read before it is written, attention in another graph."""

    def forward(self, x: Tensor, cache: Tensor, start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        kv = torch.cat([k[0], v[0]], -1)
        past = cache[:start]
        cache[start:end] = kv
        kv = torch.cat([past, kv], 0)
        keys, values = kv.chunk(2, -1)
        torch._dynamo.graph_break()
        return self.sdpa(q, keys[None], values[None])


class StackedKeysValues(Projections):
    """E (AnyFlow-FAR): keys and values stacked on dimension 0; one call writes, another reads."""

    def write(self, x: Tensor, cache: Tensor, start: int) -> None:
        _, k, v = self.project(x)
        end = start + x.shape[1]
        cache[0, :, :, start:end] = k.transpose(1, 2)
        cache[1, :, :, start:end] = v.transpose(1, 2)

    def forward(self, x: Tensor, cache: Tensor, length: int) -> Tensor:
        q, k, v = self.project(x)
        keys = torch.cat([cache[0, :, :, :length], k.transpose(1, 2)], 2)
        values = torch.cat([cache[1, :, :, :length], v.transpose(1, 2)], 2)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values)
        return self.out(o.transpose(1, 2).flatten(2))


class Composite(Projections):
    """F (Rolling-Forcing): the attended keys are a concatenation of a sink, a window and the current chunk."""

    def __init__(self, sink: int = 4, window: int = 16) -> None:
        super().__init__()
        self.sink, self.window = sink, window

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        first = max(self.sink, start - self.window)
        keys = torch.cat([cache["k"][:, : self.sink], cache["k"][:, first:start], k], 1)
        values = torch.cat([cache["v"][:, : self.sink], cache["v"][:, first:start], v], 1)
        out = self.sdpa(q, keys, values)
        cache["k"][:, start:end] = k
        cache["v"][:, start:end] = v
        return out


class PinnedComposite(Projections):
    """F (LongLive, Rolling-Forcing): sink, pinned chunk, window and current; the sink is cached raw, and turned on read."""

    def __init__(self, sink: int = 4, pinned: int = CHUNK, window: int = 2 * CHUNK) -> None:
        super().__init__()
        self.sink, self.pinned, self.window = sink, pinned, window

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        end, pinned = start + x.shape[1], self.sink + self.pinned
        first = max(pinned, start - self.window)
        turned = rope(k, start)
        keys = torch.cat(
            [
                rope(cache["k"][:, : self.sink], first - self.sink),
                cache["k"][:, self.sink : pinned],
                cache["k"][:, first:start],
                turned,
            ],
            1,
        )
        values = torch.cat(
            [cache["v"][:, : self.sink], cache["v"][:, self.sink : pinned], cache["v"][:, first:start], v], 1
        )
        out = self.sdpa(rope(q, start), keys, values)
        cache["k"][:, start:end] = turned
        cache["v"][:, start:end] = v
        return out


class TwoCaches(Projections):
    """F (AnyFlow-FAR): old tokens compressed in one cache, recent ones in another, turned together after the read."""

    def __init__(self, rope_on_read: bool = True) -> None:
        super().__init__()
        self.rope_on_read = rope_on_read

    def forward(self, x: Tensor, old: dict[str, Tensor], new: dict[str, Tensor], n_old: int, n_new: int) -> Tensor:
        q, k, v = self.project(x)
        keys = torch.cat([old["k"][:, :n_old], new["k"][:, :n_new], k], 1)
        values = torch.cat([old["v"][:, :n_old], new["v"][:, :n_new], v], 1)
        if self.rope_on_read:
            q, keys = rope(q, n_old + n_new), rope(keys)
        out = self.sdpa(q, keys, values)
        old["k"][:, n_old : n_old + 2], old["v"][:, n_old : n_old + 2] = k[:, ::4], v[:, ::4]
        new["k"][:, n_new : n_new + x.shape[1]], new["v"][:, n_new : n_new + x.shape[1]] = k, v
        return out


class MaskedBuffer(Projections):
    """G (transformers StaticCache): `index_copy_` at positions held in a tensor, a mask hides the rest of the buffer."""

    def __init__(self, additive: bool = False, repeats: int = 1) -> None:
        super().__init__()
        self.additive, self.repeats = additive, repeats
        if repeats > 1:  # grouped queries
            self.q = nn.Linear(DIM, repeats * DIM)
            self.out = nn.Linear(repeats * DIM, DIM)

    def forward(self, x: Tensor, cache: dict[str, Tensor], positions: Tensor) -> Tensor:
        q, k, v = self.project(x)
        cache["k"].index_copy_(2, positions, k.transpose(1, 2))
        cache["v"].index_copy_(2, positions, v.transpose(1, 2))
        mask = torch.arange(cache["k"].shape[2])[None, :] <= positions[:, None]
        if self.additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        keys, values = cache["k"], cache["v"]
        if self.repeats > 1:
            b, n, s = x.shape[0], x.shape[1], keys.shape[2]
            q = self.q(x).view(b, n, self.repeats * self.heads, self.head_dim)
            keys, values = (
                t[:, :, None].expand(b, self.heads, self.repeats, s, self.head_dim).reshape(b, -1, s, self.head_dim)
                for t in (keys, values)
            )
        o = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask[None, None])
        return self.out(o.transpose(1, 2).flatten(2))


class GrowingPast(Projections):
    """H (`past_key_values`): the concatenation is attended and returned."""

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.project(x)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)
        return self.out(o.transpose(1, 2).flatten(2)), (k, v)


class GrowingContext(Projections):
    """H (FAR): frames that are done come with the noise of the next one, which is left out of what is returned."""

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.project(x)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)
        noise = x.shape[1] // 2
        return self.out(o.transpose(1, 2).flatten(2)), (k[:, :, :-noise], v[:, :, :-noise])


class RolledBuffer(Projections):
    """I (transformers' sliding cache): the buffer is rolled, or shifted by `cat`, and copied back as a whole."""

    def __init__(self, edit: bool) -> None:
        super().__init__()
        self.edit = edit

    def shifted(self, cache: Tensor, new: Tensor) -> Tensor:
        n = new.shape[1]
        if not self.edit:
            return torch.cat([cache[:, n:], new], 1)
        rolled = cache.roll(-n, dims=1)
        rolled[:, -n:] = new
        return rolled

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        q, k, v = self.project(x)
        full_k, full_v = self.shifted(cache["k"], k), self.shifted(cache["v"], v)
        cache["k"].copy_(full_k)
        cache["v"].copy_(full_v)
        return self.sdpa(q, cache["k"], cache["v"]) if self.edit else self.sdpa(q, full_k, full_v)


class LazyBuffers(Projections):
    """J (SkyReels-V2 with a cache): module attributes, None until the first forward allocates them."""

    def __init__(self, tokens: int = 64) -> None:
        super().__init__()
        self.tokens = tokens
        self.k_cache: Tensor | None = None
        self.v_cache: Tensor | None = None

    def forward(self, x: Tensor, start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        if self.k_cache is None or self.v_cache is None:
            self.k_cache = torch.zeros(1, self.tokens, self.heads, self.head_dim, dtype=k.dtype)
            self.v_cache = torch.zeros(1, self.tokens, self.heads, self.head_dim, dtype=v.dtype)
        self.k_cache[:, start:end] = k
        self.v_cache[:, start:end] = v
        return self.sdpa(q, self.k_cache[:, :end], self.v_cache[:, :end])


class BranchBuffers(LazyBuffers):
    """J: a pair per guidance branch, allocated in its first forward; attended are chosen ranges of one buffer."""

    def __init__(self, tokens: int = 64, sink: int = CHUNK, recent: int = 2 * CHUNK) -> None:
        super().__init__(tokens)
        self.sink, self.recent = sink, recent
        self.k_uncond: Tensor | None = None
        self.v_uncond: Tensor | None = None

    def forward(self, x: Tensor, start: int, branch: str = "cache") -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        if getattr(self, f"k_{branch}") is None:
            for name in ("k", "v"):
                setattr(self, f"{name}_{branch}", torch.zeros(1, self.tokens, self.heads, self.head_dim))
        keys, values = getattr(self, f"k_{branch}"), getattr(self, f"v_{branch}")
        keys[:, start:end], values[:, start:end] = k, v
        first = max(self.sink, end - self.recent)
        chosen = (torch.cat([t[:, : min(self.sink, first)], t[:, first:end]], 1) for t in (keys, values))
        return self.sdpa(q, *chosen)
