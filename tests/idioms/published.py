"""Attention and caches of published models, after their public sources: what they hold, and in which order they write,
roll, copy, turn and attend. Nothing is copied; layers, sizes and all else are as small as can be."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_DIM = 2, 32
DIM = HEADS * HEAD_DIM
HEIGHT, WIDTH, FRAMES = 2, 3, 2  # of a frame, and of a chunk
FRAME = HEIGHT * WIDTH
CHUNK = FRAMES * FRAME

Cache = dict[str, Any]


def rope_table(dim: int = HEAD_DIM, length: int = 64) -> Tensor:
    """Complex, `[length, dim / 2]`: a share of the channels for each of time, height and width, as Wan has it."""
    shares = dim - 4 * (dim // 6), 2 * (dim // 6), 2 * (dim // 6)
    angles = [
        torch.outer(torch.arange(length), 1.0 / 10000 ** (torch.arange(0, n, 2, dtype=torch.float64) / n))
        for n in shares
    ]
    return torch.cat([torch.polar(torch.ones_like(a), a) for a in angles], 1)


def turn(x: Tensor, grid: Tensor, table: Tensor, start: int = 0, frames: Tensor | None = None) -> Tensor:
    """Rotary embedding of `[B, n, H, D]`, in double precision, of frames `start …`, or of those given."""
    half = x.shape[3] // 2
    time, rows, columns = table.split([half - 2 * (half // 3), half // 3, half // 3], dim=1)
    turned = []
    for i, (f, h, w) in enumerate(grid.tolist()):  # a graph break
        n = f * h * w
        pairs = torch.view_as_complex(x[i, :n].to(torch.float64).reshape(n, x.shape[2], -1, 2))
        of_time = time[start : start + f] if frames is None else time[frames]
        angles = [
            of_time.view(f, 1, 1, -1).expand(f, h, w, -1),
            rows[:h].view(1, h, 1, -1).expand(f, h, w, -1),
            columns[:w].view(1, 1, w, -1).expand(f, h, w, -1),
        ]
        pairs = pairs * torch.cat(angles, -1).reshape(n, 1, -1)
        turned.append(torch.cat([torch.view_as_real(pairs).flatten(2), x[i, n:]]))
    return torch.stack(turned).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All `[B, n, H, D]`; what remains of such a wrapper where no other kernel is installed."""
    q, k, v = (t.transpose(1, 2).to(q.dtype) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0).transpose(1, 2).contiguous()


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


class Attention(nn.Module):
    """window: of how many frames, of which the first `sink` stay."""

    def __init__(self, window: int = 8, sink: int = 1) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm = RMSNorm()
        self.window, self.sink = window, sink

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k = self.norm(self.q(x)).view(b, n, HEADS, HEAD_DIM), self.norm(self.k(x)).view(b, n, HEADS, HEAD_DIM)
        return q, k, self.v(x).view(b, n, HEADS, HEAD_DIM)


def roll(cache: Cache, n: int, end: int, sink: int) -> tuple[int, int]:
    """Make room for `n` tokens where there is none; returns the range that is theirs."""
    local_end = cache["local_end_index"].item()
    evicted = 0
    if end > cache["global_end_index"].item() and n + local_end > cache["k"].shape[1]:
        evicted = n + local_end - cache["k"].shape[1]
        kept = local_end - evicted - sink
        for name in ("k", "v"):
            moved = cache[name][:, sink + evicted : sink + evicted + kept].clone()
            cache[name][:, sink : sink + kept] = moved
    last = local_end + end - cache["global_end_index"].item() - evicted
    return last - n, last


