"""Sample grids of a generator in training."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ganexport.artifact import write_atomic
from ganexport.seeding import Sampling
from ganexport.spec import GeneratorSpec, Label, OneHot


class SampleGrid:
    """The same latents at every step, so that grids can be compared; classes take turns where there are labels.

    Args:
        spec: Of the generator.
        count: Images in a grid.
        seed: As for ``ganexport generate``: the exported generator makes the same images for it.
        device: Of the generator.
    """

    def __init__(self, spec: GeneratorSpec, count: int, seed: int, device: torch.device) -> None:
        classes = [t.sampler.classes for t in spec.inputs if isinstance(t.sampler, Label | OneHot)]
        labels = np.arange(count) % classes[0] if classes else None
        feeds = Sampling(spec).draw(seed, 0, count, labels=labels)
        self._feeds = {name: torch.from_numpy(value).to(device) for name, value in feeds.items()}
        self._count = count
        output = spec.image_output
        self._low, self._high = output.range if output is not None and output.range is not None else (-1.0, 1.0)

    def draw(self, generator: nn.Module) -> NDArray[np.uint8]:
        """The grid as uint8 [H, W, C]; draws nothing from the global random generators.

        Args:
            generator: In evaluation mode.
        """
        devices = [torch.cuda.current_device()] if next(iter(self._feeds.values())).is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            images: Tensor = generator(**self._feeds)  # [N, C, H, W]
        scaled = (images.float() - self._low) * (255.0 / (self._high - self._low))
        pixels = scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # [N, H, W, C]
        return tile(pixels)


def tile(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images [N, H, W, C] side by side in a nearly square grid, uint8 [rows·H, columns·W, C]."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas: NDArray[np.uint8] = np.zeros((rows * columns, height, width, channels), np.uint8)
    canvas[:count] = images
    grid: Any = canvas.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid.reshape(rows * height, columns * width, channels))


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write uint8 [H, W, C] as a PNG, whole or not at all.

    Raises:
        OutputError: Not writable, or the disk is full.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
