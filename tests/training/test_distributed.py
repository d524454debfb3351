"""Several processes under torchrun train what one process trains."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import each_objective
import pytest
import tiny_run as tiny
import torch

from ganexport.checkpoint import checkpoint_path, read_checkpoint, read_state, steps_of
from ganexport.recipe import registries
from ganexport.training.metrics import read_metrics

#: Sums over processes are taken in another order than sums over a batch: float32 rounding over 12 steps.
#: Relative L2 of all weights.
TOLERANCE = 1e-4
#: A critic's last bias has gradient 0 but for rounding, which Adam would divide by itself and make a full step of.
EPS = {"eps": 1e-4}


def torchrun(processes: int, *arguments: object, script: str = "-m ganexport.cli train") -> list[str]:
    start = f"-m torch.distributed.run --standalone --nproc-per-node {processes} --max-restarts 0 {script}"
    return [sys.executable, *start.split(), *map(str, arguments)]


def finish(command: list[str]) -> None:
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def distance(run: Path, other: dict[str, torch.Tensor], name: str) -> float:
    """Relative L2 distance of all of a network's tensors."""
    mine = read_checkpoint(run).tensors[name]
    assert mine.keys() == other.keys()
    difference = sum(float((mine[key].double() - other[key].double()).square().sum()) for key in mine)
    return (difference / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5


SETS = ["--set", "training.steps=12", "--set", "training.batch_size=16"]  # 3 does not divide 16
SETS += ["--set", "optimizer.generator.eps=1e-4", "--set", "optimizer.discriminator.eps=1e-4"]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    finish(torchrun(2, tiny.write(folder), *SETS, "--out", folder / "run"))
    return folder / "run"


def check_against_one_process(run: Path, folder: Path) -> None:
    optimizer = {"generator": {"rate": 1e-3, **EPS}, "discriminator": EPS}
    recipe = tiny.recipe(training={"steps": 12, "batch_size": 16}, optimizer=optimizer)
    alone = tiny.trainer(recipe, folder / "alone")
    alone.train()
    assert alone.networks.average is not None
    networks = {
        "generator": alone.networks.generator,
        "discriminator": alone.networks.discriminator,
        "ema": alone.networks.average.module,
    }
    for name, network in networks.items():
        assert distance(run, network.state_dict(), name) < TOLERANCE
    for mine, theirs in zip(read_metrics(run), read_metrics(folder / "alone"), strict=True):
        assert mine["penalty"] == pytest.approx(theirs["penalty"], rel=1e-3)


def test_two_processes_train_what_one_trains(by_two: Path, tmp_path: Path) -> None:
    check_against_one_process(by_two, tmp_path)
    assert read_state(checkpoint_path(by_two, 12)).world == 2


def test_three_processes_with_unequal_shares_train_what_one_trains(tmp_path: Path) -> None:
    finish(torchrun(3, tiny.write(tmp_path), *SETS, "--out", tmp_path / "run"))
    check_against_one_process(tmp_path / "run", tmp_path)


def test_resume_is_bit_exact_with_two_processes(by_two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(by_two, run)
    for step in (10, 12):
        shutil.rmtree(checkpoint_path(run, step))
    finish(torchrun(2, "--resume", "--out", run))
    mine, theirs = (read_state(checkpoint_path(path, 12)) for path in (run, by_two))
    assert mine.files == theirs.files


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_objective_resumes_bit_for_bit_and_trains_what_one_process_trains(processes: int, tmp_path: Path) -> None:
    command = torchrun(processes, tmp_path / "runs", script=str(Path(__file__).with_name("each_objective.py")))
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == each_objective.cases().keys()
    assert set(registries()["objective"].names()) < found.keys()
    assert [name for name, row in found.items() if not row["resumed"]] == []
    apart = {name: row["apart"] for name, row in found.items() if name not in each_objective.COUPLED}
    assert max(apart.values()) < TOLERANCE, apart


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_two(tmp_path: Path) -> tuple[subprocess.Popen[str], Path]:
    run = tmp_path / "run"
    sets = ("--set", "training.steps=50000", "--set", "training.checkpoint_every=20")
    process = subprocess.Popen(
        torchrun(2, tiny.write(tmp_path), *sets, "--out", run),
        env=tiny.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not steps_of(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return process, run


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finding the processes needs /proc")
def test_a_killed_process_ends_the_job_with_a_resumable_checkpoint(tmp_path: Path) -> None:
    process, run = start_two(tmp_path)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in errors.partition("torch/distributed")[0]
    assert all(not Path(f"/proc/{rank}").exists() for rank in ranks)
    step = steps_of(run)[-1]
    read_checkpoint(run)  # complete
    again = tiny.trainer(tiny.recipe(training={"steps": step + 2}), run)
    again.restore()
    again.train()
    assert read_state(checkpoint_path(run, step + 2)).finished


def test_sigterm_stops_all_processes_at_one_step(tmp_path: Path) -> None:
    process, run = start_two(tmp_path)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0
    state = read_checkpoint(run).state
    assert state.world == 2
    assert not state.finished
    assert state.step == steps_of(run)[-1]
