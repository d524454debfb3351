"""Batches for training: from uint8 pixels on the device when they fit, else streamed by a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ganexport.data.images import ImageSet, Reader
from ganexport.data.order import Order
from ganexport.errors import DataError

#: Share of the device's free memory that resident images may take.
RESIDENT_SHARE = 0.25
#: A mapped .npy file up to this size is read into memory.
MAPPED_LIMIT = 2 << 30


class Feed:
    """Batches of an image set in the order of a seed, sharded over processes.

    Batch t of b images holds the samples t·b .. t·b + b - 1 of :class:`Order`; process r of w takes
    the rows r·b/w .. (r + 1)·b/w of it, so that all processes together see what one alone would.

    Args:
        images: The set, of the model's size.
        batch_size: Images a batch over all processes.
        seed: Of the order.
        device: Where the batches are wanted.
        rank: This process.
        world: Number of processes.
        resident: Keep all pixels on the device; None decides by size.
        workers: Processes that decode, when streaming.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        resident: bool | None = None,
        workers: int = 2,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.device = device
        self.order = Order(len(images), seed)
        self.rows = slice(batch_size * rank // world, batch_size * (rank + 1) // world)
        self.resident = fits(images, device) if resident is None else resident
        self._workers = workers
        self._stream: tuple[int, Iterator[Tensor]] | None = None
        self._pixels = torch.from_numpy(_channels_first(images)).to(device) if self.resident else None  # [N, C, H, W]
        self._labels = torch.from_numpy(images.labels) if images.labels is not None else None

    def batch(self, number: int) -> tuple[Tensor, Tensor | None]:
        """This process's rows of a batch.

        Args:
            number: Batch number from 0; streaming is fast when they come one after another.

        Returns:
            Images float32 [b, C, H, W] in [-1, 1] and labels int64 [b] (None without labels), on the device.

        Raises:
            DataError: A streamed picture is damaged.
        """
        where = torch.from_numpy(self.indices(number))  # [b]
        labels = self._labels[where].to(self.device, non_blocking=True) if self._labels is not None else None
        if self._pixels is not None:
            pixels = self._pixels[where.to(self.device, non_blocking=True)]
        else:
            pixels = self._streamed(number).to(self.device, non_blocking=True)
        return pixels.float().div_(127.5).sub_(1.0), labels

    def indices(self, number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions in the set of this process's rows of a batch, [b]."""
        size = self.rows.stop - self.rows.start
        return self.order.indices(number * self.batch_size + self.rows.start, size)

    def _streamed(self, number: int) -> Tensor:
        if self._stream is None or self._stream[0] != number:
            loader = DataLoader(
                _Decoded(self.images),
                batch_sampler=_Batches(self, number),
                num_workers=self._workers,
                pin_memory=self.device.type == "cuda",
                # Workers draw nothing at random; a generator of its own keeps torch's global one untouched.
                generator=torch.Generator().manual_seed(0),
            )
            self._stream = (number, iter(loader))
        try:
            batch = next(self._stream[1])
        except DataError as error:  # raised in a worker: the message ends with the original one, after a traceback
            raise DataError(str(error).strip().splitlines()[-1].removeprefix("ganexport.errors.DataError: ")) from None
        self._stream = (number + 1, self._stream[1])
        return batch


def fits(images: ImageSet, device: torch.device) -> bool:
    """Whether the pixels may stay on the device: in memory already, and small against what is free there."""
    if not images.in_memory:
        return False
    if device.type != "cuda":
        return not isinstance(images.images, np.memmap) or images.bytes <= MAPPED_LIMIT
    free, _ = torch.cuda.mem_get_info(device)
    return images.bytes <= free * RESIDENT_SHARE


def _channels_first(images: ImageSet) -> np.ndarray[Any, np.dtype[np.uint8]]:
    # A copy even of a mapped file: torch wants memory it could write to.
    return np.array(images.array().transpose(0, 3, 1, 2), order="C")


class _Decoded(Dataset[Tensor]):
    """Images by position, uint8 [C, H, W]."""

    def __init__(self, images: ImageSet) -> None:
        self._images: np.ndarray[Any, np.dtype[np.uint8]] | Reader = images.images

    def __getitem__(self, index: int) -> Tensor:
        images = self._images
        pixels = images[index] if isinstance(images, np.ndarray) else images.read(index)
        return torch.from_numpy(np.array(pixels).transpose(2, 0, 1))


class _Batches:
    """Positions of every batch from a number on, without end."""

    def __init__(self, feed: Feed, start: int) -> None:
        self._feed, self._start = feed, start

    def __iter__(self) -> Iterator[list[int]]:
        number = self._start
        while True:
            yield [int(index) for index in self._feed.indices(number)]
            number += 1
