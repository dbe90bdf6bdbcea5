"""Packed caches beside the plain tensors that they were made from, and how far the two may differ."""

from __future__ import annotations

import torch
from torch import Tensor

from jkv_compile import Config, PackedKV, materialize
from jkv_compile.adopt import adopt
from jkv_compile.kernels.quantizers import grid_of

AXES = {"bshd": (0, 2, 1, 3), "bhsd": (0, 1, 2, 3)}  # dimension of (batch, head, token, channel)
ROUNDING = 2.0**-11  # relative error of a float16
GROUP = 32


def new_cache(
    layout: str = "bshd",
    bits: int = 8,
    batch: int = 2,
    tokens: int = 16,
    heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    quantizer: str = "rtn",
    **window: int,
) -> tuple[Tensor, Tensor]:
    """A packed cache of random numbers, and the plain tensor it was made from; `window` is sink and recent."""
    sizes = {"b": batch, "s": tokens, "h": heads, "d": head_dim}
    plain = torch.randn([sizes[axis] for axis in layout]).to(dtype)
    cache = plain.clone()
    config = Config(bits=bits, group_size=GROUP, **window)
    adopt(cache, AXES[layout], bits, config, quantizer=quantizer, centered=bool(config.center))
    assert isinstance(cache, PackedKV)
    return cache, plain


def error_bound(x: Tensor, bits: int, quantizer: str = "rtn") -> Tensor:
    """How far dequantized values may lie from `x`, whose last dimension is head_dim; float64, of x's shape.

    Rounding to the grid costs Δ/2. The grid itself is off by the float16 rounding of the zero point, and its far end by
    that of the step as well: u·|low - step'| and u·range, with u = 2^-11 and step' = range · 2^b / (2^b - 1).
    A symmetric range is from minus to plus the greatest magnitude.
    """
    order = torch.arange(x.shape[-1])  # of the stored channels
    if pairs := grid_of(quantizer).pairs:
        order = order.view(-1, 2, pairs // GROUP, GROUP // 2).transpose(1, 2).flatten()
    groups = x.double()[..., order].unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    if grid_of(quantizer).symmetric:
        low, high = -groups.abs().amax(-1), groups.abs().amax(-1)
    extent = high - low
    step = extent * 2**bits / (2**bits - 1)
    delta = step / 2**bits * (1 + ROUNDING)
    bound = delta / 2 + ROUNDING * ((low - step).abs() + extent) + 2.0**-24
    return bound.repeat_interleave(GROUP, -1)[..., order.argsort()] * (1 + 1e-5)  # float32 arithmetic


def assert_agrees(cache: Tensor, plain: Tensor, bits: int = 8) -> None:
    """A packed cache (or a result of one) holds the plain tensor's values, each quantized once."""
    assert cache.shape == plain.shape
    assert cache.dtype == plain.dtype
    error = (materialize(cache).double() - plain.double()).abs()
    bound = error_bound(plain, bits, cache._store.quantizer if isinstance(cache, PackedKV) else "rtn")
    if plain.dtype != torch.float32:
        bound = bound + plain.double().abs() * torch.finfo(plain.dtype).eps
    assert (error <= bound).all(), f"worst error is {(error / bound).max():.2f} times the bound"


def packed_data(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of a packed view's codes `[b, h, n, W]` and scales `[b, h, G, n, 2]`, or `[b, h, G, n, 1]`."""
    assert isinstance(cache, PackedKV)
    window = cache.window()
    codes, scales = cache._store._whole_box(window.starts, window.lengths)
    return codes.clone(), scales.clone()


def assert_held_exactly(cache: Tensor, plain: Tensor) -> list[int]:
    """Whatever a packed cache says that it holds in full precision is what a plain tensor has; returns which tokens.

    plain: `[B, H, S, D]`.
    """
    assert isinstance(cache, PackedKV)
    store = cache._store
    if store.held is None:
        return []
    out = torch.full(store.shape, torch.nan, dtype=store.dtype)
    store.held.put_over(out, (0, 0, 0, 0))
    known = ~out.isnan()
    assert torch.equal(out[known], plain.to(store.dtype)[known])
    step = store.quantization_step((0, 0, 0, 0), store.shape)
    assert not (step * known[..., :1]).any()  # and is not corrected
    return known.all(3).all(1).all(0).nonzero().flatten().tolist()


def assert_same_bits(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """Codes, steps and zero points are equal bit for bit."""
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1].view(torch.int16), other[1].view(torch.int16))
