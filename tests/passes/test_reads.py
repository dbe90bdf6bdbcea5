"""What a model does to cached keys before it attends to them: right whatever it is, and corrected where errors tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jkv_compile import is_packed

from ..harness import fresh_backend, relative_error, twins
from ..models import SelfAttention


def places(k: Tensor) -> Tensor:
    return torch.arange(k.shape[1])[None, :, None, None]


CARRIED: dict[str, Callable[[Tensor], Tensor]] = {
    "even and odd channels put together": lambda k: torch.stack((k[..., 0::2], k[..., 1::2]), -1).flatten(-2),
    "channels unfolded": lambda k: k.unfold(-1, 8, 8).flatten(-2),
    "heads one by one": lambda k: torch.stack(k.unbind(2), 2),
    "heads by number": lambda k: torch.stack([k[:, :, h] for h in range(k.shape[2])], 2),
    "entries one by one": lambda k: torch.cat([k[b : b + 1] for b in range(k.shape[0])]),
    "entries by number": lambda k: torch.stack([k[b] for b in range(k.shape[0])]),
    "heads split": lambda k: torch.cat(k.split([1, 3], 2), 2),
    "halves turned": lambda k: torch.cat((-k.chunk(2, -1)[1], k.chunk(2, -1)[0]), -1),
    "strided as they were": lambda k: k.as_strided(k.size(), k.stride(), k.storage_offset()),
    "axes moved": lambda k: k.movedim(1, 2).swapdims(1, 2).mT.mT,
    "dtypes": lambda k: k.type(torch.float64).to(k.dtype),
    "merged": lambda k: k.reshape(k.shape[0], -1, k.shape[2] * k.shape[3]).view(k.shape),
    "detached": lambda k: k.detach().data,
    "tokens by index": lambda k: k[:, torch.arange(k.shape[1])],
    "tokens gathered": lambda k: k.gather(1, places(k).expand(k.shape)),
    "tokens taken": lambda k: torch.take_along_dim(k, places(k), 1),
    "split and joined": lambda k: torch.hstack(torch.hsplit(k, [3])),
    "flipped twice": lambda k: k.flip(1).flip(1),
}
LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "normalised": lambda k: F.rms_norm(k, (k.shape[-1],)),
    "channels mixed": lambda k: torch.einsum("bshd,de->bshe", k, torch.eye(k.shape[-1], dtype=k.dtype)),
    "padded and cut": lambda k: F.pad(k, (0, 0, 0, 0, 0, 3))[:, : k.shape[1]],
    "chosen": lambda k: torch.where(k > -100, k, 0.0),
}


@pytest.mark.parametrize("name", [*CARRIED, *LOST])
@pytest.mark.filterwarnings("ignore::jkv_compile.NotRewrittenWarning")
def test_keys_are_attended_as_the_model_makes_them(name: str) -> None:
    change = {**CARRIED, **LOST}[name]

    class Model(SelfAttention):
        def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
            q, k, v = self.project(x)
            end = start + x.shape[1]
            cache["k"][:, start:end], cache["v"][:, start:end] = k, v
            keys = change(cache["k"][:, :end])
            return self.attend(*(t.transpose(1, 2) for t in (q, keys, cache["v"][:, :end])))

    torch.manual_seed(0)
    model, backend = Model(), fresh_backend()
    compiled, eager = twins(model, backend)
    cache, plain = model.new_cache(2, 40), model.new_cache(2, 40)
    with torch.no_grad():
        for start in range(0, 40, 8):
            x = torch.randn(2, 8, 256)
            assert relative_error(compiled(x, cache, start), eager(x, plain, start)) < 0.01
    assert is_packed(cache["k"]) and is_packed(cache["v"])
    match = [m for r in backend.reports for m in r.matches][-1]
    assert ("not corrected" in match.lowering) == (name in LOST), match.lowering
