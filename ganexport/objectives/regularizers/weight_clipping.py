"""Weight clipping of the Wasserstein GAN (Arjovsky et al. 2017, arXiv:1701.07875, algorithm 1, line 7)."""

from __future__ import annotations

import msgspec
import torch
from torch import nn

from ganexport.errors import RecipeError


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paper's bound is 0.01.

    Attributes:
        bound: Every weight is clipped to [-bound, bound] after each discriminator update.
        interval: Discriminator updates between clippings.
    """

    bound: float = 0.01
    interval: int = 1

    def __post_init__(self) -> None:
        if self.bound <= 0 or self.interval < 1:
            raise RecipeError("bound must be positive and interval at least 1")


@torch.no_grad()
def after_update(options: Options, discriminator: nn.Module) -> None:
    """Clip all parameters in place."""
    parameters: list[torch.Tensor] = list(discriminator.parameters())
    torch._foreach_clamp_min_(parameters, -options.bound)
    torch._foreach_clamp_max_(parameters, options.bound)
