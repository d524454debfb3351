"""What the gradient regularizers share: their options, and the critic's gradient at given images."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

from ganexport.errors import RecipeError
from ganexport.objectives.regularizers._convolution import GroupedConvolutions
from ganexport.objectives.regularizers._piecewise import PiecewiseLinear

Critic = Callable[[Tensor], Tensor]


class _TwiceDifferentiated(PiecewiseLinear, GroupedConvolutions):
    """What a critic's functions become while its gradient is taken."""


class PenaltyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weight and interval of a gradient regularizer.

    Attributes:
        weight: Factor of the penalty in the loss.
        interval: The penalty is taken every so many discriminator steps, its weight multiplied by this.
    """

    weight: float
    interval: int = 1

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise RecipeError(f"weight must not be negative, got {self.weight}")
        if self.interval < 1:
            raise RecipeError(f"interval must be at least 1, got {self.interval}")


def input_gradient(critic: Critic, images: Tensor, scale: float = 1.0) -> Tensor:
    """Gradient of each image's score with respect to that image, in float32, differentiable again.

    Uses ``torch.func.grad``, which one ``torch.compile(fullgraph=True)`` graph holds together with the loss
    (``torch.autograd.grad`` cannot be captured).

    Args:
        critic: Scores [N] of images [N, …]; each score must depend on its own image alone.
        images: [N, C, H, W].
        scale: The scores are multiplied by this before, the gradient divided by it after: keeps float16
            gradients out of the subnormal range (PyTorch's AMP examples, "gradient penalty").
    """
    return scores_and_gradient(critic, images, scale)[1]


def scores_and_gradient(critic: Critic, images: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """As :func:`input_gradient`, and the scores [N] of the same pass in float32, differentiable too."""

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        with _TwiceDifferentiated():
            scores = _full(critic(x))  # [N]
        return scores.sum() * scale, scores

    gradient: Tensor
    gradient, scores = torch.func.grad(total, has_aux=True)(images)
    gradient = _full(gradient)
    return scores, gradient / scale if scale != 1.0 else gradient


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
