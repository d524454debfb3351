"""RRDBNet x4 (ESRGAN, Wang et al. 2018, arXiv 1809.00219): residual-in-residual dense blocks, any size."""

import torch
import torch.nn.functional as F
from torch import nn


class Dense(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(channels + i * growth, growth if i < 4 else channels, 3, 1, 1) for i in range(5)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for conv in self.convs[:-1]:
            features.append(F.leaky_relu(conv(torch.cat(features, 1)), 0.2))
        return self.convs[-1](torch.cat(features, 1)) * 0.2 + x


class Generator(nn.Module):
    def __init__(self, channels: int = 12, growth: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, 1, 1)
        self.body = nn.Sequential(*[Dense(channels, growth) for _ in range(3)])
        self.trunk = nn.Conv2d(channels, channels, 3, 1, 1)
        self.up1, self.up2 = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        self.high, self.last = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, 3, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h = h + self.trunk(self.body(h) * 0.2)
        h = F.leaky_relu(self.up1(F.interpolate(h, scale_factor=2, mode="nearest")), 0.2)
        h = F.leaky_relu(self.up2(F.interpolate(h, scale_factor=2, mode="nearest")), 0.2)
        return self.last(F.leaky_relu(self.high(h), 0.2))


def make() -> nn.Module:
    torch.manual_seed(0)
    return Generator()
