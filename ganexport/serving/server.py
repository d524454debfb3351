"""A server's life: check the artifact, start the replicas, answer, reload, roll back, drain, stop."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from ganexport.cluster import load_serve
from ganexport.environment import usable_cores
from ganexport.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, GanExportError, MissingDependencyError, UsageError
from ganexport.serving.engine import EngineSettings

#: Seconds until a refused artifact is looked at again, doubled each time up to the most.
RETRY_FIRST = 5.0
RETRY_MOST = 300.0


def useful_pending(options: ServerOptions) -> int:
    """Samples that keep every replica busy: its streams' batches, and what gathers until one of them ends.

    One stream is empty until the next batch is there, so a whole one gathers. Of several, one ends while the others
    run, and half a batch that gathers is enough: more would only wait.
    """
    engine = options.engine
    gathering = engine.max_batch if engine.streams == 1 else -(-engine.max_batch // 2)
    return options.replicas * (engine.streams * engine.max_batch + gathering)


class ServerOptions(msgspec.Struct, frozen=True):
    """How to serve.

    Attributes:
        engine: Of each replica.
        host: Address to listen on.
        port: 0 for any free one.
        replicas: Processes that generate.
        address: Of a running Ray cluster; None starts Ray on this machine.
        max_count: Most samples in a request.
        max_pending: Most samples admitted at a time; None for :func:`useful_pending`.
        timeout: Seconds for a request, waiting included.
        drain: Seconds for the requests under way after SIGTERM.
        drain_delay: Seconds from SIGTERM during which /readyz says 503 while requests are still answered, so
            that load balancers turn away before the port closes.
        reload: Seconds between looks at the artifact; 0 only looks on SIGHUP.
        state: Folder for the versions; None for a temporary one.
    """

    engine: EngineSettings = EngineSettings()
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    address: str | None = None
    max_count: int = 64
    max_pending: int | None = None
    timeout: float = 30.0
    drain: float = 30.0
    drain_delay: float = 0.0
    reload: float = 2.0
    state: Path | None = None


def serve(artifact: Path, options: ServerOptions) -> int:
    """Serve until SIGINT or SIGTERM, then drain.

    Args:
        artifact: An artifact's folder or a lone .onnx; watched for newer versions.
        options: How.

    Returns:
        130 after SIGINT, 143 after SIGTERM.

    Raises:
        GanExportError: The artifact cannot be served, the port is taken, or Ray is not installed.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"serving needs the package {error.name}: pip install 'ganexport[serve]'"
        ) from None
    load_serve()
    options = _one_gpu(_share_cores(options))
    state = options.state or Path(tempfile.mkdtemp(prefix="ganexport-serve-"))
    listener = _bind(options.host, options.port)
    try:
        return asyncio.run(_Server(artifact, options, state, listener).run())
    finally:
        listener.close()
        if options.state is None:
            shutil.rmtree(state, ignore_errors=True)


def _share_cores(options: ServerOptions) -> ServerOptions:
    """Replicas on one machine divide its cores instead of each taking all of them."""
    shares = options.replicas * options.engine.streams
    if options.engine.threads is not None or shares == 1 or options.address is not None:
        return options
    threads = max(1, usable_cores() // shares)
    return msgspec.structs.replace(options, engine=msgspec.structs.replace(options.engine, threads=threads))


def _one_gpu(options: ServerOptions) -> ServerOptions:
    """``cuda:1`` by showing this process and its children that GPU alone: Ray numbers what a replica sees from 0.

    Raises:
        UsageError: A number on a cluster, whose machines have GPUs of their own.
    """
    device = options.engine.device or ""
    if not device.startswith("cuda:"):
        return options
    if options.address is not None:
        raise UsageError(f"--device {device} names a GPU of one machine: on a cluster write --device cuda")
    number = device.removeprefix("cuda:")
    if not number.isdigit():
        raise UsageError(f"unknown device {device!r}: write cpu, cuda or cuda:1")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:  # empty, it hides them all
        visible = [name for name in shown.split(",") if name]
        if int(number) >= len(visible):
            raise UsageError(
                f"--device {device}: CUDA_VISIBLE_DEVICES shows {len(visible)} of the GPUs, numbered from 0"
            )
        number = visible[int(number)]
    os.environ["CUDA_VISIBLE_DEVICES"] = number
    return _on(options, "cuda")


def _on(options: ServerOptions, device: str) -> ServerOptions:
    """On that kind of device: what is chosen when the server starts holds for every version after."""
    engine = msgspec.structs.replace(options.engine, device=device.partition(":")[0])
    return msgspec.structs.replace(options, engine=engine)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"cannot listen on {host} port {port}: {reason}; choose another --port or --host") from None
    return listener


