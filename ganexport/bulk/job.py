"""Generate any number of samples into shards: streaming, resumable, every shard with its checksum.

The folder holds ``job.json`` (what is being made, written first), ``SHA256SUMS`` (the shards that are
complete; ``sha256sum -c`` reads it) and the shards. A shard appears under its name when it is
whole, and counts when its checksum is listed; whatever an interruption left beyond that is made
again. The seed contract makes that the same samples, so nothing is lost, doubled or different.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ganexport.artifact import sha256_file, write_atomic, writing
from ganexport.bulk.making import Ledger, ShardMaker, make_here
from ganexport.bulk.plan import JOB, SCHEMA_VERSION, Job, Progress, shard_entry, shard_name
from ganexport.bulk.shards import CHECKSUMS, FORMATS, require_parquet
from ganexport.environment import usable_cores
from ganexport.errors import OutputError, UsageError, unknown_name
from ganexport.runtime._images import image_tensor
from ganexport.runtime.generator import Generator
from ganexport.seeding import batched
from ganexport.spec import spec_to_json

LOCK = ".lock"
#: Most shards of a job: as many as keep their names in order.
SHARDS = 1_000_000


def generate_bulk(
    generator: Generator,
    destination: str | os.PathLike[str],
    n: int,
    *,
    seed: int = 0,
    start: int = 0,
    format: str = "png",  # noqa: A002 - the field's word
    labels: int | None = None,
    truncation: float | None = None,
    batch_size: int | None = None,
    shard_size: int | None = None,
    sizes: Mapping[str, int] | None = None,
    workers: int | None = None,
    address: str | None = None,
    threads: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Make samples start .. start + n - 1 of a seed, as shards in a folder; continue where an earlier call stopped.

    Args:
        generator: What makes them.
        destination: The folder; it is made, or holds the same job unfinished.
        n: How many samples.
        seed: Their seed.
        start: Number of the first.
        format: "png" (a folder a shard), "npz" (arrays; also for outputs that are no images),
            "webdataset" (tar) or "parquet".
        labels: One class for all; random ones when not given.
        truncation: See :func:`ganexport.latents`.
        batch_size: Samples an engine call; the generator's optimum when not given.
        shard_size: Samples a shard.
        sizes: Sizes of symbolic dimensions other than batch.
        workers: Encoding threads beside the engine; the number of usable cores when not given.
        address: Of a running Ray cluster whose machines all see the folder and the generator's file under
            the same paths; each shard is then made by one of its workers. None makes them here.
        threads: Of the engine in each of the cluster's workers; 1 when not given.
        on_progress: Called after every shard.

    Returns:
        The final state.

    Raises:
        UsageError: Arguments out of range.
        OutputError: The folder holds something else, another job, or is being written by another
            process; or it cannot be written.
        BackendUnavailableError: No cluster at that address, or its machines cannot make the same bytes.
        MissingDependencyError: Ray Data or pyarrow is not installed.
    """
    if format not in FORMATS:
        raise unknown_name("format", format, tuple(FORMATS))
    folder = Path(destination)
    kind = FORMATS[format]
    if kind.files:
        image_tensor(batched(generator.spec))
    if format == "parquet":
        require_parquet()
    asked: dict[str, Any] = {"seed": seed, "start": start, "labels": labels, "truncation": truncation}
    generator.batches(n, sizes, batch_size=batch_size, **asked)  # refuses what is out of range
    size = kind.shard_size if shard_size is None else shard_size
    if size < 1:
        raise UsageError(f"shard size is {size}, it must be at least 1")
    if n > size * SHARDS:
        raise UsageError(f"{n} samples in shards of {size} are more than {SHARDS:,} shards: use a larger --shard-size")
    job = _job(generator, n, format=format, shard_size=min(size, n), batch_size=batch_size, sizes=sizes, asked=asked)
    if address is not None:
        from ganexport.bulk.on_ray import connect

        connect(address, threads)
    with _opened(folder, job) as finished:
        ledger = Ledger(folder, job, finished, on_progress)
        if address is not None:
            from ganexport.bulk.on_ray import make_on_ray

            return make_on_ray(generator, ledger, address, threads=threads)
        return make_here(ShardMaker(generator, folder, job, workers or usable_cores()), ledger)


