"""The survey's GAN, pinned: networks, sizes, rate, batch, loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ganexport.recipe import load_recipe, registries
from ganexport.training.networks import build
from ganexport.training.optimizers import make_optimizer


def test_networks_and_settings() -> None:
    recipe = load_recipe("dcgan-mnist-survey")
    generator, discriminator, spec = build(recipe)
    assert [tuple(p.shape) for p in generator.parameters()] == [
        (6272, 100), (6272,), (128, 64, 4, 4), (64,), (64, 1, 4, 4), (1,),
    ]  # fmt: skip
    assert [tuple(p.shape) for p in discriminator.parameters()] == [
        (64, 1, 4, 4), (64,), (128, 64, 4, 4), (128,), (1, 6272), (1,),
    ]  # fmt: skip
    assert sum(p.numel() for p in generator.parameters()) == 765_633
    assert sum(p.numel() for p in discriminator.parameters()) == 138_561
    assert spec.input("z").shape == ("batch", 100)
    assert recipe.training.batch_size == 64
    assert recipe.training.n_critic == 1
    assert recipe.training.initialization == "default"
    assert recipe.ema.decay == 0.0
    assert recipe.schedule.name == "constant"
    for settings, network in (
        (recipe.optimizer.generator, generator),
        (recipe.optimizer.discriminator, discriminator),
    ):
        optimizer = make_optimizer(settings, network.parameters())
        assert isinstance(optimizer, torch.optim.Adam)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0.0)


def test_loss_equals_sigmoid_and_binary_cross_entropy() -> None:
    loss = registries()["objective"].load(load_recipe("dcgan-mnist-survey").objective.name)
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(64, generator=generator, dtype=torch.float64) * 5 for _ in range(2))
    entropy = nn.BCELoss()
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    expected = entropy(real.sigmoid(), ones) + entropy(fake.sigmoid(), zeros)
    assert loss.discriminator_loss(real, fake).item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.generator_loss(fake).item() == pytest.approx(entropy(fake.sigmoid(), ones).item(), rel=1e-12)


def test_the_default_recipe_changes_neither_networks_nor_loss() -> None:
    default, survey = load_recipe("dcgan-mnist"), load_recipe("dcgan-mnist-survey")
    assert default.architecture == survey.architecture
    assert default.objective == survey.objective
    assert [component.name for component in default.regularizers] == ["r1"]  # docs/decisions/dcgan-mnist-r1.md
    assert survey.regularizers == ()
    assert default.training.steps == survey.training.steps
    assert default.training.batch_size == survey.training.batch_size
