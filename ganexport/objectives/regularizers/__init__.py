"""Regularizers of the discriminator, one file each.

A module here defines ``Options`` (with ``interval``: it acts every so many steps) and one of two kinds of action:

- ``POINTS`` ("real", "fake", "between" or "perturbed": where the critic's gradient is taken) and
  ``penalty(options, critic, points, weight, scale)``, a scalar to add to the loss. One at real or generated images also
  has ``of_gradient(options, gradient, weight)``, for where the pass that scores the images gives the gradient too.
  A penalty with an interval has its weight multiplied by it, so that its share of the gradient stays the same (Karras
  et al. 2020, appendix B).
- ``after_update(options, discriminator)``, which changes the weights after the optimizer's step.
"""

from ganexport.registry import Registry

REGULARIZERS = Registry("ganexport.objectives.regularizers", "regularizer")
