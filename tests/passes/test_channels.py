"""Which channels of a cache keys are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from jkv_compile.passes.channels import Channels, Pairs, paired
from jkv_compile.passes.uncertainty import NotLinear

from ..idioms.models import rope

HEADS, HEAD_DIM = 2, 12
GROUPS_OF_THREE = torch.polar(torch.ones(5, HEAD_DIM // 2), torch.outer(torch.arange(5.0), torch.arange(1.0, 7)))


def complex_rope(x: Tensor) -> Tensor:
    """As Wan has it."""
    turned = torch.view_as_complex(x.double().reshape(*x.shape[:3], -1, 2)) * GROUPS_OF_THREE[:, None]
    return torch.view_as_real(turned).flatten(3).type_as(x)


def rotated_pairs(x: Tensor) -> Tensor:
    """As diffusers and LTX have it: neighbours, by `unbind` and `stack`."""
    real, imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([-imag, real], dim=-1).flatten(3)
    angle = torch.arange(5.0)[:, None, None]
    return x.float() * angle.cos() + rotated.float() * angle.sin()


def halves_by_stack(x: Tensor) -> Tensor:
    real, imag = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    return x + 0.5 * torch.cat([-imag, real], dim=-1)


def assigned_neighbours(x: Tensor) -> Tensor:
    out, a, b = torch.empty_like(x), x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = a * 0.8 - b * 0.6
    out[..., 1::2] = a * 0.6 + b * 0.8
    return out


def assigned_to_a_view(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    shown = out.unflatten(-1, (2, -1))
    first, second = shown.select(-2, 0), shown.select(-2, 1)
    a, b = x.chunk(2, -1)
    first.copy_(a * 0.8 - b * 0.6)
    second.copy_(a * 0.6 + b * 0.8)
    return out


def three_axes(x: Tensor) -> Tensor:
    """Frames, rows and columns: three runs of channels of two sizes, each turned in halves."""
    return torch.cat([rope(part, i + 2, False) for i, part in enumerate(x.split([4, 4, 4], -1))], -1)


def two_sizes(x: Tensor) -> Tensor:
    return torch.cat([rope(x[..., :4], 3, False), rope(x[..., 4:], 1, False)], -1)


def mirrored(x: Tensor) -> Tensor:
    return x * 0.8 + x.flip(-1) * 0.6


def a_part_of_the_tokens(x: Tensor) -> Tensor:
    return torch.cat([rope(x[:, :2]), x[:, 2:]], 1)


def assigned_tokens(x: Tensor) -> Tensor:
    out = torch.zeros(1, 8, HEADS, HEAD_DIM)
    out[:, :5] = x
    return out


TURNED: dict[str, Callable[[Tensor], Tensor]] = {
    "neighbours": rope,
    "neighbours, complex": complex_rope,
    "neighbours, by unbind and stack": rotated_pairs,
    "neighbours, assigned": assigned_neighbours,
    "halves": lambda x: rope(x, 0, False),
    "halves, rotate_half": lambda x: rope(x, 0, False, "rotate_half"),
    "halves, assigned": lambda x: rope(x, 0, False, "assigned halves"),
    "halves, by unbind": halves_by_stack,
    "halves, assigned to a view": assigned_to_a_view,
    "a part of the head": lambda x: torch.cat([rope(x[..., :8], 0, False), x[..., 8:]], -1),
    "three axes": three_axes,
    "runs of two sizes": two_sizes,
    "first and last": mirrored,
    "heads first, and back": lambda x: rope(x.transpose(1, 2).transpose(1, 2)).flatten(2).view(1, 5, HEADS, HEAD_DIM),
    "some tokens": a_part_of_the_tokens,
    "by rolling": lambda x: x * 0.8 + torch.roll(x, HEAD_DIM // 2, -1) * 0.6,
    "the batch doubled": lambda x: rope(x.repeat(2, 1, 1, 1)),
    "heads repeated": lambda x: rope(x.repeat_interleave(2, 2)),
}  # fmt: skip
UNMIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: x * torch.arange(1.0, 13) + 1,
    "channels in another order": lambda x: x.flip(-1),
    "halves swapped": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "heads by expand": lambda x: x[:, :, :, None].expand(1, 5, HEADS, 3, HEAD_DIM).reshape(1, 5, 3 * HEADS, HEAD_DIM),
    "heads merged, and apart": lambda x: x.flatten(2).unflatten(2, (HEADS, HEAD_DIM)).contiguous(),
    "tokens reversed and joined": lambda x: torch.cat([x.flip(1), x[:, 1:3]], 1),
    "into a new tensor": assigned_tokens,
}  # fmt: skip


def pairs_of(turn: Callable[[Tensor], Tensor]) -> Pairs | None:
    """What is found in the graph that Dynamo makes."""
    found: list[Any] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        (output,) = next(iter(gm.graph.find_nodes(op="output"))).args[0]
        (keys,) = [p for p in gm.graph.find_nodes(op="placeholder") if p.meta["example_value"].shape[-1] == HEAD_DIM]
        try:
            found.append(Channels(gm.graph, [output], {}, {}, [keys]).pairs(output, output))
        except NotLinear as error:
            found.append(error)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(turn, backend=backend, fullgraph=True)(torch.randn(1, 5, HEADS, HEAD_DIM))
    if isinstance(found[0], NotLinear):
        raise found[0]
    return found[0]


def mixed(turn: Callable[[Tensor], Tensor]) -> Tensor:
    """Whether each channel of keys depends on each of the cache's: bool `[D, D]`, by putting in one after the other."""
    outputs = []
    for channel in range(HEAD_DIM):
        x = torch.zeros(1, 5, HEADS, HEAD_DIM)
        x[..., channel] = 1
        outputs.append((turn(x) - turn(torch.zeros_like(x))).abs().amax((0, 1, 2)) > 1e-6)
    return torch.stack(outputs, -1)


