"""Quality at equal steps: dcgan-mnist against the survey's loop, as it stands and with its rate tuned.

    python -m benchmarks.quality --data mnist/ [--seeds 0,1,2] [--steps 938] [--jobs 2]

All three train the same networks with the same binary cross-entropy on the same images for the same steps of 64
images. The tuned survey gets the best of several rates, chosen on the first seed. Every run's Fréchet distance (10,000
images, the digit classifier's features) is kept; the ratio is that of the medians over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from benchmarks._rows import say, write_runs
from ganexport.environment import describe, device_key

ROOT = Path(__file__).resolve().parent.parent
RATES = (1.5e-3, 2.5e-3)


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate, write the JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="mnist-10k")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=938)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at once, one thread each")
    parser.add_argument("-n", type=int, default=10_000, help="generated images a run")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    output = options.output or ROOT / "benchmarks" / "results" / device_key(describe()) / "quality.json"
    rows: list[dict[str, Any]] = []
    writing = Lock()

    def one(way: str, recipe: str, seed: int, sets: tuple[str, ...] = ()) -> dict[str, Any]:
        row = {"way": way, "recipe": recipe, "seed": seed, "sets": list(sets), **_train(recipe, seed, sets, options)}
        say(f"{way}, seed {seed}: Fréchet distance {row['frechet']:.1f}, smallest class {min(row['class_shares']):.1%}")
        with writing:
            rows.append(row)
            _write(output, rows, options, seeds)
        return row

    def tuned(rate: float) -> tuple[str, ...]:
        return tuple(f"optimizer.{network}.rate={rate}" for network in ("generator", "discriminator"))

    with ThreadPoolExecutor(options.jobs) as pool:
        tries = [pool.submit(one, f"survey at {r}", "dcgan-mnist-survey", seeds[0], tuned(r)) for r in RATES]
        plain = [pool.submit(one, "survey", "dcgan-mnist-survey", seed) for seed in seeds]
        ours = [pool.submit(one, "ours", "dcgan-mnist", seed) for seed in seeds]
        best = min((job.result() for job in tries), key=lambda row: row["frechet"])
        more = [pool.submit(one, best["way"], best["recipe"], s, tuple(best["sets"])) for s in seeds[1:]]
        for job in (*plain, *ours, *more):
            job.result()
    print(_table(rows))
    return 0


def _train(recipe: str, seed: int, sets: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    settings = [f"training.steps={options.steps}", f"training.seed={seed}", "training.threads=1", *sets]
    settings += ["logging.tensorboard=false", f"logging.sample_every={options.steps}"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        seconds = train(run, recipe, options.data, settings)
        found = evaluate(run, options.data, options.n)
    keys = ("frechet", "frechet_interval", "coverage", "precision", "class_shares", "confidence", "generated", "real")
    return {
        **{key: found[key] for key in keys},
        "copies": found["memorisation"]["copies"],
        "seconds": seconds,
    }


def train(run: Path, recipe: str, data: str | Path, settings: Sequence[str], more: Sequence[str] = ()) -> float:
    """``ganexport train`` on one thread; the seconds it took."""
    sets = [word for setting in settings for word in ("--set", setting)]
    return float(_call("train", recipe, "--data", str(data), "--out", str(run), *sets, *more)["seconds"])


def evaluate(run: Path, data: str | Path, count: int) -> dict[str, Any]:
    """``ganexport evaluate`` on one thread."""
    return _call("evaluate", str(run), "--data", str(data), "-n", str(count))


def _call(*words: str) -> dict[str, Any]:
    command, environment = (
        [sys.executable, "-m", "ganexport.cli", *words, "--json"],
        {**os.environ, "OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        sys.exit(f"ganexport {' '.join(words[:2])}: {said[-1] if said else 'failed'}")
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def _medians(rows: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    ways: dict[str, list[float]] = {}
    for row in rows:
        ways.setdefault(row["way"], []).append(row["frechet"])
    return {way: (float(np.median(values)), len(values)) for way, values in ways.items()}


def _table(rows: list[dict[str, Any]]) -> str:
    medians = _medians(rows)
    base = medians.get("survey", (float("nan"), 0))[0]
    lines = ["| way | Fréchet distance, median | seeds | against the survey |", "|---|---|---|---|"]
    lines += [f"| {way} | {value:.1f} | {count} | {value / base:.3f}x |" for way, (value, count) in medians.items()]
    return "\n".join(lines)


def _write(output: Path, rows: list[dict[str, Any]], options: argparse.Namespace, seeds: list[int]) -> None:
    write_runs(
        output,
        "Quality at equal steps: dcgan-mnist against the survey's loop",
        f"python -m benchmarks.quality --data mnist/ --seeds {','.join(map(str, seeds))} --steps {options.steps}",
        sorted(({**row, "steps": options.steps} for row in rows), key=lambda row: (row["way"], row["seed"])),
        (f"Fréchet distance of {options.n:,} images", f"{options.jobs} trainings at once, one thread each"),
    )


if __name__ == "__main__":
    sys.exit(main())
