"""Train the video transformer: ``python -m examples.train``. Seeded, resumable; needs the trained autoencoder.

Every step teacher-forces all chunks of a window at once. The history is not left clean, or generation would drift: some
history chunks get a little noise (whose level the model is told), and many windows have the model's own chunks in their
history, as generation has. Those come from a rollout (as in Self-Forcing, arXiv 2506.08009), or, for less, from one
prediction of all chunks in parallel (as in parallel scheduled sampling, arXiv 1906.04331).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from examples.data import CLIPS, held_out
from examples.muon import Muon
from examples.train_autoencoder import WEIGHTS as AUTOENCODER_WEIGHTS
from examples.video_model.autoencoder import Autoencoder
from examples.video_model.model import Block, CausalVideoTransformer, ModelConfig
from examples.video_model.sampling import Sampler, timesteps
from examples.windows import Windows, chance

WEIGHTS = Path(__file__).parent / "weights" / "transformer.safetensors"
CHUNKS = 9
SHORT_CHUNKS = 5  # of most windows: more of them, and more kinds of motion, in the same time
SHORT_SHARE = 0.65
ROLLOUT_SHARE = 0.25  # windows whose history is a rollout
PARALLEL_SHARE = 0.4  # windows whose history holds chunks predicted in parallel
LAG_PENALTY = 0.02  # per frame, see nearest_in_time


def autocast() -> torch.autocast:
    """bfloat16 where the CPU multiplies in it; emulated it is slower than float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def load_autoencoder(path: Path = AUTOENCODER_WEIGHTS) -> Autoencoder:
    """The trained autoencoder in float32 for training-time encoding."""
    autoencoder = Autoencoder()
    autoencoder.load_state_dict(load_file(path))
    return autoencoder.eval().requires_grad_(False)


@torch.no_grad()
def encode(autoencoder: Autoencoder, frames: Tensor, chunk_frames: int) -> Tensor:
    """Frames [N * F, 3, H, W] in [-1, 1] to float32 latents [1, N, F, C, h, w], a few at a time."""
    with autocast():
        latents = torch.cat([autoencoder.encode(part).float() for part in frames.split(9)])
    return latents.unflatten(0, (1, -1, chunk_frames))


