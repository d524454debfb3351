"""``convert --to triton --to web``: from an artifact, without torch, next to the file that they hold."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from serving_helpers import make_artifact

import ganexport


def test_packages_are_part_of_the_artifact_and_it_still_loads_and_verifies(tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "source").path
    made = ganexport.convert(source, to=["triton", "web"], output=tmp_path / "made")
    assert {file.format for file in made.manifest.files} == {"onnx", "triton", "web"}
    for file in made.manifest.files:
        made.verified_path(file)
        assert file.certificate is not None
        assert file.certificate.passed
    model = (made.path / "generator.onnx").read_bytes()
    assert (made.path / "triton/tiny/1/model.onnx").read_bytes() == model
    assert (made.path / "web/generator.onnx").read_bytes() == model
    assert ganexport.verify(made.path).passed
    with ganexport.load(made.path) as generator:
        assert generator.generate(2).shape[0] == 2
