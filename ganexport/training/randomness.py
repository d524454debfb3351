"""Everything random in a training: latents by global sample, and the states of all generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganexport.seeding import Sampling
from ganexport.spec import GeneratorSpec

_MASK = 2**64 - 1
#: Keeps the latents of training apart from those that ``generate`` draws for the same seed.
_TRAINING = 0x9E3779B97F4A7C15


class Latents:
    """A generator's inputs for training: sample i of draw t is the seed contract's sample t·b + i.

    Args:
        spec: Of the generator.
        seed: Of the run.
        batch_size: Samples a draw, over all processes.
        rows: This process's part of them.
        device: Where they are wanted.
    """

    def __init__(self, spec: GeneratorSpec, seed: int, batch_size: int, rows: slice, device: torch.device) -> None:
        self._sampling = Sampling(spec)
        self._key = (seed + _TRAINING) & _MASK
        self._batch_size, self._rows, self._device = batch_size, rows, device

    def draw(self, number: int) -> dict[str, Tensor]:
        """This process's rows of draw ``number``, by input name."""
        start = number * self._batch_size + self._rows.start
        feeds = self._sampling.draw(self._key, start, self._rows.stop - self._rows.start)
        return {name: torch.from_numpy(value).to(self._device, non_blocking=True) for name, value in feeds.items()}


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and numpy's global generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of torch's (CPU's and, on CUDA, the device's), Python's and numpy's global generators."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    version, numbers, gauss = random.getstate()
    states["python"] = torch.tensor([version, *numbers], dtype=torch.int64)
    states["python.gauss"] = torch.tensor([0.0 if gauss is None else 1.0, gauss or 0.0], dtype=torch.float64)
    _, keys, position, has_gauss, cached = _numpy_state()
    states["numpy"] = torch.tensor([position, has_gauss, *map(int, keys)], dtype=torch.int64)
    states["numpy.gauss"] = torch.tensor([cached], dtype=torch.float64)
    return states


def restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what :func:`random_states` gave."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    version, *numbers = states["python"].tolist()
    has, gauss = states["python.gauss"].tolist()
    random.setstate((version, tuple(numbers), gauss if has else None))
    position, has_gauss, *keys = states["numpy"].tolist()
    cached = float(states["numpy.gauss"][0])
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))


def _numpy_state() -> Any:
    return np.random.get_state()
