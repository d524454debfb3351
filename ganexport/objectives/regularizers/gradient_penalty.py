"""Gradient penalty of WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028, equation 3).

    weight · E[(‖∇ D(x̂)‖ - target)²],   x̂ = G(z) + ε (x - G(z)),  ε ~ U[0, 1) per sample

One-sided (section 4 of the same, "we also considered"; Petzka et al. 2018, arXiv:1709.08894): only norms above the
target are penalised.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ganexport.kernels.gradient_penalty import gradient_penalty
from ganexport.objectives.regularizers._options import Critic, PenaltyOptions, input_gradient

#: Where the gradient is taken: between real and fake images.
POINTS = "between"


class Options(PenaltyOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paper's weight is 10.

    Attributes:
        sides: "two" as in the paper, "one" to leave norms below the target alone.
        target: The norm aimed at.
    """

    weight: float = 10.0
    sides: Literal["two", "one"] = "two"
    target: float = 1.0


def penalty(options: Options, critic: Critic, points: Tensor, weight: float, scale: float) -> Tensor:
    """The penalty at interpolated images [N, C, H, W], a float32 scalar."""
    kind = "two-sided" if options.sides == "two" else "one-sided"
    gradient = input_gradient(critic, points, scale)  # [N, C, H, W]
    return gradient_penalty(gradient, kind=kind, weight=weight, target=options.target)
