"""The cost model orders alternatives as they are known to order on each target."""

from __future__ import annotations

import pytest

from ganexport.build.cost import RATES, Target, Work
from ganexport.errors import UsageError

LAYER = Work("ConvTranspose", macs=33.5e6, elements=49e3, weights=2.1e6)
CONVOLUTION = Work("Conv", macs=33.5e6, elements=81e3, weights=2.1e6)
INTERLEAVE = Work("DepthToSpace", elements=65e3)


def test_work_takes_longer_with_more_of_anything() -> None:
    for target in (Target(*key) for key in RATES):
        assert target.seconds(Work("Conv", macs=2e9)) > target.seconds(Work("Conv", macs=1e9))
        assert target.seconds(Work("Slice", elements=2e7)) > target.seconds(Work("Slice", elements=1e7))
        assert target.seconds(Work("Relu")) >= target.rates.launch


def test_a_larger_batch_shares_weights_and_launches() -> None:
    one, many = Target("openvino", "int8", 1), Target("openvino", "int8", 64)
    assert many.seconds(LAYER) < 64 * one.seconds(LAYER)


@pytest.mark.parametrize(
    "target", [Target("openvino", "int8"), Target("openvino", "bf16"), Target("onnxruntime", "int8")]
)
def test_low_precision_pays_for_the_interleave(target: Target) -> None:
    assert target.seconds(CONVOLUTION) + target.seconds(INTERLEAVE) < target.seconds(LAYER)


@pytest.mark.parametrize("target", [Target("onnxruntime", "fp32"), Target("trt", "fp32"), Target("trt", "fp16")])
def test_where_transposed_convolutions_are_fast_the_interleave_does_not_pay(target: Target) -> None:
    assert target.seconds(CONVOLUTION) + target.seconds(INTERLEAVE) > target.seconds(LAYER)


def test_unknown_target_is_refused() -> None:
    with pytest.raises(UsageError, match="onnxruntime fp32"):
        Target("onnxruntime", "fp64")
