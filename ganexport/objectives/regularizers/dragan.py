"""DRAGAN (Kodali et al. 2017, arXiv:1705.07215, section 2.3): a gradient penalty around real images.

weight · E[(‖∇ D(x̂)‖ - target)²],   x̂ = x + ε δ,  δ = strength · std(x) · U[0, 1) per pixel,  ε ~ U[0, 1) per sample
"""

from __future__ import annotations

from torch import Tensor

from ganexport.kernels.gradient_penalty import gradient_penalty
from ganexport.objectives.regularizers._options import Critic, PenaltyOptions, input_gradient

#: Where the gradient is taken: between real and perturbed real images.
POINTS = "perturbed"


class Options(PenaltyOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paper's weight is 10.

    Attributes:
        target: The norm aimed at.
        strength: Size of the perturbation in standard deviations of the batch.
    """

    weight: float = 10.0
    target: float = 1.0
    strength: float = 0.5


def penalty(options: Options, critic: Critic, points: Tensor, weight: float, scale: float) -> Tensor:
    """The penalty at perturbed real images [N, C, H, W], a float32 scalar."""
    gradient = input_gradient(critic, points, scale)  # [N, C, H, W]
    return gradient_penalty(gradient, kind="two-sided", weight=weight, target=options.target)
