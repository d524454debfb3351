"""The server scenario: requests arrive at random, are batched while they wait, and must be answered in time.

MLPerf Inference's Server scenario: single requests with Poisson arrivals, the figure is the highest
rate whose p99 latency keeps the limit (MLCommons inference rules, "Scenarios"). One engine serves
one batch at a time. The same loop runs on the real clock and on a virtual one, so that it can be
held against queueing theory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ganexport import stats


class Clock(Protocol):
    """Nanoseconds, and waiting for a moment."""

    def now(self) -> int:
        """The time now."""

    def wait_until(self, moment: int) -> None:
        """Return when ``moment`` has come; at once when it is past."""


class RealClock:
    """The monotonic clock; sleeps, then spins through the last 0.2 ms, because sleeping wakes late."""

    SPIN = 200_000

    def now(self) -> int:
        """Nanoseconds of the monotonic clock."""
        return time.perf_counter_ns()

    def wait_until(self, moment: int) -> None:
        """Sleep and spin until ``moment``."""
        left = moment - time.perf_counter_ns()
        if left > self.SPIN:
            time.sleep((left - self.SPIN) / 1e9)
        while time.perf_counter_ns() < moment:
            pass


class VirtualClock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.time = 0

    def now(self) -> int:
        """The virtual time."""
        return self.time

    def wait_until(self, moment: int) -> None:
        """Jump to ``moment``."""
        self.time = max(self.time, moment)

    def advance(self, nanoseconds: int) -> None:
        """Let time pass: what a served batch does."""
        self.time += nanoseconds


@dataclass(frozen=True)
class Batching:
    """How waiting requests are put together.

    Attributes:
        sizes: Batch sizes the engine is run at, increasing; fewer requests are padded up to the next.
        max_delay_ns: The oldest request waits at most so long for company; 0 never waits.
    """

    sizes: tuple[int, ...] = (1,)
    max_delay_ns: int = 0

    @property
    def largest(self) -> int:
        """The largest batch."""
        return self.sizes[-1]

    def padded(self, count: int) -> int:
        """The batch that ``count`` requests are run as."""
        return next(size for size in self.sizes if size >= count)


@dataclass(frozen=True)
class Trial:
    """What happened at one rate.

    Attributes:
        rate: Requests a second that were sent.
        latencies: Arrival to answer in nanoseconds, of every answered request.
        batches: Number of requests in each served batch.
        planned: Requests that were to be sent; more than answered when it was stopped early because
            the limit could not be kept any more.
        p99: Nearest-rank p99 in nanoseconds; of the answered ones when stopped early.
        kept: Whether p99 kept the limit.
    """

    rate: float
    latencies: tuple[int, ...]
    batches: tuple[int, ...]
    planned: int
    p99: float
    kept: bool


def poisson_arrivals(rate: float, count: int, seed: int = 0) -> list[int]:
    """Arrival times in nanoseconds from 0 of a Poisson process of ``rate`` a second: [count]."""
    generator = np.random.Generator(np.random.Philox(seed))
    gaps = generator.exponential(1e9 / rate, size=count)
    return [int(t) for t in np.cumsum(gaps)]


def serve(
    arrivals: Sequence[int],
    run: Callable[[int], None],
    batching: Batching,
    clock: Clock,
    *,
    limit_ns: int | None = None,
) -> tuple[list[int], list[int]]:
    """Serve every request in order of arrival.

    Args:
        arrivals: Nanoseconds after the start, increasing.
        run: Serves one batch of that size, returns when it is answered.
        batching: The rule of batching.
        clock: Real or virtual.
        limit_ns: With it, stop as soon as more requests are late than p99 allows.

    Returns:
        (latencies in nanoseconds, requests in each batch).
    """
    start, total, served = clock.now(), len(arrivals), 0
    allowed_late = total - math.ceil(0.99 * total)
    latencies: list[int] = []
    batches: list[int] = []
    late = 0
    while served < total:
        clock.wait_until(start + arrivals[served])
        count = _arrived(arrivals, served, clock.now() - start, batching.largest)
        full = served + batching.largest - 1
        if count < batching.largest and batching.max_delay_ns:
            deadline = arrivals[served] + batching.max_delay_ns
            clock.wait_until(start + (min(deadline, arrivals[full]) if full < total else deadline))
            count = _arrived(arrivals, served, clock.now() - start, batching.largest)
        run(batching.padded(count))
        done = clock.now() - start
        batches.append(count)
        for arrival in arrivals[served : served + count]:
            latencies.append(done - arrival)
            late += limit_ns is not None and done - arrival > limit_ns
        served += count
        if limit_ns is not None and late > allowed_late:
            break
    return latencies, batches


def _arrived(arrivals: Sequence[int], first: int, now: int, largest: int) -> int:
    count = 0
    while count < largest and first + count < len(arrivals) and arrivals[first + count] <= now:
        count += 1
    return max(count, 1)


def trial(
    rate: float,
    run: Callable[[int], None],
    batching: Batching,
    clock: Clock,
    *,
    count: int,
    limit_ns: int,
    seed: int = 0,
) -> Trial:
    """Serve ``count`` requests arriving at ``rate`` a second."""
    arrivals = poisson_arrivals(rate, count, seed)
    latencies, batches = serve(arrivals, run, batching, clock, limit_ns=limit_ns)
    p99 = stats.percentile(latencies, 99)
    kept = len(latencies) == count and p99 <= limit_ns
    return Trial(rate, tuple(latencies), tuple(batches), count, p99, kept)


def highest_rate(attempt: Callable[[float], Trial], low: float, high: float, *, steps: int = 7) -> list[Trial]:
    """Bisect, on a logarithmic scale, for the highest rate that keeps the limit.

    Args:
        attempt: Measures one rate.
        low: A rate that should be kept; when it is not, the search is between it and a
            hundredth of it.
        high: A rate above what the engine can do.
        steps: Trials after the first.

    Returns:
        Every trial in the order it was made; the answer is the highest kept one.
    """
    trials = [attempt(low)]
    if not trials[0].kept:
        low, high = low / 100, low
    for _ in range(steps):
        rate = math.sqrt(low * high)
        trials.append(attempt(rate))
        low, high = (rate, high) if trials[-1].kept else (low, rate)
    return trials


def best(trials: Sequence[Trial]) -> Trial | None:
    """The kept trial with the highest rate; None when none kept the limit."""
    return max((t for t in trials if t.kept), key=lambda t: t.rate, default=None)
