"""Versions across restarts: what served goes on to serve, whatever lies at the artifact's path by then."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from serving_helpers import make_artifact

from ganexport.errors import ArtifactError, BackendUnavailableError, GanExportError, OutputError, UsageError
from ganexport.runtime._onnx_file import external_files
from ganexport.serving.engine import EngineSettings
from ganexport.serving.loading import Checked, check
from ganexport.serving.metrics import Log
from ganexport.serving.replicas import gpu_share
from ganexport.serving.server import ServerOptions, _one_gpu, _Server
from ganexport.serving.versions import Version, VersionStore


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


def test_weights_outside_the_folder_of_a_lone_onnx_are_not_read(tmp_path: Path) -> None:
    made = make_artifact(tmp_path / "artifact", labels=False).path / "generator.onnx"
    (tmp_path / "lone").mkdir()
    model = onnx.load(made)
    onnx.save(model, tmp_path / "lone" / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
    content = (tmp_path / "lone" / "a.onnx").read_bytes().replace(b"a.data", b"../key")
    (tmp_path / "lone" / "a.onnx").write_bytes(content)
    (tmp_path / "key").write_bytes(b"secret")
    with pytest.raises(ArtifactError, match="a link that leaves its folder"):
        start(tmp_path / "state", tmp_path / "lone" / "a.onnx")


class _Store:
    """Fails twice as a machine fails, then adopts."""

    def __init__(self, version: Version) -> None:
        self.current = version
        self.failures: list[Exception] = [OSError(28, "No space left on device"), ArtifactError("half copied")]
        self.adopted = 0

    async def adopt(self, source: Path) -> Version:
        if self.failures:
            raise self.failures.pop(0)
        self.adopted += 1
        return self.current


def test_the_watcher_outlives_any_failure_and_tries_again(places, monkeypatch) -> None:
    source, state = places
    opened, version, _ = start(state, source)
    monkeypatch.setattr("ganexport.serving.server.RETRY_FIRST", 0.02)

    async def watch() -> _Server:
        options = ServerOptions(reload=0.01)
        server = _Server(source, options, state, socket.socket())
        server.store = _Store(version)
        server.gateway = SimpleNamespace(refusal=None)
        server.log = Log(io.StringIO())
        server._seen = (0, 0, 0)  # something else lies there now
        watching = asyncio.create_task(server._watch_artifact())
        reasons = []
        for _ in range(500):
            await asyncio.sleep(0.01)
            if server.gateway.refusal not in (None, *reasons):
                reasons.append(server.gateway.refusal)
            if server.store.adopted:
                break
        await asyncio.sleep(0.1)
        assert not watching.done()
        assert reasons == ["OSError: [Errno 28] No space left on device", "half copied"]
        watching.cancel()
        return server

    server = asyncio.run(watch())
    assert server.store.adopted == 1  # and what was adopted is not adopted again
    assert server.gateway.refusal is None
    server.listener.close()
    stop(opened)


@pytest.mark.parametrize(
    ("replicas", "free", "each"), [(1, 1.0, 1.0), (2, 1.0, 0.5), (3, 2.0, 0.5), (2, 4.0, 1.0), (3, 1.9, 1 / 3)]
)
def test_replicas_share_the_gpus_there_are(replicas: int, free: float, each: float) -> None:
    assert gpu_share(replicas, free) == pytest.approx(each)


def test_without_a_free_gpu_nothing_waits_for_one() -> None:
    with pytest.raises(BackendUnavailableError, match="Ray has none free"):
        gpu_share(1, 0.0)


def test_a_numbered_gpu_becomes_the_only_one_that_is_seen(monkeypatch) -> None:
    def narrowed(device: str, **options) -> str | None:
        return _one_gpu(ServerOptions(engine=EngineSettings(device=device), **options)).engine.device

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert narrowed("cpu") == "cpu"
    assert narrowed("cuda") == "cuda"
    with pytest.raises(UsageError, match="shows 2 of the GPUs"):
        narrowed("cuda:2")
    with pytest.raises(UsageError, match="on a cluster write --device cuda"):
        narrowed("cuda:1", address="10.0.0.1:6379")
    assert narrowed("cuda:1") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
