"""Penalties of piecewise linear critics: the same gradients bit for bit, without the work that only carries zeros."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ganexport.objectives.regularizers._options import input_gradient
from ganexport.objectives.regularizers._piecewise import PiecewiseLinear

IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def critic(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 6, 3, 2, 1), activation, nn.Conv2d(6, 8, 3, 2, 1), activation]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32, 1))


def plain(network: nn.Module, images: Tensor) -> Tensor:
    points = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(points).sum(), points, create_graph=True)
    return gradient


def weight_gradients(network: nn.Module, slope: Tensor) -> tuple[list[Tensor | None], Counter[str]]:
    network.zero_grad()
    with Calls() as calls:
        (slope.square().sum((1, 2, 3)).sqrt() - 1).square().mean().backward()
    return [parameter.grad for parameter in network.parameters()], calls.count


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.ReLU(), nn.LeakyReLU(0.0)], ids=str)
def test_same_gradients_and_no_second_pass_over_the_forward(activation: nn.Module) -> None:
    network = critic(activation)
    wanted, before = weight_gradients(network, plain(network, IMAGES))
    found, after = weight_gradients(network, input_gradient(lambda x: network(x).squeeze(1), IMAGES))
    torch.testing.assert_close(input_gradient(network, IMAGES), plain(network, IMAGES), rtol=0, atol=0)
    for mine, theirs in zip(found, wanted, strict=True):
        # A bias has no part in the penalty: zero to torch, nothing to us.
        assert torch.equal(mine, theirs) if mine is not None else theirs is None or not theirs.any()
    assert before["convolution_backward"] == 2  # of zeros, one a layer
    assert after["convolution_backward"] == 0


def test_other_activations_keep_their_second_derivative() -> None:
    network = critic(nn.Softplus())
    wanted, before = weight_gradients(network, plain(network, IMAGES))
    found, after = weight_gradients(network, input_gradient(network, IMAGES))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert before["convolution_backward"] == after["convolution_backward"] == 2


def test_what_is_replaced() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0])
    with PiecewiseLinear():
        for function in (nn.functional.relu, torch.relu, torch.Tensor.relu, nn.ReLU()):
            assert function(x).tolist() == [0, 0, 3]
        assert nn.functional.leaky_relu(x, negative_slope=0.5).tolist() == [-1, 0, 3]
        assert nn.functional.leaky_relu(x, 0.5).tolist() == [-1, 0, 3]
        in_place = x.clone()
        assert nn.functional.leaky_relu(in_place, 0.5, True) is in_place
        assert nn.functional.relu(in_place, inplace=True).data_ptr() == in_place.data_ptr()
    assert in_place.tolist() == [0, 0, 3]
