"""Tile shapes and thresholds per architecture: fixed tables, keyed on nothing that changes from call to call.

No autotuning: a length-keyed tuner would recompile as a cache grows, and a tuner at all would time kernels in the
middle of a CUDA-graph capture. The numbers are static choices (registers, shared memory, occupancy, instruction counts
of `inspector`), made without a GPU; `bench_gpu` is how to check them on one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from .triton_attention import Meta

SLAB_BYTES = 64 * 2**20
"""Most scratch the unpack-once path holds: a slab of heads that stays near the second-level cache while it is read."""

MAX_FUSED_RANGES = 4
"""Token ranges the fused kernel resolves by itself; more go through unpack-once, one launch per range."""

MAX_SPLITS = 64

MAX_MOVE_STEPS = 64
"""How often a program may go on by the distance of a move, which it does one step after the other (`triton_move`)."""

APPEND_BLOCK, DEQUANTIZE_BLOCK, MOVE_BLOCK = 16, 64, 64
"""Tokens per program; appending holds a program's tokens in registers, in float32."""

ROTATE_LANES = 2048
"""Channels per program of the rotation, several times over in registers where they are rounded, too."""


@dataclass(frozen=True)
class Architecture:
    """What the kernels are compiled for on one family of GPUs."""

    block_n: int = 64
    warps: int = 8
    stages: int = 2
    ptx: bool = True
    fence: bool = False  # mma.sync: keep the unpacking before the change to the operand's layout
    prepared: bool = False  # wgmma and tcgen05: operands straight from shared memory
    precision: str = "tf32x3"  # of float32 products
    shared_bytes: int = 99 * 2**10
    unpack_once_rows: int = 2048
    """Rows of one key/value head (queries × grouped heads) from which unpack-once wins, modelled: unpacking writes
    2·D·2 bytes per token once, and fused unpacking repeats its extra instructions in every 128-row block."""


ARCHITECTURES = {
    "sm_80": Architecture(stages=3, fence=True, shared_bytes=163 * 2**10, unpack_once_rows=2048),
    "sm_86": Architecture(block_n=32, fence=True, unpack_once_rows=4096),  # and 8.9: less shared memory
    "sm_90": Architecture(block_n=128, prepared=True, shared_bytes=227 * 2**10, unpack_once_rows=2048),
    "sm_100": Architecture(block_n=128, prepared=True, shared_bytes=227 * 2**10, unpack_once_rows=1024),
    "sm_120": Architecture(block_n=32, fence=True, unpack_once_rows=4096),
    "gfx942": Architecture(warps=4, ptx=False, precision="ieee", shared_bytes=64 * 2**10, unpack_once_rows=512),
    "gfx950": Architecture(warps=4, ptx=False, precision="ieee", shared_bytes=160 * 2**10, unpack_once_rows=512),
    "interpreter": Architecture(ptx=False, precision="ieee", unpack_once_rows=2048),
}


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Name in `ARCHITECTURES` of the table that fits a device; an unknown GPU gets its nearest older relative's."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return name if name in ARCHITECTURES else "gfx942"
    capability = torch.cuda.get_device_capability(device)
    known = (((12, 0), "sm_120"), ((10, 0), "sm_100"), ((9, 0), "sm_90"), ((8, 6), "sm_86"))
    return next((name for least, name in known if capability >= least), "sm_80")


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a device (1 in the interpreter, which has no use for splitting)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def eighth_lanes(head_dim: int) -> int:
    """head_dim / 8, padded to a power of two; see `triton_tiles`."""
    if head_dim % 8 or head_dim < 16:
        raise ValueError(f"head_dim is {head_dim}; the kernels need a multiple of 8, at least 16")
    return triton.next_power_of_2(head_dim // 8)


@functools.cache
def tile(architecture: str, head_dim: int, value_dim: int, rows: int, wide: bool) -> tuple[Meta, dict[str, int]]:
    """Tile shape and launch options; `rows` is the number of rows rounded up to a power of two, `wide` is float32."""
    arch = ARCHITECTURES[architecture]
    lanes = 8 * max(eighth_lanes(head_dim), eighth_lanes(value_dim))
    block_m, block_n, warps, stages = 128, arch.block_n, arch.warps, arch.stages
    if wide:  # three products for one, operands twice as large
        block_m, block_n, stages = 32 if lanes <= 128 else 16, 32, 1
    elif lanes > 128:  # the accumulator takes half of the registers, or the queries do (mma.sync)
        block_m, block_n, stages = (128, 32, 2) if arch.prepared else (64, 32, 2) if warps == 4 else (32, 32, 2)
    elif lanes > max(head_dim, value_dim):  # padded head_dim: steps are chosen lane by lane
        block_n = min(block_n, 64)
    if architecture == "interpreter":
        block_m, block_n = 64, 64
    if rows < block_m:  # decode: few rows, many keys
        block_m, block_n = max(16, rows), min(block_n, 64)
        warps = 4 if lanes <= 128 else warps
    meta = Meta(
        BLOCK_M=block_m, BLOCK_N=block_n, HEAD_DIM=head_dim, VALUE_DIM=value_dim, KEY_EIGHTH=eighth_lanes(head_dim),
        VALUE_EIGHTH=eighth_lanes(value_dim), PTX=arch.ptx, FENCE=arch.fence, PRECISION=arch.precision,
    )  # fmt: skip
    return meta, {"num_warps": warps, "num_stages": stages}
