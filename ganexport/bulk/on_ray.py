"""Shards on a Ray cluster, by Ray Data: each row of a dataset is a shard that one worker makes and writes.

The process that was started holds the folder's lock and lists the checksums, exactly as without a
cluster; the workers make whole shards, so what an interruption leaves is treated the same way too.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from ganexport.artifact import sha256_file
from ganexport.bulk.making import Ledger, ShardMaker
from ganexport.bulk.plan import JOB, Job, Progress
from ganexport.cluster import join, load_ray
from ganexport.errors import ArtifactError, BackendUnavailableError, GanExportError, MissingDependencyError, OutputError
from ganexport.runtime.base import first_line
from ganexport.runtime.generator import Generator, load

#: Blocks of the dataset at most: a block is what Ray tracks and tries again.
BLOCKS = 2000
#: Backends whose threads can be set.
_THREADED = ("onnxruntime", "openvino", "torchscript", "aoti")


def connect(address: str, threads: int | None) -> Any:
    """Join the cluster.

    Args:
        address: As in :func:`ganexport.cluster.join`.
        threads: Of each worker's engine.

    Returns:
        The package ``ray.data``.

    Raises:
        MissingDependencyError: Ray Data is not installed.
        BackendUnavailableError: There is no cluster.
    """
    ray = load_ray("--ray", "bulk")
    try:
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(
            f"--ray needs Ray Data, which misses {error.name}: pip install 'ganexport[bulk]'"
        ) from None
    if not ray.is_initialized():
        join(ray, address, {"OMP_NUM_THREADS": str(threads or 1), "RAY_USAGE_STATS_ENABLED": "0"})
    return ray.data


def make_on_ray(generator: Generator, ledger: Ledger, address: str, *, threads: int | None = None) -> Progress:
    """Make the missing shards on a cluster.

    Args:
        generator: The same that the workers load from its path; it says how to load it.
        ledger: Of the job; its folder and the generator's path are seen by every machine.
        address: Of the cluster.
        threads: Of each worker's engine; 1 when not given.

    Returns:
        The final state.

    Raises:
        OutputError, ArtifactError, BackendUnavailableError: What a worker says, with its machine's name.
    """
    data = connect(address, threads)
    import ray

    if not ledger.missing:
        return ledger.progress
    # Its remarks are about its own scheduling; what goes wrong is raised.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    cuda = generator.device != "cpu"
    cores = threads or 1
    arguments = {
        "folder": str(ledger.folder.absolute()),
        "job": ledger.job,
        "path": str(generator.path.absolute()),
        "backend": generator.backend,
        "device": "cuda" if cuda else "cpu",
        "precision": generator.file.precision if generator.file else None,
        "threads": cores if generator.backend in _THREADED and not cuda else None,
    }
    there = ray.cluster_resources()
    most = int(there.get("GPU", 0)) if cuda else int(there.get("CPU", 0)) // cores
    if most < 1:
        raise BackendUnavailableError(
            f"the Ray cluster at {address} has no machine with {'a GPU' if cuda else f'{cores} CPUs'} for a worker"
        )
    rows = [{"number": number} for number in ledger.missing]
    shards = data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS)).map(
        ShardWorker,
        fn_constructor_kwargs=arguments,
        num_cpus=cores,
        num_gpus=1 if cuda else 0,
        compute=data.ActorPoolStrategy(min_size=1, max_size=min(most, len(rows))),
    )
    try:
        for row in shards.iter_rows():
            ledger.complete(int(row["number"]), str(row["digest"]))
    except Exception as error:  # noqa: BLE001 - Ray wraps what a worker raised in classes made at run time
        raise _plain(error) from None
    return ledger.progress


class ShardWorker:
    """One of the cluster's workers: loads the generator once, then makes a shard a row.

    Args:
        folder: Of the job.
        job: What is made.
        path: Of the artifact or lone ONNX file.
        backend: As in :func:`ganexport.load`.
        device: As in :func:`ganexport.load`.
        precision: As in :func:`ganexport.load`.
        threads: Of the engine; None where it has none to set.
    """

    def __init__(
        self,
        folder: str,
        job: Job,
        path: str,
        backend: str,
        device: str,
        precision: str | None,
        threads: int | None,
    ) -> None:
        import msgspec

        host = socket.gethostname()
        # Another machine's folder of the same name would swallow its shards.
        described = Path(folder) / JOB
        if not described.is_file() or msgspec.json.decode(described.read_bytes(), type=Job) != job:
            raise OutputError(f"{folder}: the machine {host} does not see it; choose a folder that all machines share")
        if not Path(path).exists():
            raise ArtifactError(f"{path}: the machine {host} does not see it; put it where all machines do")
        settings = {"threads": threads} if threads else None
        generator = load(path, backend, device, precision=precision, settings=settings)
        engine = generator.file.sha256 if generator.file else sha256_file(Path(path))
        if (engine, generator.runtime) != (job.engine, job.runtime):
            raise BackendUnavailableError(
                f"the machine {host} runs {engine[:12]} on {generator.runtime}, the job was begun with "
                f"{job.engine[:12]} on {job.runtime}: other bytes would come out; use the same on all machines"
            )
        self.maker = ShardMaker(generator, Path(folder), job, workers=1)
        self.mark = f".{os.getpid()}-{secrets.token_hex(4)}"

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make one shard: ``{"number": 12}`` → ``{"number": 12, "digest": "…"}``."""
        number = int(row["number"])
        return {"number": number, "digest": self.maker.write(number, self.maker.submit(number), self.mark)}


def _plain(error: BaseException) -> BaseException:
    """The error of ours that Ray wrapped, or one line of what it says."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None) or seen.__cause__
        if isinstance(cause, GanExportError):
            # Ray may have rebuilt the exception; its class and text are what counts.
            return cause
        seen = cause
    return BackendUnavailableError(f"Ray could not make the shards: {first_line(error)}; the same command continues")
