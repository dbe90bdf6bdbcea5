"""Train the head that tells which cached tokens to keep: ``python -m examples.train_salience``. Seeded; takes minutes.

What a token will be worth to frames yet to come is not known when it is written. So a small head is taught it by
distillation (PaFu-KV, arXiv 2601.21896): the whole window goes through the frozen transformer in one bidirectional
pass, which tells how much attention each token receives from all chunks but its own, later and earlier; the head sees
keys and values as generation writes them, chunk after chunk, and predicts that attention's logarithm.

Windows are of the training parts of the clips only. A window is seen once, so that the correlation that is printed is
one with what the head has not been trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from examples.rollout import load_models
from examples.train import CHUNKS, encode, load_autoencoder
from examples.video_model.model import CausalVideoTransformer
from examples.video_model.sampling import Sampler
from examples.windows import Windows
from jkv_compile.salience import SalienceHead

WEIGHTS = Path(__file__).parent / "weights" / "salience.safetensors"
LOG = Path(__file__).parent / "results" / "salience.json"


class Received(TorchFunctionMode):
    """Records the attention that each token receives, per call float32 [N, S]: mean over heads and a chunk's queries.

    Args:
        chunk_tokens: tokens of a chunk; S = N * chunk_tokens.
    """

    def __init__(self, chunk_tokens: int) -> None:
        super().__init__()
        self.chunk_tokens, self.per_layer = chunk_tokens, list[Tensor]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[0].float(), args[1].float()
            weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
            self.per_layer.append(weights.mean((0, 1)).unflatten(0, (-1, self.chunk_tokens)).mean(1))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def lesson(model: CausalVideoTransformer, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What there is to learn from one window of latents [1, N, F, C, h, w].

    Returns:
        Keys and values as generation writes them, each float32 [layers, H, S, D]; and the attention that each token
        receives from each chunk in a bidirectional pass, float32 [layers, N, S].
    """
    config, chunks = model.config, latents.shape[1]
    caches = model.allocate_cache(1, chunks * config.chunk_frames)
    sampler = Sampler(model, config, caches)
    for n in range(chunks):
        sampler.prefill(latents[:, n])
    key, value = (torch.cat([cache[name] for cache in caches]).float().transpose(1, 2) for name in ("k", "v"))
    tokens = chunks * config.chunk_tokens
    with Received(config.chunk_tokens) as received:  # all frames as one chunk: each sees all
        model(latents.flatten(1, 2), torch.zeros(1), caches, 0, tokens)
    return key, value, torch.stack(received.per_layer)


def centred(x: Tensor, among: Tensor) -> Tensor:
    """x [..., S] less its mean over the tokens `among`, bool [N, S]; zero for others."""
    mean = (x * among).sum(-1, keepdim=True) / among.sum(-1, keepdim=True)
    return (x - mean) * among


def predictions(head: SalienceHead, key: Tensor, value: Tensor, chunks: int) -> Tensor:
    """The head's logarithm of attention from each chunk, [layers, N, S], but for a number per layer and chunk."""
    chunk_tokens = key.shape[2] // chunks
    lag = (torch.arange(chunks)[:, None] - torch.arange(key.shape[2]) // chunk_tokens).abs() * chunk_tokens  # [N, S]
    return head(key, value)[:, None] - head.recency * lag


def correlation(one: Tensor, other: Tensor, among: Tensor) -> float:
    """Rank correlation (Spearman's) of tokens, mean over layers and chunks; `among` bool [N, S]."""
    found = []
    for layer in range(one.shape[0]):
        for n in range(one.shape[1]):
            ranks = [x[layer, n][among[n]].argsort().argsort().float() for x in (one, other)]
            found.append(torch.corrcoef(torch.stack(ranks))[0, 1])
    return float(torch.stack(found).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=150)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the trained weights go")
    parser.add_argument("--log", type=Path, default=LOG, help="where the record of the training goes")
    args = parser.parse_args()
    model, _ = load_models(torch.float32)
    autoencoder, config = load_autoencoder(), model.config
    windows = Windows(CHUNKS * config.chunk_frames)
    torch.manual_seed(args.seed)
    head = SalienceHead(config.head_dim, config.head_dim, args.hidden)
    layers = [*head.inner.parameters(), *head.outer.parameters()]
    optimizer = torch.optim.Adam([{"params": layers}, {"params": [head.recency]}])
    peaks = args.lr, 10 * args.lr / config.chunk_tokens  # recency is per token, and ages are chunks
    own = torch.arange(CHUNKS * config.chunk_tokens) // config.chunk_tokens
    others = own != torch.arange(CHUNKS)[:, None]  # [N, S]: tokens of other chunks
    records = []
    for step in (bar := tqdm(range(args.windows), desc="salience", unit="window")):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * min(1.0, (args.windows - step) / (0.4 * args.windows))
        latents = encode(autoencoder, windows.draw(generator), config.chunk_frames)
        key, value, received = lesson(model, latents)
        target = centred((received + 1e-6).log(), others)
        predicted = centred(predictions(head, key, value, CHUNKS), others)
        agreement = correlation(predicted.detach(), target, others) if step % 5 == 0 else None
        loss = (predicted - target).square().sum() / (others.sum() * len(key))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        variance = float(target.square().sum() / (others.sum() * len(key)))
        if agreement is not None:
            told = {"window": step, "loss": loss.item(), "variance": variance, "rank_correlation": agreement}
            records.append({name: round(x, 5) for name, x in told.items()})
            bar.set_postfix_str(f"loss {loss.item():.3f} of {variance:.3f}, ranks {agreement:.3f}")
    head.save(args.weights)
    args.log.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    last = records[-5:]
    print(
        f"of the variance {1 - sum(r['loss'] for r in last) / sum(r['variance'] for r in last):.2f} is told, rank "
        f"correlation {sum(r['rank_correlation'] for r in last) / len(last):.2f}; "
        f"{head.recency.item() * config.chunk_tokens:.2f} is taken off per chunk of age"
    )


if __name__ == "__main__":
    main()
