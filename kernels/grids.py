"""Operators for caches whose groups hold what they must (`quantizers.Grid`): their channels into groups, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import _without_autocast, library
from .quantizers import fill_within, from_grid, grid_of, round_rotated, to_grid

for _name, _kernel in (("to_grid", to_grid), ("from_grid", from_grid)):
    library.define(f"{_name}(Tensor x, str quantizer, int group_size) -> Tensor", tags=(torch.Tag.flexible_layout,))
    library.impl(_name, _without_autocast(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"jkv::{_name}", lambda x, *_: x.new_empty(x.shape), lib=library)

library.define(
    "round_rotated(Tensor x, int bits, int group_size, bool symmetric=False) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
library.impl("round_rotated", _without_autocast(round_rotated), "CompositeExplicitAutograd")
torch.library.register_fake("jkv::round_rotated", lambda x, *_: x.new_empty(x.shape, dtype=torch.float32), lib=library)

library.define(
    "fill_within(Tensor(a!) codes, Tensor(b!) scales, SymInt start, SymInt stop, int bits, float value) -> ()",
    tags=(torch.Tag.flexible_layout,),
)
library.impl("fill_within", _without_autocast(fill_within), "CompositeExplicitAutograd")
torch.library.register_fake("jkv::fill_within", lambda *_: None, lib=library)


def stored(x: Tensor, bits: int, group_size: int, quantizer: str) -> Tensor:
    """What is quantized of tokens `[B, H, n, D]`: in the basis of the grid, rounded already where it is unbiased."""
    jkv, grid = torch.ops.jkv, grid_of(quantizer)
    if grid.within:
        if grid.unbiased:
            x = jkv.to_grid(x.float(), quantizer, group_size)
            return jkv.round_rotated(x, bits, group_size, grid.symmetric)
        return jkv.to_grid(x, quantizer, group_size)
    if grid.unbiased:
        return jkv.round_unbiased(x, bits, group_size, grid.symmetric)
    return jkv.rotate(x) if grid.rotates else x
