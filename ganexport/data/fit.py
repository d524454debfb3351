"""Make images fit a model's input size, in the way the recipe names; never silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ganexport.data.images import ImageSet, Pixels
from ganexport.errors import DataError

FITS = ("refuse", "pad", "resize")


class Fit(NamedTuple):
    """A model's (H, W, C), and one of ``FITS``."""

    size: tuple[int, int, int]
    how: str = "refuse"

    def change(self, found: tuple[int, int, int], where: str) -> Callable[[Pixels], Pixels] | None:
        """What makes images of this size out of those of another; None where they have it already.

        Args:
            found: (H, W, C) of the images.
            where: Set or file to name in an error.

        Raises:
            DataError: Another number of channels, or a size that ``how`` cannot mend.
        """
        height, width, channels = found
        size, how = self
        if channels == 4:
            raise DataError(
                f"{where}: has transparent pixels, the model takes {_channels(size[2])}; lay pictures on a background "
                "first (ImageMagick: mogrify -background white -alpha remove -alpha off *.png)"
            )
        if channels != size[2]:
            raise DataError(
                f"{where}: has {_channels(channels)}, the model takes {size[2]}; "
                "convert the images or set the architecture's channels"
            )
        if (height, width) == size[:2]:
            return None
        if how == "pad" and height <= size[0] and width <= size[1]:
            return lambda image: _pad(image, size)
        if how == "resize":
            return lambda image: _resize(image, size)
        advice = (
            "--set data.fit=resize" if how == "pad" or height > size[0] or width > size[1] else "--set data.fit=pad"
        )
        raise DataError(f"{where}: {width}x{height}, the model takes {size[1]}x{size[0]}; try {advice}")


def fit(images: ImageSet, size: tuple[int, int, int], how: str = "refuse") -> ImageSet:
    """Images of a given size.

    Args:
        images: Of any one size.
        size: (H, W, C) that the model takes.
        how: "refuse" another size; "pad" with black to a larger one, the picture centred; "resize"
            the largest centred square (in the model's proportions) with an antialiasing filter.

    Raises:
        DataError: Another number of channels, or a size that ``how`` cannot mend.
    """
    change = Fit(size, how).change(images.size, images.name)
    return images if change is None else images.mapped(size, change)


def _channels(count: int) -> str:
    return f"{count} channel{'s' if count > 1 else ''}"


def _pad(image: Pixels, size: tuple[int, int, int]) -> Pixels:
    top, left = (size[0] - image.shape[0]) // 2, (size[1] - image.shape[1]) // 2
    out: Pixels = np.zeros(size, np.uint8)
    out[top : top + image.shape[0], left : left + image.shape[1]] = image
    return out


def _resize(image: Pixels, size: tuple[int, int, int]) -> Pixels:
    from PIL import Image

    height, width = image.shape[:2]
    scale = min(height / size[0], width / size[1])
    crop_height, crop_width = size[0] * scale, size[1] * scale
    top, left = (height - crop_height) / 2, (width - crop_width) / 2
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    box = (left, top, left + crop_width, top + crop_height)
    pixels = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box))
    return pixels[..., None] if pixels.ndim == 2 else pixels
