"""First weights of the networks."""

from __future__ import annotations

from torch import nn


def initialize(module: nn.Module, kind: str) -> None:
    """Draw a module's first weights from torch's global generator.

    Args:
        module: Changed in place.
        kind: "default" leaves torch's; "normal" draws convolutions and linear layers from
            N(0, 0.02) and normalisation scales from N(1, 0.02), biases 0 (Radford et al. 2016,
            arXiv:1511.06434, section 3).
    """
    if kind == "default":
        return
    for layer in module.modules():
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if not isinstance(weight, nn.Parameter):
            continue
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(weight, 1.0, 0.02)
        elif weight.ndim >= 2:
            nn.init.normal_(weight, 0.0, 0.02)
        else:
            continue
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)
