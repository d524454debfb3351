"""The timed loop: one runner, its inputs, and nanoseconds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from ganexport.runtime.base import Feeds, Runner
from ganexport.stats import SteadyState

Clock = Callable[[], int]

#: Series of a turn. "pipelined" is the time a run when several are launched before one wait.
SERIES = ("end_to_end", "compute", "host_to_device", "device_to_host", "pipelined")
_BURST = 8


@dataclass
class WarmUp:
    """How the warm-up went.

    Attributes:
        iterations: Runs that were thrown away.
        seconds: Time they took.
        steady: Whether it ended because the timings were steady, and not because time was up.
        samples: Their end-to-end times in nanoseconds.
    """

    iterations: int
    seconds: float
    steady: bool
    samples: list[int] = field(default_factory=list)


class Turn(NamedTuple):
    """What one turn gave.

    Attributes:
        series: Samples in nanoseconds by the name of the series; empty series are left out.
        runs: Runs of the turn, those without a sample included.
    """

    series: dict[str, list[int]]
    runs: int


def warm_up(
    runner: Runner,
    feeds: Sequence[Feeds],
    *,
    min_seconds: float = 0.2,
    max_seconds: float = 10.0,
    clock: Clock = time.perf_counter_ns,
) -> WarmUp:
    """Run until the timings are steady (:class:`~ganexport.stats.SteadyState`) or the time is up.

    Args:
        runner: Ready to run.
        feeds: Input sets, taken in rotation.
        min_seconds: Warm at least so long.
        max_seconds: Stop here in any case; the result then says that it is not steady.
        clock: Nanoseconds.
    """
    state = SteadyState(window_time=20e6)
    start = clock()
    samples: list[int] = []
    while True:
        before = clock()
        _whole(runner, feeds[len(samples) % len(feeds)])
        after = clock()
        samples.append(after - before)
        steady = state.add(after - before)
        elapsed = (after - start) / 1e9
        if (steady and elapsed >= min_seconds) or elapsed >= max_seconds:
            return WarmUp(len(samples), elapsed, steady, samples)


def take_turn(
    runner: Runner,
    feeds: Sequence[Feeds],
    *,
    seconds: float = 0.25,
    min_iterations: int = 3,
    max_iterations: int = 1000,
    discard: int = 2,
    clock: Clock = time.perf_counter_ns,
) -> Turn:
    """One candidate's turn: a few runs thrown away (it was asleep), then samples.

    On a CPU, every run gives an end-to-end and a compute sample. On a GPU, waiting between the
    copies and the launch makes a run slower than it is, so runs alternate: one whole, timed from
    outside alone, one with a wait after each part; and a burst of launches with one wait at its end
    gives the rate of a full pipeline.

    Args:
        runner: Warm.
        feeds: Input sets, taken in rotation.
        seconds: Sampling time.
        min_iterations: Sample at least so many, however long it takes.
        max_iterations: And not more.
        discard: Runs before the first sample.
        clock: Nanoseconds.

    Returns:
        Samples in nanoseconds by the name of the series, and how many runs there were in all.
    """
    series: dict[str, list[int]] = {name: [] for name in SERIES}
    on_device = runner.device != "cpu"
    for index in range(discard):
        _whole(runner, feeds[index % len(feeds)])
    with _no_collection():
        end = clock() + int(seconds * 1e9)
        count = 0
        while count < max_iterations and (count < min_iterations or clock() < end):
            inputs = feeds[count % len(feeds)]
            if on_device and count % 2 == 0:
                start = clock()
                _whole(runner, inputs)
                series["end_to_end"].append(clock() - start)
            else:
                _parts(runner, inputs, series, clock, on_device)
            count += 1
        if on_device:
            _burst(runner, series["pipelined"], clock, max(1, count // 10))
    runs = discard + count + _BURST * len(series["pipelined"])
    return Turn({name: samples for name, samples in series.items() if samples}, runs)


def _whole(runner: Runner, inputs: Feeds) -> None:
    runner.prepare(inputs)
    runner.launch()
    runner.synchronize()
    runner.fetch()


def _parts(runner: Runner, inputs: Feeds, series: dict[str, list[int]], clock: Clock, on_device: bool) -> None:
    start = clock()
    runner.prepare(inputs)
    if on_device:
        runner.synchronize()
    prepared = clock()
    runner.launch()
    runner.synchronize()
    computed = clock()
    runner.fetch()
    fetched = clock()
    series["compute"].append(computed - prepared)
    if on_device:
        series["host_to_device"].append(prepared - start)
        series["device_to_host"].append(fetched - computed)
    else:
        series["end_to_end"].append(fetched - start)


def _burst(runner: Runner, samples: list[int], clock: Clock, bursts: int) -> None:
    for _ in range(bursts):
        start = clock()
        for _ in range(_BURST):
            runner.launch()
        runner.synchronize()
        samples.append((clock() - start) // _BURST)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the samples."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
