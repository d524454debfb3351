"""What a replica does: load versions, batch requests, run the generator, encode the answers.

No Ray in here: the same class runs inside a Ray Serve replica and, in tests, inside one process.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganexport.errors import UsageError
from ganexport.seeding import batched
from ganexport.serving.batching import Batcher
from ganexport.serving.drawing import Job, draw, gives_pictures, padded_rows
from ganexport.serving.encoding import MEDIA_TYPES, encode_arrays, encode_images
from ganexport.serving.loading import open_generator, pictures
from ganexport.spec import BATCH, Dim, GeneratorSpec

if TYPE_CHECKING:
    from ganexport.runtime.generator import Generator

Array = NDArray[Any]
#: Versions a replica holds at once: the one that serves and the one before or after it.
HELD_VERSIONS = 2


class EngineSettings(msgspec.Struct, frozen=True):
    """How a replica runs.

    Attributes:
        max_batch: Most samples in one call of the generator.
        max_delay: Seconds a sample waits for company.
        backend: As in :func:`ganexport.load`; None for the best.
        device: As in :func:`ganexport.load`.
        threads: CPU threads of a batch; None for the backend's own choice, or this machine's cores shared by the
            streams when there are several.
        streams: Batches that run side by side.
        precision: As in :func:`ganexport.load`.
    """

    max_batch: int = 16
    max_delay: float = 0.005
    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    streams: int = 1
    precision: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """A replica's answer.

    Attributes:
        body: The encoded samples; empty when refused.
        media_type: Of the body.
        samples: How many.
        batches: (rows, seconds) of each batch that carried them.
        refused: Why the request cannot be answered; None when it was.
    """

    body: bytes
    media_type: str
    samples: int
    batches: tuple[tuple[int, float], ...] = ()
    refused: str | None = None


class _Loaded:
    """One version in memory: a generator for each stream."""

    def __init__(self, generators: list[Generator]) -> None:
        self._generators = generators
        self._idle: SimpleQueue[Generator] = SimpleQueue()
        for generator in generators:
            self._idle.put(generator)
        self.spec: GeneratorSpec = batched(generators[0].spec)
        assert self.spec.batch is not None
        self.dim: Dim = self.spec.batch
        self.axes = {t.name: t.shape.index(BATCH) for t in self.spec.inputs if BATCH in t.shape}
        self.output_axes = {t.name: t.shape.index(BATCH) for t in self.spec.outputs}
        self.users = 0
        self.evicted = False

    def max_rows(self, limit: int) -> int:
        """The largest allowed batch within ``limit``, and at least the smallest one."""
        rows = min(limit, self.dim.max)
        return max(rows - rows % self.dim.step, self.dim.min)

    def compute(self, feeds: dict[str, Array], rows: int) -> dict[str, Array]:
        """Run a generator once; a batch that the generator does not take is filled up, and cut again."""
        size = padded_rows(self.dim, rows)
        if size != rows:
            feeds = {name: _fill(value, self.axes.get(name), size - rows) for name, value in feeds.items()}
        generator = self._idle.get()
        try:
            outputs: dict[str, Array] = generator.run(feeds)
        finally:
            self._idle.put(generator)
        if size == rows:
            return outputs
        return {name: np.take(value, range(rows), axis=self.output_axes[name]) for name, value in outputs.items()}

    def close(self) -> None:
        """Give back what the generators hold."""
        for generator in self._generators:
            generator.close()


def _fill(value: Array, axis: int | None, missing: int) -> Array:
    if axis is None:
        return value
    last = np.take(value, [-1], axis=axis)
    return np.concatenate([value, *([last] * missing)], axis=axis)


class Engine:
    """Generates for one replica.

    Args:
        settings: How to run.
        version: Version to load at once, (digest, path), so that the first request finds it warm.
    """

    def __init__(self, settings: EngineSettings, version: tuple[str, str] | None = None) -> None:
        self.settings = settings
        self._held: OrderedDict[str, _Loaded] = OrderedDict()
        self._lock: asyncio.Lock | None = None
        # A thread runs each stream, so that its batches follow each other; encoding goes on beside them.
        self._compute = ThreadPoolExecutor(settings.streams, "generate")
        self._encode = ThreadPoolExecutor(2, "encode")
        self._batcher: Batcher | None = None
        if version:
            self._hold(version[0], self._load(version[1]))

    async def generate(self, digest: str, path: str, job: Job) -> Answer:
        """Answer one request with one version of the generator."""
        loaded = await self._version(digest, path)
        loaded.users += 1
        try:
            return await self._answer(digest, loaded, job)
        except UsageError as error:
            return Answer(b"", "", 0, refused=str(error))
        finally:
            loaded.users -= 1
            self._release(loaded)

    async def ping(self) -> bool:
        """That the event loop answers."""
        return True

    async def _answer(self, digest: str, loaded: _Loaded, job: Job) -> Answer:
        loop = asyncio.get_running_loop()
        feeds = await loop.run_in_executor(self._encode, draw, job, loaded.spec)
        shared = tuple((name, value.tobytes()) for name, value in feeds.items() if name not in loaded.axes)
        outputs, batches = await self._batches().submit((digest, shared), feeds, job.count)
        body = await loop.run_in_executor(self._encode, _encoded, loaded, job, outputs)
        return Answer(body, MEDIA_TYPES[job.format], job.count, tuple(batches))

    def _batches(self) -> Batcher:
        if self._batcher is None:
            self._batcher = Batcher(
                self._run,
                axes=lambda key: self._of(key).axes,
                output_axes=lambda key: self._of(key).output_axes,
                max_rows=lambda key: self._of(key).max_rows(self.settings.max_batch),
                max_delay=self.settings.max_delay,
                streams=self.settings.streams,
            )
        return self._batcher

    async def _run(self, key: Hashable, feeds: dict[str, Array], rows: int) -> dict[str, Array]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compute, self._of(key).compute, feeds, rows)

    def _of(self, key: Hashable) -> _Loaded:
        assert isinstance(key, tuple)
        return self._held[key[0]]

    async def _version(self, digest: str, path: str) -> _Loaded:
        if self._lock is None:
            self._lock = asyncio.Lock()
        if digest not in self._held:
            async with self._lock:
                if digest not in self._held:
                    # Not on the compute thread: the version that serves goes on meanwhile.
                    self._hold(digest, await asyncio.to_thread(self._load, path))
        self._held.move_to_end(digest)
        return self._held[digest]

    def _load(self, path: str) -> _Loaded:
        return _Loaded([open_generator(Path(path), self.settings) for _ in range(self.settings.streams)])

    def _hold(self, digest: str, loaded: _Loaded) -> None:
        self._held[digest] = loaded
        for old in list(self._held)[:-HELD_VERSIONS]:
            self._held[old].evicted = True
            self._release(self._held[old], old)

    def _release(self, loaded: _Loaded, digest: str | None = None) -> None:
        """Close an evicted version once nobody uses it."""
        if not loaded.evicted or loaded.users:
            return
        for name in [name for name, held in self._held.items() if held is loaded]:
            del self._held[name]
        loaded.close()


def _encoded(loaded: _Loaded, job: Job, outputs: dict[str, Array]) -> bytes:
    if not gives_pictures(loaded.spec):
        return encode_arrays(outputs, job.format)
    columns = job.count if job.walk_to is not None else None
    return encode_images(pictures(loaded.spec, outputs), job.format, columns=columns)
