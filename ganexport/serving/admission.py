"""Backpressure: how many samples may be pending, and when to come again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ganexport.serving.metrics import Metrics


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A request that is turned away for now.

    Args:
        status: 429 (too much asked of us) or 503 (not able to serve now).
        message: Why.
        retry_after: Seconds.
    """

    def __init__(self, status: int, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class Admission:
    """Counts pending samples; a request beyond the limit is refused at once instead of queued.

    Args:
        limit: Most samples pending; see :func:`ganexport.serving.server.useful_pending`.
        metrics: Told of every change.

    Attributes:
        stopping: Soon nothing is admitted any more: not ready, answers close their connections.
        draining: Nothing is admitted any more.
    """

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self.limit = limit
        self.pending = 0
        self.stopping = False
        self.draining = False
        self._metrics = metrics
        self._rate = 0.0  # samples a second, exponentially averaged
        self._done = 0
        self._since = time.monotonic()
        metrics.limit.set(limit)

    @contextmanager
    def admit(self, samples: int) -> Iterator[None]:
        """Hold a place for these samples; a single request larger than the limit may come alone.

        Raises:
            Refused: 429 when full, 503 when draining.
        """
        if self.draining:
            raise Refused(503, "shutting down", 1)
        if self.pending and self.pending + samples > self.limit:
            raise self.too_many()
        self._change(samples)
        try:
            yield
        finally:
            self._change(-samples)
            self._completed(samples)

    @property
    def full(self) -> bool:
        """Whether not even one more sample would be admitted."""
        return self.pending >= self.limit and not self.draining

    def too_many(self) -> Refused:
        """The answer to a request beyond the limit."""
        return Refused(429, "too many samples are pending; come again later", self.retry_after())

    def retry_after(self) -> int:
        """Seconds until the pending samples should be done, from 1 to 30."""
        return min(30, max(1, math.ceil(self.pending / self._rate))) if self._rate > 0 else 1

    def _change(self, samples: int) -> None:
        self.pending += samples
        self._metrics.pending.set(self.pending)

    def _completed(self, samples: int) -> None:
        # Requests of one batch end together: a rate from one to the next would be meaningless.
        self._done += samples
        elapsed = time.monotonic() - self._since
        if elapsed >= 0.5:
            rate = self._done / elapsed
            self._rate = rate if self._rate == 0 else 0.7 * self._rate + 0.3 * rate
            self._done, self._since = 0, time.monotonic()
