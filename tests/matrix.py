"""Run the core of the suite against several releases of torch, each in an environment of its own.

    python -m tests.matrix --index URL 2.11.0 2.12.0 2.13.0

Environments are made below `.venv/matrix`, and kept. Without `--index`, packages come from pip's default index, whose
builds of torch for Linux are large.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pytest", "pytest-timeout", "expecttest", "hypothesis", "numpy")
CORE = ("tests/test_backend.py", "tests/test_adopt.py", "tests/test_packed_writes.py", "tests/test_packed_copies.py")
CORE += ("tests/test_hints.py", "tests/passes/test_in_place_cache.py", "tests/idioms", "tests/kernels/test_ops.py")


def environment(version: str, index: str | None) -> Path:
    """The interpreter of an environment that has this release of torch; makes it where it is missing."""
    folder = ROOT / ".venv" / "matrix" / version
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, f"torch=={version}", *(["--index-url", index] if index else [])], check=True)
        subprocess.run([*install, *PACKAGES], check=True)
        subprocess.run([*install, "--no-deps", "--editable", ROOT], check=True)
        (folder / ".installed").touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--index", help="of packages to install torch from")
    parser.add_argument("--tests", nargs="+", default=CORE, help="what to run")
    args = parser.parse_args()
    outcomes = {}
    for version in args.versions:
        try:
            python = environment(version, args.index)
        except subprocess.CalledProcessError as error:
            outcomes[version] = f"not installed: {' '.join(map(str, error.cmd))}"
            continue
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args.tests]
        ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "default"})
        outcomes[version] = "passes" if ran.returncode == 0 else f"fails, exit status {ran.returncode}"
    for version, outcome in outcomes.items():
        print(f"torch {version}: {outcome}")
    return 0 if all(o == "passes" for o in outcomes.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
