"""Grids of images and animations, written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ganexport.artifact import write_atomic
from ganexport.bulk import png
from ganexport.errors import UsageError
from ganexport.runtime.base import Array


def grid(images: Array, gap: int = 0) -> Array:
    """Lay images out in rows and columns.

    Args:
        images: [rows, columns, H, W, C] uint8.
        gap: White pixels between neighbours.

    Returns:
        [H', W', C] uint8.
    """
    rows, columns, height, width, channels = images.shape
    canvas = np.full((rows, height + gap, columns, width + gap, channels), 255, np.uint8)
    canvas[:, :height, :, :width] = images.transpose(0, 2, 1, 3, 4)
    whole = canvas.reshape(rows * (height + gap), columns * (width + gap), channels)
    return np.ascontiguousarray(whole[: whole.shape[0] - gap, : whole.shape[1] - gap])


def enlarged(image: Array, factor: int) -> Array:
    """Every pixel ``factor`` times as wide and high."""
    return image.repeat(factor, axis=-3).repeat(factor, axis=-2)


def write_png(path: Path, image: Array) -> None:
    """Write [H, W, C] uint8.

    Raises:
        OutputError: Not writable, or the disk is full.
    """
    write_atomic(path, png.encode(image[None])[0])


def write_gif(path: Path, frames: Array, *, milliseconds: int = 60) -> None:
    """Write [n, H, W, C] uint8 as an animation that runs for ever.

    Raises:
        OutputError: Not writable, or the disk is full.
        UsageError: Not 1 or 3 channels.
    """
    from PIL import Image

    if frames.shape[-1] not in (1, 3):
        raise UsageError(f"a GIF takes images of 1 or 3 channels, got {frames.shape[-1]}")
    pictures = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, optimize=False
    )
    write_atomic(path, buffer.getvalue())
