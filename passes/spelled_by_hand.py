"""Attention written out: softmax(scale · query @ keyᵀ + mask) @ value, by `matmul`, `bmm`, `baddbmm` or `einsum`.

Walked backwards from the product with the values, through dropout that is off and casts, to the softmax; from there
through scales and masks to the product of queries and keys. Products are read as einsum equations, whose letters tell
which dimension is which, however the operands are transposed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..geometry import same
from .attention_forms import NotCanonical
from .nodes import COPIES, example, identity, mutates, name_of

_PRODUCTS = {torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__"}
_SOFTMAX = {torch.softmax, F.softmax, torch.special.softmax, "softmax"}
_TIMES = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "__mul__"}
_BY = {operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_", "__truediv__"}
_PLUS = {operator.add, operator.iadd, torch.add, "add", "add_", "__add__"}
_MINUS = {operator.sub, operator.isub, torch.sub, "sub", "sub_", "__sub__"}
_FILL = {torch.masked_fill, "masked_fill", "masked_fill_"}
_TRANSPOSE = {"transpose", "swapaxes", "swapdims", "permute", "t", "mT"}
_MERGE = {"reshape", "view", "flatten"}


@dataclass(frozen=True)
class Product:
    """`left` times `right`, as an einsum with one letter per dimension."""

    left: Node
    right: Node
    letters: tuple[str, str, str]  # of left, right and the result

    def letters_of(self, operand: Node, is_left: bool) -> str:
        return self.letters[0 if is_left else 1]


@dataclass(frozen=True)
class Mask:
    """Added to the scores, times `factor`; or, where `fill` is given, scores become `fill` where it is `hides`.

    entries: (B, H), where it is for scores of four dimensions, and the products are of B·H matrices.
    """

    node: Node
    factor: float = 1.0
    fill: float | None = None
    hides: bool = True
    entries: tuple[int, int] | None = None


@dataclass
class HandWritten:
    """Attention as several nodes.

    Layouts are of `AttentionArguments`' letters, and two more: G, the queries of a group that share a head of keys, and
    1, a dimension of keys or values of which there is one index, or whose indices are all the same (as by `expand`).
    """

    query: Node
    key: Node
    value: Node
    layouts: tuple[str, str, str, str]
    scale: float
    masks: list[Mask]
    chain: list[Node] = field(default_factory=list)  # from the result back to the scores


def hand_written(node: Node) -> HandWritten | None:
    """Attention whose product with the values is `node`.

    Raises:
        NotCanonical: there is a softmax times something, which is not plain attention.
    """
    product = as_product(node)
    if product is None:
        return None
    for is_left in (True, False):
        weights, value = (product.left, product.right) if is_left else (product.right, product.left)
        chain = [node]
        softmax = _behind_weights(weights, chain)
        if softmax is not None:
            letters = product.letters if is_left else (product.letters[1], product.letters[0], product.letters[2])
            return _from_softmax(softmax, value, letters, chain)
    return None


def as_product(node: Node) -> Product | None:
    """A product of two tensors with the same batch dimensions."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _PRODUCTS and len(node.args) == 2:
        left, right = node.args
        return _matrix_product(left, right)
    if node.target is torch.einsum:
        arguments: Any = node.args
        equation, *operands = arguments
        operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
        if not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
            return None
        inputs, result = equation.replace(" ", "").split("->")
        left_letters, right_letters = inputs.split(",")
        return Product(operands[0], operands[1], (left_letters, right_letters, result))
    return None


def _matrix_product(left: Any, right: Any) -> Product | None:
    x, y = example(left), example(right)
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or x.dim() != y.dim():
        return None
    if x.dim() not in (3, 4, 5):
        return None
    batch = "bhg"[: x.dim() - 2]
    one, other = _shared_by_groups(x, y, batch), _shared_by_groups(y, x, batch)
    shared = [d for d, (m, n) in enumerate(zip(one, other)) if m == n]
    if not all(same(x.shape[d], y.shape[d]) for d in shared) or max(one.count("1"), other.count("1")) > 1:
        return None
    return Product(left, right, (f"{one}ik", f"{other}kj", f"{batch}ij"))


