"""Looking at a graph makes it hold for no fewer calls than plain `torch.compile` has it hold for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from ..harness import BOUND, fresh_backend, relative_error


def grown(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in one tensor, which is made anew with those of each call."""
    k, v = (torch.cat((old, new), 2) for old, new in zip(past, (k, v)))
    return F.scaled_dot_product_attention(q, k, v), torch.stack((k, v))


def test_a_tensor_of_keys_and_values_that_grows() -> None:
    backend = fresh_backend()
    graphs = []
    for compiled in (torch.compile(grown, backend="eager"), torch.compile(grown, backend=backend)):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        ours = reference = torch.zeros(2, 1, 2, 8, 32)
        for _ in range(6):
            tokens = [torch.randn(1, 2, 8, 32) for _ in range(3)]
            with torch.no_grad():
                (got, ours), (want, reference) = compiled(*tokens, ours), grown(*tokens, reference)
            assert relative_error(got, want) < BOUND
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]
