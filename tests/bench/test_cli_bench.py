"""The command on a real artifact under real ONNX Runtime."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ganexport.bench.api import benchmark
from ganexport.bench.candidates import find_candidates, parse_cores
from ganexport.cli.main import run as run_here
from ganexport.errors import Terminated, UsageError, stop_name
from ganexport.measurement import report_from_json
from ganexport.spec import Dim
from tests.bench import onnx_models

QUICK = ("--seconds", "0.1", "--rounds", "2", "--warm-up", "0.3")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return onnx_models.artifact(tmp_path_factory.mktemp("bench") / "digits").path


def run(*arguments, **options):
    command = [sys.executable, "-m", "ganexport", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def report(*rows, environment=()):
    """A report as a hand may have changed it."""
    whole = [{"candidate": {"name": "a"}, "conditions": {}} | row for row in rows]
    return json.dumps(
        {"schema_version": 1, "title": "", "environment": dict(environment), "measurements": whole}, allow_nan=False
    )


@pytest.fixture(scope="module")
def measured(artifact, tmp_path_factory):
    """One run of the command with every output."""
    folder = tmp_path_factory.mktemp("out")
    outputs = ("-o", folder / "b.json", "--html", folder / "b.html", "--markdown", folder / "b.md")
    done = run(artifact, "--batch", "1,4", "--backends", "onnxruntime,openvino,tensorrt", *QUICK, *outputs)
    return done, folder


def test_it_measures_prints_and_writes(measured):
    done, folder = measured
    assert done.returncode == 0, done.stderr
    assert "onnxruntime fp32" in done.stdout
    assert "not run: tensorrt" in done.stdout
    report = report_from_json((folder / "b.json").read_bytes())
    cells = {(r.candidate["backend"], r.conditions["sizes"]["batch"]) for r in report.measurements if r.series}
    assert cells == {("onnxruntime", 1), ("onnxruntime", 4), ("openvino", 1), ("openvino", 4)}
    row = next(r for r in report.measurements if r.candidate["backend"] == "openvino")
    assert row.parity["verdict"] == "pass"
    assert row.facts["roofline"]["flops_per_item"] == 2 * 16 * 128 + 2 * 128 * 48
    assert 0 < row.facts["roofline"]["share"] < 2
    assert str(folder) not in json.dumps(report.environment)
    assert "<svg" in (folder / "b.html").read_text()
    assert "| onnxruntime fp32 |" in (folder / "b.md").read_text()


def test_torch_stays_out_of_a_torch_free_benchmark(artifact):
    """A blocked torch: neither the command nor a worker may need it."""
    code = (
        "import sys, runpy\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *a):\n"
        "        if name.partition('.')[0] == 'torch': raise ImportError('torch is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    script = artifact.parent / "blocked"
    script.mkdir(exist_ok=True)
    (script / "sitecustomize.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script), os.environ.get("PYTHONPATH", "")])}
    done = run(artifact, "--backends", "onnxruntime", "--batch", "1", *QUICK, "--json", env=environment)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["measurements"]
    assert row["series"]


def test_tf32_is_judged_as_the_half_precision_that_it_multiplies_in():
    done = run(
        "benchmarks._models:tiny",
        "--backends",
        "eager",
        "--precision",
        "fp32,tf32",
        "--batch",
        "2",
        "--scenario",
        "offline",
        *QUICK,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["measurements"]
    assert [(row["candidate"]["precision"], row["parity"]["verdict"]) for row in rows] == [
        ("fp32", "reference"),
        ("tf32", "pass"),
    ]


def test_compare_finds_no_difference_with_itself_and_a_real_one(measured, tmp_path):
    _, folder = measured
    same = run("compare", folder / "b.json", folder / "b.json", "--fail-if-slower", "5%")
    assert same.returncode == 0, same.stderr
    slow = json.loads((folder / "b.json").read_text())
    for row in slow["measurements"]:
        for series in row.get("series", ()):
            series["samples"] = [value * 3 for value in series["samples"]]
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    found = run("compare", folder / "b.json", tmp_path / "slow.json", "--fail-if-slower", "5%")
    assert found.returncode == 1
    assert "slower by more than 5%" in found.stderr
    assert run("compare", folder / "b.json", tmp_path / "slow.json").returncode == 0
    machine = json.loads(run("compare", folder / "b.json", tmp_path / "slow.json", "--json").stdout)
    assert {d["verdict"] for d in machine["differences"]} <= {"slower", "not compared", "undecided"}


def test_compare_fails_on_what_is_gone_or_wrong(measured, tmp_path):
    _, folder = measured
    content = json.loads((folder / "b.json").read_text())
    gone, wrong = content["measurements"][0], content["measurements"][1]
    wrong["parity"] = {"verdict": "fail", "psnr": 12.0}
    content["measurements"].remove(gone)
    (tmp_path / "new.json").write_text(json.dumps(content))
    arguments = ("compare", folder / "b.json", tmp_path / "new.json")
    assert run(*arguments).returncode == 0
    found = run(*arguments, "--fail-if-slower", "50%")
    assert found.returncode == 1
    assert "onnxruntime fp32 (single-stream, batch 1): not measured any more" in found.stderr
    assert f"{wrong['candidate']['name']} (single-stream, batch 1): outputs outside the tolerance now" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_merge_writes_one_report(measured, tmp_path):
    _, folder = measured
    done = run("merge", folder / "b.json", folder / "b.json", "-o", tmp_path / "m.json", "--html", tmp_path / "m.html")
    assert done.returncode == 0, done.stderr
    merged = report_from_json((tmp_path / "m.json").read_bytes())
    assert list(merged.environment["machines"])
    assert all("machine" in row.conditions for row in merged.measurements)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backends", "onnxrutime"), "Did you mean 'onnxruntime'"),
        (("--scenario", "offlin"), "Did you mean 'offline'"),
        (("--batch", "1,x"), "write numbers like 1,8,64"),
        (("--batch", "0"), "must be positive"),
        (("--device", "gpu"), "write cpu, cuda or cuda:1"),
        (("--seconds", "0"), "must be positive"),
        (("--size", "height"), "write NAME=N"),
        (("--size", "height=8"), "--size height: the generator has no such dimension; it has none"),
        (("--size", "batch=8"), "--size batch: use --batch"),
        (("--scenario", ","), "name at least one scenario: single-stream"),
        (("--precision", "fp8"), "unknown precision 'fp8'. Did you mean "),
        (("--batch", "1000"), "dimension 'batch' is 1000, allowed are 1 to 32"),
        (("--backends", "tensorrt"), "nothing could be measured"),
        (("--seconds", "nan"), "seconds must be positive, got nan"),
        (("--slo-ms", "inf"), "slo-ms must be positive, got inf"),
        (("--at-most", "-1"), "at-most must not be negative"),
        (("--price-per-hour", "0"), "--price-per-hour must be positive, got 0"),
        (("--baseline", "onnxruntime"), "Did you mean 'onnxruntime fp32'? Known: onnxruntime fp32"),
        (("--backends", "openvino", "--device", "cuda"), "openvino: runs on cpu alone, not on cuda"),
        (("-o", "/proc/nowhere/b.json"), "/proc/nowhere/b.json: "),
        (("--html", "/dev/null"), "/dev/null: is no regular file"),
        (("-o", "x" * 250), "File name too long"),
        (("-o", "b.out", "--markdown", "./b.out"), "must name different files"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(artifact, arguments, words, capfd):
    code = run_here(["bench", str(artifact), "--backends", "onnxruntime", *QUICK, *arguments])
    out, err = capfd.readouterr()
    if arguments[0] == "--batch" and arguments[1] == "1000":  # single-stream still ran: a row, not the end
        assert code == 0
        assert words in " ".join(out.split())
        return
    assert code == 2
    assert words in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", "no.json", "no.json"), "No such file"),
        (("no.onnx",), "no such file"),
        (("merge", "no.json"), "No such file"),
        ((), "Missing argument"),
    ],
)
def test_missing_files_are_said(arguments, words, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "missing required field"),
        ('{"schema_version": 1', "truncated"),
        ("\xff\xfe", "malformed"),
        ('{"schema_version": 2, "title": "", "environment": {}, "measurements": []}', "newer ganexport (schema 2)"),
        (report(environment={"peaks": {"cpu": 3}}), "Expected `object`, got `int` - at `$.peaks"),
        (
            report({"conditions": {"sizes": None}}),
            "row 1: not of a report of ganexport bench: Expected `object`",
        ),
        (report({"series": [{"name": "end_to_end", "samples": [5, -5]}]}), "Expected `int` >= 1"),
        (
            report({"parity": {"psnr": "high"}}),
            "bench: Expected `float | null`, got `str`",
        ),
        (report({"conditions": {"scenario": "server"}, "series": [{"name": "latency", "samples": [1]}]}), "its rate"),
    ],
)
def test_a_report_that_is_none(tmp_path, capfd, text, words):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="latin-1")
    for command in ("compare", "merge"):
        assert run_here(["bench", command, str(path), str(path)]) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"error: {path}")
        assert words in error
        assert len(error.splitlines()) == 1


def test_a_device_that_was_asked_for_is_the_only_one(artifact):
    candidates = find_candidates([str(artifact)], devices=("cuda",))
    assert [c.name for c in candidates] == ["onnxruntime fp32 cuda"]
    candidates = find_candidates([str(artifact)], devices=("cpu",))
    assert {c.about["device"] for c in candidates} == {"cpu"}


def test_a_source_is_no_output(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(onnx_models.generator().SerializeToString())
    done = run(path, *QUICK, "-o", path)
    assert done.returncode == 2
    assert "is what is measured; choose another output" in done.stderr
    assert path.read_bytes() == onnx_models.generator().SerializeToString()


def test_a_disk_that_is_full_afterwards_loses_nothing(artifact, measured, tmp_path):
    """On a real file system of 4 KiB, in a mount namespace of its own."""
    small, refuge, (_, folder) = tmp_path / "small", tmp_path / "refuge", measured
    small.mkdir()
    refuge.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", small], check=False).returncode:
        pytest.skip("this kernel allows no mounts in user namespaces")

    def run_beside(temporary, *arguments):
        command = shlex.join([sys.executable, "-m", "ganexport", "bench", *map(str, arguments)])
        script = f"mount -t tmpfs -o size=4k none {small} && TMPDIR={temporary} {command}"
        return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)

    done = run_beside(refuge, artifact, "--backends", "onnxruntime", "--batch", "1", *QUICK, "-o", small / "b.json")
    (kept,) = refuge.glob("ganexport-bench-*.json")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {small}/b.json: the disk is full; free some space or write elsewhere; "
        f"what was measured is kept in {kept}"
    ]
    assert report_from_json(kept.read_bytes()).measurements[0].series
    assert "onnxruntime fp32" in done.stdout
    done = run_beside(small, "merge", folder / "b.json", "--html", small / "m.html")
    assert done.returncode == 2
    assert done.stderr.endswith("write elsewhere; what was measured is printed and nowhere else\n")
    assert "onnxruntime fp32" in done.stdout


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_writes_what_was_measured(artifact, tmp_path, number, code, name):
    output = tmp_path / "b.json"
    command = [sys.executable, "-m", "ganexport", "bench", str(artifact), "--backends", "onnxruntime"]
    batches = ",".join(map(str, range(1, 33)))
    command += ["--batch", batches, "--seconds", "1", "--rounds", "4", "--warm-up", "1", "-o", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(8)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"stopped by {name}" in errors
    report = report_from_json(output.read_bytes())
    assert f"{len(report.measurements)} rows were kept" in errors
    assert 0 < len(report.measurements) < 32
    assert report.interrupted_by == name
    assert workers
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "a worker was left behind"


def test_a_signal_while_candidates_open_is_a_report_without_rows(artifact):
    def interrupt(text, *_):
        if text.startswith("open"):
            os.kill(os.getpid(), signal.SIGINT)

    report = benchmark(artifact, backends=("onnxruntime",), progress=interrupt)
    assert report.interrupted_by == "Ctrl-C"
    assert report.measurements == ()


def test_a_signal_before_the_first_row_spares_an_earlier_report(artifact, tmp_path):
    output = tmp_path / "b.json"
    output.write_text("an earlier report")
    command = [
        sys.executable,
        "-m",
        "ganexport",
        "bench",
        str(artifact),
        "--backends",
        "onnxruntime",
        "-o",
        str(output),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text():
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "error: stopped by SIGTERM; no rows were measured yet\n"
    assert output.read_text() == "an earlier report"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
def test_a_signal_while_the_peaks_are_measured_loses_nothing(artifact, monkeypatch, stop):
    def interrupted(*_, **_limits):
        raise stop

    monkeypatch.setattr("ganexport.bench.api._measure_peaks", interrupted)
    report = benchmark(artifact, backends=("onnxruntime",), batches=(1,), seconds=0.1, rounds=2, warm_up=0.3)
    assert report.measurements[0].series
    assert report.interrupted_by == stop_name(stop())


def test_a_lone_onnx_file_is_measured_and_a_foreign_generator_shows(tmp_path):
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    first.write_bytes(onnx_models.generator().SerializeToString())
    second.write_bytes(onnx_models.generator(scale=0.5).SerializeToString())
    report = benchmark(
        first, second, backends=("onnxruntime",), batches=(1,), seconds=0.1, rounds=2, warm_up=0.3, peaks=False
    )
    a, b = report.measurements
    assert a.parity == {"verdict": "reference"}
    assert b.parity["verdict"] == "fail"
    assert a.candidate["source"] == "a.onnx"
    assert any("outside the tolerance" in note for note in report.notes)


def test_all_scenarios_in_one_run(artifact):
    from ganexport.measure.plan import ServerPlan

    report = benchmark(
        artifact,
        backends=("onnxruntime",),
        batches=(4,),
        scenarios=("single-stream", "multi-stream", "offline", "server", "cold-start"),
        seconds=0.1,
        rounds=2,
        warm_up=0.3,
        cold_starts=2,
        server=ServerPlan(slo_ms=50, max_batch=4, trial_seconds=0.1, min_requests=100, steps=2),
        peaks=False,
    )
    found = {row.conditions["scenario"]: row for row in report.measurements}
    assert set(found) == {"single-stream", "multi-stream", "offline", "server", "cold-start"}
    assert not [row.unavailable for row in report.measurements if row.unavailable]
    assert found["multi-stream"].conditions["sizes"] == {"batch": 8}
    assert found["server"].facts["rate"] > 100


def test_a_cold_start_takes_the_smallest_batch_there_is(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(onnx_models.generator().SerializeToString())
    options = {"dims": [Dim("batch", 4, 8, 16)], "scenarios": ("cold-start",), "cold_starts": 1}
    (row,) = benchmark(path, backends=("onnxruntime",), peaks=False, **options).measurements
    assert row.series, row.unavailable
    assert row.conditions["sizes"] == {"batch": 4}


def test_threads_are_swept(artifact):
    candidates = find_candidates([str(artifact)], backends=("onnxruntime",), threads=(1, 2))
    assert [c.name for c in candidates] == ["onnxruntime fp32 1 thread", "onnxruntime fp32 2 threads"]
    assert [c.arguments["settings"]["threads"] for c in candidates] == [1, 2]
    assert candidates[0].variables == {"OMP_NUM_THREADS": "1"}


def test_cores_are_swept(artifact):
    core = max(os.sched_getaffinity(0))
    chosen = [parse_cores(str(core)), tuple(sorted(os.sched_getaffinity(0)))]
    candidates = find_candidates([str(artifact)], backends=("onnxruntime",), cores=chosen)
    assert [c.cores for c in candidates] == chosen
    assert len({c.name for c in candidates}) == 2
    assert candidates[0].about["cores"] == str(core)


@pytest.mark.parametrize(
    ("text", "words"),
    [("x", "write numbers and ranges"), ("99999", "may use"), ("3-1", "may use"), ("", "write numbers")],
)
def test_cores_that_are_none(text, words):
    with pytest.raises(UsageError, match=words):
        parse_cores(text)


def test_help_names_the_sub_commands():
    text = run("--help").stdout
    assert "Usage: ganexport bench [OPTIONS] SOURCE..." in text
    assert "ganexport bench compare" in text
