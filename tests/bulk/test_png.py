"""Our PNG files against Pillow's reader."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ganexport.bulk.png import encode
from ganexport.errors import UsageError

SHAPES = [(1, 1, 1, 1), (3, 28, 28, 1), (2, 17, 31, 3), (2, 5, 3, 4), (1, 1, 300, 3), (1, 300, 1, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["noise", "flat", "across", "down"])
def test_every_pixel_survives(shape, kind):
    count, height, width, channels = shape
    ramp = np.arange(256, dtype=np.uint8)
    images = {
        "noise": np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8),
        "flat": np.full(shape, 200, np.uint8),
        "across": np.broadcast_to(np.resize(ramp, width)[None, None, :, None], shape).copy(),
        "down": np.broadcast_to(np.resize(ramp * 3, height)[None, :, None, None], shape).copy(),
    }[kind]
    files = encode(images)
    assert len(files) == count
    for file, image in zip(files, images, strict=True):
        opened = Image.open(io.BytesIO(file))
        opened.load()
        assert opened.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        assert np.array_equal(np.asarray(opened).reshape(image.shape), image)


def test_smooth_pictures_are_filtered():
    across = np.add.outer(np.arange(64), np.arange(64) * 2).astype(np.uint8)[None, :, :, None]
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 1)).astype(np.uint8)
    assert len(encode(across)[0]) < 400
    assert len(encode(noise)[0]) < 64 * 64 * 1.1


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4, 2), np.uint8), np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3))]
)
def test_what_is_no_batch_of_pictures_is_refused(images):
    with pytest.raises(UsageError, match="PNG takes uint8"):
        encode(images)
