"""Which CPU kernels run: the C++ ones of `cpu_cpp` where they can be built and compute the right thing, or `cpu_torch`.

`JKV_CPU_KERNEL=cpp` insists on the former (an error if they cannot be had), `JKV_CPU_KERNEL=torch` on the latter. The
choice is made at the first call and logged once. From then on the operators of `ops` reach the C++ kernels without
Python, and these functions only for what those do not take.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
from torch import Tensor

from . import cpu_torch
from .cpu_cpp import BuildError, Kernels, load

logger = logging.getLogger(__name__)


@functools.cache
def kernels() -> Kernels | None:
    """The C++ kernels, or None where the pure-torch ones are used.

    Raises:
        ValueError: JKV_CPU_KERNEL is neither "cpp" nor "torch".
        BuildError: JKV_CPU_KERNEL=cpp, and they cannot be built, loaded or trusted here.
    """
    choice = os.environ.get("JKV_CPU_KERNEL", "")
    if choice not in ("", "cpp", "torch"):
        raise ValueError(f"JKV_CPU_KERNEL is {choice!r}; expected 'cpp' or 'torch', or unset to choose automatically")
    if choice == "torch":
        logger.info("CPU kernels: pure torch, as JKV_CPU_KERNEL asks")
        return None
    try:
        loaded = load()
        loaded.install()
    except BuildError as error:
        if choice == "cpp":
            raise
        logger.warning("CPU kernels: pure torch, several times slower than the C++ ones (%s)", error)
        return None
    logger.info("CPU kernels: C++, %s products", loaded.products)
    return loaded


def _run(name: str, *arguments: Any) -> Any:
    """By the C++ kernel, where it takes these arguments."""
    cpp = kernels()
    if cpp is not None:
        try:
            return getattr(cpp, name)(*arguments)
        except NotImplementedError:
            pass
    return getattr(cpu_torch, name)(*arguments)


def append(codes: Tensor, scales: Tensor, source: Tensor, start: int, bits: int) -> None:
    """As `ops.append`."""
    _run("append", codes, scales, source, start, bits)


def move(codes: Tensor, scales: Tensor, source: int, destination: int, length: int) -> None:
    """As `ops.move`."""
    _run("move", codes, scales, source, destination, length)


def dequantize(codes: Tensor, scales: Tensor, start: int, stop: int, bits: int, dtype: torch.dtype) -> Tensor:
    """As `ops.dequantize`."""
    return _run("dequantize", codes, scales, start, stop, bits, dtype)


def attention(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    ranges: list[int],
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    key_bits: int,
    value_bits: int,
    correction: str,
) -> tuple[Tensor, Tensor]:
    """As `ops.attention`; also returns the log-sum-exp `[B, H, L]` in float32.

    The C++ kernel knows "none", "taylor" and "clamped"; "exact", which costs head_dim operations for every score,
    takes the torch path. bfloat16 and float16 queries are multiplied in bfloat16 with float32 sums (relative error
    about 3e-3 to 5e-3), or cached keys and values as integers (2e-3), float32 queries in float32 (1e-6).
    """
    arguments = (
        query, key_codes, key_scales, value_codes, value_scales, ranges, key, value, mask, causal, scale, key_bits,
        value_bits, correction,
    )  # fmt: skip
    return _run("attention", *arguments)
