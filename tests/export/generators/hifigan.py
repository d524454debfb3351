"""HiFi-GAN's vocoder (Kong et al. 2020, arXiv 2010.05646): weight norm, multi-receptive-field fusion, any length."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm


class Fusion(nn.Module):
    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [weight_norm(nn.Conv1d(channels, channels, kernel, 1, (kernel - 1) * d // 2, d)) for d in (1, 3)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = x + conv(F.leaky_relu(x, 0.1))
        return x


class Generator(nn.Module):
    def __init__(self, mels: int = 20, channels: int = 16) -> None:
        super().__init__()
        self.first = old_weight_norm(nn.Conv1d(mels, channels, 7, 1, 3))
        self.ups = nn.ModuleList(
            [
                old_weight_norm(nn.ConvTranspose1d(channels, channels // 2, 8, 4, 2)),
                old_weight_norm(nn.ConvTranspose1d(channels // 2, channels // 4, 4, 2, 1)),
            ]
        )
        self.fusions = nn.ModuleList([nn.ModuleList([Fusion(channels // 2**i, k) for k in (3, 5)]) for i in (1, 2)])
        self.last = weight_norm(nn.Conv1d(channels // 4, 1, 7, 1, 3))

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        x = self.first(mel)
        for up, fusions in zip(self.ups, self.fusions, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(fusion(x) for fusion in fusions) / len(fusions)
        return torch.tanh(self.last(F.leaky_relu(x)))


def make() -> nn.Module:
    torch.manual_seed(0)
    return Generator()