class SelfForcing(Attention):
    """guandeh17/Self-Forcing, wan/modules/causal_model.py."""

    def forward(self, x: Tensor, grid: Tensor, table: Tensor, cache: Cache, start: int, clean: bool) -> Tensor:
        q, k, v = self.project(x)
        frame = math.prod(grid[0][1:]).item()
        q, k = turn(q, grid, table, start // frame), turn(k, grid, table, start // frame)
        end = start + q.shape[1]
        first, last = roll(cache, q.shape[1], end, self.sink * frame)
        cache["k"][:, first:last], cache["v"][:, first:last] = k, v
        begin = max(0, last - self.window * frame)
        out = attention(q, cache["k"][:, begin:last], cache["v"][:, begin:last])
        cache["global_end_index"].fill_(end)
        cache["local_end_index"].fill_(last)
        return self.o(out.flatten(2))


class LongLive(Attention):
    """NVlabs/LongLive: attention is to copies that are rolled and written; the caches follow after the last block.

    relative: keys are cached as they are, and copies turned by where they lie in the window (Infinity-RoPE, DreamX).
    """

    def __init__(self, relative: bool = False) -> None:
        super().__init__()
        self.relative = relative

    def forward(
        self, x: Tensor, grid: Tensor, table: Tensor, cache: Cache, start: int, clean: bool
    ) -> tuple[Tensor, Cache]:
        q, k, v = self.project(x)
        frame, sink, n = math.prod(grid[0][1:]).item(), self.sink * FRAME, q.shape[1]
        if not self.relative:
            q, k = turn(q, grid, table, start // frame), turn(k, grid, table, start // frame)
        end, evicted, kept = start + n, 0, 0
        size, local_end = cache["k"].shape[1], cache["local_end_index"].item()
        if end > cache["global_end_index"].item() and n + local_end > size:
            evicted = n + local_end - size
            kept = local_end - evicted - sink
        last = local_end + end - cache["global_end_index"].item() - evicted
        keys, values = cache["k"].clone(), cache["v"].clone()
        for copy in (keys, values) if kept else ():
            copy[:, sink : sink + kept] = copy[:, sink + evicted : sink + evicted + kept].clone()
        keys[:, last - n : last], values[:, last - n : last] = k, v
        if self.relative:
            places = torch.arange((last - n) // frame, last // frame)
            q = turn(q, grid, table, frames=places)
            shown = grid.clone()
            shown[0, 0] = last // frame
            in_frames = keys[:, :last].view(1, last // frame, frame, HEADS, HEAD_DIM)
            keys = turn(in_frames.flatten(1, 2), shown, table, frames=torch.arange(last // frame))
        begin = max(sink, last - self.window * frame + sink)
        keys = torch.cat([keys[:, :sink], keys[:, begin:last]], 1)
        values = torch.cat([values[:, :sink], values[:, begin:last]], 1)
        update = {"sink": sink, "evicted": evicted, "kept": kept, "last": last, "end": end, "k": k, "v": v}
        return self.o(attention(q, keys, values).flatten(2)), update


def apply_updates(caches: list[Cache], updates: list[Cache]) -> None:
    """What LongLive does to its caches after the last block."""
    for cache, update in zip(caches, updates):
        sink, kept, last, n = update["sink"], update["kept"], update["last"], update["k"].shape[1]
        for name in ("k", "v"):
            if kept:
                moved = cache[name][:, sink + update["evicted"] : sink + update["evicted"] + kept].clone()
                cache[name][:, sink : sink + kept] = moved
            cache[name][:, last - n : last] = update[name]
        cache["global_end_index"].fill_(update["end"])
        cache["local_end_index"].fill_(last)


class RewardForcing(Attention):
    """YepicAI/Reward-Forcing: what is evicted is merged into the sink; sink and window are turned after the read."""

    def forward(self, x: Tensor, grid: Tensor, table: Tensor, cache: Cache, start: int, clean: bool) -> Tensor:
        q, k, v = self.project(x)
        frame, n, end = math.prod(grid[0][1:]).item(), q.shape[1], start + q.shape[1]
        sink, size, evicted = self.sink * frame, cache["k"].shape[1], None
        if end > cache["global_end_index"].item() and n + cache["local_end_index"].item() > size:
            count = n + cache["local_end_index"].item() - size
            kept = cache["local_end_index"].item() - count - sink
            evicted = {name: cache[name][:, sink : sink + count].clone() for name in ("k", "v")}
            for name in ("k", "v"):
                cache[name][:, sink : sink + kept] = cache[name][:, sink + count : sink + count + kept].clone()
            last = cache["local_end_index"].item() + end - cache["global_end_index"].item() - count
        else:
            last = cache["local_end_index"].item() + end - cache["global_end_index"].item()
        cache["k"][:, last - n : last], cache["v"][:, last - n : last] = k, v
        for name in ("k", "v") if evicted is not None else ():
            cache[name][:, :sink] = 0.9 * cache[name][:, :sink] + 0.1 * evicted[name][:, :sink]
        begin = max(sink, last - size + sink)
        keys, values = (torch.cat([cache[name][:, :sink], cache[name][:, begin:last]], 1) for name in ("k", "v"))
        shown = grid.clone()
        shown[:, 0] = keys.shape[1] // frame
        q, keys = turn(q, grid, table, (keys.shape[1] - n) // frame), turn(keys, shown, table)
        cache["global_end_index"].fill_(end)
        cache["local_end_index"].fill_(last)
        return self.o(attention(q, keys, values).flatten(2))


class RollingSink(Attention):
    """Rolling-Sink: after a chunk's last step, what the window begins with is written over from tokens kept aside."""

    def forward(self, x: Tensor, grid: Tensor, table: Tensor, cache: Cache, start: int, clean: bool) -> Tensor:
        raw_q, raw_k, v = self.project(x)
        frame, n, end = math.prod(grid[0][1:]).item(), x.shape[1], start + x.shape[1]
        q, k = turn(raw_q, grid, table, start // frame), turn(raw_k, grid, table, start // frame)
        first, last = roll(cache, n, end, self.sink * frame)
        cache["k"][:, first:last], cache["v"][:, first:last] = k, v
        if end <= self.window * frame:
            cache["k_original"][:, first:last], cache["v_original"][:, first:last] = raw_k, v
        out = attention(q, cache["k"][:, :last], cache["v"][:, :last])
        if clean and end - n >= self.window * frame:
            place = start // frame % (self.window - FRAMES) * frame
            again_k = cache["k_original"][:, place : place + n].flip(dims=[1])
            again_v = cache["v_original"][:, place : place + n].flip(dims=[1])
            cache["k"][:, first - n : first] = turn(again_k, grid, table, start // frame - FRAMES)
            cache["v"][:, first - n : first] = again_v
        cache["global_end_index"].fill_(end)
        cache["local_end_index"].fill_(last)
        return self.o(out.flatten(2))


class MatrixGame(Attention):
    """FastVideo's Matrix-Game: past and chunk are joined; the last step writes the whole of it back."""

    def forward(self, x: Tensor, grid: Tensor, table: Tensor, cache: Cache, start: int, clean: bool) -> Tensor:
        q, k, v = self.project(x)
        q, k = turn(q, grid, table, start // FRAME), turn(k, grid, table, start // FRAME)
        length, n = int(cache["local_end_index"].item()), q.shape[1]
        evicted = max(0, n + length - cache["k"].shape[1])
        keys, values = (torch.cat([cache[name][:, :length][:, evicted:], new], 1) for name, new in (("k", k), ("v", v)))
        if clean:
            end = keys.shape[1]
            cache["k"][:, :end], cache["v"][:, :end] = keys, values
            keys, values = cache["k"][:, :end], cache["v"][:, :end]
            cache["local_end_index"].fill_(end)
        return self.o(attention(q, keys, values).flatten(2))


class MatrixGame2(Attention):
    """FastVideo's Matrix-Game 2: the dict's tensors are replaced by `detach()` of them; sink and tail, turned."""

    def forward(self, x: Tensor, grid: Tensor, table: Tensor, cache: Cache, start: int, clean: bool) -> Tensor:
        q, k, v = self.project(x)
        n, end, sink = x.shape[1], start + x.shape[1], self.sink * FRAME
        cache["k"], cache["v"] = cache["k"].detach(), cache["v"].detach()
        first, last = roll(cache, n, end, sink)
        cache["k"][:, first:last], cache["v"][:, first:last] = k, v
        keys, values = cache["k"][:, :last], cache["v"][:, :last]
        shown = min(last, (self.window - 2) * FRAME)
        if last > shown:
            tail = shown - sink
            keys, values = (torch.cat([t[:, :sink], t[:, sink:][:, -tail:]], 1) for t in (keys, values))
        else:
            keys, values = keys[:, -shown:], values[:, -shown:]
        window = grid.clone()
        window[:, 0] = shown // FRAME
        q, keys = turn(q, grid, table, (shown - n) // FRAME), turn(keys, window, table)
        cache["global_end_index"].fill_(end)
        cache["local_end_index"].fill_(last)
        return self.o(attention(q, keys, values).flatten(2))


class MemFlow(Attention):
    """KlingTeam/MemFlow: of the frames before the window, those whose mean keys fit the queries best are gathered."""

    def forward(self, x: Tensor, grid: Tensor, table: Tensor, cache: Cache, start: int, clean: bool) -> Tensor:
        q, k, v = self.project(x)
        q, k = turn(q, grid, table, start // FRAME), turn(k, grid, table, start // FRAME)
        end = start + x.shape[1]
        cache["k"][:, start:end], cache["v"][:, start:end] = k, v
        begin = max(0, end - 2 * CHUNK)
        keys, values = cache["k"][:, begin:end], cache["v"][:, begin:end]
        if begin:
            bank = [cache[name][:, :begin].clone().unflatten(1, (-1, FRAME)).permute(0, 3, 1, 2, 4) for name in "kv"]
            scores = q.mean(1)[:, :, None] @ bank[0].mean(3).transpose(-1, -2)  # [B, H, 1, frames]
            best = scores.squeeze(2).topk(2).indices.sort().values[..., None, None]
            best = best.expand(-1, -1, -1, FRAME, HEAD_DIM)
            chosen = [torch.gather(t, 2, best).flatten(2, 3).transpose(1, 2) for t in bank]
            keys, values = torch.cat([chosen[0], keys], 1), torch.cat([chosen[1], values], 1)
        return self.o(attention(q, keys, values).flatten(2))


class HunyuanVideo(Attention):
    """FastVideo's causal HunyuanVideo 1.5: copies are rolled and written, and are the caches of the next chunk; tokens
    of the text come last."""

    def forward(
        self, x: Tensor, grid: Tensor, table: Tensor, cache: Cache, start: int, clean: bool
    ) -> tuple[Tensor, Cache]:
        q, k, v = self.project(x)
        q, k = turn(q, grid, table, start // FRAME), turn(k, grid, table, start // FRAME)
        new = {name: cache[name].clone() for name in ("k", "v", "global_end_index", "local_end_index")}
        end = start + x.shape[1]
        first, last = roll(new, x.shape[1], end, self.sink * FRAME)
        keys = torch.cat([new["k"][:, :first], k, cache["k_text"]], 1)
        values = torch.cat([new["v"][:, :first], v, cache["v_text"]], 1)
        out = attention(q, keys, values)
        new["k"][:, first:last], new["v"][:, first:last] = k, v
        new["global_end_index"], new["local_end_index"] = torch.tensor([end]), torch.tensor([last])
        return self.o(out.flatten(2)), cache | new


class Wan(nn.Module):
    """Blocks of one kind; `updates` are what they return beside their result."""

    def __init__(self, *blocks: Attention) -> None:
        super().__init__()
        self.blocks, self.table = nn.ModuleList(blocks), rope_table()

    def new_caches(self, tokens: int) -> list[Cache]:
        def zeros(n: int) -> Tensor:
            return torch.zeros(1, n, HEADS, HEAD_DIM)

        names = "k", "v", "k_original", "v_original"
        ends = "global_end_index", "local_end_index"
        caches: list[Cache] = [{name: zeros(tokens) for name in names} for _ in self.blocks]
        for cache in caches:
            cache |= {name: torch.tensor([0]) for name in ends}
            cache |= {f"{name}_text": torch.linspace(-1, 1, 3 * DIM).view(1, 3, HEADS, HEAD_DIM) for name in "kv"}
        return caches

    def forward(self, x: Tensor, caches: list[Cache], start: int, clean: bool) -> tuple[Tensor, list[Cache]]:
        grid = torch.tensor([[x.shape[1] // FRAME, HEIGHT, WIDTH]])
        updates = []
        for block, cache in zip(self.blocks, caches):
            result = block(F.layer_norm(x, (DIM,)), grid, self.table, cache, start, clean)
            if isinstance(result, tuple):
                result, update = result
                updates.append(update)
            x = x + 4 * result
        if isinstance(self.blocks[0], LongLive):
            apply_updates(caches, updates)
        return x, updates


class Var(nn.Module):
    """FoundationVision's VAR and Infinity: each scale's keys and values are appended to attributes; cosine attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.scale = nn.Parameter(torch.full((1, HEADS, 1, 1), 4.0).log())
        self.cached_k: Tensor | None = None
        self.cached_v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = F.normalize(q, dim=-1).mul(self.scale.clamp_max(4.6).exp()), F.normalize(k, dim=-1)
        if self.cached_k is None or self.cached_v is None:
            self.cached_k, self.cached_v = k, v
        else:
            k = self.cached_k = torch.cat((self.cached_k, k), dim=2)
            v = self.cached_v = torch.cat((self.cached_v, v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0, dropout_p=0.0)
        return x + self.out(out.transpose(1, 2).reshape(b, n, DIM))


class Far(Attention):
    """showlab/FAR: raw keys, turned after they are joined; what is cached leaves out the frame of noise."""

    def forward(self, x: Tensor, angles: Tensor, cache: Cache, new_context: bool) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        if cache:
            k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
        if new_context:
            cache["k"], cache["v"] = k[:, :, :-FRAME, :].to(q.dtype), v[:, :, :-FRAME, :].to(q.dtype)
        cos, sin = angles.cos(), angles.sin()

        def turned(t: Tensor, n: int) -> Tensor:
            real, imaginary = t.reshape(*t.shape[:-1], -1, 2).unbind(-1)
            crossed = torch.stack([-imaginary, real], -1).flatten(3)
            return (t.float() * cos[-n:] + crossed.float() * sin[-n:]).to(t.dtype)

        out = F.scaled_dot_product_attention(turned(q, q.shape[2]), turned(k, k.shape[2]), v)
        return self.o(out.transpose(1, 2).flatten(2))


class Pool:
    """LightX2V's: one tensor for all layers, `[L, S, H, D]`; behind the sink lies a ring, so that rolling moves nothing."""

    def __init__(self, layers: int, tokens: int, sink: int) -> None:
        self.k, self.v = (torch.zeros(layers, tokens, HEADS, HEAD_DIM) for _ in range(2))
        self.ends = torch.zeros(2, layers, dtype=torch.long)  # of all tokens, and of those that are here
        self.tokens, self.sink, self.heads = tokens, sink, [0] * layers

    def parts(self, buffer: Tensor, layer: int, first: int, last: int) -> list[Tensor]:
        """Where tokens lie, in at most three pieces."""
        room, found = self.tokens - self.sink, []
        if first < self.sink:
            found.append(buffer[layer][first : min(last, self.sink)])
        begin, end = max(first, self.sink) - self.sink, last - self.sink
        if end > begin:
            place = (self.heads[layer] + begin) % room
            n = min(end - begin, room - place)
            found.append(buffer[layer][self.sink + place : self.sink + place + n])
            if n < end - begin:
                found.append(buffer[layer][self.sink : self.sink + end - begin - n])
        return found

    def write(self, buffer: Tensor, layer: int, first: int, last: int, new: Tensor) -> None:
        done = 0
        for part in self.parts(buffer, layer, first, last):
            part.copy_(new[done : done + part.shape[0]])
            done += part.shape[0]

    def read(self, buffer: Tensor, layer: int, last: int) -> Tensor:
        parts = self.parts(buffer, layer, 0, last)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 0)


class LightX2V(nn.Module):
    """ModelTC/LightX2V, Self-Forcing's inference: no batch dimension."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks, self.table = nn.ModuleList(Attention() for _ in range(layers)), rope_table()

    def block(self, layer: int, x: Tensor, pool: Pool, start: int) -> Tensor:
        q, k, v = self.blocks[layer].project(F.layer_norm(x, (DIM,))[None])
        grid = torch.tensor([[x.shape[0] // FRAME, HEIGHT, WIDTH]])
        q, k, v = turn(q, grid, self.table, start // FRAME), turn(k, grid, self.table, start // FRAME)[0], v[0]
        end, n = start + x.shape[0], x.shape[0]
        seen, here = int(pool.ends[0, layer].item()), int(pool.ends[1, layer].item())
        if end > seen and n + here > pool.tokens:
            evicted = n + here - pool.tokens
            pool.heads[layer] = (pool.heads[layer] + evicted) % (pool.tokens - pool.sink)
            here -= evicted
        last = here + end - seen
        pool.write(pool.k, layer, last - n, last, k)
        pool.write(pool.v, layer, last - n, last, v)
        pool.ends[0, layer].fill_(end)
        pool.ends[1, layer].fill_(last)
        out = attention(q, pool.read(pool.k, layer, last)[None], pool.read(pool.v, layer, last)[None])
        return x + 4 * self.blocks[layer].o(out[0].flatten(1))

    def forward(self, x: Tensor, pool: Pool, start: int) -> Tensor:
        for layer in range(len(self.blocks)):
            x = self.block(layer, x, pool, start)
        return x
