"""What every source becomes: uint8 images with optional labels, and a digest to know them again by."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ganexport.errors import DataError

Pixels = NDArray[np.uint8]
CHANNELS = (1, 3, 4)


class Reader(Protocol):
    """Images that are decoded when asked for, because all of them would not fit in memory."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pixels:
        """One image, uint8 [H, W, C]."""
        ...


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    Attributes:
        images: uint8 [N, H, W, C] in memory (or mapped from a file), or a :class:`Reader`.
        labels: int64 [N], or None.
        size: (H, W, C).
        name: For people and records; never a machine's path.
        classes: Names of the classes by label; empty without labels.
        digest: sha256 over the content (for a :class:`Reader`: over names and sizes of the files).
    """

    images: Pixels | Reader
    labels: NDArray[np.int64] | None
    size: tuple[int, int, int]
    name: str
    classes: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def in_memory(self) -> bool:
        """Whether the pixels are one array."""
        return isinstance(self.images, np.ndarray)

    @property
    def bytes(self) -> int:
        """Size of all pixels, decoded."""
        height, width, channels = self.size
        return len(self) * height * width * channels

    def array(self) -> Pixels:
        """All images, uint8 [N, H, W, C]; a :class:`Reader` is read through."""
        if isinstance(self.images, np.ndarray):
            return self.images
        return np.stack([self.images.read(index) for index in range(len(self.images))])

    def mapped(self, size: tuple[int, int, int], change: Callable[[Pixels], Pixels]) -> ImageSet:
        """The same set with every image changed (padded, resized).

        Args:
            size: (H, W, C) after the change.
            change: From uint8 [H, W, C] to uint8 of the new size.
        """
        images: Pixels | Reader
        if isinstance(self.images, np.ndarray):
            images = np.stack([change(image) for image in self.images])
        else:
            images = _Mapped(self.images, change)
        return dataclasses.replace(self, images=images, size=size)


class _Mapped:
    def __init__(self, reader: Reader, change: Callable[[Pixels], Pixels]) -> None:
        self._reader, self._change = reader, change

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, index: int) -> Pixels:
        return self._change(self._reader.read(index))


def from_arrays(
    images: NDArray[Any], labels: NDArray[Any] | None, *, name: str, where: str, classes: Sequence[str] = ()
) -> ImageSet:
    """An image set of arrays, checked.

    Args:
        images: uint8 [N, H, W] or [N, H, W, C] with 1, 3 or 4 channels ([N, C, H, W] is turned round).
        labels: [N] whole numbers from 0, or None.
        name: Of the set.
        where: File to name in an error.
        classes: Names by label; the numbers themselves when not given.

    Raises:
        DataError: Empty, of the wrong dtype or shape, or labels that do not fit.
    """
    if images.dtype != np.uint8:
        raise DataError(f"{where}: images must be uint8 (0 to 255), these are {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise DataError(f"{where}: images must have the shape [N, H, W] or [N, H, W, C], not {list(images.shape)}")
    if images.shape[-1] not in CHANNELS and images.shape[1] in CHANNELS:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    if images.shape[-1] not in CHANNELS:
        raise DataError(f"{where}: images must have 1, 3 or 4 channels, shape is {list(images.shape)}")
    if images.size == 0:
        raise DataError(f"{where}: holds no images")
    found = _check_labels(labels, len(images), where)
    if found is not None and not classes:
        classes = tuple(map(str, range(int(found.max()) + 1)))
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    if found is not None:
        digest.update(found.tobytes())
    images = opaque(images)
    height, width, channels = images.shape[1:]
    return ImageSet(images, found, (height, width, channels), name, tuple(classes), digest.hexdigest())


def opaque(images: Pixels) -> Pixels:
    """Images [..., C] without a fourth channel that says nothing: an alpha of 255 everywhere."""
    return images[..., :3] if images.shape[-1] == 4 and bool((images[..., 3] == 255).all()) else images


def _check_labels(labels: NDArray[Any] | None, count: int, where: str) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels must be one whole number an image, not {labels.dtype} {list(labels.shape)}")
    if len(labels) != count:
        raise DataError(f"{where}: {count} images but {len(labels)} labels")
    found = labels.astype(np.int64)
    if found.min() < 0:
        raise DataError(f"{where}: labels start at 0, the smallest here is {int(found.min())}")
    if found.max() > 65535:
        raise DataError(f"{where}: the largest label is {int(found.max())}; classes are numbered from 0 without gaps")
    return found
