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
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ganexport.artifact import sha256_file, write_atomic, writing
from ganexport.bulk import png
from ganexport.bulk.shards import CHECKSUMS, FORMATS, Format, Samples, join, require_parquet
from ganexport.errors import OutputError, UsageError, unknown_name
from ganexport.runtime._images import image_tensor, to_uint8
from ganexport.runtime.generator import Batch, Generator
from ganexport.seeding import batched
from ganexport.spec import BATCH, Label, OneHot, spec_to_json

JOB = "job.json"
LOCK = ".lock"
SCHEMA_VERSION = 1


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a folder of shards holds; the same job resumed gives the same bytes.

    Attributes:
        schema_version: :data:`SCHEMA_VERSION` of the writer.
        n: Samples in all.
        seed: Their seed.
        start: Number of the first.
        format: Key of :data:`ganexport.bulk.shards.FORMATS`.
        shard_size: Samples a shard; the last may be smaller.
        batch_size: Samples an engine call.
        engine: sha256 of the file that made them.
        runtime: Library, version and device class that ran it: another one rounds differently.
        spec_sha256: Of the generator's spec.
        labels: Class asked for; None for random ones.
        truncation: As asked.
        sizes: Of symbolic dimensions, as asked.
    """

    schema_version: int
    n: int
    seed: int
    start: int
    format: str
    shard_size: int
    batch_size: int
    engine: str
    runtime: str
    spec_sha256: str
    labels: int | None = None
    truncation: float | None = None
    sizes: dict[str, int] = {}

    @property
    def shards(self) -> int:
        """How many there are in all."""
        return -(-self.n // self.shard_size)


class Progress(msgspec.Struct, frozen=True):
    """Where a job stands.

    Attributes:
        done: Samples in complete shards.
        total: Samples in all.
        rate: Samples a second since this process began; 0 before the first shard.
        eta: Seconds that remain at that rate; None before the first shard.
    """

    done: int
    total: int
    rate: float = 0.0
    eta: float | None = None


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
        on_progress: Called after every shard.

    Returns:
        The final state.

    Raises:
        UsageError: Arguments out of range.
        OutputError: The folder holds something else, another job, or is being written by another
            process; or it cannot be written.
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
    size = shard_size or kind.shard_size
    if size < 1:
        raise UsageError(f"shard size is {size}, it must be at least 1")
    job = _job(generator, n, format=format, shard_size=min(size, n), batch_size=batch_size, sizes=sizes, asked=asked)
    with _opened(folder, job) as finished:
        run = _Run(generator, folder, job, workers=workers or _cores(), on_progress=on_progress)
        return run.run(finished)


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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        entry = f"{name}/{CHECKSUMS}" if job.format == "png" else name
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


def shard_name(number: int, kind: Format) -> str:
    """``shard-000012.tar``."""
    return f"shard-{number:06d}{kind.suffix}"


class _Run:
    """One process's work on a job: the engine in this thread, encoding in others, writing in one more."""

    def __init__(
        self,
        generator: Generator,
        folder: Path,
        job: Job,
        *,
        workers: int,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.generator, self.folder, self.job, self.kind = generator, folder, job, FORMATS[job.format]
        self.workers = workers
        self.on_progress = on_progress or (lambda _: None)
        self.spec = batched(generator.spec)
        self.label_names = [t.name for t in self.spec.inputs if isinstance(t.sampler, Label | OneHot)]
        # Checked already for formats of pictures; npz keeps arrays of outputs that are none.
        image = self.spec.image_output
        self.image = image if image is not None and (image.dtype == "uint8" or image.range) else None
        self.finished: dict[str, str] = {}
        self.progress = Progress(0, job.n)
        # Batches that wait for an encoder: bounds memory when encoding is the slower half.
        self.slots = threading.BoundedSemaphore(2 * workers)

    def run(self, finished: dict[str, str]) -> Progress:
        """Make the shards that are missing."""
        self.finished = dict(finished)
        missing = [n for n in range(self.job.shards) if self._entry(n) not in finished]
        before = sum(self._size(n) for n in range(self.job.shards)) - sum(map(self._size, missing))
        self._advance(before, 0.0)
        begun = time.monotonic()
        with ThreadPoolExecutor(self.workers, "encode") as pool, ThreadPoolExecutor(1, "write") as writer:
            writes: deque[Future[None]] = deque()
            try:
                for number in missing:
                    parts = self._submit(number, pool)
                    writes.append(writer.submit(self._complete, number, parts, begun, before))
                    # One shard is written while the next is made; no more are held in memory.
                    if len(writes) > 1:
                        writes.popleft().result()
                while writes:
                    writes.popleft().result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                writer.shutdown(wait=False, cancel_futures=True)
                raise
        return self.progress

    def _advance(self, done: int, rate: float) -> None:
        eta = (self.job.n - done) / rate if rate else None
        self.progress = Progress(done, self.job.n, rate, eta)
        self.on_progress(self.progress)

    def _size(self, number: int) -> int:
        return min(self.job.shard_size, self.job.n - number * self.job.shard_size)

    def _entry(self, number: int) -> str:
        name = shard_name(number, self.kind)
        return f"{name}/{CHECKSUMS}" if self.job.format == "png" else name

    def _submit(self, number: int, pool: ThreadPoolExecutor) -> list[Future[Samples]]:
        """Run the engine for one shard; batches are cut the same way whether or not the job was interrupted."""
        job = self.job
        begin = job.start + number * job.shard_size
        batches = self.generator.batches(
            self._size(number),
            job.sizes,
            seed=job.seed,
            start=begin,
            labels=job.labels,
            truncation=job.truncation,
            batch_size=min(job.batch_size, self._size(number)),
        )
        parts: list[Future[Samples]] = []
        for batch in batches:
            self.slots.acquire()
            future = pool.submit(self._encode, begin, batch)
            future.add_done_callback(lambda _: self.slots.release())
            parts.append(future)
        return parts

    def _complete(self, number: int, parts: list[Future[Samples]], begun: float, before: int) -> None:
        """Write one shard and list its checksum, which is what makes it count."""
        self.finished[self._entry(number)] = self._write(number, join([part.result() for part in parts]))
        lines = "".join(f"{self.finished[name]}  {name}\n" for name in sorted(self.finished))
        write_atomic(self.folder / CHECKSUMS, lines.encode())
        done = self.progress.done + self._size(number)
        self._advance(done, (done - before) / max(time.monotonic() - begun, 1e-9))

    def _encode(self, begin: int, batch: Batch) -> Samples:
        indices = range(begin + batch.begin, begin + batch.begin + batch.size)
        labels = {name: self._classes(name, batch.inputs[name]) for name in self.label_names}
        if self.image is not None:
            pictures = to_uint8(batch.outputs[self.image.name], self.image)
            if self.kind.files:
                return Samples(indices, self.job.seed, labels, png.encode(pictures), {})
            return Samples(indices, self.job.seed, labels, [], {"images": pictures})
        arrays = {
            tensor.name: np.moveaxis(batch.outputs[tensor.name], tensor.shape.index(BATCH), 0)
            for tensor in self.spec.outputs
            if BATCH in tensor.shape
        }
        return Samples(indices, self.job.seed, labels, [], arrays)

    def _classes(self, name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        tensor = self.spec.input(name)
        moved = np.moveaxis(values, tensor.shape.index(BATCH), 0) if BATCH in tensor.shape else values[None]
        if isinstance(tensor.sampler, OneHot):
            moved = moved.argmax(axis=-1)
        return moved.reshape(len(moved), -1)[:, 0].astype(np.int64)

    def _write(self, number: int, samples: Samples) -> str:
        name = shard_name(number, self.kind)
        hidden = self.folder / f".{name}"
        with writing(self.folder / name):
            try:
                digest = self.kind.write(hidden, samples)
                hidden.rename(self.folder / name)
            except BaseException:
                if hidden.is_dir():
                    shutil.rmtree(hidden, ignore_errors=True)
                else:
                    hidden.unlink(missing_ok=True)
                raise
        return digest
