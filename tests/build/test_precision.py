"""fp16 and bf16 on hand-made graphs: casts, kept layers, schemas, ranges; the diverging layer; int8 for TensorRT."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ganexport.build import diverge
from ganexport.build.onnx_file import sort_nodes
from ganexport.build.precision import low_precision, matching
from ganexport.build.symmetric import symmetric_activations

GENERATOR = np.random.default_rng(0)


def graph(nodes, inputs, outputs, initializers, opset=20):
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in initializers.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model, **feeds):
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.fixture
def network():
    """x [n, 4, 5, 5] → Conv → Exp (sensitive) → Resize (fp32 scales) → ReduceMean → Conv → y."""
    weights = {"w1": GENERATOR.standard_normal((6, 4, 3, 3), np.float32) * 0.1, "w2": np.ones((2, 6, 1, 1), np.float32)}
    scales = np.array([1, 1, 2, 2], np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Exp", ["a"], ["b"], name="grow"),
        helper.make_node("Resize", ["b", "", "scales"], ["c"], name="up", mode="nearest"),
        helper.make_node("Conv", ["c", "w2"], ["y"], name="last"),
    ]
    return graph(nodes, {"x": ["n", 4, 5, 5]}, {"y": ["n", 2, 6, 6]}, weights | {"scales": scales})


def test_fp16_keeps_edges_sensitive_operators_and_fp32_arguments(network):
    low = low_precision(network, "fp16")
    by_name = {node.name: node for node in low.graph.node}
    assert by_name["first"].input[0] == "x_fp16"
    assert by_name["grow"].input[0] == "a", "Exp computes in fp32"
    assert by_name["up"].input[2] == "scales", "the schema of Resize wants fp32 scales"
    assert by_name["up"].input[0] == "b_fp16"
    types = {t.name: t.data_type for t in low.graph.initializer}
    assert types == {"w1_fp16": TensorProto.FLOAT16, "w2_fp16": TensorProto.FLOAT16, "scales": TensorProto.FLOAT}
    x = GENERATOR.standard_normal((3, 4, 5, 5), np.float32)
    (wanted,), (got,) = run(network, x=x), run(low, x=x)
    assert got.dtype == np.float32
    assert 0 < np.abs(got - wanted).max() < 2e-2 * np.abs(wanted).max()
    casts = [node for node in low.graph.node if node.op_type == "Cast"]
    assert len(casts) == 4, "x in, around Exp, y out: no more"


def test_the_given_model_is_not_changed(network):
    before = network.SerializeToString(deterministic=True)
    low_precision(network, "fp16")
    assert network.SerializeToString(deterministic=True) == before


def test_kept_nodes_share_fp32_without_a_cast_between_them(network):
    low = low_precision(network, "fp16", keep={"first", "Resize"})
    assert not [t for t in low.graph.initializer if t.name == "w1_fp16"]
    names = [node.name for node in low.graph.node if node.op_type == "Cast"]
    assert names == ["cast_c_fp16", "cast_y"]
    assert matching(network, ["first", "Resize", "nothing"]) == ["nothing"]


def test_weights_beyond_fp16_stay_in_fp32():
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["a"], name="big"),
        helper.make_node("Mul", ["a", "v"], ["y"], name="small"),
    ]
    model = graph(nodes, {"x": ["n", 2]}, {"y": ["n", 2]}, {"w": np.float32([1e6, 1]), "v": np.float32([1e-6, 1])})
    low = low_precision(model, "fp16")
    assert {t.name for t in low.graph.initializer} == {"w", "v_fp16"}


def test_bf16_rounds_to_nearest_even_and_needs_a_newer_opset():
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5, 3.3895314e38, 1e-40], np.float32)
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"], name="m")]
    model = graph(nodes, {"x": ["n", 6]}, {"y": ["n", 6]}, {"w": values})
    low = low_precision(model, "bf16")
    assert max(e.version for e in low.opset_import) >= 22
    (tensor,) = [t for t in low.graph.initializer if t.name == "w_bf16"]
    assert tensor.data_type == TensorProto.BFLOAT16
    bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
    rounded = bits.view(np.float32)
    # 1 + 2^-8 and 1 + 3·2^-8 are ties: the first goes down to even, the second up.
    assert rounded[:4].tolist() == [1.0, 1.0, 1.015625, -2.5]


def test_constants_and_shapes_are_followed():
    fill = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.5])
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("ConstantOfShape", ["s"], ["k"], name="fill", value=fill),
        helper.make_node("Constant", [], ["c"], name="constant", value=numpy_helper.from_array(np.float32(2.0))),
        helper.make_node("Add", ["x", "k"], ["a"], name="add"),
        helper.make_node("Mul", ["a", "c"], ["y"], name="mul"),
    ]
    model = graph(nodes, {"x": ["n", 3]}, {"y": ["n", 3]}, {})
    (got,) = run(low_precision(model, "fp16"), x=np.ones((2, 3), np.float32))
    assert got.tolist() == [[3.0] * 3] * 2


def test_what_a_subgraph_reads_stays_fp32():
    inner = helper.make_graph(
        [helper.make_node("Add", ["a", "a"], ["t"], name="inside")], "then", [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["e"], name="as_is")], "else", [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["a"], name="square"),
        helper.make_node("If", ["yes"], ["b"], name="branch", then_branch=inner, else_branch=other),
        helper.make_node("Mul", ["b", "x"], ["y"], name="out"),
    ]
    model = graph(nodes, {"x": ["n", 2]}, {"y": ["n", 2]}, {"yes": np.array(True)})
    (got,) = run(low_precision(model, "fp16"), x=np.full((1, 2), 3.0, np.float32))
    assert got.tolist() == [[54.0, 54.0]]


def test_the_first_diverging_layer_is_found():
    nodes = [
        helper.make_node("Mul", ["x", "one"], ["a"], name="fine"),
        helper.make_node("Mul", ["a", "k"], ["b"], name="large"),
        helper.make_node("Mul", ["b", "b"], ["c"], name="overflow"),
        helper.make_node("Tanh", ["c"], ["y"], name="hide"),
    ]
    constants = {"one": np.float32([1.0]), "k": np.float32([1000.0])}
    model = graph(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, constants)
    feeds = [{"x": np.linspace(1, 2, 4, dtype=np.float32)[None]}]
    layers = diverge.divergence(model, low_precision(model, "fp16"), feeds, "fp16")
    assert [layer.node for layer in layers] == ["fine", "large", "overflow", "hide"]
    assert diverge.first_diverging(layers).node == "overflow"
    assert diverge.overflowing(layers) == ["overflow"]
    assert diverge.neighbours(model, {"overflow"}) == {"overflow", "hide"}
    kept = low_precision(model, "fp16", keep=diverge.neighbours(model, {"overflow"}))
    again = diverge.divergence(model, kept, feeds, "fp16")
    assert all(np.isfinite(layer.error) for layer in again)


def test_nodes_are_sorted_stably():
    nodes = [
        helper.make_node("Relu", ["b"], ["y"], name="third"),
        helper.make_node("Relu", ["a"], ["b"], name="second"),
        helper.make_node("Relu", ["x"], ["a"], name="first"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    sort_nodes(model)
    assert [node.name for node in model.graph.node] == ["first", "second", "third"]


def test_symmetric_activations_keep_the_range_the_cut_at_zero_and_the_bias():
    scale, zero = np.float32(0.02), np.uint8(0)
    bias, bias_scale = np.array([100, -50], np.int32), np.array([0.01, 0.02], np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
        helper.make_node("DequantizeLinear", ["bias", "bs"], ["b"], name="db", axis=0),
        helper.make_node("Add", ["d", "b"], ["y"], name="add"),
    ]
    model = graph(nodes, {"x": ["n", 2]}, {"y": ["n", 2]}, {"s": scale, "z": zero, "bias": bias, "bs": bias_scale})
    x = np.array([[-1.0, 0.5], [5.0, 9.0]], np.float32)
    (before,) = run(model, x=x)
    assert symmetric_activations(model) == 3
    (after,) = run(model, x=x)
    assert not {t.data_type for t in model.graph.initializer} & {TensorProto.UINT8, TensorProto.INT32}
    np.testing.assert_allclose(after, before, atol=0.03)
    assert after[0, 0] == pytest.approx(1.0), "negative values are still cut off, and the bias is 100 · 0.01"


@pytest.mark.parametrize("kind", ["rsqrt", "clamped norm", "added norm", "pow"])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-12])
def test_the_epsilon_of_a_division_survives_fp16(kind, epsilon):
    """A pixel of zeros is normalised to zeros: in fp16 the epsilon alone would be zero, or its root infinite."""
    constants = {"axes": np.array([1], np.int64), "epsilon": np.float32(epsilon), "half": np.float32(-0.5)}
    square = [
        helper.make_node("Mul", ["x", "x"], ["s"]),
        helper.make_node("ReduceMean", ["s", "axes"], ["m"]),
        helper.make_node("Add", ["m", "epsilon"], ["e"], name="guard"),
    ]
    norm = [helper.make_node("ReduceL2", ["x", "axes"], ["n"])]
    nodes = {
        "rsqrt": [
            *square, helper.make_node("Sqrt", ["e"], ["r"]), helper.make_node("Reciprocal", ["r"], ["i"]),
            helper.make_node("Mul", ["x", "i"], ["y"]),
        ],
        "pow": [
            *square, helper.make_node("Pow", ["e", "half"], ["i"]), helper.make_node("Mul", ["x", "i"], ["y"]),
        ],
        "clamped norm": [
            *norm, helper.make_node("Clip", ["n", "epsilon"], ["e"], name="guard"),
            helper.make_node("Div", ["x", "e"], ["y"]),
        ],
        "added norm": [
            *norm, helper.make_node("Add", ["n", "epsilon"], ["e"], name="guard"),
            helper.make_node("Div", ["x", "e"], ["y"]),
        ],
    }[kind]  # fmt: skip
    used = {name: value for name, value in constants.items() if any(name in node.input for node in nodes)}
    model = graph(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, used)
    x = GENERATOR.standard_normal((5, 4)).astype(np.float32)
    x[2] = 0.0
    (wanted,), (got,) = run(model, x=x), run(low_precision(model, "fp16"), x=x)
    assert np.isfinite(got).all()
    assert (got[2] == 0.0).all()
    assert np.abs(got - wanted).max() < 5e-3
