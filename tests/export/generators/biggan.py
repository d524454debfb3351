"""BigGAN's generator (Brock et al. 2019, arXiv 1809.11096): class-conditional batch norm from the split
latent and a class embedding, spectral norm, self-attention; widths are tiny."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm


class ConditionalNorm(nn.Module):
    """Statistics interpolated over a grid of truncations, as the released weights keep them."""

    def __init__(self, channels: int, condition: int, steps: int = 6) -> None:
        super().__init__()
        self.gain = spectral_norm(nn.Linear(condition, channels, bias=False))
        self.shift = spectral_norm(nn.Linear(condition, channels, bias=False))
        self.register_buffer("means", torch.randn(steps, channels) * 0.1)
        self.register_buffer("variances", torch.rand(steps, channels) + 0.5)
        self.step = 1.0 / (steps - 1)

    def forward(self, x: torch.Tensor, condition: torch.Tensor, truncation: float) -> torch.Tensor:
        position = truncation / self.step
        below = min(int(position), self.means.shape[0] - 2)
        share = position - below
        mean = self.means[below] * (1 - share) + self.means[below + 1] * share
        variance = self.variances[below] * (1 - share) + self.variances[below + 1] * share
        x = F.batch_norm(x, mean, variance, training=False, eps=1e-4)
        return x * (1 + self.gain(condition)[:, :, None, None]) + self.shift(condition)[:, :, None, None]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalNorm(inputs, condition), ConditionalNorm(outputs, condition)
        self.conv1 = spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = spectral_norm(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: torch.Tensor, condition: torch.Tensor, truncation: float) -> torch.Tensor:
        h = F.relu(self.norm1(x, condition, truncation))
        h = self.conv1(F.interpolate(h, scale_factor=2))
        h = self.conv2(F.relu(self.norm2(h, condition, truncation)))
        return h + self.skip(F.interpolate(x, scale_factor=2))


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = spectral_norm(nn.Conv2d(channels, channels // 4, 1, bias=False))
        self.phi = spectral_norm(nn.Conv2d(channels, channels // 4, 1, bias=False))
        self.g = spectral_norm(nn.Conv2d(channels, channels // 2, 1, bias=False))
        self.out = spectral_norm(nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.gamma = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, channels, height, width = x.shape
        theta = self.theta(x).view(-1, channels // 4, height * width)
        phi = F.max_pool2d(self.phi(x), 2).view(-1, channels // 4, height * width // 4)
        g = F.max_pool2d(self.g(x), 2).view(-1, channels // 2, height * width // 4)
        weights = torch.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
        mixed = torch.bmm(g, weights.transpose(1, 2)).view(-1, channels // 2, height, width)
        return x + self.gamma * self.out(mixed)


class Generator(nn.Module):
    def __init__(self, latent: int = 24, classes: int = 10, channels: int = 16) -> None:
        super().__init__()
        self.chunk = latent // 3
        self.embedding = nn.Linear(classes, 12, bias=False)
        condition = self.chunk + 12
        self.channels = channels
        self.first = spectral_norm(nn.Linear(condition, 4 * 4 * channels))
        self.block1 = Block(channels, channels, condition)
        self.attention = Attention(channels)
        self.block2 = Block(channels, channels, condition)
        self.norm = nn.BatchNorm2d(channels, eps=1e-4)
        self.to_image = spectral_norm(nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, z: torch.Tensor, c: torch.Tensor, truncation: float = 0.4) -> torch.Tensor:
        assert 0 < truncation <= 1
        parts = torch.split(z, self.chunk, 1)
        label = self.embedding(c)
        conditions = [torch.cat([part, label], 1) for part in parts]
        x = self.first(conditions[0]).view(-1, 4, 4, self.channels).permute(0, 3, 1, 2).contiguous()
        x = self.attention(self.block1(x, conditions[1], truncation))
        x = F.relu(self.norm(self.block2(x, conditions[2], truncation)))
        return torch.tanh(self.to_image(x))


def make() -> nn.Module:
    torch.manual_seed(0)
    generator = Generator()
    with torch.no_grad():  # spectral norm finds its singular vectors in training; without them tanh saturates
        for _ in range(30):
            generator(torch.randn(2, 24), torch.eye(10)[:2])
    return generator
