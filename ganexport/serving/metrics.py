"""Prometheus metrics and JSON logs of a server."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, TextIO

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """What ``/metrics`` shows; one registry a server, so that two in one process do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("ganexport_requests", "Requests answered.", ["route", "status"], **made)
        self.seconds = Histogram(
            "ganexport_request_seconds", "From a request's head to its answer.", ["route"], buckets=_LATENCY, **made
        )
        self.samples = Counter("ganexport_samples", "Samples generated.", **made)
        self.pending = Gauge("ganexport_pending_samples", "Samples admitted and not yet answered.", **made)
        self.limit = Gauge("ganexport_pending_samples_limit", "Samples beyond which requests get 429.", **made)
        self.batch_rows = Histogram(
            "ganexport_batch_rows",
            "Samples in the batches that carried a request.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            **made,
        )
        self.batch_seconds = Histogram(
            "ganexport_batch_seconds", "Seconds of the batches that carried a request.", buckets=_LATENCY, **made
        )
        self.retries = Counter("ganexport_retries", "Requests sent again because their replica died.", **made)
        self.ready = Gauge("ganexport_ready", "1 when /readyz answers 200.", **made)
        self.version = Gauge("ganexport_version_info", "1 for the version that serves.", ["version"], **made)
        self.reloads = Counter("ganexport_reloads", "Attempts to adopt a new version.", ["result"], **made)

    def serving(self, digest: str) -> None:
        """Record which version serves."""
        self.version.clear()
        self.version.labels(digest).set(1)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class Log:
    """One JSON object a line: time, event, and the event's own fields.

    Args:
        stream: Where to; stderr when not said.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def __call__(self, event: str, level: str = "info", **fields: Any) -> None:
        """Write one line; a log that cannot be written never stops the service."""
        record = {"time": round(time.time(), 3), "level": level, "event": event, **fields}
        with self._lock:
            try:
                line = msgspec.json.encode(record, enc_hook=str)
                stream = self._stream or sys.stderr
                stream.write(line.decode() + "\n")
                stream.flush()
            except (OSError, ValueError):
                return
