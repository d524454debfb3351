"""Shards: complete, in order, and the same bytes however often the work was interrupted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ganexport
from ganexport.artifact import Artifact
from ganexport.bulk import job as jobs
from ganexport.bulk.job import generate_bulk
from ganexport.errors import MissingDependencyError, OutputError, UsageError

sys.path.insert(0, str(Path(__file__).parent.parent / "runtime"))
import tiny_generators


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    path = tmp_path_factory.mktemp("bulk") / "tiny"
    return tiny_generators.make_artifact(
        path, tiny_generators.image_spec(1, classes=10), tiny_generators.image_model(1, classes=10)
    )


@pytest.fixture(scope="module")
def generator(artifact):
    with ganexport.load(artifact.path, settings={"threads": 1}) as loaded:
        yield loaded


def content(folder: Path) -> dict[str, str]:
    """Digest of every file, by its path in the folder; without the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def check_sums(folder: Path) -> None:
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def wanted(generator, n, **asked):
    pictures = generator.generate(n, batch_size=8, **asked)
    labels = ganexport.latents(generator.spec, asked.get("seed", 0), asked.get("start", 0), n)["y"]
    return pictures, labels


def close(left, right) -> bool:
    """Equal but for the rounding of engine calls that were cut at other places."""
    return np.abs(left.astype(int) - right.astype(int)).max() <= 1


def test_png_folders(generator, tmp_path):
    done = generate_bulk(generator, tmp_path / "out", 25, seed=3, start=100, format="png", shard_size=10)
    assert [done.done, done.total] == [25, 25]
    pictures, labels = wanted(generator, 25, seed=3, start=100)
    files = sorted((tmp_path / "out").rglob("*.png"))
    assert [f.name for f in files] == [f"{i:012d}.png" for i in range(100, 125)]
    assert [f.parent.name for f in files][::10] == ["shard-000000", "shard-000001", "shard-000002"]
    assert close(np.stack([np.asarray(Image.open(f))[..., None] for f in files]), pictures)
    rows = [json.loads(line) for f in sorted((tmp_path / "out").rglob("labels.jsonl")) for line in f.open()]
    assert rows == [{"seed": 3, "index": 100 + i, "y": int(label)} for i, label in enumerate(labels)]
    check_sums(tmp_path / "out")
    for shard in (tmp_path / "out").glob("shard-*"):
        check_sums(shard)


def test_npz(generator, tmp_path):
    generate_bulk(generator, tmp_path / "out", 25, seed=3, format="npz", shard_size=10)
    parts = [np.load(path, allow_pickle=False) for path in sorted((tmp_path / "out").glob("*.npz"))]
    pictures, labels = wanted(generator, 25, seed=3)
    assert [len(part["images"]) for part in parts] == [10, 10, 5]
    assert close(np.concatenate([part["images"] for part in parts]), pictures)
    assert np.concatenate([part["y"] for part in parts]).tolist() == labels.tolist()
    assert np.concatenate([part["index"] for part in parts]).tolist() == list(range(25))
    assert parts[0]["seed"] == 3
    check_sums(tmp_path / "out")


def test_webdataset(generator, tmp_path):
    generate_bulk(generator, tmp_path / "out", 25, seed=3, format="webdataset", shard_size=10)
    pictures, labels = wanted(generator, 25, seed=3)
    found, members = [], []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                members.append(member.name)
                assert member.mtime == 0
                assert member.mode == 0o644
                data = archive.extractfile(member).read()
                if member.name.endswith(".png"):
                    found.append(np.asarray(Image.open(io.BytesIO(data)))[..., None])
                elif member.name.endswith(".cls"):
                    assert int(data) == labels[int(member.name[:-4])]
                else:
                    assert json.loads(data)["index"] == int(member.name[:-5])
    assert members[:4] == ["000000000000.png", "000000000000.json", "000000000000.cls", "000000000001.png"]
    assert len(members) == 75
    assert close(np.stack(found), pictures)
    check_sums(tmp_path / "out")


