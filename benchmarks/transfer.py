"""Does transfer help? From digits 0-4 to 5-9 with 500 images, against training from scratch, at equal steps.

    python -m benchmarks.transfer --data mnist/ [--seeds 0,1,2] [--steps 300] [--source-steps 938] [--precision bf16]

One run learns the digits 0 to 4. Then, for each seed, three runs see the same 500 images of the digits 5 to 9 for the
same steps: from scratch, from that run (--init-from), and from it with the discriminator's first stage frozen
(--freeze-d 1). All are compared with every training image of the digits 5 to 9 by the digit classifier's features.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._rows import say, write_runs
from benchmarks.quality import ROOT, evaluate, train
from ganexport.environment import describe, device_key

WAYS: dict[str, tuple[str, ...]] = {
    "from scratch": (),
    "--init-from": ("--init-from", "SOURCE"),
    "--init-from, --freeze-d 1": ("--init-from", "SOURCE", "--freeze-d", "1"),
}


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate, write the JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.transfer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="mnist-10k")
    parser.add_argument("--recipe", default="dcgan-mnist")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--source-steps", type=int, default=938)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--precision", default="fp32", help="of all trainings")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, one thread each")
    parser.add_argument("-n", type=int, default=5_000, help="generated images a run")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    output = options.output or ROOT / "benchmarks" / "results" / device_key(describe()) / "transfer.json"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _split(folder, options.data, options.images)
        source = folder / "source"
        _run(source, folder / "0-4.npz", options.source_steps, 0, options)

        def one(seed: int, way: str) -> dict[str, Any]:
            run = folder / f"run-{seed}-{list(WAYS).index(way)}"
            given = tuple(str(source) if word == "SOURCE" else word for word in WAYS[way])
            seconds = _run(run, folder / f"few-{seed}.npz", options.steps, seed, options, given)
            found = evaluate(run, folder / "5-9.npz", options.n)
            kept = {key: found[key] for key in ("frechet", "coverage", "class_shares")}
            about = {"way": way, "recipe": options.recipe, "seed": seed, "sets": list(WAYS[way]), "seconds": seconds}
            return {**about, **kept, "copies": found["memorisation"]["copies"]}

        with ThreadPoolExecutor(options.jobs) as pool:
            for job in as_completed([pool.submit(one, seed, way) for seed in seeds for way in WAYS]):
                rows.append(job.result())
                say(f"{rows[-1]['way']}, seed {rows[-1]['seed']}: Fréchet distance {rows[-1]['frechet']:.1f}")
                _write(output, rows, options)
    for way in WAYS:
        print(f"{way}: median {np.median([row['frechet'] for row in rows if row['way'] == way]):.1f}")
    return 0


def _split(folder: Path, data: str, count: int) -> None:
    """0-4.npz, 5-9.npz and, a seed each, few images of the latter."""
    from ganexport.data import open_images

    images = open_images(data)
    labels = images.labels
    assert labels is not None
    pixels = images.array()
    low, high = labels < 5, labels >= 5
    np.savez(folder / "0-4.npz", images=pixels[low], labels=labels[low])
    np.savez(folder / "5-9.npz", images=pixels[high], labels=labels[high] - 5)
    where = np.flatnonzero(high)
    for seed in range(10):
        chosen = np.random.default_rng(seed).choice(where, count, replace=False)
        np.savez(folder / f"few-{seed}.npz", images=pixels[chosen], labels=labels[chosen] - 5)


def _run(
    run: Path, data: Path, steps: int, seed: int, options: argparse.Namespace, more: tuple[str, ...] = ()
) -> float:
    """Train; the seconds it took."""
    sets = [f"training.steps={steps}", f"training.seed={seed}", f"training.precision={options.precision}"]
    sets += ["training.threads=1", "logging.tensorboard=false"]
    return train(run, options.recipe, data, sets, more)


def _write(output: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    write_runs(
        output,
        f"Transfer from digits 0-4 to 5-9 with {options.images} images, {options.recipe}",
        f"python -m benchmarks.transfer --data mnist/ --recipe {options.recipe} --seeds {options.seeds} "
        f"--steps {options.steps} --source-steps {options.source_steps} --precision {options.precision}",
        sorted(({**row, "steps": options.steps} for row in rows), key=lambda row: (row["seed"], row["way"])),
        (f"Fréchet distance of {options.n:,} images", f"{options.source_steps:,} steps on the digits 0 to 4 before"),
    )


if __name__ == "__main__":
    sys.exit(main())
