"""One attention layer that holds its cache in any of the ways that models do, as a case says. Knows nothing of caches
that are packed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jkv_compile.kernels.quantizers import grid_of

SINK = 4
NAMES = ("k", "v", "kv", "old_k", "old_v", "end")  # places in caches that are lists


@dataclass(frozen=True)
class Case:
    """A model and what is done with it; every field's default is its simplest value.

    events: one call each, (how many tokens, how often they are written, what the caller does to the caches before).
    """

    idiom: str = "slice"
    heads_first: bool = False
    batch: int = 1
    heads: int = 1
    queries: int = 1  # query heads per key head
    head_dim: int = 16
    group_size: int = 16
    dtype: str = "float32"
    cache_dtype: str = "float32"
    layers: int = 1
    owner: str = "dict"
    position: str = "int"
    write: str = "setitem"
    read: str = "slice"
    after_read: str = "nothing"
    attention: str = "sdpa"
    mask: str = "none"
    scale: float | None = None
    window: int = 0
    breaks: str = "none"
    also_returns: str = "nothing"
    starts_with: str = "zeros"
    grad_mode: str = "no_grad"
    compiled: str = "whole"
    dynamic: bool | None = None
    quantizer: str = "rtn"
    correction: str = "taylor"
    sink: int = 0
    recent: int = 0
    budget: int | None = None
    tokens: int = 48
    events: tuple[tuple[int, int, str], ...] = ((4, 1, "nothing"), (4, 1, "nothing"), (4, 1, "nothing"))

    @property
    def token_dim(self) -> int:
        return 2 if self.heads_first else 1


class Layer(nn.Module):
    """`forward(x, cache, start)`, with x `[B, n, heads * queries * head_dim]`; returns a list of tensors."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        dim = case.heads * case.queries * case.head_dim
        dtype = getattr(torch, case.dtype)

        def weights(rows: int, gain: float) -> nn.Parameter:
            return nn.Parameter((torch.randn(rows, dim) * gain / dim**0.5).to(dtype), requires_grad=False)

        # scores of standard deviation 1.5: attention that tells tokens apart, and does not blow up rounding
        self.wq = weights(dim, 1.5)
        self.wk, self.wv = (weights(case.heads * case.head_dim, 1.0) for _ in range(2))
        if case.owner in ("buffer", "attribute"):
            for name, tensor in self.new_cache().items():
                if case.owner == "buffer" and isinstance(tensor, Tensor):
                    self.register_buffer(f"cache_{name}", tensor, persistent=False)
                else:
                    setattr(self, f"cache_{name}", tensor)

    # ---- the cache ----

    def new_cache(self) -> dict[str, Any]:
        case = self.case
        dtype = getattr(torch, case.cache_dtype)

        def allocate(*shape: int) -> Tensor:
            if case.starts_with == "empty":  # all tokens alike: where they are attended, no softmax hangs on a rounding
                garbage = torch.full(shape, 10.0, dtype=dtype)
                if not grid_of(case.quantizer).holds(10.0):  # it does hold tokens whose channels are of either sign
                    garbage[..., torch.rand(shape[-1], generator=torch.Generator().manual_seed(0)) < 0.5] = -10.0
                return garbage
            return torch.randn(shape).to(dtype) if case.starts_with == "stale" else torch.zeros(shape, dtype=dtype)

        def shape(tokens: int) -> list[int]:
            sizes = [case.batch, tokens, case.heads, case.head_dim]
            return [sizes[0], sizes[2], sizes[1], sizes[3]] if case.heads_first else sizes

        if case.idiom == "stacked":
            cache: dict[str, Any] = {"kv": allocate(2, *shape(case.tokens))}
        elif case.idiom == "beside":
            cache = {"kv": allocate(*shape(case.tokens)[:3], 2 * case.head_dim)}
        elif case.idiom == "shared":
            cache = {"k": allocate(*shape(case.tokens))}
        elif case.idiom == "growing" or case.idiom == "lazy":
            cache = {"k": None, "v": None}
        elif case.idiom == "two caches":
            cache = {n: allocate(*shape(case.tokens)) for n in ("k", "v", "old_k", "old_v")}
        else:
            cache = {n: allocate(*shape(case.tokens)) for n in ("k", "v")}
        cache["end"] = torch.tensor(0) if case.position in ("tensor", "item") else 0
        return cache

    def _cache(self, given: Any) -> Any:
        if self.case.owner == "dict":
            return given
        return Attributes(self) if given is None else Listed(given)

    # ---- pieces ----

    def part(self, cache: Tensor, start: Any, stop: Any) -> Tensor:
        dim, spelling = self.case.token_dim, self.case.read
        if spelling == "narrow":
            return cache.narrow(dim, start, stop - start)
        if spelling == "ellipsis":
            return cache[..., start:stop, :] if dim == 2 else cache[..., start:stop, :, :]
        if spelling == "transposed":
            return cache.transpose(0, dim)[start:stop].transpose(0, dim)
        return cache[:, :, start:stop] if dim == 2 else cache[:, start:stop]

    def put(self, cache: Tensor, start: Any, stop: Any, value: Tensor) -> None:
        dim, spelling = self.case.token_dim, self.case.write
        if spelling == "copy_":
            self.part(cache, start, stop).copy_(value)
        elif spelling == "index_copy_":
            cache.index_copy_(dim, torch.arange(start, stop), value.to(cache.dtype))
        elif spelling == "positions":
            places = torch.arange(start, stop)
            if dim == 2:
                cache[:, :, places] = value.to(cache.dtype)
            else:
                cache[:, places] = value.to(cache.dtype)
        elif spelling == "halves":
            half = value.shape[dim] // 2
            self.part(cache, start, start + half).copy_(value.narrow(dim, 0, half))
            self.part(cache, start + half, stop).copy_(value.narrow(dim, half, value.shape[dim] - half))
        elif spelling == "twice":  # only the second write counts
            if dim == 2:
                cache[:, :, start:stop] = 2 * value
                cache[:, :, start:stop] = value
            else:
                cache[:, start:stop] = 2 * value
                cache[:, start:stop] = value
        elif spelling == "zero first":
            self.part(cache, start, stop).zero_()
            self.part(cache, start, stop).copy_(value)
        elif dim == 2:
            cache[:, :, start:stop] = value
        else:
            cache[:, start:stop] = value

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, H, n, D]`; k and v in the cache's layout."""
        b, n, _ = x.shape
        case = self.case
        q = F.linear(x, self.wq).view(b, n, -1, case.head_dim).transpose(1, 2)
        k, v = (F.linear(x, w).view(b, n, case.heads, case.head_dim) for w in (self.wk, self.wv))
        return (q, k.transpose(1, 2), v.transpose(1, 2)) if case.heads_first else (q, k, v)

    def changed(self, keys: Tensor) -> Tensor:
        """What a model does to keys after it has read them."""
        change = self.case.after_read
        if change == "turned":
            half = keys.shape[-1] // 2
            places = torch.arange(keys.shape[self.case.token_dim], dtype=torch.float32)
            angle = places[:, None] / 10 + torch.arange(half)
            if not self.case.heads_first:
                angle = angle[:, None]
            cos, sin = angle.cos().to(keys.dtype), angle.sin().to(keys.dtype)
            a, b = keys[..., 0::2], keys[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        if change == "scaled":
            return keys * 0.5
        if change == "contiguous":
            return keys.contiguous()
        if change == "cloned":
            return keys.clone()
        if change == "normalised":
            return F.rms_norm(keys, keys.shape[-1:])
        return keys

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, current: int, mask: Tensor | None = None) -> Tensor:
        """`[B, n, H * D]`; keys and values in the cache's layout, of which `current` are this chunk's."""
        case = self.case
        keys = self.changed(keys.to(q.dtype))
        values = values.to(q.dtype)
        if case.breaks == "before attention":
            torch._dynamo.graph_break()
        if not case.heads_first:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        n, total = q.shape[2], keys.shape[2]
        if mask is None:
            mask = self.mask(n, total, current, q.dtype)
        scale = case.scale
        grouped = case.queries > 1
        if case.attention != "sdpa" and grouped:
            if case.attention == "einsum":
                b, h, s, d = keys.shape
                keys, values = (
                    t[:, :, None].expand(b, h, case.queries, s, d).reshape(b, -1, s, d) for t in (keys, values)
                )
            else:
                keys, values = (t.repeat_interleave(case.queries, 1) for t in (keys, values))
        if case.attention == "sdpa":
            out = F.scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=grouped)
        else:
            factor = scale if scale is not None else 1 / math.sqrt(case.head_dim)
            if case.attention == "einsum":
                scores = torch.einsum("bhqd,bhkd->bhqk", q, keys) * factor
            else:
                scores = (q @ keys.transpose(-2, -1)) * factor
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
            weights = scores.softmax(-1)
            product = case.attention == "einsum"
            out = torch.einsum("bhqk,bhkd->bhqd", weights, values) if product else weights @ values
        return out.transpose(1, 2).flatten(2)

    def mask(self, n: int, total: int, current: int, dtype: torch.dtype) -> Tensor | None:
        kind = self.case.mask
        if kind == "none":
            return None
        columns = torch.arange(total)
        rows = torch.arange(n) + (total - n)
        seen = columns[None] <= rows[:, None]
        if kind == "sparse":
            seen = (columns[None] * 7 + rows[:, None] * 3) % 5 != 0
        elif kind == "one row":
            seen = columns[None] % 3 != 1
        elif kind == "batch":
            seen = (columns + torch.arange(self.case.batch)[:, None, None]) % 3 != 1
            seen = seen[:, None]
        elif kind == "bias":
            return (-0.3 * (rows[:, None] - columns[None]).abs()).to(dtype)
        if self.case.attention != "sdpa":  # softmax of a row that sees nothing is NaN
            seen = seen | (columns == total - 1)
        if kind == "additive":
            return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))
        return seen

    # ---- ways of holding a cache ----

    def forward(self, x: Tensor, given: Any, start: Any) -> list[Tensor]:
        case = self.case
        cache = self._cache(given)
        if case.breaks == "first":
            x = x + 0
            torch._dynamo.graph_break()
        q, k, v = self.project(x)
        dim, n = case.token_dim, x.shape[1]
        if case.position == "item":
            start = cache["end"].item()
        elif case.position == "tensor":
            start = cache["end"].clone()
        elif case.position == "kept":
            start = cache["end"]
        end = start + n
        first = max(0, end - case.window) if case.window else 0
        extra: list[Tensor] = []

        if case.idiom == "growing":
            if cache["k"] is not None:
                k, v = (
                    torch.cat([cache["k"], k.to(cache["k"].dtype)], dim),
                    torch.cat([cache["v"], v.to(cache["v"].dtype)], dim),
                )
            out = self.attend(q, k, v, n)
            cache["k"], cache["v"] = k, v
        elif case.idiom == "lazy" and cache["k"] is None:
            sizes = list(k.shape)
            sizes[dim] = case.tokens
            cache["k"], cache["v"] = (torch.zeros(sizes, dtype=getattr(torch, case.cache_dtype)) for _ in range(2))
            self.put(cache["k"], start, end, k)
            self.put(cache["v"], start, end, v)
            out = self.attend(q, self.part(cache["k"], first, end), self.part(cache["v"], first, end), n)
        elif case.idiom == "rolling":
            out = self.roll_and_attend(q, k, v, cache, start)
        elif case.idiom == "roll and copy":
            for name, new in (("k", k), ("v", v)):
                rolled = cache[name].roll(-n, dims=dim)
                rolled.narrow(dim, case.tokens - n, n).copy_(new)
                cache[name].copy_(rolled)
            out = self.attend(q, cache["k"], cache["v"], n)
        elif case.idiom == "cat and copy":
            held = cache["k"].dtype
            full = [
                torch.cat([self.part(cache[name], n, case.tokens), new.to(held)], dim)
                for name, new in (("k", k), ("v", v))
            ]
            cache["k"].copy_(full[0])
            cache["v"].copy_(full[1])
            out = self.attend(q, full[0], full[1], n)
        elif case.idiom == "clone and edit":
            copies = cache["k"].clone(), cache["v"].clone()
            self.put(copies[0], start, end, k)
            self.put(copies[1], start, end, v)
            if case.breaks == "inside":
                torch._dynamo.graph_break()
            out = self.attend(q, self.part(copies[0], first, end), self.part(copies[1], first, end), n)
            self.put(cache["k"], start, end, k)
            self.put(cache["v"], start, end, v)
        elif case.idiom == "past":
            keys = torch.cat([self.part(cache["k"], first, start), k.to(cache["k"].dtype)], dim)
            values = torch.cat([self.part(cache["v"], first, start), v.to(cache["v"].dtype)], dim)
            out = self.attend(q, keys, values, n)
            if case.breaks == "inside":
                torch._dynamo.graph_break()
            self.put(cache["k"], start, end, k)
            self.put(cache["v"], start, end, v)
        elif case.idiom == "composite":
            sink = min(SINK, start)
            recent = max(sink, start - 8)
            held = cache["k"].dtype
            keys, values = (
                torch.cat([self.part(cache[m], 0, sink), self.part(cache[m], recent, start), new.to(held)], dim)
                for m, new in (("k", k), ("v", v))
            )
            out = self.attend(q, keys, values, n)
            self.put(cache["k"], start, end, k)
            self.put(cache["v"], start, end, v)
        elif case.idiom == "two caches":
            held = cache["k"].dtype
            few = start // 4
            keys, values = (
                torch.cat([self.part(cache["old_" + m], 0, few), self.part(cache[m], first, start), new.to(held)], dim)
                for m, new in (("k", k), ("v", v))
            )
            out = self.attend(q, keys, values, n)
            every = slice(None, None, 4)
            for m, new in (("k", k), ("v", v)):
                thinned = new[:, :, every] if dim == 2 else new[:, every]
                self.put(cache["old_" + m], few, few + thinned.shape[dim], thinned)
                self.put(cache[m], start, end, new)
        elif case.idiom == "masked buffer":
            places = torch.arange(n) + start
            cache["k"].index_copy_(dim, places, k.to(cache["k"].dtype))
            cache["v"].index_copy_(dim, places, v.to(cache["v"].dtype))
            mask = torch.arange(case.tokens)[None] <= places[:, None]
            if case.mask in ("additive", "bias"):
                mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
            out = self.attend(q, cache["k"], cache["v"], n, mask)
        elif case.idiom == "stacked":
            kv = cache["kv"]
            self.put(kv[0], start, end, k)
            self.put(kv[1], start, end, v)
            if case.breaks == "inside":
                torch._dynamo.graph_break()
            out = self.attend(q, self.part(kv[0], first, end), self.part(kv[1], first, end), n)
        elif case.idiom == "beside":
            self.put(cache["kv"], start, end, torch.cat([k, v], -1))
            if case.breaks == "inside":
                torch._dynamo.graph_break()
            keys, values = self.part(cache["kv"], first, end).chunk(2, -1)
            out = self.attend(q, keys, values, n)
        elif case.idiom == "shared":
            self.put(cache["k"], start, end, k)
            keys = self.part(cache["k"], first, end)
            out = self.attend(q, keys, keys, n)
        elif case.idiom == "write last":
            keys, values = self.part(cache["k"], first, start), self.part(cache["v"], first, start)
            out = self.attend(
                q, torch.cat([keys, k.to(keys.dtype)], dim), torch.cat([values, v.to(keys.dtype)], dim), n
            )
            extra = [k, v]
        else:
            self.put(cache["k"], start, end, k)
            self.put(cache["v"], start, end, v)
            if case.breaks == "inside":
                torch._dynamo.graph_break()
            out = self.attend(q, self.part(cache["k"], first, end), self.part(cache["v"], first, end), n)
        if case.idiom not in ("rolling",):
            if case.position in ("tensor", "item"):
                cache["end"].fill_(end)
            elif case.position == "kept":
                cache["end"] = end
        return [out, *extra, *self.extras(cache, k, start)]

    def roll_and_attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Any, start: Any) -> Tensor:
        """A full buffer evicts its oldest tokens, but keeps a sink."""
        case, n = self.case, q.shape[2]
        begin, end = start, start + n
        if end > case.tokens:
            evicted = end - case.tokens
            kept = case.tokens - n - SINK
            for name in ("k", "v"):
                old = self.part(cache[name], SINK + evicted, SINK + evicted + kept)
                self.put(cache[name], SINK, SINK + kept, old.clone())
            begin, end = case.tokens - n, case.tokens
        self.put(cache["k"], begin, end, k)
        self.put(cache["v"], begin, end, v)
        first = max(0, end - case.window) if case.window else 0
        if case.breaks == "inside":
            torch._dynamo.graph_break()
        out = self.attend(q, self.part(cache["k"], first, end), self.part(cache["v"], first, end), n)
        if case.position in ("tensor", "item"):
            cache["end"].fill_(end)
        elif case.position == "kept":
            cache["end"] = end
        return out

    def extras(self, cache: Any, k: Tensor, start: Any) -> list[Tensor]:
        kind = self.case.also_returns
        name = "kv" if self.case.idiom in ("stacked", "beside") else "k"
        if kind == "view":
            return [cache[name][..., 2:5, :]]
        if kind == "copy":
            return [cache[name].clone()]
        if kind == "mean":
            return [cache[name].float().square().mean((0, -1))]  # a mean of both signs may be next to nothing
        if kind == "keys":
            return [k]
        return []


class Attributes:
    """A layer's own attributes, as a mapping."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __getitem__(self, name: str) -> Any:
        return getattr(self.layer, "cache_" + name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.layer, "cache_" + name, value)


class Listed:
    """A list, as a mapping."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __getitem__(self, name: str) -> Any:
        return self.values[NAMES.index(name)]

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[NAMES.index(name)] = value


class Network(nn.Module):
    """Layers side by side, so that no layer's error reaches the next."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(case) for _ in range(case.layers))

    def forward(self, x: Tensor, caches: Any, start: Any) -> list[Tensor]:
        outputs: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            outputs += layer(x[i], caches[i] if caches is not None else None, start)
        return outputs
