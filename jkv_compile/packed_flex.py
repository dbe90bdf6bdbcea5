"""flex_attention over packed caches, as any other operator that reads them: dequantized, with a warning, in eager code.

Higher-order operators do not reach `PackedKV.__torch_dispatch__`; what they do with a subclass is registered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .compat import register_for_subclass
from .packed import PackedKV
from .packed_dispatch import warn_of_read


def _without_data(packed: PackedKV) -> Tensor:
    return packed._store.memory[0].new_empty(packed.shape, dtype=packed.dtype)


def _fake(operator: Any, *args: Any) -> Any:
    """While Dynamo traces: shapes are all that is asked for."""
    return operator(*tree_map_only(PackedKV, _without_data, args))


def _eager(operator: Any, *args: Any) -> Any:
    warn_of_read("flex_attention")
    return operator(*tree_map_only(PackedKV, PackedKV.dequantize_window, args))


register_for_subclass(torch.ops.higher_order.flex_attention, PackedKV, _fake, _eager)
