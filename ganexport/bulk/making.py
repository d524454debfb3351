"""Making shards: the engine, encoders beside it, a writer behind it, and the list of what is complete."""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ganexport.artifact import write_atomic, writing
from ganexport.bulk import png
from ganexport.bulk.plan import Job, Progress, shard_entry, shard_name, shard_samples
from ganexport.bulk.shards import CHECKSUMS, FORMATS, Samples, join
from ganexport.runtime._images import to_uint8
from ganexport.runtime.generator import Batch, Generator
from ganexport.seeding import batched
from ganexport.spec import BATCH, Label, OneHot


class Ledger:
    """Which shards are complete, and how fast they came.

    Args:
        folder: Of the job.
        job: What is made.
        finished: Checksums of the shards that were there already.
        on_progress: Called after every shard.
    """

    def __init__(
        self, folder: Path, job: Job, finished: dict[str, str], on_progress: Callable[[Progress], None] | None
    ) -> None:
        self.folder, self.job, self.finished = folder, job, dict(finished)
        self._on_progress = on_progress or (lambda _: None)
        self.missing = [n for n in range(job.shards) if shard_entry(n, job) not in finished]
        self._before = job.n - sum(shard_samples(n, job) for n in self.missing)
        self._begun = time.monotonic()
        self.progress = Progress(0, job.n)
        self._advance(self._before)

    def complete(self, number: int, digest: str) -> None:
        """List a shard's checksum, which is what makes it count."""
        self.finished[shard_entry(number, self.job)] = digest
        lines = "".join(f"{self.finished[name]}  {name}\n" for name in sorted(self.finished))
        write_atomic(self.folder / CHECKSUMS, lines.encode())
        self._advance(self.progress.done + shard_samples(number, self.job))

    def _advance(self, done: int) -> None:
        made = done - self._before
        rate = made / max(time.monotonic() - self._begun, 1e-9)
        self.progress = Progress(done, self.job.n, rate, (self.job.n - done) / rate if made else None)
        self._on_progress(self.progress)


class ShardMaker:
    """Makes shards: the engine in the calling thread, encoding in others.

    Args:
        generator: What makes the samples.
        folder: Where shards appear.
        job: What they hold.
        workers: Encoding threads.
    """

    def __init__(self, generator: Generator, folder: Path, job: Job, workers: int) -> None:
        self.generator, self.folder, self.job, self.kind = generator, folder, job, FORMATS[job.format]
        self.spec = batched(generator.spec)
        self.label_names = [t.name for t in self.spec.inputs if isinstance(t.sampler, Label | OneHot)]
        # Checked already for formats of pictures; npz keeps arrays of outputs that are none.
        image = self.spec.image_output
        self.image = image if image is not None and (image.dtype == "uint8" or image.range) else None
        self.pool = ThreadPoolExecutor(workers, "encode")
        # Batches that wait for an encoder: bounds memory when encoding is the slower half.
        self.slots = threading.BoundedSemaphore(2 * workers)

    def submit(self, number: int) -> list[Future[Samples]]:
        """Run the engine for one shard; batches are cut the same way whether or not the job was interrupted."""
        job = self.job
        begin = job.start + number * job.shard_size
        size = shard_samples(number, job)
        batches = self.generator.batches(
            size,
            job.sizes,
            seed=job.seed,
            start=begin,
            labels=job.labels,
            truncation=job.truncation,
            batch_size=min(job.batch_size, size),
        )
        parts: list[Future[Samples]] = []
        for batch in batches:
            self.slots.acquire()
            future = self.pool.submit(self.encode, begin, batch)
            future.add_done_callback(lambda _: self.slots.release())
            parts.append(future)
        return parts

    def encode(self, begin: int, batch: Batch) -> Samples:
        """Pictures to files, or arrays as they are, with their numbers and labels."""
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

    def write(self, number: int, parts: list[Future[Samples]], mark: str = "") -> str:
        """Write one shard under its name once it is whole; returns its checksum.

        Args:
            number: Of the shard.
            parts: From :meth:`submit`.
            mark: Part of the passing name, so that two writers of one shard do not meet.
        """
        samples = join([part.result() for part in parts])
        name = shard_name(number, self.kind)
        hidden = self.folder / f".{name}{mark}"
        with writing(self.folder / name):
            try:
                digest = self.kind.write(hidden, samples)
                _replace(hidden, self.folder / name)
            except BaseException:
                if hidden.is_dir():
                    shutil.rmtree(hidden, ignore_errors=True)
                else:
                    hidden.unlink(missing_ok=True)
                raise
        return digest

    def close(self) -> None:
        """Let go of what was not begun."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def _replace(hidden: Path, final: Path) -> None:
    """Give a shard its name, in place of one that was never listed."""
    if hidden.is_dir() and final.is_dir():
        shutil.rmtree(final)
    hidden.replace(final)


def make_here(maker: ShardMaker, ledger: Ledger) -> Progress:
    """Make the missing shards in this process: one is written while the next is made, no more are in memory."""

    def finish(number: int, parts: list[Future[Samples]]) -> None:
        ledger.complete(number, maker.write(number, parts))

    with ThreadPoolExecutor(1, "write") as writer:
        writes: deque[Future[None]] = deque()
        try:
            for number in ledger.missing:
                parts = maker.submit(number)
                writes.append(writer.submit(finish, number, parts))
                if len(writes) > 1:
                    writes.popleft().result()
            while writes:
                writes.popleft().result()
        except BaseException:
            maker.close()
            writer.shutdown(wait=False, cancel_futures=True)
            raise
    maker.close()
    return ledger.progress
