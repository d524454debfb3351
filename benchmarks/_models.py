"""Generators that the inference benchmarks run, with random weights: speed does not depend on training.

DCGAN after Radford et al. (arXiv:1511.06434), its widths for 64 and 128 pixels; the residual
generator of WGAN-GP (Gulrajani et al., arXiv:1704.00028, appendix F, 64 pixels); the skip generator of
StyleGAN2 (Karras et al., arXiv:1912.04958) as the zoo has it, 256 channels up to 16 pixels. Batch-norm
statistics are measured, so that nothing folds to the identity and low precision has the work that training
leaves it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ganexport.architectures import stylegan2 as architecture
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec, Uniform

LATENT = 128


def _spec(name: str, size: int, largest: int = 256) -> GeneratorSpec:
    return GeneratorSpec(
        (TensorSpec("z", "float32", ("batch", LATENT), Normal()),),
        (TensorSpec("image", "float32", ("batch", 3, size, size), range=(-1.0, 1.0), layout="NCHW"),),
        (Dim("batch", 1, 16, largest),),
        name,
    )


def _settle(make: Callable[[], nn.Module]) -> nn.Module:
    """The same weights in every process, with the statistics that training leaves behind.

    Low precision is judged on its pictures, so they must use the whole range as a trained
    generator's do: batch-norm statistics are those of real activations, and tanh sees a standard
    deviation of 1.
    """
    torch.manual_seed(0)
    module = make()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.2)
            nn.init.normal_(layer.bias, 0, 0.2)
            layer.momentum = None  # the plain average over what follows
    final = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)][-1]
    seen: list[float] = []
    hook = final.register_forward_hook(lambda _module, _inputs, output: seen.append(float(output.std())))
    with torch.no_grad():
        for _ in range(8):
            module.train()(torch.randn(32, LATENT))
        hook.remove()
        final.weight.div_(seen[-1])
    return module.eval()


class Dcgan(nn.Module):
    """[batch, 128] → [batch, 3, size, size] by transposed convolutions."""

    def __init__(self, size: int, width: int = 64) -> None:
        super().__init__()
        doublings = size.bit_length() - 3  # from 4 pixels
        channels = [width * 2 ** (doublings - 1 - i) for i in range(doublings)]
        layers: list[nn.Module] = [nn.ConvTranspose2d(LATENT, channels[0], 4, 1, 0, bias=False)]
        for inner, outer in itertools.pairwise(channels):
            layers += [nn.BatchNorm2d(inner), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(channels[-1]), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose2d(channels[-1], 3, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Images in (-1, 1)."""
        image: Tensor = self.layers(z[:, :, None, None])
        return image


