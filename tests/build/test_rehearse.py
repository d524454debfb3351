"""A lone ONNX file is read by each library in a child process first: what kills the child is one clear line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ganexport.build import rehearse
from ganexport.errors import ArtifactError
from ganexport.export.convert import convert
from ganexport.runtime import _probe

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
import tiny_generators as tiny


@pytest.fixture
def lone(tmp_path):
    return tiny.save(tiny.image_model(spec=tiny.image_spec()), tmp_path / "x.onnx")


def test_a_sound_file_passes_every_library(lone):
    rehearse.rehearse(lone, ("openvino", "trt"))


def test_a_damaged_file_is_refused_by_the_child_in_one_line(lone):
    lone.write_bytes(lone.read_bytes()[:-300])
    with pytest.raises(ArtifactError, match=r"x\.onnx") as refusal:
        rehearse.rehearse(lone)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("reader", "library"), [("onnx", "the onnx package"), ("trt", "TensorRT")])
def test_a_library_that_crashes_takes_only_the_child_along(lone, monkeypatch, reader, library):
    """The child is given a reader that dies as C++ does: by a signal."""
    real = rehearse.in_child

    def dying(module, path, arguments, what):
        if arguments == (reader,):
            monkeypatch.setenv("DIES", "1")
            module = "dying_reader"
        return real(module, path, arguments, what)

    folder = lone.parent / "modules"
    folder.mkdir()
    (folder / "dying_reader.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(rehearse, "in_child", dying)
    with pytest.raises(ArtifactError, match=rf"x\.onnx: {library} crashed .*\(signal 11\)"):
        rehearse.rehearse(lone, ("trt",))


def test_a_reader_that_hangs_is_stopped(lone, monkeypatch):
    monkeypatch.setattr(_probe, "TIME_LIMIT_S", 0.02)
    with pytest.raises(ArtifactError, match="the onnx package did not finish loading it"):
        rehearse.rehearse(lone)


def test_convert_opens_a_lone_file_in_a_child_first_and_reads_nothing_itself_when_that_fails(
    lone, tmp_path, monkeypatch
):
    asked = []

    def refuse(path, formats=()):
        asked.append((path, tuple(formats)))
        raise ArtifactError(f"{path}: refused in the child")

    def never(*_):
        raise AssertionError("read in this process")

    monkeypatch.setattr(rehearse, "rehearse", refuse)
    monkeypatch.setattr("ganexport.build.onnx_file.load_model", never)
    for to in ("trt", "auto"):
        with pytest.raises(ArtifactError, match="refused in the child"):
            convert(lone, to=to, output=tmp_path / "out")
    assert asked == [(lone, ("trt",)), (lone, ("openvino", "trt"))]
    assert not (tmp_path / "out").exists()
