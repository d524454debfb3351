"""Residual networks for 32, 64 and 128 pixels, with or without classes, with or without attention.

Generator and discriminator of WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028) and SNGAN (Miyato et al. 2018,
arXiv:1802.05957): residual blocks, nearest-neighbour upsampling, average pooling. With classes: conditional batch
normalisation in the generator, a projection discriminator (Miyato and Koyama 2018, arXiv:1802.05637). With
``attention``: SAGAN (Zhang et al. 2019, arXiv:1805.08318).
"""

from __future__ import annotations

import itertools
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, relu, scaled_dot_product_attention

from ganexport.architectures._common import (
    ConditionalBatchNorm2d,
    channels_at,
    check_labels,
    critic_norm,
    image_spec,
    map_sizes,
    normalized,
    outside_autocast,
    require,
)
from ganexport.spec import GeneratorSpec


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes, normalisation, classes, attention.

    Attributes:
        image_size: 32, 64, 128, …, four times a power of two; or 28, 56, …, seven times one, which start from 7x7.
        channels: Of the image, 1 or 3.
        latent: Length of z.
        width: Channels of the layer next to the image; they double towards 4x4, up to eight times.
        classes: 0 for an unconditional GAN.
        norm: Of the discriminator: "none", "layer" (WGAN-GP) or "batch" (not under a gradient penalty).
        spectral: Spectral normalisation of the discriminator (SNGAN).
        spectral_generator: Of the generator too (SAGAN).
        attention: Map size at which both networks attend over positions; 0 for none.
    """

    image_size: int = 32
    channels: int = 3
    latent: int = 128
    width: int = 64
    classes: int = 0
    norm: Literal["none", "layer", "batch"] = "none"
    spectral: bool = False
    spectral_generator: bool = False
    attention: int = 0

    def __post_init__(self) -> None:
        sizes = map_sizes(self.image_size)[1:]
        require(
            (self.channels in (1, 3), f"channels must be 1 or 3, got {self.channels}"),
            (self.latent >= 1 and self.width >= 1, "latent and width must be at least 1"),
            (self.classes >= 0 and self.classes != 1, f"classes must be 0 or at least 2, got {self.classes}"),
            (
                self.attention == 0 or self.attention in sizes[:-1],
                f"attention must be 0 or a map size {', '.join(map(str, sizes[:-1]))}, got {self.attention}",
            ),
        )


class SelfAttention(nn.Module):
    """Self-attention over positions with a learned gate that starts at 0 (arXiv:1805.08318, equations 1 to 3).

    Args:
        channels: C of the input [N, C, H, W]; queries and keys have C/8, values C/2; keys and values are max-pooled
            by 2 as in the authors' implementation.
        spectral: Spectral normalisation of its convolutions.
    """

    def __init__(self, channels: int, spectral: bool) -> None:
        super().__init__()
        inner, values = max(channels // 8, 1), max(channels // 2, 1)
        self.query = normalized(nn.Conv2d(channels, inner, 1, bias=False), spectral)
        self.key = normalized(nn.Conv2d(channels, inner, 1, bias=False), spectral)
        self.value = normalized(nn.Conv2d(channels, values, 1, bias=False), spectral)
        self.output = normalized(nn.Conv2d(values, channels, 1, bias=False), spectral)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """x plus what each position gathers from all others, gated."""
        height, width = x.shape[-2:]
        # Contiguous: the fused kernels are only taken, and their missing second derivative only noticed, then.
        query = self.query(x).flatten(2).transpose(1, 2).contiguous()  # [N, HW, C/8]
        key = _pool(self.key(x)).flatten(2).transpose(1, 2).contiguous()  # [N, HW/4, C/8]
        value = _pool(self.value(x)).flatten(2).transpose(1, 2).contiguous()  # [N, HW/4, C/2]
        # Under autocast and torch.func.grad together, the math form of attention mixes dtypes and fails (torch 2.14).
        with outside_autocast(x):
            gathered = scaled_dot_product_attention(query, key, value, scale=1.0)  # [N, HW, C/2]
        attended: Tensor = self.output(gathered.transpose(1, 2).unflatten(2, (height, width)))
        return x + self.gate * attended


def _pool(x: Tensor) -> Tensor:
    return nn.functional.max_pool2d(x, 2)


class GeneratorBlock(nn.Module):
    """Residual block that doubles the map: (norm, ReLU, up, conv, norm, ReLU, conv) + (up, 1x1 conv)."""

    def __init__(self, before: int, after: int, classes: int, spectral: bool) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm2d(before, classes)
        self.conv1 = normalized(nn.Conv2d(before, after, 3, padding=1), spectral)
        self.norm2 = ConditionalBatchNorm2d(after, classes)
        self.conv2 = normalized(nn.Conv2d(after, after, 3, padding=1), spectral)
        self.skip = normalized(nn.Conv2d(before, after, 1), spectral)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """[N, before, H, W] to [N, after, 2H, 2W]."""
        up = interpolate(relu(self.norm1(x, labels)), scale_factor=2.0, mode="nearest")
        y: Tensor = self.conv2(relu(self.norm2(self.conv1(up), labels)))
        # A 1x1 convolution and nearest upsampling commute: convolving first does a quarter of the work.
        skip: Tensor = interpolate(self.skip(x), scale_factor=2.0, mode="nearest")
        return y + skip


class DiscriminatorBlock(nn.Module):
    """Residual block: (norm, ReLU, conv, norm, ReLU, conv, pool) + (1x1 conv, pool).

    Args:
        before: Channels in.
        after: Channels out.
        options: Norm and spectral normalisation.
        first: The block that sees the image: nothing before its first convolution.
        down: Whether the map is halved.
    """

    def __init__(self, before: int, after: int, options: Options, *, first: bool, down: bool) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.norm1 = nn.Identity() if first else critic_norm(options.norm, before)
        self.conv1 = normalized(nn.Conv2d(before, after, 3, padding=1), options.spectral)
        self.norm2 = critic_norm(options.norm, after)
        self.conv2 = normalized(nn.Conv2d(after, after, 3, padding=1), options.spectral)
        straight = before == after and not down
        self.skip = nn.Identity() if straight else normalized(nn.Conv2d(before, after, 1), options.spectral)

    def forward(self, x: Tensor) -> Tensor:
        """[N, before, H, W] to [N, after, H/2, W/2] (or H, W)."""
        y = x if self.first else relu(self.norm1(x))
        y = self.conv2(relu(self.norm2(self.conv1(y))))
        if not self.down:
            return y + self.skip(x)  # type: ignore[no-any-return]
        # Pooling and a 1x1 convolution commute: pooling first does a quarter of the work.
        return avg_pool2d(y, 2) + self.skip(avg_pool2d(x, 2))  # type: ignore[no-any-return]


class Generator(nn.Module):
    """z [N, latent] (and labels [N]) to images [N, channels, size, size] in (-1, 1)."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        sizes = map_sizes(options.image_size)
        widths = channels_at(options.width, sizes, 8 * options.width)
        spectral = options.spectral_generator
        self.project = normalized(nn.Linear(options.latent, widths[0] * sizes[0] ** 2), spectral)
        self.start = sizes[0]
        self.blocks = nn.ModuleList(
            GeneratorBlock(before, after, options.classes, spectral) for before, after in itertools.pairwise(widths)
        )
        self.attention = nn.ModuleDict(
            {str(i): SelfAttention(widths[i], spectral) for i, s in enumerate(sizes) if s == options.attention}
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.to_image = normalized(nn.Conv2d(widths[-1], options.channels, 3, padding=1), spectral)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images of latents and, for a conditional generator, labels."""
        check_labels(labels, self.options.classes, "generator")
        x = self.project(z).unflatten(1, (-1, self.start, self.start))  # [N, C, 4, 4] or [N, C, 7, 7]
        for index, block in enumerate(self.blocks, 1):
            x = block(x, labels)
            if str(index) in self.attention:
                x = self.attention[str(index)](x)
        return torch.tanh(self.to_image(relu(self.norm(x))))


class Discriminator(nn.Module):
    """Images [N, channels, size, size] (and labels [N]) to logits [N]."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        # After each halving, the last 8x8 (7x7 for 28 pixels).
        sizes = [size for size in map_sizes(options.image_size)[-2::-1] if size >= 7]
        widths = channels_at(options.width, [2 * s for s in sizes], 8 * options.width)
        blocks = []
        before = options.channels
        for index, width in enumerate(widths):
            blocks.append(DiscriminatorBlock(before, width, options, first=index == 0, down=True))
            before = width
        blocks.append(DiscriminatorBlock(before, before, options, first=False, down=False))
        self.blocks = nn.ModuleList(blocks)
        self.attention = nn.ModuleDict(
            {
                str(i): SelfAttention(widths[i], options.spectral)
                for i, size in enumerate(sizes)
                if size == options.attention
            }
        )
        self.score = normalized(nn.Linear(before, 1), options.spectral)
        self.embedding = (
            normalized(nn.Embedding(options.classes, before), options.spectral) if options.classes else None
        )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of images and, for a conditional discriminator, labels."""
        check_labels(labels, self.options.classes, "discriminator")
        x = images
        for index, block in enumerate(self.blocks):
            x = block(x)
            if str(index) in self.attention:
                x = self.attention[str(index)](x)
        # Summed in SNGAN and SAGAN, whose bounded layers need the larger scale to reach the hinge; averaged in WGAN-GP.
        features = relu(x).sum([2, 3]) if self.options.spectral else relu(x).mean([2, 3])  # [N, C]
        logits: Tensor = self.score(features).squeeze(1)  # [N]
        if self.embedding is not None:
            logits = logits + (self.embedding(labels) * features).sum(1)
        return logits


def generator(options: Options) -> nn.Module:
    """A fresh generator."""
    return Generator(options)


def discriminator(options: Options) -> nn.Module:
    """A fresh discriminator."""
    return Discriminator(options)


def spec(options: Options) -> GeneratorSpec:
    """Inputs and outputs of the generator."""
    return image_spec("resnet", options.latent, options.channels, options.image_size, options.classes)