class _UpBlock(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inner), nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = nn.Conv2d(inner, outer, 1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        main = self.conv1(self.up(torch.relu(self.norm1(x))))
        total: Tensor = self.skip(self.up(x)) + self.conv2(torch.relu(self.norm2(main)))
        return total


class ResNet64(nn.Module):
    """[batch, 128] → [batch, 3, 64, 64] by four residual blocks with upsampling."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(LATENT, 8 * width * 16)
        self.blocks = nn.Sequential(*(_UpBlock(width * a, width * b) for a, b in ((8, 8), (8, 4), (4, 2), (2, 1))))
        self.last = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """Images in (-1, 1)."""
        image: Tensor = self.last(self.blocks(self.first(z).view(-1, 8 * self.width, 4, 4)))
        return image


def dcgan64() -> tuple[nn.Module, GeneratorSpec]:
    return _settle(lambda: Dcgan(64)), _spec("dcgan-64", 64)


def dcgan128() -> tuple[nn.Module, GeneratorSpec]:
    return _settle(lambda: Dcgan(128)), _spec("dcgan-128", 128)


def resnet64() -> tuple[nn.Module, GeneratorSpec]:
    return _settle(ResNet64), _spec("resnet-64", 64)


def _stylegan2(options: architecture.Options) -> nn.Module:
    torch.manual_seed(0)
    module = architecture.Generator(options).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("layers.") and name.endswith("offset"):
                nn.init.normal_(parameter, 0, 0.2)
        # What tanh sees gets a standard deviation of 1 as the others' does; half of a normal lies within 0.6745 of it.
        images = module(torch.randn(64 if options.image_size <= 64 else 4, options.latent))
        deviation = torch.atanh(images.abs().median()) / 0.6745
        for layer in module.to_image:
            layer.kernel.div_(deviation)  # type: ignore[operator,union-attr]
    return module


def stylegan2() -> tuple[nn.Module, GeneratorSpec]:
    """StyleGAN2's skip generator for 64 pixels, 256 channels up to 16 and 64 at the image."""
    options = architecture.Options(latent=LATENT, mapping_layers=8, width=8, max_width=256)
    return _stylegan2(options), _spec("stylegan2-64", 64)


def stylegan2256() -> tuple[nn.Module, GeneratorSpec]:
    """StyleGAN2's skip generator for 256 pixels, 512 channels up to 64 and 128 at the image (configuration F)."""
    options = architecture.Options(image_size=256, latent=LATENT, mapping_layers=8, width=64, max_width=512)
    return _stylegan2(options), _spec("stylegan2-256", 256, largest=32)


class _DenseBlock(nn.Module):
    """Five convolutions, each seeing all features before it; a fifth of the result is added to the input."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        outputs = [growth] * 4 + [width]
        self.layers = nn.ModuleList(nn.Conv2d(width + i * growth, n, 3, padding=1) for i, n in enumerate(outputs))

    def forward(self, x: Tensor) -> Tensor:
        features = x
        for layer in list(self.layers)[:-1]:
            features = torch.cat([features, nn.functional.leaky_relu(layer(features), 0.2)], 1)
        total: Tensor = x + 0.2 * self.layers[-1](features)
        return total


class Rrdbnet(nn.Module):
    """[batch, 3, h, w] in [0, 1] → [batch, 3, 4h, 4w]: ESRGAN's generator (Wang et al., arXiv:1809.00219)."""

    def __init__(self, width: int = 64, blocks: int = 23, growth: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(_DenseBlock(width, growth) for _ in range(3))) for _ in range(blocks)
        )
        self.after = nn.Conv2d(width, width, 3, padding=1)
        self.ups = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.before, self.final = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):  # the paper's small initialisation
                nn.init.kaiming_normal_(layer.weight)
                layer.weight.data.mul_(0.1)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Four times as many pixels each way."""
        first = features = self.first(image)
        for block in self.blocks:
            features = features + 0.2 * block(features)
        features = first + self.after(features)
        for layer in self.ups:
            larger = nn.functional.interpolate(features, scale_factor=2.0, mode="nearest")
            features = nn.functional.leaky_relu(layer(larger), 0.2)
        upscaled: Tensor = self.final(nn.functional.leaky_relu(self.before(features), 0.2))
        return upscaled


def rrdbnet() -> tuple[nn.Module, GeneratorSpec]:
    """ESRGAN's generator from 64 to 256 pixels, its result brought to the range of pictures."""
    torch.manual_seed(0)
    module = Rrdbnet()
    module.eval()
    with torch.no_grad():
        result = module(torch.rand(1, 3, 64, 64))
        module.final.weight.mul_(0.2 / result.std())
        assert module.final.bias is not None
        module.final.bias.copy_(0.5 - 0.2 * result.mean() / result.std())
    spec = GeneratorSpec(
        (TensorSpec("image", "float32", ("batch", 3, 64, 64), Uniform(0.0, 1.0)),),
        (TensorSpec("upscaled", "float32", ("batch", 3, 256, 256), range=(0.0, 1.0), layout="NCHW"),),
        (Dim("batch", 1, 4, 16),),
        "rrdbnet",
    )
    return module, spec


def tiny() -> tuple[nn.Module, GeneratorSpec]:
    """For tests of the benchmarks themselves."""
    return _settle(lambda: Dcgan(16, width=4)), _spec("tiny", 16)


MODELS = {
    "dcgan-64": dcgan64,
    "resnet-64": resnet64,
    "stylegan2-64": stylegan2,
    "dcgan-128": dcgan128,
    "stylegan2-256": stylegan2256,
    "rrdbnet": rrdbnet,
    "tiny": tiny,
}
