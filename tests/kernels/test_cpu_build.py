"""How the C++ kernels come into being, and what happens where they cannot."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jkv_compile.kernels import cpu, cpu_cpp, reference

# The calls below take both phases, and print which kernels did it.
PROBE = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
import torch
from jkv_compile.kernels import cpu, ops, reference
codes, scales = reference.quantize(torch.randn(1, 1, 70, 64), 2, 32)
x = torch.randn(1, 1, 5, 64).bfloat16()
torch.ops.jkv.append(codes, scales, x, 3, 2)
call = (x, codes, scales, codes, scales, [0, 70], x, x, None, False, 0.125, 2, 2, "taylor")
expected, _ = reference.attention(*call)
assert (torch.ops.jkv.attention(*call) - expected).norm() < 2e-2 * expected.norm()
torch.ops.jkv.move(codes, scales, 3, 7, 20)
assert torch._C._dispatch_has_kernel_for_dispatch_key("jkv::append", "CPU") == (cpu.kernels() is not None)
print("result:", "torch" if cpu.kernels() is None else "cpp")
"""


def start(cache: Path, *, compiler: Path | None = None, kernel: str | None = None) -> subprocess.Popen:
    """A process with a cache folder and a compiler, or without one."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JKV_CPU_KERNEL", "CXX")}
    environment |= {"JKV_CACHE_DIR": str(cache)}
    if compiler is None:
        environment["PATH"] = ""
    else:
        environment["CXX"] = str(compiler)
    if kernel is not None:
        environment["JKV_CPU_KERNEL"] = kernel
    return subprocess.Popen(
        [sys.executable, "-c", PROBE], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def built() -> Path:
    """The compiled library, in the cache of whoever runs the tests."""
    try:
        return cpu_cpp.build()
    except cpu_cpp.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def compiler(built: Path, tmp_path_factory) -> Path:
    """Stands in for the real one, which takes long: writes the library in two halves, slowly."""
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(f"""#!{sys.executable}
import sys, time
library = open({str(built)!r}, "rb").read()
with open(sys.argv[sys.argv.index("-o") + 1], "wb") as out:
    out.write(library[:1000])
    out.flush()
    time.sleep(1)
    out.write(library[1000:])
""")
    script.chmod(0o755)
    return script


@pytest.fixture
def filled(built: Path, tmp_path: Path) -> Path:
    """A cache folder that holds the library."""
    (tmp_path / built.name).write_bytes(built.read_bytes())
    return tmp_path


def test_processes_that_start_together_build_one_library(built, compiler, tmp_path):
    processes = [start(tmp_path / "cache", compiler=compiler) for _ in range(3)]
    for process in processes:
        assert "result: cpp" in finish(process)
    assert [x.name for x in (tmp_path / "cache").iterdir()] == [built.name]  # and no temporary files


def test_without_a_compiler_the_torch_path_runs_and_says_so(tmp_path):
    output = finish(start(tmp_path))
    assert "result: torch" in output
    assert output.count("WARNING jkv_compile.kernels.cpu: CPU kernels: pure torch") == 1
    assert "no C++ compiler" in output


def test_what_was_built_is_used_without_a_compiler(filled):
    assert "result: cpp" in finish(start(filled))


def test_a_cache_folder_that_cannot_be_made(compiler, tmp_path):
    (tmp_path / "file").write_text("")
    assert "result: cpp" in finish(start(tmp_path / "file" / "cache", compiler=compiler))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_folder(compiler, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "result: cpp" in finish(start(tmp_path, compiler=compiler))


def test_a_broken_library_is_not_used(built, tmp_path):
    (tmp_path / built.name).write_bytes(b"not a library")
    output = finish(start(tmp_path))
    assert "result: torch" in output and "cannot load" in output


@pytest.mark.parametrize("who", ["anyone may write the library", "anyone may write the folder", "another user's"])
def test_a_library_that_may_be_somebody_elses_is_not_loaded(monkeypatch, tmp_path, who):
    monkeypatch.setenv("JKV_CACHE_DIR", str(tmp_path))
    library = cpu_cpp.library_path()
    library.write_bytes(b"")
    if who == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
        if tmp_path.stat().st_uid == 0:  # what root has put there is trusted
            os.chown(library, 12345, -1)
    else:
        (tmp_path if who.endswith("folder") else library).chmod(0o777)
    with pytest.raises(cpu_cpp.BuildError, match="it is not loaded; remove it, or set JKV_CACHE_DIR"):
        cpu_cpp.build()


def test_the_choice_can_be_overridden(filled):
    assert "result: torch" in finish(start(filled, kernel="torch"))


@pytest.mark.parametrize(
    "kernel,complaint",
    [("cuda", "expected 'cpp' or 'torch'"), ("cpp", "no C++ compiler")],
    ids=["unknown", "not to be had"],
)
def test_a_choice_that_cannot_be_met_is_an_error(monkeypatch, tmp_path, kernel, complaint):
    for name, value in {"JKV_CPU_KERNEL": kernel, "JKV_CACHE_DIR": str(tmp_path), "PATH": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CXX", raising=False)
    cpu_cpp.load.cache_clear()
    try:
        with pytest.raises((ValueError, cpu_cpp.BuildError), match=re.escape(complaint)):
            cpu.kernels.__wrapped__()
    finally:
        cpu_cpp.load.cache_clear()


def test_wrong_numbers_are_not_trusted(monkeypatch, built):
    monkeypatch.setattr(cpu_cpp.Kernels, "agrees_with_reference", lambda self, dtype: False)
    cpu_cpp.load.cache_clear()
    try:
        with pytest.raises(cpu_cpp.BuildError, match="does not compute what the reference does"):
            cpu_cpp.load()
    finally:
        cpu_cpp.load.cache_clear()


OLDER = {"x86-64-v2": "sse4_2", "x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}  # and what a processor for it has


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names instructions of x86")
@pytest.mark.parametrize("architecture", OLDER)
def test_what_is_written_for_some_processors_is_written_for_others_too(built, tmp_path, architecture):
    """With sums in halves of words, of either width, or plain loops in place of VNNI, there are the same numbers."""
    present = Path("/proc/cpuinfo").read_text()
    if OLDER[architecture] not in present:
        pytest.skip(f"this processor has no {OLDER[architecture]}")
    if architecture == "x86-64-v3" and "avx512" not in present:
        pytest.skip("that is what all other tests run here")
    tests = Path(__file__).with_name("test_cpu_attention.py")
    script = f"""
