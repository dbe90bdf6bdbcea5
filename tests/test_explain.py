"""`explain` tells what packing would do, and leaves everything as it was."""

from __future__ import annotations

import copy
import html.parser
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor, nn

import jkv_compile
from jkv_compile import ConfigurationError, Explanation, NoCachedAttentionError, is_packed

from .harness import fresh_backend
from .idioms.models import DIM, Composite, FixedPast, GrowingPast, LazyBuffers, RollingCache
from .models import BrokenAttention, BufferAttention, Network, SelfAttention

CHUNK = 8


def chunk(dim: int = 256) -> Tensor:
    return torch.randn(1, CHUNK, dim)


def explain(model: Any, *args: Any, **kwargs: Any) -> Explanation:
    with torch.no_grad():
        return jkv_compile.explain(model, *args, **kwargs)


def text(explanation: Explanation) -> str:
    """The account, with the directory of this file and the numbers of lines left out."""
    account = str(explanation).replace(str(Path(__file__).parent), "tests")
    return re.sub(r"\.py:\d+", ".py", account) + "\n"


class Windowed(SelfAttention):
    """Attention that has no packed form: scores pass through tanh."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.transpose(2, 3) / 30) * 30
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class TestAccounts(expecttest.TestCase):
    def test_cache_in_a_dict(self) -> None:
        model = SelfAttention()
        self.assertExpectedInline(
            text(explain(model, chunk(), model.new_cache(1, 64), 8)),
            """\
jkv_compile.explain with Config(bits=2, group_size=32, correction='taylor', inner='inductor', strict=False, quantizer='rtn', offload=None, sink=0, recent=0, center=False, step_bits=16, center_tokens=0, stages=1, centroids=None, budget=None, salience='attention', block_tokens=None)
graphs: 1; attention over caches that can be packed: 1, left in full precision: 0; their caches take 128.0 KiB, packed 12.0 KiB
graph of 28 nodes: adopted, its caches are packed when it is called
  + tests/models.py in attend
      cache: written in slices, read in slices
      query [1, 4, 8, 64], keys [1, 4, 16, 64]: cached [0, 8), current 8
      lowering: fused (codes are read where they lie, and nothing is dequantized in memory)
      cache['k'] [1, 64, 4, 64] float32, 2 bits in groups of 32: 64.0 KiB -> 6.0 KiB
      cache['v'] [1, 64, 4, 64] float32, 2 bits in groups of 32: 64.0 KiB -> 6.0 KiB
""",
        )

    def test_break_between_write_and_attention(self) -> None:
        model = BrokenAttention()
        self.assertExpectedInline(
            text(explain(model, chunk(), model.new_cache(1, 64), 8, bits=(4, 2))),
            """\
jkv_compile.explain with Config(bits=(4, 2), group_size=32, correction='taylor', inner='inductor', strict=False, quantizer='rtn', offload=None, sink=0, recent=0, center=False, step_bits=16, center_tokens=0, stages=1, centroids=None, budget=None, salience='attention', block_tokens=None)
graphs: 2; attention over caches that can be packed: 1, left in full precision: 0; their caches take 128.0 KiB, packed 16.0 KiB
graph of 19 nodes: untouched, it runs as written
  ! tests/models.py forward
      graph break: Call to `torch._dynamo.graph_break()`
      parts from its attention: cache['k'], cache['v']
graph of 13 nodes: adopted, its caches are packed when it is called
  + tests/models.py in attend
      cache: written elsewhere, read in slices
      query [1, 4, 8, 64], keys [1, 4, 16, 64]: cached [0, 16), current 0
      lowering: fused (codes are read where they lie, and nothing is dequantized in memory)
      keys [1, 64, 4, 64] float32, 4 bits in groups of 32: 64.0 KiB -> 10.0 KiB
      values [1, 64, 4, 64] float32, 2 bits in groups of 32: 64.0 KiB -> 6.0 KiB
""",
        )

    def test_nothing_to_pack(self) -> None:
        model = Windowed()
        self.assertExpectedInline(
            text(explain(model, chunk(), model.new_cache(1, 64), 8)),
            """\
jkv_compile.explain with Config(bits=2, group_size=32, correction='taylor', inner='inductor', strict=False, quantizer='rtn', offload=None, sink=0, recent=0, center=False, step_bits=16, center_tokens=0, stages=1, centroids=None, budget=None, salience='attention', block_tokens=None)
graphs: 1; attention over caches that can be packed: 0, left in full precision: 1
graph of 34 nodes: untouched, it runs as written
  - tests/test_explain.py in attend
      left in full precision: its scores come from `tanh`, not from a product of queries and keys
      If the call is softmax(scale * query @ key.mT + mask) @ value after all, say so with jkv_compile.register_attention; attention with windows, soft caps or its own score terms has no packed form.
""",
        )

    def test_a_past_that_is_concatenated(self) -> None:
        model = FixedPast()
        past = tuple(torch.randn(1, 2, 8, 32) for _ in range(2))
        self.assertExpectedInline(
            text(explain(model, chunk(DIM), past)),
            """\
