"""Statistics of timings: percentiles, intervals that survive drifting noise, and verdicts in words.

Samples of a timing are not independent: a neighbour's load or a clock change shifts hundreds of
them together. They are therefore taken in *rounds* (all candidates in turn, again and again), and
every interval here resamples whole rounds, not single samples: the cluster bootstrap (Davison and
Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). With few rounds a percentile
interval is too narrow; it is widened as in Hesterberg, "What Teachers Should Know about the
Bootstrap" (The American Statistician 69, 2015, section 5.3), the expanded percentile interval.

numpy and the standard library only. Samples are in any one unit; results are in the same unit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Rounds = Sequence[ArrayLike]

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        value: The estimate.
        low: Lower end; equal to ``value`` when there is nothing to resample.
        high: Upper end.
        confidence: Nominal coverage, 0.95 by default.
    """

    value: float
    low: float
    high: float
    confidence: float = CONFIDENCE

    @property
    def half_width(self) -> float:
        """Half the interval's width as a share of the estimate."""
        return (self.high - self.low) / 2 / abs(self.value) if self.value else math.inf


def percentile(samples: ArrayLike, q: float) -> float:
    """The q-th percentile by nearest rank: the smallest sample that at least q % of all are not above.

    It is always one of the samples (MLPerf LoadGen's definition), never an interpolation, so a tail
    is not made up between two points.

    Args:
        samples: [n], n >= 1.
        q: 0 to 100.

    Raises:
        ValueError: No samples, or q out of range.
    """
    values = _vector(samples)
    if not 0 <= q <= 100:
        raise ValueError(f"percentile {q} is not within 0 to 100")
    rank = max(math.ceil(round(q * values.size / 100, 9)), 1)
    return float(np.partition(values, rank - 1)[rank - 1])


def supports_percentile(count: int, q: float) -> bool:
    """Whether ``count`` samples say anything about the q-th percentile: at least one must lie beyond it."""
    return round(count * (100 - q) / 100, 9) >= 1 and round(count * q / 100, 9) >= 1


def percentile_interval(samples: ArrayLike, q: float, confidence: float = CONFIDENCE) -> Interval | None:
    """Distribution-free interval of a percentile from order statistics (binomial), for independent samples.

    Returns:
        None when there are too few samples for any pair of them to bracket it with that confidence.
    """
    values = np.sort(_vector(samples))
    n, share = values.size, q / 100
    below = _binomial_cdf(n, share)  # [n + 1], P(number of samples under the percentile <= k)
    tail = (1 - confidence) / 2
    low_ranks = np.flatnonzero(below <= tail)
    high_ranks = np.flatnonzero(below >= 1 - tail)
    if not low_ranks.size or not high_ranks.size or high_ranks[0] >= n:
        return None
    return Interval(percentile(values, q), float(values[low_ranks[-1]]), float(values[high_ranks[0]]), confidence)


