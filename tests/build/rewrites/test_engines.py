"""What the rewrites write, TensorRT parses and builds, and OpenVINO computes alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ganexport.build import onnx_file, tensorrt
from ganexport.build.options import BuildOptions
from ganexport.build.rewrites import rewrite
from ganexport.runtime.onnxruntime import OnnxRuntimeRunner
from ganexport.runtime.openvino import OpenVinoRunner
from ganexport.seeding import latents
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec

SPEC = GeneratorSpec(
    (TensorSpec("z", "float32", ("batch", 7, 1, 1), Normal()),),
    (TensorSpec("image", "float32", ("batch", 3, 16, 16), range=(-1.0, 1.0), layout="NCHW"),),
    (Dim("batch", 1, 2, 4),),
)
FORMS = ("crop", "aligned", "split")


def generator() -> onnx.ModelProto:
    """1x1 -> 4x4 -> upsample and convolve to 8x8 -> transposed convolution to 16x16."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.2).astype(np.float32)

    nodes = [
        helper.make_node("ConvTranspose", ["z", "w0"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node(
            "Resize", ["b", "", "scales"], ["c"], coordinate_transformation_mode="asymmetric", nearest_mode="floor"
        ),
        helper.make_node("Conv", ["c", "w1"], ["d"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("ConvTranspose", ["e", "w2"], ["f"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["f"], ["image"]),
    ]
    constants = {
        "w0": weights(7, 8, 4, 4),
        "w1": weights(6, 8, 3, 3),
        "w2": weights(6, 3, 4, 4),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 7, 1, 1])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def written(form: str, folder: Path) -> Path:
    model, applied = rewrite(generator(), options={"conv-transpose": {"form": form}, "upsample-conv": {"form": form}})
    assert {text.split(" ")[0] for text in applied} >= {"first-layer-gemm", "conv-transpose", "upsample-conv"}
    onnx_file.write_spec(model, SPEC)
    onnx_file.save_model(model, folder / "g.onnx")
    return folder / "g.onnx"


@pytest.mark.parametrize("form", FORMS)
def test_tensorrt_builds_every_form(form: str, tmp_path: Path) -> None:
    if tensorrt.unavailable():
        pytest.skip("no TensorRT builder is installed here")
    built = tensorrt.build(written(form, tmp_path), SPEC, tmp_path, "fp32", BuildOptions())
    assert (tmp_path / built.path).stat().st_size > 1000


@pytest.mark.parametrize("form", FORMS)
def test_openvino_and_onnxruntime_agree_on_every_form(form: str, tmp_path: Path) -> None:
    source = tmp_path / "source.onnx"
    model = generator()
    onnx_file.write_spec(model, SPEC)
    onnx_file.save_model(model, source)
    feeds = latents(SPEC, 3, 0, 3)
    with OnnxRuntimeRunner.open(source, SPEC) as truth, OpenVinoRunner.open(written(form, tmp_path), SPEC) as runner:
        np.testing.assert_allclose(runner.run(feeds)["image"], truth.run(feeds)["image"], atol=2e-5)
