"""Training in wall-clock: the eager fp32 loop against what ``--tune`` picks on this machine.

    python -m benchmarks.training [--recipes dcgan-mnist,wgan-gp-mnist] [--steps 60] [--rounds 5]

The tuner is asked once a recipe. Then both settings train the same steps from the same seed, a process
each, in turn, round after round; a sample is the loop's time divided by its steps (data, both
optimizers, averaging and logging included; start-up and checkpoints not).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._rows import Results, say
from ganexport import stats
from ganexport.environment import describe, device_key

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("precision", "compile", "memory_format", "threads")
EAGER = {"precision": "fp32", "compile": "off", "memory_format": "contiguous"}


def main(arguments: list[str] | None = None) -> int:
    """Measure every recipe."""
    options = _options(arguments)
    names = options.recipes.split(",")
    output = options.output or ROOT / "benchmarks" / "results" / device_key(describe()) / "training-tuned.json"
    planned = [
        ({"name": f"{name}: {way}", "recipe": name}, {"scenario": "train-step", "sizes": {}, "recipe": name})
        for name in names
        for way in ("eager fp32", "tuned")
    ]
    results = Results(output, "Training: eager fp32 against --tune", planned)
    for number, name in enumerate(names):
        tuned = _ask("--tune-one", name, options)
        if "error" in tuned:
            for index in (2 * number, 2 * number + 1):
                results.add(index, unavailable=tuned["error"])
            continue
        say(f"{name}: tuned: {tuned['settings']}")
        _compare(name, tuned, results, 2 * number, options)
    return 0


def _compare(name: str, tuned: dict[str, Any], results: Results, first: int, options: argparse.Namespace) -> None:
    ways = [{**EAGER, "threads": tuned["base_threads"]}, tuned["settings"]]
    samples: list[list[int]] = [[], []]
    losses: list[Any] = [None, None]
    for index in range(options.rounds):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            found = _ask("--train-one", name, options, ways[which])
            if "error" in found:
                results.add(first + which, unavailable=found["error"])
                return
            samples[which].append(found["nanoseconds_per_step"])
            losses[which] = found["metrics"]
        say(f"  round {index + 1}: {samples[0][-1] / 1e6:.1f} ms eager fp32, {samples[1][-1] / 1e6:.1f} ms tuned")
    ratio = stats.ratio_interval([[s] for s in samples[0]], [[s] for s in samples[1]])
    say(f"{name}: {ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]")
    for which in (0, 1):
        facts = {"settings": ways[which], "steps": options.steps, "last_metrics": losses[which]}
        facts["round_sizes"] = {"end_to_end": [1] * options.rounds}
        if which:
            facts["tuning"] = tuned["rows"]
            facts["speedup"] = [ratio.value, ratio.low, ratio.high]
        results.add(first + which, {"end_to_end": samples[which]}, items=tuned["batch_size"], facts=facts)


def _ask(flag: str, recipe: str, options: argparse.Namespace, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Do it in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.training", flag, recipe, "--steps", str(options.steps)]
    command += ["--settings", json.dumps(settings or {})]
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": said[-1][:300] if said else f"exit code {done.returncode}"}
    found = json.loads(lines[-1])
    assert isinstance(found, dict)
    return found


def _tune_one(recipe: str) -> dict[str, Any]:
    from ganexport.training.api import train

    found = train(recipe, tune_only=True)
    rows = [json.loads(json.dumps(row, default=str)) for row in found.tuning]
    chosen = next(row for row in rows if row["chosen"])
    base = rows[0]["settings"]["threads"]
    batch = found.recipe["training"]["batch_size"]
    settings = {key: chosen["settings"][key] for key in KEYS}
    return {"settings": settings, "base_threads": base, "rows": rows, "batch_size": batch}


def _train_one(recipe: str, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    from ganexport.training.api import train

    sets = [f"training.steps={steps}", f"training.checkpoint_every={steps}"]
    sets += [f"training.{key}={value}" for key, value in settings.items()]
    with tempfile.TemporaryDirectory() as folder:
        found = train(recipe, out=Path(folder) / "run", sets=sets)
    return {"nanoseconds_per_step": int(found.seconds * 1e9 / found.step), "metrics": found.metrics}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", default="dcgan-mnist,wgan-gp-mnist")
    parser.add_argument("--steps", type=int, default=60, help="of one sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--tune-one", help=argparse.SUPPRESS)
    parser.add_argument("--train-one", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, default={}, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    given = _options(None)
    if given.tune_one:
        sys.stdout.write("\n" + json.dumps(_tune_one(given.tune_one)) + "\n")
    elif given.train_one:
        answer = _train_one(given.train_one, given.steps, given.settings)
        sys.stdout.write("\n" + json.dumps(answer, default=str) + "\n")
    else:
        sys.exit(main())
