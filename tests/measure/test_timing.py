"""The timed loop on runners whose times are known."""

from __future__ import annotations

import numpy as np
import pytest

from ganexport import stats
from ganexport.measure import timing
from ganexport.measure.feeds import rotation
from tests.measure import known


class Ticks:
    """A clock that a runner moves: no machine noise, so the answer is exact."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Ticking(known.KnownRunner):
    """prepare 3, launch 1, synchronize (waits for) 100, fetch 7 nanoseconds."""

    def __init__(self, clock: Ticks, device: str = "cpu") -> None:
        super().__init__(lambda _i, _b: 0.0, device=device)
        self.clock = clock
        self.pending = 0

    def prepare(self, feeds):
        super().prepare(feeds)
        self.clock.now += 3

    def launch(self):
        super().launch()
        self.clock.now += 1
        self.pending += 100

    def synchronize(self):
        self.clock.now += self.pending
        self.pending = 0

    def fetch(self):
        assert not self.pending, "fetched before waiting"
        self.clock.now += 7
        return super().fetch()


FEEDS = rotation(known.SPEC, {"batch": 2})


def turn(device: str) -> dict[str, list[int]]:
    clock = Ticks()
    runner = Ticking(clock, device)
    return timing.take_turn(runner, FEEDS, seconds=1e-6, min_iterations=20, max_iterations=20, clock=clock).series


def test_on_a_cpu_compute_and_whole_are_told_apart():
    series = turn("cpu")
    assert set(series) == {"end_to_end", "compute"}
    assert series["compute"] == [101] * 20
    assert series["end_to_end"] == [111] * 20


def test_on_a_gpu_the_parts_are_series_and_the_whole_is_timed_undisturbed():
    series = turn("cuda:0")
    assert series["end_to_end"] == [111] * 10
    assert series["host_to_device"] == [3] * 10
    assert series["compute"] == [101] * 10
    assert series["device_to_host"] == [7] * 10
    assert series["pipelined"] == [101, 101]


def test_a_turn_lasts_as_long_as_asked_and_takes_what_it_must():
    clock = Ticks()
    series = timing.take_turn(Ticking(clock), FEEDS, seconds=111 * 50 / 1e9, min_iterations=3, clock=clock).series
    assert len(series["compute"]) == 50
    clock = Ticks()
    series = timing.take_turn(Ticking(clock), FEEDS, seconds=0, min_iterations=5, clock=clock).series
    assert len(series["compute"]) == 5


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_run_of_a_turn_is_counted(device):
    clock = Ticks()
    runner = Ticking(clock, device)
    assert timing.take_turn(runner, FEEDS, seconds=0, min_iterations=20, clock=clock).runs == runner.count


def test_the_collector_is_back_on_after_a_turn_that_failed():
    import gc

    def burst(_index, _batch):
        raise MemoryError

    with pytest.raises(MemoryError):
        timing.take_turn(known.KnownRunner(burst), FEEDS, discard=0)
    assert gc.isenabled()


def virtual(duration):
    """A runner and a clock: run i takes duration(i) nanoseconds."""
    clock = Ticks()

    class Virtual(known.KnownRunner):
        def synchronize(self):
            clock.now += int(duration(self.count - 1))

    return Virtual(lambda _i, _b: 0.0), clock


def test_warm_up_outlasts_the_ramp():
    runner, clock = virtual(lambda i: 1e7 * (1 + 4 * np.exp(-i / 20)))
    done = timing.warm_up(runner, FEEDS, min_seconds=0, max_seconds=60, clock=clock)
    assert done.steady
    assert 60 <= done.iterations <= 150
    after = timing.take_turn(runner, FEEDS, seconds=1, clock=clock).series["compute"]
    assert np.median(after) == pytest.approx(1e7, rel=0.03)


def test_warm_up_that_never_settles_says_so():
    runner, clock = virtual(lambda i: 1e7 * 1.02**i)
    done = timing.warm_up(runner, FEEDS, min_seconds=0, max_seconds=5, clock=clock)
    assert not done.steady
    assert done.seconds >= 5


def test_rotation_gives_different_inputs_of_the_asked_size():
    sets = rotation(known.SPEC, {"batch": 3})
    assert all(s["z"].shape == (3, 4) for s in sets)
    assert len({s["z"].tobytes() for s in sets}) == len(sets) > 1


class Drawn(Ticking):
    """The engine takes what ``draw(run number)`` says, in nanoseconds."""

    def __init__(self, clock: Ticks, draw) -> None:
        super().__init__(clock)
        self.draw, self.runs = draw, 0

    def launch(self):
        super().launch()
        self.pending = int(self.draw(self.runs))
        self.runs += 1


def rounds_of_drawn(draw, rounds=8, each=400):
    clock = Ticks()
    runner = Drawn(clock, draw)
    return [
        timing.take_turn(runner, FEEDS, seconds=1e-9, min_iterations=each, max_iterations=each, clock=clock).series[
            "compute"
        ]
        for _ in range(rounds)
    ]


def test_every_statistic_of_a_known_distribution_is_within_its_interval():
    draw = np.random.Generator(np.random.Philox(7))
    rounds = rounds_of_drawn(lambda _i: 1e6 + draw.exponential(2e6))
    pooled = np.concatenate(rounds)
    for q in (50, 90, 99):
        truth = 1e6 + 2e6 * -np.log(1 - q / 100)
        interval = stats.percentile_interval(pooled, q, 0.99)
        assert interval.low <= truth <= interval.high
        assert interval.half_width < 0.2
    median = stats.median_interval(rounds, confidence=0.99)
    assert median.low <= 1e6 + 2e6 * np.log(2) <= median.high


def test_a_tail_of_one_percent_is_in_the_percentiles_above_it_alone():
    draw = np.random.Generator(np.random.Philox(8))
    rounds = rounds_of_drawn(lambda _i: 20e6 if draw.random() < 0.01 else 1e6)
    pooled = np.concatenate(rounds)
    for q, truth in ((50, 1e6), (90, 1e6), (98, 1e6), (99.9, 20e6)):
        interval = stats.percentile_interval(pooled, q, 0.99) or stats.Interval(stats.percentile(pooled, q), 0, 0)
        assert interval.value == pytest.approx(truth, abs=10)
    assert stats.median_interval(rounds).half_width < 1e-6  # the tail does not move the median


def test_two_drawn_candidates_of_known_ratio():
    draw = np.random.Generator(np.random.Philox(9))
    old = rounds_of_drawn(lambda _i: 2e6 * np.exp(draw.normal(0, 0.1)))
    new = rounds_of_drawn(lambda _i: 2.2e6 * np.exp(draw.normal(0, 0.1)))
    found = stats.compare(new, old)
    assert found.ratio.low <= 1.1 <= found.ratio.high
    assert found.verdict == "slower"


def test_a_warm_up_ramp_ends_before_the_samples():
    clock = Ticks()
    runner = Drawn(clock, lambda i: 2e6 * (1 + 4 * np.exp(-i / 20)))
    done = timing.warm_up(runner, FEEDS, min_seconds=0, clock=clock)
    assert done.steady
    series = timing.take_turn(runner, FEEDS, seconds=1e-9, min_iterations=200, max_iterations=200, clock=clock).series
    assert np.median(series["compute"]) == pytest.approx(2e6, rel=0.01)
