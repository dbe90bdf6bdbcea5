"""Per-frame convolutional autoencoder: pixels in [-1, 1] to a sixteen-channel latent at 1/8 resolution, and back."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

DOWNSAMPLE = 8


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions added to their input [N, C, h, w]; starts as the identity, so it needs no normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Autoencoder(nn.Module):
    """Encodes each frame on its own, so that a latent frame stays one video frame.

    The latent passes through a BatchNorm without affine parameters: its running statistics make every latent channel
    zero-mean and unit-variance over the training set, which is the scale that rectified flow expects, and they
    travel with the weights.
    """

    def __init__(self, latent_channels: int = 16, width: int = 64) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, width, 3, padding=1),
            ResidualBlock(width),
            nn.Conv2d(width, 2 * width, 2, stride=2),
            ResidualBlock(2 * width),
            nn.Conv2d(2 * width, latent_channels, 3, padding=1),
        )
        self.latent_norm = nn.BatchNorm2d(latent_channels, affine=False, momentum=0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, 2 * width, 3, padding=1),
            ResidualBlock(2 * width),
            ResidualBlock(2 * width),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),
            ResidualBlock(width),
            ResidualBlock(width),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(width // 2, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames [N, 3, H, W] in [-1, 1] (H and W divisible by 8) to latents [N, C, H/8, W/8]."""
        return self.latent_norm(self.encoder(frames))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [N, C, h, w] to frames [N, 3, 8h, 8w], approximately in [-1, 1]."""
        return self.decoder(latents)
