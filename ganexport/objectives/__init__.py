"""Losses, one file each.

A module here defines ``discriminator_loss(real_logits, fake_logits)`` and
``generator_loss(fake_logits, real_logits=None)``, both from raw logits [N] to a scalar.
"""

from ganexport.registry import Registry

OBJECTIVES = Registry("ganexport.objectives", "objective")
