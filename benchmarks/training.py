"""Training in wall-clock: the usual eager fp32 loop against ``--tune`` on this machine.

    python -m benchmarks.training [--recipes dcgan-mnist,wgan-gp-mnist] [--rounds 4] [--seconds 1.5] [--minutes 14]

For every recipe the tuner is asked once, in a process of its own. Then two processes train it, one of them at a time
and taken in turn, round after round, the same number of steps: the usual loop (``benchmarks/_plain_loop.py``: plain
PyTorch, eager, float32, nothing of the engine) and the engine with the settings that the tuner chose. A sample is one
step: data, all updates, both optimizers, averaging and logged metrics included; start-up, the tuner and compilation
not (they stand in the facts). The recipes of ``--frechet`` are then trained to their end both ways, in turn, and the
Fréchet distances of both stand beside the speeds. Every row is written when it is measured; what the deadline cuts off
stands in the file as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._rows import Deadline, Results, median, say
from ganexport import stats
from ganexport.environment import describe, device_key
from ganexport.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("precision", "compile", "memory_format", "threads")
#: dcgan-mnist first: its target is the highest, and it is trained to its end.
RECIPES = (
    "dcgan-mnist",
    "wgan-gp-mnist",
    "wgan-mnist",
    "lsgan-mnist",
    "dcgan-mnist-survey",
    "stylegan2-mnist",
    "r3gan-mnist",
    "sagan-mnist",
    "sngan-resnet-mnist",
)
WAYS = ("the usual loop, eager fp32", "tuned")
WARM_UP = 2
#: Generated digits behind a Fréchet distance.
DIGITS = 5000


class Worker:
    """A training in another process.

    Args:
        way: "plain" or "engine".
        recipe: Its name.
        settings: Of ``[training]``.

    Raises:
        RuntimeError: It ended; with what it said last.
    """

    def __init__(self, way: str, recipe: str, settings: dict[str, Any]) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        command = [sys.executable, "-m", "benchmarks._training_worker", json.dumps([way, recipe, settings])]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self.threads = int(self._answer()["threads"])

    def ask(self, command: str, count: int) -> Any:
        """Let it do something and wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, count]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._said.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            raise RuntimeError(_last_line(self._said.read(), code))
        return json.loads(line)


def main(arguments: list[str] | None = None) -> int:
    """Measure every recipe."""
    options = _options(arguments)
    names = options.recipes.split(",")
    output = options.output or ROOT / "benchmarks" / "results" / device_key(describe()) / "training-tuned.json"
    planned = [
        ({"name": f"{name}: {way}", "recipe": name}, {"scenario": "train-step", "sizes": {}, "recipe": name})
        for name in names
        for way in WAYS
    ]
    results = Results(output, "Training: the usual eager fp32 loop against --tune", planned)
    deadline = Deadline(60 * options.minutes)
    for number, name in enumerate(names):
        if not deadline.left:
            break
        try:
            _compare(name, results, 2 * number, options, deadline)
        except RuntimeError as error:
            for index in (2 * number, 2 * number + 1):
                results.add(index, unavailable=str(error))
    return 0


def _compare(name: str, results: Results, first: int, options: argparse.Namespace, deadline: Deadline) -> None:
    clock = time.monotonic()
    tuned = _tune(name, options.steps_left)
    tuning_seconds = time.monotonic() - clock
    say(f"{name}: {tuned['settings']} ({tuning_seconds:.0f} s of tuning)")
    workers = [Worker("plain", name, {}), Worker("engine", name, tuned["settings"])]
    try:
        _measure(name, workers, tuned, tuning_seconds, results, first, options, deadline)
    finally:
        for worker in workers:
            worker.close()


