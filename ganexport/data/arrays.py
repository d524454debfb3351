"""Images in numpy files: the embedded MNIST, .npz and .npy."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganexport.data.images import ImageSet, from_arrays
from ganexport.errors import DataError

_IMAGE_KEYS = ("images", "x", "data", "arr_0")
_LABEL_KEYS = ("labels", "y", "targets", "arr_1")


def read_embedded(split: str = "train") -> ImageSet:
    """The first 10,000 training images of MNIST, 28x28 grey, with labels.

    Raises:
        DataError: Asked for the test images, which are not embedded.
    """
    if split != "train":
        raise DataError("mnist-10k holds training images only; give --data a folder with MNIST's idx files")
    return read_array_file(Path(__file__).with_name("mnist_10k.npz"), split, name="mnist-10k")


def read_array_file(path: Path, split: str = "train", name: str | None = None) -> ImageSet:
    """Images of an .npz (``images`` and, optionally, ``labels``; or ``x_train``, ``y_train``) or an .npy file.

    Args:
        path: The file. An .npy is mapped, not read, so it may be larger than the memory.
        split: Which of ``x_train`` / ``x_test`` to take when the .npz has both.
        name: Of the set; the file's stem when None.

    Raises:
        DataError: Damaged, with Python objects in it (never loaded), or not images.
    """
    try:
        if path.suffix == ".npy":
            images: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
            labels = None
        else:
            images, labels = _read_npz(path, split)
    except DataError:
        raise
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise DataError(f"{path}: {_reason(error)}") from None
    return from_arrays(images, labels, name=name or path.stem, where=str(path))


def _read_npz(path: Path, split: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    with np.load(path, allow_pickle=False) as content:
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: named .npz but is not one")
        keys = list(content.keys())
        images = _pick(keys, (f"x_{split}", f"{split}_images", *_IMAGE_KEYS))
        if images is None:
            raise DataError(
                f"{path}: no array named images in it (arrays: {', '.join(keys) or 'none'}); "
                "save with numpy.savez(file, images=..., labels=...)"
            )
        labels = _pick(keys, (f"y_{split}", f"{split}_labels", *_LABEL_KEYS))
        return content[images], content[labels] if labels is not None else None


def _pick(keys: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((key for key in wanted if key in keys), None)


def _reason(error: Exception) -> str:
    if "pickle" in str(error) or "object arrays" in str(error).lower():
        return "holds Python objects, which are never loaded; save plain uint8 arrays"
    return f"truncated or damaged numpy file: {(str(error).splitlines() or [type(error).__name__])[0]}"
