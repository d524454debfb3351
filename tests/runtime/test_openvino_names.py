"""OpenVINO merges tensors when it compiles: the input is still found under the spec's name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ganexport.runtime.openvino import OpenVinoRunner
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec

pytest.importorskip("openvino")

SPEC = GeneratorSpec(
    (TensorSpec("z", "float32", ("batch", 5), Normal()),),
    (TensorSpec("y", "float32", ("batch", 3)),),
    (Dim("batch", 1, 2, 4),),
)


def test_an_input_merged_with_a_reshaping_keeps_its_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Unsqueeze", ["z", "axes"], ["apart"]),
        helper.make_node("Flatten", ["apart"], ["again"]),
        helper.make_node("Gemm", ["again", "w"], ["y"]),
    ]
    weight = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    constants = {"axes": np.array([2, 3], np.int64), "w": weight}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    z = np.random.default_rng(1).standard_normal((2, 5)).astype(np.float32)
    with OpenVinoRunner.open(path, SPEC) as runner:
        np.testing.assert_allclose(runner.run({"z": z})["y"], z @ weight, rtol=1e-5, atol=1e-6)
