"""Statistics on known distributions, where the right answer is known beforehand."""

from __future__ import annotations

import math
import statistics
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganexport import stats


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_percentile_is_the_nearest_rank():
    samples = [15, 20, 35, 40, 50]  # the textbook example of the nearest-rank method
    assert [stats.percentile(samples, q) for q in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert stats.percentile(range(1, 1001), 99.9) == 999
    assert stats.percentile([7], 0) == 7


@given(
    st.lists(st.integers(0, 10**9), min_size=1, max_size=60),
    st.floats(0, 100, allow_nan=False),
)
@settings(max_examples=80, deadline=None)
def test_percentile_meets_its_definition(samples, q):
    value = stats.percentile(samples, q)
    assert value in samples
    assert sum(s <= value for s in samples) >= q * len(samples) / 100 - 1e-6
    lower = [s for s in samples if s < value]
    assert not lower or len(lower) < q * len(samples) / 100 + 1e-6


@pytest.mark.parametrize(("samples", "q"), [([], 50), ([1], 101), ([1], -1)])
def test_percentile_refuses_what_has_no_answer(samples, q):
    with pytest.raises(ValueError, match=r"no samples|not within"):
        stats.percentile(samples, q)


def test_a_percentile_needs_a_sample_beyond_it():
    assert not stats.supports_percentile(99, 99)
    assert stats.supports_percentile(100, 99)
    assert "p99" not in stats.summary(range(99))
    assert "p99.9" in stats.summary(range(1000))


def test_percentile_interval_covers_as_often_as_it_says():
    hits = 0
    for seed in range(300):
        interval = stats.percentile_interval(generator(seed).exponential(size=400), 90)
        assert interval is not None
        hits += interval.low <= -math.log(0.1) <= interval.high
    assert hits >= 0.93 * 300
    assert stats.percentile_interval(range(20), 99) is None


def test_median_interval_covers_when_whole_rounds_move():
    """Rounds share a slow drift: sample-by-sample resampling would be far too sure of itself."""
    hits = naive = 0
    for seed in range(200):
        g = generator(seed)
        rounds = [100 + g.normal(0, 3) + g.normal(0, 1, 60) for _ in range(8)]
        interval = stats.median_interval(rounds, resamples=400)
        hits += interval.low <= 100 <= interval.high
        single = stats.median_interval([np.concatenate(rounds)], resamples=400)
        naive += single.low <= 100 <= single.high
    assert hits >= 0.90 * 200
    assert naive < 0.5 * 200


def test_ratio_interval_uses_the_pairing():
    """A slow minute hits both candidates of a round; the ratio does not see it."""
    g = generator(3)
    drift = g.normal(0, 10, 8)
    old = [100 + d + g.normal(0, 0.5, 50) for d in drift]
    new = [1.1 * (100 + d) + g.normal(0, 0.5, 50) for d in drift]
    paired = stats.ratio_interval(new, old)
    unpaired = stats.ratio_interval(new[:-1], old)
    assert paired.low <= 1.1 <= paired.high
    assert paired.half_width < 0.02 < unpaired.half_width


def test_ratio_of_something_with_itself_is_one():
    rounds = [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [1.5, 2.5, 2.0]]
    interval = stats.ratio_interval(rounds, rounds)
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


def noisy(seed: int, level: float) -> list[np.ndarray]:
    g = generator(seed)
    return [level * (1 + g.normal(0, 0.01)) * (1 + np.abs(g.normal(0, 0.05, 40))) for _ in range(8)]


def test_equal_candidates_are_equal_and_slower_ones_are_found():
    """At 1 % drift between rounds: no false alarm in 60, and every 10 % slowdown found, threshold 5 %."""
    same = [stats.compare(noisy(s, 100), noisy(s + 1000, 100)).verdict for s in range(60)]
    slower = [stats.compare(noisy(s, 110), noisy(s + 1000, 100)).verdict for s in range(60)]
    faster = [stats.compare(noisy(s, 100), noisy(s + 1000, 110)).verdict for s in range(60)]
    assert same.count("equal") >= 57
    assert not {"slower", "faster"} & set(same)
    assert slower.count("slower") >= 57
    assert faster.count("faster") >= 57


def test_a_difference_below_the_noise_is_undecided():
    g = generator(1)
    rough = [100 * (1 + g.normal(0, 0.3)) + g.normal(0, 1, 10) for _ in range(5)]
    also = [104 * (1 + g.normal(0, 0.3)) + g.normal(0, 1, 10) for _ in range(5)]
    assert stats.compare(also, rough, threshold=0.03).verdict == "undecided"


def test_one_round_of_identical_samples_has_an_interval_of_its_value():
    interval = stats.median_interval([[5.0]])
    assert (interval.value, interval.low, interval.high) == (5.0, 5.0, 5.0)


def test_intervals_repeat():
    assert stats.median_interval(noisy(1, 5)) == stats.median_interval(noisy(1, 5))


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=7), min_size=2, max_size=5))
@settings(max_examples=50, deadline=None)
def test_weighted_medians_equal_medians_of_repeated_samples(rounds):
    clusters = [np.asarray(r, dtype=float) for r in rounds]
    counts = generator(0).multinomial(len(clusters), np.full(len(clusters), 1 / len(clusters)), size=20)
    expected = [
        np.median(np.concatenate([np.tile(c, k) for c, k in zip(clusters, row, strict=True) if k])) for row in counts
    ]
    assert np.allclose(stats._weighted_medians(clusters, counts), expected)


