"""Least-squares GAN (Mao et al. 2017, arXiv:1611.04076, equation 9, with a = 0, b = c = 1).

L_D = 1/2 E[(D(x) - 1)²] + 1/2 E[D(G(z))²]
L_G = 1/2 E[(D(G(z)) - 1)²]
"""

from torch import Tensor


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Squared distance of real from 1 and of fake from 0; outputs [N] to a scalar."""
    return 0.5 * ((real_logits - 1.0).square().mean() + fake_logits.square().mean())


def generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """Squared distance of fake from 1; outputs [N] to a scalar."""
    return 0.5 * (fake_logits - 1.0).square().mean()
