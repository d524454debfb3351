"""Dynamic batching: samples of several requests share one call of the generator.

A request is cut into rows, and a batch takes rows in order of arrival, so that batches are full
whatever the requests' sizes (Ray Serve's own batching moves a request that does not fit to the
end of the queue, which starves it under load). The next batch gathers while one runs; with several
streams, so many run side by side.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]
Run = Callable[[Hashable, Arrays, int], Awaitable[Arrays]]


class _Item:
    """One request: its rows, how many are taken, and what came back."""

    def __init__(self, key: Hashable, feeds: Arrays, rows: int, arrived: float) -> None:
        self.key, self.feeds, self.rows, self.arrived = key, feeds, rows, arrived
        self.taken, self.missing = 0, rows
        self.parts: dict[int, Arrays] = {}  # first row → outputs; streams may end in any order
        self.done: asyncio.Future[Arrays] = asyncio.get_running_loop().create_future()
        self.batches: list[tuple[int, float]] = []


class Batcher:
    """Gathers rows until a batch is full or the oldest has waited long enough.

    Args:
        run: ``await run(key, feeds, rows)`` → outputs, rows along each axis of ``output_axes``.
        axes: Axis of the rows for each input that has one, by key; the other inputs belong to the key.
        output_axes: The same for outputs, by key.
        max_rows: Largest batch, by key.
        max_delay: Seconds the oldest row may wait for company.
        streams: Batches that ``run`` takes at a time.
    """

    def __init__(
        self,
        run: Run,
        axes: Callable[[Hashable], dict[str, int]],
        output_axes: Callable[[Hashable], dict[str, int]],
        max_rows: Callable[[Hashable], int],
        max_delay: float,
        streams: int = 1,
    ) -> None:
        self._run, self._axes, self._output_axes, self._max_rows = run, axes, output_axes, max_rows
        self._max_delay = max_delay
        self._queue: deque[_Item] = deque()
        self._arrival = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._free = asyncio.Semaphore(streams)
        self._running: set[asyncio.Task[None]] = set()

    async def submit(self, key: Hashable, feeds: Arrays, rows: int) -> tuple[Arrays, list[tuple[int, float]]]:
        """Outputs of these rows, and (rows, seconds) of each batch that carried them.

        Only requests of equal ``key`` share a batch. Cancelling the caller withdraws rows that wait.
        """
        item = _Item(key, feeds, rows, time.monotonic())
        self._queue.append(item)
        self._arrival.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await item.done, item.batches

    @property
    def waiting(self) -> int:
        """Rows not yet taken into a batch."""
        return sum(item.rows - item.taken for item in self._queue)

    async def _work(self) -> None:
        while True:
            self._forget_cancelled()
            if not self._queue:
                self._arrival.clear()
                await self._arrival.wait()
                continue
            await self._free.acquire()
            await self._gather()
            batch = self._take()
            if not batch:
                self._free.release()
                continue
            running = asyncio.create_task(self._execute(batch))
            self._running.add(running)
            running.add_done_callback(self._ended)

    def _ended(self, running: asyncio.Task[None]) -> None:
        self._running.discard(running)
        self._free.release()

    async def _gather(self) -> None:
        """Wait until the head's batch is full or the head has waited ``max_delay``."""
        self._forget_cancelled()
        if not self._queue:
            return
        head = self._queue[0]
        limit = self._max_rows(head.key)
        while sum(i.rows - i.taken for i in self._queue if i.key == head.key) < limit:
            left = head.arrived + self._max_delay - time.monotonic()
            if left <= 0 or head.taken:
                return
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[tuple[_Item, int, int]]:
        """(request, first row, end row) of the next batch, in order of arrival."""
        self._forget_cancelled()
        if not self._queue:
            return []
        key = self._queue[0].key
        room, batch = self._max_rows(key), []
        for item in self._queue:
            if item.key == key and room > 0:
                begin, item.taken = item.taken, min(item.rows, item.taken + room)
                room -= item.taken - begin
                batch.append((item, begin, item.taken))
        self._queue = deque(item for item in self._queue if item.taken < item.rows)
        return batch

    def _forget_cancelled(self) -> None:
        if any(item.done.done() for item in self._queue):
            self._queue = deque(item for item in self._queue if not item.done.done())

    async def _execute(self, batch: list[tuple[_Item, int, int]]) -> None:
        key = batch[0][0].key
        rows = sum(end - begin for _, begin, end in batch)
        began = time.perf_counter()
        try:
            outputs = await self._run(key, self._merge(key, batch), rows)
        except Exception as error:  # noqa: BLE001 - whatever the engine raises belongs to its requests
            for item, _, _ in batch:
                if not item.done.done():
                    item.done.set_exception(error)
            return
        seconds = time.perf_counter() - began
        offset = 0
        axes = self._output_axes(key)
        for item, begin, end in batch:
            size = end - begin
            item.parts[begin] = {name: _slice(value, axes[name], offset, size) for name, value in outputs.items()}
            item.batches.append((rows, seconds))
            offset += size
            item.missing -= size
            if item.missing == 0 and not item.done.done():
                item.done.set_result(_join([item.parts[first] for first in sorted(item.parts)], axes))

    def _merge(self, key: Hashable, batch: list[tuple[_Item, int, int]]) -> Arrays:
        merged = {}
        axes = self._axes(key)
        for name, value in batch[0][0].feeds.items():
            if name not in axes:
                merged[name] = value
                continue
            pieces = [_slice(item.feeds[name], axes[name], begin, end - begin) for item, begin, end in batch]
            merged[name] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=axes[name])
        return merged


def _slice(value: Array, axis: int, begin: int, size: int) -> Array:
    return value[(slice(None),) * axis + (slice(begin, begin + size),)]


def _join(parts: list[Arrays], axes: dict[str, int]) -> Arrays:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts], axis=axes[name]) for name in parts[0]}