def _shared_by_groups(value: torch.Tensor, partner: torch.Tensor, batch: str) -> str:
    """The batch letters of an operand, 1 where it has the same for all that its partner has along a dimension."""
    if value.dim() == 3:
        return batch
    repeated = [
        not same(partner.shape[d], 1)
        and (same(value.shape[d], 1) or (d == 2 and same(value.stride(d), 0) and not same(partner.stride(d), 0)))
        for d in range(len(batch))
    ]
    return "".join("1" if shared else c for c, shared in zip(batch, repeated))


def _latest(node: Any, chain: list[Node]) -> Any:
    """What a tensor is by the time that the last of `chain` uses it: the last operation in place on it, if any."""
    if not isinstance(node, Node) or not chain:
        return node
    return max((u for u in node.users if u < chain[-1] and mutates(u, node)), default=node)


def _behind_weights(node: Any, chain: list[Node]) -> Node | None:
    """The softmax whose result is multiplied with the values, through what leaves it as it is."""
    while isinstance(node := _latest(node, chain), Node) and node.op in ("call_function", "call_method"):
        chain.append(node)
        if node.target in _SOFTMAX:
            return node
        if (name_of(node) in COPIES or _merges_entries(node)) and node.args:
            node = node.args[0]
        elif node.target in (F.dropout, torch.dropout):
            given = dict(zip(("input", "p", "training"), node.args)) | node.kwargs
            p, training = given.get("p", 0.5), given.get("training", True)
            if _is_softmax(given["input"]) and training and p:
                raise NotCanonical(f"dropout of {p}")
            node = given["input"]
        else:
            return None
    return None


def _is_softmax(node: Any) -> bool:
    return _behind_weights(node, []) is not None


def _from_softmax(softmax: Node, value: Node, letters: tuple[str, str, str], chain: list[Node]) -> HandWritten:
    dim = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    if not isinstance(dim, int):
        raise NotCanonical(f"its softmax is over dimension {dim}")
    masks: list[Mask] = []
    dims = example(softmax).dim()
    product, scale = _behind_scores(softmax.args[0] if softmax.args else softmax.kwargs["input"], masks, chain)
    if product is None:
        raise NotCanonical(f"its scores come from `{name_of(chain[-1])}`, not from a product of queries and keys")
    weights, values, result = letters
    scores = product.letters[2]
    if len(weights) != len(scores) or (dims != len(scores) and _rows_differ(softmax, chain[0], dim, dims)):
        raise NotCanonical("its weights are reshaped before they meet the values")
    dim = dim - dims if dim >= 0 else dim
    # One alphabet for both products: that of the scores, and `e` for the values' channels.
    alphabet = dict(zip(weights, scores)) | {"1": "1"}
    values, result = ("".join(alphabet.get(c, "#") for c in word) for word in (values, result))
    keys = scores[dim]
    is_left = keys in product.letters[1]
    query, key = (product.left, product.right) if is_left else (product.right, product.left)
    query_letters, key_letters = product.letters[:2] if is_left else product.letters[1::-1]
    key, key_letters, factor = _unscaled(key, key_letters)
    key, key_letters = _unexpanded(key, key_letters)
    value, values = _unexpanded(value, values)
    layouts = _layouts(query_letters, key_letters, values, result, scores, keys)
    full = "BHGLS" if "G" in layouts[4] else "BHLS"
    if masks and layouts[4] != full[-len(scores) :]:
        raise NotCanonical("its masked scores are not laid out as [batch, head, query, key]")
    return HandWritten(query, key, value, layouts[:4], scale * factor, masks, chain)  # type: ignore[arg-type]


