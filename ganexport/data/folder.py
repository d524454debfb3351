"""A folder of pictures; sub-folders are classes, numbered in the order of their names."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path

import numpy as np

from ganexport.data.fit import Fit
from ganexport.data.images import ImageSet, Pixels, from_arrays, opaque
from ganexport.errors import DataError, MixedSizesError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
#: Decoded pixels up to this size are kept in memory; larger folders are decoded batch by batch.
MEMORY_LIMIT = 4 << 30
#: Pillow modes that are taken as they are, and the mode they become.
_MODES = {"L": "L", "1": "L", "RGB": "RGB", "P": "RGB", "RGBA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "LA": "RGBA"}


class PictureReader:
    """Pictures decoded when asked for, each brought to the model's size, or checked against the first one's.

    Grey pictures become colour ones where those are wanted.

    Args:
        files: In order.
        fit: The model's size and how to get there; None takes no picture of another size than the first one's.

    Attributes:
        size: (H, W, C) of what :meth:`read` gives.
    """

    def __init__(self, files: list[Path], fit: Fit | None = None) -> None:
        self.files, self.fit = files, fit
        self.size = fit.size if fit is not None else _size(decode(files[0]))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Pixels:
        """One picture, uint8 [H, W, C].

        Raises:
            DataError: Damaged, or of a size or mode that cannot be mended.
        """
        return self.fitted(index, decode(self.files[index]))

    def fitted(self, index: int, image: Pixels) -> Pixels:
        """A decoded picture [h, w, C] as :meth:`read` gives it."""
        path = self.files[index]
        if image.shape[2] == 1 and self.size[2] == 3:
            image = np.repeat(image, 3, axis=2)  # a grey picture among colour ones
        if self.fit is not None:
            change = self.fit.change(_size(image), str(path))
            return image if change is None else change(image)
        if image.shape != self.size:
            kind = MixedSizesError if image.shape[2] == self.size[2] else DataError
            raise kind(
                f"{path}: {_describe(image.shape)}, but {self.files[0].name} is {_describe(self.size)}; "
                "all pictures must have one size and one number of channels"
            )
        return image


def read_folder(folder: Path, memory_limit: int = MEMORY_LIMIT, fit: Fit | None = None) -> ImageSet:
    """All pictures below a folder, in the order of their paths.

    Args:
        folder: Pictures, or sub-folders of pictures (then each is a class).
        memory_limit: Bytes of pixels, decoded and fitted, up to which they are kept in memory.
        fit: Brings each picture to a model's size; None refuses pictures of different sizes.

    Raises:
        DataError: No pictures, a damaged one, sizes that do not fit, or pictures beside class folders.
    """
    files = _pictures(folder)
    if not files:
        raise DataError(f"{folder}: no pictures in it ({', '.join(s[1:] for s in SUFFIXES[:5])}, …) and no idx files")
    labels, classes = _labels(folder, files)
    reader = PictureReader(files, fit)
    name = folder.resolve().name
    digest = hashlib.sha256()
    if math.prod(reader.size) * len(files) <= memory_limit:
        images = np.empty((len(files), *reader.size), np.uint8)
        for index, path in enumerate(files):
            image = decode(path)
            digest.update(np.ascontiguousarray(image).data)
            images[index] = reader.fitted(index, image)
        found = from_arrays(images, labels, name=name, where=str(folder), classes=classes)
        if labels is not None:
            digest.update(labels.tobytes())
        return dataclasses.replace(found, digest=digest.hexdigest())
    reader.read(0)  # what is wrong with all of them is said now, not by the first batch
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
    return ImageSet(reader, labels, reader.size, name, classes, digest.hexdigest())


def _pictures(folder: Path) -> list[Path]:
    """Pictures below a folder, in links to folders too; names that begin with a dot are the system's, and left out."""
    found = []
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(here)
        if place in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(here) / name for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(found)


def _labels(
    folder: Path, files: list[Path]
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]] | None, tuple[str, ...]]:
    tops = [path.relative_to(folder).parts for path in files]
    nested = [len(parts) > 1 for parts in tops]
    if not any(nested):
        return None, ()
    if not all(nested):
        loose = files[nested.index(False)]
        raise DataError(f"{loose}: lies beside class folders; put every picture into a class folder, or none")
    classes = tuple(sorted({parts[0] for parts in tops}))
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[parts[0]] for parts in tops], np.int64), classes


def decode(path: Path) -> Pixels:
    """One picture, uint8 [H, W, C] with 1 (grey), 3 (colour) or, where it is really transparent, 4 channels.

    Raises:
        DataError: Missing, truncated, not a picture, or of a mode with more than 8 bits.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.mode not in _MODES:
                raise DataError(
                    f"{path}: picture mode {picture.mode} is not supported; convert it to grey or RGB, 8 bits"
                )
            picture.load()
            mode = "RGBA" if picture.mode == "P" and "transparency" in picture.info else _MODES[picture.mode]
            pixels = np.asarray(ImageOps.exif_transpose(picture).convert(mode))  # as cameras say it is to be held
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a picture, or damaged") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"{path}: truncated or damaged picture: {error}") from None
    return pixels[..., None] if pixels.ndim == 2 else opaque(pixels)


def _size(image: Pixels) -> tuple[int, int, int]:
    return image.shape[0], image.shape[1], image.shape[2]


def _describe(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} with {shape[2]} channel{'s' if shape[2] > 1 else ''}"
