"""Modules with one operator each that an exporter or TensorRT's parser refuses."""

import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.last(self.first(z).view(-1, 1, 4, 4)))


class Determinant(Plain):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return super().forward(z) * torch.linalg.det(self.first(z).view(-1, 4, 4)).view(-1, 1, 1, 1)  # here


class Bits(Plain):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        codes = (self.first(z) * 10).to(torch.int32)
        return (codes ^ (codes << 1)).float()  # here


class Unknown(Plain):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(super().forward(z) * 0.9)  # here
