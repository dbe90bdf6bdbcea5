"""Tiny diffusers models with random weights: every transformer there that keeps keys and values of its self-attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import (
    AnyFlowFARTransformer3DModel,
    Flux2Transformer2DModel,
    GlmImageTransformer2DModel,
    QwenImage21Transformer2DModel,
    SanaWMLTX2RefinerTransformer3DModel,
    WanAnimate2Transformer3DModel,
)
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

from .clients import Client, Compile, Step

HEADS, HEAD_DIM = 2, 32
DIM = HEADS * HEAD_DIM


def twins(model: nn.Module, compile_: Compile) -> tuple[nn.Module, nn.Module]:
    """The model compiled, and an eager copy of it, with weights for which it matters what is attended."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            gain = 2.0 if ".to_" in name or ".attn" in name else 1.0
            nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
    eager = copy.deepcopy(model.eval())
    return compile_(model), eager


def flux2(compile_: Compile) -> Iterator[Step]:
    """Reference image tokens, cached in the first denoising step, stand between those of text and image."""
    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False,
    )  # fmt: skip
    for block in model.transformer_blocks:  # as the pipeline has it
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    compiled, eager = twins(model, compile_)
    text, reference, image = 6, 8, 10
    fixed: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(1, text, 32),
        "txt_ids": torch.zeros(text, 4),
        "return_dict": False,
    }
    ids = torch.zeros(reference + image, 4)
    ids[:, 1] = torch.arange(reference + image)
    first = {
        **fixed, "hidden_states": torch.randn(1, reference + image, 16), "timestep": torch.tensor([1.0]),
        "img_ids": ids, "kv_cache_mode": "extract", "num_ref_tokens": reference,
    }  # fmt: skip
    (_, cache), (_, reference_cache) = compiled(**first), eager(**first)
    while True:
        step = {
            **fixed, "hidden_states": torch.randn(1, image, 16), "timestep": torch.rand(1),
            "img_ids": ids[reference:], "kv_cache_mode": "cached",
        }  # fmt: skip
        (got,), (want,) = compiled(**step, kv_cache=cache), eager(**step, kv_cache=reference_cache)
        layers = cache.double_block_caches + cache.single_block_caches
        kept = [t for layer in layers for t in (layer.k_ref, layer.v_ref)]
        yield Step(got, want, kept, (fixed["encoder_hidden_states"],))


def glm_image(compile_: Compile) -> Iterator[Step]:
    """Keys of condition images, written in one call each, before those of the denoised one."""
    compiled, eager = twins(
        GlmImageTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
            text_embed_dim=32, time_embed_dim=32, condition_dim=8, prior_vq_quantizer_codebook_size=16,
        ),
        compile_,
    )  # fmt: skip
    caches = GlmImageKVCache(1), GlmImageKVCache(1)

    def call(image: Tensor, text: Tensor, mode: str) -> list[Tensor]:
        outputs = []
        arguments = {
            "hidden_states": image, "encoder_hidden_states": text, "prior_token_id": torch.zeros(1, 16, dtype=torch.long),
            "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool), "timestep": torch.tensor([500.0]),
            "target_size": torch.tensor([[8.0, 8.0]]), "crop_coords": torch.zeros(1, 2), "return_dict": False,
        }  # fmt: skip
        for model, cache in zip((compiled, eager), caches):
            cache.set_mode(mode)
            outputs += model(**arguments, kv_caches=cache)
        return outputs

    for _ in range(2):
        call(torch.randn(1, 4, 8, 8), torch.randn(1, 0, 32), "write")
    text = torch.randn(1, 5, 32)
    while True:
        got, want = call(torch.randn(1, 4, 8, 8), text, "read")
        yield Step(got, want, [t for layer in caches[0].caches for t in (*layer.k_caches, *layer.v_caches)])


