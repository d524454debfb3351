"""R2 regularization (Mescheder et al. 2018, arXiv:1801.04406, equation 10): squared gradient norm at generated images.

weight / 2 · E[‖∇ D(x)‖²]
"""

from __future__ import annotations

from torch import Tensor

from ganexport.kernels.gradient_penalty import gradient_penalty
from ganexport.objectives.regularizers._options import Critic, PenaltyOptions, input_gradient

#: Where the gradient is taken.
POINTS = "fake"


class Options(PenaltyOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paper's weight γ is 10; StyleGAN2 takes it every 16 steps (``interval = 16``)."""

    weight: float = 10.0


def penalty(options: Options, critic: Critic, points: Tensor, weight: float, scale: float) -> Tensor:
    """The penalty at generated images [N, C, H, W], a float32 scalar."""
    return of_gradient(options, input_gradient(critic, points, scale), weight)


def of_gradient(options: Options, gradient: Tensor, weight: float) -> Tensor:
    """The penalty of the critic's gradients [N, C, H, W] at generated images, a float32 scalar."""
    return gradient_penalty(gradient, kind="r1", weight=weight)
