"""Train the video transformer: ``python -m examples.train``. Seeded, resumable; needs the trained autoencoder.

Every step teacher-forces all chunks of a 27-frame window at once. The history is not left clean, or generation would
drift: some history chunks get a little noise (whose level the model is told), and in the second part of the training
most batches continue from the model's own rollouts instead of from the video, as in Self-Forcing.
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

from examples.data import CLIPS, crop_and_resize, held_out, training_scenes
from examples.train_autoencoder import WEIGHTS as AUTOENCODER_WEIGHTS
from examples.video_model.autoencoder import Autoencoder
from examples.video_model.model import Block, CausalVideoTransformer, ModelConfig
from examples.video_model.sampling import Sampler, timesteps

WEIGHTS = Path(__file__).parent / "weights" / "transformer.safetensors"
CHUNKS = 9
RANDOM_CROPS = 7
ROLLOUT_SHARE = 0.6  # of the steps, once rollouts have begun


def load_autoencoder(path: Path = AUTOENCODER_WEIGHTS) -> Autoencoder:
    """The trained autoencoder in float32 for training-time encoding."""
    autoencoder = Autoencoder()
    autoencoder.load_state_dict(load_file(path))
    return autoencoder.eval().requires_grad_(False)


@torch.no_grad()
def encode(autoencoder: Autoencoder, frames: Tensor) -> Tensor:
    """Frames [T, 3, H, W] in [-1, 1] to float32 latents [T, C, h, w], a few at a time."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = [autoencoder.encode(p.to(memory_format=torch.channels_last)).float() for p in frames.split(8)]
    return torch.cat(parts)


def build_bank(autoencoder: Autoencoder, generator: torch.Generator) -> dict[str, list[Tensor]]:
    """Latents of every training scene: ``centre`` crops as in the demo, and ``random`` ones, each also mirrored."""
    bank: dict[str, list[Tensor]] = {"centre": [], "random": []}
    for scene in tqdm(training_scenes(), desc="encoding scenes"):
        for crop in range(1 + RANDOM_CROPS):
            scale, x, y = torch.rand(3, generator=generator).tolist()
            frames = crop_and_resize(scene) if crop == 0 else crop_and_resize(scene, 0.7 + 0.3 * scale, x, y)
            for view in (frames, frames.flip(-1)):
                bank["centre" if crop == 0 else "random"].append(encode(autoencoder, view).half())
    return bank


class Batches:
    """Draws training batches; everything random about a step comes from the one generator it is given."""

    scene_weights = tuple(5.0 if scene == clip.train[-1] else 1.0 for clip in CLIPS.values() for scene in clip.train)

    def __init__(self, bank: dict[str, list[Tensor]], config: ModelConfig, centre_share: float = 0.8) -> None:
        self.bank, self.config, self.centre_share = bank, config, centre_share

    def video(self, generator: torch.Generator) -> Tensor:
        """A window of latents, [N, F, C, h, w], one in six played backwards.

        The last scene of every clip, which continues into the held-out part, counts five times as much as the others.
        """
        kind = "centre" if torch.rand((), generator=generator) < self.centre_share else "random"
        scenes, frames = self.bank[kind], CHUNKS * self.config.chunk_frames
        views_per_scene = len(scenes) // len(self.scene_weights)
        weights = torch.tensor(self.scene_weights).repeat_interleave(views_per_scene)
        scene = scenes[int(torch.multinomial(weights, 1, generator=generator))]
        start = int(torch.randint(len(scene) - frames + 1, (), generator=generator))
        window = scene[start : start + frames].float()
        if torch.rand((), generator=generator) < 1 / 6:
            window = window.flip(0)
        return window.unflatten(0, (CHUNKS, self.config.chunk_frames))

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """[B, N, F, C, h, w]."""
        return torch.stack([self.video(generator) for _ in range(batch)])


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