def _behind_scores(node: Any, masks: list[Mask], chain: list[Node]) -> tuple[Product | None, float]:
    """The product of queries and keys, and the factor on the way to the softmax; masks are collected."""
    factor = 1.0
    while isinstance(node := _latest(node, chain), Node) and node.op in ("call_function", "call_method"):
        chain.append(node)
        if (product := as_product(node)) is not None:
            return product, factor
        args: Any = node.args
        if name_of(node) in COPIES and args:
            node = args[0]
        elif _parts_entries(node):
            entries = tuple(example(node).shape[:2])
            masks[:] = [replace(mask, entries=mask.entries or entries) for mask in masks]  # type: ignore[arg-type]
            node = args[0]
        elif (scaled := _times_number(node)) is not None:
            node, number = scaled
            factor *= number
        elif node.target in _PLUS | _MINUS and not node.kwargs:
            node = _added(node, masks, factor)
        elif node.target in _FILL and len(args) == 3 and isinstance(args[2], (int, float)):
            masks.append(Mask(args[1], fill=float(args[2]) * factor))
            node = args[0]
        elif (chosen := _chosen(node)) is not None:
            inner, mask, number, hides = chosen
            if list(example(inner).shape) != list(example(node).shape):
                raise NotCanonical("its scores are broadcast by the mask that they are chosen by")
            masks.append(Mask(mask, fill=number * factor, hides=hides))
            node = inner
        elif node.target in (torch.baddbmm, "baddbmm"):
            given: dict[str, Any] = dict(zip(("input", "batch1", "batch2", "beta", "alpha"), args)) | node.kwargs
            if given.get("beta", 1) != 0:
                masks.append(Mask(given["input"], factor * given.get("beta", 1)))
            return _matrix_product(given["batch1"], given["batch2"]), factor * given.get("alpha", 1)
        else:
            return None, factor
    return None, factor


def _merges_entries(node: Node) -> bool:
    """Whether the first two of a tensor's four dimensions become one, batch entries and heads."""
    return _regroups(node, 4, 3) and all(map(same, example(node.args[0]).shape[2:], example(node).shape[1:]))


def _parts_entries(node: Node) -> bool:
    """Whether a tensor's first dimension becomes two, batch entries and heads."""
    return _regroups(node, 3, 4) and all(map(same, example(node.args[0]).shape[1:], example(node).shape[2:]))


def _regroups(node: Node, before: int, after: int) -> bool:
    if name_of(node) not in _MERGE | {"unflatten"} or not node.args:
        return False
    source, value = example(node.args[0]), example(node)
    tensors = isinstance(source, torch.Tensor) and isinstance(value, torch.Tensor)
    return tensors and (source.dim(), value.dim()) == (before, after)


def _rows_differ(softmax: Node, product: Node, dim: int, dims: int) -> bool:
    """Whether a softmax over batch entries and heads apart is not over the keys of those merged."""
    return dims != 4 or example(product).dim() != 3 or dim % dims < 2


def _chosen(node: Node) -> tuple[Node, Node, float, bool] | None:
    """(scores, condition, number, whether it stands where the condition is true) of a `where`."""
    if node.kwargs or len(node.args) != 3:
        return None
    if node.target is torch.where:
        condition, one, other = node.args
    elif node.target == "where":
        one, condition, other = node.args
    else:
        return None
    if not isinstance(condition, Node) or example(condition).dtype != torch.bool:
        return None
    for scores, number, hides in ((one, _number(other), False), (other, _number(one), True)):
        if isinstance(scores, Node) and number is not None:
            return scores, condition, number, hides
    return None


