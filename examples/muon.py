"""The Muon optimizer (github.com/KellerJordan/Muon) in the precision of its parameters.

``torch.optim.Muon`` orthogonalises in bfloat16, which takes three to four times as long on a CPU that cannot multiply
in it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of a matrix towards one by Newton-Schulz iterations."""
    wide = x.mT if x.shape[0] > x.shape[1] else x
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide.mT if x.shape[0] > x.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; updates are scaled to the size of AdamW's, so that both take one ``lr``."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                average = state.setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalise(matrix.grad.lerp(average, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * group["lr"] * max(matrix.shape) ** 0.5)
