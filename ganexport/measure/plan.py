"""How long and how often to measure."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how often.

    Attributes:
        rounds: Turns of each candidate in each cell; intervals are made from how rounds differ.
        within: Go on with further rounds until every candidate's ratio to the baseline is known within
            this share, or the verdict about it is clear; 0 stops after ``rounds``.
        baseline: Name of that candidate; the first one where it is None or was not measured.
        at_most_seconds: But no longer than this in one cell.
        turn_seconds: Sampling time of a turn.
        min_iterations: Samples of a turn at least.
        max_iterations: Samples of a turn at most.
        min_warm_seconds: Warm-up at least.
        max_warm_seconds: Warm-up at most; a candidate that is not steady by then says so in its row.
        timeout: Seconds for one command (compiling included) before a candidate counts as hung; a trial of the
            server scenario has twice the time that its requests take besides.
        reference: File with reference inputs and outputs; without one the first candidate that
            opens is the reference. Empty string: no comparison.
        parity_batches: Batch sizes of that comparison, clipped to what the generator takes.
        opening: Candidates that are started side by side; they are measured one at a time in any case.
    """

    rounds: int = 8
    within: float = 0.0
    baseline: str | None = None
    at_most_seconds: float = 60.0
    turn_seconds: float = 0.25
    min_iterations: int = 3
    max_iterations: int = 1000
    min_warm_seconds: float = 0.3
    max_warm_seconds: float = 10.0
    timeout: float = 900.0
    reference: str | None = None
    parity_batches: tuple[int, ...] = (1, 7)
    opening: int = 1


class ServerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The server scenario.

    Attributes:
        slo_ms: Limit of the p99 latency.
        max_batch: Largest batch put together.
        max_delay_ms: How long the oldest request waits for company.
        trial_seconds: Length of a trial; it has at least ``min_requests``.
        min_requests: A p99 of fewer says nothing.
        steps: Bisection steps.
        seed: Of the arrivals.
    """

    slo_ms: float = 100.0
    max_batch: int = 16
    max_delay_ms: float = 2.0
    trial_seconds: float = 3.0
    min_requests: int = 300
    steps: int = 6
    seed: int = 0


#: Called with (what happens now, done, total) for a progress bar.
Progress = Callable[[str, int, int], None]


def silent(_text: str, _done: int, _total: int) -> None:
    """No progress bar."""
