"""A run that was killed and resumed ends bit for bit where an undisturbed one ends."""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny_run as tiny
import torch

from ganexport.checkpoint import checkpoint_path, read_checkpoint, read_state, steps_of
from ganexport.recipe import registries
from ganexport.training.metrics import read_metrics

PENALTIES = ("gradient-penalty", "dragan", "r1", "r2", "weight-clipping")


def comparable(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(run)]


def assert_same_end(run: Path, reference: Path) -> None:
    mine, theirs = (read_state(checkpoint_path(path, steps_of(path)[-1])) for path in (run, reference))
    assert mine.finished
    assert mine == theirs  # the sha256 of every tensor file among it
    assert comparable(run) == comparable(reference)
    names = sorted(path.name for path in (reference / "samples").iterdir())
    assert sorted(path.name for path in (run / "samples").iterdir()) == names
    for name in names:
        assert (run / "samples" / name).read_bytes() == (reference / "samples" / name).read_bytes()


CASES = [
    *[{"objective": {"name": name}, "regularizers": []} for name in registries()["objective"].names()],
    *[{"regularizers": [{"name": name, "interval": 3}]} for name in PENALTIES],
    {"training": {"precision": "bf16"}},
    {"training": {"precision": "fp16"}, "optimizer": {"generator": {"name": "adamw", "weight_decay": 0.01}}},
    {"training": {"accumulation": 2}, "optimizer": {"discriminator": {"name": "rmsprop", "rate": 5e-5}}},
    {"ema": {"decay": 0.0}, "schedule": {"name": "cosine", "warmup": 3}},
    {"training": {"memory_format": "channels_last"}, "optimizer": {"generator": {"clip_norm": 0.5}}},
]


@pytest.mark.parametrize("sections", CASES, ids=lambda s: json.dumps(s)[1:60])
def test_restoring_continues_bit_for_bit(tmp_path: Path, sections: dict) -> None:
    chosen = tiny.recipe(**sections)
    whole = tiny.trainer(chosen)
    for step in range(10):
        whole.advance(log=step % 2 == 1)
    first = tiny.trainer(chosen, tmp_path)
    for _ in range(4):
        first.advance(log=False)
    first.save()
    torch.rand(17)  # whatever else draws random numbers in between
    second = tiny.trainer(chosen, tmp_path)
    second.restore()
    assert second.step == 4
    for _ in range(6):
        second.advance(log=True)
    expected, found = tiny.weights(whole), tiny.weights(second)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def kill_and_resume(tmp_path: Path, kills: int, steps: int, seed: int) -> None:
    recipe = tiny.write(tmp_path)
    sets = ("--set", f"training.steps={steps}", "--set", f"logging.sample_every={steps // 2}")
    reference, run = tmp_path / "reference", tmp_path / "run"
    clock = time.perf_counter()
    done = tiny.run(recipe, *sets, "--out", reference)
    assert done.returncode == 0, done.stderr
    seconds = time.perf_counter() - clock

    def finish_and_compare() -> None:
        done = tiny.run(recipe, *sets, "--out", run, "--resume")
        assert done.returncode == 0, done.stderr
        assert not list((run / "checkpoints").glob(".writing-*"))
        assert_same_end(run, reference)

    moments = random.Random(seed)
    killed = 0
    while killed < kills:
        process = subprocess.Popen(
            tiny.command(recipe, *sets, "--out", run, "--resume"), env=tiny.environment(), stderr=subprocess.DEVNULL
        )
        if moments.random() < 0.75:  # most wait for the first sign of training, or they would all hit the imports
            before = steps_of(run)
            while steps_of(run) == before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.1 * seconds))
        else:
            time.sleep(moments.uniform(0.1, 0.9) * seconds)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if steps_of(run) and read_state(checkpoint_path(run, steps_of(run)[-1])).finished:
            finish_and_compare()  # it outran the kills: once more from the beginning
            shutil.rmtree(run)
    finish_and_compare()


def test_sigkill_at_three_random_moments(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=3, steps=150, seed=1)


@pytest.mark.slow
def test_sigkill_at_twenty_random_moments(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=20, steps=800, seed=2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_a_checkpoint_and_a_message(
    tmp_path: Path, request: pytest.FixtureRequest, number: int, code: int
) -> None:
    recipe, run = tiny.write(tmp_path), tmp_path / "run"
    arguments = (recipe, "--out", run, "--set", "training.steps=20000", "--set", "training.checkpoint_every=10000")
    process = subprocess.Popen(
        tiny.command(*arguments), env=tiny.environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while not read_metrics(run) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    message = errors.strip().splitlines()[-1]
    step = steps_of(run)[-1]
    assert f"checkpoint {step} is kept" in message
    assert "--resume" in message
    state = read_checkpoint(run).state
    assert state.step == step
    assert not state.finished
    # The interrupted run and an undisturbed one agree at that step, at the run's own thread count.
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(state.threads)
    whole = tiny.trainer(tiny.recipe(training={"steps": 20000, "checkpoint_every": 10000}))
    for _ in range(step):
        whole.advance(log=False)
    kept = read_checkpoint(run).tensors["generator"]
    assert all(torch.equal(kept[name], value) for name, value in whole.networks.generator.state_dict().items())
