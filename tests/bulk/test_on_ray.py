"""Shards made by two workers of a real Ray cluster on this machine: the same bytes as without one."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from test_job import content

import ganexport
from ganexport.artifact import Artifact
from ganexport.bulk.job import generate_bulk
from ganexport.bulk.on_ray import ShardWorker, _plain
from ganexport.bulk.plan import Job
from ganexport.errors import GanExportError, OutputError

sys.path.insert(0, str(Path(__file__).parent.parent / "runtime"))
import tiny_generators

pytest.importorskip("ray.data", reason="the extra 'bulk' is not installed")

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(ganexport.__file__).parent.parent),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else a busy machine starves them
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
    "RAY_raylet_start_wait_time_s": "200",
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_generators.make_artifact(
        tmp_path_factory.mktemp("bulk") / "tiny",
        tiny_generators.image_spec(1, classes=10),
        tiny_generators.image_model(1, classes=10),
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster of this machine alone, with two CPUs, which is two workers."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name in ENVIRONMENT:
            patch.setenv(name, ENVIRONMENT[name])
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False,
            logging_level="ERROR",
        )  # fmt: skip
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()


def generate(artifact: Artifact, folder: Path, address: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ganexport", "generate", str(artifact.path), "--ray", address, "-o", str(folder)]
    environment = ENVIRONMENT | {"RAY_AUTH_MODE": "token"}  # a cluster that ray.init starts wants its token
    return subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_same_bytes_and_resumed_after_sigkill(artifact: Artifact, cluster: str, tmp_path: Path) -> None:
    with ganexport.load(artifact.path, settings={"threads": 1}) as generator:
        generate_bulk(generator, tmp_path / "here", 2000, seed=3, start=7, format="png", shard_size=100)
    options = ("-n", "2000", "--seed", "3", "--start", "7", "--format", "png", "--shard-size", "100")
    process = generate(artifact, tmp_path / "there", cluster, *options)
    deadline = time.monotonic() + 540
    while process.poll() is None and not list((tmp_path / "there").glob("shard-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = generate(artifact, tmp_path / "there", cluster, *options)
    printed, remarks = process.communicate(timeout=540)
    assert process.returncode == 0, remarks
    assert printed.startswith("2000 pictures in")
    assert content(tmp_path / "there") == content(tmp_path / "here")
    assert not list((tmp_path / "there").glob(".shard-*"))


def test_what_a_worker_cannot_do_is_one_line(artifact: Artifact, cluster: str, tmp_path: Path) -> None:
    options = ("-n", "20", "--format", "npz", "--shard-size", "10", "--threads", "3")
    process = generate(artifact, tmp_path / "out", cluster, *options)
    remarks = process.communicate(timeout=540)[1]
    assert process.returncode == 2
    assert "has no machine with 3 CPUs for a worker" in remarks.splitlines()[-1]
    assert "Traceback" not in remarks


def test_no_cluster_is_one_line(artifact: Artifact, tmp_path: Path) -> None:
    process = generate(artifact, tmp_path / "out", "127.0.0.1:9", "-n", "20", "--format", "npz")
    remarks = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert "no Ray cluster answers at 127.0.0.1:9" in remarks.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_ray_without_shards_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    process = generate(artifact, tmp_path / "grid.png", "127.0.0.1:9", "-n", "20")
    assert process.communicate(timeout=120)[1].strip().endswith("--ray needs --format: a cluster makes shards")
    assert process.returncode == 2


def test_a_worker_that_would_make_other_bytes_refuses(artifact: Artifact, tmp_path: Path) -> None:
    with ganexport.load(artifact.path, "onnxruntime", settings={"threads": 1}) as generator:
        generate_bulk(generator, tmp_path / "out", 20, format="npz", shard_size=10)
    job = msgspec.json.decode((tmp_path / "out/job.json").read_bytes(), type=Job)
    common = {"path": str(artifact.path), "backend": "onnxruntime", "device": "cpu", "precision": None, "threads": 1}
    worker = ShardWorker(folder=str(tmp_path / "out"), job=job, **common)
    before = content(tmp_path / "out")
    assert worker({"number": 1})["digest"] == before["shard-000001.npz"]
    assert content(tmp_path / "out") == before  # a shard that is there already is replaced by its equal
    for change, says in (
        ({"folder": str(tmp_path)}, "does not see it; choose a folder that all machines share"),
        ({"path": str(tmp_path / "none")}, "does not see it; put it where all machines do"),
        ({"backend": "openvino"}, "other bytes would come out"),
    ):
        with pytest.raises(GanExportError, match=says):
            ShardWorker(**{"folder": str(tmp_path / "out"), "job": job, **common, **change})


def test_what_a_worker_raises_arrives_as_it_was(cluster: str) -> None:
    import ray

    @ray.remote
    def full() -> None:
        raise OutputError("/shared: the disk is full")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(full.remote())
    plain = _plain(caught.value)
    assert isinstance(plain, OutputError)
    assert str(plain) == "/shared: the disk is full"
    assert str(_plain(RuntimeError("a\nb"))) == "Ray could not make the shards: a; the same command continues"
