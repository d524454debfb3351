"""From a generator's outputs to the bytes of an answer."""

from __future__ import annotations

import io
import math
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganexport.errors import UsageError

Array = NDArray[Any]

MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "npy": "application/x-npy", "zip": "application/zip"}
#: Largest side of a WebP picture (RFC 9649).
WEBP_SIDE = 16383


def encode_images(images: Array, format: str, *, columns: int | None = None) -> bytes:  # noqa: A002
    """Pictures in the asked format.

    Args:
        images: [n, height, width, 1 | 3 | 4] uint8.
        format: "png" or "webp": one picture, several as a grid; "npy": the array; "zip": a PNG each.
        columns: Of the grid; near-square when not said.

    Raises:
        UsageError: A grid larger than WebP allows.
    """
    if format == "npy":
        return _npy(images)
    if format == "zip":
        return _zip({f"{index:06d}.png": _picture(image, "png") for index, image in enumerate(images)})
    return _picture(grid(images, columns), format)


def encode_arrays(outputs: dict[str, Array], format: str) -> bytes:  # noqa: A002
    """Outputs that are no pictures: "npy" the first of them, "zip" a .npy each."""
    if format == "npy":
        return _npy(next(iter(outputs.values())))
    return _zip({f"{name}.npy": _npy(value) for name, value in outputs.items()})


def grid(images: Array, columns: int | None = None) -> Array:
    """Pictures side by side, row by row; empty places are zero.

    Args:
        images: [n, height, width, channels].
        columns: How many in a row; the square root of n, rounded up, when not said.

    Returns:
        [rows * height, columns * width, channels].
    """
    count, height, width, channels = images.shape
    if count == 1:
        single: Array = images[0]
        return single
    rows, columns = grid_size(count, columns)
    sheet: Array = np.zeros((rows * columns, height, width, channels), images.dtype)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    joined: Array = sheet.reshape(rows * height, columns * width, channels)
    return joined


def grid_size(count: int, columns: int | None = None) -> tuple[int, int]:
    """(rows, columns) of so many pictures; near-square when the columns are not said."""
    columns = columns or math.ceil(math.sqrt(count))
    return math.ceil(count / columns), columns


def _picture(image: Array, format: str) -> bytes:  # noqa: A002
    from PIL import Image

    if format == "webp" and max(image.shape[:2]) > WEBP_SIDE:
        raise UsageError(f"format: WebP pictures are at most {WEBP_SIDE} pixels a side; ask for fewer, or for png")
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    stream = io.BytesIO()
    if format == "webp":
        picture.save(stream, "WEBP", quality=90, method=2)
    else:
        # Level 1 takes about a third of the default's time for files about a tenth larger.
        picture.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _npy(array: Array) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def _zip(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            # A fixed date: the same request gives the same bytes.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return stream.getvalue()
