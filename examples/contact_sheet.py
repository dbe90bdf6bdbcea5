"""Pictures of a comparison: a contact sheet (PNG) and a side-by-side video (MP4)."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LABEL_WIDTH = 150
HEADER_HEIGHT = 22
ERROR_GAIN = 4.0


def error_map(frames: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean absolute difference over colours, amplified four times, as a heat map; uint8 [T, H, W, 3] all."""
    difference = np.abs(frames.astype(np.float32) - reference.astype(np.float32)).mean(-1) / 255
    heat = matplotlib.colormaps["inferno"](np.clip(ERROR_GAIN * difference, 0, 1))
    return (255 * heat[..., :3]).astype(np.uint8)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def contact_sheet(rows: dict[str, np.ndarray], columns: list[tuple[int, str]], path: Path) -> None:
    """Write one picture: a row per entry of rows (uint8 [T, H, W, 3] each), a column per (frame index, title)."""
    height, width = next(iter(rows.values())).shape[1:3]
    sheet = Image.new("RGB", (LABEL_WIDTH + width * len(columns), HEADER_HEIGHT + height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (_, title) in enumerate(columns):
        draw.text((LABEL_WIDTH + column * width + 4, 4), title, fill="black", font=_font(12))
    for row, (label, frames) in enumerate(rows.items()):
        top = HEADER_HEIGHT + row * height
        draw.multiline_text((6, top + height // 3), label, fill="black", font=_font(13))
        for column, (index, _) in enumerate(columns):
            sheet.paste(Image.fromarray(frames[index]), (LABEL_WIDTH + column * width, top))
    sheet.save(path)


def side_by_side(videos: dict[str, np.ndarray], path: Path, rate: int = 8, zoom: int = 2) -> None:
    """Write an MP4 with all videos (uint8 [T, H, W, 3]) next to each other, each under its label."""
    count = min(len(frames) for frames in videos.values())
    height, width = (zoom * side for side in next(iter(videos.values())).shape[1:3])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width * len(videos), height + HEADER_HEIGHT, "yuv420p"
        for index in range(count):
            canvas = Image.new("RGB", (stream.width, stream.height), "white")
            draw = ImageDraw.Draw(canvas)
            for column, (label, frames) in enumerate(videos.items()):
                draw.text((column * width + 4, 4), label, fill="black", font=_font(13))
                picture = Image.fromarray(frames[index]).resize((width, height), Image.Resampling.BICUBIC)
                canvas.paste(picture, (column * width, HEADER_HEIGHT))
            for packet in stream.encode(av.VideoFrame.from_image(canvas)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
