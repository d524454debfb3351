"""A modern residual GAN in the manner of R3GAN (Huang et al. 2024, arXiv:2501.05441).

No normalisation anywhere: residual blocks of 1x1 expansion, grouped 3x3 and 1x1 projection with leaky ReLU, the last
convolution of each block starting at zero (fix-up initialisation, Zhang et al. 2019), bilinear resampling between
stages. The generator starts from a learned 4x4 basis weighted by z; the discriminator ends in its mirror image.
Meant for the ``relativistic`` objective with the ``r1`` and ``r2`` regularizers.
"""

from __future__ import annotations

import itertools
import math

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from ganexport.architectures._common import channels_at, check_labels, image_spec, map_sizes, require
from ganexport.spec import GeneratorSpec

#: Without normalisation it is the first weights that keep the variance.
OWN_INITIALIZATION = True
SLOPE = 0.2


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes and depth.

    Attributes:
        image_size: 32, 64, 128, …, four times a power of two; or 28, 56, …, seven times one, which start from 7x7.
        channels: Of the image, 1 or 3.
        latent: Length of z.
        width: Channels of the stage next to the image; they double towards 4x4, up to eight times.
        blocks: Residual blocks a stage.
        expansion: Channels inside a block over those outside.
        group: Channels of one group of the 3x3 convolutions.
        classes: 0 for an unconditional GAN.
    """

    image_size: int = 32
    channels: int = 3
    latent: int = 64
    width: int = 96
    blocks: int = 2
    expansion: int = 2
    group: int = 16
    classes: int = 0

    def __post_init__(self) -> None:
        require(
            (self.channels in (1, 3), f"channels must be 1 or 3, got {self.channels}"),
            (self.latent >= 1 and self.blocks >= 1 and self.expansion >= 1, "latent, blocks, expansion must be >= 1"),
            (self.group >= 1 and self.width >= 1, "group and width must be at least 1"),
            (
                self.group >= 1 and (self.width * self.expansion) % self.group == 0,
                f"group {self.group} must divide width x expansion = {self.width * self.expansion}",
            ),
            (self.classes >= 0 and self.classes != 1, f"classes must be 0 or at least 2, got {self.classes}"),
        )
        map_sizes(self.image_size)


def _convolution(
    before: int, after: int, kernel: int, groups: int = 1, *, bias: bool = False, gain: float = 1.0
) -> nn.Conv2d:
    layer = nn.Conv2d(before, after, kernel, padding=kernel // 2, groups=groups, bias=bias)
    fan_in = before // groups * kernel * kernel
    nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
    return layer


class Block(nn.Module):
    """x + project(act(grouped(act(expand(x))))), with biased activations.

    Args:
        channels: Outside.
        options: Expansion and group size.
        scale: Initial gain of the inner convolutions, (number of blocks)^(-1/4) by fix-up.
    """

    def __init__(self, channels: int, options: Options, scale: float) -> None:
        super().__init__()
        inner = channels * options.expansion
        gain = math.sqrt(2.0 / (1.0 + SLOPE * SLOPE)) * scale
        self.expand = _convolution(channels, inner, 1, gain=gain, bias=True)
        self.grouped = _convolution(inner, inner, 3, inner // options.group, gain=gain, bias=True)
        self.project = _convolution(inner, channels, 1, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        y = leaky_relu(self.expand(x), SLOPE)
        y = leaky_relu(self.grouped(y), SLOPE)
        projected: Tensor = self.project(y)
        return x + projected


def _widths(options: Options) -> list[int]:
    """Channels at 4x4 (or 7x7), twice that, …, image_size."""
    return channels_at(options.width, map_sizes(options.image_size), 8 * options.width)


class Generator(nn.Module):
    """z [N, latent] (and labels [N]) to images [N, channels, size, size] in (-1, 1)."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        widths = _widths(options)
        scale = (len(widths) * options.blocks) ** -0.25
        self.embedding = nn.Embedding(options.classes, options.latent) if options.classes else None
        start = map_sizes(options.image_size)[0]
        self.basis = nn.Parameter(torch.randn(widths[0], start, start))
        self.weight = nn.Linear(options.latent * (2 if options.classes else 1), widths[0], bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(*[Block(width, options, scale) for _ in range(options.blocks)]) for width in widths
        )
        self.transitions = nn.ModuleList(_convolution(before, after, 1) for before, after in itertools.pairwise(widths))
        self.to_image = _convolution(widths[-1], options.channels, 1, gain=0.25)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images of latents and, for a conditional generator, labels."""
        check_labels(labels, self.options.classes, "generator")
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(labels)], 1)
        x = self.basis * self.weight(z)[:, :, None, None]  # [N, C, 4, 4] or [N, C, 7, 7]
        x = self.stages[0](x)
        for transition, stage in zip(self.transitions, list(self.stages)[1:], strict=True):
            # Channels first, then pixels: the 1x1 convolution commutes with resampling and is four times cheaper here.
            x = interpolate(transition(x), scale_factor=2.0, mode="bilinear", align_corners=False)
            x = stage(x)
        return torch.tanh(self.to_image(x))


class Discriminator(nn.Module):
    """Images [N, channels, size, size] (and labels [N]) to logits [N]."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        widths = _widths(options)[::-1]
        scale = (len(widths) * options.blocks) ** -0.25
        self.from_image = _convolution(options.channels, widths[0], 1)
        self.stages = nn.ModuleList(
            nn.Sequential(*[Block(width, options, scale) for _ in range(options.blocks)]) for width in widths
        )
        self.transitions = nn.ModuleList(_convolution(before, after, 1) for before, after in itertools.pairwise(widths))
        start = map_sizes(options.image_size)[0]
        self.basis = nn.Conv2d(widths[-1], widths[-1], start, groups=widths[-1], bias=False)
        self.score = nn.Linear(widths[-1], options.latent if options.classes else 1, bias=False)
        self.embedding = nn.Embedding(options.classes, options.latent) if options.classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of images and, for a conditional discriminator, labels."""
        check_labels(labels, self.options.classes, "discriminator")
        x = self.stages[0](self.from_image(images))
        for transition, stage in zip(self.transitions, list(self.stages)[1:], strict=True):
            x = stage(transition(nn.functional.avg_pool2d(x, 2)))
        x = self.score(self.basis(x).flatten(1))  # [N, 1] or [N, latent]
        if self.embedding is None:
            return x.squeeze(1)  # type: ignore[no-any-return]
        return (x * self.embedding(labels)).sum(1) / math.sqrt(self.options.latent)  # type: ignore[no-any-return]


def generator(options: Options) -> nn.Module:
    """A fresh generator."""
    return Generator(options)


def discriminator(options: Options) -> nn.Module:
    """A fresh discriminator."""
    return Discriminator(options)


def spec(options: Options) -> GeneratorSpec:
    """Inputs and outputs of the generator."""
    return image_spec("r3gan", options.latent, options.channels, options.image_size, options.classes)
