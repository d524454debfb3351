"""StyleGAN2's generator (Karras et al. 2020, arXiv 1912.04958): batch-folded modulated convolution,
upfirdn resampling, per-layer noise, mapping network with truncation; widths are tiny."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def blur_kernel(gain: float = 1.0) -> torch.Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = taps[:, None] * taps[None, :]
    return kernel / kernel.sum() * gain


def upfirdn(x: torch.Tensor, kernel: torch.Tensor, up: int, pad: tuple[int, int]) -> torch.Tensor:
    """Zero insertion, padding and a separable filter, one channel at a time."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height, 1, width, 1)
    x = F.pad(x, [0, up - 1, 0, 0, 0, up - 1])
    x = x.reshape(batch, channels, height * up, width * up)
    x = F.pad(x, [pad[0], pad[1], pad[0], pad[1]])
    weight = kernel.flip([0, 1])[None, None].repeat(channels, 1, 1, 1)
    return F.conv2d(x, weight, groups=channels)


class EqualLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.full([outputs], bias))
        self.scale = 1.0 / math.sqrt(inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class ModulatedConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int, styles: int, demodulate: bool = True, up: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.affine = EqualLinear(styles, inputs, 1.0)
        self.demodulate, self.up, self.size = demodulate, up, size
        self.scale = 1.0 / math.sqrt(inputs * size * size)
        self.register_buffer("kernel", blur_kernel(4.0))

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        outputs = self.weight.shape[0]
        weight = self.scale * self.weight[None] * self.affine(style).reshape(batch, 1, channels, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
        x = x.reshape(1, batch * channels, height, width)
        if self.up:
            weight = weight.transpose(1, 2).reshape(batch * channels, outputs, self.size, self.size)
            x = F.conv_transpose2d(x, weight, stride=2, groups=batch)
            x = x.reshape(batch, outputs, x.shape[2], x.shape[3])
            return upfirdn(x, self.kernel, 1, (1, 1))
        weight = weight.reshape(batch * outputs, channels, self.size, self.size)
        x = F.conv2d(x, weight, padding=self.size // 2, groups=batch)
        return x.reshape(batch, outputs, height, width)


class StyledLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int, styles: int, up: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, outputs, 3, styles, up=up)
        self.strength = nn.Parameter(torch.full([1], 0.3))
        self.bias = nn.Parameter(torch.zeros(1, outputs, 1, 1))

    def forward(self, x: torch.Tensor, style: torch.Tensor, noise_mode: str) -> torch.Tensor:
        x = self.conv(x, style)
        if noise_mode == "random":
            noise = torch.randn([x.shape[0], 1, x.shape[2], x.shape[3]], device=x.device)
            x = x + self.strength * noise
        return F.leaky_relu(x + self.bias, 0.2) * math.sqrt(2)


class Generator(nn.Module):
    def __init__(self, latent: int = 32, channels: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.mapping = nn.ModuleList([EqualLinear(latent, latent) for _ in range(3)])
        self.register_buffer("mean", torch.randn(latent) * 0.1)
        self.constant = nn.Parameter(torch.randn(1, channels, 4, 4))
        self.first = StyledLayer(channels, channels, latent)
        self.layers = nn.ModuleList()
        self.to_image = nn.ModuleList([ModulatedConv(channels, 3, 1, latent, demodulate=False)])
        for _ in range(blocks):
            self.layers.append(
                nn.ModuleList(
                    [StyledLayer(channels, channels, latent, up=True), StyledLayer(channels, channels, latent)]
                )
            )
            self.to_image.append(ModulatedConv(channels, 3, 1, latent, demodulate=False))
        self.register_buffer("kernel", blur_kernel(4.0))

    def forward(self, z: torch.Tensor, truncation_psi: float = 1.0, noise_mode: str = "const") -> torch.Tensor:
        w = z * torch.rsqrt(z.pow(2).mean(1, keepdim=True) + 1e-8)
        for layer in self.mapping:
            w = F.leaky_relu(layer(w), 0.2)
        w = self.mean.lerp(w, truncation_psi)
        x = self.constant.repeat(z.shape[0], 1, 1, 1)
        x = self.first(x, w, noise_mode)
        image = self.to_image[0](x, w)
        for (up, same), to_image in zip(self.layers, self.to_image[1:], strict=True):
            x = same(up(x, w, noise_mode), w, noise_mode)
            image = upfirdn(image, self.kernel, 2, (2, 1)) + to_image(x, w)
        return image


def make(blocks: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return Generator(blocks=blocks)


def make_small() -> nn.Module:
    return make(blocks=1)
