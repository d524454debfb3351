"""Lower precisions of an exported file: when int8 is made again, and what is asked of it then."""

from __future__ import annotations

import msgspec
import pytest

from ganexport.export.lower import Asked, again
from ganexport.parity import Certificate, TensorParity


def certificate(worst: float, drift: float | None, precision: str = "int8") -> Certificate:
    output = TensorParity("image", 256, 0.1, 0.01, worst + 3, worst, (0, 0), 2.0)
    return Certificate("fail", "golden outputs", "onnxruntime", precision, (output,), frechet_drift=drift)


@pytest.mark.parametrize(
    ("worst", "drift", "asked", "then"),
    [
        (35.6, 0.024, Asked(35), Asked(37.39)),  # noise has to lose a sixth of its power, and a decibel more
        (35.6, 0.1, Asked(35), Asked(43.59)),
        (33.9, 0.01, Asked(35), Asked(36.6)),  # the search saw a better worst picture than the certificate
        (33.9, 0.01, Asked(36.6), Asked(38.2)),
        (33.9, 0.024, Asked(35), Asked(36.6)),
        (34.9, 0.001, Asked(35), Asked(35.6)),
        (35.6, 0.7, Asked(35), Asked(35, True)),  # more than asking for less noise could bring
        (20.0, 0.01, Asked(38.0), Asked(38.0, True)),
        (35.6, 0.7, Asked(35, True), None),
        (35.6, 0.024, Asked(35, True), Asked(37.39, True)),
        (35.6, 0.02, Asked(35), None),
        (35.6, None, Asked(35), None),
    ],
)
def test_int8_that_is_not_good_enough_is_made_again(worst, drift, asked, then):
    found = again(certificate(worst, drift), asked, 35.0)
    if then is None:
        assert found is None
        return
    assert found.unrounded is then.unrounded
    assert found.min_psnr == pytest.approx(then.min_psnr, abs=0.01)
    assert found.told()


def test_identical_pictures_need_nothing():
    exact = msgspec.structs.replace(certificate(99.0, 0.0).outputs[0], worst_psnr=None, psnr=None)
    assert again(msgspec.structs.replace(certificate(99.0, 0.0), outputs=(exact,)), Asked(35), 35.0) is None


def test_other_precisions_are_not_judged_by_their_drift():
    assert again(certificate(45.0, 0.5, "fp16"), Asked(40), 40.0) is None
