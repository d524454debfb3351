"""Lower precisions of an exported file: when int8 is made again."""

from __future__ import annotations

import msgspec
import pytest

from ganexport.export.lower import _quieter
from ganexport.parity import Certificate, TensorParity

CERTIFICATE = Certificate("fail", "golden outputs", "onnxruntime", "int8")


@pytest.mark.parametrize(
    ("drift", "worst", "min_psnr", "asked"),
    [
        (0.024, 35.6, None, 37.39),  # noise has to lose a sixth of its power, and a decibel more
        (0.024, 34.0, None, 36.79),  # from the tolerance's own figure at least
        (0.024, 35.6, 40.0, 41.79),  # or the user's
        (0.1, 35.6, None, 43.59),
        (0.12, 35.6, None, None),  # beyond reach
        (0.02, 35.6, None, None),
        (None, 35.6, None, None),
    ],
)
def test_int8_whose_distribution_drifts_is_made_again_with_less_noise(drift, worst, min_psnr, asked):
    output = TensorParity("image", 256, 0.1, 0.01, worst + 3, worst, (0, 0), 2.0)
    certificate = msgspec.structs.replace(CERTIFICATE, outputs=(output,), frechet_drift=drift)
    found = _quieter(certificate, min_psnr)
    assert found == (None if asked is None else pytest.approx(asked, abs=0.01))


def test_other_precisions_are_not_judged_by_their_drift():
    certificate = msgspec.structs.replace(CERTIFICATE, precision="fp16", frechet_drift=0.5)
    assert _quieter(certificate, None) is None
