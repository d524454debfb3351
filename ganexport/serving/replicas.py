"""Replicas of the engine on Ray Serve: placed, watched and restarted by it, on one machine or a cluster."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import msgspec

from ganexport.cluster import QUIET, TRANSPORT, join, load_serve
from ganexport.environment import usable_cores
from ganexport.errors import BackendUnavailableError
from ganexport.serving.drawing import Job
from ganexport.serving.engine import Answer, Engine, EngineSettings
from ganexport.serving.gateway import ReplicaLostError
from ganexport.serving.loading import python_path
from ganexport.serving.metrics import Metrics
from ganexport.serving.versions import Version

#: A sample is a function of its seed, so a request whose replica died is simply sent again.
ATTEMPTS = 3
#: Object store of the embedded Ray: answers in flight, a few MB each.
OBJECT_STORE_BYTES = 256 << 20


class RayReplicas:
    """A Ray Serve application of :class:`Engine`.

    Args:
        settings: Of each engine; "cuda" gives each replica a GPU, or a share of one where there are fewer.
        version: Loaded by every replica as it starts.
        replicas: How many.
        address: Of a running Ray cluster; None starts one inside this process's machine.
        metrics: Counts retries.

    Raises:
        BackendUnavailableError: Ray cannot be joined, has no GPU for what needs one, or its replicas do not start.
    """

    def __init__(
        self, settings: EngineSettings, version: Version, replicas: int, address: str | None, metrics: Metrics
    ) -> None:
        self._metrics = metrics
        self._embedded = address is None
        ray, serve = self._ray, self._serve = load_serve()
        # Its remarks are not JSON; what matters of them is an error here.
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        _connect(ray, address, replicas, settings)
        on_gpu = version.checked.device.startswith("cuda")
        gpus = gpu_share(replicas, ray.available_resources().get("GPU", 0.0)) if on_gpu else 0.0
        if on_gpu:  # Ray shows a replica its own GPU alone, as the first
            settings = msgspec.structs.replace(settings, device="cuda")
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        deployment: Any = serve.deployment(
            Engine,
            name="engine",
            num_replicas=replicas,
            # The gateway bounds what is pending; a replica must not refuse what was admitted.
            max_ongoing_requests=1024,
            graceful_shutdown_timeout_s=30,
            health_check_period_s=2,
            health_check_timeout_s=30,
            ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        )
        app = deployment.bind(settings, (version.digest, version.path))
        try:
            self._handle = serve.run(app, name="ganexport", route_prefix=None)
        except RuntimeError as error:
            self.close()
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
            raise BackendUnavailableError(f"the replicas did not start: {reason.strip()[:500]}") from None

    async def generate(self, version: Version, job: Job) -> Answer:
        """Have a replica answer; another one when it dies over it.

        Raises:
            ReplicaLostError: Every attempt's replica died.
        """
        errors = self._ray.exceptions
        for attempt in range(ATTEMPTS):
            try:
                answer: Answer = await self._handle.generate.remote(version.digest, version.path, job)
                return answer
            except (errors.RayActorError, errors.WorkerCrashedError, errors.ObjectLostError):
                self._metrics.retries.inc()
                if attempt == ATTEMPTS - 1:
                    break
        raise ReplicaLostError("the replicas that took this request died; it is not tried again")

    async def ping(self) -> bool:
        """Whether a replica answers."""
        return bool(await self._handle.ping.remote())

    def close(self) -> None:
        """Stop the replicas, and the embedded Ray."""
        self._serve.delete("ganexport")
        if self._embedded:
            self._serve.shutdown()
        self._ray.shutdown()


def gpu_share(replicas: int, free: float) -> float:
    """GPUs that each replica asks Ray for: one, or an equal share of those that are free.

    Raises:
        BackendUnavailableError: None is free; Ray would wait for one without end.
    """
    whole = int(free)
    if whole < 1:
        raise BackendUnavailableError(
            "the generator runs on a GPU and Ray has none free: free one, start Ray where there is one, or --device cpu"
        )
    return 1.0 if replicas <= whole else 1.0 / math.ceil(replicas / whole)


def _connect(ray: Any, address: str | None, replicas: int, settings: EngineSettings) -> None:
    # Stated thread counts are kept; otherwise Ray would pin each replica to one.
    threads = str(settings.threads or max(1, usable_cores() // (replicas * settings.streams)))
    variables = {"OMP_NUM_THREADS": threads, **{name: os.environ[name] for name in TRANSPORT}}
    if address is not None:
        join(ray, address, variables)
        return
    variables["PYTHONPATH"] = python_path()
    # Ray's own choice is 15: replicas would get what every other process of the machine leaves.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        runtime_env={"env_vars": variables},
        **QUIET,
    )
