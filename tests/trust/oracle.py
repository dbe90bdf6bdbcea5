"""What attention over a packed cache is derived to be (arXiv 2605.26266), in plain torch, from public accessors alone."""

from __future__ import annotations

import torch
from torch import Tensor

from jkv_compile import is_packed, materialize, quantization_step

from ..harness import fresh_backend, relative_error
from .layers import Case, Layer

EXACT = 1e-4


def attended(
    query: Tensor, cached_key: Tensor, cached_value: Tensor, step: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """softmax over s·q·k̂ - s²/24 · Σ_g ‖q_g‖² Δ_g² for cached keys and s·q·k for current ones, times the values.

    All `[B, H, tokens, D]`, `step` with groups for channels; one query head per key head.
    """
    scale, groups = query.shape[-1] ** -0.5, step.shape[-1]
    norms = query.unflatten(-1, (groups, -1)).square().sum(-1)
    past = scale * query @ cached_key.transpose(-1, -2) - scale**2 / 24 * norms @ step.square().transpose(-1, -2)
    current = scale * query @ key.transpose(-1, -2)
    return torch.cat((past, current), -1).softmax(-1) @ torch.cat((cached_value, value), -2)


def differs_from_derivation(case: Case, calls: int = 3, n: int = 4) -> str:
    """Run a case of slices written and read, at 2 bits, beside the derivation; "" where they agree."""
    torch.manual_seed(0)
    layer = Layer(case)
    backend = fresh_backend(bits=2, group_size=case.group_size)
    compiled = torch.compile(layer, backend=backend)
    cache = layer.new_cache()

    def canonical(x: Tensor) -> Tensor:
        return x if case.heads_first else x.transpose(1, 2)

    factor = 0.5 if case.after_read == "scaled" else 1.0  # what the model multiplies keys by, after it has read them
    with torch.no_grad():
        for start in range(0, calls * n, n):
            x = torch.randn(case.batch, n, case.heads * case.head_dim)
            q, k, v = (canonical(t) if i else t for i, t in enumerate(layer.project(x)))
            keys, values, step = k[:, :, :0], v[:, :, :0], k[:, :, :0, :1]
            if start:  # a chunk that is held in full precision is so until the next write, which comes now
                cache["k"]._store.active = cache["v"]._store.active = None
                past = [layer.part(cache[name], 0, start) for name in "kv"]
                keys, values = (canonical(materialize(t)) for t in past)
                step = canonical(quantization_step(past[0]))
            want = attended(q, factor * keys, values, factor * step, factor * k, v).transpose(1, 2).flatten(2)
            error = relative_error(compiled(x, cache, start)[0], want)
            if not error < EXACT:
                return f"the chunk at {start} is off by {error:.1e}"
    return "" if is_packed(cache["k"]) else "nothing was packed"
