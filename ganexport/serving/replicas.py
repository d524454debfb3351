"""Replicas of the engine on Ray Serve: placed, watched and restarted by it, on one machine or a cluster."""

from __future__ import annotations

import logging
import math
import os
import re
from typing import Any

from ganexport.cluster import QUIET, TRANSPORT, join, load_serve
from ganexport.environment import usable_cores
from ganexport.errors import BackendUnavailableError
from ganexport.serving.drawing import Job
from ganexport.serving.engine import Answer, Engine, EngineSettings
from ganexport.serving.gateway import ReplicaLostError
from ganexport.serving.loading import python_path
from ganexport.serving.metrics import Metrics
from ganexport.serving.versions import Version

#: Names in Ray Serve.
APPLICATION, DEPLOYMENT = "ganexport", "engine"
#: A sample is a function of its seed, so a request whose replica died is simply sent again.
ATTEMPTS = 3
#: Object store of the embedded Ray: answers in flight, a few MB each.
OBJECT_STORE_BYTES = 256 << 20
#: Ray places what fits within milliseconds, and waits without end for what does not.
PLACEMENT_SECONDS = 30.0


class RayReplicas:
    """A Ray Serve application of :class:`Engine`.

    Args:
        settings: Of each engine; the device "cuda" gives each a GPU, or a share of one where there are fewer.
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
        self._ray, self._serve = load_serve()
        # Its remarks are not JSON; what matters of them is an error here.
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        _connect(self._ray, address, replicas, settings)
        try:
            gpus = gpu_share(self._ray, replicas) if settings.device == "cuda" else 0.0
        except BackendUnavailableError:
            self._ray.shutdown()
            raise
        self._handle = self._start(settings, version, replicas, gpus)

    def _start(self, settings: EngineSettings, version: Version, replicas: int, gpus: float) -> Any:
        self._serve.start(
            proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False}
        )
        deployment: Any = self._serve.deployment(
            Engine,
            name=DEPLOYMENT,
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
            return self._serve.run(app, name=APPLICATION, route_prefix=None)
        except RuntimeError as error:
            reason = self._reason() or str(error).strip().splitlines()[-1]
            self.close()
            raise BackendUnavailableError(f"the replicas did not start: {reason[:500]}") from None

    def _reason(self) -> str:
        """The last line of what a replica raised as it started, which Ray's own error does not say."""
        applications = self._serve.status().applications
        message = applications[APPLICATION].deployments[DEPLOYMENT].message if APPLICATION in applications else ""
        last = message.strip().rpartition("\n")[2]
        return re.sub(r"^ganexport\.errors\.\w+: ", "", last)

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
        self._serve.delete(APPLICATION)
        if self._embedded:
            self._serve.shutdown()
        self._ray.shutdown()


def gpu_share(ray: Any, replicas: int) -> float:
    """GPUs that each replica asks Ray for: one, or an equal share of those that are free.

    Raises:
        BackendUnavailableError: That many do not fit; Ray would wait for them without end.
    """
    total, free = (found.get("GPU", 0.0) for found in (ray.cluster_resources(), ray.available_resources()))
    if whole := int(free):
        share = 1.0 / math.ceil(replicas / whole)
        # What is free may be parts of several GPUs: only Ray knows whether it fits.
        group = ray.util.placement_group([{"GPU": share}] * replicas)
        fits = group.wait(PLACEMENT_SECONDS)
        ray.util.remove_placement_group(group)
        if fits:
            return share
    raise BackendUnavailableError(
        f"the generator runs on a GPU and of the {total:g} that Ray has none is free: "
        "free one, start Ray where there is one, or --device cpu"
    )


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
