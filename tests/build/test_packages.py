"""``convert --to triton --to web``: from an artifact, without torch, next to the file that they hold."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

import pytest
from serving_helpers import make_artifact

import ganexport
from ganexport.errors import IntegrityError


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


def test_precisions_lie_side_by_side_and_each_is_verified(tmp_path: Path) -> None:
    own = make_artifact(tmp_path / "own").path
    ganexport.convert(own, to=["triton", "web"], output=own)
    both = ganexport.convert(own, to=["triton", "web"], precision="int8", output=own, min_psnr=25)
    assert {file.path for file in both.manifest.files if file.format in ("triton", "web")} == {
        "triton/tiny/config.pbtxt", "triton/tiny_int8/config.pbtxt", "web/index.html", "web-int8/index.html",
    }  # fmt: skip
    for file in both.manifest.files:
        both.verified_path(file)
    assert 'name: "tiny_int8"' in (own / "triton/tiny_int8/config.pbtxt").read_text()
    report = ganexport.verify(own, formats=["triton", "web"], min_psnr=25)
    assert report.passed
    assert {file.precision for file in report.files} == {"fp32", "int8"}
    model = own / "triton/tiny/1/model.onnx"
    model.write_bytes(model.read_bytes() + b"x")
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        ganexport.verify(own, formats=["triton"])
