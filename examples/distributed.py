"""The demo's generation on several processes: ``torchrun --nproc-per-node 2 -m examples.distributed``.

Three times the same continuation of a clip, from the same noise, with caches in the same bits: in one process, with
heads parted over the ranks (Ulysses), and with cached tokens parted over them. What comes out is the same up to
rounding; what a rank holds is a share.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single
from torch.nn import functional as F
from tqdm import tqdm

import jkv_compile
from examples.data import CLIPS, VideoError, held_out
from examples.rollout import PROMPT_CHUNKS, draw_noise, encode, load_models
from examples.video_model.model import CausalSelfAttention, CausalVideoTransformer, KVCache, ModelConfig
from examples.video_model.sampling import Sampler
from jkv_compile.distributed import pack_bytes, sharded_attention


class HeadParallelAttention(CausalSelfAttention):
    """A rank has part of the chunk's tokens outside, and part of the heads, of all tokens, inside of the attention."""

    def to_heads(self, x: Tensor) -> Tensor:
        """[B, S / P, H, D] to [B, S, H / P, D]."""
        ranks = dist.get_world_size()
        x = x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()
        return all_to_all_single(x, None, None, dist.group.WORLD).transpose(0, 1).flatten(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, S, H / P, D] to [B, S / P, H, D]."""
        x = x.unflatten(1, (dist.get_world_size(), -1)).transpose(0, 1).contiguous()
        return all_to_all_single(x, None, None, dist.group.WORLD).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache, start: int, end: int) -> Tensor:
        q, k, v = self.project(x, rope)
        q = self.to_heads(q)
        cache["k"][:, start:end] = self.to_heads(k)
        cache["v"][:, start:end] = self.to_heads(v)
        k, v = cache["k"][:, :end], cache["v"][:, :end]
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(self.to_tokens(x.transpose(1, 2)).flatten(2))


class TokenParallelAttention(CausalSelfAttention):
    """A rank caches its part of every chunk's tokens, and attends to those: all queries' partial results are merged."""

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache, start: int, end: int) -> Tensor:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        q, k, v = self.project(x, rope)
        first, last, part = start // ranks, end // ranks, (end - start) // ranks
        cache["k"][:, first:last] = k.narrow(1, rank * part, part)
        cache["v"][:, first:last] = v.narrow(1, rank * part, part)
        k, v = cache["k"][:, :last], cache["v"][:, :last]
        x = sharded_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(x.transpose(1, 2).flatten(2))


class HeadParallelTransformer(CausalVideoTransformer):
    """Blocks see this rank's part of the chunk's tokens."""

    def forward(self, latents: Tensor, timestep: Tensor, caches: list[KVCache], start: int, end: int) -> Tensor:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        part = (end - start) // ranks
        x = self.patch_in(self.patchify(latents)).narrow(1, rank * part, part)
        embedding = self.timestep(timestep)
        modulation = self.modulation(embedding).unflatten(-1, (6, -1))
        rope = self.rope[start:end].narrow(0, rank * part, part)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, modulation, rope, cache, start, end)
        patches = self.head(x, embedding).contiguous()
        parts = [torch.empty_like(patches) for _ in range(ranks)]
        dist.all_gather(parts, patches)
        return self.unpatchify(torch.cat(parts, 1))


@dataclass(frozen=True)
class Way:
    """How the work is parted: the classes that take the place of the model's, and what a rank caches."""

    name: str
    transformer: type[CausalVideoTransformer]
    attention: type[CausalSelfAttention]
    head_share: int = 1
    token_share: int = 1

    def model(self, trained: CausalVideoTransformer) -> CausalVideoTransformer:
        """The trained transformer with this way's forward passes; its weights are shared."""
        model = copy.copy(trained)
        model.__class__ = self.transformer
        model._modules = {**trained._modules, "blocks": nn.ModuleList(copy.copy(block) for block in trained.blocks)}
        for block in model.blocks:
            attention = copy.copy(block.attention)
            attention.__class__ = self.attention
            block._modules = {**block._modules, "attention": attention}
        return model

    def caches(self, config: ModelConfig, chunks: int, like: Tensor) -> list[KVCache]:
        tokens, heads = chunks * config.chunk_tokens // self.token_share, config.heads // self.head_share
        shape = (1, tokens, heads, config.head_dim)
        return [{name: like.new_zeros(shape) for name in ("k", "v")} for _ in range(config.layers)]


@dataclass
class Outcome:
    """The latents of a way, and what it took on this rank."""

    latents: Tensor
    packed_bytes: int
    full_bytes: int  # the same caches in bfloat16
    wire_bytes: int  # of one layer's keys, as they would be sent
    layer_bytes: int  # the same in bfloat16
    seconds: float


