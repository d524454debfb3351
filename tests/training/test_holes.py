"""Every hole a user can fall into during training: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import errno
import io
import json
import pickle
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny_run as tiny
import torch
from click.testing import CliRunner

from ganexport.checkpoint import checkpoint_path, load_run, read_checkpoint, read_state, steps_of
from ganexport.cli.train import command
from ganexport.errors import CheckpointError, DataError, OutputError, RecipeError, UsageError
from ganexport.training.api import train
from ganexport.training.metrics import read_metrics

STEPS = ("training.steps=6", "training.checkpoint_every=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(str(tiny.write(folder)), out=folder / "run", sets=STEPS)
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_what_a_run_holds(finished: Path) -> None:
    assert steps_of(finished) == [2, 4, 6]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "samples" / "00000006.png").is_file()
    assert [line["step"] for line in read_metrics(finished)] == [2, 4, 6]
    assert {"d_loss", "g_loss", "penalty", "wasserstein_estimate", "d_gradient_norm", "g_gradient_norm"} <= set(
        read_metrics(finished)[-1]
    )


def test_checkpoints_are_byte_reproducible(finished: Path, tmp_path: Path) -> None:
    train(str(finished), out=tmp_path / "elsewhere")
    for path in sorted(checkpoint_path(finished, 6).iterdir()):
        assert path.read_bytes() == (checkpoint_path(tmp_path / "elsewhere", 6) / path.name).read_bytes(), path.name


def test_load_run(run: Path) -> None:
    loaded = load_run(run)
    assert (loaded.step, loaded.name) == (6, "tiny")
    assert not loaded.module.training
    assert loaded.recipe["architecture"]["width"] == 4
    assert loaded.spec.name == "tiny"
    path = run / "recipe.toml"
    path.write_text(path.read_text().replace('"mnist-10k"', '"/some/machine/digits.npz"'))
    assert load_run(run).recipe["data"]["source"] == "digits.npz"
    average, raw = loaded.module.state_dict(), load_run(run, ema=False).module.state_dict()
    assert any(not torch.equal(average[name], raw[name]) for name in average)
    earlier = load_run(run, step=2).module.state_dict()
    assert any(not torch.equal(average[name], earlier[name]) for name in average)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are 2, 4, 6"):
        load_run(run, step=3)


def test_runs_that_are_not(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such run"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a run nor"):
        load_run(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="a file; give the run's folder"):
        load_run(run / "recipe.toml")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint in it yet"):
        load_run(run)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "directory"])
@pytest.mark.parametrize("name", ["ema.safetensors", "state.json"])
def test_damaged_checkpoints_are_refused(run: Path, damage: str, name: str) -> None:
    path = checkpoint_path(run, 6) / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(content.replace(b"{", b"[", 1) if name == "state.json" else content[:-1] + b"\x55")
    elif damage == "directory":
        path.mkdir()
    with pytest.raises(CheckpointError, match="checkpoints") as caught:
        load_run(run)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError):
        train(None, out=run, resume=True, sets=("training.steps=8",))
    shutil.rmtree(checkpoint_path(run, 6))  # what the message says to do
    assert train(None, out=run, resume=True).finished


def test_a_pickle_with_code_is_never_executed(run: Path) -> None:
    marker = run / "executed"

    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    buffer = io.BytesIO()
    torch.save({"weight": Bomb()}, buffer)
    for content in (pickle.dumps(Bomb()), buffer.getvalue()):
        for name in ("generator", "ema"):
            path = checkpoint_path(run, 6) / f"{name}.safetensors"
            path.write_bytes(content)
            state = json.loads((checkpoint_path(run, 6) / "state.json").read_text())
            import hashlib

            state["files"][name] = hashlib.sha256(content).hexdigest()  # even with a matching digest
            (checkpoint_path(run, 6) / "state.json").write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match="not safetensors"):
            load_run(run)
    assert not marker.exists()


def test_a_checkpoint_of_the_future_is_refused(run: Path) -> None:
    path = checkpoint_path(run, 6) / "state.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(CheckpointError, match="newer ganexport"):
        load_run(run)


def test_weights_of_another_architecture_are_refused(run: Path) -> None:
    path = run / "recipe.toml"
    path.write_text(path.read_text().replace("width = 4", "width = 5"))
    with pytest.raises(CheckpointError, match=r"does not fit the recipe's architecture: .*the model's is"):
        load_run(run)


def test_a_used_folder_is_refused_without_resume(run: Path, tmp_path: Path) -> None:
    recipe = str(tiny.write(tmp_path))
    with pytest.raises(OutputError, match="not empty; go on with --resume"):
        train(recipe, out=run)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files and no run"):
        train(recipe, out=other, resume=True)
    assert (other / "notes.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="a file; give a folder"):
        train(recipe, out=other / "notes.txt")


def test_a_finished_run_says_so(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = train(None, out=run, resume=True)
    assert result.already_finished
    assert result.step == 6
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_resuming_with_other_settings(run: Path, tmp_path: Path) -> None:
    recipe = str(tiny.write(tmp_path))
    assert train(recipe, out=run, sets=STEPS, resume=True).already_finished  # the same ones are accepted
    with pytest.raises(RecipeError) as caught:
        train(recipe, out=run, sets=(*STEPS, "optimizer.generator.rate=0.1", "training.seed=3"), resume=True)
    assert "optimizer.generator.rate (0.001 in the run, now 0.1)" in str(caught.value)
    assert "training.seed (0 in the run, now 3)" in str(caught.value)
    longer = train(recipe, out=run, sets=("training.steps=8", "training.checkpoint_every=3"), resume=True)
    assert longer.step == 8


def test_resuming_on_other_images_is_refused(run: Path, tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8))
    with pytest.raises(CheckpointError, match="was trained on other images"):
        train(None, out=run, resume=True, data=str(tmp_path / "noise.npy"), sets=("training.steps=8",))


def test_resuming_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path, finished: Path) -> None:
    result = train(str(tiny.write(tmp_path)), out=tmp_path / "run", resume=True, sets=STEPS)
    assert result.step == 6
    assert read_state(checkpoint_path(tmp_path / "run", 6)) == read_state(checkpoint_path(finished, 6))


def test_metrics_are_cut_back_to_the_checkpoint(run: Path) -> None:
    for step in (4, 6):
        shutil.rmtree(checkpoint_path(run, step))
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "d_l')  # cut off by a kill
    train(None, out=run, resume=True)
    assert [line["step"] for line in read_metrics(run)] == [2, 4, 6]


def test_two_trainings_in_one_folder_are_refused(run: Path) -> None:
    import fcntl

    with (run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another training is running in it"):
            train(None, out=run, resume=True)


def test_wrong_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = str(tiny.write(tmp_path))
    with pytest.raises(DataError, match="no such file or folder"):
        train(recipe, out=tmp_path / "run", data=str(tmp_path / "nothing"))
    assert not (tmp_path / "run" / "recipe.toml").exists()
    assert train(recipe, out=tmp_path / "run", sets=STEPS).finished  # so it can be tried again


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, ["dcgan-mnist", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "generator 765,633 parameters" in result.output
    assert "steps = 938" in result.output  # the resolved recipe is shown
    assert not list(tmp_path.iterdir())


def test_a_recipe_or_a_run_is_needed() -> None:
    with pytest.raises(UsageError, match="name a recipe"):
        train(None)
    with pytest.raises(UsageError, match="name a recipe"):
        train(None, resume=True)


def small_files() -> None:
    """In the child: no file may grow beyond 200 kB, so the checkpoint's largest tensors do not fit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_file_that_cannot_be_written_is_one_line_and_loses_nothing(run: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    large = ("--set", "training.steps=8", "--set", "logging.samples=1000")  # a grid of 1000 images is too large
    done = subprocess.run(
        tiny.command("--resume", "--out", run, *large), env=tiny.environment(), capture_output=True, text=True,
        preexec_fn=small_files, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_a_full_disk_keeps_the_last_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ganexport.checkpoint as module

    written = []

    def full(path: Path, content: bytes) -> None:
        written.append(path.name)
        path.write_bytes(content[:10])
        if path.name.startswith("generator."):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write_synced", full)
    with pytest.raises(OutputError, match="the disk is full; free some space"):
        train(None, out=run, resume=True, sets=("training.steps=8",))
    monkeypatch.undo()
    assert "generator.safetensors" in written
    assert steps_of(run) == [2, 4, 6]
    assert not list((run / "checkpoints").glob(".writing-*"))
    read_checkpoint(run)
    assert train(None, out=run, resume=True, sets=("training.steps=8",)).finished


def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        train(str(tiny.write(tmp_path)), out=tmp_path / "file" / "run", sets=STEPS)
