"""A failed sample as a picture: reference, candidate and their difference side by side."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganexport.artifact import write_atomic
from ganexport.spec import TensorSpec

Array = NDArray[Any]


def write_comparison(path: Path, tensor: TensorSpec, reference: Array, candidate: Array) -> None:
    """Write a PNG: the reference's sample, the candidate's, and the error, amplified to the full range.

    Args:
        path: The PNG.
        tensor: The image output; its range, or else the reference's, maps to 0..255.
        reference: [channels, height, width] or [height, width, channels], as the layout says.
        candidate: The same shape; NaN is drawn magenta.
    """
    from PIL import Image

    low, high = tensor.range or (float(np.nanmin(reference)), float(np.nanmax(reference)) or 1.0)
    truth, value = _to_hwc(reference, tensor.layout), _to_hwc(candidate, tensor.layout)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        difference = np.abs(value.astype(np.float64) - truth)
    peak = float(np.nanmax(np.where(np.isfinite(difference), difference, 0.0))) or 1.0
    panels = [_bytes(truth, low, high), _bytes(value, low, high), _bytes(difference, 0.0, peak)]
    gap = np.full((truth.shape[0], max(2, truth.shape[1] // 16), 3), 128, np.uint8)
    sheet = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)
    factor = max(1, 192 // sheet.shape[0])
    sheet = sheet.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _to_hwc(image: Array, layout: str | None) -> Array:
    return image.transpose(1, 2, 0) if layout == "NCHW" else image


def _bytes(image: Array, low: float, high: float) -> Array:
    """[height, width, 3] uint8."""
    bad = ~np.isfinite(image)
    scaled = (np.where(bad, low, image).astype(np.float64) - low) * (255.0 / max(high - low, 1e-12))
    pixels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)[:, :, :3]
    if pixels.shape[2] != 3:
        pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
    pixels[bad.any(axis=2)] = (255, 0, 255)
    return pixels
