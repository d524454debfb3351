"""The benchmark goes through its motions without a GPU, says what it couldn't run, and renders its own report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmarks.gradient_penalty as benchmark

ROOT = Path(__file__).parents[2]


def test_dry_run_measures_what_a_cpu_can_and_names_the_rest(tmp_path):
    output = tmp_path / "kernel.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gradient_penalty", "--cpu", "--output", str(output), "--deadline", "200"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=300,
    )
    rows = json.loads(output.read_text())["measurements"]
    assert len(rows) == len(benchmark.CPU_SHAPES) * len(benchmark.CANDIDATES) + len(benchmark.STEPS)
    for row in rows:
        if "fused" in row["candidate"]["name"]:
            assert row["unavailable"].startswith("not available: ")
        elif "compile" not in row["candidate"]["name"]:
            assert min(row["series"][0]["samples"]) > 0
        if row.get("parity"):
            assert row["parity"]["gradient_relative_l2"] < 1e-6


def test_the_table_is_computed_from_the_samples():
    def row(name: str, samples: list[int]) -> dict:
        return {
            "candidate": {"name": name},
            "conditions": {"sizes": {"shape": [64, 3, 64, 64]}, "dtype": "fp32"},
            "series": [{"name": "compute", "samples": samples}],
            "facts": {"gradient_bytes": 4_000_000},
        }

    names = {"copy": 1_800, "fused": 2_000, "fused through autograd": 2_500, "eager": 10_000}
    report = {"measurements": [row(name, [time, time, 10 * time]) for name, time in names.items()]}
    report["measurements"].append(row("compile max-autotune", [6_000]) | {"series": [], "unavailable": "not run"})
    table = benchmark.render(report).splitlines()
    assert table[2] == "| 64×3×64×64 | fp32 | 4.0 | 2.00 | 4000 | 90% | 2.50 | 10.00 | 5.00 | – | – |"


def test_the_docs_show_the_committed_results_or_say_that_there_are_none():
    docs = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    reports = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "benchmarks" / "results").glob("*/kernel.json"))
        if not path.parent.name.endswith("-dry-run")
    ]
    for report in reports:
        assert benchmark.render(report) in docs, "run: python -m benchmarks.gradient_penalty --render FILE"
    assert ("No GPU was to be had" in docs) == (not reports)