def _job(
    generator: Generator,
    n: int,
    *,
    format: str,  # noqa: A002
    shard_size: int,
    batch_size: int | None,
    sizes: Mapping[str, int] | None,
    asked: dict[str, Any],
) -> Job:
    batch = batched(generator.spec).batch
    optimum = batch.opt if batch else 1
    return Job(
        SCHEMA_VERSION,
        n,
        format=format,
        shard_size=shard_size,
        batch_size=min(batch_size or optimum, shard_size),
        engine=generator.file.sha256 if generator.file else sha256_file(generator.path),
        runtime=generator.runtime,
        spec_sha256=hashlib.sha256(spec_to_json(generator.spec).encode()).hexdigest(),
        sizes=dict(sizes or {}),
        **asked,
    )


@contextlib.contextmanager
def _opened(folder: Path, job: Job) -> Iterator[dict[str, str]]:
    """The folder, locked, with its job file; yields the checksums of the shards that are complete."""
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder}: a file is in the way; choose another output")
        if folder.is_dir() and not (folder / JOB).is_file() and not all(map(_is_passing, folder.iterdir())):
            raise OutputError(f"{folder}: not empty and without a {JOB}; choose another output")
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{folder}: another process is writing it; wait for it or stop it") from None
        if (folder / JOB).is_file():
            _refuse_another(folder, job)
        else:
            write_atomic(folder / JOB, msgspec.json.format(msgspec.json.encode(job), indent=2) + b"\n")
        yield _finished(folder, job)


def _refuse_another(folder: Path, job: Job) -> None:
    try:
        there = msgspec.json.decode((folder / JOB).read_bytes(), type=Job)
    except (OSError, msgspec.DecodeError) as error:
        raise OutputError(f"{folder / JOB}: cannot be read: {error}; choose another output") from None
    for name in Job.__struct_fields__:
        before, now = getattr(there, name), getattr(job, name)
        if before != now:
            raise OutputError(
                f"{folder}: holds another job ({name} is {before!r} there, {now!r} here); repeat that one's "
                "command to continue it, or choose another output"
            )


def _finished(folder: Path, job: Job) -> dict[str, str]:
    """Shards whose listed checksum is that of the file; the rest is removed, to be made again."""
    listed: dict[str, str] = {}
    sums = folder / CHECKSUMS
    if sums.is_file():
        for line in sums.read_text(errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            listed[name] = digest
    kept: dict[str, str] = {}
    for number in range(job.shards):
        name = shard_name(number, FORMATS[job.format])
        entry = shard_entry(number, job)
        path = folder / name
        if entry in listed and _intact(folder / entry, listed[entry], job.format):
            kept[entry] = listed[entry]
        elif path.exists():
            _remove(path)
    for path in folder.iterdir():
        if _is_passing(path) and path.name != LOCK:
            _remove(path)
    return kept


def _is_passing(path: Path) -> bool:
    """Whether a kill in the middle of writing may have left it: our hidden files, before they get their names."""
    return path.name == LOCK or path.name.startswith((".shard-", f".{JOB}.", f".{CHECKSUMS}."))


def _intact(path: Path, digest: str, format: str) -> bool:  # noqa: A002
    if not path.is_file() or sha256_file(path) != digest:
        return False
    if format != "png":
        return True
    for line in path.read_text().splitlines():
        wanted, _, name = line.partition("  ")
        member = path.parent / name
        if not member.is_file() or sha256_file(member) != wanted:
            return False
    return True


def _remove(path: Path) -> None:
    with writing(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
