"""Activations whose second derivative is zero, said in a way that lets autograd skip the work.

A gradient penalty is differentiated through the critic's input gradient. For ReLU and leaky ReLU torch's second
derivative is a tensor of zeros, which autograd then carries through the whole forward pass again: a convolution's
backward for every layer, all of zeros. Multiplying by a mask that is no function of the input to autograd gives the
same values and the same derivatives, and leaves nothing to carry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ganexport.objectives.regularizers._replacing import Replacing

_RELU: tuple[Any, ...] = (F.relu, torch.relu, Tensor.relu)


class PiecewiseLinear(Replacing):
    """Inside, ReLU and leaky ReLU (as functions, methods or modules) are products with a constant mask.

    The mask is 1 where the input is positive and the slope elsewhere, in the input's dtype. Activations that work in
    place are left alone.
    """

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Replace the two activations, pass everything else on."""
        if func is F.leaky_relu:
            return _leaky_relu(*args, **named)
        if func in _RELU and len(args) == 1 and not named.get("inplace", False):
            return _masked(args[0], 0.0)
        return super().call(func, args, named)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:  # noqa: A002 - torch's
    if inplace:
        return F.leaky_relu(input, negative_slope, inplace=True)
    return _masked(input, negative_slope)


def _masked(x: Tensor, slope: float) -> Tensor:
    # The slope at x of the activation, from its own kernel (a comparison and a choice are many times slower on CPUs).
    mask: Tensor = torch.ops.aten.leaky_relu_backward(x.new_ones(()).expand(x.shape), x.detach(), slope, False)
    return x * mask
