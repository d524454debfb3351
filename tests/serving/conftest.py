"""A gateway in this process on a real socket, and one real `ganexport serve` for the whole session."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.serve", reason="the extra 'serve' is not installed")

from serving_helpers import InProcess, make_artifact

from ganexport.serving.admission import Admission
from ganexport.serving.engine import EngineSettings
from ganexport.serving.envelope import Envelope
from ganexport.serving.gateway import Gateway, make_app
from ganexport.serving.loading import check, python_path
from ganexport.serving.metrics import Log, Metrics
from ganexport.serving.protocol import GuardedProtocol
from ganexport.serving.versions import VersionStore

ROOT = Path(__file__).parents[2]


class Reply:
    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def array(self) -> np.ndarray:
        return np.load(io.BytesIO(self.body), allow_pickle=False)


class Client:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def request(self, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60) -> Reply:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"content-type": "application/json"} | (headers or {})
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return Reply(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.headers, error.read())

    def generate(self, **body: Any) -> Reply:
        return self.request("/v1/generate", body)


class Local:
    """A gateway with an engine in this process, on a socket, in a thread."""

    def __init__(self, artifact: Path, state: Path, *, replicas: Any = None, limit: int = 64, **limits: Any) -> None:
        self.log = io.StringIO()
        self.settings = EngineSettings(max_batch=8, max_delay=0.002)
        self.metrics = Metrics()
        self.admission = Admission(limit, self.metrics)

        async def checked(path: Path) -> Any:
            return check(path, self.settings)

        self.store = VersionStore(state, checked)
        self.gateway_arguments = {"max_count": 32, "timeout": limits.pop("timeout", 20.0)}
        self.limits = limits
        self.replicas = replicas or InProcess(self.settings)
        self.artifact = artifact
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(30), "the gateway did not start"

    async def _serve(self) -> None:
        import socket

        import uvicorn

        await self.store.adopt(self.artifact)
        log = Log(self.log)
        self.gateway = Gateway(self.store, self.replicas, self.admission, self.metrics, log, **self.gateway_arguments)
        app = Envelope(make_app(self.gateway), admission=self.admission, metrics=self.metrics, log=log, **self.limits)
        protocol = type("Quick", (GuardedProtocol,), {"head_seconds": 1.0})
        config = uvicorn.Config(
            app, http=protocol, ws="none", lifespan="off", log_config=None, log_level="critical", server_header=False
        )
        self.server = uvicorn.Server(config)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        watch = asyncio.create_task(self.gateway.watch_replicas(0.05))
        self.loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self.server._serve([listener]))
        while not self.server.started:
            await asyncio.sleep(0.01)
        self._started.set()
        await serving
        watch.cancel()

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    @property
    def client(self) -> Client:
        return Client(f"http://127.0.0.1:{self.port}")

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join(20)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("artifacts") / "tiny").path


@pytest.fixture(scope="module")
def local(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    server = Local(artifact, tmp_path_factory.mktemp("state"), body_limit=65536, body_seconds=1.0)
    yield server
    server.close()


@pytest.fixture
def make_local(tmp_path: Path) -> Iterator[Callable[..., Local]]:
    made: list[Local] = []

    def make(artifact: Path, **options: Any) -> Local:
        made.append(Local(artifact, tmp_path / f"state{len(made)}", **options))
        return made[-1]

    yield make
    for server in made:
        server.close()


class Served:
    """A real ``ganexport serve`` process."""

    def __init__(self, artifact: Path, folder: Path, *options: str, limit: float = 120.0) -> None:
        self.log_path = folder / "serve.log"
        self._log = self.log_path.open("wb")
        command = [sys.executable, "-m", "ganexport", "serve", str(artifact), "--port", "0", *options]
        environment = os.environ | {"PYTHONPATH": python_path()}
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, cwd=folder, env=environment)
        self.client = Client(self.wait_for("serving", limit)["url"])
        deadline = time.monotonic() + limit
        while self.client.request("/readyz").status != 200:
            assert time.monotonic() < deadline, self.log_path.read_text()
            time.sleep(0.1)

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log_path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def wait_for(self, name: str, limit: float = 60.0, count: int = 1) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        while len(found := self.events(name)) < count:
            assert self.process.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline, f"no {name!r} in:\n{self.log_path.read_text()}"
            time.sleep(0.05)
        return found[count - 1]

    def replica_pids(self) -> list[int]:
        """Of the replicas that this very server started."""
        found = []
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if b"ray::ServeReplica:ganexport:engine" in status.read_bytes() and self._ours(int(status.parent.name)):
                    found.append(int(status.parent.name))
            except OSError:
                continue
        return found

    def _ours(self, pid: int) -> bool:
        while pid > 1:
            if pid == self.process.pid:
                return True
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return False

    def stop(self, limit: float = 60.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(limit)
        finally:
            self._log.close()


@pytest.fixture(scope="session")
def served_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("served") / "tiny").path


@pytest.fixture(scope="session")
def served(served_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(
        served_artifact, tmp_path_factory.mktemp("run"), "--replicas", "2", "--reload", "0.3", "--drain-delay", "1"
    )
    yield server
    server.stop()
