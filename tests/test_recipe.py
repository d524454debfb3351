"""Recipes: every mistake at once with its path and the nearest key; what is written reads back the same."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganexport.errors import RecipeError
from ganexport.recipe import load_recipe, override, recipe_names, resolve, to_plain, to_toml

MINIMAL = {"name": "mine", "architecture": {"name": "dcgan-mnist"}, "objective": {"name": "non-saturating"}}


def problems(raw: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(raw, "mine")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_mistake_is_reported_at_once() -> None:
    text = problems(
        {
            **MINIMAL,
            "architecture": {"name": "dcgan-mnist", "latnet": 3, "width": "wide"},
            "regularizers": [{"name": "gradient-penalty", "wieght": 1}, {"name": "r3"}],
            "trainig": {},
        }
    )
    assert "trainig: unknown key (did you mean training?)" in text  # the shape is wrong: options wait for it
    text = problems(
        {
            **MINIMAL,
            "architecture": {"name": "dcgan-mnist", "latnet": 3, "width": "wide"},
            "regularizers": [{"name": "gradient-penalty", "wieght": 1}, {"name": "r3"}],
        }
    )
    assert "4 mistakes" in text
    assert "architecture.latnet: unknown key (did you mean architecture.latent?)" in text
    assert "architecture.width: expected int, got str" in text
    assert "regularizers.0.wieght: unknown key (did you mean regularizers.0.weight?)" in text
    assert "regularizers.1.name: unknown regularizer 'r3'" in text


def test_types_ranges_and_choices() -> None:
    text = problems(
        {
            **MINIMAL,
            "training": {"steps": 0, "batch_size": "many", "precision": "fp23", "sede": 1},
            "optimizer": {"generator": {"rate": -1.0, "betas": [0.5]}, "discriminator": 3},
            "ema": {"decay": 1.0},
        }
    )
    for part in (
        "training.steps: expected int >= 1, got 0",
        "training.batch_size: expected int, got str",
        "training.precision: 'fp23' is not one of fp32, tf32, bf16, fp16 (did you mean 'fp32'?)",
        "training.sede: unknown key (did you mean training.seed?)",
        "optimizer.generator.rate: expected float > 0.0, got -1.0",
        "optimizer.generator.betas: expected array of length 2, got 1",
        "optimizer.discriminator: expected a table, got int",
        "ema.decay: expected float < 1.0, got 1.0",
    ):
        assert part in text


def test_missing_parts_and_contradictions() -> None:
    assert "objective: missing" in problems({"name": "x", "architecture": {"name": "dcgan-mnist"}})
    assert "architecture.name: missing" in problems({**MINIMAL, "architecture": {"latent": 3}})
    wrong = {**MINIMAL, "training": {"batch_size": 10, "accumulation": 3}}
    assert "training.accumulation: 3 does not divide the batch size 10" in problems(wrong)


def test_overrides() -> None:
    sets = ["training.steps=5", "training.precision=bf16", "optimizer.generator.betas=[0.0, 0.9]", "data.source=a/b"]
    recipe = load_recipe("dcgan-mnist", sets)
    assert recipe.training.steps == 5
    assert recipe.training.precision == "bf16"
    assert recipe.optimizer.generator.betas == (0.0, 0.9)
    assert recipe.data.source == "a/b"
    raw = {"regularizers": [{"name": "r1", "weight": 1.0}]}
    assert override(raw, ["regularizers.0.weight=7"])["regularizers"][0]["weight"] == 7
    assert raw["regularizers"][0]["weight"] == 1.0  # the original stays
    for setting in ("training.steps", "=3", "training..steps=3"):
        with pytest.raises(RecipeError, match="write key=value"):
            override(raw, [setting])
    with pytest.raises(RecipeError, match="not one of the 1 entries"):
        override(raw, ["regularizers.4.weight=7"])
    with pytest.raises(RecipeError, match="plain value"):
        override({"name": "x"}, ["name.first=7"])


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_resolves_and_reads_back(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert resolve(tomllib.loads(to_toml(recipe)), "again") == recipe
    assert resolve(to_plain(recipe), "again") == recipe


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40), st.floats(min_value=1e-9, max_value=1.0), st.integers(1, 10**9))
def test_toml_round_trip(text: str, rate: float, steps: int) -> None:
    raw = {**MINIMAL, "description": text, "training": {"steps": steps}, "optimizer": {"generator": {"rate": rate}}}
    recipe = resolve(raw, "mine")
    assert resolve(tomllib.loads(to_toml(recipe)), "again") == recipe


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    )
)
def test_nonsense_is_a_recipe_error_and_never_a_crash(value: object) -> None:
    for key in ("architecture", "objective", "regularizers", "training", "optimizer", "data"):
        try:
            resolve({**MINIMAL, key: value}, "mine")
        except RecipeError as error:
            assert "mine" in str(error)  # noqa: PT017 - most nonsense is refused, some of it is a valid recipe


def test_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'dcgan-mnist'"):
        load_recipe("dcgan-minst")
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(str(tmp_path / "x.toml"))
    with pytest.raises(RecipeError, match=r"no recipe\.toml in this folder"):
        load_recipe(str(tmp_path))
    broken = tmp_path / "broken.toml"
    broken.write_text("[training\nsteps=1")
    with pytest.raises(RecipeError, match=r"broken\.toml: not TOML: .*line 1"):
        load_recipe(str(broken))
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"broken\.toml: not TOML"):
        load_recipe(str(broken))


def test_the_list_needs_no_torch() -> None:
    code = (
        "import sys; from ganexport.cli.recipes import list_recipes; "
        "rows = list_recipes(); assert rows; assert 'torch' not in sys.modules; print(len(rows))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(recipe_names())


def test_the_command_prints_a_recipe_that_can_be_trained_from(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from ganexport.cli.recipes import command

    result = CliRunner().invoke(command, ["wgan-gp-mnist"])
    assert result.exit_code == 0
    (tmp_path / "mine.toml").write_text(result.output)
    assert load_recipe(str(tmp_path / "mine.toml")) == load_recipe("wgan-gp-mnist")
    listed = CliRunner().invoke(command, ["--json"])
    assert {row["name"] for row in json.loads(listed.output)} == set(recipe_names())
