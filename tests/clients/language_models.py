"""Tiny transformers models with random weights, decoding token by token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from .clients import Client, Compile, Step

VOCABULARY, WINDOW = 97, 16
TINY = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
    "initializer_range": 0.06,  # attention that is neither uniform nor on one token
}  # fmt: skip


def llama(layers: int = 1) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**TINY | {"num_hidden_layers": layers})).eval()


def two_layers() -> PreTrainedModel:
    return llama(2)


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**TINY)).eval()


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**TINY)).eval()


def mistral() -> PreTrainedModel:
    """Every layer looks back `WINDOW` tokens."""
    return MistralForCausalLM(MistralConfig(**TINY, sliding_window=WINDOW)).eval()


def static_cache(model: PreTrainedModel) -> Cache:
    return StaticCache(config=model.config, max_cache_len=48)


def dynamic_cache(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def cache_tensors(cache: Cache) -> list[Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def decoding(
    make_model: Callable[[], PreTrainedModel],
    make_cache: Callable[[PreTrainedModel], Cache],
    padded: bool = False,
    prompt: int = 10,
) -> Callable[[Compile], Iterator[Step]]:
    """A prompt of two rows, then token by token; `padded`, one row is shorter, and a mask says so."""

    def steps(compile_: Compile) -> Iterator[Step]:
        model = make_model()
        eager = copy.deepcopy(model)
        compiled = compile_(model)
        cache, reference_cache = make_cache(model), make_cache(model)
        tokens = torch.randint(0, VOCABULARY, (2, prompt))
        mask = torch.ones(2, prompt, dtype=torch.long)
        if padded:
            mask[0, :3] = 0
        while True:
            arguments: dict[str, Any] = {"input_ids": tokens, "use_cache": True}
            if padded:
                arguments["attention_mask"] = mask
            got = compiled(**arguments, past_key_values=cache).logits
            want = eager(**arguments, past_key_values=reference_cache).logits
            yield Step(got[:, -1], want[:, -1], cache_tensors(cache))
            tokens = want[:, -1:].argmax(-1)  # greedy
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)

    return steps


WHOLE = "a whole buffer under a mask"
GROWING = "a concatenation that grows and is returned"
ROLLED = "a buffer rolled and copied back"
CLIENTS = [
    Client("Llama", "StaticCache", WHOLE, decoding(two_layers, static_cache, padded=True)),
    Client("Llama", "DynamicCache", GROWING, decoding(llama, dynamic_cache)),
    Client("Llama", "StaticCache", WHOLE, decoding(two_layers, static_cache), compiled="blocks"),
    Client("Qwen2", "DynamicCache", GROWING, decoding(qwen2, dynamic_cache, padded=True)),
    Client("Qwen3", "StaticCache", WHOLE, decoding(qwen3, static_cache)),
    Client("Mistral", "StaticCache with a window", ROLLED, decoding(mistral, static_cache), stable_from=9, calls=11),
    Client("Mistral", "DynamicCache with a window", GROWING, decoding(mistral, dynamic_cache), stable_from=9, calls=11),
]
