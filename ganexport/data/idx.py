"""The idx format of the MNIST database, plain or gzip (yann.lecun.com/exdb/mnist, "file formats")."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ganexport.data.images import ImageSet, from_arrays
from ganexport.errors import DataError

_UINT8 = 0x08
#: An idx file larger than this is not read into memory (MNIST's largest is 47 MB).
_LIMIT = 16 << 30
_STEMS = {"train": "train", "test": "t10k"}


def looks_like_idx(folder: Path) -> bool:
    """Whether a folder holds idx files by their usual names."""
    return any(folder.glob("*idx[13]-ubyte*"))


def read_idx_folder(folder: Path, split: str = "train") -> ImageSet:
    """The images and labels of one split of a folder with MNIST's file names.

    Raises:
        DataError: A file is missing or damaged.
    """
    stem = _STEMS[split]
    images = _find(folder, f"{stem}-images")
    if images is None:
        raise DataError(f"{folder}: no {stem}-images-idx3-ubyte (or .gz) in it")
    return read_idx(images, _find(folder, f"{stem}-labels"), name=folder.resolve().name)


def read_idx(path: Path, labels: Path | None = None, name: str | None = None) -> ImageSet:
    """Images of one idx file; its labels file is found by name beside it.

    Raises:
        DataError: Damaged, truncated, empty, not images, or labels of another count.
    """
    values = read_idx_array(path)
    if values.ndim not in (3, 4):
        raise DataError(f"{path}: holds {values.ndim}-dimensional values, not images; give the images file")
    if labels is None and "-images" in path.name:
        labels = _find(path.parent, path.name.partition("-images")[0] + "-labels")
    found = read_idx_array(labels) if labels is not None else None
    where = str(path) if labels is None else f"{path} with {labels.name}"
    return from_arrays(values, found, name=name or path.name.partition("-images")[0], where=where)


def _find(folder: Path, start: str) -> Path | None:
    found = sorted(folder.glob(f"{start}[-.]idx*")) or sorted(folder.glob(f"{start}*ubyte*"))
    return found[0] if found else None


def read_idx_array(path: Path) -> NDArray[np.uint8]:
    """The array in an idx file, uint8 of any rank.

    Raises:
        DataError: Not an idx file, another element type, truncated, or with bytes left over.
    """
    raw = _content(path)
    if len(raw) < 4 or raw[0] or raw[1]:
        raise DataError(f"{path}: not an idx file (it does not start with two zero bytes)")
    if raw[2] != _UINT8:
        raise DataError(f"{path}: idx element type 0x{raw[2]:02x} is not 0x08 (unsigned bytes)")
    start = 4 + 4 * raw[3]
    if not raw[3] or len(raw) < start:
        raise DataError(f"{path}: truncated inside its header")
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    expected = math.prod(shape)
    if len(raw) - start != expected:
        state = "truncated" if len(raw) - start < expected else "damaged"
        raise DataError(
            f"{path}: {state}: the header promises {expected} bytes of values, there are {len(raw) - start}"
        )
    if not expected:
        raise DataError(f"{path}: holds no values (shape {shape})")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            if stream.read(2) != b"\x1f\x8b":
                stream.seek(0)
                raw = stream.read(_LIMIT + 1)
            else:
                with gzip.open(path) as unpacked:
                    raw = unpacked.read(_LIMIT + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or damaged gzip: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if len(raw) > _LIMIT:
        raise DataError(f"{path}: more than {_LIMIT >> 30} GiB unpacked; make it an .npy file, which is mapped")
    return raw
