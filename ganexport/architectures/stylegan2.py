"""StyleGAN2 (Karras et al. 2020, arXiv:1912.04958): mapping network, modulated convolutions, skip generator.

The modulated convolution scales the activations before and after a convolution with static weights, which is the
same as giving each sample its own weights (section 2.2) but keeps the batch symbolic in an exported graph:

    y = d ⊙ conv(s ⊙ x, W),   d_o = 1 / sqrt(Σ_ik (s_i W_oik)² + ε)

Differences from the paper: images pass through tanh, noise is off unless asked for, and style mixing and path-length
regularisation are left to others.
"""

from __future__ import annotations

import itertools
import math

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ganexport.architectures._common import (
    MinibatchStddev,
    check_labels,
    image_spec,
    map_sizes,
    outside_autocast,
    require,
)
from ganexport.spec import Constant, GeneratorSpec, Normal, TensorSpec

#: Equalised learning rates presume weights of N(0, 1).
OWN_INITIALIZATION = True
SLOPE = 0.2
GAIN = math.sqrt(2.0)  # keeps the variance through a leaky ReLU
W_AVERAGE_DECAY = 0.995


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes and inputs.

    Attributes:
        image_size: Height and width of the images: 4 or 7 times a power of two (28, 32, 64, 128, …).
        channels: Of the images.
        latent: Length of z and w.
        classes: 0 for unconditional.
        mapping_layers: Fully connected layers from z to w.
        width: Channels at resolution r are width · 512 / r at most (the paper's 2 for 16384 / r is width 32).
        max_width: Channels at the lowest resolutions.
        noise: Take an input "noise" [batch, numbers], one number a pixel of each layer, scaled by learned strengths.
        truncation: Take an input "truncation" [batch] that pulls w towards its average: 1 leaves it, 0 is the average.
        minibatch_group: Images over which the discriminator's standard deviation is taken; 0 leaves it out.
    """

    image_size: int = 64
    channels: int = 3
    latent: int = 512
    classes: int = 0
    mapping_layers: int = 8
    width: int = 32
    max_width: int = 512
    noise: bool = False
    truncation: bool = False
    minibatch_group: int = 4

    def __post_init__(self) -> None:
        counts = ("latent", "mapping_layers", "width", "max_width")
        require(
            (self.channels in (1, 3), f"channels must be 1 or 3, got {self.channels}"),
            *((getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}") for name in counts),
            (self.classes >= 0 and self.classes != 1, f"classes must be 0 or at least 2, got {self.classes}"),
            (self.minibatch_group == 0 or self.minibatch_group > 1, "minibatch_group must be 0 (none) or at least 2"),
        )
        resolutions(self)

    def channels_at(self, resolution: int) -> int:
        """Feature channels at a resolution."""
        return max(1, min(self.width * 512 // resolution, self.max_width))


def resolutions(options: Options) -> list[int]:
    """From 4 (or 7) up to the image's, each twice the one before.

    Raises:
        RecipeError: The image size is no power of two times either.
    """
    return map_sizes(options.image_size)


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU that keeps the variance."""
    return F.leaky_relu(x, SLOPE) * GAIN


class Linear(nn.Module):
    """Fully connected layer with equalised learning rate: weights N(0, 1), scaled when used (arXiv:1710.10196).

    Args:
        rate: Multiplies the layer's learning rate.
        bias: Starting value of the bias.
    """

    def __init__(self, inputs: int, outputs: int, *, rate: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.offset = nn.Parameter(torch.full((outputs,), bias / rate))
        self.scale, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] to [N, outputs]."""
        return F.linear(x, self.matrix * self.scale, self.offset * self.rate)


class Conv(nn.Module):
    """Convolution with equalised learning rate, an optional bias and activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True, active: bool = True) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.offset = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.active = 1 / math.sqrt(inputs * kernel * kernel), active

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H, W]."""
        y = F.conv2d(x, self.kernel * self.scale, self.offset, padding=self.kernel.shape[2] // 2)
        return activate(y) if self.active else y


class ModulatedConv(nn.Module):
    """Convolution whose weights are scaled by a style, written with static weights (see the module's formula).

    Args:
        demodulate: Bring every output channel back to unit variance.
        up: Double the size first (transposed convolution, then the [1, 3, 3, 1] filter).
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, latent: int, *, demodulate: bool = True, up: bool = False
    ) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.style = Linear(latent, inputs, bias=1.0)
        self.scale = 1 / math.sqrt(inputs * kernel * kernel)
        self.demodulate, self.up = demodulate, up
        self.register_buffer("taps", blur_taps() * 4, persistent=False)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """[N, inputs, H, W] and w [N, latent] to [N, outputs, H, W], or twice the size."""
        style = self.style(w)  # [N, inputs]
        weight = self.kernel * self.scale  # [outputs, inputs, k, k]
        if self.demodulate:
            with outside_autocast(x):  # squares of half precision overflow
                # Only the style's direction matters here: a largest entry of 1 keeps half precision in range.
                style = style.to(weight.dtype)
                style = style / style.abs().amax(1, keepdim=True).clamp_min(1e-8)
                energy = weight.square().sum((2, 3))  # [outputs, inputs]
                restore = torch.rsqrt(style.square() @ energy.T + 1e-8)  # [N, outputs]
        x = x * style.to(x.dtype)[:, :, None, None]
        if self.up:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # [N, outputs, 2H + 1, 2W + 1]
            x = F.conv2d(x, _depthwise(self.taps, x), padding=1, groups=x.shape[1])  # [N, outputs, 2H, 2W]
        else:
            x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
        return x * restore.to(x.dtype)[:, :, None, None] if self.demodulate else x


