"""The comparison that stands behind every certificate: exact figures on known errors, and what it must catch."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ganexport.errors import UsageError
from ganexport.parity import TOLERANCES, Certificate, Comparison, psnr, tolerance

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (6, 1, 8, 8)).astype(np.float32)


def judged(candidate, precision="fp32", reference=IMAGES):
    comparison = Comparison("image", (-1.0, 1.0))
    comparison.add(reference, candidate)
    return comparison, comparison.judge(tolerance(precision))


def test_identical_outputs_pass_with_infinite_psnr():
    comparison, failures = judged(IMAGES.copy())
    result = comparison.result()
    assert failures == []
    assert (result.psnr, result.max_abs, result.samples, result.peak) == (None, 0.0, 6, 2.0)


def test_figures_are_those_of_the_definition():
    comparison, _ = judged(IMAGES + np.float32(0.01))
    result = comparison.result()
    assert result.max_abs == pytest.approx(0.01, rel=1e-4)
    assert result.mean_abs == pytest.approx(0.01, rel=1e-4)
    assert result.psnr == pytest.approx(10 * math.log10(4 / 1e-4), abs=1e-2)


@pytest.mark.parametrize("precision", [row.precision for row in TOLERANCES])
def test_each_row_refuses_an_error_just_outside_it(precision):
    floor = tolerance(precision).min_psnr
    noise = RNG.standard_normal(IMAGES.shape)
    for delta, passes in ((1.5, True), (-1.5, False)):
        scale = 2 / 10 ** ((floor + delta) / 20)
        row_rms = np.sqrt((noise**2).mean(axis=(1, 2, 3), keepdims=True))
        _, failures = judged(IMAGES.astype(np.float64) + noise / row_rms * scale, precision)
        assert any("dB" in failure for failure in failures) is not passes


def test_the_worst_sample_is_found_even_when_the_mean_is_fine():
    candidate = IMAGES.copy()
    candidate[4] *= -1
    comparison, failures = judged(candidate)
    assert comparison.result().worst == (0, 4)
    assert failures


def test_nan_wrong_shape_and_nothing_compared_are_failures():
    candidate = IMAGES.copy()
    candidate[2, 0, 0, 0] = np.nan
    assert any("NaN" in f for f in judged(candidate)[1])
    assert any("shape" in f for f in judged(IMAGES[:3])[1])
    assert any("nothing was compared" in f for f in Comparison("image").judge(tolerance("fp32")))


def test_a_constant_reference_without_declared_range_still_has_a_peak():
    comparison = Comparison("x")
    comparison.add(np.zeros((2, 3)), np.full((2, 3), 1e-7))
    assert comparison.result().peak == 1.0


def test_accumulation_over_batches_equals_one_comparison():
    other = IMAGES + RNG.normal(0, 1e-3, IMAGES.shape)
    whole, parts = Comparison("x", (-1, 1)), Comparison("x", (-1, 1))
    whole.add(IMAGES, other)
    parts.add(IMAGES[:4], other[:4], 0)
    parts.add(IMAGES[4:], other[4:], 1)
    assert parts.result().psnr == pytest.approx(whole.result().psnr)
    assert parts.result().samples == 6


def test_psnr_edges():
    assert psnr(0.0, 2.0) is None
    assert psnr(math.inf, 2.0) == -999.0


def test_an_unknown_precision_is_refused():
    with pytest.raises(UsageError, match="known: fp32"):
        tolerance("fp8")


def test_partial_certificates_pass_only_without_failures():
    assert Certificate("partial", "a", "b", "fp32").passed
    assert not Certificate("partial", "a", "b", "fp32", failures=("x",)).passed
    assert not Certificate("fail", "a", "b", "fp32").passed
