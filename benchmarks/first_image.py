"""From process start to the first image: what a deployer's service waits for when it starts.

    python -m benchmarks.first_image ARTIFACT [--runs 20] [--backend onnxruntime] [--output first-image.json]

A fresh interpreter each time, in the environment as it is; the files are in the page cache, and Python's compiled
ones should be there too, as an installation leaves them (``python -m compileall ganexport`` in a source tree). The
clock starts before the process does and stops when its first picture is there; how long interpreter and import,
loading and the first call took is read inside. Exit code 1 when the median is above ``--limit``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks._rows import Results, median, say

#: What runs; the moments are those of the machine's monotonic clock, the same one in every process.
PROGRAM = """
import time
import sys
import ganexport
imported = time.monotonic_ns()
generator = ganexport.load(sys.argv[1], backend=sys.argv[2] or None)
loaded = time.monotonic_ns()
picture = generator.generate(1, seed=7)
made = time.monotonic_ns()
import json
assert picture.dtype == "uint8" and "torch" not in sys.modules
print(json.dumps({"moments": [imported, loaded, made], "runtime": generator.runtime}))
"""
PARTS = ("interpreter and import", "load", "first image")


def main(arguments: list[str] | None = None) -> int:
    """Measure, keep the samples, print the medians."""
    parser = argparse.ArgumentParser(prog="benchmarks.first_image", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--backend", default="", help="by default what load takes")
    parser.add_argument("--limit", type=float, default=0.5, help="seconds that are promised")
    parser.add_argument("--output", type=Path, default=Path("first-image.json"))
    options = parser.parse_args(arguments)
    planned = [({"name": options.backend or "default"}, {"scenario": "first-image", "artifact": options.artifact.name})]
    results = Results(options.output, "Process start to first image", planned)
    series: dict[str, list[int]] = {"start to first image": [], **{part: [] for part in PARTS}}
    for run in range(-1, options.runs):  # the first one brings the files into the page cache
        begun = time.monotonic_ns()
        command = [sys.executable, "-c", PROGRAM, str(options.artifact), options.backend]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            say(f"benchmarks.first_image: {done.stderr.strip().splitlines()[-1]}")
            return 2
        told = json.loads(done.stdout)
        moments = [begun, *told["moments"]]
        taken = [moments[-1] - begun, *(after - before for before, after in itertools.pairwise(moments))]
        if run < 0:
            results.note(f"runs on {told['runtime']}")
            continue
        for samples, value in zip(series.values(), taken, strict=True):
            samples.append(value)
    whole = median(series["start to first image"]) / 1e9
    results.add(0, series, facts={"median_seconds": whole, "limit_seconds": options.limit})
    parts = ", ".join(f"{part} {median(series[part]) / 1e6:.0f} ms" for part in PARTS)
    slowest = max(series["start to first image"]) / 1e9
    say(f"start to first image: median {whole:.3f} s, slowest of {options.runs} {slowest:.3f} s ({parts})")
    return int(whole > options.limit)


if __name__ == "__main__":
    sys.exit(main())