jkv_compile.explain with Config(bits=2, group_size=32, correction='taylor', inner='inductor', strict=False, quantizer='rtn', offload=None, sink=0, recent=0, center=False, step_bits=16, center_tokens=0, stages=1, centroids=None, budget=None, salience='attention', block_tokens=None)
graphs: 1; attention over caches that can be packed: 1, left in full precision: 0; their caches take 4.0 KiB, packed 384 B
graph of 25 nodes: watched, the past that it attends is packed when it comes a second time
  + tests/idioms/models.py in forward
      cache: a past, concatenated with the current chunk at each read
      query [1, 2, 8, 32], keys [1, 2, 16, 32]: cached [0, 8), current 8
      lowering: fused (codes are read where they lie, and nothing is dequantized in memory)
      past[0] [1, 2, 8, 32] float32, 2 bits in groups of 32: 2.0 KiB -> 192 B
      past[1] [1, 2, 8, 32] float32, 2 bits in groups of 32: 2.0 KiB -> 192 B
""",
        )


@pytest.mark.parametrize(
    "model, arguments, idiom",
    [
        (Composite(), (chunk(DIM), {n: torch.zeros(1, 64, 2, 32) for n in "kv"}, 32), "several slices"),
        (GrowingPast(), (chunk(DIM), tuple(torch.randn(1, 2, 8, 32) for _ in "kv")), "grows by concatenation"),
        (LazyBuffers(), (chunk(DIM), 8), "written in slices, read in slices"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_idioms_are_named(model: nn.Module, arguments: Any, idiom: str) -> None:
    (match,) = explain(model, *arguments).matches
    assert idiom in match.idiom


def test_settings_and_the_models_own_keywords_are_told_apart() -> None:
    model = SelfAttention()
    explanation = explain(model, x=chunk(), cache=model.new_cache(1, 64), start=8, bits=(8, 4), group_size=64)
    assert explanation.config == jkv_compile.Config(bits=(8, 4), group_size=64)
    assert [(c.role, c.bits, c.group_size) for c in explanation.caches] == [("keys", 8, 64), ("values", 4, 64)]
    with pytest.raises(ConfigurationError, match="bits=5"):
        explain(model, chunk(), model.new_cache(1, 64), 8, bits=5)


@pytest.mark.parametrize(
    "settings", [{"bits": 2}, {"preset": "memory"}, {"preset": "smallest"}, {"sink": 5, "recent": 70}], ids=str
)
def test_bytes_are_those_that_packing_takes(settings: dict[str, Any]) -> None:
    model, backend = SelfAttention(), fresh_backend(**{"bits": 2, **settings})
    cache = model.new_cache(1, 64)
    caches = explain(model, chunk(), cache, 8, **settings).caches
    with torch.no_grad():
        torch.compile(model, backend=backend)(chunk(), cache, 8)
    memory = backend.memory()
    assert sum(c.full_precision_bytes for c in caches) == memory.full_precision_bytes
    assert sum(c.packed_bytes for c in caches) == memory.packed_bytes
    assert ("5 first and 64 newest tokens in full precision" in str(caches[0])) == ("sink" in settings)


def test_a_group_size_that_does_not_fit_is_part_of_the_account() -> None:
    model = SelfAttention()
    (rejection,) = explain(model, chunk(), model.new_cache(1, 64), 8, group_size=48).rejections
    assert "group_size=48 does not divide" in rejection.reason
    assert rejection.kind.name == "CONFIGURATION"


def test_as_data() -> None:
    model = Network(2)
    data = json.loads(json.dumps(explain(model, chunk(), model.new_cache(1, 64), 8).to_dict()))
    (graph,) = data["graphs"]
    assert [m["lowering"] for m in graph["matches"]] == ["fused", "fused"]
    assert "jkv::attention" in graph["after"] and "scaled_dot_product_attention" in graph["before"]
    data = explain(Windowed(), chunk(), model.new_cache(1, 64)[0], 8).to_dict()
    (rejection, *_) = data["graphs"][0]["rejections"]
    assert rejection["kind"] == "SPELLING" and "register_attention" in rejection["advice"]


class Balanced(html.parser.HTMLParser):
    """Checks that elements are closed as they were opened, and gathers text and what is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.loaded = "", []  # type: ignore[var-annotated]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.loaded += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_as_a_page() -> None:
    model = BrokenAttention()
    explanation = explain(model, chunk(), model.new_cache(1, 64), 8)
    page = Balanced()
    page.feed(explanation.to_html())
    assert page.open == [] and page.loaded == []
    for part in ("graph break", "jkv::attention", "written elsewhere", "cache['k']", explanation.summary):
        assert part in page.text
    hostile = copy.deepcopy(explanation.graphs)
    hostile[0].before = "<script>alert(1)</script>"
    assert "<script>" not in Explanation(explanation.config, hostile).to_html()


