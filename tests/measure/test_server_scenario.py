"""The server scenario against queueing theory, on a virtual clock."""

from __future__ import annotations

from decimal import Decimal, getcontext

import numpy as np
import pytest

from ganexport.measure import server
from ganexport.stats import percentile

SERVICE = 1_000_000  # nanoseconds: D = 1 ms


def md1_waiting_cdf(load: float, wait: float) -> float:
    """P(W <= wait) in M/D/1, service time 1 (Erlang 1909; Gross and Harris, Fundamentals of Queueing Theory).

    The sum alternates with huge terms, so it is done with 60 digits.
    """
    getcontext().prec = 60
    rho, t = Decimal(load), Decimal(wait)
    total, factorial = Decimal(0), Decimal(1)
    for k in range(int(wait) + 1):
        if k:
            factorial *= k
        x = rho * (k - t)
        total += (x**k if k else Decimal(1)) / factorial * (-x).exp()
    return float((1 - rho) * total)


def md1_capacity(limit: float) -> float:
    """The highest load at which p99 of waiting + service is at most ``limit`` service times."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if md1_waiting_cdf(middle, limit - 1) >= 0.99 else (low, middle)
    return low


def test_the_analytic_answer_is_right_where_it_is_known():
    assert md1_waiting_cdf(0.5, 0) == pytest.approx(0.5)  # an arrival finds the server idle with 1 - rho
    # Pollaczek-Khinchine: E[W] = rho / (2 (1 - rho)) = integral of the tail.
    grid = np.arange(0, 40, 0.05)
    tail = [1 - md1_waiting_cdf(0.7, t) for t in grid]
    assert np.trapezoid(tail, grid) == pytest.approx(0.7 / 0.6, rel=0.01)


def virtual_trial(rate: float, limit_ns: int, batching: server.Batching, count: int, service=lambda _b: SERVICE):
    clock = server.VirtualClock()
    return server.trial(
        rate, lambda size: clock.advance(int(service(size))), batching, clock, count=count, limit_ns=limit_ns
    )


def test_mean_wait_is_pollaczek_khinchine():
    arrivals = server.poisson_arrivals(700, 100_000)
    clock = server.VirtualClock()
    latencies, batches = server.serve(arrivals, lambda _: clock.advance(SERVICE), server.Batching((1,)), clock)
    assert np.mean(latencies) / SERVICE - 1 == pytest.approx(0.7 / 0.6, rel=0.05)
    assert batches == [1] * 100_000


@pytest.mark.parametrize("limit", [5, 12])
def test_capacity_of_an_m_d_1_queue_is_found_within_5_percent(limit):
    def attempt(rate):
        return virtual_trial(rate, limit * SERVICE, server.Batching((1,)), 60_000)

    trials = server.highest_rate(attempt, 300, 1050, steps=8)
    found = server.best(trials)
    assert found is not None
    assert found.rate / 1000 == pytest.approx(md1_capacity(limit), rel=0.05)


def test_a_limit_that_no_rate_can_keep_has_no_answer():
    trials = server.highest_rate(lambda r: virtual_trial(r, SERVICE // 2, server.Batching((1,)), 500), 300, 1000)
    assert server.best(trials) is None


def test_the_search_goes_down_when_the_first_rate_is_too_high():
    trials = server.highest_rate(
        lambda r: virtual_trial(r, SERVICE + 1000, server.Batching((1,)), 2000), 900, 2000, steps=12
    )
    found = server.best(trials)
    assert found is not None
    assert found.rate < 50  # nearly no request may meet another one


def test_batching_multiplies_the_capacity():
    """A batch costs 0.9 ms + 0.1 ms a request: eight together are served at 8/1.7 = 4.7 of 1 a ms."""

    def service(size):
        return 900_000 + 100_000 * size

    sizes = server.Batching((1, 2, 4, 8), 500_000)
    alone = server.highest_rate(
        lambda r: virtual_trial(r, 10 * SERVICE, server.Batching((1,)), 20_000, service), 300, 6000
    )
    together = server.highest_rate(lambda r: virtual_trial(r, 10 * SERVICE, sizes, 20_000, service), 300, 6000)
    assert server.best(together).rate > 3.5 * server.best(alone).rate
    assert server.best(together).rate < 8 / 1.7 * 1000


def test_the_oldest_request_waits_at_most_its_delay_and_a_full_batch_not_at_all():
    clock = server.VirtualClock()
    arrivals = [0, 10, 20, 30, 1000]
    latencies, batches = server.serve(arrivals, lambda _: clock.advance(5), server.Batching((4,), 100), clock)
    assert batches == [4, 1]
    assert latencies == [35, 25, 15, 5, 105]  # full at 30; the last one waits its whole delay


def test_requests_are_padded_up_to_a_size_the_engine_has():
    clock, ran = server.VirtualClock(), []

    def run(size):
        ran.append(size)
        clock.advance(100)

    _, batches = server.serve([0, 1, 2, 3, 4, 5], run, server.Batching((1, 4, 8)), clock)
    assert batches == [1, 5]
    assert ran == [1, 8]


def test_a_hopeless_trial_is_cut_short_and_not_kept():
    trial = virtual_trial(5000, 3 * SERVICE, server.Batching((1,)), 10_000)
    assert not trial.kept
    assert len(trial.latencies) < 500


def test_cutting_short_never_changes_the_answer():
    for rate in (500, 700, 800, 850, 950):
        arrivals = server.poisson_arrivals(rate, 3000)
        clock = server.VirtualClock()
        latencies, _ = server.serve(arrivals, lambda _, c=clock: c.advance(SERVICE), server.Batching((1,)), clock)
        whole = percentile(latencies, 99) <= 6 * SERVICE
        assert virtual_trial(rate, 6 * SERVICE, server.Batching((1,)), 3000).kept == whole


def test_arrivals_are_poisson_and_repeat():
    arrivals = np.array(server.poisson_arrivals(1000, 50_000, seed=3))
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(1e6, rel=0.02)
    assert gaps.std() == pytest.approx(1e6, rel=0.03)
    assert server.poisson_arrivals(1000, 100, 3) == arrivals[:100].tolist()


@pytest.mark.slow
def test_on_the_real_clock_a_lone_request_costs_its_service_time():
    import time

    clock = server.RealClock()

    def run(_size):
        clock.wait_until(clock.now() + 2_000_000)

    start = time.perf_counter()
    trial = server.trial(50, run, server.Batching((1,)), clock, count=100, limit_ns=50_000_000)
    assert time.perf_counter() - start == pytest.approx(2, rel=0.4)
    assert percentile(trial.latencies, 50) == pytest.approx(2e6, rel=0.3)
