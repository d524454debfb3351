"""Distances between two sets of features: real images and generated ones. numpy only.

Sources: Fréchet distance (Heusel et al. 2017), kernel distance (Bińkowski et al. 2018), improved precision and
recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganexport.errors import UsageError

Features = NDArray[Any]


def kernel_distance(
    real: Features, fake: Features, *, subsets: int = 50, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance: unbiased MMD² with the kernel (x·y/D + 1)³, over random subsets (Bińkowski et al. 2018).

    Returns:
        Mean over the subsets and its standard error. Can be slightly negative, being unbiased.
    """
    generator = np.random.default_rng(seed)
    size = min(size, len(real), len(fake))
    if size < 2:
        raise UsageError("the kernel distance needs at least two images on each side")
    estimates = []
    for _ in range(subsets):
        x = real[generator.choice(len(real), size, replace=False)].astype(np.float64)
        y = fake[generator.choice(len(fake), size, replace=False)].astype(np.float64)
        estimates.append(_mmd2(x, y))
    return float(np.mean(estimates)), float(np.std(estimates) / np.sqrt(subsets))


def _mmd2(x: Features, y: Features) -> float:
    n, dimensions = x.shape
    xx, yy, xy = ((a @ b.T / dimensions + 1.0) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2.0 * xy.mean())


def neighbour_metrics(real: Features, fake: Features, *, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage with the k-th nearest neighbour's radius.

    Args:
        real: Features [N, D].
        fake: Features [M, D].
        k: Neighbours that span a sample's ball (5, as in Naeem et al. 2020).

    Returns:
        "precision" and "recall" (Kynkäänniemi et al. 2019), "density" and "coverage" (Naeem et al. 2020).

    Raises:
        UsageError: Fewer than k + 1 samples on a side.
    """
    if min(len(real), len(fake)) <= k:
        raise UsageError(f"needs more than {k} images on each side, got {len(real)} and {len(fake)}")
    radius_real = _kth_distance(real, k)
    radius_fake = _kth_distance(fake, k)
    inside_real = np.zeros(len(fake))  # in how many real balls each fake lies
    recalled = np.zeros(len(real), bool)
    covered = np.zeros(len(real), bool)
    for rows, squared in _blocks(real, fake):
        in_ball = squared <= radius_real[rows, None]
        inside_real += in_ball.sum(axis=0)
        covered[rows] = in_ball.any(axis=1)
        recalled[rows] = (squared <= radius_fake[None, :]).any(axis=1)
    return {
        "precision": float((inside_real > 0).mean()),
        "recall": float(recalled.mean()),
        "density": float(inside_real.mean() / k),
        "coverage": float(covered.mean()),
    }


def _blocks(a: Features, b: Features, rows: int = 512) -> Any:
    b32 = b.astype(np.float32)
    norms = (b32 * b32).sum(axis=1)
    for start in range(0, len(a), rows):
        part = a[start : start + rows].astype(np.float32)
        squared = (part * part).sum(axis=1)[:, None] + norms - 2.0 * (part @ b32.T)
        yield slice(start, start + len(part)), np.maximum(squared, 0.0)


def _kth_distance(features: Features, k: int) -> Features:
    """Squared distance to the k-th nearest other sample, [N]."""
    out = np.empty(len(features), np.float32)
    for rows, squared in _blocks(features, features):
        out[rows] = np.partition(squared, k, axis=1)[:, k]  # index 0 is the sample itself
    return out


def bootstrap(
    statistic: Callable[[Features], float], features: Features, *, rounds: int = 30, seed: int = 0
) -> tuple[float, float]:
    """95% interval of a statistic under resampling of the generated images.

    A resample holds repeated images, which biases distances upwards; the interval is therefore the
    bootstrap's spread placed around the statistic of the whole sample.
    """
    generator = np.random.default_rng(seed)
    n = len(features)
    values = np.array([statistic(features[generator.integers(0, n, n)]) for _ in range(rounds)])
    centre, half = statistic(features), 1.96 * values.std(ddof=1)
    return float(centre - half), float(centre + half)


def nearest(queries: Features, references: Features) -> tuple[NDArray[np.int64], Features]:
    """Index of and Euclidean distance to each query's nearest reference.

    Args:
        queries: [N, D].
        references: [M, D].
    """
    index = np.empty(len(queries), np.int64)
    distance = np.empty(len(queries), np.float64)
    for rows, squared in _blocks(queries, references):
        index[rows] = squared.argmin(axis=1)
        distance[rows] = np.sqrt(squared.min(axis=1))
    return index, distance