def generate(
    way: Way, trained: CausalVideoTransformer, prompt: Tensor, noise: Tensor, args: argparse.Namespace,
    on_chunk: Callable[[], object],
) -> Outcome:  # fmt: skip
    """Prefill with the prompt, then one chunk per noise."""
    torch.compiler.reset()
    backend = jkv_compile.jkv_backend(preset=args.preset, inner=args.inner)
    model = way.model(trained)
    for block in model.blocks:  # one compilation serves them all
        block.compile(backend=backend)
    caches = way.caches(trained.config, len(prompt) + len(noise), noise)
    sampler = Sampler(model, trained.config, caches)
    chunks = []
    for chunk in prompt:
        sampler.prefill(chunk[None])
        on_chunk()
    began = time.perf_counter()
    for n in range(len(noise)):
        chunks.append(sampler.generate(noise[n : n + 1])[0])
        on_chunk()
    seconds = (time.perf_counter() - began) / len(noise)
    keys = caches[0]["k"]
    packed = sum(t._store.packed_bytes for cache in caches for t in cache.values())
    full = sum(2 * t.numel() for cache in caches for t in cache.values())
    return Outcome(torch.stack(chunks), packed, full, pack_bytes(keys).numel(), 2 * keys.numel(), seconds)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="distributed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clip", choices=CLIPS, default="carphone_pristine", help="one of the shipped clips")
    parser.add_argument("--chunks", type=int, default=2, help="chunks to generate, three frames each (default: 2)")
    parser.add_argument("--preset", default="memory", help="memory (default), smallest, balanced or quality")
    parser.add_argument("--inner", default="eager", help="eager (default: starts at once), aot_eager or inductor")
    args = parser.parse_args(arguments)
    config = ModelConfig()
    most = config.max_frames // config.chunk_frames - PROMPT_CHUNKS
    if not 1 <= args.chunks <= most:
        parser.error(f"--chunks {args.chunks}: expected 1 to {most}")
    ranks = int(os.environ.get("WORLD_SIZE", "0"))  # torchrun sets it
    if not ranks:
        parser.error("start it with torchrun --nproc-per-node 2 -m examples.distributed")
    if config.heads % ranks:
        parser.error(f"{ranks} processes for {config.heads} heads: expected a number that divides them")
    try:
        args.frames = held_out(args.clip)
        jkv_compile.jkv_backend(preset=args.preset, inner=args.inner)
    except (VideoError, jkv_compile.ConfigurationError) as error:
        parser.error(" ".join(str(error).split()))
    return args


@dataclass
class Line:
    """What is told of a way: bytes of every rank's caches, its own in bfloat16, and how far it is from one process."""

    name: str
    packed_bytes: list[int]
    outcome: Outcome
    difference: float


def compare(args: argparse.Namespace) -> list[Line]:
    """Generate in every way, on every rank of the default process group; a progress bar on the first."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    trained, autoencoder = load_models(torch.float32)  # so that rounding does not hide what is compared
    config = trained.config
    noise = draw_noise(config, args.chunks, seed=0).float()
    latents = encode(autoencoder, args.frames)
    prompt = latents[: PROMPT_CHUNKS * config.chunk_frames].unflatten(0, (-1, config.chunk_frames))
    ways = (
        Way("one process", CausalVideoTransformer, CausalSelfAttention),
        Way(f"heads on {ranks}", HeadParallelTransformer, HeadParallelAttention, head_share=ranks),
        Way(f"tokens on {ranks}", CausalVideoTransformer, TokenParallelAttention, token_share=ranks),
    )
    lines: list[Line] = []
    total = len(ways) * (PROMPT_CHUNKS + args.chunks)
    with tqdm(total=total, unit="chunk", file=sys.stderr, disable=rank > 0) as bar:
        for way in ways:
            bar.set_description(way.name)
            outcome = generate(way, trained, prompt, noise, args, bar.update)
            single = lines[0].outcome.latents if lines else outcome.latents
            held = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
            dist.all_gather(held, torch.tensor([outcome.packed_bytes]))
            difference = float((outcome.latents - single).norm() / single.norm())
            lines.append(Line(way.name, [int(n) for n in held], outcome, difference))
    return lines


def table(lines: list[Line]) -> str:
    """The closing table."""
    rows = [f"{'':>14} {'cache KiB, by rank':>22} {'to BF16':>9} {'on wire':>9} {'difference':>11} {'s/chunk':>9}"]
    for line in lines:
        outcome, held = line.outcome, ", ".join(f"{n / 1024:.0f}" for n in line.packed_bytes)
        rows.append(
            f"{line.name:>14} {held:>22} {outcome.full_bytes / outcome.packed_bytes:>8.2f}x "
            f"{outcome.layer_bytes / outcome.wire_bytes:>8.2f}x {line.difference:>11.1e} {outcome.seconds:>9.2f}"
        )
    return "\n".join([*rows, "", *NOTES])


NOTES = (
    "to BF16: a rank's share in bfloat16 over its packed bytes. on wire: the same for one layer's keys, as",
    "jkv_compile.distributed sends them. difference: of the latents to one process's, relative.",
)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    dist.init_process_group("gloo")
    lines = compare(args)
    if dist.get_rank() == 0:
        print(table(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
