"""Hinge loss (Lim and Ye 2017, arXiv:1705.02894; used by SNGAN, SAGAN and BigGAN).

L_D = E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))]
L_G = -E[D(G(z))]
"""

from torch import Tensor
from torch.nn.functional import relu

from ganexport.objectives.wasserstein import generator_loss

__all__ = ["discriminator_loss", "generator_loss"]


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge with margin 1 on both sides; scores [N] to a scalar."""
    return relu(1.0 - real_logits).mean() + relu(1.0 + fake_logits).mean()
