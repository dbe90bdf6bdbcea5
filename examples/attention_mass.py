"""How much attention the model pays to its cache: the softmax mass on cached keys.

A quantized key is noisy, and the exponential of a noisy score is too large on average, so naive quantization pulls
attention towards the cache (arXiv 2605.26266). The probe measures that: it runs the *eager* model under a
``TorchFunctionMode``, computes every attention in float32 from the queries and keys that the model passes, and records
the share of each query's softmax that falls on cached keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import jkv_compile
from jkv_compile.kernels.quantizers import rotate


def jensen_bias(query: Tensor, step: Tensor, scale: float) -> Tensor:
    """The Taylor form of the bias of a quantized key's score, s^2 / 24 * sum over groups of |q_g|^2 * step_g^2.

    Args:
        query: float32 [B, H, Q, D].
        step: float32 [B, S, H, G], the quantization step of every cached key's channel groups.
        scale: softmax scale s.

    Returns:
        float32 [B, H, Q, S].
    """
    group_norms = query.unflatten(-1, (step.shape[-1], -1)).square().sum(-1)  # [B, H, Q, G]
    return scale**2 / 24 * group_norms @ step.square().permute(0, 2, 3, 1)


class AttentionMass(TorchFunctionMode):
    """Replaces ``scaled_dot_product_attention`` by an explicit softmax, and records the mass on cached keys.

    Args:
        cached: number of cached keys, the first ones; those after them belong to the current chunk.
        steps: per layer, quantization steps of at least ``cached`` tokens, [B, S, H, G]. The scores of cached keys are
            then corrected, as the compiled model corrects them. None: no correction.
        rotated: whether steps are those of rotated keys.

    Attributes:
        per_call: mean over batch, heads and queries, one number per attention call.
    """

    def __init__(self, cached: int, steps: Sequence[Tensor] | None = None, rotated: bool = False) -> None:
        super().__init__()
        self.cached, self.steps, self.rotated = cached, steps, rotated
        self.per_call: list[float] = []

    @property
    def mean(self) -> float:
        """Mean mass over all calls seen so far."""
        return fmean(self.per_call)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if len(args) != 3 or kwargs:
            raise NotImplementedError(
                "the probe knows attention without mask, dropout or scale, as the example model calls it"
            )
        query, key, value = (jkv_compile.materialize(tensor).float() for tensor in args)
        scale = query.shape[-1] ** -0.5
        scores = query @ key.mT * scale
        if self.steps is not None:
            step = self.steps[len(self.per_call) % len(self.steps)][:, : self.cached]
            scores[..., : self.cached] -= jensen_bias(rotate(query) if self.rotated else query, step, scale)
        weights = scores.softmax(-1)
        self.per_call.append(weights[..., : self.cached].sum(-1).mean().item())
        return (weights @ value).to(args[0].dtype)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None and not self.per_call:
            raise RuntimeError("no attention was seen: is the model compiled? The probe needs the eager module")
