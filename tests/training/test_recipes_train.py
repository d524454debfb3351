"""Every shipped recipe trains: a few steps with its own networks, loss and optimizers, weights stay finite and move."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ganexport.data.images import from_arrays
from ganexport.recipe import load_recipe, recipe_names
from ganexport.training.distributed import Group
from ganexport.training.loop import Trainer
from ganexport.training.networks import build, fitted


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_trains(name: str) -> None:
    sets = ["training.batch_size=4", "training.n_critic=1", "training.device=cpu", "training.threads=1"]
    recipe = load_recipe(name, sets)
    _, _, spec = build(recipe)
    _, channels, height, width = spec.image_output.shape
    if recipe.data.fit == "pad":
        height, width = height - 4, width - 4
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 16)
    images = from_arrays(
        generator.integers(0, 256, (16, height, width, channels), np.uint8), labels, name="noise", where="noise"
    )
    trainer = Trainer(recipe, fitted(recipe, images), group=Group(), device=torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in trainer.networks.g_parameters]
    for _ in range(2):
        line = trainer.advance(log=True)
    assert line is not None
    assert all(np.isfinite(value) for value in line.values())
    assert trainer.networks.finite()
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.networks.g_parameters, strict=True))
    assert trainer.networks.evaluated().training is False