@pytest.mark.parametrize("shape", [[4000] * 8, [1] * 3000, list(range(1, 400, 7))])
def test_weighted_medians_of_many_samples_equal_those_of_repeated_ones(shape):
    rng = generator(5)
    clusters = [rng.normal(10, 1, size).round(2) for size in shape]  # rounded, so that many are equal
    counts = stats._resample(len(clusters), 20, 0)
    wanted = [np.median(np.concatenate([np.tile(c, k) for c, k in zip(clusters, row, strict=True)])) for row in counts]
    assert stats._weighted_medians(clusters, counts).tolist() == wanted


def test_an_interval_of_many_samples_is_quick():
    rounds = generator(6).normal(10, 1, (8, 4000))
    begun = time.process_time()
    stats.median_interval(rounds)
    assert time.process_time() - begun < 0.5  # a running sum over every replicate takes several seconds


def test_noise_verdicts():
    g = generator(0)
    assert stats.noise([100 + g.normal(0, 0.5, 50) for _ in range(5)]).quiet
    loud = stats.noise([100 * (1 + 0.18 * d) + g.normal(0, 0.5, 50) for d in (-1.2, 0, 0.4, 1.3, -0.5)])
    assert not loud.quiet
    assert loud.verdict == f"CV {loud.between:.0%}: do not compare absolute figures"
    assert 0.15 < loud.between < 0.21
    assert stats.noise([[3.0]]).between == 0


def ramp(n: int, plateau: float = 100.0) -> np.ndarray:
    return plateau * (1 + 4 * np.exp(-np.arange(n) / 20))


def test_warm_up_ends_where_the_ramp_does():
    samples = ramp(400) + generator(2).normal(0, 0.5, 400)
    start = stats.steady_start(samples)
    assert start is not None
    assert 60 <= start <= 130  # within 20 % of the plateau at 60, within 0.6 % at 130
    assert abs(np.median(samples[start + 20 :]) / 100 - 1) < 0.01


def test_steady_from_the_start_and_never_steady():
    assert stats.steady_start(np.full(50, 7.0)) == 0
    assert stats.steady_start(1.02 ** np.arange(200)) is None
    assert stats.steady_start([1.0] * 5) is None


def test_a_slow_steady_fall_is_no_steady_state():
    assert stats.steady_start(np.linspace(200, 100, 100)) is None


def test_growth_finds_a_leak_and_its_size():
    g = generator(0)
    runs = np.arange(0, 2000, 100)
    resident = 50e6 + 65536 * runs + g.normal(0, 1e5, runs.size)
    leak = stats.growth(runs, resident)
    assert leak.leaking
    assert leak.bytes_per_run == pytest.approx(65536, rel=0.05)


def test_growth_does_not_cry_leak_over_a_warm_up_or_noise():
    g = generator(0)
    runs = np.arange(0, 2000, 100)
    warm = 50e6 + np.minimum(runs, 400) * 1e5
    assert not stats.growth(runs, warm).leaking
    assert not stats.growth(runs, 50e6 + g.normal(0, 2e5, runs.size)).leaking
    assert not stats.growth([1, 2], [1, 10**9]).leaking


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (7, 2.365), (9, 2.262), (30, 2.042)],
)
def test_student_quantiles_are_the_tables(degrees, quantile):
    assert stats.student_t(0.975, degrees) == pytest.approx(quantile, rel=0.004)


def test_tail_of_one_percent_shows_in_p99_not_in_the_median():
    g = generator(5)
    samples = np.where(g.random(20_000) < 0.015, 50.0, 5.0) + g.normal(0, 0.01, 20_000)
    figures = stats.summary(samples)
    assert figures["p50"] == pytest.approx(5, abs=0.1)
    assert figures["p90"] == pytest.approx(5, abs=0.1)
    assert figures["p99"] == pytest.approx(50, abs=0.1)
    assert figures["mean"] == pytest.approx(statistics.fmean(samples))
