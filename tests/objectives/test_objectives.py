"""Losses against their formulas written out in float64, and their refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from ganexport.errors import UsageError
from ganexport.objectives import OBJECTIVES

REAL = torch.tensor([1.5, -0.3, 0.0, 2.0], dtype=torch.double)
FAKE = torch.tensor([-1.0, 0.4, 0.1, -2.5], dtype=torch.double)
SIGMOID = torch.sigmoid

FORMULAS = {
    "non-saturating": (
        lambda r, f: -SIGMOID(r).log().mean() - (1 - SIGMOID(f)).log().mean(),
        lambda r, f: -SIGMOID(f).log().mean(),
    ),
    "minimax": (
        lambda r, f: -SIGMOID(r).log().mean() - (1 - SIGMOID(f)).log().mean(),
        lambda r, f: (1 - SIGMOID(f)).log().mean(),
    ),
    "least-squares": (
        lambda r, f: 0.5 * ((r - 1) ** 2).mean() + 0.5 * (f**2).mean(),
        lambda r, f: 0.5 * ((f - 1) ** 2).mean(),
    ),
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda r, f: -f.mean()),
    "hinge": (
        lambda r, f: (1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean(),
        lambda r, f: -f.mean(),
    ),
    "relativistic": (
        lambda r, f: -SIGMOID(r - f).log().mean(),
        lambda r, f: -SIGMOID(f - r).log().mean(),
    ),
}


def test_every_objective_is_tested():
    assert set(FORMULAS) == set(OBJECTIVES.names())


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_values_are_the_formulas(name):
    module, (discriminator, generator) = OBJECTIVES.load(name), FORMULAS[name]
    torch.testing.assert_close(module.discriminator_loss(REAL, FAKE), discriminator(REAL, FAKE))
    torch.testing.assert_close(module.generator_loss(FAKE, REAL), generator(REAL, FAKE))


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_extreme_logits_stay_finite(name):
    module = OBJECTIVES.load(name)
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    for loss in (module.discriminator_loss(logits, -logits), module.generator_loss(logits, -logits)):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_cross_entropy_from_logits_is_the_surveys_sigmoid_and_bce():
    module = OBJECTIVES.load("non-saturating")
    ones, zeros = torch.ones_like(REAL), torch.zeros_like(REAL)
    survey = binary_cross_entropy(SIGMOID(REAL), ones) + binary_cross_entropy(SIGMOID(FAKE), zeros)
    torch.testing.assert_close(module.discriminator_loss(REAL, FAKE), survey)
    torch.testing.assert_close(module.generator_loss(FAKE), binary_cross_entropy(SIGMOID(FAKE), ones))


def test_the_minimax_generator_saturates_and_the_non_saturating_one_does_not():
    logits = torch.tensor([-12.0], requires_grad=True)  # a confident discriminator
    gradients = {
        name: torch.autograd.grad(OBJECTIVES.load(name).generator_loss(logits), logits)[0].abs().item()
        for name in ("minimax", "non-saturating")
    }
    assert gradients["minimax"] < 1e-4 < 0.9 < gradients["non-saturating"]


def test_the_relativistic_generator_needs_real_scores():
    with pytest.raises(UsageError, match="real"):
        OBJECTIVES.load("relativistic").generator_loss(FAKE)
