"""transformers' `generate()` over a compiled model, and the operations of its cache API on caches that are packed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Cache, CompileConfig, DynamicCache, GenerationConfig

from jkv_compile import JKVBackend, is_packed, materialize

from ..harness import BOUND, fresh_backend, relative_error
from .language_models import VOCABULARY, cache_tensors, dynamic_cache, llama, static_cache

PROMPT, NEW = 10, 6


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_generate(implementation: str) -> None:
    """Greedy decoding has eager's logits, within 1 %, as long as it chooses alike; the second call compiles nothing."""
    backend = fresh_backend()
    model = llama()
    eager = copy.deepcopy(model)
    settings = {
        "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True,
        "return_dict_in_generate": True, "cache_implementation": implementation,
    }  # fmt: skip
    compiled = dict(settings)
    if implementation == "static":  # generate() compiles its decoding steps by itself
        compiled["compile_config"] = CompileConfig(backend=backend, mode=None, fullgraph=False)
        compiled["compile_config"]._compile_all_devices = True
    else:
        model.forward = torch.compile(model.forward, backend=backend)
    for call in range(2):
        tokens = torch.randint(0, VOCABULARY, (2, PROMPT))
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        graphs = counters["stats"]["unique_graphs"]
        got = model.generate(tokens, attention_mask=mask, generation_config=GenerationConfig(**compiled))
        want = eager.generate(tokens, attention_mask=mask, generation_config=GenerationConfig(**settings))
        same = (got.sequences == want.sequences).all(0)[PROMPT:].tolist()
        alike = same.index(False) + 1 if False in same else NEW  # logits up to the first choice that differs
        errors = [relative_error(a, b) for a, b in zip(got.logits[:alike], want.logits)]
        assert alike > 2 and 0 < max(errors) < BOUND, (alike, errors)
        assert all(map(is_packed, cache_tensors(got.past_key_values)))
        assert call == 0 or counters["stats"]["unique_graphs"] == graphs
    assert backend.memory().adopted and backend.memory().ratio > 3


class Decoder:
    """A compiled model and its eager twin, with a cache each: the same is done to both."""

    def __init__(self, backend: JKVBackend, batch: int) -> None:
        model = llama()
        self.eager = copy.deepcopy(model)
        self.compiled = torch.compile(model, backend=backend)
        self.caches: tuple[Cache, Cache] = dynamic_cache(model), dynamic_cache(model)
        self.forward(torch.randint(0, VOCABULARY, (batch, PROMPT)))
        for _ in range(2):
            self.forward(torch.randint(0, VOCABULARY, (batch, 1)))

    def forward(self, tokens: Tensor) -> float:
        """The relative error of the logits."""
        got = self.compiled(tokens, past_key_values=self.caches[0], use_cache=True).logits
        want = self.eager(tokens, past_key_values=self.caches[1], use_cache=True).logits
        return relative_error(got, want)

    def both(self, operation: Callable[[Cache], object]) -> None:
        for cache in self.caches:
            operation(cache)

    def check(self, batch: int, length: int) -> None:
        """The packed caches hold what eager's do, and the models go on alike."""
        for packed, plain in zip(*map(cache_tensors, self.caches)):
            assert is_packed(packed)
            assert packed.shape == plain.shape
            assert packed.shape[0] == batch and packed.shape[2] == length
            assert relative_error(materialize(packed), plain) < BOUND
        for _ in range(2):
            assert 0 < self.forward(torch.randint(0, VOCABULARY, (batch, 1))) < BOUND
        assert all(map(is_packed, cache_tensors(self.caches[0])))


OPERATIONS: dict[str, tuple[Callable[[Cache], object], int, int]] = {  # what is done, then batch and length
    "crop": (lambda cache: cache.crop(-4), 3, PROMPT + 2 - 4),
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), 3, PROMPT + 2),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), 2, PROMPT + 2),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), 6, PROMPT + 2),
}


@torch.no_grad()
def test_operations_on_a_packed_cache() -> None:
    decoder = Decoder(fresh_backend(), batch=3)
    start = copy.deepcopy(decoder.caches)
    for operation, batch, length in OPERATIONS.values():
        decoder.caches = copy.deepcopy(start)
        decoder.both(operation)
        decoder.check(batch, length)


@torch.no_grad()
def test_a_static_cache_is_reset_packed() -> None:
    """A new text in the same memory, from its first token."""
    backend = fresh_backend()
    model = llama()
    eager, compiled = copy.deepcopy(model), torch.compile(model, backend=backend)
    caches = static_cache(model), static_cache(model)
    for _ in range(2):
        for length in (PROMPT, 1, 1):
            tokens = torch.randint(0, VOCABULARY, (1, length))
            got, want = (m(tokens, past_key_values=c).logits for m, c in zip((compiled, eager), caches))
            assert relative_error(got, want) < BOUND
        assert all(map(is_packed, cache_tensors(caches[0])))
        for cache in caches:
            cache.reset()
        assert not any(materialize(t).any() for t in cache_tensors(caches[0]))


@torch.no_grad()
def test_two_texts_grow_from_one_packed_past() -> None:
    """Copies of a cache share nothing that they write."""
    decoder = Decoder(fresh_backend(), batch=1)
    past = decoder.caches
    for _ in range(2):
        decoder.caches = copy.deepcopy(past)
        for _ in range(3):
            assert decoder.forward(torch.randint(0, VOCABULARY, (1, 1))) < BOUND
    assert isinstance(past[0], DynamicCache)
    assert past[0].get_seq_length() == PROMPT + 2
