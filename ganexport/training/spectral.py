"""Spectral normalisation whose compiled backward sees the vectors of its own forward pass.

torch's parametrization writes its power iteration into buffers. Captured by ``torch.compile``, the iteration of a small
matrix (a 1x1 convolution's) is cheap enough for the partitioner to repeat in the backward pass, from the buffers, which
the forward pass has moved on by then: the vectors are one iteration too far, and the weight's gradient was 2 to 4% off
for layers of 4 channels (torch 2.14, inductor; eager mode and ``aot_eager`` are right). Here the iteration is one
operator, which is never repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from torch.nn.utils.parametrizations import _SpectralNorm

torch.library.define(
    "ganexport::power_iteration", "(Tensor matrix, Tensor u, Tensor v, int iterations, float eps) -> (Tensor, Tensor)"
)


@torch.library.impl("ganexport::power_iteration", "CompositeExplicitAutograd")
def _power_iteration(matrix: Tensor, u: Tensor, v: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    u, v = u.clone(), v.clone()  # an operator's results are not its inputs
    for _ in range(iterations):
        u = F.normalize(torch.mv(matrix, v), dim=0, eps=eps)
        v = F.normalize(torch.mv(matrix.H, u), dim=0, eps=eps)
    return u, v


def _shapes(_matrix: Tensor, u: Tensor, v: Tensor, _iterations: int, _eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(v)


torch.library.register_fake("ganexport::power_iteration")(cast(Callable[..., object], _shapes))


class CapturedSpectralNorm(_SpectralNorm):
    """torch's spectral normalisation, to the last bit, with the power iteration as one operator."""

    def forward(self, weight: Tensor) -> Tensor:
        """The weight over its largest singular value, as the vectors have it (arXiv:1802.05957)."""
        if not self.training or weight.ndim == 1:
            return super().forward(weight)
        matrix = self._reshape_weight_to_matrix(weight)
        with torch.no_grad():
            u, v = torch.ops.ganexport.power_iteration(
                matrix.detach(), self._u, self._v, self.n_power_iterations, self.eps
            )
            # As torch does it, by out=: inside torch.func.grad, copy_ into what is not the function's own is refused.
            torch.mul(u, 1.0, out=self._u)
            torch.mul(v, 1.0, out=self._v)
        return weight / torch.vdot(u, torch.mv(matrix, v))


def make_capturable(network: nn.Module) -> None:
    """Have a network's spectral normalisations (torch's parametrizations) compute the same in a form for compilers."""
    for module in network.modules():
        if type(module) is _SpectralNorm:
            module.__class__ = CapturedSpectralNorm