def _number(value: Any) -> float | None:
    """What a number is, or a tensor that is made of one in the graph."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Node) or not isinstance(shown := example(value), torch.Tensor) or shown.dim():
        return None
    args: Any = value.args
    if value.target is torch.full and len(args) == 2:
        return _number(args[1])
    if value.target is torch.tensor or name_of(value) in COPIES:
        return _number(args[0])
    return None


def _times_number(node: Node) -> tuple[Node, float] | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if node.target in _TIMES and _number(left) is not None:
        left, right = right, left
    number = _number(right)
    if not isinstance(left, Node) or number is None:
        return None
    if node.target in _TIMES:
        return left, number
    return (left, 1 / number) if node.target in _BY and number else None


def _added(node: Node, masks: list[Mask], factor: float) -> Any:
    """Of a sum, the part that leads to scores; the other is a mask, unless it is a number, which softmax ignores."""
    left, right = node.args
    if node.target in _MINUS:
        factor = -factor
    elif not _leads_to_product(left):
        left, right = right, left
    if isinstance(right, Node):
        masks.append(Mask(right, factor))
    return left


def _leads_to_product(node: Any) -> bool:
    return isinstance(node, Node) and _behind_scores(node, [], [])[0] is not None


def _unscaled(node: Node, letters: str) -> tuple[Node, str, float]:
    """What a key is before it was scaled by a number, looking through transpositions: a scaled cache is read whole."""
    inner, order = node, letters
    while isinstance(inner, Node) and inner.op in ("call_function", "call_method"):
        if (scaled := _times_number(inner)) is not None:
            node, letters, factor = _unscaled(scaled[0], order)
            return node, letters, scaled[1] * factor
        moved = untransposed(inner, order)
        if moved is None:
            break
        inner, order = moved
    return node, letters, 1.0


def _unexpanded(node: Node, letters: str) -> tuple[Node, str]:
    """What a tensor was before its dimension 1 was expanded, looking through transpositions."""
    inner, order = node, letters
    while "1" in order and isinstance(inner, Node) and inner.op in ("call_function", "call_method"):
        at, shape = order.index("1"), example(inner).shape
        source = inner.args[0] if name_of(inner) in ("expand", "expand_as") else None
        if isinstance(source, Node) and example(source).dim() == len(shape) and same(example(source).shape[at], 1):
            others = [d for d in range(len(shape)) if d != at]
            return (source, order) if all(same(example(source).shape[d], shape[d]) for d in others) else (node, letters)
        moved = untransposed(inner, order)
        if moved is None:
            break
        inner, order = moved
    return node, letters


def untransposed(node: Node, letters: str) -> tuple[Node, str] | None:
    """What a transposition was made of, and the letters of its dimensions."""
    name = "mT" if node.target is getattr and node.args[1] == "mT" else name_of(node)
    if name not in _TRANSPOSE or not isinstance(node.args[0], Node) or node.kwargs:
        return None
    order = list(range(len(letters)))
    _, *dims = node.args
    if name == "permute":
        dims = dims if isinstance(dims[0], int) else dims[0]  # type: ignore[assignment]
        order = [d % len(letters) for d in dims]  # type: ignore[operator,misc]
    else:
        i, j = dims if name not in ("mT", "t") else (-2, -1)
        order[i], order[j] = order[j], order[i]  # type: ignore[index]
    inner = [""] * len(letters)
    for letter, dim in zip(letters, order):
        inner[dim] = letter
    return node.args[0], "".join(inner)


def _layouts(query: str, key: str, value: str, result: str, scores: str, keys: str) -> tuple[str, str, str, str, str]:
    """Letters as `AttentionArguments` knows them, and those of the scores.

    Raises:
        NotCanonical: the products have dimensions that attention does not.
    """
    batch = [c for c in scores if c in query and c in key]
    channel = [c for c in query if c in key and c not in scores]
    *group, row = [c for c in scores if c in query and c not in key] or [""]
    plain = len(batch) <= 2 and len(channel) == 1 and row and value.count("#") == result.count("#") == 1
    if plain and len(group) <= bool(batch):
        names = dict(zip(batch, "BH"[2 - len(batch) :])) | {channel[0]: "D", row: "L", "#": "D", "1": "1"}
        names |= {c: "G" for c in group}
        if (
            group
            and len(batch) == 1
            and "1" in key
            and "1" in value
            and scores.index(batch[0]) < scores.index(group[0])
        ):
            names |= {batch[0]: "B", group[0]: "H", "1": "H"}  # one head of keys for all
        words = [
            "".join(names.get(c, "?") for c in word)
            for word in (query, key.replace(keys, row), value.replace(keys, row), result)
        ]
        known = {"L", "D", *(names[c] for c in batch)} | ({names["1"]} - {"1"})
        queries = known | {names[c] for c in group}
        fits = all(len(w) == len(set(w)) for w in words) and {*words[0]} == {*words[3]} == queries
        if fits and all({*w} - {"1"} == known for w in words[1:3]):
            return *words, "".join(names.get(c, "S") for c in scores)  # type: ignore[return-value]
    raise NotCanonical(
        f"its products `{query},{key}->{scores}` and `…,{value}->{result}` have more dimensions than batch, head, "
        "token and channel"
    )


def check_unchanged(chain: list[Node], operands: list[Node]) -> None:
    """Between the first and the last node of a chain (given last first), nothing may change what it is made of.

    Raises:
        NotCanonical: scores, or what they are made of, are written to in between.
    """
    members = set(chain)
    watched = {identity(v) for n in (*chain[1:], *operands) if isinstance(v := example(n), torch.Tensor)}
    node = min(chain)
    while node is not chain[0]:
        if node not in members:
            for argument in node.all_input_nodes:
                value = example(argument)
                if isinstance(value, torch.Tensor) and identity(value) in watched and mutates(node, argument):
                    raise NotCanonical(f"`{name_of(node)}` writes to its scores, queries or keys before they are used")
        node = node.next
