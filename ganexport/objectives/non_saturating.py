"""The non-saturating GAN (Goodfellow et al. 2014, arXiv:1406.2661, section 3).

    L_D = -E[log σ(D(x))] - E[log(1 - σ(D(G(z))))]
    L_G = -E[log σ(D(G(z)))]

Written with softplus from logits: the same values as a sigmoid followed by binary cross-entropy, without the
overflow of either.
"""

from torch import Tensor
from torch.nn.functional import softplus


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Binary cross-entropy of real as 1 and fake as 0, summed over the two halves; logits [N] to a scalar."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of fake as 1; logits [N] to a scalar."""
    return softplus(-fake_logits).mean()
