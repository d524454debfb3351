"""Versions across restarts: what served goes on to serve, whatever lies at the artifact's path by then."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from serving_helpers import make_artifact

from ganexport.errors import ArtifactError, GanExportError, OutputError, UsageError
from ganexport.serving.engine import EngineSettings
from ganexport.serving.loading import Checked, check
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