def test_strict_raises_with_the_same_account() -> None:
    model = Windowed()
    arguments = chunk(), model.new_cache(1, 64), 8
    with pytest.raises(NoCachedAttentionError) as raised:
        explain(model, *arguments, strict=True)
    account = str(explain(model, *arguments)).splitlines()[1:]
    assert str(raised.value).splitlines()[2:] == account
    model = SelfAttention()
    assert explain(model, *arguments, strict=True).matches


# ---- everything is left as it was ----


def state_of(model: nn.Module, arguments: Any) -> Any:
    """Copies of all tensors, by where they are, and what they are."""
    held = {"model": dict(model.__dict__), "buffers": dict(model.named_buffers()), "arguments": arguments}
    return torch.utils._pytree.tree_map(lambda x: (id(x), type(x), x.clone()) if isinstance(x, Tensor) else x, held)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


class Random(SelfAttention):
    """Uses random numbers, appends to a list, counts its calls, and writes to its cache outside of graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.history = 0, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        out = super().forward(x + torch.randn_like(x), cache, start)
        return self.outside(out, cache)

    @torch.compiler.disable
    def outside(self, out: Tensor, cache: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        self.history.append(out)
        cache["k"].mul_(2)
        cache["v"][:, 3:5].index_fill_(1, torch.tensor([1]), 7.0)
        cache["extra"] = out
        random.random()
        return out


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "a cache in a dict": lambda: ((m := SelfAttention()), (chunk(), m.new_cache(1, 64), 8)),
    "a break": lambda: ((m := BrokenAttention()), (chunk(), m.new_cache(1, 64), 8)),
    "module buffers": lambda: (BufferAttention(tokens=64), (chunk(), 8)),
    "buffers allocated in the first call": lambda: (LazyBuffers(), (chunk(DIM), 8)),
    "positions in tensors": lambda: ((m := RollingCache()), (chunk(DIM), m.new_cache(), 0)),
    "random numbers, lists, and writes in eager code": lambda: ((m := Random()), (chunk(), m.new_cache(1, 64), 8)),
}


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference mode"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_changed(name: str, inference: bool) -> None:
    model, arguments = CASES[name]()
    with torch.inference_mode() if inference else torch.no_grad():
        for tensor in torch.utils._pytree.tree_leaves((list(model.buffers()), arguments[1:])):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))
        before, generators = state_of(model, arguments), (torch.get_rng_state(), random.getstate())
        assert jkv_compile.explain(model, *arguments).graphs
        after = state_of(model, arguments)
        assert same(before, after)
        assert torch.equal(generators[0], torch.get_rng_state()) and generators[1] == random.getstate()
        model(*arguments)
        assert not same(before, state_of(model, arguments)), "the model changes nothing: the test tests nothing"


def test_nothing_is_changed_when_the_model_fails() -> None:
    class Failing(SelfAttention):
        def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
            super().forward(x, cache, start)
            torch._dynamo.graph_break()
            raise RuntimeError("out of tokens")

    model = Failing()
    arguments = chunk(), model.new_cache(1, 64), 8
    before = state_of(model, arguments)
    with pytest.raises(RuntimeError, match="out of tokens"):
        explain(model, *arguments)
    assert same(before, state_of(model, arguments))


def test_caches_that_are_packed_already_stay_so_bit_for_bit() -> None:
    model, backend = BrokenAttention(), fresh_backend(bits=2)
    compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 64)
    with torch.no_grad():
        for start in (0, 8):
            compiled(chunk(), cache, start)
        stores = [cache[n]._store for n in ("k", "v")]
        before = [(s.codes.clone(), s.scales.clone(), s.active) for s in stores]
        explanation = explain(compiled, chunk(), cache, 16)
        assert [m.lowering for m in explanation.matches] == ["fused"]
        for store, (codes, scales, active) in zip(stores, before):
            assert torch.equal(store.codes, codes) and torch.equal(
                store.scales.view(torch.int16), scales.view(torch.int16)
            )
            assert store.active is active


def test_a_compiled_model_is_not_compiled_again_for_it() -> None:
    model, backend = SelfAttention(), fresh_backend()
    compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 64)
    with torch.no_grad():
        for start in (0, 8, 16):
            compiled(chunk(), cache, start)
        explain(compiled, chunk(), model.new_cache(1, 64), 8)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(chunk(), cache, 24)
    assert is_packed(cache["k"])


def test_blocks_that_are_compiled_one_by_one_are_explained() -> None:
    model = Network(2)
    model.layers = nn.ModuleList(torch.compile(layer, backend=fresh_backend()) for layer in model.layers)
    caches = [layer._orig_mod.new_cache(1, 64) for layer in model.layers]
    explanation = explain(model, chunk(), caches, 8)
    assert len(explanation.matches) == 2
    assert not any(is_packed(t) for c in caches for t in c.values())


def test_attention_that_is_nowhere_compiled_is_missed() -> None:
    class Eager(SelfAttention):
        @torch.compiler.disable
        def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return super().attend(q, keys, values)

    model = Eager()
    account = explain(model, chunk(), model.new_cache(1, 64), 0)
    assert "no attention came to a compiled graph" in account.summary
    assert account.breaks and "torch.compiler.disable" in str(account)
