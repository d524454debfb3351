"""A small DCGAN-like generator (Radford et al. 2016, arXiv 1511.06434) and modules with one trap each."""

import argparse
import sys

import numpy
import torch
import torch.nn.functional as F
from torch import nn

from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (16, 1, 1)), nn.ConvTranspose2d(16, 16, 4), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


class Trap(nn.Module):
    """z [batch, 8] to an image [batch, 3, 2, 2]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 12)

    def hidden(self, h: torch.Tensor) -> torch.Tensor:
        return h

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.last(self.hidden(self.first(z)))).view(-1, 3, 2, 2)


class FreshNoise(Trap):
    def hidden(self, h):
        return h + 0.1 * torch.randn_like(h)


class LiveDropout(Trap):
    def hidden(self, h):
        return F.dropout(h, 0.3)


class GumbelNoise(Trap):
    def hidden(self, h):
        return h - torch.empty_like(h).exponential_().log()


class NumpyNoise(Trap):
    def hidden(self, h):
        return h + torch.from_numpy(numpy.random.randn(16).astype("float32"))


class Counts(Trap):
    """Keeps state between calls."""

    def hidden(self, h):
        self.calls = getattr(self, "calls", 0) + 1
        return h * self.calls


class Reparametrised(Trap):
    """The last step of an encoder: a sample from a distribution of torch.distributions."""

    def hidden(self, h):
        return torch.distributions.Normal(h, torch.ones_like(h) * 0.1).rsample()


class RandomChoice(Trap):
    def hidden(self, h):
        return h[:, torch.randperm(16)]


class SizeBranch(Trap):
    def hidden(self, h):
        if h.shape[0] > 4:
            h = h * 2
        return h


class DataBranch(Trap):
    def hidden(self, h):
        if h.mean() > 0:
            h = h * 2
        return h


class FixedBatch(Trap):
    def hidden(self, h):
        return torch.stack([h[i] for i in range(h.shape[0])])


class WritesInput(Trap):
    def forward(self, z):
        z.mul_(2)
        return super().forward(z)


class Hooked(Trap):
    """Forward hooks are part of the function; backward hooks, which no exporter takes, are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda module, inputs, output: output * 2)
        self.last.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
        self.register_full_backward_hook(lambda module, inner, outer: None)


class Called(Trap):
    """What is called is not forward alone."""

    def __call__(self, z):
        return super().__call__(z) * 0.5


class DictWithNone(Trap):
    def forward(self, z):
        return {"image": super().forward(z), "mask": None, "loss": z.sum()}


class KeywordOnly(Trap):
    def forward(self, *, z, psi: float = 1.0):
        return super().forward(z * psi)


class Unsaved(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(16), persistent=False)

    def hidden(self, h):
        return h * self.scale


class Unchanged(Trap):
    def forward(self, z):
        return super().forward(z), z


class OverflowsHalf(Trap):
    def hidden(self, h):
        large = h * 30000.0
        return large * large * 1e-9


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Shifting(torch.autograd.Function):
    @staticmethod
    def forward(x, amount):
        return x + amount

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class CustomFunctions(Trap):
    def hidden(self, h):
        return Shifting.apply(Doubling.apply(h), 0.25)


class NeedsEven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 4, 2, 1), nn.ConvTranspose2d(4, 3, 4, 2, 1)

    def forward(self, x):
        return x + self.up(self.down(x))


class Named(Trap):
    def forward(self, z, *, gain: float = 1.0):
        h = self.first(z) * gain
        return {"image": torch.tanh(self.last(h)).view(-1, 3, 2, 2), "features": h}


class AsTuple(Trap):
    def forward(self, z):
        h = self.first(z)
        return torch.tanh(self.last(h)).view(-1, 3, 2, 2), h


class ReadsFlag(Trap):
    """Branches on a buffer: a constant, not data."""

    def __init__(self) -> None:
        super().__init__()
        self.flag = True

    def hidden(self, h):
        return h * 2 if self.flag else h


class Warps(nn.Module):
    """Moves a picture [batch, 3, h, w] over a grid of its own size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        batch, _, height, width = x.shape
        y, z = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, steps=width), indexing="ij")
        grid = torch.stack([z * 0.9, y * 0.8], -1).unsqueeze(0).repeat(batch, 1, 1, 1)
        return torch.tanh(self.last(F.grid_sample(x, grid, align_corners=True, padding_mode="border")))


class AutocastsItself(Trap):
    """Computes in bfloat16 whatever it is asked."""

    def forward(self, z):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image = super().forward(z)
        return image.float()


def described():
    """A module with its spec, as a factory may give both."""
    image = TensorSpec("image", "float32", ("batch", 1, 8, 8), None, (-1.0, 1.0), "NCHW")
    return make(), GeneratorSpec((TensorSpec("z", "float32", ("batch", 16), Normal()),), (image,), (Dim("batch"),))


def parses() -> nn.Module:
    """Reads the command line and prints, as scripts do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    sys.stdout.write(f"seed {parser.parse_args().seed}\n")
    return Trap()


def needs_an_argument() -> nn.Module:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.parse_args()
    return Trap()


def leaves() -> nn.Module:
    sys.exit("no checkpoint here")


def number() -> int:
    return 3


def broken() -> nn.Module:
    raise RuntimeError("no weights here")
