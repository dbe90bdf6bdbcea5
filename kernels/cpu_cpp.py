"""Builds, checks and installs the C++ kernels: the `cpu_*.cpp` beside this file.

The library is compiled once per source, flags, processor and torch version into a cache folder
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
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from . import quantizers, reference

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = {  # and how hard to optimise: torch's headers are long, and calls are short
    FOLDER / "cpu_attention.cpp": "-O3",
    FOLDER / "cpu_store.cpp": "-O3",
    FOLDER / "cpu_round.cpp": "-O3",
    FOLDER / "cpu_operators.cpp": "-O1",
}
HEADERS = tuple(sorted(FOLDER.glob("cpu_*.h")))
FLAGS = (
    "-std=c++20", "-march=native", "-fopenmp", "-fPIC",
    # Allowed to assume: nobody reads errno, traps, or the sign of zero. Not that NaN and infinity do not occur.
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
)  # fmt: skip
X86_FLAGS = ("-mprefer-vector-width=512",)

FEW_ROWS = 16
FEW_ROWS_IN_PLACE = 12  # without the library's integer products: more rows share codes that are expanded once


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
    sources = (path.read_text() for path in (*SOURCES, *HEADERS))
    key = "\n".join((*sources, *SOURCES.values(), *FLAGS, *X86_FLAGS, _processor(), torch.__version__))
    return cache_folder() / f"cpu_kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def _compile(target: Path) -> None:
    root = Path(torch.__file__).parent
    flags = FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())
    compiler = _compiler()
    with tempfile.TemporaryDirectory() as folder:
        objects = [f"{folder}/{source.stem}.o" for source in SOURCES]
        _run_together(
            [compiler, *flags, level, "-c", str(source), "-o", out, f"-I{root / 'include'}"]
            for (source, level), out in zip(SOURCES.items(), objects)
        )
        libraries = (f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}")
        _run_together([[compiler, *flags, "-shared", *objects, "-o", str(target), *libraries]])


def _run_together(commands: Iterable[list[str]]) -> None:
    processes = []
    for command in commands:
        logger.info("compiling the CPU kernels: %s", " ".join(command))
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate()[1] for process in processes]
    for process, error in zip(processes, errors):
        if process.returncode:
            raise BuildError(f"compiling the CPU kernels failed: {error.strip()[-2000:]}")


def _trusted(library: Path) -> bool:
    """Whether nobody but this user, and root, can have put a library where it is."""
    if not hasattr(os, "geteuid"):
        return True
    found = [path.stat() for path in (library, library.parent)]
    return all(s.st_uid in (0, os.geteuid()) and not s.st_mode & stat.S_IWOTH for s in found)


def build() -> Path:
    """Path of the compiled library, compiling it if it is not there yet.

    Raises:
        BuildError: no compiler, or it failed; or what is there could be somebody else's.
    """
    target = library_path()
    if target.exists():
        if not _trusted(target):
            raise BuildError(
                f"{target} belongs to another user, or anyone may change it: it is not loaded; remove it, or set "
                "JKV_CACHE_DIR to a folder of your own"
            )
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
    """The loaded library: the operators of `ops`, for CPU tensors, in C++.

    `append`, `append_kv`, `move`, `fill`, `dequantize`, `rotate`, `round_unbiased`, `round_rotated`, `attention` (which
    is `ops.attention_lse`), `attention_active` and `attention_held` take the arguments of the operators. They raise
    NotImplementedError where they do not take them, with which `jkv::` operators would go to Python: the exact
    correction, steps per block of tokens in an append, dtypes and layouts that nothing produces.

    Attributes:
        half_precision: whether the library's bf16 products work here.
        byte_products: whether cached keys and values take products of bytes in loops of ours, where the library has no
            bf16 ones and the processor has VNNI or AVX2. Without either, everything runs in float32.
        multiplies_bytes: whether the processor that this was compiled for has VNNI or AVX2.
        few_rows: up to how many query rows per key/value head take codes where they lie, as integers; 0 where the
            library's integer products fail and there are none of ours.
        in_place: whether those rows are multiplied in loops of ours alone. Where a processor has VNNI and no AMX, the
            library's product of signed bytes raises, or gives wrong numbers (torch 2.13, AVX512-BF16).

    Raises:
        BuildError: torch does not take the operators.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for function in (library.jkv_define, library.jkv_install):
            function.restype = ctypes.c_char_p
        library.jkv_configure.argtypes = (ctypes.c_int64, ctypes.c_bool, ctypes.c_bool, ctypes.c_bool)
        library.jkv_multiplies_bytes.restype = ctypes.c_bool
        self._library = library
        self.multiplies_bytes: bool = library.jkv_multiplies_bytes()
        self._check(library.jkv_define())
        operators = torch.ops.jkv_cpp
        self.append, self.append_kv = operators.append.default, operators.append_kv.default
        self.move, self.fill = operators.move.default, operators.fill.default
        self.dequantize, self.rotate = operators.dequantize.default, operators.rotate.default
        self.round_unbiased, self.round_rotated = operators.round_unbiased.default, operators.round_rotated.default
        self.attention, self.attention_active = operators.attention_lse.default, operators.attention_active.default
        self.attention_held = operators.attention_held.default
        self.configure(FEW_ROWS, half_precision=True)

    @staticmethod
    def _check(error: bytes | None) -> None:
        if error:
            raise BuildError(f"torch does not take the C++ kernels: {error.decode()}")

    def configure(
        self, few_rows: int, half_precision: bool, byte_products: bool = False, in_place: bool = False
    ) -> None:
        """Set which products are used, by the whole process."""
        self.few_rows, self.half_precision = few_rows, half_precision
        self.byte_products, self.in_place = byte_products, in_place
        self._library.jkv_configure(few_rows, half_precision, byte_products, in_place)

    @property
    def products(self) -> str:
        """What attention of bfloat16 and float16 queries to packed keys mostly computes in."""
        return "bfloat16" if self.half_precision else "integer" if self.byte_products else "float32"

    def install(self) -> None:
        """From now on the dispatcher calls these for CPU tensors, and they call Python for what they do not take.

        Raises:
            BuildError: it cannot be done.
        """
        self._check(self._library.jkv_install())

    def choose_products(self) -> None:
        """Find out by example which products work here, and keep to those.

        Raises:
            BuildError: not even the float32 ones do.
        """
        self.configure(FEW_ROWS, half_precision=True)
        if not self.agrees_with_reference(torch.bfloat16):
            self.configure(0, half_precision=True)
            half = self.agrees_with_reference(torch.bfloat16)
            self.configure(FEW_ROWS_IN_PLACE, half, byte_products=not half, in_place=True)
            if not self.multiplies_bytes or not self.agrees_with_reference(torch.bfloat16):
                self.configure(0, half)
        if not self.agrees_with_reference(torch.float32):
            raise BuildError("what was compiled does not compute what the reference does on this machine")

    def agrees_with_reference(self, dtype: torch.dtype) -> bool:
        """A numeric probe with every kind of product and both phases. Leaves torch's random state alone."""
        generator = torch.Generator().manual_seed(0)
        source = torch.randn(1, 1, 200, 64, generator=generator)
        codes, scales = reference.quantize(source, 2, 32)
        mine, my_scales = torch.empty_like(codes), torch.empty_like(scales)
        query = torch.randn(1, 1, 40, 64, generator=generator).to(dtype)
        key = torch.randn(1, 1, 9, 64, generator=generator).to(dtype)
        rounded = self.round_unbiased(source, 2, 32)
        if not torch.allclose(rounded, quantizers.round_unbiased(source, 2, 32), rtol=1e-4, atol=1e-4):
            return False
        for length in (1, FEW_ROWS_IN_PLACE, FEW_ROWS, 40):  # each has products of its own
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


def main() -> None:
    """Build ahead of the first call, where there is a compiler."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logger.info("CPU kernels: %s", build())
    except BuildError as error:
        logger.info("CPU kernels: pure torch will be used (%s)", error)
