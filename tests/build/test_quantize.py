"""Static int8: the ranges are good, the noise is what is promised, sensitive layers stay wide."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ganexport.build.cost import Target
from ganexport.build.quantize import (
    METHODS,
    best_range,
    int8_weights,
    quantize,
    strip_repeated_pairs,
    strip_useless_pairs,
)
from ganexport.build.rewrites import rewrite
from ganexport.errors import ExportError, UsageError
from ganexport.parity import Comparison
from ganexport.seeding import latents
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec

SPEC = GeneratorSpec(
    (TensorSpec("z", "float32", ("batch", 16), Normal()),),
    (TensorSpec("image", "float32", ("batch", 3, 16, 16), range=(-1.0, 1.0), layout="NCHW"),),
    (Dim("batch", 1, 8, 64),),
)


def generator(outlier: float = 1.0) -> onnx.ModelProto:
    """z -> Gemm -> two transposed convolutions -> tanh; ``outlier`` spoils one layer's activations."""
    rng = np.random.default_rng(0)

    def weights(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    constants = {
        "w0": weights(16, 32 * 16, scale=0.25),
        "w1": weights(32, 16, 4, 4, scale=0.09),
        "w2": weights(16, 3, 4, 4, scale=0.12),
        "shape": np.array([0, 32, 4, 4], np.int64),
    }
    constants["w0"][:, 0] *= outlier
    constants["w1"][0] /= outlier
    nodes = [
        helper.make_node("Gemm", ["z", "w0"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Reshape", ["b", "shape"], ["c"]),
        helper.make_node("ConvTranspose", ["c", "w1"], ["d"], name="second", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("ConvTranspose", ["e", "w2"], ["f"], name="third", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["f"], ["image"]),
    ]
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 16])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [z], [image], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def outputs(model: onnx.ModelProto, feeds: dict[str, Any]) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def worst_psnr(model: onnx.ModelProto, candidate: onnx.ModelProto) -> float:
    feeds = latents(SPEC, 123, 0, 64)
    comparison = Comparison("image", (-1.0, 1.0))
    comparison.add(outputs(model, feeds), outputs(candidate, feeds))
    found = comparison.result().worst_psnr
    assert found is not None
    return found


def test_int8_reaches_its_figure_on_inputs_it_never_saw() -> None:
    model = rewrite(generator(), Target("onnxruntime", "int8"), options={"conv-transpose": {"form": "crop"}})[0]
    before = model.SerializeToString(deterministic=True)
    made = quantize(model, SPEC, samples=32)
    assert model.SerializeToString(deterministic=True) == before
    assert made.psnr >= 35.0
    assert worst_psnr(generator(), made.model) >= 35.0
    assert {node.op_type for node in made.model.graph.node} >= {"QuantizeLinear", "DequantizeLinear"}
    weights = {t.name: t.data_type for t in made.model.graph.initializer}
    assert TensorProto.INT8 in weights.values()
    onnx.checker.check_model(made.model, full_check=True)
    assert [v.name for v in made.model.graph.input] == ["z"]
    assert made.model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_weights_are_scaled_channel_by_channel() -> None:
    made = quantize(rewrite(generator())[0], SPEC, samples=8, methods=("minmax",), min_psnr=10.0)
    scales = [t for t in made.model.graph.initializer if "weight" in t.name and t.name.endswith("_scale")]
    assert scales
    assert all(len(t.dims) == 1 and t.dims[0] > 1 for t in scales)


def widest_weight(model: onnx.ModelProto) -> int:
    weights = [t for t in model.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    return max(int(np.abs(numpy_helper.to_array(tensor).astype(int)).max()) for tensor in weights)


@pytest.mark.parametrize(
    ("asked", "overflows", "narrow"),
    [(None, True, True), (None, False, False), (None, None, True), (False, True, False), (True, False, True)],
)
def test_weights_have_7_bits_where_products_of_8_would_overflow(
    asked: bool | None, overflows: bool | None, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ganexport.build.quantize.int8_overflows", lambda: overflows)
    model = rewrite(generator())[0]
    made = quantize(model, SPEC, samples=8, methods=("minmax",), min_psnr=10.0, narrow_weights=asked)
    assert widest_weight(made.model) == (64 if narrow else 127)
    assert ("7-bit weights" in made.passes[0]) == narrow == made.narrow_weights
    assert int8_weights(made.model) == {"int8_weights": "7 bits" if narrow else "8 bits"}
    assert int8_weights(model) == {}


def test_the_figure_is_the_graphs_own_even_where_products_overflow() -> None:
    model = rewrite(generator())[0]
    made = quantize(model, SPEC, samples=32, methods=("minmax",), min_psnr=30.0, narrow_weights=False)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # no int8 arithmetic at all
    session = ort.InferenceSession(made.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    comparison = Comparison("image", (-1.0, 1.0))
    for feeds in (latents(SPEC, 123, start, 64) for start in range(0, 256, 64)):
        comparison.add(outputs(model, feeds), session.run(None, feeds)[0])
    worst = comparison.result().worst_psnr
    assert worst is not None
    assert abs(worst - made.psnr) < 1.5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_calibrates(method: str) -> None:
    made = quantize(rewrite(generator())[0], SPEC, samples=16, methods=(method,), min_psnr=15.0)
    assert made.method == method
    assert set(made.methods) == {method}


def test_the_noisiest_layer_stays_wide() -> None:
    model = generator(outlier=40.0)
    all_narrow = quantize(model, SPEC, samples=32, methods=("minmax",), min_psnr=5.0)
    wanted = all_narrow.psnr + 2.0
    made = quantize(model, SPEC, samples=32, methods=("minmax",), min_psnr=wanted)
    assert made.wide
    assert made.psnr >= wanted
    noisiest = min(made.sensitivity, key=lambda name: made.sensitivity[name])
    assert noisiest in made.wide
    assert worst_psnr(model, made.model) > worst_psnr(model, all_narrow.model)


def test_an_impossible_figure_is_refused_with_what_to_do() -> None:
    with pytest.raises(ExportError, match="bf16 or fp16"):
        quantize(generator(), SPEC, samples=8, methods=("minmax",), min_psnr=90.0)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UsageError, match="methods"):
        quantize(generator(), SPEC, methods=("maximum",))
    with pytest.raises(UsageError, match="sample"):
        quantize(generator(), SPEC, samples=0)
    with pytest.raises(ExportError, match="to quantize"):
        quantize(generator(), SPEC, keep=("Gemm", "ConvTranspose"))
    unsampled = GeneratorSpec((TensorSpec("z", "float32", ("batch", 16)),), SPEC.outputs, SPEC.dims)
    with pytest.raises(UsageError, match="no sampler"):
        quantize(generator(), unsampled)


def test_wide_outputs_removes_only_what_no_layer_reads() -> None:
    model = rewrite(generator(), options={"conv-transpose": {"form": "crop"}})[0]
    kept = quantize(model, SPEC, samples=16, methods=("minmax",), min_psnr=10.0)
    wide = quantize(model, SPEC, samples=16, methods=("minmax",), min_psnr=10.0, wide_outputs=True)
    count = [[n.op_type for n in made.model.graph.node].count("QuantizeLinear") for made in (kept, wide)]
    assert count[1] < count[0]
    onnx.checker.check_model(wide.model, full_check=True)
    assert wide.psnr >= kept.psnr - 0.5
    assert strip_useless_pairs(wide.model) == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10.0), st.booleans())
def test_best_range_never_rounds_worse_than_the_full_range(seed: int, scale: float, positive: bool) -> None:
    values = np.random.default_rng(seed).standard_t(3, 20_000) * scale
    if positive:
        values = np.maximum(values, 0.0)
    limit = float(np.abs(values).max())
    histogram, edges = np.histogram(values, 2048, range=(-limit, limit))
    low, high = best_range(histogram, edges, float(values.min()), float(values.max()))

    def error(bottom: float, top: float) -> float:
        step = (top - bottom) / 255
        rounded = np.round((np.clip(values, bottom, top) - bottom) / step) * step + bottom
        return float(((values - rounded) ** 2).mean())

    assert values.min() - 1e-9 <= low <= 0.0 <= high <= values.max() + 1e-9
    assert error(low, high) <= error(min(values.min(), 0.0), max(values.max(), 0.0)) * 1.05


def leaky_generator() -> onnx.ModelProto:
    """Two small matrix products make a style; a sub-pixel convolution with a signed activation, then another."""
    rng = np.random.default_rng(1)

    def weights(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    constants = {
        "w0": weights(16, 32 * 16, scale=0.25),
        "m0": weights(16, 4, scale=0.25),
        "m1": weights(4, 32, scale=0.5),
        "axes": np.array([2, 3], np.int64),
        "w1": weights(64, 32, 3, 3, scale=0.09),
        "w2": weights(12, 16, 3, 3, scale=0.12),
        "shape": np.array([0, 32, 4, 4], np.int64),
    }
    nodes = [
        helper.make_node("Gemm", ["z", "w0"], ["a"], name="first"),
        helper.make_node("Reshape", ["a", "shape"], ["c"]),
        helper.make_node("Gemm", ["z", "m0"], ["s0"], name="style0"),
        helper.make_node("Gemm", ["s0", "m1"], ["s1"], name="style1"),
        helper.make_node("Unsqueeze", ["s1", "axes"], ["s"]),
        helper.make_node("Mul", ["c", "s"], ["t"]),
        helper.make_node("Conv", ["t", "w1"], ["d"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("LeakyRelu", ["d"], ["e"], alpha=0.2),
        helper.make_node("DepthToSpace", ["e"], ["f"], blocksize=2),
        helper.make_node("Conv", ["f", "w2"], ["g"], name="third", pads=[1, 1, 1, 1]),
        helper.make_node("DepthToSpace", ["g"], ["h"], blocksize=2),
        helper.make_node("Tanh", ["h"], ["image"]),
    ]
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 16])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [z], [image], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def types_before(model: onnx.ModelProto, name: str) -> list[str]:
    """Operators upwards from the first input of the node of that name."""
    producers = {output: node for node in model.graph.node for output in node.output}
    node, found = next(node for node in model.graph.node if node.name == name), []
    while node.input[0] in producers:
        node = producers[node.input[0]]
        found.append(node.op_type)
    return found


def test_small_matrix_products_stay_wide() -> None:
    made = quantize(leaky_generator(), SPEC, samples=16, methods=("minmax",), min_psnr=10.0)
    assert types_before(made.model, "style1") == ["Gemm"]
    assert types_before(made.model, "first")[:1] == ["DequantizeLinear"]
    assert types_before(made.model, "second")[:2] == ["DequantizeLinear", "QuantizeLinear"]
    assert not set(made.sensitivity) & {"style0", "style1"}


def test_numbers_that_only_moved_are_not_rounded_twice() -> None:
    ours = quantize(leaky_generator(), SPEC, samples=16, methods=("minmax",), min_psnr=10.0, wide_outputs=True).model
    pair = ["DequantizeLinear", "QuantizeLinear"]
    assert types_before(ours, "third")[:4] == ["DepthToSpace", *pair, "LeakyRelu"]
    twice = quantize(leaky_generator(), SPEC, samples=16, methods=("minmax",), min_psnr=10.0).model
    assert types_before(twice, "third")[:6] == [*pair, "DepthToSpace", *pair, "LeakyRelu"]
    once = onnx.ModelProto()
    once.CopyFrom(twice)
    assert strip_repeated_pairs(once) >= 1
    feeds = latents(SPEC, 5, 0, 8)
    np.testing.assert_array_equal(plain_outputs(once, feeds), plain_outputs(twice, feeds))


def test_a_rounding_that_only_a_wide_layer_reads_is_taken_out() -> None:
    made = quantize(
        leaky_generator(), SPEC, samples=16, methods=("minmax",), min_psnr=10.0, keep=("third",), wide_outputs=True
    ).model
    assert types_before(made, "third")[:2] == ["DepthToSpace", "LeakyRelu"]
    assert types_before(made, "second")[:2] == ["DequantizeLinear", "QuantizeLinear"]


def plain_outputs(model: onnx.ModelProto, feeds: dict[str, Any]) -> np.ndarray:
    """As the graph is written, nothing fused."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def test_a_rounding_to_other_levels_stays() -> None:
    made = quantize(leaky_generator(), SPEC, samples=16, methods=("minmax",), min_psnr=10.0).model
    mover = next(node for node in made.graph.node if node.op_type == "DepthToSpace")
    second = next(n for n in made.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == mover.output[0])
    wider = numpy_helper.from_array(np.array(0.5, np.float32), "another_scale")
    made.graph.initializer.append(wider)
    for node in made.graph.node:
        if node is second or (node.op_type == "DequantizeLinear" and node.input[0] == second.output[0]):
            node.input[1] = "another_scale"
    name = second.name
    strip_repeated_pairs(made)
    assert any(node.name == name for node in made.graph.node)