def add_noise(x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """Rectified-flow interpolation of x [B, N, ...] to the noise levels [B, N]."""
    level = level[(...,) + (None,) * (x.dim() - level.dim())]
    return (1 - level) * x + level * torch.randn(x.shape, generator=generator)


@torch.no_grad()
def roll_out(
    model: CausalVideoTransformer, video: Tensor, prompt: int, generator: torch.Generator, steps: int = 2
) -> Tensor:
    """Continue the first ``prompt`` chunks of video [B, N, F, C, h, w] by the model itself; same shape and dtype."""
    caches = model.allocate_cache(video.shape[0], video.shape[1] * video.shape[2])
    sampler, dtype = Sampler(model, model.config, caches, steps), model.patch_in.weight.dtype
    chunks = []
    for n in range(video.shape[1]):
        if n < prompt:
            chunks.append(video[:, n].to(dtype))
            sampler.prefill(chunks[-1])
        else:
            chunks.append(sampler.generate(torch.randn(video[:, n].shape, generator=generator).to(dtype)))
    return torch.stack(chunks, dim=1).to(video.dtype)


@torch.no_grad()
def predict_in_parallel(model: CausalVideoTransformer, video: Tensor, generator: torch.Generator) -> Tensor:
    """Put the model's own predictions in the place of some chunks of video [B, N, F, C, h, w]; same shape.

    All are predicted at once, from pure noise and true history; three in ten times once more, from the result. They
    take the place of all chunks from one on, as in generation, or of any.
    """
    batch, chunks = video.shape[0], video.shape[1] - 1
    clean, noise, history = torch.zeros(batch, chunks), torch.ones(batch, chunks), video
    for _ in range(2 if chance(0.3, generator) else 1):
        noisy = torch.randn(video[:, 1:].shape, generator=generator)
        predicted = model.forward_train(history[:, :-1], clean, noisy, noise).float()
        if chance(0.5, generator):
            own = torch.arange(1, chunks + 1) >= torch.randint(1, chunks // 2 + 2, (), generator=generator)
        else:
            own = torch.rand(chunks, generator=generator) < 0.6
        rest = torch.where(own[:, None, None, None, None], predicted, video[:, 1:])
        history = torch.cat([video[:, :1], rest], dim=1)
    return history


def draw_history(
    model: CausalVideoTransformer, video: Tensor, own: bool, generator: torch.Generator
) -> tuple[str, Tensor, Tensor]:
    """What the model sees of earlier chunks of video [B, N, F, C, h, w]: the truth, or often (if ``own``) its own ones.

    Returns:
        The kind of history; the history, shaped as video; and, [N - 1], how many frames late each chunk after the
        first may be.
    """
    chunks, kind = video.shape[1], float(torch.rand((), generator=generator)) if own else 1.0
    if kind < ROLLOUT_SHARE:
        prompt = int(torch.randint(2, chunks // 2 + 1, (), generator=generator))
        before = (torch.arange(1, chunks) - prompt).clamp(min=0)  # own chunks, which may have stood still
        return "rollout", roll_out(model, video, prompt, generator, steps=1), 2 + 3 * before
    if kind < ROLLOUT_SHARE + PARALLEL_SHARE:
        return "parallel", predict_in_parallel(model, video, generator), torch.full((chunks - 1,), 4)
    return "true", video, torch.full((chunks - 1,), 2)


def frame_error(difference: Tensor) -> Tensor:
    """Pseudo-Huber norm (arXiv 2310.14189) of every token of latents [B, T, C, h, w], mean per frame [B, T].

    Not a square: where several continuations are possible, squares are least for their blurred mean.
    """
    patches = difference.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return (patches.square().mean(dim=(2, 4, 6)) + 0.1**2).sqrt().mean(dim=(2, 3)) - 0.1


@torch.no_grad()
def nearest_in_time(predicted: Tensor, video: Tensor, allowed_lag: Tensor) -> Tensor:
    """For each predicted frame, the true one it is nearest to among those due at its time or a little before.

    Motion by fractions of a token is what a model of this size predicts worst. Held to the very frame, it would answer
    with the mean of all the places where things may be, and its rollouts would dissolve. So it may be late: slow, but
    sharp.

    Args:
        predicted: [B, N - 1, F, C, h, w], chunks 1 to N - 1.
        video: [B, N, F, C, h, w].
        allowed_lag: [N - 1], in frames, per chunk.
    """
    chunk_frames = video.shape[2]
    predicted, video, limit = predicted.flatten(1, 2), video.flatten(1, 2), allowed_lag.repeat_interleave(chunk_frames)
    due = torch.arange(chunk_frames, video.shape[1])
    costs = []
    for lag in range(int(limit.max()) + 1):
        cost = frame_error(predicted - video[:, (due - lag).clamp(min=0)]) + LAG_PENALTY * lag
        costs.append(cost.masked_fill((lag > limit) | (due - lag < chunk_frames - 1), float("inf")))
    chosen = due - torch.stack(costs).argmin(0)  # [B, T]
    nearest = torch.stack([frames[index] for frames, index in zip(video, chosen, strict=True)])
    return nearest.unflatten(1, (-1, chunk_frames))


def flow_loss(
    model: CausalVideoTransformer, video: Tensor, history: Tensor, allowed_lag: Tensor, generator: torch.Generator
) -> Tensor:
    """Velocity-matching loss of the predicted clean latents (x-prediction with v-loss, arXiv 2511.13720).

    See ``draw_history`` and ``nearest_in_time`` for the arguments.
    """
    batch, chunks = video.shape[0], video.shape[1] - 1
    # Most levels are those that sampling visits; the others lie between.
    scheduled = torch.tensor(timesteps(2, 9.0)[:-1])[torch.randint(2, (batch, chunks), generator=generator)]
    between = 0.3 + 0.7 * torch.rand(batch, chunks, generator=generator)
    level = torch.where(torch.rand(batch, chunks, generator=generator) < 0.8, scheduled, between)
    history_level = 0.4 * torch.rand(batch, chunks, generator=generator)
    history_level = history_level * (torch.rand(batch, chunks, generator=generator) < 0.25)
    seen = add_noise(history[:, :-1], history_level, generator)
    predicted = model.forward_train(seen, history_level, add_noise(video[:, 1:], level, generator), level).float()
    difference = predicted - nearest_in_time(predicted, video, allowed_lag)
    return (frame_error(difference.flatten(1, 2)).unflatten(1, (chunks, -1)).mean(-1) / level).mean()


def make_optimizers(model: CausalVideoTransformer, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [module.weight for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 100 steps, constant, then linear to zero over the last 40 %: a resumed run may move its end."""
    return peak * min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))


def atomic_save(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint so that an interruption leaves the old or the new one, never half of it."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def export(model: nn.Module, path: Path) -> None:
    """Save the parameters as bfloat16 safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}, path)


@torch.no_grad()
def evaluate(model: CausalVideoTransformer, videos: Tensor) -> dict[str, float]:
    """Rollout error on the held-out parts, in latent space: mean squared error per clip over the generated chunks."""
    generated = roll_out(model, videos, prompt=3, generator=torch.Generator().manual_seed(0))
    error = (generated - videos)[:, 3:].square().mean(dim=(1, 2, 3, 4, 5))
    return dict(zip(CLIPS, error.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=1.1e-3)
    parser.add_argument("--init", type=Path, help="weights to start from instead of random ones")
    parser.add_argument("--own-from", type=int, default=500, help="step at which own chunks enter the history")
    parser.add_argument("--no-compile", action="store_true", help="slower, but needs no C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=Path("out/train"), help="checkpoints and loss log")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the trained weights go")
    args = parser.parse_args()

    args.run.mkdir(parents=True, exist_ok=True)
    config, autoencoder = ModelConfig(), load_autoencoder()
    windows = Windows(CHUNKS * config.chunk_frames)
    validation = torch.cat([encode(autoencoder, held_out(name), config.chunk_frames) for name in CLIPS])

    torch.manual_seed(args.seed)
    model = CausalVideoTransformer(config)
    if args.init is not None:
        model.load_state_dict(load_file(args.init))
    averaged = deepcopy(model).requires_grad_(False)  # for rollouts, and the result
    if not args.no_compile:
        # A graph of its own for each length of window is faster than one for any length.
        Block.forward_train = torch.compile(Block.forward_train, dynamic=False)  # type: ignore[method-assign]
    optimizers = make_optimizers(model, args.lr)
    checkpoint, log, first = args.run / "checkpoint.pt", args.run / "loss.jsonl", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())  # ends after the step at hand, with a checkpoint and weights
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="transformer", mininterval=5)
    running: dict[str, float] = {}
    for step in bar:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
        frames = windows.draw(generator)
        if chance(SHORT_SHARE, generator):
            length = SHORT_CHUNKS * config.chunk_frames
            start = int(torch.randint(len(frames) - length + 1, (), generator=generator))
            frames = frames[start : start + length]
        video = encode(autoencoder, frames, config.chunk_frames)
        with autocast():
            kind, history, allowed_lag = draw_history(averaged, video, step >= args.own_from, generator)
            loss = flow_loss(model, video, history, allowed_lag, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(0.99, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)

        running[kind] = loss.item() if kind not in running else 0.95 * running[kind] + 0.05 * loss.item()
        if step % 20 == 19:
            bar.set_postfix({key: f"{value:.4f}" for key, value in running.items()})
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, **running}) + "\n")
        last = step + 1 == args.steps or stop.is_set()
        if step % 250 == 249 or last:
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, "held_out": evaluate(averaged, validation)}) + "\n")
        if step % 100 == 99 or last:
            state = {"model": model.state_dict(), "averaged": averaged.state_dict(), "step": step + 1}
            atomic_save({**state, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, checkpoint)
        if last:
            break
    export(averaged, args.weights)


if __name__ == "__main__":
    main()