def median_interval(
    rounds: Rounds, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Median of all samples, with a bootstrap interval over rounds.

    Args:
        rounds: Samples of each round. A single round is resampled sample by sample, which is right
            only when the samples are independent.
        confidence: Nominal coverage.
        resamples: Bootstrap replicates.
        seed: Of the resampling, so that a report always prints the same interval.
    """
    clusters = _clusters(rounds)
    counts = _resample(len(clusters), resamples, seed)
    replicates = _weighted_medians(clusters, counts)
    value = float(np.median(np.concatenate(clusters)))
    return _expanded(value, replicates, len(clusters), confidence)


def ratio_interval(
    numerator: Rounds,
    denominator: Rounds,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Ratio of two medians, with a bootstrap interval over rounds.

    With the same number of rounds on both sides they are taken as paired (measured in turn, so that
    a slow minute hits both); otherwise they are resampled independently.

    Args:
        numerator: Samples of each round of the one candidate.
        denominator: Samples of each round of the other.
        confidence: Nominal coverage.
        resamples: Bootstrap replicates.
        seed: Of the resampling.
    """
    above, below = _clusters(numerator), _clusters(denominator)
    paired = len(numerator) == len(denominator) and len(numerator) > 1
    counts = _resample(len(above), resamples, seed)
    other = counts if paired else _resample(len(below), resamples, seed + 1)
    replicates = _weighted_medians(above, counts) / _weighted_medians(below, other)
    value = float(np.median(np.concatenate(above)) / np.median(np.concatenate(below)))
    return _expanded(value, replicates, min(len(above), len(below)), confidence)


@dataclass(frozen=True)
class Comparison:
    """Is one candidate slower than another?

    Attributes:
        ratio: Median time of the new one over the old one's; above 1 is slower.
        verdict: "slower", "faster", "equal" (the interval lies within the threshold) or "undecided".
        threshold: Differences up to this share do not matter.
    """

    ratio: Interval
    verdict: str
    threshold: float


def compare(
    new: Rounds, old: Rounds, *, threshold: float = 0.05, confidence: float = CONFIDENCE, seed: int = 0
) -> Comparison:
    """Judge a difference: it must be both larger than the threshold and larger than the noise.

    Args:
        new: Samples of each round.
        old: Samples of each round.
        threshold: Share by which it must differ to matter (0.05 is 5 %).
        confidence: Of the interval that must exclude "no difference".
        seed: Of the resampling.
    """
    ratio = ratio_interval(new, old, confidence=confidence, seed=seed)
    return Comparison(ratio, verdict(ratio, threshold), threshold)


def verdict(ratio: Interval, threshold: float) -> str:
    """A ratio of times in a word: "slower", "faster", "equal" or "undecided" (see :class:`Comparison`)."""
    if ratio.value > 1 + threshold and ratio.low > 1:
        return "slower"
    if ratio.value < 1 / (1 + threshold) and ratio.high < 1:
        return "faster"
    if ratio.low >= 1 / (1 + threshold) and ratio.high <= 1 + threshold:
        return "equal"
    return "undecided"


@dataclass(frozen=True)
class Noise:
    """How much a timing moved.

    Attributes:
        within: Robust coefficient of variation inside the rounds (1.4826 · MAD / median, median over rounds).
        between: Coefficient of variation of the rounds' medians; 0 with one round.
        verdict: In words, for people.
        quiet: Whether absolute figures may be compared with another run's.
    """

    within: float
    between: float
    verdict: str
    quiet: bool


def noise(rounds: Rounds) -> Noise:
    """Judge the noise of a measurement from how the rounds' medians move and how samples scatter in them."""
    clusters = _clusters(rounds, keep=True)
    medians = np.array([np.median(c) for c in clusters])
    scatter = [1.4826 * float(np.median(np.abs(c - m))) / m for c, m in zip(clusters, medians, strict=True) if m > 0]
    within = float(np.median(scatter)) if scatter else 0.0
    between = float(medians.std(ddof=1) / medians.mean()) if medians.size > 1 and medians.mean() > 0 else 0.0
    worst = max(within, between)
    if worst < 0.03:
        return Noise(within, between, f"quiet (CV {worst:.1%})", True)
    if worst < 0.10:
        return Noise(within, between, f"CV {worst:.0%}: compare within this run, absolute figures with care", True)
    return Noise(within, between, f"CV {worst:.0%}: do not compare absolute figures", False)


class SteadyState:
    """Says when a stream of timings has stopped changing, so that warm-up is as long as it must be.

    Steady: the levels of the last four windows lie within ``tolerance`` of each other and do not
    fall all the way through them by more than half of it. (perf_analyzer asks for three windows
    within 10 %; a slow ramp passes that.) A window's level is its lower quartile: a neighbour's load
    only ever adds time, so the lower part of a window says best what the candidate itself does.

    Args:
        window: Samples in a window; it grows so that a window is at least ``window_time`` long.
        tolerance: Largest share between the highest and the lowest window's level.
        window_time: In the samples' unit.
    """

    WINDOWS = 4

    def __init__(self, window: int = 5, tolerance: float = 0.05, window_time: float = 0.0) -> None:
        self.window = window
        self.tolerance = tolerance
        self.window_time = window_time
        self.count = 0
        self._open: list[float] = []
        self._time = 0.0
        self._levels: list[float] = []

    def add(self, sample: float) -> bool:
        """Take one sample; True as soon as the stream is steady."""
        self.count += 1
        self._open.append(sample)
        self._time += sample
        if len(self._open) >= self.window and self._time >= self.window_time:
            self._levels.append(float(np.quantile(self._open, 0.25)))
            self._open, self._time = [], 0.0
        return self.steady

    @property
    def steady(self) -> bool:
        """Whether the last windows agree."""
        last = self._levels[-self.WINDOWS :]
        if len(last) < self.WINDOWS or min(last) <= 0:
            return False
        spread = max(last) / min(last) - 1
        falling = all(a > b for a, b in itertools.pairwise(last))
        return spread <= self.tolerance and not (falling and spread > self.tolerance / 2)


def steady_start(samples: ArrayLike, *, window: int = 5, tolerance: float = 0.05) -> int | None:
    """Index of the first sample after the warm-up, None when the samples never became steady."""
    state = SteadyState(window, tolerance)
    values = _vector(samples)
    for index, value in enumerate(values):
        if state.add(float(value)):
            return index + 1 - window * SteadyState.WINDOWS
    return None


@dataclass(frozen=True)
class Growth:
    """Memory that grows with the number of runs.

    Attributes:
        bytes_per_run: Theil-Sen slope, robust against single jumps.
        leaking: Whether the growth goes on through the second half and is not noise of the allocator.
    """

    bytes_per_run: float
    leaking: bool


def growth(runs: ArrayLike, resident: ArrayLike, *, floor: float = 4 << 20) -> Growth:
    """Does resident memory grow with every run?

    Args:
        runs: [n] number of runs done so far, increasing.
        resident: [n] resident bytes at that moment.
        floor: Growth over the second half below this many bytes is the allocator's business.
    """
    x, y = _vector(runs), _vector(resident)
    if x.size < 6:  # too few to tell a leak from an allocator that fills its pools
        return Growth(0.0, False)
    i, j = np.triu_indices(x.size, 1)
    apart = x[j] != x[i]
    slopes = (y[j] - y[i])[apart] / (x[j] - x[i])[apart]
    slope = float(np.median(slopes)) if slopes.size else 0.0
    half = x.size // 2
    late = y[half:]
    rising = float(np.mean(np.diff(late) > 0)) >= 0.75 if late.size > 1 else False
    return Growth(slope, slope > 0 and rising and float(late[-1] - late[0]) > floor)


def summary(samples: ArrayLike) -> dict[str, Any]:
    """Count, mean, minimum, maximum and the percentiles that so many samples support (50 always)."""
    values = _vector(samples)
    figures: dict[str, Any] = {"count": int(values.size), "mean": float(values.mean())}
    figures |= {"min": float(values.min()), "max": float(values.max()), "p50": percentile(values, 50)}
    for q in (90, 99, 99.9):
        if supports_percentile(values.size, q):
            figures[f"p{q:g}"] = percentile(values, q)
    return figures


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t (Cornish-Fisher expansion, Abramowitz and Stegun 26.7.5; exact for 1 and 2)."""
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        a = 2 * probability - 1
        return a * math.sqrt(2 / (1 - a * a))
    z, n = NormalDist().inv_cdf(probability), float(degrees)
    terms = (
        z,
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4),
    )
    return sum(terms)


def _vector(samples: ArrayLike) -> Floats:
    values = np.asarray(samples, dtype=np.float64).ravel()
    if not values.size:
        raise ValueError("no samples")
    return values


def _clusters(rounds: Rounds, *, keep: bool = False) -> list[Floats]:
    found = [np.asarray(r, dtype=np.float64).ravel() for r in rounds]
    found = [r for r in found if r.size]
    if not found:
        raise ValueError("no samples")
    if len(found) == 1 and not keep:  # nothing to cluster by: sample by sample
        return list(found[0].reshape(-1, 1))
    return found


def _resample(clusters: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """How often each cluster is drawn in each replicate: [resamples, clusters]."""
    generator = np.random.Generator(np.random.Philox(seed))
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)


def _weighted_medians(clusters: list[Floats], counts: NDArray[np.int64]) -> Floats:
    """Median of the pooled samples when cluster c stands ``counts[r, c]`` times in replicate r: [resamples].

    All replicates search the sorted samples at once, by halving; where every cluster is one sample there
    are as many clusters as samples, and the running sum over the samples is cheaper.
    """
    values = np.concatenate(clusters)
    owner = np.repeat(np.arange(len(clusters)), [c.size for c in clusters])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    sizes = np.array([c.size for c in clusters])
    total = counts @ sizes  # [resamples]
    if len(clusters) * math.ceil(math.log2(values.size + 1)) > values.size:
        ranks = _ranks_by_sum(owner, counts, total)
    else:
        ranks = _ranks_by_halving(owner, len(clusters), counts, total)
    medians: Floats = (values[ranks[0]] + values[ranks[1]]) / 2
    return medians


def _middle(total: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks, from 1, of the two middle samples of so many; the same one twice where there is one."""
    return (total + 1) // 2, total // 2 + 1


def _ranks_by_sum(
    owner: NDArray[np.int64], counts: NDArray[np.int64], total: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the middle samples among the sorted ones, whose clusters are ``owner``: two of [resamples]."""
    found = np.empty((2, counts.shape[0]), np.int64)
    chunk = max(1, 1_000_000 // owner.size)
    for start in range(0, counts.shape[0], chunk):
        part = slice(start, start + chunk)
        weights = np.cumsum(counts[part][:, owner], axis=1)  # [chunk, n], how many samples stand at or before each
        for into, rank in zip(found, _middle(total[part]), strict=True):
            into[part] = (weights >= rank[:, None]).argmax(axis=1)
    return found[0], found[1]


def _ranks_by_halving(
    owner: NDArray[np.int64], clusters: int, counts: NDArray[np.int64], total: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As :func:`_ranks_by_sum`."""
    below = np.zeros((owner.size + 1, clusters), np.int64)  # [n + 1, clusters], samples of each before a position
    np.cumsum(owner[:, None] == np.arange(clusters), axis=0, out=below[1:])
    found = []
    for rank in _middle(total):
        low, high = np.zeros_like(rank), np.full_like(rank, owner.size)  # the position is in (low, high]
        while (open_ := high - low > 1).any():
            middle = np.where(open_, (low + high) // 2, high)
            enough = (below[middle] * counts).sum(axis=1) >= rank
            high = np.where(enough, middle, high)
            low = np.where(enough, low, middle)
        found.append(high - 1)
    return found[0], found[1]


def _expanded(value: float, replicates: Floats, clusters: int, confidence: float) -> Interval:
    if clusters < 2:
        return Interval(value, value, value, confidence)
    t = student_t((1 + confidence) / 2, clusters - 1) * math.sqrt(clusters / (clusters - 1))
    tail = NormalDist().cdf(-t)
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Interval(value, min(float(low), value), max(float(high), value), confidence)


def _binomial_cdf(n: int, p: float) -> Floats:
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    if p in (0.0, 1.0):
        return np.asarray(k >= n * p, dtype=np.float64)
    log_mass = log_factorial[n] - log_factorial[k] - log_factorial[n - k] + k * math.log(p) + (n - k) * math.log1p(-p)
    cumulative: Floats = np.minimum(np.cumsum(np.exp(log_mass)), 1.0)
    return cumulative
