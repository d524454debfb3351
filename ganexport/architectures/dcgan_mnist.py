"""The survey's DCGAN for MNIST, 28x28 grey: no normalisation, two transposed convolutions.

Generator: Linear(100, 128·7·7), LeakyReLU 0.2, ConvTranspose2d(128, 64, 4, 2, 1), LeakyReLU 0.2,
ConvTranspose2d(64, 1, 4, 2, 1), Tanh. Discriminator: its mirror image, Conv2d(1, 64, 4, 2, 1), LeakyReLU 0.2,
Conv2d(64, 128, 4, 2, 1), LeakyReLU 0.2, Linear(128·7·7, 1), raw logits.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn

from ganexport.errors import RecipeError
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec

SIZE = 28
SLOPE = 0.2


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes; the defaults are the survey's.

    Attributes:
        latent: Length of z.
        width: Channels of the layer between the two convolutions; twice as many at 7x7.
    """

    latent: int = 100
    width: int = 64

    def __post_init__(self) -> None:
        if self.latent < 1 or self.width < 1:
            raise RecipeError("latent and width must be at least 1")


class Generator(nn.Module):
    """z [N, latent] to images [N, 1, 28, 28] in (-1, 1)."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.width = options.width
        self.project = nn.Linear(options.latent, 2 * self.width * 7 * 7)
        self.up1 = nn.ConvTranspose2d(2 * self.width, self.width, 4, 2, 1)
        self.up2 = nn.ConvTranspose2d(self.width, 1, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Images of latents."""
        x = nn.functional.leaky_relu(self.project(z), SLOPE).unflatten(1, (2 * self.width, 7, 7))  # [N, 128, 7, 7]
        x = nn.functional.leaky_relu(self.up1(x), SLOPE)  # [N, 64, 14, 14]
        return torch.tanh(self.up2(x))  # [N, 1, 28, 28]


class Discriminator(nn.Module):
    """Images [N, 1, 28, 28] to logits [N]."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, options.width, 4, 2, 1)
        self.down2 = nn.Conv2d(options.width, 2 * options.width, 4, 2, 1)
        self.score = nn.Linear(2 * options.width * 7 * 7, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        x = nn.functional.leaky_relu(self.down1(images), SLOPE)  # [N, 64, 14, 14]
        x = nn.functional.leaky_relu(self.down2(x), SLOPE)  # [N, 128, 7, 7]
        logits: Tensor = self.score(x.flatten(1)).squeeze(1)  # [N]
        return logits


def generator(options: Options) -> nn.Module:
    """A fresh generator."""
    return Generator(options)


def discriminator(options: Options) -> nn.Module:
    """A fresh discriminator."""
    return Discriminator(options)


def spec(options: Options) -> GeneratorSpec:
    """Inputs and outputs of the generator."""
    return GeneratorSpec(
        (TensorSpec("z", "float32", ("batch", options.latent), Normal()),),
        (TensorSpec("image", "float32", ("batch", 1, SIZE, SIZE), None, (-1.0, 1.0), "NCHW"),),
        (Dim("batch", 1, 16, 64),),
        "dcgan-mnist",
    )