def flow_loss(model: CausalVideoTransformer, video: Tensor, history: Tensor, generator: torch.Generator) -> Tensor:
    """Velocity-matching loss of the predicted clean latents (x-prediction with v-loss, arXiv 2511.13720).

    Args:
        video: [B, N, F, C, h, w], the truth.
        history: [B, N, F, C, h, w], what the model sees of earlier chunks: the truth, or its own rollout.
    """
    batch, chunks = video.shape[0], video.shape[1] - 1
    # Most levels are those of a four-step schedule, of which sampling visits the upper two; the others lie between.
    scheduled = torch.tensor(timesteps(4)[:-1])[torch.randint(4, (batch, chunks), generator=generator)]
    between = 0.4 + 0.6 * torch.rand(batch, chunks, generator=generator)
    level = torch.where(torch.rand(batch, chunks, generator=generator) < 0.8, scheduled, between)
    history_level = 0.4 * torch.rand(batch, chunks, generator=generator)
    history_level = history_level * (torch.rand(batch, chunks, generator=generator) < 0.3)
    seen = add_noise(history[:, :-1], history_level, generator)
    predicted = model.forward_train(seen, history_level, add_noise(video[:, 1:], level, generator), level)
    error = (predicted.float() - video[:, 1:]).square().mean(dim=(2, 3, 4, 5))
    return (error / level.square()).mean()


def make_optimizers(model: CausalVideoTransformer, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (github.com/KellerJordan/Muon) for the matrices of the blocks, AdamW for everything else."""
    matrices = [module.weight for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


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
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--rollout-from", type=int, default=700, help="step at which rollouts begin")
    parser.add_argument("--no-compile", action="store_true", help="slower, but needs no C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=Path("out/train"), help="checkpoints, latents and loss log")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the trained weights go")
    args = parser.parse_args()

    args.run.mkdir(parents=True, exist_ok=True)
    autoencoder = load_autoencoder()
    bank_file = args.run / "latents.pt"
    if not bank_file.exists():
        atomic_save(build_bank(autoencoder, torch.Generator().manual_seed(args.seed)), bank_file)
    config = ModelConfig()
    batches = Batches(torch.load(bank_file), config)
    validation = torch.stack([encode(autoencoder, held_out(name)) for name in CLIPS])
    validation = validation.unflatten(1, (CHUNKS, config.chunk_frames))

    torch.manual_seed(args.seed)
    model = CausalVideoTransformer(config)
    averaged = deepcopy(model).requires_grad_(False)
    player = deepcopy(averaged).to(torch.bfloat16)  # the averaged weights as inference has them, for rollouts
    if not args.no_compile:
        Block.forward_train = torch.compile(Block.forward_train)  # type: ignore[method-assign]
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
        video = batches.draw(args.batch, generator)
        own = step >= args.rollout_from and float(torch.rand((), generator=generator)) < ROLLOUT_SHARE
        history = video
        if own:
            torch._foreach_copy_(list(player.parameters()), list(averaged.parameters()))
            history = roll_out(player, video, int(torch.randint(1, 6, (), generator=generator)), generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = flow_loss(model, video, history, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(0.997, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)

        name = "rollout_loss" if own else "loss"
        running[name] = loss.item() if name not in running else 0.97 * running[name] + 0.03 * loss.item()
        if step % 20 == 19:
            bar.set_postfix({key: f"{value:.4f}" for key, value in running.items()})
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, **running}) + "\n")
        last = step + 1 == args.steps or stop.is_set()
        if step % 250 == 249 or last:
            torch._foreach_copy_(list(player.parameters()), list(averaged.parameters()))
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, "held_out": evaluate(player, validation)}) + "\n")
        if step % 100 == 99 or last:
            state = {"model": model.state_dict(), "averaged": averaged.state_dict(), "step": step + 1}
            atomic_save({**state, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, checkpoint)
        if last:
            break
    export(averaged, args.weights)


if __name__ == "__main__":
    main()
