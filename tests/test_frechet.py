"""The Fréchet drift of a certificate: nothing for the same pictures, little for rounding, much for another look."""

from __future__ import annotations

import numpy as np
import pytest

from ganexport.build import certify
from ganexport.frechet import Drift, frechet_distance, movement, picture_features
from ganexport.spec import Dim, GeneratorSpec, TensorSpec, parse_input

SPEC = GeneratorSpec(
    (parse_input("z=normal[batch,6]"),),
    (TensorSpec("image", "float32", ("batch", 3, 24, 20), None, (-1.0, 1.0), "NCHW"),),
    (Dim("batch", 1, 32, 32),),
)


def pictures(z):
    """Smooth pictures [N, 3, 24, 20] whose waves and brightness follow z [N, 6]."""
    y, x = np.meshgrid(np.linspace(0, 1, 24), np.linspace(0, 1, 20), indexing="ij")
    phase = z[:, :3, None, None] + (3 + z[:, 3:, None, None]) * (x + 2 * y)
    return (0.6 * np.sin(phase) + 0.1 * z[:, :3, None, None]).astype(np.float32)


class Engine:
    def __init__(self, change=lambda image: image):
        self.change = change

    def run(self, feeds):
        return {"image": self.change(pictures(feeds["z"])).astype(np.float32)}


RANDOM = np.random.default_rng(0)
Z = RANDOM.standard_normal((256, 6))
CHANGES = {
    "fp16": (lambda image: image.astype(np.float16), 0.0, 1e-3),
    "37 dB of noise": (lambda image: image + RANDOM.normal(0, 0.028, image.shape), 1e-4, 0.2),
    "darker": (lambda image: image * 0.8 - 0.2, 0.2, 100.0),
    "one picture": (lambda image: np.broadcast_to(image[:1], image.shape), 0.5, 1e9),
    "blurred": (lambda image: (image + np.roll(image, 1, 2) + np.roll(image, 2, 2)) / 3, 0.02, 100.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_certificate_records_how_far_the_distance_moves(name):
    change, low, high = CHANGES[name]
    found = certify.certify(Engine(change), Engine(), SPEC, "fp16", reference_name="r", runtime="t").certificate
    assert low <= found.frechet_drift <= high


def test_the_same_pictures_do_not_move_it():
    found = certify.certify(Engine(), Engine(), SPEC, "fp32", reference_name="r", runtime="t").certificate
    assert found.frechet_drift == 0.0


def test_int8_outside_the_drift_is_refused_whatever_its_psnr():
    def certificate(change, precision):
        engines = Engine(change), Engine()
        return certify.certify(*engines, SPEC, precision, reference_name="r", runtime="t", min_psnr=10.0).certificate

    def darker(image):
        return image * 0.8 - 0.2

    refused = certificate(darker, "int8")
    assert refused.verdict == "fail"
    assert refused.failures == (
        f"it moves the Fréchet distance on paired latents by {refused.frechet_drift:.1%}, above 2%",
    )
    assert certificate(darker, "fp16").passed, "recorded only"
    assert certificate(lambda image: np.rint(image * 127) / 127, "int8").passed


def test_a_small_change_reads_small_however_the_halves_fall():
    random = np.random.default_rng(3)
    for _ in range(8):
        features = random.standard_normal((256, 8))
        assert movement(features, features + 0.02) < 0.02


def test_layouts_and_bytes_read_alike():
    image = pictures(Z[:8])
    features = picture_features(image, "NCHW", (-1.0, 1.0))
    assert features.shape == (8, 32)
    assert np.allclose(features, picture_features(image.transpose(0, 2, 3, 1), "NHWC", (-1.0, 1.0)), atol=1e-6)
    as_bytes = np.rint((image + 1) * 127.5).clip(0, 255).astype(np.uint8)
    assert np.allclose(features, picture_features(as_bytes, "NCHW", (0.0, 255.0)), atol=5e-3)


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 3, 2, 5), (3, 1, 17, 33)])
def test_odd_sizes_have_features(shape):
    assert np.isfinite(picture_features(RANDOM.random(shape), "NCHW", (0.0, 1.0))).all()


def test_the_yardstick_is_the_distance_between_the_references_halves():
    reference = RANDOM.standard_normal((400, 4))
    candidate = reference + 0.5
    spread = reference.std(axis=0)
    even, odd = reference[::2] / spread, reference[1::2] / spread
    moved = [
        abs(frechet_distance(other, one + 0.5 / spread) - frechet_distance(other, one)) / frechet_distance(other, one)
        for one, other in ((even, odd), (odd, even))
    ]
    assert movement(reference, candidate) == pytest.approx(np.mean(moved))


def test_too_few_pictures_or_none_that_differ_give_no_figure():
    assert movement(np.zeros((63, 3)), np.zeros((63, 3))) is None
    assert movement(np.ones((80, 3)), np.ones((80, 3))) is None
    audio = Drift(TensorSpec("audio", "float32", ("batch", 1, 64), None, (-1.0, 1.0), "NCT"))
    audio.add({"audio": np.zeros((80, 1, 64))}, {"audio": np.zeros((80, 1, 64))})
    assert audio.result() is None