def qwen_image(compile_: Compile) -> Iterator[Step]:
    """Text and condition images are a prefix that the first denoising step caches."""
    compiled, eager = twins(
        QwenImage21Transformer2DModel(
            in_channels=8, out_channels=8, num_layers=2, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
            context_in_dim=32, axes_dims_rope=(8, 12, 12),
        ),
        compile_,
    )  # fmt: skip
    slots = torch.zeros(1, 10, dtype=torch.bool)  # a condition image of 4 × 4 tokens within 6 of text, then the image
    slots[0, 2:6] = True
    slots = torch.cat([slots, torch.ones(1, 4, dtype=torch.bool)], 1)
    fixed: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(1, 10, 32), "img_mask": slots, "return_dict": False,
        "img_shapes": [[(1, 4, 4), (1, 4, 4)]],
    }  # fmt: skip
    cache, reference_cache = QwenImage21KVCache(2), QwenImage21KVCache(2)
    condition = torch.randn(1, 16, 8)
    for call in range(99):
        step = {
            **fixed, "hidden_states": torch.cat([condition, torch.randn(1, 16, 8)], 1), "timestep": torch.rand(1),
            "kv_cache_mode": "cached" if call else "extract",
        }  # fmt: skip
        (got,), (want,) = compiled(**step, kv_cache=cache), eager(**step, kv_cache=reference_cache)
        kept = [t for layer in cache.layer_caches for t in (layer.k, layer.v)]
        yield Step(got, want, kept, (fixed["encoder_hidden_states"],))


def wan_animate(compile_: Compile) -> Iterator[Step]:
    """Reference tokens, cached before RoPE, are turned at each read and scattered beside those of the generation."""
    compiled, eager = twins(
        WanAnimate2Transformer3DModel(
            text_len=8, in_dim=8, dim=DIM, ffn_dim=DIM, freq_dim=32, text_dim=32, out_dim=4, num_heads=HEADS,
            num_layers=1, use_img_emb=False,
        ),
        compile_,
    )  # fmt: skip
    cache, reference_cache = WanAnimate2KVCache(1), WanAnimate2KVCache(1)
    grid = torch.tensor([[2, 4, 4]])
    fixed: dict[str, Any] = {"encoder_hidden_states": [torch.randn(5, 32)], "return_dict": False}

    def latents(frames: int) -> dict[str, Any]:
        names = ("hidden_states", "condition_latents")
        return {name: [torch.randn(4, frames, 8, 8)] for name in names} | {"seq_len": frames * 16}

    first = {
        **fixed, **latents(2), "timestep": torch.tensor([1.0]), "offset_grid_sizes": grid, "kv_cache_mode": "extract",
    }  # fmt: skip
    compiled(**first, kv_cache=cache), eager(**first, kv_cache=reference_cache)
    while True:
        step = {
            **fixed, **latents(3), "timestep": torch.rand(1) * 1000, "reference_grid_sizes": grid, "origin_len": 5,
            "origin_area": [64, 64], "kv_cache_mode": "cached",
        }  # fmt: skip
        ((got,),), ((want,),) = compiled(**step, kv_cache=cache), eager(**step, kv_cache=reference_cache)
        yield Step(got, want, [t for layer in cache.layer_caches for t in (layer.key, layer.value)])


def sana_refiner(compile_: Compile) -> Iterator[Step]:
    """A sink cached before RoPE, recent history cached after it, and the current block; all `[B, S, H·D]`."""
    layers, height, width = 1, 2, 4
    frame = height * width
    model = SanaWMLTX2RefinerTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, cross_attention_dim=DIM,
        audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=layers, caption_channels=16, rope_type="split",
    )  # fmt: skip
    positions = model.build_rotary_emb_for_absolute_positions
    rope = {n: positions(1, list(range(n, n + 2)), height, width, torch.device("cpu"), 24.0) for n in range(99)}
    compiled, eager = twins(model, compile_)
    caches = SanaWMRefinerKVCache(layers), SanaWMRefinerKVCache(layers)
    text = torch.randn(1, 5, 16)

    def call(first_frame: int, mode: str) -> list[Tensor]:
        step = {
            "hidden_states": torch.randn(1, 2 * frame, 8), "encoder_hidden_states": text,
            "timestep": torch.rand(1, 1).expand(1, 2 * frame) * 1000, "video_rotary_emb": rope[first_frame],
            "kv_cache_mode": mode, "return_dict": False,
        }  # fmt: skip
        return [model(**step, kv_cache=cache)[0] for model, cache in zip((compiled, eager), caches)]

    call(0, "capture_pre_rope")
    for cache in caches:
        for layer in cache.layer_caches:
            layer.store_sink(*layer.get_captured_pre_rope())
    for block in range(1, 99):
        for cache in caches:
            cache.sink_pe = rope[max(0, 2 * block - 4)]
        got, want = call(2 * block, "inject")
        kept = [t for layer in caches[0].layer_caches for t in (layer.sink_k_pre, layer.sink_v)]
        yield Step(got, want, kept + [t for c in caches[0].layer_caches for t in c.get_history() or ()])
        call(2 * block, "inject_and_capture_post_rope")
        for cache in caches:
            for layer in cache.layer_caches:
                new, old = layer.get_captured_post_rope(), layer.get_history()
                joined = new if old is None else [torch.cat([o, n], 1)[:, -4 * frame :] for o, n in zip(old, new)]
                layer.store_history(*joined)


