"""Metrics against closed forms and against the failures they exist to catch."""

from __future__ import annotations

import numpy as np
import pytest

from ganexport.errors import UsageError
from ganexport.evaluation.metrics import bootstrap, kernel_distance, nearest, neighbour_metrics
from ganexport.frechet import frechet_distance

RNG = np.random.default_rng(1)


def gaussian(n, mean=0.0, std=1.0, dimensions=8, seed=0):
    return np.random.default_rng(seed).normal(mean, std, (n, dimensions))


def test_frechet_distance_of_known_gaussians():
    a = gaussian(200_000, seed=1)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-8)
    # |m|² + D (s1 - s2)²: 8·0.5² + 8·(1 - 2)² = 10
    assert frechet_distance(a, gaussian(200_000, 0.5, 2.0, seed=2)) == pytest.approx(10.0, rel=0.01)


def test_frechet_distance_with_correlated_features():
    mix = RNG.normal(size=(5, 5))
    a, b = RNG.normal(size=(5000, 5)) @ mix, RNG.normal(size=(5000, 5)) + 1
    root = np.linalg.cholesky(np.cov(a.T))
    values = np.linalg.eigvals(root.T @ np.cov(b.T) @ root).real  # same eigenvalues as C1 C2
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T))
    assert frechet_distance(a, b) == pytest.approx(expected - 2 * np.sqrt(values).sum(), rel=1e-9)


def test_frechet_distance_of_degenerate_features_is_finite():
    constant = np.zeros((10, 4))
    assert frechet_distance(constant, constant) == 0.0
    with pytest.raises(UsageError):
        frechet_distance(constant[:1], constant)
    with pytest.raises(UsageError, match="not finite"):
        frechet_distance(np.full((4, 2), np.nan), constant[:, :2])


def test_kernel_distance_is_unbiased():
    mean, error = kernel_distance(gaussian(3000, seed=3), gaussian(3000, seed=4))
    assert abs(mean) < 5 * error + 1e-3
    assert kernel_distance(gaussian(3000, seed=3), gaussian(3000, 1.0, seed=4))[0] > 0.5


def test_neighbour_metrics_of_equal_distributions():
    result = neighbour_metrics(gaussian(1500, seed=5), gaussian(1500, seed=6))
    assert result["coverage"] > 0.9
    assert result["density"] == pytest.approx(1.0, abs=0.1)
    assert min(result["precision"], result["recall"]) > 0.8


def test_a_single_repeated_image_is_caught_by_coverage_and_recall():
    real = gaussian(1000, seed=7)
    fake = np.repeat(real[:1], 1000, axis=0)
    result = neighbour_metrics(real, fake)
    assert result["coverage"] < 0.05
    assert result["recall"] < 0.05


def test_noise_far_from_the_data_has_no_precision():
    result = neighbour_metrics(gaussian(500, seed=8), gaussian(500, 50.0, seed=9))
    assert (result["precision"], result["coverage"]) == (0.0, 0.0)


def test_nearest_finds_copies():
    real = gaussian(700, seed=10)
    index, distance = nearest(real[[5, 600]], real)
    assert index.tolist() == [5, 600]
    assert distance.max() < 1e-2


def test_the_bootstrap_interval_covers_two_evaluations_of_one_distribution():
    real = gaussian(4000, seed=11)
    low, high = bootstrap(lambda f: frechet_distance(real, f), gaussian(2000, 0.3, seed=12))
    assert low < frechet_distance(real, gaussian(2000, 0.3, seed=13)) < high


def test_too_few_images_are_refused():
    with pytest.raises(UsageError, match="more than 5"):
        neighbour_metrics(gaussian(5), gaussian(100))
