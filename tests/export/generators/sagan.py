"""SAGAN's generator (Zhang et al. 2019, arXiv 1805.08318): spectral norm as parametrization, self-attention."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = spectral_norm(nn.Conv1d(channels, channels // 4, 1))
        self.key = spectral_norm(nn.Conv1d(channels, channels // 4, 1))
        self.value = spectral_norm(nn.Conv1d(channels, channels, 1))
        self.gamma = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2)
        weights = torch.softmax(self.query(flat).transpose(1, 2) @ self.key(flat), dim=1)
        return (self.gamma * (self.value(flat) @ weights)).view_as(x) + x


class Generator(nn.Module):
    def __init__(self, latent: int = 32, width: int = 16) -> None:
        super().__init__()

        def up(inputs: int, outputs: int, stride: int, padding: int) -> list[nn.Module]:
            conv = spectral_norm(nn.ConvTranspose2d(inputs, outputs, 4, stride, padding))
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

        self.layers = nn.Sequential(
            *up(latent, 4 * width, 1, 0), *up(4 * width, 2 * width, 2, 1), Attention(2 * width),
            *up(2 * width, width, 2, 1), nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.layers(z.view(z.size(0), z.size(1), 1, 1))


def make() -> nn.Module:
    torch.manual_seed(0)
    return Generator()
