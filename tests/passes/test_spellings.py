"""Every spelling of attention is rewritten to one form that computes the same, or left as it is, with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from jkv_compile import is_packed
from jkv_compile.passes.attention_forms import as_attention
from jkv_compile.passes.canonicalise import canonicalise
from jkv_compile.passes.printing import graph_text
from jkv_compile.passes.rewrite import copy_graph

from ..harness import fresh_backend, run_beside, twins
from ..models import SelfAttention
from . import spelled_attention as spelled

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def canonical(function: Callable[..., Any], *args: Any, compare: bool = True) -> tuple[GraphModule, list[str]]:
    """The graph that Dynamo captures of a function, canonicalised, and why attention in it was left, if it was."""
    found: list[tuple[GraphModule, list[str]]] = []

    def backend(gm: GraphModule, _: Any) -> Callable[..., Any]:
        copied, _nodes = copy_graph(gm)
        left = canonicalise(copied.graph)
        copied.graph.lint()
        copied.recompile()
        found.append((copied, [x.reason for x in left]))
        return copied.forward

    torch._dynamo.reset()
    with torch.no_grad():
        expected = function(*copy.deepcopy(args))
        got = torch.compile(function, backend=backend)(*args)
    if compare:
        torch.testing.assert_close(got, expected)
    (result,) = found
    return result


def qkv(batch: int = 2, length: int = 5, keys: int = 12, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value, made from [B, L, H, D] memory as most models hold it."""
    return [torch.randn(batch, n, 4, 32).to(dtype).transpose(1, 2) for n in (length, keys, keys)]


def calls(gm: GraphModule) -> list[Any]:
    return [call for node in gm.graph.nodes if (call := as_attention(node)) is not None]


@pytest.mark.parametrize("batch", [1, 2], ids="batch of {}".format)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", spelled.ALL)
def test_one_form_that_computes_the_same(name: str, dynamic: bool, batch: int) -> None:
    inputs = qkv(batch)
    for tensor in inputs if dynamic else []:
        torch._dynamo.mark_dynamic(tensor, 2)
    gm, left = canonical(spelled.ALL[name], *inputs)
    (call,) = calls(gm)
    assert left == []
    assert call.key.meta["example_value"].dim() == 4
    others = {str(getattr(n.target, "__name__", n.target)) for n in gm.graph.nodes}
    assert not others & {"softmax", "bmm", "matmul", "einsum", "baddbmm", "_flash_attn_forward", "sageattn"}


@pytest.mark.parametrize("name", spelled.ALL)
def test_nodes_know_the_values_that_they_compute(name: str) -> None:
    """Later passes read sizes and strides off the nodes: they must be those of the tensors that come to be.

    Memory has its order from where attention's result is laid out as the model's own was.
    """
    gm, _ = canonical(spelled.ALL[name], *qkv())
    inputs = dict(zip("qkv", qkv()))

    unordered: set[torch.fx.Node] = set()

    class Check(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            got, known = super().run_node(n), n.meta.get("example_value")
            if isinstance(got, Tensor) and isinstance(known, Tensor):
                assert (got.shape, got.dtype) == (known.shape, known.dtype), n
                if as_attention(n) is not None or (unordered & set(n.args) and n.target != "contiguous"):
                    unordered.add(n)
                assert n in unordered or got.stride() == known.stride(), n
            return got

    with torch.no_grad():
        Check(gm).run(*(inputs[n.name.strip("l_")[0]] for n in gm.graph.find_nodes(op="placeholder")))


class SpelledAttention(SelfAttention):
    def __init__(self, spelling: Spelling, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spelling = spelling

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.out(self.spelling(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", [*spelled.ALL, "flash-attn's varlen operator, one sequence"])
def test_caches_are_packed(name: str) -> None:
    torch.manual_seed(0)
    batch = 1 if "varlen" in name else 2
    model = SpelledAttention((spelled.ALL | {"flash-attn's varlen operator, one sequence": spelled.flash_varlen})[name])
    backend = fresh_backend()
    compiled, eager = twins(model, backend)
    cache, reference_cache = model.new_cache(batch, 64), model.new_cache(batch, 64)

    def steps() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 48, 8):
            x = torch.randn(batch, 8, 256)
            yield compiled(x, cache, start), eager(x, reference_cache, start)

    with torch.no_grad():
        run_beside(steps(), calls=4, stable_from=3)
    assert is_packed(cache["k"]) and is_packed(cache["v"])


@pytest.mark.parametrize("name", spelled.GROUPED)
def test_queries_in_groups(name: str) -> None:
    """They compute the same, eight query heads over two, and caches of two heads are read as codes."""
    kv_heads = 1 if name == "multi_query" else 2
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 8, 32).transpose(1, 2) for n in (5, 12, 12))
    gm, left = canonical(spelled.GROUPED[name], q, k[:, :kv_heads], v[:, :kv_heads])
    (call,) = calls(gm)
    assert left == [] and call.key.meta["example_value"].shape[2:] == (12, 32)

    model = SpelledAttention(spelled.GROUPED[name], kv_heads=kv_heads)
    backend = fresh_backend()
    compiled, eager = twins(model, backend)
    cache, reference_cache = model.new_cache(2, 64), model.new_cache(2, 64)

    def steps() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 48, 8):
            x = torch.randn(2, 8, 256)
            yield compiled(x, cache, start), eager(x, reference_cache, start)

    with torch.no_grad():
        run_beside(steps(), calls=4, stable_from=3)
    assert is_packed(cache["k"]) and is_packed(cache["v"])
    assert {m.lowering for r in backend.reports for m in r.matches} == {"fused"}


