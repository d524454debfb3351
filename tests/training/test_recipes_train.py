"""Every shipped recipe trains: a few steps with its own networks, loss and optimizers, weights stay finite and move."""

from __future__ import annotations

from pathlib import Path

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


def colour_recipes() -> list[object]:
    quick = ("sngan-projection-cifar10", "dcgan-faces64")  # with classes, and a folder without them
    names = [name for name in recipe_names() if "mnist" not in name]
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", colour_recipes())
def test_recipes_for_colour_data_run_end_to_end(name: str, tmp_path: Path) -> None:
    """What a user would type, on pictures made here: the dry run, a step of training, images of the right size."""
    import json

    import tiny_run as tiny
    from PIL import Image

    recipe = load_recipe(name)
    size, classes = recipe.architecture.options["image_size"], recipe.architecture.options.get("classes", 0)
    random = np.random.default_rng(0)
    for label in range(max(classes, 1)):
        folder = tmp_path / "pictures" / (f"class{label}" if classes else "")
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(4):  # larger than the model's, not square and all different, where the recipe resizes
            height, width = (size + 9, size + 30 + number) if recipe.data.fit == "resize" else (size, size)
            Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{number}.png")
    sets = ["training.steps=1", "training.batch_size=4", "training.n_critic=1", "architecture.width=8"]
    sets += ["logging.samples=4", "logging.tensorboard=false", "training.threads=1", "training.device=cpu"]
    words = [word for setting in sets for word in ("--set", setting)]
    arguments = [name, "--data", tmp_path / "pictures", *words]
    dry = tiny.run(*arguments, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "everything fits together" in dry.stdout
    done = tiny.run(*arguments, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"] is True
    grid = next((tmp_path / "run" / "samples").glob("*.png"))
    with Image.open(grid) as picture:
        assert picture.size == (2 * size, 2 * size)
        assert picture.mode == "RGB"
    assert "FID" in recipe.description