def _measure(
    name: str,
    workers: list[Worker],
    tuned: dict[str, Any],
    tuning_seconds: float,
    results: Results,
    first: int,
    options: argparse.Namespace,
    deadline: Deadline,
) -> None:
    warm = [worker.ask("steps", WARM_UP) for worker in workers]
    count = max(2, round(options.seconds * 1e9 / warm[0][-1]))  # steps of a round, the same for both
    rounds: list[list[list[int]]] = [[], []]
    for index in range(options.rounds):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            rounds[which].append(workers[which].ask("steps", count))
    ratio = stats.ratio_interval(rounds[0], rounds[1])
    middle = [median([sample for taken in side for sample in taken]) / 1e6 for side in rounds]
    say(f"  {middle[0]:.1f} ms and {middle[1]:.1f} ms a step: {ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]")
    facts: list[dict[str, Any]] = []
    for which in (0, 1):
        settings = tuned["settings"] if which else {"threads": workers[0].threads}
        sizes = {"end_to_end": [len(taken) for taken in rounds[which]]}
        facts.append({"settings": settings, "round_sizes": sizes, "first_step_seconds": warm[which][0] / 1e9})
    facts[1] |= {"speedup": [ratio.value, ratio.low, ratio.high], "tuning_seconds": tuning_seconds}
    facts[1]["tuning"] = tuned["rows"]

    def write() -> None:
        for which in (0, 1):
            samples = [sample for taken in rounds[which] for sample in taken]
            results.add(first + which, {"end_to_end": samples}, items=tuned["batch_size"], facts=facts[which])

    write()
    if name in options.frechet.split(","):
        left = load_recipe(name).training.steps - WARM_UP - count * options.rounds
        try:
            _to_the_end(workers, left, facts, deadline)
        except RuntimeError as error:  # the speeds were measured all the same
            results.note(f"{name}: not trained to its end: {error}")
        write()


def _to_the_end(workers: list[Worker], left: int, facts: list[dict[str, Any]], deadline: Deadline) -> None:
    """Train both to the recipe's last step, in turn, and judge what they make."""
    seconds = [0.0, 0.0]
    done = 0
    while done < left and deadline.left:
        count = min(25, left - done)
        for which, worker in enumerate(workers):
            seconds[which] += sum(worker.ask("steps", count)) / 1e9
        done += count
    for which, worker in enumerate(workers):
        facts[which] |= {"remaining_steps": done, "remaining_seconds": seconds[which], "steps_left_out": left - done}
        facts[which]["frechet"] = worker.ask("frechet", DIGITS)
        say(f"  {WAYS[which]}: {seconds[which]:.0f} s for {done} more steps, Fréchet {facts[which]['frechet']:.1f}")


def table(report: Any) -> str:
    """A read report (:class:`ganexport.measurement.Report`) in Markdown, one line a recipe."""
    lines = [
        "| recipe | usual loop, ms a step | tuned, ms a step | × | chosen | Fréchet distance, usual and tuned |",
        "|---|---:|---:|---:|---|---|",
    ]
    rows = {row.candidate["name"]: row for row in report.measurements}
    for name in dict.fromkeys(row.candidate["recipe"] for row in report.measurements):
        usual, tuned = (rows[f"{name}: {way}"] for way in WAYS)
        if not (usual.series and tuned.series):
            lines.append(f"| {name} | – | – | – | {tuned.unavailable} | – |")
            continue
        milliseconds = [f"{median(list(row.series[0].samples)) / 1e6:.1f}" for row in (usual, tuned)]
        value, low, high = tuned.facts["speedup"]
        chosen = next(row["name"] for row in tuned.facts["tuning"] if row["chosen"])
        distances = [f"{row.facts['frechet']:.1f}" for row in (usual, tuned) if "frechet" in row.facts]
        cells = [name, *milliseconds, f"{value:.2f} [{low:.2f}, {high:.2f}]", chosen, " and ".join(distances) or "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _last_line(text: str, code: int) -> str:
    said = [line for line in text.splitlines() if line.strip()]
    return said[-1][:300] if said else f"exit code {code}"


def _tune(recipe: str, steps: int) -> dict[str, Any]:
    """Ask the tuner, as ``ganexport train RECIPE --tune-only --json`` does."""
    command = [sys.executable, "-m", "ganexport.cli", "train", recipe, "--tune-only", "--json"]
    command += ["--set", f"training.steps={steps}"] if steps else []
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(_last_line(done.stderr, done.returncode))
    found = json.loads(done.stdout)
    chosen = next(row for row in found["tuning"] if row["chosen"])
    training = found["recipe"]["training"]
    return {
        "settings": {key: chosen["settings"][key] for key in KEYS},
        "rows": found["tuning"],
        "batch_size": training["batch_size"],
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--rounds", type=int, default=4, help="turns of each of the two")
    parser.add_argument("--seconds", type=float, default=1.5, help="of the usual loop in a round")
    parser.add_argument("--frechet", default="dcgan-mnist", help="recipes trained to their end both ways")
    parser.add_argument(
        "--steps-left",
        type=int,
        default=60,
        help="what the tuner weighs compile time against; so few that it does not try to compile; 0: the recipe's",
    )
    parser.add_argument("--minutes", type=float, default=14, help="after which nothing new is started")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
