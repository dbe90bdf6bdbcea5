"""Train the per-frame autoencoder: ``python -m examples.train_autoencoder``. Seeded, resumable, about ten minutes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from examples.data import crop_and_resize, training_scenes
from examples.video_model.autoencoder import Autoencoder

WEIGHTS = Path(__file__).parent / "weights" / "autoencoder.safetensors"
LATENT_NOISE = 0.1  # keeps the latent space smooth, and the decoder tolerant of imperfect latents
POOL_CROPS = 12


def build_pool(scenes: list[Tensor], generator: torch.Generator) -> Tensor:
    """Frames to draw from: every training frame at the centre crop and at random crops, uint8 [N, 3, 96, 128]."""
    pool = []
    for crop in range(POOL_CROPS):
        for scene in scenes:
            scale, x, y = torch.rand(3, generator=generator).tolist()
            frames = crop_and_resize(scene) if crop < 4 else crop_and_resize(scene, 0.75 + 0.25 * scale, x, y)
            pool.append(((frames + 1) * 127.5).round().clamp(0, 255).byte())
    return torch.cat(pool)


def gradients(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical finite differences of [N, 3, H, W]."""
    return frames.diff(dim=-1), frames.diff(dim=-2)


def loss_function(output: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels and on their gradients; the second term keeps edges that plain L1 would blur."""
    pixel = F.l1_loss(output, target)
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(output), gradients(target), strict=True))
    return pixel + 0.5 * edges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=Path("out/train_autoencoder"), help="checkpoints and loss log")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the trained weights go")
    args = parser.parse_args()

    args.run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pool = build_pool(training_scenes(), torch.Generator().manual_seed(args.seed))
    model = Autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    checkpoint, log, first = args.run / "checkpoint.pt", args.run / "loss.jsonl", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="autoencoder", mininterval=5)
    running = 0.0
    for step in bar:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        warmup, decay = min(1.0, (step + 1) / 200), min(1.0, (args.steps - step) / (0.4 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmup * decay
        frames = pool[torch.randint(len(pool), (args.batch,), generator=generator)].float() / 127.5 - 1.0
        if torch.rand((), generator=generator) < 0.5:
            frames = frames.flip(-1)
        frames = frames.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = model.encode(frames).float()
            noise = LATENT_NOISE * torch.randn(latents.shape, generator=generator)
            output = model.decode(latents + noise)
        loss = loss_function(output.float(), frames)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{running:.4f}")
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, "loss": running}) + "\n")
        if step % 500 == 499 or step + 1 == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)

    tensors = {
        name: tensor.to(torch.bfloat16).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    args.weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.weights)


if __name__ == "__main__":
    main()
