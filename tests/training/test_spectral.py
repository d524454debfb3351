"""Spectral normalisation under a compiler: the gradients of eager mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ganexport.training.spectral import CapturedSpectralNorm, make_capturable


def layer(kernel: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return spectral_norm(nn.Conv2d(4, 4, kernel, padding=kernel // 2))


def passes(module: nn.Module, call=None) -> tuple[Tensor, ...]:
    """Gradient and vectors after two passes, as over real and generated images."""
    torch.manual_seed(1)
    dtype = next(module.parameters()).dtype
    real, fake, places = (torch.randn(4, 4, 8, 8, dtype=torch.float64).to(dtype) for _ in range(3))

    def loss(real: Tensor, fake: Tensor) -> Tensor:
        return (module(real) * places).sum() - 0.3 * (module(fake) * places).sum()

    (call or (lambda f: f))(loss)(real, fake).backward()
    norm = module.parametrizations.weight
    return norm.original.grad, norm[0]._u.clone(), norm[0]._v.clone()


@pytest.mark.parametrize("kernel", [1, 3])
def test_it_is_torchs_to_the_last_bit_in_eager_mode(kernel: int) -> None:
    plain = layer(kernel)
    ours = copy.deepcopy(plain)
    make_capturable(ours)
    assert isinstance(ours.parametrizations.weight[0], CapturedSpectralNorm)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for found, wanted in zip(passes(ours), passes(plain), strict=True):
        assert torch.equal(found, wanted)
    for module in (plain, ours):
        module.eval()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(ours(x), plain(x))


def test_a_compiled_backward_uses_the_vectors_of_its_forward_pass() -> None:
    torch.compiler.reset()
    module = layer()
    make_capturable(module)
    found = passes(module, lambda f: torch.compile(f, fullgraph=True))
    wanted = passes(layer().double())
    for name, ours, truth in zip(("gradient", "u", "v"), found, wanted, strict=True):
        error = float((ours.double() - truth).norm() / truth.norm())
        assert error < 1e-5, f"{name}: {error:.1e}"  # torch's own: 3e-2