def anyflow(compile_: Compile) -> Iterator[Step]:
    """Keys and values stacked in one tensor, two caches per layer; RoPE and flex_attention after the concatenation."""
    layers, chunks, limit = 1, 4, 3
    compiled, eager = twins(
        AnyFlowFARTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, text_dim=16,
            freq_dim=32, ffn_dim=DIM, num_layers=layers, rope_max_seq_len=64, full_chunk_limit=limit,
        ),
        compile_,
    )  # fmt: skip

    def allocate() -> dict[int, dict[str, Tensor]]:
        full, compressed = limit * 16, (chunks - limit + 1) * 4
        sizes = {"full_cache": full, "compressed_cache": compressed}
        return {n: {k: torch.zeros(2, 1, HEADS, s, HEAD_DIM) for k, s in sizes.items()} for n in range(layers)}

    caches = allocate(), allocate()
    text, video = torch.randn(1, 5, 16), torch.randn(1, chunks, 4, 8, 8)
    for chunk in range(chunks):
        for _ in range(2):  # denoising steps
            times = torch.rand(1, 1) * 1000
            step = {
                "hidden_states": torch.randn(1, 1, 4, 8, 8), "timestep": times, "r_timestep": times,
                "encoder_hidden_states": text, "chunk_partition": [1] * (chunk + 1), "return_dict": False,
            }  # fmt: skip
            outputs = []
            for model, cache in zip((compiled, eager), caches):
                flag = {"num_cached_chunks": chunk, "is_cache_step": False}
                outputs.append(model(**step, kv_cache=cache, kv_cache_flag=flag)[0])
            yield Step(*outputs, [t for layer in caches[0].values() for t in layer.values()])
        clean = {
            "hidden_states": video[:, : chunk + 1], "timestep": torch.zeros(1, chunk + 1),
            "r_timestep": torch.zeros(1, chunk + 1), "encoder_hidden_states": text,
            "chunk_partition": [1] * (chunk + 1), "return_dict": False,
        }  # fmt: skip
        for model, cache in zip((compiled, eager), caches):
            mask = eager.build_attention_mask(chunk_partition=[1] * (chunk + 1), height=8, width=8, mode="cache")
            flag = {"num_cached_chunks": chunk, "is_cache_step": True}
            model(**clean, kv_cache=cache, kv_cache_flag=flag, attention_mask=mask)


FIXED = "a fixed past, concatenated"
CLIENTS = [
    Client("Flux2 (klein)", "Flux2KVCache", FIXED, flux2),
    Client("Flux2 (klein)", "Flux2KVCache", FIXED, flux2, compiled="blocks"),
    Client("GLM-Image", "GlmImageKVCache", FIXED, glm_image),
    Client("Qwen-Image 2.1", "QwenImage21KVCache", FIXED, qwen_image, compiled="blocks"),
    Client(
        "SANA-WM refiner", "SanaWMRefinerKVCache", "a concatenation of sink, window and current chunk", sana_refiner,
        calls=6, stable_from=5, ratio=1.5, graphs=9,
    ),
    Client(
        "AnyFlow-FAR", "a dict of tensors", "keys and values stacked in one tensor; flex_attention", anyflow,
        calls=8, stable_from=7, exact=True, ratio=2.5,
    ),
    Client(
        "Wan-Animate-2", "WanAnimate2KVCache", "a fixed past, scattered into a buffer; flex_attention", wan_animate,
        compiled="blocks", exact=True,
    ),
]  # fmt: skip