from jkv_compile.kernels import cpu_cpp
cpu_cpp.FLAGS = tuple(x.replace("native", "{architecture}") for x in cpu_cpp.FLAGS)
import pytest, sys
sys.exit(pytest.main(["-q", "-n", "0", {str(tests)!r}, "-k", "largest_codes or few_rows and 530 or nan and cpp or bytes and not reference"]))
"""
    environment = os.environ | {"JKV_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout + done.stderr


def test_without_integer_products_few_rows_take_the_general_path(monkeypatch, built):
    monkeypatch.setattr(cpu_cpp.Kernels, "agrees_with_reference", lambda self, dtype: not self.few_rows)
    kernels = cpu_cpp.Kernels(ctypes.CDLL(str(built)))
    try:
        kernels.choose_products()
        assert kernels.few_rows == 0 and kernels.half_precision and not kernels.byte_products
    finally:
        monkeypatch.undo()
        kernels.choose_products()


def test_where_the_library_multiplies_bytes_wrongly_few_rows_are_multiplied_in_place(monkeypatch, built):
    """So it does with AVX512-BF16 and without AMX, in torch 2.13."""
    kernels = cpu_cpp.Kernels(ctypes.CDLL(str(built)))
    if not kernels.multiplies_bytes:
        pytest.skip("this processor has neither VNNI nor AVX2")
    right = lambda self, dtype: self.in_place or not self.few_rows  # noqa: E731
    monkeypatch.setattr(cpu_cpp.Kernels, "agrees_with_reference", right)
    kernels.choose_products()
    assert kernels.few_rows == cpu_cpp.FEW_ROWS_IN_PLACE and kernels.in_place
    assert kernels.half_precision and not kernels.byte_products
    monkeypatch.undo()
    kernels.choose_products()


def test_the_numeric_probe_tries_each_kind_of_product(built, monkeypatch):
    """A row count that no probe has is a product that nobody has checked."""
    kernels = cpu_cpp.Kernels(ctypes.CDLL(str(built)))
    rows = []

    def attention(*arguments):
        rows.append(arguments[0].shape[2])
        return reference.attention(*arguments)

    kernels.attention = attention
    kernels.agrees_with_reference(torch.float32)
    few = {kernels.few_rows, cpu_cpp.FEW_ROWS, cpu_cpp.FEW_ROWS_IN_PLACE} - {0}
    assert {1, *few} <= set(rows) and max(rows) > cpu_cpp.FEW_ROWS


def test_the_librarys_bfloat16_products_come_before_ours(monkeypatch, built):
    kernels = cpu_cpp.Kernels(ctypes.CDLL(str(built)))
    for half_precision in (True, False):
        monkeypatch.setattr(
            cpu_cpp.Kernels,
            "agrees_with_reference",
            lambda self, dtype, works=half_precision: works or not self.half_precision,
        )
        kernels.choose_products()
        assert kernels.half_precision == half_precision
        assert kernels.products == (
            "bfloat16" if half_precision else "integer" if kernels.multiplies_bytes else "float32"
        )
    monkeypatch.undo()
    kernels.choose_products()
