"""``make gpu`` through its motions without a GPU: every stage's file is there, complete, and readable as a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks._rows import NOT_RUN, Results
from ganexport.measurement import report_from_json

ROOT = Path(__file__).resolve().parents[2]


def gpu(*arguments, **variables):
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def read(path):
    return report_from_json(path.read_bytes(), path.name)


def test_a_dry_run_goes_through_the_stages(tmp_path):
    done = gpu("--cpu", "--out", tmp_path, "--stage", "environment,build,training,backends")
    assert done.returncode == 0, done.stderr
    summary = {row.candidate["name"]: row for row in read(tmp_path / "summary.json").measurements}
    assert list(summary) == ["environment", "build", "training", "backends"]
    assert summary["training"].facts["status"] == "ok"

    probes = {row.candidate["name"]: row for row in read(tmp_path / "environment.json").measurements}
    assert probes["torch CUDA"].facts["version"]
    assert probes["ONNX Runtime CUDA"].facts["version"] or probes["ONNX Runtime CUDA"].unavailable
    assert isinstance(probes["TensorRT libraries"].facts["found"], list)

    training = read(tmp_path / "training.json").measurements
    measured = [row for row in training if row.series]
    assert [row.candidate["compile"] for row in measured] == ["off", "aot_eager"]
    assert all(row.facts["finite"] for row in measured)
    assert {s.name for s in measured[0].series} == {"end_to_end", "discriminator", "generator", "pipelined"}
    assert [row.unavailable for row in training if not row.series] == [
        "not available: tf32 is a mode of NVIDIA GPUs, not of cpu: use fp32 or bf16"
    ]

    backends = read(tmp_path / "backends.json").measurements
    measured = [row for row in backends if row.series]
    assert {row.candidate["backend"] for row in measured} == {"eager", "onnxruntime"}
    assert {row.parity["verdict"] for row in measured} == {"reference", "pass"}
    assert len(measured) == len(backends) == 4


def test_what_the_deadline_cuts_off_is_listed_as_not_run(tmp_path):
    start = time.monotonic()
    done = gpu("--cpu", "--out", tmp_path, "--stage", "training,backends", GANEXPORT_GPU_DEADLINE="9")
    assert time.monotonic() - start < 40
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "training.json").measurements
    assert NOT_RUN in {row.unavailable for row in rows}
    training, backends = read(tmp_path / "summary.json").measurements
    assert training.unavailable.startswith("cut off: ")
    assert backends.unavailable.startswith(("cut off: ", NOT_RUN))


def test_without_a_gpu_it_says_so(tmp_path):
    if report_has_gpu():
        pytest.skip("this machine has a GPU")
    done = gpu("--out", tmp_path)
    assert done.returncode == 2
    assert "no NVIDIA GPU here" in done.stderr


def report_has_gpu() -> bool:
    from ganexport.environment import gpus

    return bool(gpus())


def test_an_unknown_stage_is_refused(tmp_path):
    done = gpu("--cpu", "--out", tmp_path, "--stage", "kernels")
    assert done.returncode == 2
    assert "unknown stage kernels; known: environment, build" in done.stderr


def test_a_missing_package_is_a_row_and_not_a_crash(tmp_path):
    """A machine without msgspec, as bare GPU machines are: the driver and its stages go on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *a):\n"
        "        if name.partition('.')[0] in ('msgspec', 'openvino'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = gpu("--cpu", "--out", tmp_path / "out", "--stage", "training,backends", PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    for name in ("training", "backends"):
        rows = json.loads((tmp_path / "out" / f"{name}.json").read_text())["measurements"]
        assert all("msgspec" in row["unavailable"] for row in rows)


def test_rows_are_on_disk_when_measured_and_never_half_written(tmp_path):
    path = tmp_path / "r.json"
    results = Results(path, "t", [({"name": n}, {"scenario": "x"}) for n in "abc"])
    assert [row.unavailable for row in read(path).measurements] == [NOT_RUN] * 3
    results.add(1, {"end_to_end": [1, 2, 3]}, items=4, facts={"x": 1})
    rows = read(path).measurements
    assert rows[1].series[0].samples == (1, 2, 3)
    assert rows[1].series[0].items == rows[1].conditions["items"] == 4
    assert [row.unavailable for row in rows] == [NOT_RUN, "", NOT_RUN]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
