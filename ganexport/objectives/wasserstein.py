"""Wasserstein GAN (Arjovsky et al. 2017, arXiv:1701.07875, equations 2 and 3).

    L_D = E[D(G(z))] - E[D(x)]      (its negative estimates the Wasserstein-1 distance, up to the Lipschitz constant)
    L_G = -E[D(G(z))]

The critic must be kept Lipschitz by a regularizer: ``weight-clipping`` or ``gradient-penalty``.
"""

from torch import Tensor


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Difference of the mean scores, fake minus real; scores [N] to a scalar."""
    return fake_logits.mean() - real_logits.mean()


def generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """Negative mean score of the generated images; scores [N] to a scalar."""
    return -fake_logits.mean()
