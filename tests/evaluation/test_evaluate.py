"""The evaluation on real digits: what is good reads good, and each kind of cheating is caught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ganexport.errors import DataError, UsageError
from ganexport.evaluation.backbones import Backbone
from ganexport.evaluation.evaluate import collect, evaluate_images, memorisation

FILE = np.load(Path(__file__).parent.parent / "data" / "mnist_test_1000.npz")
TEST_SET = FILE["images"][..., None]
REAL, UNSEEN = TEST_SET[:500], TEST_SET[500:]


def evaluate(fake, real=REAL):
    return evaluate_images(fake, real, source="test", data="MNIST test", seed=0, rounds=10)


def test_unseen_real_digits_score_well():
    result = evaluate(UNSEEN)
    low, high = result.frechet_interval
    assert low < result.frechet < high < 30
    assert result.coverage > 0.85
    assert result.confidence > 0.95
    assert min(result.class_shares) > 0.04
    assert sum(result.class_shares) == pytest.approx(1)
    assert not result.memorisation.suspicious
    assert result.memorisation.median_ratio == pytest.approx(1, abs=0.25)


def test_returning_training_images_is_caught_as_memorisation():
    result = evaluate(REAL[::-1])
    assert result.memorisation.suspicious
    assert result.memorisation.median_ratio < 0.05


def test_slightly_noisy_copies_are_caught_too():
    noise = np.random.default_rng(0).integers(-8, 9, REAL.shape)
    assert memorisation(np.clip(REAL + noise, 0, 255).astype(np.uint8), REAL).suspicious


def test_copies_of_any_training_image_are_caught_and_the_order_of_the_set_does_not_matter(monkeypatch):
    monkeypatch.setattr("ganexport.evaluation.evaluate.NEIGHBOUR_LIMIT", 200)
    assert memorisation(REAL[-100:], REAL).copies > 0.9
    labels = FILE["labels"][: len(REAL)]
    by_class = memorisation(UNSEEN, REAL[np.argsort(labels, kind="stable")])
    assert not by_class.suspicious
    assert by_class.median_ratio == pytest.approx(1, abs=0.25)


def test_neighbours_are_looked_for_in_a_random_choice_of_the_whole_set(monkeypatch):
    monkeypatch.setattr("ganexport.evaluation.evaluate.NEIGHBOUR_LIMIT", 200)
    colours = Backbone("mean grey", lambda images: (images.reshape(len(images), -1, 2).mean(1), None))
    rng = np.random.default_rng(0)
    dark, light = (rng.integers(low, low + 50, (400, 4, 4, 1), np.uint8) for low in (0, 200))
    real, fake = np.concatenate([dark[:300], light[:300]]), np.concatenate([dark[300:], light[300:]])
    rng.shuffle(fake)
    first, second = (
        evaluate_images(fake, real, source="test", data="test", seed=0, rounds=2, backbone=colours) for _ in range(2)
    )
    assert first == second
    assert first.precision > 0.8  # half of that when only the dark ones are looked at
    assert first.coverage > 0.6


def test_a_single_image_is_caught_by_coverage():
    result = evaluate(np.repeat(UNSEEN[:1], 500, axis=0))
    assert result.coverage < 0.05
    assert max(result.class_shares) == 1.0


def test_noise_is_far_away():
    noise = np.random.default_rng(0).integers(0, 256, REAL.shape, dtype=np.uint8)
    assert evaluate(noise).frechet > 10 * evaluate(UNSEEN).frechet


def test_sizes_may_differ_and_channels_may_not():
    assert memorisation(UNSEEN.repeat(2, 1).repeat(2, 2)[:100], REAL).median_ratio > 0.5
    with pytest.raises(DataError, match="channels"):
        memorisation(np.zeros((5, 28, 28, 3), np.uint8), REAL)
    with pytest.raises(UsageError, match="at least 100"):
        evaluate(UNSEEN[:10])


def test_collect_asks_for_every_image_once():
    asked = []

    def generate(start, count):
        asked.append((start, count))
        return np.zeros((count, 2, 2, 1), np.uint8)

    assert collect(generate, 10, 4).shape == (10, 2, 2, 1)
    assert asked == [(0, 4), (4, 4), (8, 2)]
