"""Scoped opt-in: `with jkv_compile.enable(bits=2): video = pipeline(prompt)`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import torch

from .backend import JKVBackend, jkv_backend
from .errors import NotRewrittenWarning


@contextlib.contextmanager
def enable(bits: int | tuple[int, int] | EllipsisType = ..., **settings: Any) -> Iterator[JKVBackend]:
    """Everything wrapped in `torch.compile` uses `jkv_backend(bits, **settings)` within this context.

    Built on `torch.compiler.set_stance(force_backend=...)`, with its reach: all threads of the process, nested contexts
    restore the outer one, and what is not wrapped in `torch.compile` is not touched. Caches that were
    packed inside stay packed outside, and readable.

    Yields:
        The backend, for `memory()` and `reports`.

    Warns:
        NotRewrittenWarning: at the end, where no cache was packed at all.

    Raises:
        ConfigurationError: a setting has a value that cannot work.
    """
    backend = jkv_backend(bits, **settings)
    with torch.compiler.set_stance(force_backend=backend):
        yield backend
    if not backend.reports:
        said = "nothing that ran inside is wrapped in torch.compile: compile the model, or its blocks, first"
    elif not any(report.outcome in ("adopted", "packed") for report in backend.reports):
        said = "no cache was packed; jkv_compile.explain(model, *inputs) tells why"
    else:
        return
    warnings.warn(f"jkv_compile.enable: {said}", NotRewrittenWarning, stacklevel=3)
