"""The order in which images are seen: a function of (seed, epoch, position) alone.

Sample k of a run is image ``permutation(epoch = k // N)[k mod N]``; batches run on across epochs, so
every image is seen equally often, a batch is never short, and resuming needs no state but k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ganexport.seeding import philox

#: Second counter word of the permutations, so that they share no random word with latents of the seed.
_STREAM = 0x6F726465  # "orde"


class Order:
    """Positions of the run's samples in a set of ``count`` images.

    Args:
        count: Images in the set.
        seed: 0 to 2^64 - 1.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """A permutation of 0 .. count - 1: the images sorted by 64 random bits each (Philox4x32-10)."""
        if epoch not in self._epochs:
            positions = np.arange(self.count, dtype=np.uint64) + (np.uint64(epoch) << np.uint64(32))
            words = philox(np.array([self.seed], np.uint64), _STREAM, positions, 1).astype(np.uint64)
            keys = words[:, 0] << np.uint64(32) | words[:, 1]
            while len(self._epochs) > 1:  # a batch touches two epochs at most, unless the set is tiny
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = np.argsort(keys, kind="stable").astype(np.int64)
        return self._epochs[epoch]

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """Images of the samples start .. start + count - 1, [count]."""
        parts = []
        end = start + count
        while start < end:
            epoch, position = divmod(start, self.count)
            part = self.permutation(epoch)[position : position + end - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if len(parts) != 1 else parts[0]
