"""Keys that are turned as complex numbers after they are read, where these are of the cache's own dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jkv_compile import PackedCacheError, is_packed, materialize

from ..harness import fresh_backend, relative_error, twins
from ..models import SelfAttention


def as_complex(x: Tensor) -> Tensor:
    """`x` `[B, S, H, D]` as `[B, S, H, D / 2]`, which shows its memory where it is float32."""
    return torch.view_as_complex(x.float().reshape(*x.shape[:-1], x.shape[-1] // 2, 2))


def turned(x: Tensor, first: int) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = torch.arange(first, first + x.shape[1])[:, None, None] * frequencies
    return torch.view_as_real(as_complex(x) * torch.polar(torch.ones_like(angle), angle)).flatten(-2).type_as(x)


class Turned(SelfAttention):
    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        cache["k"][:, start:end], cache["v"][:, start:end] = k, v
        keys = turned(cache["k"][:, :end], 0)
        return self.attend(*(t.transpose(1, 2) for t in (turned(q, start), keys, cache["v"][:, :end])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"quantizer": "unbiased"}, {"quantizer": "kivi"}], ids=str)
@pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning", "error::jkv_compile.PackedReadWarning")
def test_keys_turned_after_the_read_are_packed_and_corrected(dtype: torch.dtype, settings: dict[str, str]) -> None:
    torch.manual_seed(0)
    model, backend = Turned().to(dtype), fresh_backend(**settings)
    compiled, eager = twins(model, backend)
    cache, plain = model.new_cache(1, 64, dtype), model.new_cache(1, 64, dtype)
    with torch.no_grad():
        for call, start in enumerate(range(0, 64, 8)):
            x = torch.randn(1, 8, 256).to(dtype)
            with torch.compiler.set_stance("fail_on_recompile" if call > 2 else "default"):
                assert relative_error(compiled(x, cache, start), eager(x, plain, start)) < 0.01
    assert is_packed(cache["k"]) and is_packed(cache["v"])
    match = [m for r in backend.reports for m in r.matches][-1]
    assert match.lowering.startswith("reconstructed") and "not corrected" not in match.lowering


class Conjugates(Turned):
    """Changes cached keys as complex numbers, in place."""

    conjugating = False

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        if self.conjugating:
            as_complex(cache["k"][:, :start]).mul_(1j)
        return super().forward(x, cache, start)


def test_who_writes_to_complex_numbers_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Conjugates()
    model.conjugating = True
    compiled, eager = twins(model, fresh_backend())
    cache, plain = model.new_cache(1, 64), model.new_cache(1, 64)
    with torch.no_grad():
        for start in range(0, 64, 8):
            x = torch.randn(1, 8, 256)
            assert relative_error(compiled(x, cache, start), eager(x, plain, start)) < 1e-5
    assert not is_packed(cache["k"])


def test_of_a_packed_cache_that_is_refused_before_anything_is_changed() -> None:
    torch.manual_seed(0)
    model = Conjugates()
    compiled, cache = torch.compile(model, backend=fresh_backend()), model.new_cache(1, 64)
    with torch.no_grad():
        for start in (0, 8, 16):
            compiled(torch.randn(1, 8, 256), cache, start)
        assert is_packed(cache["k"])
        before = materialize(cache["k"])
        model.conjugating = True
        with pytest.raises(Exception, match="reinterprets the memory of a packed cache") as raised:
            compiled(torch.randn(1, 8, 256), cache, 24)
        assert isinstance(getattr(raised.value, "inner_exception", raised.value), PackedCacheError)
    assert torch.equal(materialize(cache["k"]), before)
