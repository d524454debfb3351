"""What several architectures share: specs of image generators, checks of options, small layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ganexport.errors import RecipeError
from ganexport.spec import Dim, GeneratorSpec, Label, Normal, TensorSpec


def image_spec(name: str, latent: int, channels: int, size: int, classes: int = 0) -> GeneratorSpec:
    """The spec of a generator of square images from z and, with classes, labels.

    Args:
        name: For people.
        latent: Length of z.
        channels: Of the image.
        size: Height and width.
        classes: 0 for an unconditional generator.
    """
    inputs = [TensorSpec("z", "float32", ("batch", latent), Normal())]
    if classes:
        inputs.append(TensorSpec("labels", "int64", ("batch",), Label(classes)))
    image = TensorSpec("image", "float32", ("batch", channels, size, size), None, (-1.0, 1.0), "NCHW")
    return GeneratorSpec(tuple(inputs), (image,), (Dim("batch", 1, 16, 64),), name)


def require(*problems: tuple[bool, str]) -> None:
    """Raise all the messages whose condition does not hold.

    Raises:
        RecipeError: At least one condition is false.
    """
    wrong = [message for holds, message in problems if not holds]
    if wrong:
        raise RecipeError("; ".join(wrong))


def map_sizes(size: int) -> list[int]:
    """Sizes of the square maps from the smallest, 4 or 7, doubling up to an image's.

    Args:
        size: Of the image: 4 or 7 times a power of two, so 8, 14, 16, 28, 32, 56, 64, …

    Raises:
        RecipeError: It is neither.
    """
    start = 7 if size % 7 == 0 else 4
    count = max(0, size // start).bit_length() - 1
    if count < 1 or start << count != size:
        raise RecipeError(f"image_size must be 4 or 7 times a power of two (16, 28, 32, 56, 64, …), got {size}")
    return [start << i for i in range(count + 1)]


def check_labels(labels: Tensor | None, classes: int, what: str) -> None:
    """Refuse labels given to an unconditional network, or missing from a conditional one."""
    if (labels is None) == bool(classes):
        raise ValueError(
            f"this {what} is {'' if classes else 'not '}conditional: labels {'missing' if classes else 'given'}"
        )


def outside_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which x's device computes in the dtypes it is given.

    Without autocast it is no context at all: an exported graph would keep even one that changes nothing.
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def normalized(layer: nn.Module, spectral: bool) -> nn.Module:
    """The layer, under spectral normalisation if asked (Miyato et al. 2018, arXiv:1802.05957)."""
    return spectral_norm(layer) if spectral else layer


class LayerNorm2d(nn.GroupNorm):
    """Layer normalisation over channels and positions, with one scale and shift a channel (WGAN-GP's critic norm)."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], normalised; on a CPU in float32, as autocast has it on CUDA.

        Of bfloat16 with float32 weights, torch's kernel there keeps float32 statistics where its shape function
        promises bfloat16: a captured double backward then hands convolutions a float32 gradient, which oneDNN refuses.
        """
        if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


def critic_norm(kind: str, channels: int) -> nn.Module:
    """A discriminator's normalisation: "none", "batch", "layer" or "instance"."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "layer":
        return LayerNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.Identity()


class ConditionalBatchNorm2d(nn.Module):
    """Batch normalisation with one scale and shift a class (Dumoulin et al. 2017, arXiv:1610.07629).

    Args:
        channels: C of the input [N, C, H, W].
        classes: 0 makes it a plain batch normalisation.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=not classes)
        self.scale = nn.Embedding(classes, channels) if classes else None
        self.shift = nn.Embedding(classes, channels) if classes else None
        if self.scale is not None and self.shift is not None:
            nn.init.ones_(self.scale.weight)
            nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Normalised x, scaled and shifted by the class of each image."""
        normal: Tensor = self.norm(x)
        if self.scale is None or self.shift is None:
            return normal
        scale: Tensor = self.scale(labels)[:, :, None, None]
        shift: Tensor = self.shift(labels)[:, :, None, None]
        return normal * scale + shift


class MinibatchStddev(nn.Module):
    """Append the standard deviation within groups of images as one more channel (Karras et al. 2018, arXiv:1710.10196).

    A batch that the group does not divide is taken as one group.
    """

    #: An image's score depends on its group: real and generated images must go through separately.
    batch_coupled = True

    def __init__(self, group: int = 4) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C + 1, H, W]."""
        n, c, h, w = x.shape
        group = self.group if n % self.group == 0 else n
        # Half precision overflows in the squares, and rounds 1e-8 to 0, where the root has no slope.
        grouped = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(group, n // group, c, h, w)
        deviation = (grouped.var(0, unbiased=False) + 1e-8).sqrt().mean([1, 2, 3])  # [N / group]
        feature = deviation.repeat(group).view(n, 1, 1, 1).expand(n, 1, h, w).to(x.dtype)
        return torch.cat([x, feature], 1)


def channels_at(width: int, sizes: Sequence[int], limit: int) -> list[int]:
    """``width`` channels at the largest of these sizes, doubling at each smaller one up to ``limit``."""
    largest = max(sizes)
    return [min(limit, width * largest // size) for size in sizes]
