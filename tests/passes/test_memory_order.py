"""What reads a packed cache as a tensor may rely on the memory order that the model gave it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jkv_compile import is_packed

from ..harness import BOUND, fresh_backend, relative_error

READS = {
    "a copy": lambda k: k.clone(),
    "a view of the cache": lambda k: k.view(1, 48, -1) * 2,
    "a view of a copy": lambda k: k.clone().view(1, 48, -1),
    "a view of what is contiguous": lambda k: k.contiguous().view(1, 48, -1),
    "a view after arithmetic": lambda k: (k * 2 + 1).view(-1),
    "a view of another dtype's": lambda k: k.to(torch.float64).view(48, -1),
    "a permuted copy": lambda k: k.transpose(1, 2).clone(),
    "a window": lambda k: k[:, 4:30].clone(),
}


def strides(x: Tensor) -> list[int]:
    return [step for step, n in zip(x.stride(), x.shape) if n > 1]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_values_and_strides_are_those_of_the_model(read, inner):
    backend = fresh_backend(group_size=16, inner=inner)

    def step(q: Tensor, k: Tensor, v: Tensor, cache: dict[str, Tensor], start: int) -> tuple[Tensor, Tensor]:
        end = start + k.shape[1]
        cache["k"][:, start:end] = k
        cache["v"][:, start:end] = v
        seen = (t.transpose(1, 2) for t in (q, cache["k"][:, :end], cache["v"][:, :end]))
        return F.scaled_dot_product_attention(*seen), read(cache["k"])

    compiled = torch.compile(step, backend=backend)
    cache, plain = ({name: torch.zeros(1, 48, 3, 16) for name in "kv"} for _ in range(2))
    with torch.no_grad():
        for call in range(3):
            x = torch.randn(3, 1, 8, 3, 16)
            got, want = compiled(*x, cache, 8 * call), step(*x, plain, 8 * call)
            for one, other in zip(got, want):
                assert relative_error(one, other) < BOUND and one.shape == other.shape and one.dtype == other.dtype
            assert strides(got[1]) == strides(want[1])
    assert is_packed(cache["k"])
