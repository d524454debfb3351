"""Where replicas run: GPUs that Ray has or has not, without a GPU here, which Ray takes on trust."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ganexport.cluster import QUIET, load_serve
from ganexport.errors import BackendUnavailableError, UsageError
from ganexport.serving.engine import EngineSettings
from ganexport.serving.loading import check
from ganexport.serving.metrics import Metrics
from ganexport.serving.replicas import RayReplicas, gpu_share
from ganexport.serving.server import ServerOptions, _on, _one_gpu
from ganexport.serving.versions import Version


@pytest.fixture
def three_gpus() -> Iterator[Any]:
    ray, _ = load_serve()
    ray.init(num_cpus=1, num_gpus=3, include_dashboard=False, object_store_memory=100 << 20, **QUIET)
    yield ray
    ray.shutdown()


def wait_for_all(ray: Any) -> None:
    """Ray's count of what is free lags behind what it gave back."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("GPU") != 3.0:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_replicas_get_a_gpu_or_share_what_is_free(three_gpus: Any, monkeypatch) -> None:
    ray = three_gpus
    shares = {}
    for replicas in (2, 3, 4, 6, 7):
        shares[replicas] = gpu_share(ray, replicas)
        wait_for_all(ray)
    assert shares == {2: 1.0, 3: 1.0, 4: 0.5, 6: 0.5, 7: pytest.approx(1 / 3)}

    @ray.remote(num_cpus=0, num_gpus=shares[7])
    def seen() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert ray.get(seen.remote()) in ("0", "1", "2")  # one alone, whatever its share: "cuda" means it
    wait_for_all(ray)
    others = ray.util.placement_group([{"GPU": 0.6}] * 3)
    assert others.wait(10)
    monkeypatch.setattr("ganexport.serving.replicas.PLACEMENT_SECONDS", 1.0)
    # 1.2 are free, and not one whole: a replica would wait for it without end.
    with pytest.raises(BackendUnavailableError, match="of the 3 that Ray has none is free"):
        gpu_share(ray, 1)


@pytest.mark.slow
def test_replicas_that_cannot_start_say_why_in_one_line(artifact: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')
    version = Version("0" * 16, str(artifact), 0.0, check(artifact, EngineSettings()))
    says = r"^the replicas did not start: .*nothing in it runs here: .*device cuda"
    with pytest.raises(BackendUnavailableError, match=says) as refused:
        RayReplicas(EngineSettings(device="cuda"), version, 2, None, Metrics())
    assert "\n" not in str(refused.value)
    assert not load_serve()[0].is_initialized()


def test_a_numbered_gpu_becomes_the_only_one_that_is_seen(monkeypatch) -> None:
    def narrowed(device: str, **options) -> str | None:
        return _one_gpu(ServerOptions(engine=EngineSettings(device=device), **options)).engine.device

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match="shows 0 of the GPUs"):
        narrowed("cuda:0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert narrowed("cpu") == "cpu"
    assert narrowed("cuda") == "cuda"
    with pytest.raises(UsageError, match="shows 2 of the GPUs"):
        narrowed("cuda:2")
    with pytest.raises(UsageError, match="on a cluster write --device cuda"):
        narrowed("cuda:1", address="10.0.0.1:6379")
    assert narrowed("cuda:1") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert narrowed("cuda:1") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_later_versions_stay_on_the_device_of_the_first() -> None:
    assert _on(ServerOptions(), "cuda:0").engine.device == "cuda"
    assert _on(ServerOptions(), "cpu").engine.device == "cpu"
