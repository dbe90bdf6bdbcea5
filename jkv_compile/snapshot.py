"""Runs a model and takes back what it did: to tensors, to containers and attributes, to random number generators."""

from __future__ import annotations

import collections
import contextlib
import functools
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .compat import weak_view
from .packed import PackedKV


@contextlib.contextmanager
def taken_back(*roots: Any) -> Iterator[None]:
    """Whatever happens inside is undone on leaving, as far as it can be reached from `roots`.

    Tensors get the values back that operations have overwritten, by a log of what is written (a chunk, usually, not a
    copy of the cache); tensors made inside are left out. Dicts, lists, sets, objects' attributes and closures get their
    old contents back, and random number generators their state. Not undone: what is written through NumPy or by a
    kernel that does not say that it writes, global variables, files, and generators that have been advanced.
    """
    state, log = _State(roots), _UndoLog()
    generators = _generators(roots)
    try:
        with log:
            yield
    finally:
        log.undo()
        state.restore()
        for restore in generators:
            restore()


class _UndoLog(TorchDispatchMode):
    """Keeps what operations overwrite in tensors that were there before."""

    supports_higher_order_operators = True  # flex_attention, which writes to nothing

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[Callable[[], Tensor | None], Tensor]] = []
        self.fresh: dict[int, StorageWeakRef] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # Dynamo goes on compiling beneath it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*args, **kwargs)
        for argument, value in zip(func._schema.arguments, args):
            if argument.is_write:
                self._save(value)
        for argument in func._schema.arguments:
            if argument.is_write and argument.name in kwargs:
                self._save(kwargs[argument.name])
        result = func(*args, **kwargs)
        if all(r.alias_info is None for r in func._schema.returns):
            for value in tree_leaves(result):
                if isinstance(value, Tensor) and not isinstance(value, PackedKV):
                    storage = value.untyped_storage()
                    self.fresh[storage._cdata] = StorageWeakRef(storage)
        return result

    def _save(self, value: Any) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and not self._is_fresh(tensor):
                tensor = tensor.whole_blocks() if isinstance(tensor, PackedKV) else tensor
                target = tensor.detach if isinstance(tensor, PackedKV) else weak_view(tensor)
                self.log.append((target, tensor.clone()))

    def _is_fresh(self, tensor: Tensor) -> bool:
        if isinstance(tensor, PackedKV):
            return False
        made = self.fresh.get(tensor.untyped_storage()._cdata)
        return made is not None and not made.expired()

    def undo(self) -> None:
        for target, saved in reversed(self.log):
            tensor = target()
            if tensor is not None:
                with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(saved)
        self.log.clear()


class _State:
    """The contents of every container that can be reached, without what lies in them."""

    _LEAVES = (str, bytes, int, float, complex, type(None), type, types.ModuleType, torch.dtype, torch.device)
    _FOREIGN = ("torch._", "torch.fx", "threading", "logging", "_thread")

    def __init__(self, roots: Any) -> None:
        self.saved: list[Callable[[], None]] = []
        seen: dict[int, Any] = {}  # keeps what it has seen alive, so that ids stay unique
        pending = list(roots)
        while pending:
            value = pending.pop()
            if id(value) in seen or isinstance(value, self._LEAVES):
                continue
            seen[id(value)] = value
            pending += self._save(value)

    def restore(self) -> None:
        for restore in self.saved:
            restore()

    def _save(self, value: Any) -> list[Any]:
        """Remember what `value` holds; what it holds is returned."""
        if isinstance(value, (list, collections.deque)):
            self.saved.append(functools.partial(_refill_list, value, list(value)))
            return list(value)
        if isinstance(value, (dict, set)):
            self.saved.append(functools.partial(_refill, value, value.copy()))
            return list(value.values()) if isinstance(value, dict) else []
        if isinstance(value, (tuple, frozenset)):
            return list(value)
        if isinstance(value, functools.partial):
            return [value.func, *value.args, *value.keywords.values()]
        if isinstance(value, types.MethodType):
            return [value.__self__, value.__func__]
        if isinstance(value, types.FunctionType):
            return [getattr(value, "__wrapped__", None), *self._closure(value), *(value.__defaults__ or ())]
        if type(value).__module__.startswith(self._FOREIGN) and not hasattr(value, "_orig_mod"):
            return []
        held = getattr(value, "__dict__", None)
        if isinstance(held, dict):
            self.saved.append(functools.partial(_refill, held, dict(held)))
        slots = [n for c in type(value).__mro__ for n in _slots(c) if hasattr(value, n)]
        for name in slots:
            self.saved.append(functools.partial(_set, value, name, getattr(value, name)))
        return [*(held or {}).values(), *(getattr(value, n) for n in slots)]

    def _closure(self, function: types.FunctionType) -> list[Any]:
        contents = []
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                contents.append(cell.cell_contents)
                self.saved.append(functools.partial(setattr, cell, "cell_contents", cell.cell_contents))
        return contents


def _slots(cls: type) -> list[str]:
    slots = cls.__dict__.get("__slots__", ())
    return [n for n in ((slots,) if isinstance(slots, str) else slots) if n not in ("__dict__", "__weakref__")]


def _set(value: Any, name: str, content: Any) -> None:
    if getattr(value, name, None) is not content:
        object.__setattr__(value, name, content)


def _refill_list(value: Any, content: list[Any]) -> None:
    if len(value) != len(content) or any(a is not b for a, b in zip(value, content)):
        value.clear()
        value.extend(content)


def _refill(value: Any, content: Any) -> None:
    same = value.keys() == content.keys() if isinstance(value, dict) else value == content
    if isinstance(value, dict):
        same = same and all(value[k] is content[k] for k in content)
    if not same:
        value.clear()
        value.update(content)


def _generators(roots: Any) -> list[Callable[[], Any]]:
    """What brings random number generators back to where they are now."""
    restore: list[Callable[[], Any]] = [
        functools.partial(torch.set_rng_state, torch.get_rng_state()),
        functools.partial(random.setstate, random.getstate()),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        restore.append(functools.partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    for value in tree_leaves(roots):
        if isinstance(value, torch.Generator):
            restore.append(functools.partial(value.set_state, value.get_state()))
    return restore
