"""Latent tools on real ONNX generators: what is drawn is what ``generate`` makes, and the arc is an arc."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from ganexport.cli.main import cli
from ganexport.errors import UsageError
from ganexport.explore import latents
from ganexport.explore.picture import enlarged, grid
from ganexport.runtime.generator import load
from ganexport.spec import Dim

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
import tiny_generators as tiny


def saved(folder: Path, **options) -> Path:
    classes = options.get("classes", 0)
    spec = tiny.image_spec(classes=classes, dim=options.pop("dim", None))
    path = folder / "tiny.onnx"
    onnx.save(tiny.image_model(spec=spec, **options), path)
    return path


def run(*arguments: object):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture
def conditional(tmp_path):
    with load(saved(tmp_path, classes=4)) as generator:
        yield generator


def test_a_walk_passes_through_the_seeds_own_images(conditional):
    frames = latents.walk(conditional, [3, 9, 4], 5, label=2)
    assert frames.shape == (11, 8, 8, 3)
    assert frames.dtype == np.uint8
    expected = conditional.generate(seeds=[3, 9, 4], labels=2)
    assert np.array_equal(frames[[0, 5, 10]], expected)
    # Every frame differs from the one before: the walk moves.
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(frames))


def test_without_a_label_the_class_of_the_first_seed_is_kept(conditional):
    frames = latents.walk(conditional, [3, 9], 4)
    first = conditional.generate(seeds=[3])
    assert np.array_equal(frames[:1], first)
    labels = [
        int(np.argmax([np.array_equal(first[0], conditional.generate(seeds=[3], labels=k)[0]) for k in range(4)]))
    ]
    assert np.array_equal(frames[-1:], conditional.generate(seeds=[9], labels=labels[0]))


def test_walks_of_any_length_fit_a_generator_that_takes_only_certain_batches(tmp_path):
    with load(saved(tmp_path, dim=Dim("batch", 4, 8, 16, 4))) as generator:
        for steps in (1, 2, 7, 30):
            assert len(latents.walk(generator, [1, 2], steps)) == steps + 1


def test_the_arc_keeps_the_length():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 512))
    a, b = a / np.linalg.norm(a) * 20, b / np.linalg.norm(b) * 20
    for place in np.linspace(0, 1, 9):
        assert np.linalg.norm(latents._arc(a, b, place)) == pytest.approx(20, rel=1e-9)
    assert np.linalg.norm(latents._line(a, b, 0.5)) < 16  # which a straight line does not
    assert np.allclose(latents._arc(a, b, 0.0), a)
    assert np.allclose(latents._arc(a, b, 1.0), b)
    assert np.allclose(latents._arc(a, a, 0.3), a)
    assert np.isfinite(latents._arc(a, -a, 0.3)).all()
    assert np.isfinite(latents._arc(a * 0, b, 0.3)).all()


def test_truncation_rows_are_those_of_generate(conditional):
    images = latents.truncations(conditional, [0.5, 2.0], 3, seed=6, label=1)
    assert images.shape == (2, 3, 8, 8, 3)
    assert np.array_equal(images[1], conditional.generate(3, 6, labels=1, truncation=2.0))
    assert not np.array_equal(images[0], images[1])


def test_every_class_has_the_same_latents(conditional, tmp_path):
    images = latents.by_class(conditional, 3, seed=5)
    assert images.shape == (4, 3, 8, 8, 3)
    assert np.array_equal(images[2], conditional.generate(3, 5, labels=2))
    (tmp_path / "plain").mkdir()
    with load(saved(tmp_path / "plain")) as plain, pytest.raises(UsageError, match="not class-conditional"):
        latents.by_class(plain, 3)


def test_neighbours_are_found_among_many_blocks():
    random = np.random.default_rng(1)
    real = random.integers(0, 256, (9000, 6, 5, 1), np.uint8)
    images = real[[8999, 17, 4096]].copy()
    images[1, 0, 0, 0] ^= 1
    indices, distances = latents.neighbours(images, real, 3)
    assert indices[:, 0].tolist() == [8999, 17, 4096]
    assert distances[0, 0] == 0
    assert distances[1, 0] == pytest.approx(np.sqrt(1 / 30))
    assert (np.diff(distances, axis=1) >= 0).all()
    exact = np.sqrt(((real.astype(float) - images[2].astype(float)) ** 2).mean(axis=(1, 2, 3)))
    assert indices[2].tolist() == np.argsort(exact, kind="stable")[:3].tolist()
    with pytest.raises(UsageError, match="real ones"):
        latents.neighbours(images, real[:, :5], 3)
    with pytest.raises(UsageError, match="k must be 1 to 9000"):
        latents.neighbours(images, real, 9001)


def test_grid_and_enlargement_put_every_pixel_in_its_place():
    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5, 1)
    picture = grid(images, gap=1)
    assert picture.shape == (2 * 4 + 1, 3 * 5 + 2, 1)
    assert np.array_equal(picture[5:9, 12:17], images[1, 2])
    assert (picture[4] == 255).all()
    assert np.array_equal(enlarged(picture, 3)[::3, ::3], picture)


def test_the_command_line_writes_pictures(tmp_path):
    model = saved(tmp_path, classes=4)
    result = run("explore", "walk", model, "--seeds", "1,2,3", "--steps", 4, "--scale", 2, "-o", tmp_path / "walk.gif")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "walk.gif") as picture:
        assert (picture.n_frames, picture.size) == (9, (16, 16))
    for name, more, size in (
        ("walk", ["--seeds", "1,2,3", "--steps", 4], (5 * 9 - 1, 2 * 9 - 1)),
        ("truncation", ["--values", "0.5,1,2", "-n", 4], (4 * 9 - 1, 3 * 9 - 1)),
        ("classes", ["-n", 5], (5 * 9 - 1, 4 * 9 - 1)),
    ):
        result = run("explore", name, model, *more, "-o", tmp_path / f"{name}.png")
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == size, name


def test_neighbours_on_the_command_line(tmp_path):
    real = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
    model = saved(tmp_path)
    with load(model) as generator:
        real[7] = generator.generate(1, 0)[0]  # a copy that must be found
    np.save(tmp_path / "real.npy", real)
    result = run(
        "explore", "neighbours", model, "--data", tmp_path / "real.npy", "-n", 2, "-k", 3, "-o", tmp_path / "n.png"
    )
    assert result.exit_code == 0, result.output
    assert "sample 0: nearest 7 (0.0)" in result.stdout
    with Image.open(tmp_path / "n.png") as picture:
        assert picture.size == (4 * 9 - 1, 2 * 9 - 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["walk", "--seeds", "1", "-o", "a.gif"], "at least two seeds"),
        (["walk", "--seeds", "1,x", "-o", "a.gif"], "whole numbers"),
        (["walk", "-o", "a.jpg"], "must end in .gif or .png"),
        (["truncation", "--values", "1,,2", "-o", "a.png"], "numbers separated by commas"),
        (["truncation", "--values", "-1", "-o", "a.png"], "truncation"),
        (["classes", "-o", "a.png"], "not class-conditional"),
        (["classes", "-o", "a.bmp"], "must end in .png|not class-conditional"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, said):
    import re

    from ganexport.cli.main import run as run_main

    model = saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    import contextlib
    import io

    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        code = run_main(["explore", arguments[0], str(model), *arguments[1:]])
    assert code == 2
    errors = [line for line in heard.getvalue().splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert re.search(said, errors[0]), errors
    assert not list(tmp_path.glob("a.*"))
