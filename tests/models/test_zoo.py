"""The trained models that ship: weights that fit, sizes within bounds, cards that say what was measured, all digits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import zoo
from ganexport.checkpoint import WEIGHTS, load_run
from ganexport.cli.main import cli, run
from ganexport.cli.recipes import _caption, list_recipes
from ganexport.recipe import load_recipe, models_folder

TRAINED = sorted(path.parent.name for path in models_folder().glob(f"*/{WEIGHTS}"))
trained = pytest.mark.parametrize("name", TRAINED)


def record(name: str) -> dict:
    return json.loads((models_folder() / name / zoo.RECORD).read_text())


def test_there_are_trained_models_and_they_are_small():
    assert "dcgan-mnist" in TRAINED
    sizes = {name: (models_folder() / name / WEIGHTS).stat().st_size for name in TRAINED}
    assert max(sizes.values()) <= 2_000_000, sizes
    assert sum(sizes.values()) <= 8_000_000, sizes


@trained
def test_the_record_is_of_these_weights_and_this_recipe(name):
    about = record(name)
    assert about["training"]["weights_bytes"] == (models_folder() / name / WEIGHTS).stat().st_size
    assert about["training"]["steps"] == load_recipe(name, about["sets"]).training.steps
    assert about["evaluation"]["generated"] == 10_000
    assert about["evaluation"]["real"] == 60_000
    assert about["training"]["parameters"] == sum(p.numel() for p in load_run(name).module.parameters())


@trained
def test_the_card_is_rendered_from_the_record(name, tmp_path):
    folder = models_folder() / name
    for file in (zoo.RECORD, "recipe.toml"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    zoo.write_card(tmp_path)
    written = (tmp_path / "README.md").read_text().replace(f"# {tmp_path.name}\n", f"# {name}\n")
    assert written.replace(tmp_path.name, name) == (folder / "README.md").read_text(), (
        "run: python -m benchmarks.zoo --cards"
    )


def test_the_documents_table_is_rendered_from_the_records():
    text = zoo.DOCUMENT.read_text()
    assert zoo.with_table(text) == text, "python -m benchmarks.zoo --cards"
    assert all(f"[{name}]" in text for name in TRAINED)


@trained
def test_all_ten_digits_with_confidence(name):
    from ganexport.evaluation.classifier import classify, load_classifier
    from ganexport.evaluation.source import open_generator

    found = record(name)["evaluation"]
    assert min(found["class_shares"]) >= 0.04
    assert found["confidence"] >= 0.9
    # The record is checked on other samples: 1,000 of another seed, a looser bound for the smaller number.
    with open_generator(name) as generator:
        images = generator.generate(1000, 77)
    _, probabilities = classify(load_classifier(), images)
    shares = np.bincount(probabilities.argmax(1), minlength=10) / len(images)
    assert shares.min() >= 0.025, shares
    assert probabilities.max(1).mean() >= 0.88


@trained
def test_the_picture_shows_samples(name):
    with Image.open(models_folder() / name / zoo.PICTURE) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[0] in (280, 320)
    assert pixels.std() > 40


def test_the_list_knows_the_trained_ones_and_draws_them(tmp_path):
    rows = {row.name: row for row in list_recipes()}
    for name in TRAINED:
        assert rows[name].trained
        assert rows[name].frechet == record(name)["evaluation"]["frechet"]
    result = CliRunner().invoke(cli, ["recipes", "--grid", str(tmp_path / "models.png")])
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in TRAINED)
    with Image.open(tmp_path / "models.png") as picture:
        assert picture.height > 280 * len(TRAINED) / 2
        assert picture.width > 2 * 448
    # The font in the picture has no others.
    assert all(_caption(row).isascii() for row in rows.values())
    assert run(["recipes", "--grid", str(tmp_path / "models.jpg")]) == 2
    assert run(["recipes", "dcgan-mnist", "--grid", str(tmp_path / "models.png")]) == 2


def test_by_name_from_any_folder(tmp_path):
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ganexport.cli", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    call("generate", "dcgan-mnist", "-n", "9", "--seed", "3", "-o", "direct.png")
    call("convert", "dcgan-mnist", "--to", "onnx", "-o", "digits")
    call("generate", "digits", "-n", "9", "--seed", "3", "-o", "exported.png")
    direct = np.asarray(Image.open(tmp_path / "direct.png")).astype(int)
    exported = np.asarray(Image.open(tmp_path / "exported.png")).astype(int)
    assert direct.shape == (84, 84)
    assert np.abs(direct - exported).max() <= 1


def test_a_run_that_is_not_of_the_recipe_is_not_packed(tmp_path):
    wanted = {"training": {"steps": 5, "threads": 2}, "regularizers": [{"name": "r1", "weight": 1.0}]}
    other = {"training": {"steps": 6, "threads": 1}, "regularizers": [{"name": "r1", "weight": 2.0}]}
    different = zoo._differences(zoo._flat(wanted), zoo._flat(other))
    assert different == [
        "regularizers.0.weight: 2.0 in the run, 1.0 in the recipe",
        "training.steps: 6 in the run, 5 in the recipe",
    ]


@pytest.mark.slow
def test_packing_a_run_writes_the_whole_folder(tmp_path, monkeypatch):
    from ganexport.training.api import train

    models = tmp_path / "models"
    (models / "tiny").mkdir(parents=True)
    text = (models_folder() / "dcgan-mnist" / "recipe.toml").read_text().replace('"dcgan-mnist"\ndesc', '"tiny"\ndesc')
    (models / "tiny" / "recipe.toml").write_text(text)
    sets = ["training.steps=20", "logging.tensorboard=false", "logging.sample_every=20"]
    train(str(models / "tiny"), out=tmp_path / "run", sets=sets)
    monkeypatch.setattr(zoo, "MODELS", models)
    with pytest.raises(SystemExit, match=r"training\.steps: 20 in the run"):
        zoo.pack(tmp_path / "run", "mnist-10k", 500, [])
    (models / "tiny" / "recipe.toml").write_text((tmp_path / "run" / "recipe.toml").read_text())
    zoo.pack(tmp_path / "run", "mnist-10k", 500, [])
    made = {path.name for path in (models / "tiny").iterdir()}
    assert made == {"recipe.toml", "weights.safetensors", "samples.png", "evaluation.json", "README.md"}
    whole, half = load_run(tmp_path / "run").module, load_run(models / "tiny").module
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-3, atol=1e-6)
