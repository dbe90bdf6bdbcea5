"""Windows of video for training the transformer: the scenes as they are, and crops that move over them.

Three short clips do not teach how things move; a network that sees only them learns them by heart. Most windows are
therefore crops that pan and zoom, often over one frozen frame: what comes next is there for the network to work out
from its history, and it is in the history that the picture is to be found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from examples.data import CLIPS, crop_and_resize, moving_crop, training_scenes

REAL_SHARE = 0.35  # windows whose crop stands still
FROZEN_SHARE = 0.75  # of the others: the crop moves over one frame, not over the running video
# How often the last scene of a clip, which continues into the held-out part, is drawn, relative to one another.
LAST_SCENES = {"bikes": 2.0, "bigbuckbunny": 1.0, "carphone_pristine": 1.25}
LEAST_ROWS = 80  # of a moving crop; smaller ones would be blurred by enlargement


class Windows:
    """Draws windows of ``frames`` frames; everything random about one comes from the generator it is drawn with."""

    def __init__(self, frames: int) -> None:
        self.frames, self.scenes = frames, training_scenes()
        last = {clip.train[-1]: LAST_SCENES[clip.name] for clip in CLIPS.values()}
        self.weights = [last.get(scene, 0.0) for clip in CLIPS.values() for scene in clip.train]

    def draw(self, generator: torch.Generator) -> Tensor:
        """One window, float32 [T, 3, 96, 128] in [-1, 1]."""
        window = self.real(generator) if chance(REAL_SHARE, generator) else self.moving(generator)
        return window.flip(-1) if chance(0.5, generator) else window

    def scene(self, weight_of_last: float, generator: torch.Generator) -> Tensor:
        """One of the scenes, uint8 [T, 3, H, W]; all but the last ones have weight 1."""
        weights = torch.tensor([weight_of_last * weight or 1.0 for weight in self.weights])
        return self.scenes[int(torch.multinomial(weights, 1, generator=generator))]

    def excerpt(self, scene: Tensor, stride: int, generator: torch.Generator) -> Tensor:
        """Every ``stride``-th frame of the scene, from anywhere in it."""
        length = stride * (self.frames - 1) + 1
        start = int(torch.randint(len(scene) - length + 1, (), generator=generator))
        return scene[start : start + length : stride]

    def real(self, generator: torch.Generator) -> Tensor:
        """Running video in a crop that stands still: mostly the one of the demo, one in six played backwards."""
        frames = self.excerpt(self.scene(5.0, generator), 1, generator)
        if chance(1 / 6, generator):
            frames = frames.flip(0)
        if chance(0.7, generator):
            return crop_and_resize(frames)
        scale, x, y = torch.rand(3, generator=generator).tolist()
        return crop_and_resize(frames, 0.7 + 0.3 * scale, x, y)

    def moving(self, generator: torch.Generator) -> Tensor:
        """A crop that pans and zooms, slowly more often than fast, over a frozen frame or over running video."""
        scene = self.scene(3.0, generator)
        if frozen := chance(FROZEN_SHARE, generator):
            index = int(torch.randint(len(scene), (), generator=generator))
            frames = scene[index : index + 1].expand(self.frames, -1, -1, -1)
        else:
            stride = 2 if chance(0.1, generator) and len(scene) >= 2 * self.frames - 1 else 1
            frames = self.excerpt(scene, stride, generator)
            if chance(0.5, generator):
                frames = frames.flip(0)

        smallest = max(0.35 if frozen else 0.6, LEAST_ROWS / scene.shape[-2])
        first, last = torch.rand(2, 3, generator=generator)  # scale, x and y at both ends of the way
        zoom, pan = torch.rand(2, generator=generator)
        pan = pan**3 * (not chance(0.15, generator))  # the crop goes this far towards the last place, or stays
        way = torch.stack([0.5 * zoom**2, pan, pan]) * (last - first)
        time = torch.linspace(0, 1, self.frames)
        if chance(0.3, generator):  # gathers or loses speed
            power = 1 + float(torch.rand((), generator=generator))
            time = time**power if chance(0.5, generator) else 1 - (1 - time) ** power
        scale, x, y = first[:, None] + way[:, None] * time
        window = moving_crop(frames, smallest + (1 - smallest) * scale, x, y)
        if chance(0.5, generator):  # another exposure and white balance
            gain = torch.exp(
                0.15 * torch.randn(1, generator=generator) + 0.08 * torch.randn(3, generator=generator)
            ).view(3, 1, 1)
            window = ((window + 1) * gain - 1 + 0.1 * torch.randn((), generator=generator)).clamp(-1, 1)
        return window


def chance(probability: float, generator: torch.Generator) -> bool:
    """True with the given probability."""
    return float(torch.rand((), generator=generator)) < probability
