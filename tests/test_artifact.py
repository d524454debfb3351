"""Artifacts are published whole or not at all, and nothing in them is trusted before its hash."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from ganexport.artifact import MANIFEST, Artifact, ArtifactWriter, Manifest, Provenance, decode_manifest, write_atomic
from ganexport.errors import ArtifactError, IntegrityError, OutputError
from ganexport.spec import Dim, GeneratorSpec, TensorSpec, parse_input

SPEC = GeneratorSpec(
    (parse_input("z=normal[batch,4]"),),
    (TensorSpec("image", "float32", ("batch", 1, 2, 2), None, (-1.0, 1.0), "NCHW"),),
    (Dim("batch"),),
)


def make(path, content=b"engine"):
    with ArtifactWriter(path) as writer:
        (writer.folder / "generator.onnx").write_bytes(content)
        file = writer.describe("generator.onnx", "onnx", "fp32")
        return writer.publish(Manifest(1, SPEC, (file,), Provenance("a test")))


def test_round_trip(tmp_path):
    artifact = make(tmp_path / "a")
    assert artifact.spec == SPEC
    assert artifact.verified_path(artifact.find("onnx")).read_bytes() == b"engine"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_files_size_counts_the_weights_beside_it(tmp_path):
    with ArtifactWriter(tmp_path / "a") as writer:
        (writer.folder / "generator.xml").write_bytes(b"<net/>")
        (writer.folder / "generator.bin").write_bytes(b"w" * 1000)
        file = writer.describe("generator.xml", "openvino", "fp32", companions=("generator.bin",))
        artifact = writer.publish(Manifest(1, SPEC, (file,), Provenance("a test")))
    assert artifact.bytes_of(artifact.find("openvino")) == 1006
    (tmp_path / "a" / "generator.bin").unlink()
    assert artifact.bytes_of(artifact.find("openvino")) == 6


def test_an_existing_artifact_is_replaced_as_a_whole(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a" / ".stale").touch()
    make(tmp_path / "a", b"new")
    assert not (tmp_path / "a" / ".stale").exists()
    assert Artifact(tmp_path / "a").find("onnx").bytes == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_users_own_files_in_an_artifact_are_not_lost(tmp_path):
    made = make(tmp_path / "a")
    (made.path / "pictures").mkdir()
    (made.path / "pictures" / "1.png").touch()
    with pytest.raises(OutputError, match=r"holds pictures/1\.png, which is no part of the artifact"):
        make(tmp_path / "a", b"new")
    assert (made.path / "pictures" / "1.png").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("exchanged", [True, False])
def test_an_interrupt_while_replacing_leaves_an_artifact(tmp_path, exchanged, monkeypatch):
    make(tmp_path / "a", b"old")
    if not exchanged:  # as on systems without renameat2
        monkeypatch.setattr("ganexport.artifact._exchange", lambda one, other: False)
    rename = Path.rename

    def interrupted(path, target):
        if Path(target) == tmp_path / "a" and path.name != "artifact":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with contextlib.nullcontext() if exchanged else pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", b"fresh")
    found = Artifact(tmp_path / "a")
    assert found.verified_path(found.find("onnx")).read_bytes() == (b"fresh" if exchanged else b"old")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_a_reader_finds_an_artifact_at_any_moment_of_being_replaced(tmp_path):
    make(tmp_path / "a", b"first")
    done, missed = threading.Event(), []

    def read():
        while not done.is_set():
            if not (tmp_path / "a" / "manifest.json").exists():
                missed.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        make(tmp_path / "a", b"%d" % number)
    done.set()
    reader.join()
    assert not missed


def test_what_cannot_be_replaced_is_refused_before_any_work(tmp_path, monkeypatch):
    make(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(OutputError, match="is the current directory, which cannot be replaced"):
        ArtifactWriter(".")
    with pytest.raises(OutputError, match="current directory"):
        ArtifactWriter(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "a")
    with pytest.raises(OutputError, match="is a mount point, which cannot be replaced"):
        ArtifactWriter("a")


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    make(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    make(tmp_path / "current", b"new")
    assert (tmp_path / "current").is_symlink()
    assert Artifact(tmp_path / "v1").find("onnx").bytes == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["current", "v1"]


def test_a_folder_that_is_something_else_is_never_replaced(tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").touch()
    with pytest.raises(OutputError, match="not an artifact"):
        ArtifactWriter(tmp_path / "holiday")


def test_leaving_without_publishing_leaves_nothing(tmp_path):
    with ArtifactWriter(tmp_path / "a") as writer:
        (writer.folder / "half").touch()
    assert list(tmp_path.iterdir()) == []


def test_changed_and_missing_files_are_refused(tmp_path):
    artifact = make(tmp_path / "a")
    file = artifact.find("onnx")
    (tmp_path / "a" / "generator.onnx").write_bytes(b"Engine")
    with pytest.raises(IntegrityError, match="changed or damaged"):
        artifact.verified_path(file)
    (tmp_path / "a" / "generator.onnx").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        artifact.verified_path(file)


def test_links_out_of_the_artifact_are_refused(tmp_path):
    artifact = make(tmp_path / "a")
    (tmp_path / "secret").write_bytes(b"engine")
    (tmp_path / "a" / "generator.onnx").unlink()
    (tmp_path / "a" / "generator.onnx").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="leaves the artifact"):
        artifact.verified_path(artifact.find("onnx"))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "c:/x", "a\\..\\x", "x\0y"])
def test_paths_that_leave_the_artifact_are_refused(tmp_path, path):
    make(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    manifest["files"][0]["path"] = path
    with pytest.raises(ArtifactError, match="leaves the artifact"):
        decode_manifest(json.dumps(manifest).encode(), "m")


def test_a_future_schema_is_named_even_when_the_rest_is_unknown(tmp_path):
    with pytest.raises(ArtifactError, match="newer ganexport"):
        decode_manifest(b'{"schema_version": 99, "surprise": 1}', "m")


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"\xff\xfe", b'{"schema_version": 1}', b'{"schema_version": "1"}', b"[" * 100_000]
)
def test_malformed_manifests_are_refused_in_one_line(text):
    with pytest.raises(ArtifactError) as refusal:
        decode_manifest(text, "m")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_what_is_not_an_artifact_is_refused(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "file":
        path.touch()
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(ArtifactError):
        Artifact(path)


def test_a_missing_format_names_those_that_are_there(tmp_path):
    with pytest.raises(ArtifactError, match="holds no trt, only onnx fp32"):
        make(tmp_path / "a").find("trt")


def test_a_full_disk_is_one_clear_line_and_the_old_file_survives(tmp_path, monkeypatch):
    target = tmp_path / "x"
    write_atomic(target, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(OutputError, match="the disk is full"):
        make(tmp_path / "a")
    assert not (tmp_path / "a").exists()
