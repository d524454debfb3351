"""The shipped classifier on real test images that it was never trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ganexport.errors import DataError
from ganexport.evaluation.classifier import classify, load_classifier, prepare_images

TEST_SET = np.load(Path(__file__).parent.parent / "data" / "mnist_test_1000.npz")


def test_it_reads_unseen_digits():
    _, probabilities = classify(load_classifier(), TEST_SET["images"][..., None])
    assert (probabilities.argmax(1) == TEST_SET["labels"]).mean() >= 0.985


def test_padded_and_enlarged_digits_are_read_alike():
    model, images = load_classifier(), TEST_SET["images"][:300]
    plain = classify(model, images[..., None])[1].argmax(1)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
    enlarged = images.repeat(2, axis=1).repeat(2, axis=2)[..., None]
    assert (classify(model, padded)[1].argmax(1) == plain).all()
    assert (classify(model, enlarged)[1].argmax(1) == plain).mean() > 0.97


def test_batch_size_changes_nothing_but_rounding():
    images = TEST_SET["images"][:50, :, :, None]
    whole, parts = classify(load_classifier(), images), classify(load_classifier(), images, batch_size=7)
    np.testing.assert_allclose(whole[0], parts[0], atol=1e-4)


def test_no_images_give_empty_arrays_and_colour_is_refused():
    features, probabilities = classify(load_classifier(), TEST_SET["images"][:0, :, :, None])
    assert (features.shape, probabilities.shape) == ((0, 84), (0, 10))
    with pytest.raises(DataError, match="grey"):
        prepare_images(np.zeros((1, 28, 28, 3), np.uint8))
