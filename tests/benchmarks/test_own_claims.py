"""The suites that check the harness itself, and the tables made of their results: on rows whose answer is known."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loadgen, tables, verdicts
from ganexport.measurement import Measurement, Report, Series, report_from_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def rounds(milliseconds, seed, count=8, each=20):
    draw = np.random.Generator(np.random.Philox(seed))
    return tuple(int(1e6 * milliseconds * (1 + abs(draw.normal(0, 0.01)))) for _ in range(count * each)), [each] * count


def row(name, milliseconds, seed, facts=None, **conditions):
    samples, sizes = rounds(milliseconds, seed)
    facts = {"round_sizes": {"end_to_end": sizes}, **(facts or {})}
    items = conditions.get("items", 1)
    return Measurement({"name": name}, conditions, (Series("end_to_end", samples, items),), facts=facts)


def loadgen_report(ours, theirs):
    single = {"scenario": "single-stream", "sizes": {"batch": 1}, "items": 1}
    offline = {"scenario": "offline", "sizes": {"batch": 16}, "items": 16}
    said = ({"50.00 percentile latency (ns)": "2000000"}, {"Samples per second": "800"})
    rows = [
        row(loadgen.OURS, ours, 0, **single),
        row(loadgen.THEIRS, theirs, 1, {"loadgen_summaries": [said[0]] * 8}, **single),
        row(loadgen.OURS, 20.0, 2, **offline),
        row(loadgen.THEIRS, 20.0, 3, {"loadgen_summaries": [said[1]] * 8}, **offline),
    ]
    return Report(1, "t", {"cpu": {"model": "X", "affinity": 2}}, tuple(rows), (), "python -m benchmarks.loadgen")


def test_agreement_with_the_other_harness_is_computed_from_the_samples():
    (_, batch, ours, theirs, ratio), offline = loadgen.agreement(loadgen_report(2.2, 2.0))
    assert (batch, offline[1]) == (1, 16)
    assert ours / theirs == pytest.approx(1.1, rel=0.01)
    assert ratio.low <= 1.1 * 1.01
    assert offline[4].value == pytest.approx(1, rel=0.01)
    text = loadgen.table(loadgen_report(2.2, 2.0))
    assert "2.000 ms at p50" in text
    assert "800 images/s" in text


def test_without_loadgen_it_says_what_to_install():
    if importlib.util.find_spec("mlperf_loadgen"):
        pytest.skip("it is installed")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loadgen"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "benchmarks.loadgen: needs MLCommons LoadGen: pip install mlcommons-loadgen"


def verdict_rows(kind, run, new):
    about = {"pair": "known", "kind": kind, "run": run, "took_seconds": 3.0, "load_average": 1.0}
    return row("old", 2.0, 2 * run, **about), row("new", new, 2 * run + 1, **about)


def test_verdicts_are_counted_from_the_samples():
    rows = [r for run in range(3) for r in verdict_rows("identical", run, 2.0)]
    rows += [r for run in range(3) for r in verdict_rows("10 % slower", run, 2.2 if run else 2.0)]
    report = Report(1, "t", {}, tuple(rows))
    assert verdicts.counts(report) == {
        ("known", "identical"): {"equal": 3},
        ("known", "10 % slower"): {"equal": 1, "slower": 2},
    }
    assert "| known | 10 % slower | 2 of 3 | equal 1 | 3 s | 1.0 to 1.0 |" in verdicts.table(report)


def test_the_slower_chain_has_a_tenth_more_of_the_same_work(tmp_path):
    from ganexport.bench import roofline

    costs = []
    for layers in (verdicts.LAYERS, verdicts.MORE):
        path = tmp_path / f"{layers}.onnx"
        costs.append(roofline.count(path, verdicts.chain(path, layers), {}).flops)
    assert costs[1] / costs[0] == pytest.approx(1.1)


def test_a_whole_run_of_verdicts(tmp_path):
    path = tmp_path / "v.json"
    fast = ["--pairs", "known", "--runs", "1", "--seconds", "0.4", "--rounds", "4", "--longest", "5"]
    code = verdicts.main([*fast, "--output", str(path)])
    report = report_from_json(path.read_bytes())
    assert len(report.measurements) == 4
    right = all(list(found) == [verdicts.RIGHT[kind]] for (_, kind), found in verdicts.counts(report).items())
    assert code == (0 if right else 1)
    assert verdicts.main([*fast, "--output", str(path), "--continue"]) == code  # nothing is left to do
    assert report_from_json(path.read_bytes()).measurements == report.measurements


def test_tables_in_the_documentation_are_what_their_results_give():
    for path in tables.documents():
        text = path.read_text(encoding="utf-8")
        assert tables.updated(text, path.name) == text, "run: python -m benchmarks.tables"


def test_a_stale_table_is_found(tmp_path, monkeypatch):
    from ganexport.measurement import report_to_json

    (tmp_path / "docs").mkdir()
    (tmp_path / "r.json").write_bytes(report_to_json(loadgen_report(2.0, 2.0)))
    document = "a\n<!-- table: r.json loadgen -->\nold\n<!-- end of table -->\nb\n"
    (tmp_path / "README.md").write_text(document)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1
    assert (tmp_path / "README.md").read_text() == document
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0
    assert "python -m benchmarks.loadgen" in (tmp_path / "README.md").read_text()
    (tmp_path / "r.json").unlink()
    with pytest.raises(SystemExit, match="which is not there"):
        tables.main(["--check"])


def test_a_table_of_a_folder_and_an_unknown_way_to_show_it(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    text = "<!-- table: results {} -->\nold\n<!-- end of table -->\n"
    assert "Not measured" in tables.updated(text.format("speedups"), "x.md")
    with pytest.raises(SystemExit, match="known: speedups, speedups-in-detail"):
        tables.updated(text.format("loadgen"), "x.md")


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda p: str(p.relative_to(RESULTS)))
def test_committed_results_can_be_read_and_name_their_command(path):
    report = report_from_json(path.read_bytes(), path.name)
    assert report.measurements
    assert report.command or report.notes
    # What ran on a machine and how its tests went are facts; everything else has samples.
    facts_alone = all(r.conditions.get("scenario") in ("probe", "tests") and r.facts for r in report.measurements)
    assert any(r.series for r in report.measurements) or facts_alone