LEFT: dict[str, tuple[Spelling, str]] = {
    "dropout by hand": (
        lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, True) @ v,
        "dropout of 0.1",
    ),
    "tanh on the scores": (
        lambda q, k, v: (torch.tanh(q @ k.mT / 30) * 30).softmax(-1) @ v,
        "its scores come from `tanh`, not from a product of queries and keys",
    ),
    "a window": (
        spelled.swapped(spelled.flash_attn_func, window_size=(8, 0)),
        "`window_size=(8, 0)` of `flash_attn.flash_attn_interface.flash_attn_func` is nothing that plain attention has",
    ),
    "a soft cap": (
        spelled.swapped(spelled.flash_attn_func, softcap=30.0),
        "`softcap=30.0` of `flash_attn.flash_attn_interface.flash_attn_func` is nothing that plain attention has",
    ),
    "slopes": (
        lambda q, k, v: spelled.swapped(spelled.flash_attn_func, alibi_slopes=torch.ones(4))(q, k, v),
        "`alibi_slopes=ones` of `flash_attn.flash_attn_interface.flash_attn_func` is nothing that plain attention has",
    ),
    "dropout in flash attention": (spelled.swapped(spelled.flash_attn_func, dropout_p=0.5), "dropout of 0.5"),
    "the softmax's log-sum used": (
        lambda q, k, v: sum(
            torch.ops.flash_attn._flash_attn_forward(
                *(t.transpose(1, 2) for t in (q, k, v)), 0.0, 0.25, False, -1, -1, 0.0, None, False
            )[i].sum()
            for i in (0, 1)
        ),
        "output 1 of `_flash_attn_forward` is used, not only the attention's result",
    ),
    "two sequences in one dimension": (
        spelled.flash_varlen,
        "its sequences' boundaries `cumsum` are not known to be [0, 10]",
    ),
    "sage attention that is causal with more keys than queries": (
        lambda q, k, v: spelled.sageattn(q, k, v, is_causal=True),
        "it is causal with more keys than queries, which this function leaves undefined",
    ),
    "a layout of another kind": (
        lambda q, k, v: spelled.sageattn(q, k, v, tensor_layout="NDH"),
        "its queries are laid out as 'NDH', which is not known",
    ),
    "scores chosen among two products": (
        lambda q, k, v: torch.where(spelled.bottom_right(q, k), q @ k.mT, q @ k.mT / 2).softmax(-1) @ v,
        "its scores come from `where`, not from a product of queries and keys",
    ),
    "scores broadcast by the condition that they are chosen by": (
        lambda q, k, v: torch.where(torch.ones(2, 1, 1, 1) > 0, q[:1] @ k[:1].mT, -1.0).softmax(-1) @ v,
        "its scores are broadcast by the mask that they are chosen by",
    ),
    "a softmax over the queries of a group": (
        lambda q, k, v: ((spelled.in_groups(q, k) @ k[:, :, None].mT).softmax(2) @ v[:, :, None]).flatten(1, 2),
        "its products `bhgik,bhgkj->bhgij` and `…,bhgj#->bhgi#` have more dimensions than batch, head, token and channel",
    ),
    "heads after tokens, under a mask": (
        lambda q, k, v: torch.einsum(
            "bqhk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bqhk", q, k) + torch.ones(12)).softmax(-1), v
        ),
        "its masked scores are not laid out as [batch, head, query, key]",
    ),
    "scores written to before they are used": (
        spelled.scores_edited,
        "its scores come from `setitem`, not from a product of queries and keys",
    ),
    "keys written to between their use and the values'": (
        spelled.keys_overwritten,
        "`mul_` writes to its scores, queries or keys before they are used",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_plain_attention_is_left_with_the_reason(name: str) -> None:
    spelling, reason = LEFT[name]
    q, k, v = qkv()

    def with_cache(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        k_cache[:, :, 4:] = k
        v_cache[:, :, 4:] = v
        return spelling(q, k_cache, v_cache)

    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        _, left = canonical(with_cache, q, k[:, :, 4:], v[:, :, 4:], k.clone(), v.clone(), compare="ropout" not in name)
    assert left == [reason]


@pytest.mark.parametrize("name", sorted(LEFT.keys() - {"keys written to between their use and the values'"}))
def test_reasons_are_given_only_where_something_gathers_tokens(name: str) -> None:
    _, left = canonical(LEFT[name][0], *qkv(), compare="ropout" not in name)
    assert left == []


class Keyless(SelfAttention):
    """Ordinary self-attention by hand: no cache anywhere."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return spelled.matmul(*(t.transpose(1, 2) for t in self.project(x)))


def test_attention_without_a_cache_stays_as_it_was() -> None:
    model = Keyless()
    gm, left = canonical(lambda x: model(x), torch.randn(1, 8, 256))
    assert (calls(gm), left) == ([], [])
    assert sum(n.target == "softmax" or getattr(n.target, "__name__", "") == "softmax" for n in gm.graph.nodes) == 1


def test_weights_that_are_returned_as_well_are_still_computed() -> None:
    def with_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights

    gm, _ = canonical(with_weights, *qkv())
    assert len(calls(gm)) == 1


class TestGraphs(expecttest.TestCase):
    def text(self, name: str, **sizes: int) -> str:
        return graph_text(canonical(spelled.ALL[name], *qkv(**sizes))[0].graph) + "\n"

    def test_by_hand(self) -> None:
        self.assertExpectedInline(
            self.text("matmul"),
            """\
inputs: l_k_, l_q_, l_v_
transpose = l_k_.transpose(-2, -1)
transpose_1 = transpose.transpose(2, 3)
scaled_dot_product_attention = scaled_dot_product_attention(l_q_, transpose_1, l_v_, scale=0.1767766952966369)
contiguous = scaled_dot_product_attention.contiguous()
return (contiguous)
""",
        )

    def test_masked_by_hand(self) -> None:
        self.assertExpectedInline(
            self.text("masked_fill"),
            """\
inputs: l_k_, l_q_, l_v_
transpose = l_k_.transpose(2, 3)
ones = ones(5, 12, dtype=torch.bool, device=cpu)
tril = ones.tril(7)
invert = invert(tril)
transpose_1 = transpose.transpose(2, 3)
zeros_like = zeros_like(invert, dtype=torch.float32)
masked_fill = zeros_like.masked_fill(invert, -3.4028234663852886e+38)
scaled_dot_product_attention = scaled_dot_product_attention(l_q_, transpose_1, l_v_, attn_mask=masked_fill, scale=0.25)
contiguous = scaled_dot_product_attention.contiguous()
return (contiguous)
""",
        )

    def test_batch_and_heads_merged(self) -> None:
        self.assertExpectedInline(
            self.text("bmm"),
            """\
inputs: l_q_, l_k_, l_v_
scaled_dot_product_attention = scaled_dot_product_attention(l_q_, l_k_, l_v_, scale=0.125)
flatten = scaled_dot_product_attention.flatten(0, 1)
contiguous = flatten.contiguous()
view = contiguous.view(2, 4, 5, 32)
return (view)
""",
        )

    def test_flash_causal(self) -> None:
        self.assertExpectedInline(
            self.text("flash-attn's operator, causal"),
            """\
inputs: l_q_, l_k_, l_v_
transpose = l_q_.transpose(1, 2)
transpose_1 = l_k_.transpose(1, 2)
transpose_2 = l_v_.transpose(1, 2)
transpose_4 = transpose.transpose(1, 2)
transpose_5 = transpose_1.transpose(1, 2)
transpose_6 = transpose_2.transpose(1, 2)
ones = ones([5, 12], dtype=torch.bool, device=cpu)
tril = ones.tril(7)
scaled_dot_product_attention = scaled_dot_product_attention(transpose_4, transpose_5, transpose_6, attn_mask=tril, scale=0.25)
transpose_7 = scaled_dot_product_attention.transpose(1, 2)
contiguous = transpose_7.contiguous()
transpose_3 = contiguous.transpose(1, 2)
return (transpose_3)
""",
        )

    def test_flash_causal_of_equal_lengths(self) -> None:
        self.assertExpectedInline(
            self.text("flash-attn's operator, causal", length=12),
            """\
inputs: l_q_, l_k_, l_v_
transpose = l_q_.transpose(1, 2)
transpose_1 = l_k_.transpose(1, 2)
transpose_2 = l_v_.transpose(1, 2)
transpose_4 = transpose.transpose(1, 2)
transpose_5 = transpose_1.transpose(1, 2)
transpose_6 = transpose_2.transpose(1, 2)
scaled_dot_product_attention = scaled_dot_product_attention(transpose_4, transpose_5, transpose_6, is_causal=True, scale=0.25)
transpose_7 = scaled_dot_product_attention.transpose(1, 2)
contiguous = transpose_7.contiguous()
transpose_3 = contiguous.transpose(1, 2)
return (transpose_3)
""",
        )
