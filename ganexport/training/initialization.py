"""First weights of the networks."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from ganexport.architectures._common import ConditionalBatchNorm2d

_PRODUCTS = (nn.modules.conv._ConvNd, nn.Linear)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)
STD = 0.02
#: As many power iterations as spectral_norm begins with.
_POWER_ITERATIONS = 15


def initialize(module: nn.Module, kind: str) -> None:
    """Draw a module's first weights from torch's global generator.

    Args:
        module: In training mode; changed in place.
        kind: "default" leaves the architecture's own; "normal" draws convolutions and linear layers from
            N(0, 0.02) and normalisation scales, conditional ones too, from N(1, 0.02), biases 0 (Radford et al. 2016,
            arXiv:1511.06434, section 3). Embeddings, gates and constants keep theirs.
    """
    if kind == "default":
        return
    for layer in module.modules():
        if isinstance(layer, ConditionalBatchNorm2d) and layer.scale is not None:
            nn.init.normal_(layer.scale.weight, 1.0, STD)
        elif isinstance(layer, _NORMS):
            if layer.weight is not None:
                nn.init.normal_(layer.weight, 1.0, STD)
        elif isinstance(layer, _PRODUCTS):
            _initialize_product(layer)
        else:
            continue
        if isinstance(bias := getattr(layer, "bias", None), nn.Parameter):
            nn.init.zeros_(bias)


def _initialize_product(layer: nn.Module) -> None:
    spectral = parametrize.is_parametrized(layer, "weight")
    nn.init.normal_(layer.get_parameter("parametrizations.weight.original" if spectral else "weight"), 0.0, STD)
    for _ in range(_POWER_ITERATIONS if spectral else 0):
        _ = layer.weight  # each look at a spectrally normalised weight takes a step towards its norm
