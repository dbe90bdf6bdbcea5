"""Every reason that the package can give is of a kind, and comes with advice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import jkv_compile.passes
from jkv_compile.reasons import Reason, classify

RAISED = {"Unsupported", "NotCanonical", "UnknownPosition"}
PACKAGE = Path(jkv_compile.__file__).parent


def reasons() -> Iterator[str]:
    """What is raised as a reason, or returned by `obstacle` and `_unfit`; values put into it stand as `…`."""
    files = [*Path(jkv_compile.passes.__file__).parent.glob("*.py"), PACKAGE / "adopt.py"]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                if getattr(node.exc.func, "id", "") in RAISED:
                    yield from texts(node.exc.args[0])
            elif isinstance(node, ast.FunctionDef) and node.name in ("obstacle", "_unfit"):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        yield from texts(inner.value)


def texts(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values)


ALL = sorted(set(reasons()))


def test_reasons_are_found() -> None:
    assert len(ALL) > 30


@pytest.mark.parametrize("reason", ALL)
def test_every_reason_is_of_a_kind(reason: str) -> None:
    assert classify(reason) is not Reason.OTHER


@pytest.mark.parametrize(
    "reason, kind",
    [
        ("gradients are required of it", Reason.GRADIENTS),
        ("dropout of 0.1", Reason.DROPOUT),
        ("l_cache_k_: another live tensor shares its memory", Reason.SHARED_MEMORY),
        ("a position is not known before the data is", Reason.POSITION),
        ("its scores come from `tanh`, not from a product of queries and keys", Reason.SPELLING),
        ("only some of its batch entries, heads or channels are written", Reason.WRITE),
        ("group_size=48 does not divide this model's head_dim=64; use one of [16, 32, 64]", Reason.CONFIGURATION),
        ("tokens are overwritten between their being copied and used", Reason.ORDER),
        ("something that nobody has thought of", Reason.OTHER),
    ],
)
def test_kinds(reason: str, kind: Reason) -> None:
    assert classify(reason) is kind
