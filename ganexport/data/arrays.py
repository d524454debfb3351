"""Images in numpy files: the embedded MNIST, .npz and .npy."""

from __future__ import annotations

import tokenize
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
#: What numpy raises for files that are cut, changed or encrypted.
_DAMAGE = (
    ValueError, OSError, EOFError, KeyError, RuntimeError, MemoryError,
    SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


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
    labels: NDArray[Any] | None = None
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.lib.npyio.NpzFile):  # whatever its name ends with
            images, labels = _read_npz(content, path, split)
        else:
            images = content
    except _DAMAGE as error:
        raise DataError(f"{path}: {_reason(error)}") from None
    return from_arrays(images, labels, name=name or path.stem, where=str(path))


def _read_npz(content: np.lib.npyio.NpzFile, path: Path, split: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    with content:
        keys = list(content.keys())
        images = _pick(keys, (f"x_{split}", f"{split}_images", *_IMAGE_KEYS))
        if images is None:
            raise DataError(
                f"{path}: no array named images in it (arrays: {', '.join(keys) or 'none'}); "
                "save with numpy.savez(file, images=..., labels=...)"
            )
        labels = _pick(keys, (f"y_{split}", f"{split}_labels", *_LABEL_KEYS))
        found = {key: content[key] for key in (images, labels) if key is not None}
    for key, array in found.items():
        if isinstance(array, bytes):  # what numpy gives for a member that is no array
            raise DataError(f"{path}: {key} in it is not a numpy array")
    return found[images], found[labels] if labels is not None else None


def _pick(keys: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((key for key in wanted if key in keys), None)


def _reason(error: Exception) -> str:
    if "pickle" in str(error) or "object arrays" in str(error).lower():
        return "not a numpy file, or one of Python objects, which are never loaded; save plain uint8 arrays"
    if isinstance(error, MemoryError):
        return "does not fit in memory, if it is not damaged; an .npy file is mapped, not read"
    return f"truncated or damaged numpy file: {(str(error).splitlines() or [type(error).__name__])[0]}"
