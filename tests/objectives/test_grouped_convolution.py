"""Grouped convolutions under a penalty: torch's gradients, without one convolution a group."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganexport.objectives.regularizers import _convolution
from ganexport.objectives.regularizers._convolution import GroupedConvolutions, conv2d, teach_compiler
from ganexport.objectives.regularizers._options import scores_and_gradient

SETTINGS = [
    {"groups": 4},
    {"groups": 2, "stride": 2, "padding": 1},
    {"groups": 8, "padding": (2, 1), "dilation": (2, 1)},
    {"groups": 1, "stride": (1, 2)},
]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_first_and_second_derivatives(settings: dict, with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = draw(3, 8, 9, 7), draw(16, 8 // settings["groups"], 3, 3)
    bias = draw(16) if with_bias else None
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias) if tensor is not None]

    def check(*tensors: Tensor) -> Tensor:
        return conv2d(tensors[0], tensors[1], tensors[2] if with_bias else None, **settings)

    torch.testing.assert_close(check(*leaves), F.conv2d(x, weight, bias, **settings))
    assert torch.autograd.gradcheck(check, leaves, fast_mode=True)

    def slope(function) -> list[Tensor]:
        (dx,) = torch.autograd.grad(function(x, weight, bias, **settings).tanh().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), leaves, allow_unused=True))

    for mine, theirs in zip(slope(conv2d), slope(F.conv2d), strict=True):
        torch.testing.assert_close(mine, theirs)


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 3, 2, 1, groups=4), nn.Tanh(),
            nn.Conv2d(16, 16, 3, padding="same", groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(256, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten()


def penalty(critic: nn.Module, images: Tensor) -> Tensor:
    scores, gradient = scores_and_gradient(critic, images)
    return scores.mean() + gradient.square().sum((1, 2, 3)).mean()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_penalty_has_torchs_gradients(backend: str) -> None:
    torch.manual_seed(0)
    critic, images = Critic(), torch.randn(4, 3, 8, 8)
    penalty(critic, images).backward()  # on a CPU, eager: torch's own
    wanted = [parameter.grad for parameter in critic.parameters()]
    critic.zero_grad()
    teach_compiler()
    torch.compile(penalty, fullgraph=True, backend=backend)(critic, images).backward()
    for parameter, theirs in zip(critic.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-4, atol=1e-6)


def test_low_precision_is_that_of_autocast() -> None:
    x, weight, bias = torch.randn(2, 4, 5, 5), torch.randn(4, 2, 3, 3), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (f(x, weight, bias, padding=1, groups=2) for f in (conv2d, F.conv2d))
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs)


def test_no_convolution_a_group_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.common import aot_autograd

    def operators(conv) -> Counter[str]:
        found: Counter[str] = Counter()

        def count(module: torch.fx.GraphModule, _examples: list) -> object:
            found.update(str(node.target) for node in module.graph.nodes if node.op == "call_function")
            return module.forward

        monkeypatch.setattr(_convolution, "conv2d", conv)
        critic = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3, groups=8), nn.Flatten(), nn.Tanh())
        backend = aot_autograd(fw_compiler=count, bw_compiler=count)
        torch._dynamo.reset()
        summed = nn.Sequential(critic, nn.Linear(16 * 16, 1, bias=False), nn.Flatten(0))
        torch.compile(penalty, fullgraph=True, backend=backend)(summed, torch.randn(2, 3, 8, 8)).backward()
        return found

    assert operators(F.conv2d)["aten.slice.Tensor"] >= 16
    mine = operators(conv2d)
    assert mine["aten.slice.Tensor"] == 0
    assert mine["ganexport.convolution_weight_gradient.default"] == 2  # through the score and through its gradient


def test_elsewhere_torchs_convolutions_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(_convolution, "conv2d", refuse)
    with GroupedConvolutions():
        F.conv2d(torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3), groups=2)
        F.conv2d(torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3))
