"""DCGAN for 32, 64 and 128 pixels (Radford et al. 2016, arXiv:1511.06434).

Generator: z as a 1x1 map, ConvTranspose2d to 4x4 (7x7 for 28 pixels), then one ConvTranspose2d(4, 2, 1) a doubling,
BatchNorm and ReLU between, Tanh at the end. Discriminator: its mirror image with LeakyReLU 0.2; raw logits.
"""

from __future__ import annotations

import itertools
from typing import Literal, cast

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ganexport.architectures._common import channels_at, critic_norm, image_spec, map_sizes, normalized, require
from ganexport.spec import GeneratorSpec


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes and normalisation; the defaults are the paper's at 64 pixels.

    Attributes:
        image_size: 32, 64, 128, …, four times a power of two; or 28, 56, …, seven times one, which start from 7x7.
        channels: Of the image, 1 or 3.
        latent: Length of z.
        width: Channels of the layer next to the image; they double towards 4x4.
        norm: Of the discriminator: "batch" as in the paper; "none", "layer" or "instance" under a gradient penalty.
        spectral: Spectral normalisation of the discriminator's layers.
    """

    image_size: int = 64
    channels: int = 3
    latent: int = 100
    width: int = 64
    norm: Literal["none", "batch", "layer", "instance"] = "batch"
    spectral: bool = False

    def __post_init__(self) -> None:
        require(
            (self.channels in (1, 3), f"channels must be 1 or 3, got {self.channels}"),
            (self.latent >= 1 and self.width >= 1, "latent and width must be at least 1"),
        )
        map_sizes(self.image_size)


def _sizes(options: Options) -> list[int]:
    """Map sizes between 4 (or 7) and half the image."""
    return map_sizes(options.image_size)[:-1]


class FirstMap(nn.ConvTranspose2d):
    """z [N, latent] to the first map [N, C, 4, 4], as the paper's transposed convolution of a 1x1 map does.

    Computed as the product that it is, without a 1x1 map, whose memory format nobody can tell: with such maps the
    compiled step failed on CUDA in channels_last (torch 2.11).
    """

    def forward(self, z: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The first map, in the weight's memory format."""
        assert output_size is None
        channels, height, width = self.weight.shape[1:]
        if self.weight.is_contiguous():
            return (z @ self.weight.flatten(1)).view(-1, channels, height, width)
        rows = self.weight.permute(0, 2, 3, 1).flatten(1)  # [latent, 4 · 4 · C]
        return (z @ rows).view(-1, height, width, channels).permute(0, 3, 1, 2)


class Generator(nn.Module):
    """z [N, latent] to images [N, channels, size, size] in (-1, 1)."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        sizes = _sizes(options)
        widths = channels_at(options.width, sizes, 8 * options.width)
        layers: list[nn.Module] = [FirstMap(options.latent, widths[0], sizes[0], 1, 0, bias=False)]
        layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.to_image = nn.ConvTranspose2d(widths[-1], options.channels, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Images of latents."""
        return torch.tanh(self.to_image(self.layers(z)))


class Discriminator(nn.Module):
    """Images [N, channels, size, size] to logits [N]."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        widths = channels_at(options.width, _sizes(options), 8 * options.width)[::-1]
        bias = options.norm in ("none", "instance")
        layers: list[nn.Module] = [
            normalized(nn.Conv2d(options.channels, widths[0], 4, 2, 1), options.spectral),
            nn.LeakyReLU(0.2),
        ]
        for before, after in itertools.pairwise(widths):
            layers += [
                normalized(nn.Conv2d(before, after, 4, 2, 1, bias=bias), options.spectral),
                critic_norm(options.norm, after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers)
        self.score = normalized(nn.Conv2d(widths[-1], 1, _sizes(options)[0], 1, 0), options.spectral)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        weight, bias = cast(Tensor, self.score.weight), cast(Tensor, self.score.bias)
        logits: Tensor = F.linear(self.layers(images).flatten(1), weight.flatten(1), bias).flatten()  # [N]
        return logits


def generator(options: Options) -> nn.Module:
    """A fresh generator."""
    return Generator(options)


def discriminator(options: Options) -> nn.Module:
    """A fresh discriminator."""
    return Discriminator(options)


def spec(options: Options) -> GeneratorSpec:
    """Inputs and outputs of the generator."""
    return image_spec("dcgan", options.latent, options.channels, options.image_size)
