"""Attention layers that do to their caches what nobody would: any few steps one after the other, as a program says."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, CHUNK, FIRST = 32, 4, 8
DIM = 32

Range = tuple[int, int, int, int]  # from a·start + b to c·start + d
EVERYTHING: Range = (0, 0, 0, TOKENS)
PLACES: tuple[Range, ...] = (  # of as many tokens as a chunk has
    (1, 0, 1, CHUNK),
    (1, 0, 1, CHUNK),
    (1, 0, 1, CHUNK),
    (1, -4, 1, 0),
    (1, -2, 1, 2),
    (1, 4, 1, 8),
    (0, 0, 0, 4),
    (0, 2, 0, 6),
    (0, 28, 0, 32),
)
RANGES: tuple[Range, ...] = (
    *PLACES,
    (0, 0, 1, CHUNK),
    (0, 0, 1, CHUNK),
    (0, 0, 1, 0),
    (0, 2, 1, CHUNK),
    (1, -8, 1, 0),
    (1, -6, 1, CHUNK),
    (1, -6, 1, 2),
    (0, 0, 0, 12),
    (0, 0, 1, -2),
    EVERYTHING,
)


WEIGHTS = {
    "write": 4,
    "set": 4,
    "move": 3,
    "copy": 4,
    "view": 5,
    "edit": 3,
    "join": 4,
    "fill": 2,
    "roll": 1,
    "scale": 2,
}
WEIGHTS |= {"scatter": 1, "read": 2, "attend": 2, "write keys": 1, "swap": 1, "rolled": 1, "scale in place": 0.3}
WEIGHTS |= {"return": 1}


@dataclass(frozen=True)
class Program:
    """steps: (what, cache or variable, range, more); see `Interpreter.forward`."""

    steps: tuple[tuple[Any, ...], ...]
    heads_first: bool = False
    heads: int = 1
    batch: int = 1
    dtype: str = "float32"
    calls: int = 4
    breaks_at: int = -1
    dynamic: bool | None = None
    inference: bool = False
    quantizer: str = "rtn"
    packed: bool = False  # from the start


class Interpreter(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        dim, dtype = program.heads * DIM, getattr(torch, program.dtype)
        self.dim = 2 if program.heads_first else 1

        def weights(gain: float) -> nn.Parameter:
            return nn.Parameter((torch.randn(dim, dim) * gain / dim**0.5).to(dtype), requires_grad=False)

        self.wq = weights(1.5)
        self.wk = nn.ParameterList(weights(1.0) for _ in range(4))

    def new_caches(self) -> list[tuple[Tensor, Tensor]]:
        p = self.program
        shape = (p.batch, p.heads, TOKENS, DIM) if p.heads_first else (p.batch, TOKENS, p.heads, DIM)
        dtype = getattr(torch, p.dtype)
        return [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(2)]

    def part(self, x: Tensor, place: Range, start: int) -> Tensor:
        a, b, c, d = place
        if place == EVERYTHING:
            return x
        first, last = a * start + b, c * start + d
        return x[:, :, first:last] if self.dim == 2 else x[:, first:last]

    def forward(self, x: Tensor, caches: list[tuple[Tensor, Tensor]], start: int) -> list[Tensor]:
        p, dim = self.program, self.dim
        b, n, _ = x.shape
        q, *fresh = (F.linear(x, w).view(b, n, p.heads, DIM) for w in (self.wq, *self.wk))
        if p.heads_first:
            fresh = [t.transpose(1, 2) for t in fresh]
        named: dict[Any, tuple[Tensor, Tensor]] = {
            "cache 0": caches[0], "cache 1": caches[1], "fresh 0": (fresh[0], fresh[1]), "fresh 1": (fresh[2], fresh[3])
        }  # fmt: skip
        outputs: list[Tensor] = []
        for i, (what, name, place, more) in enumerate(p.steps):
            if i == p.breaks_at:
                torch._dynamo.graph_break()
            pair = named[name]
            if what == "write":  # `more`: what is written
                for target, value in zip(pair, named[more]):
                    self.part(target, place, start)[:] = value
            elif what == "set":
                for target, value in zip(pair, named[more]):
                    first, last = place[0] * start + place[1], place[2] * start + place[3]
                    if dim == 2:
                        target[:, :, first:last] = value
                    else:
                        target[:, first:last] = value
            elif what == "write keys":
                self.part(pair[0], place, start).copy_(named[more][0])
            elif what == "swap":
                self.part(pair[0], place, start).copy_(named[more][1])
                self.part(pair[1], place, start).copy_(named[more][0])
            elif what == "fill":
                for target in pair:
                    self.part(target, place, start).fill_(more)
            elif what == "scatter":
                for target, value in zip(pair, named[more]):
                    target.index_copy_(dim, torch.arange(place[1], place[1] + n) + place[0] * start, value)
            elif what == "move":  # `more`: where from
                for target in pair:
                    self.part(target, place, start).copy_(self.part(target, more, start).clone())
            elif what == "scale":
                for target in pair:
                    self.part(target, place, start).copy_(0.5 * self.part(target, place, start))
            elif what == "scale in place":
                for target in pair:
                    self.part(target, place, start).mul_(0.5)
            elif what == "roll":
                for target in pair:
                    target.copy_(target.roll(more, dim))
            elif what == "view":  # `more`: the variable's name, as in all that follow
                named[more] = tuple(self.part(t, place, start) for t in pair)  # type: ignore[assignment]
            elif what == "copy":
                named[more] = tuple(self.part(t, place, start).clone() for t in pair)  # type: ignore[assignment]
            elif what == "join":  # `place`: names
                named[more] = tuple(torch.cat([named[m][i] for m in (name, *place)], dim) for i in range(2))  # type: ignore[assignment]
            elif what == "rolled":
                named[more] = tuple(self.part(t, place, start).roll(-2, dim) for t in pair)  # type: ignore[assignment]
            elif what == "attend":
                keys, values = pair
                turned = q.transpose(1, 2)
                if not p.heads_first:
                    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
                outputs.append(F.scaled_dot_product_attention(turned, keys, values))
            elif what == "read":
                outputs.append(pair[0].float().square().mean((0, -1)) + pair[1].float().mean((0, -1)))
            elif what == "return":
                outputs.append(pair[0])
        return outputs


def draw(rng: random.Random) -> Program:
    steps: list[tuple[Any, ...]] = []
    lengths: dict[str, Any] = {"fresh 0": (1, 0, 1, CHUNK), "fresh 1": (1, 0, 1, CHUNK)}
    count = 0

    def cache() -> str:
        return "cache 0" if rng.random() < 0.85 else "cache 1"

    def operand() -> str:
        names = list(lengths)
        return rng.choice(names if rng.random() < 0.7 or not names[2:] else names[2:])

    def variable() -> str:
        nonlocal count
        count += 1
        return f"t{count}"

    for _ in range(rng.randint(2, 6)):
        what = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if what in ("write", "set", "write keys", "swap"):
            steps.append((what, cache(), rng.choice(PLACES), rng.choice(("fresh 0", "fresh 0", "fresh 1"))))
        elif what == "fill":
            steps.append((what, cache(), rng.choice(RANGES), rng.choice((0.0, 0.0, 1.5))))
        elif what == "scatter":
            steps.append((what, cache(), rng.choice(PLACES), "fresh 0"))
        elif what == "move":
            steps.append((what, cache(), rng.choice(PLACES), rng.choice(PLACES)))
        elif what in ("scale", "scale in place"):
            steps.append((what, cache(), rng.choice(PLACES), None))
        elif what == "roll":
            steps.append((what, cache(), EVERYTHING, rng.choice((-4, -1, 3))))
        elif what in ("view", "copy", "rolled"):
            name = variable()
            steps.append((what, cache(), rng.choice(RANGES), name))
            lengths[name] = what
        elif what == "edit" and "copy" in lengths.values():
            target = rng.choice([n for n, kind in lengths.items() if kind in ("copy", "join", "rolled")])
            steps.append(("set", target, (0, 0, 0, CHUNK), "fresh 1"))
        elif what == "join":
            name = variable()
            others = tuple(operand() for _ in range(rng.randint(1, 2)))
            steps.append((what, operand(), others, name))
            lengths[name] = what
        elif what in ("attend", "read", "return"):
            steps.append((what, operand(), None, None))
    if rng.random() < 0.7:
        name = variable()
        steps.append(("view", "cache 0", rng.choice(RANGES), name))
        lengths[name] = "view"
        steps.append(("attend", name, None, None))
    else:
        steps.append(("attend", rng.choice(list(lengths)[2:] or ["cache 0"]), None, None))
    return Program(
        tuple(steps),
        heads_first=rng.random() < 0.5,
        heads=rng.choice((1, 2, 2)),
        batch=rng.choice((1, 1, 2)),
        dtype=rng.choice(("float32", "float32", "float32", "bfloat16")),
        calls=rng.choice((2, 3, 4)),
        breaks_at=rng.randrange(len(steps)) if rng.random() < 0.15 else -1,
        dynamic=rng.choice((None, None, None, None, True, False)),
        inference=rng.random() < 0.2,
        quantizer=rng.choice(("rtn", "rtn", "rtn", "quarot", "unbiased", "symmetric", "symmetric_unbiased")),
        packed=rng.random() < 0.7,
    )