def test_parquet(generator, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    generate_bulk(generator, tmp_path / "out", 25, seed=3, format="parquet", shard_size=10)
    rows = [row for p in sorted((tmp_path / "out").glob("*.parquet")) for row in parquet.read_table(p).to_pylist()]
    pictures, labels = wanted(generator, 25, seed=3)
    assert [row["index"] for row in rows] == list(range(25))
    assert [row["y"] for row in rows] == labels.tolist()
    found = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))[..., None] for row in rows])
    assert close(found, pictures)


def test_parquet_without_pyarrow_says_what_to_install(generator, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match="pip install pyarrow"):
        generate_bulk(generator, tmp_path / "out", 5, format="parquet")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["png", "npz", "webdataset"])
def test_an_interrupted_job_ends_as_the_uninterrupted_one(generator, tmp_path, kind):
    generate_bulk(generator, tmp_path / "whole", 57, seed=3, format=kind, shard_size=10)

    class StopError(Exception):
        pass

    def stop_after(shards):
        def progress(state):
            if state.done >= min(shards * 10, 57) and state.done < 57:
                raise StopError

        return progress

    for shards in (1, 1, 3, 4):
        with pytest.raises(StopError):
            generate_bulk(
                generator, tmp_path / "cut", 57, seed=3, format=kind, shard_size=10, on_progress=stop_after(shards)
            )
    seen = []
    generate_bulk(generator, tmp_path / "cut", 57, seed=3, format=kind, shard_size=10, on_progress=seen.append)
    assert seen[0].done >= 40
    assert [state.done for state in seen] == sorted({state.done for state in seen})
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*") if p.name != ".lock"}
    assert generate_bulk(generator, tmp_path / "cut", 57, seed=3, format=kind, shard_size=10).done == 57
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*") if p.name != ".lock"}


@pytest.mark.parametrize("kind", ["png", "webdataset"])
def test_damaged_lost_and_half_written_shards_are_made_again(generator, tmp_path, kind):
    folder = tmp_path / "out"
    generate_bulk(generator, folder, 40, format=kind, shard_size=10)
    whole = content(folder)
    shards = sorted(folder.glob("shard-*"))
    first = sorted(shards[0].glob("*.png"))[3] if kind == "png" else shards[0]
    first.write_bytes(first.read_bytes()[:-1])
    (shards[1] / "SHA256SUMS" if kind == "png" else shards[1]).unlink()
    (folder / f".{shards[2].name}").write_bytes(b"half")
    sums = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(sums[:3]) + sums[3][:20])
    generate_bulk(generator, folder, 40, format=kind, shard_size=10)
    assert content(folder) == whole


def test_what_a_kill_leaves_while_small_files_are_written_is_swept_up(generator, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (".lock", ".job.json.x1"):  # killed before the job was written
        (folder / name).touch()
    generate_bulk(generator, folder, 20, format="npz", shard_size=10)
    whole = content(folder)
    assert sorted(whole) == ["SHA256SUMS", "job.json", "shard-000000.npz", "shard-000001.npz"]
    (folder / ".SHA256SUMS.x2").write_text("half")
    generate_bulk(generator, folder, 20, format="npz", shard_size=10)
    assert content(folder) == whole


def test_another_job_in_the_folder_is_refused_with_the_difference(generator, tmp_path):
    generate_bulk(generator, tmp_path / "out", 20, format="npz", shard_size=10)
    for change, message in (
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"n": 21}, "n is 20 there, 21 here"),
        ({"format": "webdataset"}, "format is 'npz' there"),
        ({"labels": 3}, "labels is None there, 3 here"),
    ):
        with pytest.raises(OutputError, match=message):
            generate_bulk(generator, tmp_path / "out", **{"n": 20, "format": "npz", "shard_size": 10, **change})


