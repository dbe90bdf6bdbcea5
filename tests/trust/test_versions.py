"""Releases of torch outside the range that is known, and warnings of what torch will drop."""

from __future__ import annotations

import warnings

import pytest
import torch

from jkv_compile import compat


@pytest.mark.parametrize("version", ["2.10.1", "2.4.0+cu121", "1.13.1"])
def test_an_older_torch_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"this is {version.split('+')[0]}.*pip install"):
        compat.check_torch_version()


def test_a_newer_torch_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "9.0.0a0+git1234")
    monkeypatch.delenv("JKV_ANY_TORCH", raising=False)
    with pytest.raises(ImportError, match=r"torch >= 2.11, < 2.16; this is 9.0.0a0.*pip install 'torch<2.16'.*JKV_ANY"):
        compat.check_torch_version()


def test_a_newer_torch_can_be_tried_and_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "9.0.0a0+git1234")
    monkeypatch.setenv("JKV_ANY_TORCH", "1")
    with pytest.warns(UserWarning, match="known to work with torch >= 2.11"):
        compat.check_torch_version()


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.0+cu132", "2.14.0.dev20260801"])
def test_the_range_that_is_known_is_silent(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.check_torch_version()


def test_deprecations_that_the_package_causes_are_errors_here() -> None:
    """The filter of pyproject.toml: warnings that point at any module of the package."""
    for module in ("jkv_compile", "jkv_compile.runtime", "jkv_compile.passes.tracking"):
        with pytest.raises(DeprecationWarning):
            warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=module)
