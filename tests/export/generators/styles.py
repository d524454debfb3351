"""Style generators in the ways in which they are written: a mean latent in a buffer, as an argument, or nowhere."""

import torch
import torch.nn.functional as F
from torch import nn


class Synthesis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.styles = nn.ModuleList(nn.Linear(12, 16) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        x = self.constant.repeat(w.shape[0], 1, 1, 1)
        for number, (style, convolution) in enumerate(zip(self.styles, self.convolutions, strict=True)):
            scale, shift = style(w[:, number]).chunk(2, dim=1)
            x = F.leaky_relu(convolution(F.interpolate(x, scale_factor=2.0)), 0.2)
            x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return torch.tanh(self.last(x))


class Broadcast(nn.Module):
    """z [batch, 8] to w [batch, 2, 12]; others read ``layers`` off it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = 2
        self.network = nn.Sequential(nn.Linear(8, 12), nn.LeakyReLU(0.2), nn.Linear(12, 12))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.network(z)[:, None].repeat(1, self.layers, 1)


class Plain(nn.Module):
    """Knows nothing of truncation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_w, self.image = Broadcast(), Synthesis()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.image(self.to_w(z)[:, : self.to_w.layers])


class WithArgument(Plain):
    """Wants the mean latent from its caller."""

    def forward(self, z, truncation=1.0, truncation_latent=None):
        w = self.to_w(z)
        if truncation < 1:
            w = truncation_latent + truncation * (w - truncation_latent)
        return self.image(w)


class Conditional(Plain):
    """Labels reach w; a brightness reaches the image beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(5, 8)

    def forward(self, z, y, brightness):
        return self.image(self.to_w(z + self.classes(y))) * brightness[:, None, None, None]


class Twice(Plain):
    """Calls its mapping network twice."""

    def forward(self, z):
        return self.image(self.to_w(z) + self.to_w(-z))
