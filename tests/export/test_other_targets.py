"""The rebuilt generators through OpenVINO, int8 and ``--to auto``."""

from __future__ import annotations

from pathlib import Path

import pytest
from generators import GENERATORS

from ganexport.errors import ExportError
from ganexport.export.convert import convert

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", GENERATORS)
def test_openvino(name, precision, tmp_path):
    made = convert(
        f"generators.{name}:make", to="openvino", output=tmp_path / "out", precision=precision, verify_budget=20,
        **GENERATORS[name],
    )  # fmt: skip
    certificate = made.find("openvino", precision).certificate
    assert certificate.verdict == "pass"
    assert certificate.runtime.startswith("openvino")
    for dim in made.spec.dims:
        assert {dim.min, dim.max} <= {sizes[dim.name] for sizes in certificate.unseen}


@pytest.mark.parametrize("to", ["onnx", "openvino", "trt"])
@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "textgan"])
def test_int8(name, to, tmp_path):
    made = convert(
        f"generators.{name}:make", to=to, output=tmp_path / "out", precision="int8", verify_budget=20,
        **GENERATORS[name],
    )  # fmt: skip
    assert made.find("onnx", "int8").certificate.verdict == "pass"
    assert made.find(to, "int8").certificate.verdict in ("pass", "partial")
    import onnx

    operators = [node.op_type for node in onnx.load(made.path / "generator.int8.onnx").graph.node]
    assert operators.count("QuantizeLinear") >= 1


@pytest.mark.parametrize("name", GENERATORS)
def test_auto(name, tmp_path):
    made = convert(
        f"generators.{name}:make", to="auto", output=tmp_path / "out", verify_budget=20, bench_batches=[1, 3],
        **GENERATORS[name],
    )  # fmt: skip
    assert any(file.certificate.verdict == "pass" for file in made.manifest.files)
    assert made.manifest.report


TRAINED = sorted(path.parent.name for path in (Path(__file__).parents[2] / "models").glob("*/weights.safetensors"))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", TRAINED)
def test_trained_models_pass_their_tolerance_in_low_precision(name, precision, tmp_path):
    if (name, precision) == ("r3gan-mnist", "int8"):
        # Without normalisation its activations have tails: the best single layer alone reads 34 dB in int8.
        with pytest.raises(ExportError, match="int8 stays below 35 dB with any layer quantized"):
            convert(name, to="onnx", output=tmp_path / "out", precision=precision, verify_budget=60)
        return
    made = convert(name, to="onnx", output=tmp_path / "out", precision=precision, verify_budget=60)
    certificate = made.find("onnx", precision).certificate
    assert certificate.verdict == "pass"
    assert certificate.frechet_drift is not None
    assert certificate.frechet_drift <= 0.02
