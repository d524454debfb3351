"""The first image is timed in processes of its own, and torch is not among what they load."""

from __future__ import annotations

from benchmarks import first_image
from ganexport.measurement import report_from_json
from tests.bench import onnx_models


def test_every_run_is_kept_and_its_parts_add_up(tmp_path, capsys):
    artifact = onnx_models.artifact(tmp_path / "digits").path
    output = tmp_path / "f.json"
    assert first_image.main([str(artifact), "--runs", "2", "--limit", "60", "--output", str(output)]) == 0
    (row,) = report_from_json(output.read_bytes()).measurements
    samples = {one.name: one.samples for one in row.series}
    whole = samples.pop("start to first image")
    assert len(whole) == 2
    assert list(whole) == [sum(parts) for parts in zip(*samples.values(), strict=True)]
    assert row.facts["median_seconds"] == sum(whole) / 2e9
    assert "median" in capsys.readouterr().err
    assert first_image.main([str(artifact), "--runs", "1", "--limit", "0.001", "--output", str(output)]) == 1


def test_what_does_not_load_is_one_line(tmp_path, capsys):
    assert first_image.main([str(tmp_path / "none"), "--output", str(tmp_path / "f.json")]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.first_image: ganexport.errors.")
