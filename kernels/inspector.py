"""Compile the Triton kernels for GPUs that are not here, and count what their machine code does.

    python -m jkv_compile.kernels.inspector [--targets sm_90 gfx942] [--kernels fused plain] [--output out/kernels.json]

Only the assembler and disassembler that the triton wheel carries are needed. `hot_loop_instructions` are counted per
warp and iteration, that is per (BLOCK_M, BLOCK_N) tile; `plain_ratio` compares them with the same kernel compiled
without a cache (plain flash attention) at the same tile and number of warps. Static counts are no times: they are what
can be held constant without a GPU, and what tests/kernels/test_budgets.py holds them to.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .triton_append import append_kernel
from .triton_attention import attention_kernel
from .triton_config import APPEND_BLOCK, ARCHITECTURES, DEQUANTIZE_BLOCK, MOVE_BLOCK, ROTATE_LANES, eighth_lanes, tile
from .triton_correction import prepare_kernel
from .triton_dequantize import dequantize_kernel
from .triton_merge import merge_kernel
from .triton_move import move_kernel
from .triton_rotate import rotate_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}

SHOWN = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@dataclass(frozen=True)
class Record:
    """Static facts of one kernel on one target."""

    kernel: str
    target: str
    registers: int  # per thread; on AMD both kinds, accumulation registers included
    spills: int
    shared_bytes: int
    hot_loop_instructions: int
    mma: int  # matrix instructions in the hot loop
    plain_ratio: float | None  # hot-loop instructions over those of "plain" on the same target
    warps: int
    occupancy: int  # warps that a multiprocessor or compute unit can hold
    mix: dict[str, int]  # hot-loop instructions by kind


def compile_for(target: GPUTarget, kernel: Any, signature: dict[str, Any], constants: dict[str, Any], **options: int):
    """Ahead-of-time compilation as the JIT would specialise: pointers and strides are multiples of 16.

    signature: argument to type, `"i32"` or `"*fp16"`; tuples for tuple arguments. A stride is any name with "stride".
    """
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = [["tt.divisibility", 16]]
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        if "strides" in name:
            if len(types[name]) == 4 and name != "output_strides":  # the last is 1, which the JIT makes a constant
                constants = {**constants, (i, 3): 1}  # type: ignore[dict-item]
                types[name] = (*types[name][:3], "constexpr")
            attributes |= {(i, j): aligned for j, kind in enumerate(types[name]) if kind == "i32"}
        elif isinstance(types[name], str) and types[name].startswith("*"):
            attributes[(i,)] = aligned
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_NVIDIA_KINDS = [  # the first match wins
    ("mma", r"(HMMA|IMMA|QMMA|OMMA|WGMMA|HGMMA|IGMMA|QGMMA|UTC[A-Z0-9]*MMA)"),
    ("shared_load", r"LDSM|LDS\b|LDTM"),
    ("shared_store", r"STS|STTM"),
    ("async_copy", r"LDGSTS|UTMALDG|UBLKCP"),
    ("global", r"LDG(?!DEPBAR)|STG|LD\.|ST\."),
    ("local", r"LDL|STL"),
    ("exp2", r"MUFU"),
    ("shuffle", r"SHFL"),
    ("barrier", r"BAR|LDGDEPBAR|SYNCS|DEPBAR|WARPSYNC|WARPGROUP|FENCE|ARRIVES"),
    ("max", r"FMNMX|FSETP|FSEL"),
    ("float32", r"FFMA|FMUL|FADD"),
    ("float16", r"HFMA2|HMUL2|HADD2|HMNMX2"),
    ("convert", r"F2F|I2F|F2I|F2FP|I2IP"),
    ("move", r"MOV|CS2R|R2UR|S2R|S2UR|UMOV"),
    ("uniform", r"U[A-Z]"),
    ("branch", r"BRA|BSSY|BSYNC|EXIT|NOP|CALL|RET"),
    ("integer", r"."),
]
_AMD_KINDS = [
    ("mma", r"v_mfma|v_smfma"),
    ("shared", r"ds_"),
    ("global", r"buffer_|global_|flat_"),
    ("exp2", r"v_exp"),
    ("scalar", r"s_"),
    ("vector", r"."),
]


def _count(opcodes: Iterable[str], kinds: list[tuple[str, str]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for opcode in opcodes:
        kind = next(name for name, pattern in kinds if re.match(pattern, opcode))
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _loops(
    instructions: list[tuple[str, str | None]], labels: dict[str, int], kinds: list[tuple[str, str]]
) -> list[list[str]]:
    """Opcodes of every innermost loop that holds a matrix instruction; instructions are (opcode, branch target)."""
    spans = [
        (labels[target], i)
        for i, (_, target) in enumerate(instructions)
        if target is not None and labels.get(target, i + 1) <= i
    ]
    bodies = {(a, b): [opcode for opcode, _ in instructions[a : b + 1]] for a, b in spans}
    matrix = dict(kinds)["mma"]
    with_mma = {span for span, body in bodies.items() if any(re.match(matrix, opcode) for opcode in body)}
    innermost = [s for s in with_mma if not any(o != s and o[0] >= s[0] and o[1] <= s[1] for o in with_mma)]
    return [bodies[span] for span in sorted(innermost)]


def _inspect_nvidia(compiled: Any) -> tuple[int, int, list[list[str]]]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    matches = list(_INSTRUCTION.finditer(code))
    labels = {str(int(m[1], 16)): i for i, m in enumerate(matches)}
    instructions = []
    for match in matches:
        jump = re.search(r"0x([0-9a-f]+)", match[3]) if match[2].startswith("BRA") else None
        instructions.append((match[2], str(int(jump[1], 16)) if jump else None))
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    spills = sum(opcode.startswith(("LDL", "STL")) for opcode, _ in instructions)
    return registers, spills, _loops(instructions, labels, _NVIDIA_KINDS)


def _inspect_amd(compiled: Any) -> tuple[int, int, list[list[str]]]:
    code = compiled.asm["amdgcn"]
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str | None]] = []
    for line in map(str.strip, code.splitlines()):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"[sv]_|ds_|buffer_|global_|flat_", line):
            opcode, _, operands = line.partition(" ")
            jump = re.match(r"\s*(\.L\w+)", operands) if opcode.startswith(("s_cbranch", "s_branch")) else None
            instructions.append((opcode, jump[1] if jump else None))
    registers, spills = (
        int((re.search(rf"\.{key}\s*:?\s*(\d+)", code) or [0, 0])[1]) for key in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, spills, _loops(instructions, labels, _AMD_KINDS)


def occupancy(target: str, registers: int, shared_bytes: int, warps: int) -> int:
    """Warps that one multiprocessor (compute unit) holds of a kernel, by its registers and shared memory."""
    by_shared = ARCHITECTURES[target].shared_bytes // max(shared_bytes, 1)
    if target.startswith("gfx"):  # four SIMDs with 512 registers per lane each, allocated by eights
        by_registers = 4 * (512 // max(8, math.ceil(registers / 8) * 8)) // warps
        return warps * min(by_registers, by_shared, 32 // warps)
    by_registers = 65536 // (math.ceil(max(registers, 1) / 8) * 8 * 32 * warps)
    return warps * min(by_registers, by_shared, 48 // warps)


def inspect(compiled: Any, name: str, target: str) -> Record:
    """Facts of a compiled kernel; the hot loop is its first loop that holds matrix instructions."""
    amd = "amdgcn" in compiled.asm
    registers, spills, loops = (_inspect_amd if amd else _inspect_nvidia)(compiled)
    hot = loops[0] if loops else []
    mix = _count(hot, _AMD_KINDS if amd else _NVIDIA_KINDS)
    return Record(
        kernel=name, target=target, registers=registers, spills=spills, shared_bytes=compiled.metadata.shared,
        hot_loop_instructions=len(hot), mma=mix.get("mma", 0), plain_ratio=None, warps=compiled.metadata.num_warps,
        occupancy=occupancy(target, registers, compiled.metadata.shared, compiled.metadata.num_warps), mix=mix,
    )  # fmt: skip


_STRIDES = {
    "query_strides": 3, "prepared_strides": 2, "key_store_strides": 3, "key_scale_strides": 3, "value_store_strides": 3,
    "value_scale_strides": 3, "bias_strides": 3, "key_strides": 3, "value_strides": 3, "mask_strides": 4,
    "output_strides": 4, "lse_strides": 2, "key_code_strides": 3, "value_code_strides": 3,
    "code_strides": 3, "scale_strides": 3, "source_strides": 4, "target_strides": 4,
}  # fmt: skip


def _signature(kernel: Any, **types: Any) -> dict[str, Any]:
    """Argument types: strides are tuples, names with `p_` are pointers (bfloat16 unless said), others are integers."""
    signature: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in _STRIDES:
            signature[name] = ("i32",) * _STRIDES[name]
        else:
            signature[name] = "*bf16" if name.startswith("p_") else "i32"
    return signature | {"softmax_scale": "fp32"} | types


def _compile_attention(
    target: str,
    rows: int = 8192,
    head_dim: int = 128,
    group: int = 32,
    dtype: str = "*bf16",
    words: str = "*i32",
    **meta: Any,
):
    table, options = tile(target, head_dim, head_dim, rows, dtype == "*fp32")
    groups = head_dim // group
    table = table._replace(
        KEY_GROUPS=groups, VALUE_GROUPS=groups, COLUMNS=max(16, 2 * triton.next_power_of_2(groups)), **meta
    )
    table = table._replace(PREPARED=ARCHITECTURES[target].prepared and table.CACHED != "none" and table.BLOCK_M >= 64)
    store, scales = ("*fp16", "*fp16") if table.CACHED == "dense" else ("*u8", words)
    signature = _signature(
        attention_kernel, p_query=dtype, p_key=dtype, p_value=dtype,
        p_key_store=store, p_value_store=store, p_key_scales=scales, p_value_scales=scales,
        p_prepared="*fp16", p_bias="*fp32", p_mask="*u8", p_output="*fp32" if table.SPLIT else dtype, p_lse="*fp32",
    )  # fmt: skip
    return compile_for(TARGETS[target], attention_kernel, signature, {"META": table}, **options)


def _compile_append(
    target: str, kernel: Any = append_kernel, head_dim: int = 128, words: str = "*i32", **constants: int
):
    constants = {
        "BLOCK": APPEND_BLOCK if kernel is append_kernel else DEQUANTIZE_BLOCK, "KEY_BITS": 2,
        "KEY_GROUPS": head_dim // 32, "HEAD_DIM": head_dim,
        "KEY_EIGHTH": eighth_lanes(head_dim), "VALUE_BITS": 2, "VALUE_GROUPS": head_dim // 32, "VALUE_DIM": head_dim,
        "VALUE_EIGHTH": eighth_lanes(head_dim), "KEY_TOKEN_BLOCK": 1, "VALUE_TOKEN_BLOCK": 1, **constants,
    }  # fmt: skip
    types: dict[str, Any] = dict.fromkeys(("p_key_codes", "p_value_codes"), "*u8")
    types |= dict.fromkeys(("p_key_scales", "p_value_scales"), words)
    if kernel is append_kernel:
        types |= dict.fromkeys(("key_strides", "value_strides"), ("i32",) * 4)
    else:
        types |= dict.fromkeys(("p_key", "p_value", "p_columns"), "*fp16")
    return compile_for(TARGETS[target], kernel, _signature(kernel, **types), constants, num_warps=4)


def _compile_dequantize(target: str):
    return _compile_append(target, dequantize_kernel, COLUMNS=16)


def _compile_prepare(target: str):
    constants = {"BLOCK_M": 64, "HEAD_DIM": 128, "EIGHTH_PADDED": 16, "GROUPS": 4, "COLUMNS": 16}
    signature = _signature(prepare_kernel, p_prepared="*fp16")
    return compile_for(TARGETS[target], prepare_kernel, signature, constants, num_warps=4)


def _compile_merge(target: str):
    pointers = dict.fromkeys(("p_partial", "p_partial_lse", "p_lse"), "*fp32")
    signature = _signature(merge_kernel, **pointers, output_strides=("i32",) * 3)
    constants = {"VALUE_DIM": 128, "LANES": 128, "BLOCK_M": 16}
    return compile_for(TARGETS[target], merge_kernel, signature, constants, num_warps=4)


def _compile_move(target: str):
    signature = _signature(move_kernel, p_codes="*u8", p_scales="*i32")
    constants = {"WIDTH": 32, "WIDTH_PADDED": 32, "GROUPS": 4, "GROUPS_PADDED": 4, "TOKEN_BLOCK": 1}
    constants["BLOCK"] = MOVE_BLOCK
    return compile_for(TARGETS[target], move_kernel, signature, constants, num_warps=4)


def _compile_rotate(
    target: str, head_dim: int = 128, group: int = 64, dtype: str = "*bf16", BITS: int = 2, symmetric: bool = False
):
    lanes = triton.next_power_of_2(head_dim)
    constants = {
        "BLOCK": ROTATE_LANES // lanes, "HEAD_DIM": head_dim, "LANES": lanes,
        "ORDER": head_dim & -head_dim, "BITS": BITS, "GROUP": group, "LIMIT": 1.494 if BITS else 0.0,
        "SYMMETRIC": symmetric,
    }  # fmt: skip
    signature = _signature(rotate_kernel, p_source=dtype, p_target="*fp32" if BITS else dtype)
    return compile_for(TARGETS[target], rotate_kernel, signature, constants, num_warps=4)


_FUSED: dict[str, Any] = {"CACHED": "packed", "CORRECTION": "taylor"}
_DENSE: dict[str, Any] = {"CACHED": "dense", "CORRECTION": "taylor"}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (_compile_attention, {}),  # the yardstick: flash attention in bfloat16, written the same way
    "fused": (_compile_attention, _FUSED),
    "unpack_once": (_compile_attention, _DENSE),
    "append_kv": (_compile_append, {}),
    "append_kv_per_channel": (_compile_append, {"KEY_GROUPS": 128, "KEY_TOKEN_BLOCK": 32}),
    "move": (_compile_move, {}),
    "rotate": (_compile_rotate, {"BITS": 0}),
    "round_unbiased": (_compile_rotate, {}),
    "dequantize": (_compile_dequantize, {}),
    "prepare": (_compile_prepare, {}),
    "merge": (_compile_merge, {}),
    "decode": (_compile_attention, {**_FUSED, "rows": 16, "SPLIT": True, "GROUPED": True}),
}
"""What `make kernels` shows: head_dim 128, 2 bits, group size 32 (per channel: blocks of 32 tokens)."""

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fused_3_bits": (_compile_attention, {**_FUSED, "KEY_BITS": 3, "VALUE_BITS": 3, "BLOCK_N": 64}),
    "fused_4_bits": (_compile_attention, {**_FUSED, "KEY_BITS": 4, "VALUE_BITS": 4}),
    "fused_8_bits": (_compile_attention, {**_FUSED, "KEY_BITS": 8, "VALUE_BITS": 8}),
    "fused_group_64": (_compile_attention, {**_FUSED, "group": 64}),
    "fused_group_128": (_compile_attention, {**_FUSED, "group": 128}),
    "fused_symmetric": (_compile_attention, {**_FUSED, "group": 64, "words": "*i16"}),
    "fused_head_dim_64": (_compile_attention, {**_FUSED, "head_dim": 64}),
    "fused_head_dim_96": (_compile_attention, {**_FUSED, "head_dim": 96}),
    "fused_head_dim_256": (_compile_attention, {**_FUSED, "head_dim": 256}),
    "fused_float32": (_compile_attention, {**_FUSED, "dtype": "*fp32"}),
    "fused_float32_head_dim_256": (_compile_attention, {**_FUSED, "dtype": "*fp32", "head_dim": 256}),
    "fused_causal": (_compile_attention, {**_FUSED, "CAUSAL": True}),
    "fused_mask": (_compile_attention, {**_FUSED, "MASK": "boolean", "BLOCK_N": 64}),
    "fused_two_ranges": (_compile_attention, {**_FUSED, "RANGES": 2}),
    "fused_exact": (_compile_attention, {**_FUSED, "CORRECTION": "exact"}),
    "fused_clamped": (_compile_attention, {**_FUSED, "CLAMPED": True}),
    "unpack_once_clamped": (_compile_attention, {**_DENSE, "CLAMPED": True}),
    "unpack_once_head_dim_64": (_compile_attention, {**_DENSE, "head_dim": 64}),
    "unpack_once_head_dim_256": (_compile_attention, {**_DENSE, "head_dim": 256}),
    "unpack_once_causal": (_compile_attention, {**_DENSE, "CAUSAL": True}),
    "decode_head_dim_256": (_compile_attention, {**_FUSED, "rows": 16, "head_dim": 256, "SPLIT": True}),
    "round_unbiased_float32": (_compile_rotate, {"dtype": "*fp32"}),
    "round_unbiased_head_dim_96": (_compile_rotate, {"head_dim": 96, "group": 32}),
    "round_unbiased_head_dim_256": (_compile_rotate, {"head_dim": 256}),
    "append_kv_3_bits": (_compile_append, {"KEY_BITS": 3}),
    "append_kv_head_dim_96": (_compile_append, {"head_dim": 96}),
    "append_kv_symmetric": (_compile_append, {"words": "*i16"}),
    "round_unbiased_symmetric": (_compile_rotate, {"symmetric": True}),
}
"""Shown with `--all`."""


JITTED = (attention_kernel, append_kernel, dequantize_kernel, prepare_kernel, merge_kernel, move_kernel, rotate_kernel)


def examine(name: str, target: str) -> Record:
    """Compile one kernel of `KERNELS` or `VARIANTS` for one target, and count."""
    compile_kernel, arguments = (KERNELS | VARIANTS)[name]
    return inspect(compile_kernel(target, **arguments), name, target)


def examine_all(names: Sequence[str], targets: Sequence[str], workers: int | None = None) -> list[Record]:
    """Records of all named kernels on all targets, with their ratio to "plain" where that is among them."""
    pairs = [(name, target) for target in targets for name in names]
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        records = list(pool.map(examine, *zip(*pairs)))
    plain = {r.target: r.hot_loop_instructions for r in records if r.kernel == "plain"}
    return [
        replace(r, plain_ratio=round(r.hot_loop_instructions / plain[r.target], 4))
        if r.hot_loop_instructions and r.kernel in ("plain", "fused", "unpack_once") and plain.get(r.target)
        else r
        for r in records
    ]


def table(records: Iterable[Record]) -> str:
    """The records as text."""
    head = ("kernel", "target", "warps", "registers", "spills", "shared", "occupancy", "hot loop", "mma", "ratio")
    rows = [
        (r.kernel, r.target, r.warps, r.registers, r.spills, r.shared_bytes, r.occupancy,
         r.hot_loop_instructions or "-", r.mma or "-", f"{r.plain_ratio:.3f}" if r.plain_ratio else "-")
        for r in records
    ]  # fmt: skip
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(str(cell).rjust(width) for cell, width in zip(row, widths)) for row in [head, *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jkv_compile.kernels.inspector", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(SHOWN))
    parser.add_argument("--kernels", nargs="+", choices=[*KERNELS, *VARIANTS], default=list(KERNELS))
    parser.add_argument("--all", action="store_true", help="bit widths, head_dims, masks and more besides")
    parser.add_argument("--output", type=Path, default=Path("out/kernels.json"))
    options = parser.parse_args(arguments)
    records = examine_all([*KERNELS, *VARIANTS] if options.all else options.kernels, options.targets)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps([asdict(r) for r in records], indent=1) + "\n")
    print(table(records))
    print(f"\ntriton {triton.__version__}; hot loop: instructions per warp and tile; {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
