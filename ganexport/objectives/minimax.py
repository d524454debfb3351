"""The minimax GAN (Goodfellow et al. 2014, arXiv:1406.2661, equation 1).

    min_G max_D  E[log σ(D(x))] + E[log(1 - σ(D(G(z))))]

The generator descends the second term itself, whose gradient vanishes where the discriminator wins; that is why the
non-saturating loss is the usual choice.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from ganexport.objectives.non_saturating import discriminator_loss

__all__ = ["discriminator_loss", "generator_loss"]


def generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """E[log(1 - σ(D(G(z))))] = E[log σ(-D(G(z)))]; logits [N] to a scalar (negative)."""
    return logsigmoid(-fake_logits).mean()
