"""What a graph cannot show and its user knows: which tensors are caches, and which are to be left alone.

Hints belong to tensor objects, not to their values: they are weak, and end with the tensor.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import ConfigurationError
from .packed import PackedKV

Kind = Literal["mark_cache", "ignore"]
_lock = threading.RLock()
_tensors: dict[int, tuple[weakref.ref[Tensor], Kind]] = {}
_attributes: dict[tuple[int, str], tuple[weakref.ref[nn.Module], Kind]] = {}


class Hint:
    """What `mark_cache` and `ignore` return; `remove()` takes the hint back, as does leaving a `with` block."""

    def __init__(self, table: dict[Any, Any], key: Any) -> None:
        self._table, self._key, self._entry = table, key, table[key]

    def remove(self) -> None:
        with _lock:
            if self._table.get(self._key) is self._entry:
                del self._table[self._key]

    def __enter__(self) -> Hint:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def mark_cache(target: Tensor | nn.Module, name: str | None = None) -> Hint:
    """Have a tensor packed as soon as compiled attention reads it as keys or values, though the graph shows no cache.

    A cache is known by being written slice by slice, or by coming again together with new tokens. A past that is only
    read, or that is to be packed at its first use, has to be marked, and both keys and values do. Mark before the
    graph that reads it is compiled; later, `torch.compiler.reset()` has it compiled again.

    Args:
        target: a tensor of at least three dimensions, or the module that holds it in attribute `name`.
        name: an attribute of the module: a tensor, a container of tensors, or None until the first call allocates it.

    Returns:
        The hint; its `remove()` takes it back.

    Raises:
        ConfigurationError: the tensor can be no cache, the module has no such attribute, or it is ignored.
    """
    if isinstance(target, Tensor) and not _may_be_cache(target):
        what = "a parameter" if isinstance(target, nn.Parameter) else f"{target.dtype}, {target.dim()} dimensions"
        raise ConfigurationError(
            f"mark_cache of a tensor of shape {tuple(target.shape)} ({what}): expected keys or values, a "
            "floating-point tensor of at least three dimensions that needs no gradient"
        )
    return _hint("mark_cache", target, name)


def ignore(target: Tensor | nn.Module, name: str | None = None) -> Hint:
    """Never pack a tensor, whatever a graph shows: keys of a text that stay the same, say, or a cache to compare with.

    Attention that reads an ignored tensor as keys or as values stays in full precision as a whole.

    Args:
        target: a tensor, or the module that holds it in attribute `name`.
        name: an attribute of the module: a tensor, a container of tensors, or None until the first call allocates it.

    Returns:
        The hint; its `remove()` takes it back.

    Raises:
        ConfigurationError: it is packed already, the module has no such attribute, or it is marked as a cache.
    """
    if isinstance(target, PackedKV):
        raise ConfigurationError(
            f"ignore of {target!r}: it is packed already; put jkv_compile.materialize(tensor) in its place, and ignore "
            "that before it meets compiled code"
        )
    return _hint("ignore", target, name)


def is_marked(tensor: Tensor) -> bool:
    """Whether a tensor, or the tensor that it is a view of, was marked as a cache."""
    return _kind_of(tensor) == "mark_cache"


def is_ignored(tensor: Tensor) -> bool:
    """Whether a tensor, or the tensor that it is a view of, is to be left alone."""
    return _kind_of(tensor) == "ignore"


def _may_be_cache(tensor: Tensor) -> bool:
    plain = not isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    return plain and tensor.is_floating_point() and tensor.dim() >= 3


def _hint(kind: Kind, target: Tensor | nn.Module, name: str | None) -> Hint:
    table: dict[Any, Any]
    key: Any
    if isinstance(target, nn.Module) and isinstance(name, str):
        target = getattr(target, "_orig_mod", target)
        if not hasattr(target, name):
            raise ConfigurationError(f"{kind} of {type(target).__name__}.{name}: the module has no such attribute")
        table, key = _attributes, (id(target), name)
    elif isinstance(target, Tensor) and name is None:
        table, key = _tensors, id(target)
    else:
        raise ConfigurationError(
            f"{kind}({type(target).__name__}, {name!r}): expected a tensor, or a module and the name of its attribute"
        )
    with _lock:
        known = table.get(key)
        if known is not None and known[1] != kind:
            raise ConfigurationError(
                f"{kind}: jkv_compile.{known[1]} was called for the same; call remove() of it first"
            )
        if known is None:
            reference: weakref.ref[Any] = weakref.ref(target, lambda _: table.pop(key, None))
            table[key] = reference, kind
        return Hint(table, key)


def _kind_of(tensor: Tensor) -> Kind | None:
    if not _tensors and not _attributes:
        return None
    with _lock:
        for candidate in (tensor, tensor._base):
            if candidate is None:
                continue
            known = _tensors.get(id(candidate))
            if known is not None and known[0]() is candidate:
                return known[1]
            for (_, name), (module, kind) in _attributes.items():
                held = getattr(module(), name, None)
                if any(leaf is candidate for leaf in tree_leaves(held)):
                    return kind
    return None