def test_folders_that_hold_something_else_are_refused(generator, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.jpg").write_text("x")
    for name in ("file", "full"):
        with pytest.raises(OutputError, match="choose another output"):
            generate_bulk(generator, tmp_path / name, 5)
    with pytest.raises(OutputError):
        generate_bulk(generator, "/proc/nowhere", 5)


def test_two_writers_at_once_are_refused(generator, tmp_path):
    def again(_state):
        with pytest.raises(OutputError, match="another process is writing"):
            generate_bulk(generator, tmp_path / "out", 5, format="npz")

    generate_bulk(generator, tmp_path / "out", 5, format="npz", on_progress=again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "count is 0"),
        ({"n": 5, "format": "jpeg"}, "unknown format 'jpeg'"),
        ({"n": 5, "shard_size": -1}, "shard size is -1"),
        ({"n": 5, "shard_size": 0}, "shard size is 0"),
        ({"n": 2**63}, "are more than 1,000,000 shards"),
        ({"n": 5, "labels": 10}, "label is 10"),
        ({"n": 5, "seed": -1}, "seed is -1"),
        ({"n": 5, "batch_size": 1000}, "'batch' is 1000"),
    ],
)
def test_arguments_are_checked_before_the_folder_is_made(generator, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        generate_bulk(generator, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_clear_line_and_resumable(generator, tmp_path, monkeypatch):
    generate_bulk(generator, tmp_path / "whole", 40, format="webdataset", shard_size=10)
    real, calls = jobs.FORMATS["webdataset"].write, []

    def full(path, samples):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half a shard")
            raise OSError(28, "No space left on device")
        return real(path, samples)

    monkeypatch.setitem(jobs.FORMATS, "webdataset", jobs.FORMATS["webdataset"]._replace(write=full))
    with pytest.raises(OutputError, match="the disk is full"):
        generate_bulk(generator, tmp_path / "out", 40, format="webdataset", shard_size=10)
    assert not list((tmp_path / "out").glob(".shard*"))
    generate_bulk(generator, tmp_path / "out", 40, format="webdataset", shard_size=10)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_outputs_that_are_no_pictures_go_to_npz(tmp_path):
    from test_generator import audio_artifact

    with ganexport.load(audio_artifact(tmp_path / "a").path, settings={"threads": 1}) as generator:
        with pytest.raises(UsageError, match="not declared to be images"):
            generate_bulk(generator, tmp_path / "out", 5, format="png")
        generate_bulk(generator, tmp_path / "out", 20, format="npz", shard_size=10, sizes={"frames": 8})
        found = np.load(sorted((tmp_path / "out").glob("*.npz"))[1])
        truth = generator.sample(20, sizes={"frames": 8})["audio"][10:]
        assert np.allclose(found["audio"], truth, atol=1e-5)


# ---- real processes, really killed ----------------------------------------------------------------------


def start(artifact: Artifact, folder: Path, count: int) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "ganexport", "generate", str(artifact.path), "-n", str(count)]
    arguments += ["--format", "webdataset", "--shard-size", "500", "--threads", "1", "-o", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(ganexport.__file__).parent.parent)}
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def test_killed_at_random_moments_nothing_is_lost_or_doubled(artifact, generator, tmp_path):
    count, rng = 30_000, random.Random(5)
    generate_bulk(generator, tmp_path / "whole", count, format="webdataset", shard_size=500)
    kills = 0
    for _ in range(6):
        process = start(artifact, tmp_path / "cut", count)
        deadline = time.monotonic() + rng.uniform(0.3, 1.5)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process.stderr.close()
        if kills >= 4:
            break
    assert kills >= 1
    process = start(artifact, tmp_path / "cut", count)
    assert process.communicate()[1] is not None
    assert process.returncode == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_stop_cleanly_and_leave_what_is_resumable(artifact, tmp_path, number, code):
    process = start(artifact, tmp_path / "out", 300_000)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "out").glob("shard-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    remarks = process.communicate(timeout=120)[1]
    assert process.returncode == code
    assert "Traceback" not in remarks
    assert "stopped by" in remarks
    check_sums(tmp_path / "out")
