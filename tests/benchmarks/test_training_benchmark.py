"""The training benchmark: its yardstick trains what the engine trains, and it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import training
from benchmarks._plain_loop import PlainLoop
from ganexport.measurement import report_from_json

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import tiny_run as tiny

ROOT = Path(__file__).parents[2]
STILL = {"generator": {"rate": 1e-30}, "discriminator": {"rate": 1e-30}}
CASES = {
    "minimax": [],
    "non-saturating": [{"name": "r1", "interval": 2}],
    "least-squares": [{"name": "r2"}],
    "hinge": [{"name": "weight-clipping", "bound": 10.0}],
    "relativistic": [{"name": "r1"}, {"name": "r2"}],
    "wasserstein": [{"name": "gradient-penalty"}],
}


@pytest.mark.parametrize("objective", CASES)
def test_the_usual_loop_has_the_engines_gradients(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(
        objective={"name": objective}, regularizers=CASES[objective], training={"n_critic": 1}, optimizer=STILL
    )
    trainer, plain = tiny.trainer(recipe), PlainLoop(recipe, tiny.images())
    networks = trainer.networks
    for mine, theirs in ((plain.generator, networks.generator), (plain.discriminator, networks.discriminator)):
        mine.load_state_dict(theirs.state_dict())
    places = networks.places(0)
    monkeypatch.setattr(plain, "_real", lambda: networks.batch(0))
    latents = iter([networks.latents.draw(0), networks.latents.draw(1)])
    monkeypatch.setattr(plain, "_inputs", lambda: next(latents))
    if places is not None:
        monkeypatch.setattr(torch, "rand", lambda *shape: places.view(shape))
    found: dict[str, list[torch.Tensor]] = {}
    update = plain._update_discriminator

    def keep(*arguments: object) -> torch.Tensor:
        loss = update(*arguments)
        found["d"] = [p.grad.clone() for p in plain.discriminator.parameters() if p.grad is not None]
        return loss

    monkeypatch.setattr(plain, "_update_discriminator", keep)
    plain.advance()
    found["g"] = [p.grad.clone() for p in plain.generator.parameters() if p.grad is not None]
    trainer.advance(log=False)
    for which, parameters in (("d", networks.d_parameters), ("g", networks.g_parameters)):
        for mine, theirs in zip(found[which], parameters, strict=True):
            assert theirs.grad is not None
            torch.testing.assert_close(mine, theirs.grad, rtol=1e-3, atol=1e-5)


def test_the_usual_loop_trains_conditional_recipes_and_keeps_an_average() -> None:
    recipe = tiny.recipe(
        architecture={"name": "sagan", "image_size": 28, "channels": 1, "width": 8, "classes": 10, "attention": 14},
        objective={"name": "hinge"},
        regularizers=[],
    )
    plain = PlainLoop(recipe, tiny.images())
    before = {name: value.clone() for name, value in plain.average.state_dict().items()}
    losses = [plain.advance() for _ in range(2)]
    assert all(torch.isfinite(loss) for pair in losses for loss in pair)
    moved = [name for name, value in plain.average.state_dict().items() if not torch.equal(value, before[name])]
    assert moved


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    recipe, output = tiny.write(tmp_path), tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.training", "--recipes", str(recipe), "--rounds", "2"]
    command += ["--seconds", "0.05", "--frechet", str(recipe), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=tiny.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = report_from_json(output.read_bytes(), output.name)
    usual, tuned = report.measurements
    for row in (usual, tuned):
        samples = row.series[0].samples
        assert len(samples) == sum(row.facts["round_sizes"]["end_to_end"])
        assert row.facts["frechet"] > 0
        assert row.facts["steps_left_out"] == 0
    value, low, high = tuned.facts["speedup"]
    assert low <= value <= high
    assert next(entry for entry in tuned.facts["tuning"] if entry["chosen"])["settings"] == tuned.facts["settings"]
    assert json.loads(output.read_text())["command"].startswith("python -m benchmarks.training")


def test_rows_hold_what_the_workers_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        """A worker whose steps take 4 or 2 milliseconds."""

        def __init__(self, way: str, recipe: str, settings: dict) -> None:
            self.threads, self.step, self.asked = 2, 4_000_000 if way == "plain" else 2_000_000, []

        def ask(self, command: str, count: int) -> object:
            self.asked.append((command, count))
            return [self.step] * count if command == "steps" else 7.5

        def close(self) -> None:
            assert self.asked[-1] == ("frechet", 5000)

    settings = {"precision": "bf16", "compile": "off", "memory_format": "contiguous", "threads": 2}
    tuned = {"settings": settings, "rows": [], "batch_size": 64}
    monkeypatch.setattr(training, "Worker", Fake)
    monkeypatch.setattr(training, "_tune", lambda recipe, steps: tuned)
    output = tmp_path / "out.json"
    assert (
        training.main(["--recipes", "dcgan-mnist", "--rounds", "3", "--seconds", "0.1", "--output", str(output)]) == 0
    )
    usual, ours = report_from_json(output.read_bytes(), output.name).measurements
    assert list(usual.series[0].samples) == [4_000_000] * 75
    assert ours.facts["speedup"][0] == pytest.approx(2)
    assert ours.facts["settings"] == settings
    assert ours.facts["remaining_steps"] == 938 - 2 - 75
    assert usual.facts["frechet"] == ours.facts["frechet"] == 7.5
