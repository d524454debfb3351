"""Versions across restarts: what served goes on to serve, whatever lies at the artifact's path by then."""

from __future__ import annotations

import asyncio
import io
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
from serving_helpers import make_artifact

from ganexport.errors import ArtifactError, GanExportError, OutputError, UsageError
from ganexport.runtime._onnx_file import external_files
from ganexport.serving.engine import EngineSettings
from ganexport.serving.loading import Checked, check
from ganexport.serving.metrics import Log
from ganexport.serving.server import ServerOptions, _Server
from ganexport.serving.versions import Version, VersionStore, fingerprint


async def checked(path: Path) -> Checked:
    return check(path, EngineSettings(backend="onnxruntime"))


def store(state: Path) -> VersionStore:
    return VersionStore(state, checked)


def start(state: Path, source: Path) -> tuple[VersionStore, Version, str | None]:
    opened = store(state)
    return (opened, *asyncio.run(opened.start(source)))


def stop(opened: VersionStore) -> None:
    """What the end of a process does."""
    opened._lock.close()


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    return make_artifact(tmp_path / "artifact", seed=0).path, tmp_path / "state"


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_broken_artifact_does_not_keep_a_restarted_server_from_serving(places, how: str) -> None:
    source, state = places
    opened, first, refusal = start(state, source)
    assert refusal is None
    stop(opened)
    if how == "damaged":
        (source / "generator.onnx").write_bytes(b"broken")
    else:
        shutil.rmtree(source)
    opened, again, refusal = start(state, source)
    assert again == first
    assert refusal
    stop(opened)
    make_artifact(source, seed=1)
    opened, new, refusal = start(state, source)
    assert refusal is None
    assert new.digest != first.digest
    assert opened.roll_back() == first  # the versions before the restart can still be rolled back to


def test_a_version_that_was_rolled_back_stays_so_until_it_is_asked_for(places) -> None:
    source, state = places
    opened, first, _ = start(state, source)
    make_artifact(source, seed=1)
    second = asyncio.run(opened.adopt(source))
    assert opened.roll_back() == first
    stop(opened)
    opened, now, refusal = start(state, source)
    assert now == first
    assert "was rolled back" in refusal
    assert asyncio.run(opened.adopt(source)).digest == second.digest  # SIGHUP
    stop(opened)
    opened, now, refusal = start(state, source)
    assert (now.digest, refusal) == (second.digest, None)


def test_an_earlier_version_that_is_broken_too_is_refused(places) -> None:
    source, state = places
    opened, first, _ = start(state, source)
    stop(opened)
    for folder in (source, Path(first.path)):
        (folder / "generator.onnx").write_bytes(b"broken")
    with pytest.raises(ArtifactError):
        start(state, source)


def test_without_an_earlier_version_a_broken_artifact_is_refused(places) -> None:
    source, state = places
    (source / "generator.onnx").write_bytes(b"broken")
    with pytest.raises(GanExportError):
        start(state, source)
    assert not list(state.glob("incoming.*"))


def test_two_servers_do_not_share_a_state(places) -> None:
    source, state = places
    opened, *_ = start(state, source)
    with pytest.raises(OutputError, match="another server keeps its versions there"):
        start(state, source)
    stop(opened)
    start(state, source)


def test_what_a_killed_server_left_is_swept_and_a_damaged_list_is_named(places) -> None:
    source, state = places
    opened, *_ = start(state, source)
    stop(opened)
    (state / "incoming.x").mkdir()
    opened, *_ = start(state, source)
    assert not list(state.glob("incoming.*"))
    stop(opened)
    (state / "versions.json").write_text("{")
    with pytest.raises(OutputError, match=r"versions\.json: cannot be read"):
        start(state, source)


def test_there_may_be_nothing_to_roll_back_to(places) -> None:
    source, state = places
    opened, *_ = start(state, source)
    with pytest.raises(UsageError, match="no earlier version"):
        opened.roll_back()


def test_versions_that_will_not_serve_again_leave_the_disk(places) -> None:
    source, state = places
    opened, *_ = start(state, source)
    (state / "notes").mkdir()  # whatever else lies there is not ours
    for seed in range(1, 8):
        make_artifact(source, seed=seed)
        asyncio.run(opened.adopt(source))
        if seed % 2:
            opened.roll_back()
        folders = {path.name for path in state.iterdir() if path.is_dir()} - {"notes"}
        held = {version.digest for version in opened.history}
        assert held <= folders
        assert len(folders - held) <= 1  # requests to the one just rolled back may be under way
    assert (state / "notes").exists()


@pytest.mark.parametrize("missing", [False, True])
def test_a_lone_onnx_brings_the_weights_beside_it(tmp_path: Path, missing: bool) -> None:
    made = make_artifact(tmp_path / "artifact", labels=False).path / "generator.onnx"
    lone = tmp_path / "lone" / "lone.onnx"
    lone.parent.mkdir()
    weights = lone.parent / "lone.onnx.data"
    onnx.save(onnx.load(made), lone, save_as_external_data=True, location=weights.name, size_threshold=1024)
    assert external_files(lone) == [weights.name]
    assert external_files(made) == []
    if not missing:
        opened, version, _ = start(tmp_path / "state", lone)
        assert (Path(version.path).parent / weights.name).read_bytes() == weights.read_bytes()
        stop(opened)
        return
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"lone\.onnx\.data: weights of the ONNX file, but missing"):
        start(tmp_path / "state", lone)


