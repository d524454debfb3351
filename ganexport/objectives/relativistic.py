"""Relativistic pairing GAN (Jolicoeur-Martineau 2018, arXiv:1807.00734), as in R3GAN (Huang et al. 2024,
arXiv:2501.05441).

    L_D = E[softplus(-(D(x) - D(G(z))))]
    L_G = E[softplus(-(D(G(z)) - D(x)))]

Real and fake are paired by their place in the batch; the generator's loss needs the real images' scores too.
"""

from torch import Tensor
from torch.nn.functional import softplus

from ganexport.errors import UsageError

#: The generator's loss reads the discriminator's scores of real images.
NEEDS_REAL = True


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Softplus of how far fake is above real, pair by pair; scores [N] and [N] to a scalar."""
    return softplus(fake_logits - real_logits).mean()


def generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """Softplus of how far real is above fake, pair by pair; scores [N] and [N] to a scalar.

    Raises:
        UsageError: No scores of real images.
    """
    if real_logits is None:
        raise UsageError("the relativistic loss needs the scores of real images for the generator too")
    return softplus(real_logits - fake_logits).mean()
