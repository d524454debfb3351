"""Fixing a label: the same outputs as feeding it, and the input is gone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from ganexport.build.rewrites import rewrite
from ganexport.errors import UsageError

rng = np.random.default_rng(0)


def conditional(joined: str) -> onnx.ModelProto:
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 4])
    label = helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", None])
    nodes = [
        helper.make_node("Gather", ["table", "label"], ["e"]),
        helper.make_node("Relu", ["e"], ["r"]),
        helper.make_node(joined, ["z", "r"], ["j"], **({"axis": 1} if joined == "Concat" else {})),
        helper.make_node("Tanh", ["j"], ["y"]),
    ]
    table = numpy_helper.from_array(rng.standard_normal((10, 4)).astype(np.float32), "table")
    graph = helper.make_graph(nodes, "g", [z, label], [y], [table])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize("joined", ["Concat", "Add"])
def test_fixed_label_equals_the_fed_one(joined: str) -> None:
    before = conditional(joined)
    after, applied = rewrite(before, None, ("fix-input", "remove-dead"), {"fix-input": {"values": {"label": 7}}})
    assert applied[0] == "fix-input x1"
    onnx.checker.check_model(after, full_check=True)
    assert [v.name for v in after.graph.input] == ["z"]
    assert "Gather" not in [node.op_type for node in after.graph.node]
    for batch in (1, 3):
        z = rng.standard_normal((batch, 4)).astype(np.float32)
        expected = run(before, {"z": z, "label": np.full(batch, 7)})
        np.testing.assert_allclose(run(after, {"z": z}), expected, rtol=1e-6)


def test_what_cannot_be_fixed_is_refused() -> None:
    for values, message in (
        ({"lable": 3}, "no input"),
        ({"label": [1, 2]}, "shape"),
        ({"z": [0.0] * 4, "label": 1}, "batch"),
    ):
        with pytest.raises(UsageError, match=message):
            rewrite(conditional("Add"), None, ("fix-input",), {"fix-input": {"values": values}})
