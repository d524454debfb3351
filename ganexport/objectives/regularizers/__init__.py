"""Regularizers of the discriminator, one file each.

A module here defines ``Options`` (with ``interval``: the penalty is taken every so many steps, its weight multiplied
by the interval, Karras et al. 2020, appendix B) and either ``penalty(options, critic, real, fake, noise, weight)``,
which returns a scalar to add to the loss, or ``after_update(options, discriminator)``, which changes the weights after
the optimizer's step.
"""

from ganexport.registry import Registry

REGULARIZERS = Registry("ganexport.objectives.regularizers", "regularizer")