@pytest.mark.parametrize(
    ("name", "says"), [(b"../key", "a link that leaves its folder"), (b"\0.data", "a file name with a zero byte")]
)
def test_weights_outside_the_folder_of_a_lone_onnx_are_not_read(tmp_path: Path, name: bytes, says: str) -> None:
    made = make_artifact(tmp_path / "artifact", labels=False).path / "generator.onnx"
    (tmp_path / "lone").mkdir()
    lone = tmp_path / "lone" / "a.onnx"
    onnx.save(onnx.load(made), lone, save_as_external_data=True, location="a.data", size_threshold=0)
    lone.write_bytes(lone.read_bytes().replace(b"a.data", name))
    (tmp_path / "key").write_bytes(b"secret")
    fingerprint(lone)  # the watcher goes on
    with pytest.raises(ArtifactError, match=says):
        start(tmp_path / "state", lone)


def test_weights_that_change_beside_the_same_lone_onnx_are_a_newer_version(tmp_path: Path) -> None:
    """Exported again after training, often only they differ."""
    made = make_artifact(tmp_path / "artifact", labels=False).path / "generator.onnx"
    lone, weights = tmp_path / "lone.onnx", tmp_path / "lone.data"
    onnx.save(onnx.load(made), lone, save_as_external_data=True, location=weights.name, size_threshold=1024)
    opened = store(tmp_path / "state")
    first, before = asyncio.run(opened.adopt(lone)), fingerprint(lone)
    weights.write_bytes((-np.fromfile(weights, np.float32)).tobytes())
    assert None not in (before, fingerprint(lone))
    assert fingerprint(lone) != before
    second = asyncio.run(opened.adopt(lone))
    assert second.digest != first.digest
    assert (Path(second.path).parent / weights.name).read_bytes() == weights.read_bytes()
    weights.unlink()
    assert fingerprint(lone) is None  # as while an artifact is being replaced


def test_a_place_that_cannot_be_looked_at_is_no_newer_version(tmp_path: Path) -> None:
    assert fingerprint(tmp_path / "none") is None
    assert fingerprint(tmp_path / ("n" * 300)) is None  # as on a file system that went away: an error, not "no"


def test_what_cannot_be_written_down_changes_nothing(places) -> None:
    source, state = places
    opened, first, _ = start(state, source)
    make_artifact(source, seed=1)
    second = asyncio.run(opened.adopt(source))
    (state / "versions.json").unlink()
    (state / "versions.json" / "in the way").mkdir(parents=True)
    make_artifact(source, seed=2)
    with pytest.raises(OutputError):
        asyncio.run(opened.adopt(source))
    assert opened.history == (first, second)
    with pytest.raises(OutputError):
        opened.roll_back()
    assert opened.history == (first, second)
    assert all(Path(version.path).exists() for version in opened.history)


def test_an_earlier_version_serves_as_this_machine_runs_it(places) -> None:
    source, state = places
    opened, *_ = start(state, source)
    stop(opened)
    (source / "generator.onnx").write_bytes(b"broken")

    async def elsewhere(path: Path) -> Checked:
        return msgspec.structs.replace(await checked(path), runtime="another")

    opened = VersionStore(state, elsewhere)
    version, refusal = asyncio.run(opened.start(source))
    assert refusal
    assert version.checked.runtime == opened.current.checked.runtime == "another"


def test_the_watcher_outlives_any_failure_and_tries_again(places, monkeypatch) -> None:
    source, state = places
    failures: list[Exception] = [OSError(12, "Cannot allocate memory")]

    async def check_in_want(path: Path) -> Checked:
        if failures:
            raise failures.pop()
        return await checked(path)

    async def watch() -> list[str]:
        server = _Server(source, ServerOptions(reload=0.01), state, socket.socket())
        server.store, server.gateway, server.log = opened, SimpleNamespace(refusal=None), Log(io.StringIO())
        server._seen = fingerprint(source)
        # The manifest is there before the rest, which leaves no trace at it.
        make_artifact(source, seed=1)
        whole = (source / "generator.onnx").read_bytes()
        (source / "generator.onnx").write_bytes(whole[:500])
        watching = asyncio.create_task(server._watch_artifact())
        reasons: list[str] = []
        for _ in range(500):
            await asyncio.sleep(0.01)
            if server.gateway.refusal not in (None, *reasons):
                reasons.append(server.gateway.refusal)
            if len(reasons) == 2:
                (source / "generator.onnx").write_bytes(whole)
            if opened.current != first:
                break
        await asyncio.sleep(0.1)
        assert not watching.done()
        assert server.gateway.refusal is None
        watching.cancel()
        server.listener.close()
        return reasons

    opened, first, _ = start(state, source)
    opened._check = check_in_want
    monkeypatch.setattr("ganexport.serving.server.RETRY_FIRST", 0.05)
    reasons = asyncio.run(watch())
    assert reasons[0] == "OSError: [Errno 12] Cannot allocate memory"
    assert "sha256" in reasons[1]
    # What was adopted is not adopted again.
    assert [version.digest for version in opened.history] == [first.digest, opened.current.digest]
    stop(opened)
