"""Self-attention GAN (Zhang et al. 2019, arXiv:1805.08318): the residual networks of :mod:`resnet` with attention.

Spectral normalisation in both networks and attention at 32x32 maps are the paper's choices at 128 pixels; smaller
images attend at half their size or less. Usually conditional, trained with the hinge loss.
"""

from __future__ import annotations

from torch import nn

from ganexport.architectures import resnet
from ganexport.spec import GeneratorSpec


class Options(resnet.Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As the residual networks', with attention and spectral normalisation on."""

    spectral: bool = True
    spectral_generator: bool = True
    attention: int = 16


def generator(options: Options) -> nn.Module:
    """A fresh generator."""
    return resnet.Generator(options)


def discriminator(options: Options) -> nn.Module:
    """A fresh discriminator."""
    return resnet.Discriminator(options)


def spec(options: Options) -> GeneratorSpec:
    """Inputs and outputs of the generator."""
    return resnet.spec(options)