class Resample(nn.Module):
    """Twice or half the size, filtered by [1, 3, 3, 1] along both axes.

    [N, C, H, W] to [N, C, 2H, 2W] or [N, C, H/2, W/2].
    """

    def __init__(self, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.register_buffer("taps", blur_taps() * (4 if up else 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Resampled features."""
        resample = F.conv_transpose2d if self.up else F.conv2d
        return resample(x, _depthwise(self.taps, x), stride=2, padding=1, groups=x.shape[1])


def blur_taps() -> Tensor:
    """The outer product of [1, 3, 3, 1] / 8 with itself, [4, 4]; its sum is 1."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return torch.outer(taps, taps)


def _depthwise(taps: Tensor | nn.Module, x: Tensor) -> Tensor:
    """One filter for every channel of x, [C, 1, 4, 4]."""
    assert isinstance(taps, Tensor)
    return taps.to(x.dtype).expand(x.shape[1], 1, 4, 4)


class Layer(nn.Module):
    """Modulated convolution, noise, bias, activation."""

    def __init__(self, inputs: int, outputs: int, latent: int, *, up: bool, noise: bool) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, outputs, 3, latent, up=up)
        self.offset = nn.Parameter(torch.zeros(outputs))
        self.strength = nn.Parameter(torch.zeros(())) if noise else None

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H', W']; noise [N, 1, H', W'] or None."""
        x = self.conv(x, w)
        if self.strength is not None and noise is not None:
            x = x + self.strength * noise
        return activate(x + self.offset[:, None, None])


class Mapping(nn.Module):
    """z [N, latent] (and labels [N]) to w [N, latent], with a running average of w for truncation."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.classes, latent = options.classes, options.latent
        self.embedding = nn.Embedding(options.classes, latent) if options.classes else None
        first = 2 * latent if options.classes else latent
        widths = [first, *[latent] * options.mapping_layers]
        self.layers = nn.ModuleList(Linear(a, b, rate=0.01) for a, b in itertools.pairwise(widths))
        self.register_buffer("w_average", torch.zeros(latent))

    def forward(self, z: Tensor, labels: Tensor | None, truncation: Tensor | None) -> Tensor:
        """Styles."""
        check_labels(labels, self.classes, "generator")
        x = unit(z)
        if self.embedding is not None:
            x = torch.cat([x, unit(self.embedding(labels))], 1)  # [N, 2 latent]
        for layer in self.layers:
            x = activate(layer(x))
        if self.training:
            mean = x.detach().to(self.w_average.dtype).mean(0)  # type: ignore[arg-type]  # [latent]
            self.w_average.lerp_(mean, 1 - W_AVERAGE_DECAY)  # type: ignore[operator]
        if truncation is not None:
            average: Tensor = self.w_average.to(x)  # type: ignore[operator,assignment]  # [latent]
            x = average + truncation.to(x)[:, None] * (x - average)
        return x


def unit(x: Tensor) -> Tensor:
    """Rows [N, k] scaled to a mean square of 1."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class Generator(nn.Module):
    """z [N, latent], then those of labels [N], truncation [N] and noise [N, numbers] that the options ask for.

    All of these by position, in that order, or all by name. Returns images [N, channels, size, size] in (-1, 1).
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        asked = (("labels", options.classes), ("truncation", options.truncation), ("noise", options.noise))
        self.extra = tuple(name for name, present in asked if present)
        self.mapping = Mapping(options)
        steps = resolutions(options)
        widths = [options.channels_at(step) for step in steps]
        self.constant = nn.Parameter(torch.randn(1, widths[0], steps[0], steps[0]))
        kind = {"latent": options.latent, "noise": options.noise}
        layers, colours = [Layer(widths[0], widths[0], up=False, **kind)], [widths[0]]  # type: ignore[arg-type]
        for before, after in itertools.pairwise(widths):
            layers.append(Layer(before, after, up=True, **kind))  # type: ignore[arg-type]
            layers.append(Layer(after, after, up=False, **kind))  # type: ignore[arg-type]
            colours.append(after)
        self.layers = nn.ModuleList(layers)
        self.to_image = nn.ModuleList(
            ModulatedConv(width, options.channels, 1, options.latent, demodulate=False) for width in colours
        )
        self.offset = nn.Parameter(torch.zeros(options.channels))
        self.up = Resample(up=True)
        self.noise_sizes = noise_sizes(options)

    def forward(
        self, z: Tensor, labels: Tensor | None = None, truncation: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Images.

        Raises:
            ValueError: More or fewer inputs than the options ask for.
        """
        # Without labels, say, the second position is the truncation: what matters is the order of those present.
        present = [value for value in (labels, truncation, noise) if value is not None]
        if len(present) != len(self.extra):
            raise ValueError(f"this generator takes z{''.join(f', {name}' for name in self.extra)}")
        given = dict(zip(self.extra, present, strict=True))
        w = self.mapping(z, given.get("labels"), given.get("truncation"))  # [N, latent]
        planes = self._noise(given.get("noise"))
        # One constant for all samples; multiplied rather than expanded, so that the batch stays symbolic.
        x = self.constant * torch.ones_like(w[:, :1, None, None])  # [N, C, base, base]
        x = self.layers[0](x, w, planes[0])
        image = self.to_image[0](x, w)  # [N, channels, base, base]
        for number, colour in enumerate(list(self.to_image)[1:]):
            for index in (2 * number + 1, 2 * number + 2):
                x = self.layers[index](x, w, planes[index])
            image = self.up(image) + colour(x, w)
        return torch.tanh(image + self.offset[:, None, None])

    def _noise(self, noise: Tensor | None) -> list[Tensor] | list[None]:
        """Each layer's part of [N, numbers], as [N, 1, H, W]."""
        if noise is None:
            return [None] * len(self.noise_sizes)
        parts = noise.split([size * size for size in self.noise_sizes], 1)
        return [part.unflatten(1, (1, size, size)) for part, size in zip(parts, self.noise_sizes, strict=True)]


def noise_sizes(options: Options) -> tuple[int, ...]:
    """Height of each layer's noise."""
    steps = resolutions(options)
    return (steps[0], *(step for step in steps[1:] for _ in range(2)))


class Block(nn.Module):
    """Residual block of the discriminator, half the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = Conv(inputs, inputs, 3)
        self.conv2 = Conv(inputs, outputs, 3)
        self.skip = Conv(inputs, outputs, 1, bias=False, active=False)
        self.down = Resample(up=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H/2, W/2]."""
        y: Tensor = self.down(self.conv2(self.conv1(x)))
        skip: Tensor = self.skip(self.down(x))
        return (skip + y) / GAIN


class Discriminator(nn.Module):
    """Images [N, channels, image_size, image_size] (and labels [N]) to logits [N]."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.classes = options.classes
        steps = resolutions(options)[::-1]
        widths = [options.channels_at(step) for step in steps]
        self.from_image = Conv(options.channels, widths[0], 1)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in itertools.pairwise(widths))
        group = options.minibatch_group
        self.deviation = MinibatchStddev(group) if group else nn.Identity()
        self.conv = Conv(widths[-1] + bool(group), widths[-1], 3)
        self.hidden = Linear(widths[-1] * steps[-1] ** 2, widths[-1])
        outputs = options.latent if options.classes else 1
        self.score = Linear(widths[-1], outputs)
        self.embedding = nn.Embedding(options.classes, outputs) if options.classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of images and, for a conditional discriminator, labels."""
        check_labels(labels, self.classes, "discriminator")
        x = self.from_image(images)
        for block in self.blocks:
            x = block(x)
        x = self.conv(self.deviation(x))
        scores: Tensor = self.score(activate(self.hidden(x.flatten(1))))  # [N, 1 or latent]
        if self.embedding is None:
            return scores.squeeze(1)
        return (scores * unit(self.embedding(labels))).sum(1) / math.sqrt(scores.shape[1])


def generator(options: Options) -> nn.Module:
    """A fresh generator."""
    return Generator(options)


def discriminator(options: Options) -> nn.Module:
    """A fresh discriminator."""
    return Discriminator(options)


def spec(options: Options) -> GeneratorSpec:
    """Inputs and outputs of the generator."""
    extra = []
    if options.truncation:
        extra.append(TensorSpec("truncation", "float32", ("batch",), Constant(1.0)))
    if options.noise:
        numbers = sum(size * size for size in noise_sizes(options))
        extra.append(TensorSpec("noise", "float32", ("batch", numbers), Normal()))
    plain = image_spec("stylegan2", options.latent, options.channels, options.image_size, options.classes)
    return msgspec.structs.replace(plain, inputs=(*plain.inputs, *extra))
