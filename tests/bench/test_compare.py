"""Comparing and merging reports made of known samples."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from ganexport.bench.compare import compare_reports, environment_changes, merge_reports
from ganexport.bench.digest import digest
from ganexport.errors import UsageError
from ganexport.measurement import Measurement, Report, Series, report_from_json, report_to_json

ROUNDS = 8


def row(name="ort", milliseconds=10.0, noise=0.005, seed=0, batch=1, **fields):
    draw = np.random.Generator(np.random.Philox(seed))
    values = [
        int(1e6 * milliseconds * (1 + draw.normal(0, noise)) * (1 + abs(draw.normal(0, 0.02))))
        for _ in range(ROUNDS)
        for _ in range(30)
    ]
    facts = {"round_sizes": {"end_to_end": [30] * ROUNDS}}
    conditions = {"scenario": "offline", "sizes": {"batch": batch}, "items": batch}
    return Measurement({"name": name}, conditions, (Series("end_to_end", tuple(values), batch),), facts=facts, **fields)


def report(*rows, cpu="EPYC", **libraries):
    environment = {"cpu": {"model": cpu, "affinity": 2}, "gpus": [], "libraries": libraries}
    return Report(1, "test", environment, tuple(rows))


def verdicts(old, new, threshold=0.05):
    return [d.verdict for d in compare_reports(report(*old), report(*new), threshold)]


def test_equal_slower_and_faster():
    old = [row("a"), row("b"), row("c")]
    new = [row("a", seed=1), row("b", 11, seed=2), row("c", 9, seed=3)]
    assert verdicts(old, new) == ["equal", "slower", "faster"]


def test_a_slowdown_below_the_threshold_is_no_regression():
    assert verdicts([row()], [row(milliseconds=10.3, seed=1)]) == ["equal"]


def test_noise_is_no_regression():
    """Rounds that scatter by 30 % cannot show 6 %."""
    loud = row(milliseconds=10.6, noise=0.0, seed=1)
    values = np.array(loud.series[0].samples, float).reshape(ROUNDS, 30)
    values *= np.array([0.7, 1.3, 0.8, 1.25, 1.0, 1.35, 0.75, 1.1])[:, None]
    loud = msgspec.structs.replace(loud, series=(Series("end_to_end", tuple(values.ravel().astype(int).tolist())),))
    assert verdicts([row()], [loud]) == ["undecided"]


def test_intervals_of_ratios_stay_positive():
    wild = row()
    values = np.array(wild.series[0].samples, float).reshape(ROUNDS, 30) * np.array([1, 9, 1, 1, 9, 9, 1, 1])[:, None]
    wild = msgspec.structs.replace(wild, series=(Series("end_to_end", tuple(values.ravel().astype(int).tolist())),))
    (found,) = compare_reports(report(wild), report(wild))
    assert 0 < found.comparison.ratio.low < 1 < found.comparison.ratio.high


def test_what_is_missing_says_so():
    gone = Measurement({"name": "trt"}, {"scenario": "offline", "sizes": {"batch": 1}}, unavailable="no GPU")
    found = compare_reports(report(row(), row("old")), report(row(seed=1), row("new")))
    assert {d.name: d.reason for d in found if d.reason} == {
        "old": "only in the old report",
        "new": "only in the new report",
    }
    (found,) = compare_reports(report(row("trt")), report(gone))
    assert found.reason == "new: no GPU"
    (found,) = compare_reports(report(gone), report(gone))
    assert found.reason == "ran in neither: no GPU"
    with pytest.raises(UsageError, match="nothing to compare"):
        compare_reports(report(row("a")), report(row("b")))


PASS, WRONG = {"verdict": "pass", "psnr": 90.0}, {"verdict": "fail", "psnr": 12.0}


@pytest.mark.parametrize(
    ("old", "new", "notes", "lost"),
    [
        (row("b"), None, (), "not measured any more"),
        (row("b"), None, ("interrupted by SIGTERM: 1 rows",), "not measured any more (interrupted by SIGTERM)"),
        (row("b"), Measurement({"name": "b"}, row().conditions, unavailable="crashed"), (), "runs no more"),
        (row("b"), Measurement({"name": "b"}, row().conditions), (), "no samples any more"),
        (row("b", parity=PASS), row("b", parity=WRONG), (), "outputs outside the tolerance now: WRONG (12 dB)"),
        (row("b", parity=WRONG), row("b", parity=WRONG), (), ""),
        (row("b", parity=WRONG), row("b", parity=PASS), (), ""),
        (Measurement({"name": "b"}, row().conditions, unavailable="no GPU"), None, (), ""),
        (None, row("b", parity=WRONG), (), ""),
    ],
)
def test_what_the_old_report_had_is_missed(old, new, notes, lost):
    before, after = (report(*filter(None, rows)) for rows in ((row("a"), old), (row("a"), new)))
    found = compare_reports(before, msgspec.structs.replace(after, notes=notes))
    assert [d.lost for d in found if d.name == "b"] == [lost]


def server(rate, refused):
    trials = [{"rate": rate, "kept": True}, {"rate": refused, "kept": False}]
    conditions = {"scenario": "server", "sizes": {}, "slo_ms": 50}
    return Measurement(
        {"name": "ort"}, conditions, (Series("latency", (1, 2, 3)),), facts={"rate": rate, "trials": trials}
    )


def test_rates_of_the_server_scenario_are_known_to_the_last_gap():
    old = report(server(1000, 1010))
    assert compare_reports(old, report(server(800, 808)))[0].verdict == "slower"
    assert compare_reports(old, report(server(1000, 1010)))[0].verdict == "equal"
    assert compare_reports(old, report(server(900, 1200)))[0].verdict == "undecided"


def test_environment_changes_are_named():
    changes = environment_changes(report(onnxruntime="1.30"), report(onnxruntime="1.31", openvino="1", cpu="Xeon"))
    assert changes == ["machine: epyc-2-cores → xeon-2-cores", "onnxruntime: 1.30 → 1.31", "openvino: none → 1"]


def test_merging_keeps_machines_apart():
    merged = merge_reports([report(row()), report(row(milliseconds=5), cpu="Xeon"), report(row(), cpu="Xeon", x="2")])
    names = [line.name for line in digest(merged.measurements)]
    assert names == ["epyc-2-cores: ort", "xeon-2-cores: ort", "xeon-2-cores-2: ort"]
    again = merge_reports([merged, report(row(), cpu="Arm")])
    assert len(again.environment["machines"]) == 4
    assert report_from_json(report_to_json(again)) == again
    with pytest.raises(UsageError, match="nothing to merge"):
        merge_reports([])


def test_speedups_refer_to_the_baseline():
    rows = [row("eager", 20, seed=1), row("ort", 10, seed=2)]
    eager, ort = digest(rows)
    assert eager.speedup is None
    assert ort.speedup.value == pytest.approx(2, rel=0.02)
    assert ort.throughput == pytest.approx(100, rel=0.05)
    eager, ort = digest(rows, baseline="ort")
    assert eager.speedup.value == pytest.approx(0.5, rel=0.02)
