"""Rotary position embedding (RoFormer, arXiv 2104.09864) on three axes: frame, row and column."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(frames: int, height: int, width: int, axis_dims: tuple[int, int, int], theta: float = 100.0) -> Tensor:
    """Cosines and sines for every token of a video, tokens in (frame, row, column) order.

    Args:
        axis_dims: channels of a head given to frame, row and column; each even, together head_dim.
        theta: base of the frequencies; the grids are small, the usual 10,000 would leave most channels unrotated.

    Returns:
        float32 [frames * height * width, 2, head_dim / 2]; index 0 of the middle axis holds cosines, index 1 sines.
    """
    positions = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    angles = []
    for position, dims in zip(positions, axis_dims, strict=True):
        frequencies = theta ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angles.append(position.reshape(-1, 1).float() * frequencies)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved channel pairs of x [B, S, H, D] by the angles in table [S, 2, D / 2]; keeps the dtype of x."""
    cos, sin = table[:, 0, None, :], table[:, 1, None, :]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
