"""Attention that users tell about: `register_attention` for calls whose names and arguments are not known here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..compat import operator_of
from ..errors import ConfigurationError
from .attention_forms import AttentionArguments, NotCanonical
from .nodes import example
from .spelled_as_calls import qualified_name

Adapter = Callable[..., AttentionArguments | None]
_adapters: dict[Any, Adapter] = {}
_lock = threading.Lock()


class Registration:
    """What `register_attention` returns; `remove()` takes the adapter back, as does leaving a `with` block."""

    def __init__(self, key: Any, adapter: Adapter) -> None:
        self._key, self._adapter = key, adapter

    def remove(self) -> None:
        with _lock:
            if _adapters.get(self._key) is self._adapter:
                del _adapters[self._key]

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def register_attention(target: Any, adapter: Adapter) -> Registration:
    """Have calls of `target` understood as attention, so that caches that they read can be packed.

        def adapter(q, k, v, softmax_scale=None, causal=False):
            corner = "top_left" if causal else None
            return jkv_compile.AttentionArguments(q, k, v, scale=softmax_scale, causal=corner, layout="BLHD")

        jkv_compile.register_attention(my_kernels.attention, adapter)

    Graphs that are compiled from then on use it; `torch.compiler.reset()` has compiled ones compiled again.

    Args:
        target: what stands in Dynamo's graph as one call: a custom operator (`torch.ops.library.attend`, what
            `torch.library.custom_op` returns, or its name as "library::attend"), or a function that was marked with
            `torch.compiler.allow_in_graph` (or its name as "module.function"). Functions that Dynamo looks into need no
            adapter: what it finds there is understood, or not, by itself.
        adapter: gets the arguments of a call as it is written, and tells which is which. Tensors come as nodes of a
            graph: they can be passed on, and told from None, and nothing else. It returns None for calls that are not
            softmax(scale · query @ keyᵀ + mask) @ value, which then stay as they are.

    Returns:
        A registration; its `remove()` undoes this, and it can be used in a `with` statement.

    Raises:
        ConfigurationError: `target` is not something to call, `adapter` neither, or `target` has an adapter already.
    """
    key = operator_of(target)
    key = qualified_name(key) if isinstance(key, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) else key
    if not (callable(key) or (isinstance(key, str) and ("::" in key or "." in key))):
        raise ConfigurationError(
            f"target={target!r}: expected an operator, a function, or a name, 'library::operator' or 'module.function'"
        )
    if not callable(adapter):
        raise ConfigurationError(f"adapter={adapter!r}: expected a function that returns AttentionArguments")
    with _lock:
        if key in _adapters:
            raise ConfigurationError(
                f"{key} is registered already; call remove() of what register_attention returned for it first"
            )
        _adapters[key] = adapter
    return Registration(key, adapter)


def registered_call(node: Node) -> AttentionArguments | None:
    """Attention by a call that a user has registered.

    Raises:
        NotCanonical: the adapter says that this call is none.
        ConfigurationError: the adapter does not fit the call.
    """
    if node.op != "call_function":
        return None
    name = qualified_name(node.target)
    adapter = _adapters.get(node.target) or _adapters.get(name)
    if adapter is None:
        return None
    where = f"the adapter registered for {name}"
    try:
        attention = adapter(*node.args, **node.kwargs)
    except TypeError as error:
        raise ConfigurationError(f"{where} does not take the arguments of `{node.format_node()}`: {error}") from error
    if attention is None:
        raise NotCanonical(f"{where} says that it is no plain attention")
    if not isinstance(attention, AttentionArguments):
        raise ConfigurationError(f"{where} returned {attention!r}: expected jkv_compile.AttentionArguments, or None")
    for role, layout in zip(("query", "key", "value"), attention.layouts):
        value = example(getattr(attention, role))
        if not isinstance(value, torch.Tensor) or value.dim() != len(layout):
            found = f"{value.dim()} dimensions" if isinstance(value, torch.Tensor) else repr(value)
            raise ConfigurationError(f"{where}: {role} has {found}: expected a tensor laid out as {layout!r}")
    return attention
