"""The real command on Ray Serve: one server for the whole file, replicas that die, artifacts that change."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving_helpers import make_artifact

import ganexport
from ganexport.serving.loading import python_path


def keep_asking(served, seconds: float, statuses: list[int]) -> list[threading.Thread]:
    """Three clients that ask without a pause, each a batch of seeds of its own."""
    end = time.monotonic() + seconds

    def ask(seed: int) -> None:
        while time.monotonic() < end:
            try:
                statuses.append(served.client.generate(seed=seed, count=4, format="npy").status)
            except OSError:
                statuses.append(0)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    [thread.start() for thread in threads]
    return threads


def test_it_serves_what_python_makes(served, served_artifact: Path) -> None:
    reply = served.client.generate(seeds=[3, 4], labels=[0, 1], format="npy")
    with ganexport.load(served_artifact) as generator:
        np.testing.assert_array_equal(reply.array, generator.generate(seeds=[3, 4], labels=[0, 1]))
    image = np.asarray(Image.open(io.BytesIO(served.client.request("/v1/images/3?label=0").body)))
    np.testing.assert_array_equal(image, reply.array[0])


def test_replicas_run_at_the_niceness_of_the_command(served) -> None:
    """Ray's own choice would let every other process of the machine go first."""
    wanted = os.getpriority(os.PRIO_PROCESS, served.process.pid)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in served.replica_pids()] == [wanted] * 2


def test_kill_9_of_a_replica_is_not_seen_by_clients(served) -> None:
    statuses: list[int] = []
    pids = served.replica_pids()
    assert len(pids) == 2
    threads = keep_asking(served, 4.0, statuses)
    time.sleep(1.0)
    os.kill(pids[0], signal.SIGKILL)
    [thread.join() for thread in threads]
    assert set(statuses) <= {200, 429, 503}, statuses
    assert statuses.count(200) > 20
    deadline = time.monotonic() + 60
    while pids[0] in (now := served.replica_pids()) or len(now) < 2:
        assert time.monotonic() < deadline, f"the replica was not replaced: {now}"
        time.sleep(0.2)
    assert served.client.generate(seed=1).status == 200


def test_reload_refuse_and_roll_back(served, served_artifact: Path) -> None:
    before = served.client.generate(seed=1, format="npy")
    make_artifact(served_artifact, seed=1)
    served.wait_for("reloaded")
    after = served.client.generate(seed=1, format="npy")
    assert after.headers["x-ganexport-version"] != before.headers["x-ganexport-version"]
    assert (after.array != before.array).any()

    # A damaged file: the manifest says another hash. It is refused, and the old version goes on.
    (served_artifact / "generator.onnx").write_bytes(b"not an onnx file")
    manifest = served_artifact / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    refused = served.wait_for("reload-refused")
    assert "sha256" in refused["reason"]
    np.testing.assert_array_equal(served.client.generate(seed=1, format="npy").array, after.array)
    assert "sha256" in served.client.request("/v1/versions").json["refused"]

    served.process.send_signal(signal.SIGUSR2)
    served.wait_for("rolled-back")
    again = served.client.generate(seed=1, format="npy")
    assert again.headers["x-ganexport-version"] == before.headers["x-ganexport-version"]
    np.testing.assert_array_equal(again.array, before.array)

    shutil.rmtree(served_artifact)  # replicas have their own copies
    assert served.client.generate(seed=2).status == 200


def test_sigterm_under_load_loses_no_accepted_request(served) -> None:
    """The last test of this server: it ends it."""
    statuses: list[int] = []
    lost: list[str] = []
    end = time.monotonic() + 10

    def ask(seed: int) -> None:
        while time.monotonic() < end:
            try:
                statuses.append(served.client.generate(seed=seed, count=4, format="npy").status)
            except ConnectionRefusedError:
                return  # the port is closed: it was never accepted
            except OSError as error:
                if "refused" in str(error) or "reset" in str(error).lower():
                    # A connection that the kernel had taken and the server had not.
                    return
                lost.append(repr(error))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    [thread.start() for thread in threads]
    time.sleep(1.0)
    served.process.send_signal(signal.SIGTERM)
    served.wait_for("stopping")
    assert served.client.request("/readyz").status == 503  # load balancers turn away
    assert served.client.generate(seed=1).status in (200, 429)  # and what still comes is served
    assert served.stop() == 143
    [thread.join() for thread in threads]
    assert not lost
    assert set(statuses) <= {200, 429, 503}
    assert statuses.count(200) > 10
    # Every request that the log admitted was answered.
    assert served.events("draining")
    assert [event["pending"] for event in served.events("stopped")] == [0]
    assert not [event for event in served.events("request") if event["status"] in (499, 500)]


def test_a_cluster_that_is_not_there_is_one_line_at_once(artifact: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ganexport", "serve", str(artifact), "--port", "0", "--ray", "127.0.0.1:9"]
    environment = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=60, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: no Ray cluster answers at 127.0.0.1:9")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [([], "no such file or folder"), (["--port", "70000"], "70000"), (["--replicas", "0"], "replicas")],
)
def test_a_wrong_start_is_one_line_and_exit_code_2(tmp_path: Path, options: list[str], says: str) -> None:
    command = [sys.executable, "-m", "ganexport", "serve", str(tmp_path / "none"), *options]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env=os.environ | {"PYTHONPATH": python_path()},
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
