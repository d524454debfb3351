"""The tables of speedups: every figure is that of the raw samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import _speedups
from ganexport.measurement import SCHEMA_VERSION, Measurement, Report, Series, report_to_json

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def row(name, batch, milliseconds, *, who="stock", failed=False, **about):
    samples = tuple(round((milliseconds + wobble) * 1e6) for wobble in (-0.1, 0.0, 0.1))
    parity = {"verdict": "fail" if failed else "pass", "psnr": 50.0, "failures": ["too dark"] if failed else []}
    return Measurement(
        {"name": name, "who": who, **about},
        {"scenario": "offline", "sizes": {"batch": batch}, "items": batch, "model": "net"},
        (Series("end_to_end", samples, batch),),
        parity=parity,
    )


def report(*rows, load=0.1):
    return Report(SCHEMA_VERSION, "net", {"load_average": load}, rows)


def measured():
    rows = []
    for batch, scale in ((1, 1.0), (16, 10.0), (64, 40.0)):
        rows += [
            row("eager", batch, 9 * scale),
            row("compile-frozen", batch, 4 * scale),
            row("openvino (stock export)", batch, 6 * scale),
            row("aoti", batch, 1 * scale, failed=True),
            row("ganexport auto", batch, (2 if batch > 1 else 1) * scale, who="ours", precision="int8",
                backend="openvino", certified_psnr=41.25),
            row("ganexport auto fp32", batch, 5 * scale, who="ours"),
        ]  # fmt: skip
    return rows


def test_ratios_are_of_medians_against_the_fastest_right_peer():
    found = _speedups.compare(report(*measured()), "net")
    assert found.best[16] == (pytest.approx(40), "compile-frozen")
    assert found.ratios(found.ours, found.best) == pytest.approx([4, 2, 2])
    assert found.ratios(found.fp32, found.torch_free) == pytest.approx([1.2, 1.2, 1.2])
    assert _speedups.geometric_mean([4, 2, 2]) == pytest.approx(2.52, abs=0.01)


def test_tables_show_what_was_measured(tmp_path):
    folder = tmp_path / "some-machine"
    folder.mkdir()
    (folder / "inference-net.json").write_bytes(report_to_json(report(*measured())))
    (folder / "inference-net-under-load.json").write_text("not read")
    short, long = _speedups.render(tmp_path), _speedups.render(tmp_path, detailed=True)
    assert "| net | 4.00 / 2.00 / 2.00 | 2.52 | 41.2 dB |" in short
    assert "| net | 16 | 40.0 compile-frozen | 20.0 | 2.00 | 60.0 openvino (stock export) | 50.0 | 1.20 |" in long
    assert "int8 on openvino" in long
    assert "rough" not in short + long


def test_a_busy_machine_and_a_missing_row_are_said(tmp_path):
    folder = tmp_path / "some-machine"
    folder.mkdir()
    kept = [one for one in measured() if one.candidate["name"] != "ganexport auto"]
    (folder / "inference-net.json").write_bytes(report_to_json(report(*kept, load=3.0)))
    short = _speedups.render(tmp_path)
    assert "| net * | not measured | – | – |" in short
    assert "rough figure" in short


def test_without_results_it_says_so(tmp_path):
    assert _speedups.render(tmp_path) == _speedups.NOTHING


def test_committed_results_hold_raw_samples():
    files = sorted(RESULTS.rglob("inference-*.json"))
    assert files
    for path in files:
        found = json.loads(path.read_text())
        assert any(series["samples"] for one in found["measurements"] for series in one.get("series", [])), path.name
