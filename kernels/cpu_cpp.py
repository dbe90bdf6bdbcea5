"""Builds, checks and calls the C++ kernels of `cpu_attention.cpp`.

The library is compiled once per source, flags, compiler, processor and torch version into a cache folder
(`JKV_CACHE_DIR`, else `$XDG_CACHE_HOME/jkv_compile`, else `~/.cache/jkv_compile`; a temporary folder where that is not
writable). It is built under a temporary name and renamed, so processes that start together may all build it, and none
sees half a file. `main` builds it ahead of time, when the package is installed.

The kernels call torch's `brgemm`, which is no public API: `load` compares them with `reference` before they are used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import reference

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_attention.cpp")
FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC",
    # Allowed to assume: nobody reads errno, traps, or the sign of zero. Not that NaN and infinity do not occur.
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
)  # fmt: skip
X86_FLAGS = ("-mprefer-vector-width=512",)

FEW_ROWS = 16
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.bool: 3}  # as `enum Dtype`


class BuildError(RuntimeError):
    """The C++ kernels cannot be built, loaded or trusted here."""


@functools.cache
def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if found := shutil.which(name):
            return found
    raise BuildError("no C++ compiler found (CXX, g++, clang++ or c++ on PATH)")


def cache_folder() -> Path:
    if folder := os.environ.get("JKV_CACHE_DIR"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jkv_compile"


def library_path() -> Path:
    """Where the compiled library of this source, compiler, processor and torch belongs."""
    # The compiler is no part of the key: a machine without one may use what was built when there was one.
    key = "\n".join((SOURCE.read_text(), *FLAGS, *X86_FLAGS, _processor(), torch.__version__))
    return cache_folder() / f"cpu_attention-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def _compile(target: Path) -> None:
    root = Path(torch.__file__).parent
    flags = FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())
    command = [
        _compiler(), *flags, str(SOURCE), "-o", str(target), f"-I{root / 'include'}", f"-L{root / 'lib'}",
        "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}",
    ]  # fmt: skip
    logger.info("compiling the CPU kernels: %s", " ".join(command))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"compiling {SOURCE.name} failed: {result.stderr.strip()[-2000:]}")


def build() -> Path:
    """Path of the compiled library, compiling it if it is not there yet.

    Raises:
        BuildError: no compiler, or it failed.
    """
    target = library_path()
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=".tmp")
    except OSError as error:
        logger.info("cannot write to %s (%s): building in a temporary folder", target.parent, error)
        handle, name = tempfile.mkstemp(prefix=target.stem, suffix=".so")
        target = Path(name)
    os.close(handle)
    try:
        _compile(Path(name))
        os.chmod(name, 0o755)
        if Path(name) != target:
            os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


@functools.cache
def load() -> Kernels:
    """The kernels, built if need be, once they have shown on a small example that they compute the right thing here.

    Raises:
        BuildError: they cannot be built, loaded or trusted.
    """
    path = build()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}") from error
    if path.parent != cache_folder():
        path.unlink()  # a temporary file; what is mapped stays
    kernels = Kernels(library)
    kernels.choose_products()
    return kernels


class Kernels:
    """The loaded library.

    Attributes:
        half_precision: whether bf16 products work here; if not, everything runs in float32.
        few_rows: up to how many query rows per key/value head take the path with integer products; 0 where those fail.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attention, self._append, self._dequantize, self._move = (
            getattr(library, f"jkv_{name}") for name in ("attention", "append", "dequantize", "move")
        )
        self._attention.argtypes = (ctypes.c_void_p, ctypes.c_double)
        for function in (self._append, self._dequantize, self._move):
            function.argtypes = (ctypes.c_void_p,)
        self.few_rows, self.half_precision = FEW_ROWS, True

    def choose_products(self) -> None:
        """Find out by example which products work here, and keep to those.

        Raises:
            BuildError: not even the float32 ones do.
        """
        self.few_rows, self.half_precision = FEW_ROWS, True
        if not self.agrees_with_reference(torch.bfloat16):
            self.few_rows = 0
            self.half_precision = self.agrees_with_reference(torch.bfloat16)
        if not self.agrees_with_reference(torch.float32):
            raise BuildError(f"{SOURCE.name}, as compiled, does not compute what the reference does on this machine")

    def agrees_with_reference(self, dtype: torch.dtype) -> bool:
        """A numeric probe with every kind of product and both phases. Leaves torch's random state alone."""
        generator = torch.Generator().manual_seed(0)
        source = torch.randn(1, 1, 200, 64, generator=generator)
        codes, scales = reference.quantize(source, 2, 32)
        mine, my_scales = torch.empty_like(codes), torch.empty_like(scales)
        query = torch.randn(1, 1, 40, 64, generator=generator).to(dtype)
        key = torch.randn(1, 1, 9, 64, generator=generator).to(dtype)
        for length in (1, 40):
            rows = query[:, :, :length]
            arguments = (rows, codes, scales, codes, scales, [0, 200], key, key, None, False, 0.125, 2, 2, "taylor")
            try:
                self.append(mine, my_scales, source, 0, 2)
                output, _ = self.attention(*arguments)
            except RuntimeError:
                return False
            expected, _ = reference.attention(*arguments)
            error = (output.float() - expected).norm() / expected.norm()
            if not (error < (1e-4 if dtype == torch.float32 else 2e-2) and torch.equal(mine, codes)):
                return False
        return True

    @staticmethod
    def supports_cache(codes: Tensor, scales: Tensor, bits: int) -> bool:
        """Planes must be whole 32-bit words, and the bytes of a token lie together."""
        head_dim = codes.shape[3] * 8 // bits
        words = head_dim % (32 if bits == 3 else 32 // bits) == 0 and head_dim <= 1024
        return words and codes.stride(3) == 1 and scales.stride(4) == 1

    @classmethod
    def supports_append(cls, codes: Tensor, scales: Tensor, bits: int) -> bool:
        """One pair of scales per token."""
        return scales.shape[3] == codes.shape[2] and cls.supports_cache(codes, scales, bits)

    @classmethod
    def supports_attention(
        cls,
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
    ) -> bool:
        """Whether `attention` takes these arguments; there must be a query and a key."""
        return (
            correction in ("none", "taylor")
            and scale > 0
            and cls.supports_cache(key_codes, key_scales, key_bits)
            and cls.supports_cache(value_codes, value_scales, value_bits)
            and query.dtype == key.dtype == value.dtype
            and query.dtype in DTYPES
            and (mask is None or mask.dtype in DTYPES)
            and query.numel() > 0
            and (key.shape[2] > 0 or any(a < b for a, b in zip(ranges[::2], ranges[1::2])))
        )

    def attention(
        self,
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
        """As `ops.attention` for "none" and "taylor"; also returns the log-sum-exp `[B, H, L]` in float32."""
        batch, heads, length, head_dim = query.shape
        query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
        dtype = DTYPES[query.dtype]
        output = query.new_empty((batch, length, heads, value.shape[3]))
        lse = torch.empty((batch, heads, length), dtype=torch.float32)
        mask_arguments: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
        columns = key.shape[2] + sum(ranges[1::2]) - sum(ranges[::2])
        if mask is not None:
            mask = mask.expand(batch, heads, length, columns)
            mask_arguments = (mask.data_ptr(), DTYPES[mask.dtype], *mask.stride())
        arguments = (
            query.data_ptr(), *query.stride()[:3], dtype, batch, heads, length,
            *_packed(key_codes, key_scales, key_bits, head_dim),
            *_packed(value_codes, value_scales, value_bits, value.shape[3]),
            key.data_ptr(), *key.stride()[:3], value.data_ptr(), *value.stride()[:3], key.shape[1], key.shape[2],
            *mask_arguments, causal, correction == "taylor", output.data_ptr(), lse.data_ptr(),
            dtype == 0 or not self.half_precision, self.few_rows, _threads(query.numel() * columns // 64),
            len(ranges) // 2, *ranges,
        )  # fmt: skip
        if self._attention((ctypes.c_int64 * len(arguments))(*arguments), scale):
            raise RuntimeError("jkv: torch's brgemm failed in the CPU attention kernel; set JKV_CPU_KERNEL=torch")
        return output.transpose(1, 2), lse

    def append(self, codes: Tensor, scales: Tensor, source: Tensor, start: int, bits: int) -> None:
        """As `ops.append`."""
        batch, heads, tokens, head_dim = source.shape
        source = source if source.stride(3) == 1 else source.contiguous()
        _run(self._append, (
            *_packed(codes, scales, bits, head_dim), source.data_ptr(), *source.stride()[:3], DTYPES[source.dtype],
            batch, heads, tokens, start, _threads(source.numel()),
        ))  # fmt: skip

    def dequantize(self, codes: Tensor, scales: Tensor, start: int, stop: int, bits: int, dtype: torch.dtype) -> Tensor:
        """As `ops.dequantize`."""
        batch, heads, _, width = codes.shape
        output = codes.new_empty((batch, heads, stop - start, width * 8 // bits), dtype=dtype)
        _run(self._dequantize, (
            *_packed(codes, scales, bits, width * 8 // bits), output.data_ptr(), DTYPES[dtype],
            batch, heads, stop - start, start, _threads(output.numel()),
        ))  # fmt: skip
        return output

    def move(self, codes: Tensor, scales: Tensor, source: int, destination: int, length: int) -> None:
        """As `ops.move`; one pair of scales per token."""
        batch, heads, _, width = codes.shape
        _run(self._move, (
            *_packed(codes, scales, 8, width), batch, heads, source, destination, length,
            _threads(batch * heads * length * width),
        ))  # fmt: skip


def _run(function: Callable[..., int], arguments: Sequence[int]) -> None:
    if function((ctypes.c_int64 * len(arguments))(*arguments)):
        raise RuntimeError("jkv: a CPU kernel failed; JKV_CPU_KERNEL=torch selects the pure-torch path")


def _threads(elements: int) -> int:
    """Waking a thread takes as long as a few thousand elements."""
    return 1 if elements < 32768 else torch.get_num_threads()


def _packed(codes: Tensor, scales: Tensor, bits: int, head_dim: int) -> tuple[int, ...]:
    """The fields of `struct Packed`."""
    return (
        codes.data_ptr(), *codes.stride()[:3], scales.data_ptr(), *scales.stride()[:4], bits, scales.shape[2], head_dim,
        codes.shape[2] // scales.shape[3],
    )  # fmt: skip


def main() -> None:
    """Build ahead of the first call, where there is a compiler."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logger.info("CPU kernels: %s", build())
    except BuildError as error:
        logger.info("CPU kernels: pure torch will be used (%s)", error)
