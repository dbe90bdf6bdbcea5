"""Block-causal attention over [history | noisy chunks], the attention of teacher forcing, fast on a CPU.

One autograd function instead of one ``scaled_dot_product_attention`` per chunk: its backward pass accumulates the
gradients of keys and values in place, where autograd would add up one full-size gradient per slice. On two CPU cores
that makes a training step about 1.7 times as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _keys_of_chunk(x: Tensor, n: int) -> Tensor:
    """What chunk n + 1 sees of x [2, B, H, N, S, D]: history 0 to n, then itself, noisy; [B, H, (n + 2) * S, D]."""
    return torch.cat([x[0, :, :, : n + 1], x[1, :, :, n : n + 1]], dim=2).flatten(2, 3)


class BlockCausalAttention(torch.autograd.Function):
    """Softmax attention of q, k, v, each [2, B, H, N, S, D]; index 0 of the first axis is history, 1 the noisy chunks.

    History chunk n sees history 0 to n. The noisy chunk beside it, n + 1 of the video, sees history 0 to n and itself.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chunks, tokens, head_dim = q.shape[-3:]
        output, probabilities = torch.empty_like(q), []
        for n in range(chunks):
            queries = q[:, :, :, n].permute(1, 2, 0, 3, 4).flatten(2, 3)  # [B, H, 2 * S, D]
            scores = queries @ _keys_of_chunk(k, n).mT * head_dim**-0.5
            scores[:, :, :tokens, -tokens:] = float("-inf")
            probabilities.append(scores.softmax(-1))
            attended = probabilities[-1] @ _keys_of_chunk(v, n)
            output[:, :, :, n] = attended.unflatten(2, (2, tokens)).permute(2, 0, 1, 3, 4)
        ctx.save_for_backward(q, k, v, *probabilities)
        return output

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *probabilities = ctx.saved_tensors
        tokens, head_dim = q.shape[-2:]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for n, weights in enumerate(probabilities):
            queries = q[:, :, :, n].permute(1, 2, 0, 3, 4).flatten(2, 3)
            grad_out = grad[:, :, :, n].permute(1, 2, 0, 3, 4).flatten(2, 3)
            grad_weights = grad_out @ _keys_of_chunk(v, n).mT
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(head_dim**-0.5)
            grad_q[:, :, :, n] = (grad_scores @ _keys_of_chunk(k, n)).unflatten(2, (2, tokens)).permute(2, 0, 1, 3, 4)
            for total, part in ((grad_k, grad_scores.mT @ queries), (grad_v, weights.mT @ grad_out)):
                part = part.unflatten(2, (-1, tokens))
                total[0, :, :, : n + 1] += part[:, :, : n + 1]
                total[1, :, :, n] = part[:, :, n + 1]
        return grad_q, grad_k, grad_v


@torch.compiler.disable
def block_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See ``BlockCausalAttention``; kept out of compiled graphs, which gain nothing from unrolling its loop."""
    return BlockCausalAttention.apply(q, k, v)