class _Server:
    def __init__(self, artifact: Path, options: ServerOptions, state: Path, listener: socket.socket) -> None:
        from ganexport.serving.admission import Admission
        from ganexport.serving.loading import check_apart
        from ganexport.serving.metrics import Log, Metrics
        from ganexport.serving.versions import VersionStore

        self.artifact, self.options, self.listener = artifact, options, listener
        self.log, self.metrics = Log(), Metrics()
        self.store = VersionStore(state, lambda path: check_apart(path, self.options.engine))
        pending = options.max_pending or useful_pending(options)
        self.admission = Admission(pending, self.metrics)
        self.stop = asyncio.Event()
        self.exit_code = 0
        self._reload_lock = asyncio.Lock()
        self._retry_at = math.inf
        self._retry_after = RETRY_FIRST

    async def run(self) -> int:
        """The whole life."""
        from ganexport.serving.gateway import Gateway
        from ganexport.serving.replicas import RayReplicas
        from ganexport.serving.versions import fingerprint

        self._seen = fingerprint(self.artifact)
        version, refusal = await self.store.start(self.artifact)
        self.metrics.serving(version.digest)
        if refusal is not None:
            self.metrics.reloads.labels("refused").inc()
            self.log("reload-refused", "error", reason=refusal, serving=version.digest)
        self.options = _on(self.options, version.checked.device)
        replicas = RayReplicas(self.options.engine, version, self.options.replicas, self.options.address, self.metrics)
        # Only now: starting Ray puts its own handler in place of whatever was there.
        self._catch_signals()
        try:
            self.gateway = Gateway(
                self.store,
                replicas,
                self.admission,
                self.metrics,
                self.log,
                max_count=self.options.max_count,
                timeout=self.options.timeout,
            )
            self.gateway.refusal = refusal
            await self._answer()
        finally:
            await asyncio.to_thread(replicas.close)
        self.log("stopped", pending=self.admission.pending)
        return self.exit_code

    async def _answer(self) -> None:
        server = self._uvicorn()
        helpers = [asyncio.create_task(self.gateway.watch_replicas()), asyncio.create_task(self._watch_artifact())]
        # uvicorn's serve() would take the signals for itself.
        serving = asyncio.create_task(server._serve([self.listener]))
        host, port = self.listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self.log("serving", url=f"http://{shown}:{port}/", version=self.store.current.digest, pid=os.getpid())
        stopping = asyncio.create_task(self.stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        self.admission.stopping = True
        if not serving.done() and self.options.drain_delay:
            self.log("stopping", pending=self.admission.pending)
            await asyncio.wait({serving}, timeout=self.options.drain_delay)
        self.admission.draining = True
        self.log("draining", pending=self.admission.pending)
        server.should_exit = True
        await serving
        for helper in (*helpers, stopping):
            helper.cancel()

    def _uvicorn(self) -> Any:
        import uvicorn

        from ganexport.serving.envelope import Envelope
        from ganexport.serving.gateway import make_app
        from ganexport.serving.protocol import GuardedProtocol

        app = Envelope(make_app(self.gateway), admission=self.admission, metrics=self.metrics, log=self.log)
        config = uvicorn.Config(
            app,
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(max(1, self.options.drain)),
        )
        return uvicorn.Server(config)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop, EXIT_TERMINATED)
        loop.add_signal_handler(signal.SIGINT, self._stop, EXIT_INTERRUPTED)
        self._tasks: set[asyncio.Task[None]] = set()
        loop.add_signal_handler(signal.SIGHUP, self._spawn, self._reload)
        loop.add_signal_handler(signal.SIGUSR2, self._spawn, self._roll_back)

    def _stop(self, exit_code: int) -> None:
        self.exit_code = self.exit_code or exit_code
        self.stop.set()

    def _spawn(self, action: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(action())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch_artifact(self) -> None:
        from ganexport.serving.versions import fingerprint

        while self.options.reload:
            await asyncio.sleep(self.options.reload)
            now = await asyncio.to_thread(fingerprint, self.artifact)
            # A missing artifact is one that is being replaced.
            if now is None:
                continue
            if now != self._seen:
                self._seen, self._retry_after = now, RETRY_FIRST
            elif time.monotonic() < self._retry_at:
                continue
            await self._reload()

    async def _reload(self) -> None:
        """Adopt what lies there now; a version that fails its check changes nothing."""
        async with self._reload_lock:
            before = self.store.current.digest
            try:
                version = await self.store.adopt(self.artifact)
            except Exception as error:  # noqa: BLE001 - whatever it is, what serves goes on, and so does the watching
                reason = str(error) if isinstance(error, GanExportError) else f"{type(error).__name__}: {error}"
                self.gateway.refusal = reason
                self.metrics.reloads.labels("refused").inc()
                self.log("reload-refused", "error", reason=reason, serving=before)
                # A full disk or a file still being copied passes, and leaves no trace at the artifact.
                self._retry_at = time.monotonic() + self._retry_after
                self._retry_after = min(2 * self._retry_after, RETRY_MOST)
                return
            self.gateway.refusal, self._retry_at, self._retry_after = None, math.inf, RETRY_FIRST
            self.metrics.reloads.labels("adopted").inc()
            self.metrics.serving(version.digest)
            self.log("reloaded", version=version.digest, before=before)

    async def _roll_back(self) -> None:
        async with self._reload_lock:
            before = self.store.current.digest
            try:
                version = self.store.roll_back()
            except GanExportError as error:
                self.log("roll-back-refused", "error", reason=str(error), serving=before)
                return
            self._retry_at = math.inf
            self.metrics.serving(version.digest)
            self.log("rolled-back", version=version.digest, before=before)
