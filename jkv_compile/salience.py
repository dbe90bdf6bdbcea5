"""What tells which tokens a budget keeps: names, and learned heads (`salience=`)."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigurationError
from .kernels.retention import HEADS, is_head

POLICIES = ("attention", "recent", "random", "even")


class SalienceHead(nn.Module):
    """A small learned head, shared by all layers and heads: a token's salience from its key and value.

    One hidden layer on the key, the value and the logarithms of their norms; the mean over heads counts. It tells the
    logarithm of the attention that a token will receive, but for a number that all tokens of a cache have in common,
    and for what age takes off: `recency` per token (PaFu-KV, arXiv 2601.21896, distils such a head; this form is ours).

    Args:
        key_dim, value_dim: head_dim of keys and of values.
        hidden: channels of the hidden layer.
    """

    def __init__(self, key_dim: int, value_dim: int, hidden: int = 32) -> None:
        super().__init__()
        self.key_dim = key_dim
        self.inner = nn.Linear(key_dim + value_dim + 2, hidden)
        self.outer = nn.Linear(hidden, 1)
        self.recency = nn.Parameter(torch.zeros(()))

    def forward(self, key: Tensor, value: Tensor) -> Tensor:
        """`[B, n]` from key `[B, H, n, D]` and value `[B, H, n, Dv]`, float32."""
        norms = [x.square().mean(-1, keepdim=True).add(1e-6).log() for x in (key, value)]
        x = self.inner(torch.cat((key, value, *norms), -1))
        return self.outer(F.gelu(x)).squeeze(-1).mean(1)

    @classmethod
    def load(cls, path: str | Path) -> SalienceHead:
        """The head whose weights a safetensors file holds.

        Raises:
            ConfigurationError: there is no such file, or it holds something else.
        """
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ConfigurationError(
                f"salience={str(path)!r}: reading the weights takes safetensors: pip install safetensors"
            ) from error
        try:
            weights = load_file(path)
            hidden, channels = weights["inner.weight"].shape
            key_dim = int(weights.pop("key_dim"))
            head = cls(key_dim, channels - key_dim - 2, hidden)
            head.load_state_dict(weights)
        except Exception as error:  # whatever is wrong with a file
            raise ConfigurationError(
                f"salience={str(path)!r}: expected {', '.join(map(repr, POLICIES))}, a module, or the path of a "
                f"safetensors file as SalienceHead.save writes it ({type(error).__name__}: {error})"
            ) from error
        return head

    def save(self, path: str | Path) -> None:
        """Write the weights, in float32."""
        from safetensors.torch import save_file

        weights = {name: x.detach().float().contiguous() for name, x in self.state_dict().items()}
        save_file({**weights, "key_dim": torch.tensor(self.key_dim)}, path)


def policy_of(salience: Any) -> str:
    """The name of what tells which tokens to keep; learned heads are registered by it (`kernels.retention.HEADS`).

    Raises:
        ConfigurationError: it is none.
    """
    if isinstance(salience, str) and (salience in POLICIES or (is_head(salience) and salience in HEADS)):
        return salience
    if isinstance(salience, (str, Path)):
        salience = SalienceHead.load(salience)
    if not isinstance(salience, nn.Module):
        raise ConfigurationError(
            f"salience={salience!r}: expected {', '.join(map(repr, POLICIES))}, a module that makes [B, n] of keys and "
            "values [B, H, n, D], or the path of such a head's weights"
        )
    name = f"head:{_digest(salience)}"
    if name not in HEADS:
        HEADS[name] = copy.deepcopy(salience).cpu().float().eval().requires_grad_(False)
    return name


def _digest(head: nn.Module) -> str:
    """Tells a head by its class and weights."""
    told = hashlib.sha256(f"{type(head).__module__}.{type(head).__qualname__}".encode())
    for name, weight in sorted(head.state_dict().items()):
        told.update(f"{name} {list(weight.shape)}".encode())
        told.update(bytes(weight.detach().cpu().double().reshape(-1).view(torch.uint8).tolist()))
    return told.hexdigest()[:16]