@pytest.mark.parametrize("name", TURNED)
def test_pairs_are_those_that_a_model_mixes(name: str) -> None:
    pairs, depends = pairs_of(TURNED[name]), mixed(TURNED[name])
    assert pairs is not None and sorted(pairs.order) == [*range(HEAD_DIM)]
    assert depends.sum() > HEAD_DIM
    for a, b in zip(pairs.order[::2], pairs.order[1::2]):
        made = (depends[a] | depends[b]).nonzero().flatten().tolist()
        others = [c for c in range(HEAD_DIM) if c not in (a, b)]
        assert not depends[others][:, made].any()  # nothing else is made of these
        assert len([c for c in made if c in pairs.first]) <= 1 and len([c for c in made if c not in pairs.first]) <= 1


@pytest.mark.parametrize("name", UNMIXED)
def test_nothing_is_mixed(name: str) -> None:
    assert pairs_of(UNMIXED[name]) is None and (mixed(UNMIXED[name]).sum(-1) == 1).all()


@pytest.mark.parametrize("turn, reason", [
    (lambda x: x + x.roll(1, -1) + x.roll(2, -1), "other ways than two by two"),
    (lambda x: x + x.roll(1, -1), "other ways than two by two"),
    (lambda x: x - x.flatten(1, 2).unflatten(1, (5, HEADS)) @ torch.eye(HEAD_DIM), "matmul"),
    (lambda x: rope(x) / x.norm(dim=-1, keepdim=True), "norm"),
    (lambda x: x.flatten(1)[:, None, None], "other ways than two by two|view"),
    (lambda x: x[..., torch.tensor([1, 0] * 6)], "getitem"),
], ids=["three", "a chain", "a matrix", "norms", "tokens as channels", "gathered"])  # fmt: skip
def test_what_is_not_followed_is_said(turn: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(NotLinear, match=reason):
        pairs_of(turn)


def test_channels_that_are_not_made_of_any_pair_up_too() -> None:
    assert paired([frozenset({0, 1}), frozenset({0, 1}), frozenset(), frozenset({2})]) == Pairs((0, 1, 2, 3), (0,))
    assert paired([frozenset({4}), frozenset({4}), frozenset({5}), frozenset({6})]) == Pairs((0, 1, 2, 3), (4, 5))
    assert paired([frozenset({1}), frozenset({0})]) is None
    with pytest.raises(NotLinear, match="two by two"):
        paired([frozenset({0, 1}), frozenset({2})])
