"""pix2pix's U-Net (Isola et al. 2017, arXiv 1611.07004): skip connections, dropout in the decoder."""

import torch
from torch import nn


class Level(nn.Module):
    def __init__(self, outer: int, inner: int, inside: nn.Module | None = None, outermost: bool = False) -> None:
        super().__init__()
        self.outermost = outermost
        self.down = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(outer, inner, 4, 2, 1), nn.BatchNorm2d(inner))
        self.inside = inside
        up = nn.ConvTranspose2d(inner if inside is None else 2 * inner, outer, 4, 2, 1)
        self.up = nn.Sequential(nn.ReLU(), up, nn.BatchNorm2d(outer), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(x)
        h = h if self.inside is None else self.inside(h)
        return torch.cat([x, self.up(h)], 1)


class Generator(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        inner = Level(2 * width, 4 * width, Level(4 * width, 4 * width))
        self.first = nn.Conv2d(3, width, 4, 2, 1)
        self.middle = Level(width, 2 * width, inner)
        self.last = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2 * width, 3, 4, 2, 1), nn.Tanh())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(image)))


def make() -> nn.Module:
    torch.manual_seed(0)
    return Generator()
