"""A user's own spelling of attention, told in a few lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import jkv_compile
from jkv_compile import AttentionArguments, ConfigurationError, NotRewrittenWarning, is_packed

from ..harness import fresh_backend, run_beside, twins
from ..models import SelfAttention

CHUNK = 8


@torch.library.custom_op("jkv_tests::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, temperature: float, causal: bool = False) -> Tensor:
    """`[B, L, H, D]`; scores are divided by a temperature."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]) if causal else None
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1 / temperature)
    return o.transpose(1, 2).contiguous()


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, temperature: float, causal: bool = False) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.compiler.allow_in_graph
def attend_function(q: Tensor, k: Tensor, v: Tensor, temperature: float, causal: bool = False) -> Tensor:
    return attend(q, k, v, temperature, causal)


def adapter(q: Any, k: Any, v: Any, temperature: float, causal: bool = False) -> AttentionArguments:
    corner = "bottom_right" if causal else None
    return AttentionArguments(q, k, v, scale=1 / temperature, causal=corner, layout="BLHD")


class Layer(SelfAttention):
    def __init__(self, function: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.function, self.causal = function, causal

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend_by = attend_function if self.function else attend
        o = attend_by(*(x.transpose(1, 2) for x in (q, k, v)), 8.0, causal=self.causal)
        return self.out(o.flatten(2))


def run(model: Layer, calls: int = 4) -> dict[str, Tensor]:
    """Hold a few calls beside eager; the compiled model's cache is returned."""
    torch.manual_seed(0)
    compiled, eager = twins(model, fresh_backend())
    cache, reference_cache = model.new_cache(1, 64), model.new_cache(1, 64)

    def steps() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, calls * CHUNK, CHUNK):
            x = torch.randn(1, CHUNK, 256)
            yield compiled(x, cache, start), eager(x, reference_cache, start)

    with torch.no_grad():
        run_beside(steps(), calls)
    return cache


@pytest.mark.parametrize(
    "target",
    [attend, torch.ops.jkv_tests.attend, torch.ops.jkv_tests.attend.default, "jkv_tests::attend"],
    ids=["custom op", "packet", "overload", "name"],
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_registered_operators_read_packed_caches(target: Any, causal: bool) -> None:
    with jkv_compile.register_attention(target, adapter):
        cache = run(Layer(causal=causal))
    assert is_packed(cache["k"]) and is_packed(cache["v"])


@pytest.mark.parametrize("target", [attend_function, f"{__name__}.attend_function"], ids=["function", "name"])
def test_registered_functions_read_packed_caches(target: Any) -> None:
    with jkv_compile.register_attention(target, adapter):
        assert is_packed(run(Layer(function=True))["k"])


def test_nothing_is_left_of_a_registration_that_is_removed() -> None:
    registration = jkv_compile.register_attention(attend, adapter)
    registration.remove()
    registration.remove()  # no harm in a second time
    with pytest.raises(AssertionError, match="nothing was quantized"):
        run(Layer())
    jkv_compile.register_attention(attend, adapter).remove()  # free again


def test_calls_that_an_adapter_declines_stay_as_they_are() -> None:
    with (
        jkv_compile.register_attention(attend, lambda *args, **kwargs: None),
        pytest.warns(NotRewrittenWarning, match="jkv_tests::attend says that it is no plain attention"),
        pytest.raises(AssertionError, match="nothing was quantized"),
    ):
        run(Layer())


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "too few parameters": (lambda q, k, v: None, "does not take the arguments of"),
    "something else returned": (lambda *args, **kwargs: args, "expected jkv_compile.AttentionArguments, or None"),
    "a layout that does not fit": (
        lambda q, k, v, *_, **__: AttentionArguments(q, k, v, layout="HLD"),
        "query has 4 dimensions: expected a tensor laid out as 'HLD'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_adapter_that_does_not_fit_is_named(name: str) -> None:
    wrong, message = WRONG[name]
    with (
        jkv_compile.register_attention(attend, wrong),
        pytest.raises(Exception, match=f"the adapter registered for jkv_tests::attend.*{message}"),
    ):
        run(Layer())


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="target=3: expected an operator, a function, or a name"):
        jkv_compile.register_attention(3, adapter)
    with pytest.raises(ConfigurationError, match="adapter=None: expected a function"):
        jkv_compile.register_attention(attend, None)  # type: ignore[arg-type]
    with (
        jkv_compile.register_attention(attend, adapter),
        pytest.raises(ConfigurationError, match="jkv_tests::attend is registered already"),
    ):
        jkv_compile.register_attention("jkv_tests::attend", adapter)
    with pytest.raises(ConfigurationError, match="causal=True: expected None, 'top_left' or 'bottom_right'"):
        AttentionArguments(1, 2, 3, causal=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="layout='BHWD': expected the dimensions in order"):
        AttentionArguments(1, 2, 3, layout="BHWD")
