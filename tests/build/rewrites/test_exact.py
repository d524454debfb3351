"""Every rewrite is exact: original and rewritten graphs in ONNX Runtime over random shapes and attributes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ganexport.build.cost import Target
from ganexport.build.rewrites import DEFAULT_ORDER, REWRITES, rewrite
from ganexport.errors import UsageError

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
rng = np.random.default_rng(0)


def weights(*shape: int, scale: float = 0.3) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto],
    shape: list[Any],
    constants: dict[str, np.ndarray],
    rank: int | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (rank or len(shape)))
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(made)
    return made


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]


def op_types(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def same(before: onnx.ModelProto, after: onnx.ModelProto, *shapes: tuple[int, ...]) -> None:
    onnx.checker.check_model(after, full_check=True)
    assert [v.name for v in after.graph.input] == ["x"]
    assert [v.name for v in after.graph.output] == ["y"]
    for shape in shapes:
        x = rng.standard_normal(shape).astype(np.float32)
        expected, actual = run(before, x), run(after, x)
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(expected).max()))


@st.composite
def transposed(draw: Any, rank: int) -> dict[str, Any]:
    kernel = [draw(st.integers(1, 5)) for _ in range(rank)]
    stride = [draw(st.integers(1, 3)) for _ in range(rank)]
    if draw(st.booleans()):
        stride = [stride[0]] * rank
    dilation = [draw(st.integers(1, 2)) for _ in range(rank)]
    length = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    begin = [draw(st.integers(0, (n - 1))) for n in length]
    end = [draw(st.integers(0, (n - 1))) for n in length]
    extra = [draw(st.integers(0, s - 1)) for s in stride]
    return {
        "kernel_shape": kernel,
        "strides": stride,
        "dilations": dilation,
        "pads": begin + end,
        "output_padding": extra,
        "group": draw(st.sampled_from([1, 1, 2])),
    }


def transposed_model(attributes: dict[str, Any], sizes: list[Any], *, bias: bool = True) -> onnx.ModelProto:
    groups = attributes["group"]
    constants = {"w": weights(2 * groups, 3, *attributes["kernel_shape"])}
    inputs = ["x", "w"]
    if bias:
        constants["b"] = weights(3 * groups)
        inputs.append("b")
    node = helper.make_node("ConvTranspose", inputs, ["y"], **attributes)
    return model([node], ["batch", 2 * groups, *sizes], constants)


def big_enough(attributes: dict[str, Any], sizes: list[int]) -> bool:
    rank = len(sizes)
    return all(
        (sizes[i] - 1) * attributes["strides"][i]
        + (attributes["kernel_shape"][i] - 1) * attributes["dilations"][i]
        + 1
        + attributes["output_padding"][i]
        - attributes["pads"][i]
        - attributes["pads"][rank + i]
        > 0
        for i in range(rank)
    )


@pytest.mark.parametrize("form", ["crop", "aligned", "split"])
@pytest.mark.parametrize("rank", [1, 2])
@QUICK
@given(data=st.data())
def test_conv_transpose_is_exact(form: str, rank: int, data: Any) -> None:
    attributes = data.draw(transposed(rank))
    sizes = [data.draw(st.integers(4, 6)) for _ in range(rank)]
    if not big_enough(attributes, sizes):
        return
    symbolic = data.draw(st.booleans())
    before = transposed_model(attributes, ["height", "width"][:rank] if symbolic else sizes)
    after, applied = rewrite(before, None, ("conv-transpose",), {"conv-transpose": {"form": form}})
    assert bool(applied) == ("ConvTranspose" not in op_types(after))
    same(
        before,
        after,
        (1, before.graph.input[0].type.tensor_type.shape.dim[1].dim_value, *sizes),
        (3, 2 * attributes["group"], *sizes),
    )


@pytest.mark.parametrize("form", ["crop", "aligned", "split"])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [4, 4], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        {"kernel_shape": [5, 5], "strides": [2, 2], "pads": [2, 2, 2, 2], "output_padding": [1, 1]},
        {"kernel_shape": [6, 6], "strides": [2, 2], "pads": [2, 2, 2, 2]},
        {"kernel_shape": [4, 4], "strides": [4, 4]},
    ],
)
def test_the_usual_layers_qualify_in_every_form(form: str, attributes: dict[str, Any]) -> None:
    rank = len(attributes["kernel_shape"])
    full = {"pads": [0] * 2 * rank, "output_padding": [0] * rank, "dilations": [1] * rank, "group": 1, **attributes}
    before = transposed_model(full, ["h", "w"])
    after, applied = rewrite(before, None, ("conv-transpose",), {"conv-transpose": {"form": form}})
    assert applied == ("conv-transpose x1",), form
    same(before, after, (2, 2, 5, 7))


def test_fewest_operations_wins_and_the_target_decides() -> None:
    attributes = {
        "kernel_shape": [4, 4],
        "strides": [2, 2],
        "pads": [1, 1, 1, 1],
        "output_padding": [0, 0],
        "dilations": [1, 1],
        "group": 1,
    }
    before = transposed_model(attributes, [8, 8])
    assert op_types(rewrite(before, None, ("conv-transpose",))[0]).count("Conv") == 4
    kept, applied = rewrite(before, Target("onnxruntime", "fp32"), ("conv-transpose",))
    assert applied == ()
    assert op_types(kept) == ["ConvTranspose"]
    wide = {"w": weights(128, 128, 4, 4)}
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], **attributes)
    large = model([node], ["batch", 128, 16, 16], wide)
    assert rewrite(large, Target("openvino", "int8"), ("conv-transpose",))[1] == ("conv-transpose x1",)
    assert rewrite(large, Target("trt", "fp16"), ("conv-transpose",))[1] == ()


@QUICK
@given(data=st.data())
def test_first_layer_is_exact(data: Any) -> None:
    attributes = data.draw(transposed(2)) | {"group": 1}
    if not big_enough(attributes, [1, 1]):
        return
    before = transposed_model(attributes, [1, 1], bias=data.draw(st.booleans()))
    after, applied = rewrite(before, None, ("first-layer-gemm",))
    assert applied == ("first-layer-gemm x1",)
    assert "Gemm" in op_types(after)
    same(before, after, (1, 2, 1, 1), (5, 2, 1, 1))


@pytest.mark.parametrize("form", [None, "transposed", "crop", "aligned", "split", "commute"])
@QUICK
@given(data=st.data())
def test_upsample_conv_is_exact(form: str | None, data: Any) -> None:
    kernel, scale, groups = (
        data.draw(st.integers(1, 5)),
        data.draw(st.integers(2, 3)),
        data.draw(st.sampled_from([1, 2])),
    )
    pads = [data.draw(st.integers(0, kernel - 1)) for _ in range(4)]
    modes = data.draw(st.sampled_from([("asymmetric", "floor"), ("half_pixel", "round_prefer_floor")]))
    nodes = [
        helper.make_node(
            "Resize",
            ["x", "", "s"],
            ["u"],
            mode="nearest",
            coordinate_transformation_mode=modes[0],
            nearest_mode=modes[1],
        ),
        helper.make_node("Conv", ["u", "w", "b"], ["y"], pads=pads, group=groups),
    ]
    constants = {
        "s": np.array([1, 1, scale, scale], np.float32),
        "w": weights(3 * groups, 2, kernel, kernel),
        "b": weights(3 * groups),
    }
    shape = ["batch", 2 * groups, *(["h", "w_"] if data.draw(st.booleans()) else [4, 5])]
    before = model(nodes, shape, constants)
    after, applied = rewrite(before, None, ("upsample-conv",), {"upsample-conv": {"form": form}})
    if form == "commute" or (form is None and kernel == 1):
        assert bool(applied) == (kernel == 1)
        assert not applied or op_types(after) == ["Conv", "Resize"]
    else:
        assert bool(applied) == ("Resize" not in op_types(after))
    if form in (None, "transposed", "crop"):
        assert applied
    same(before, after, (1, 2 * groups, 4, 5), (3, 2 * groups, 4, 5))


def test_upsampling_that_is_no_repetition_is_left_alone() -> None:
    for attributes in ({"mode": "linear"}, {"mode": "nearest", "coordinate_transformation_mode": "align_corners"}):
        nodes = [
            helper.make_node("Resize", ["x", "", "s"], ["u"], **attributes),
            helper.make_node("Conv", ["u", "w"], ["y"], pads=[1, 1, 1, 1]),
        ]
        constants = {"s": np.array([1, 1, 2, 2], np.float32), "w": weights(3, 2, 3, 3)}
        assert rewrite(model(nodes, ["n", 2, 4, 4], constants), None, ("upsample-conv",))[1] == ()


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "Gemm", "Gemm-transposed", "grouped"])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_folds_into_every_linear_operator(kind: str, bias: bool) -> None:
    groups = 2 if kind == "grouped" else 1
    extra: dict[str, Any] = {"group": groups} if kind in ("Conv", "ConvTranspose", "grouped") else {}
    operator = {"Gemm-transposed": "Gemm", "grouped": "ConvTranspose"}.get(kind, kind)
    shape: list[Any] = ["batch", 4] if operator == "Gemm" else ["batch", 4, "h", 5]
    channels = 6
    weight = {
        "Conv": weights(channels, 4, 3, 3),
        "ConvTranspose": weights(4, channels, 3, 3),
        "Gemm": weights(4, channels),
        "Gemm-transposed": weights(channels, 4),
        "grouped": weights(4, channels // 2, 3, 3),
    }[kind]
    if kind == "Gemm-transposed":
        extra["transB"] = 1
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    nodes = [
        helper.make_node(operator, inputs, ["h0"], **extra),
        helper.make_node("BatchNormalization", ["h0", "scale", "shift", "mean", "var"], ["y"], epsilon=1e-3),
    ]
    constants = {"w": weight, "scale": weights(channels), "shift": weights(channels), "mean": weights(channels)}
    constants |= {"var": np.abs(weights(channels)) + 0.1} | ({"b": weights(channels)} if bias else {})
    before = model(nodes, shape, constants)
    after, applied = rewrite(before, None, ("fold-batch-norm",))
    assert applied == ("fold-batch-norm x1",)
    assert op_types(after) == [operator]
    same(before, after, (2, 4) if operator == "Gemm" else (2, 4, 6, 5))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_batch_norm_folds_across_an_interleave(mode: str) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("DepthToSpace", ["c"], ["d"], blocksize=2, mode=mode),
        helper.make_node("Slice", ["d", "one", "last", "axes"], ["s"]),
        helper.make_node("BatchNormalization", ["s", "scale", "shift", "mean", "var"], ["y"]),
    ]
    constants = {
        "w": weights(12, 2, 3, 3),
        "one": np.array([1], np.int64),
        "last": np.array([-1], np.int64),
        "axes": np.array([2], np.int64),
        "scale": weights(3),
        "shift": weights(3),
        "mean": weights(3),
        "var": np.abs(weights(3)) + 0.1,
    }
    before = model(nodes, ["n", 2, "h", "w_"], constants)
    after, applied = rewrite(before, None, ("fold-batch-norm",))
    assert applied == ("fold-batch-norm x1",)
    same(before, after, (2, 2, 4, 5))


@QUICK
@given(data=st.data())
def test_blur_folding_is_exact(data: Any) -> None:
    operator = data.draw(st.sampled_from(["Conv", "ConvTranspose"]))
    kernel, taps = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    stride = data.draw(st.integers(1, 3)) if operator == "ConvTranspose" else 1
    conv_pads = [data.draw(st.integers(0, kernel - 1)) for _ in range(4)] if operator == "Conv" else [0] * 4
    blur_pads = [data.draw(st.integers(0, taps - 1)) for _ in range(4)]
    bias = data.draw(st.booleans())
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    nodes = [
        helper.make_node(operator, inputs, ["c"], strides=[stride] * 2, pads=conv_pads),
        helper.make_node("Conv", ["c", "k", "kb"], ["y"], group=3, pads=blur_pads),
    ]
    constants = {
        "w": weights(*((3, 2) if operator == "Conv" else (2, 3)), kernel, kernel),
        "k": weights(3, 1, taps, taps),
    }
    constants |= {"kb": weights(3)} | ({"b": weights(3)} if bias else {})
    before = model(nodes, ["n", 2, "h", "w_"], constants)
    after, applied = rewrite(before, None, ("fold-blur",))
    expected = not any(blur_pads) or (operator == "ConvTranspose" and not bias)
    assert bool(applied) == expected
    same(before, after, (2, 2, 8, 7))


def test_activation_moves_before_the_interleave_and_the_crop() -> None:
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("LeakyRelu", ["c"], ["y"], alpha=0.2),
    ]
    before = model(nodes, ["n", 2, "h", "w_"], {"w": weights(2, 3, 4, 4)})
    after, applied = rewrite(before, None, ("conv-transpose", "hoist-pointwise"), {"conv-transpose": {"form": "crop"}})
    assert applied == ("conv-transpose x1", "hoist-pointwise x2")
    assert op_types(after) == ["Conv", "LeakyRelu", "DepthToSpace", "Slice"]
    same(before, after, (2, 2, 4, 5))


def test_activation_moves_into_every_phase() -> None:
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    before = model(nodes, ["n", 2, "h", "w_"], {"w": weights(2, 3, 4, 4)})
    after, _ = rewrite(before, None, ("conv-transpose", "hoist-pointwise"), {"conv-transpose": {"form": "split"}})
    assert op_types(after) == ["Conv", "Conv", "Conv", "Conv", "Relu", "Relu", "Relu", "Relu", "Concat", "DepthToSpace"]
    same(before, after, (2, 2, 4, 5))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize("operator", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("first", [True, False])
def test_numbers_a_channel_move_before_the_interleave(mode: str, operator: str, first: bool) -> None:
    constants = {"w": weights(12, 2, 3, 3), "b": weights(3, 1, 1) + 3}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("DepthToSpace", ["c"], ["d"], blocksize=2, mode=mode),
        helper.make_node(operator, ["d", "b"] if first else ["b", "d"], ["e"]),
        helper.make_node("LeakyRelu", ["e"], ["y"]),
    ]
    before = model(nodes, ["n", 2, "h", "w_"], constants)
    after, applied = rewrite(before, None, ("hoist-pointwise",))
    assert applied == ("hoist-pointwise x2",)
    assert op_types(after) == ["Conv", operator, "LeakyRelu", "DepthToSpace"]
    same(before, after, (2, 2, 4, 5))


def styled(*, late: bool = False) -> onnx.ModelProto:
    """A style a sample, from the pooled input (or, ``late``, from the interleave's own result), scales what it made."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("DepthToSpace", ["c"], ["d"], blocksize=2),
        helper.make_node("GlobalAveragePool", ["d" if late else "x"], ["p"]),
        helper.make_node("Conv", ["p", "m"], ["s"]),
        helper.make_node("Mul", ["d", "s"], ["e"]),
        helper.make_node("Add", ["e", "b"], ["f"]),
        helper.make_node("LeakyRelu", ["f"], ["g"], alpha=0.2),
        helper.make_node("Mul", ["g", "gain"], ["y"]),
    ]
    constants = {"w": weights(12, 3, 3, 3), "m": weights(3, 3, 1, 1), "b": weights(3, 1, 1)}
    return model(nodes, ["n", 3, "h", "w_"], constants | {"gain": np.array(2**0.5, np.float32)})


def test_a_style_moves_before_the_interleave_and_the_gain_disappears() -> None:
    before = styled()
    after, applied = rewrite(before, None, ("fold-scale", "hoist-pointwise"))
    assert applied == ("fold-scale x1", "hoist-pointwise x3")
    types = op_types(after)
    assert types.index("DepthToSpace") == len(types) - 1
    assert types.count("Mul") == 1
    same(before, after, (1, 3, 4, 5), (3, 3, 4, 5))


def test_a_style_made_from_the_interleave_stays_behind_it() -> None:
    before = styled(late=True)
    after, applied = rewrite(before, None, ("hoist-pointwise",))
    assert applied == ()
    same(before, after, (2, 3, 4, 5))


@pytest.mark.parametrize("gain", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("middle", ["LeakyRelu", "Relu", "Tanh"])
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose", "Gemm"])
def test_a_factor_folds_only_where_it_commutes(operator: str, middle: str, gain: float) -> None:
    shape: list[Any] = ["n", 4] if operator == "Gemm" else ["n", 4, "h", 5]
    constants = {
        "w": weights(*((4, 6) if operator == "Gemm" else (6, 4, 3, 3) if operator == "Conv" else (4, 6, 3, 3))),
        "b": weights(6),
        "gain": np.array([gain], np.float32),
    }
    nodes = [
        helper.make_node(operator, ["x", "w", "b"], ["c"]),
        helper.make_node(middle, ["c"], ["a"]),
        helper.make_node("Mul", ["gain", "a"], ["y"]),
    ]
    before = model(nodes, shape, constants)
    after, applied = rewrite(before, None, ("fold-scale",))
    assert bool(applied) == (gain > 0 and middle != "Tanh")
    assert ("Mul" in op_types(after)) == (not applied)
    same(before, after, (2, 4) if operator == "Gemm" else (2, 4, 6, 5))


def test_a_factor_stays_where_another_reader_wants_the_value_without_it() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["a"]),
        helper.make_node("Mul", ["a", "gain"], ["m"]),
        helper.make_node("Add", ["m", "c"], ["y"]),
    ]
    before = model(nodes, ["n", 2, 4, 4], {"w": weights(3, 2, 3, 3), "gain": np.array(2.0, np.float32)})
    after, applied = rewrite(before, None, ("fold-scale",))
    assert applied == ()
    same(before, after, (1, 2, 4, 4))


@QUICK
@given(data=st.data())
def test_merged_matrix_products_are_exact(data: Any) -> None:
    count, nodes, constants = data.draw(st.integers(2, 4)), [], {}
    for index in range(count):
        width, turned = data.draw(st.integers(1, 4)), data.draw(st.booleans())
        constants[f"w{index}"] = weights(*((width, 5) if turned else (5, width)))
        inputs = ["x", f"w{index}"]
        if data.draw(st.booleans()):
            constants[f"b{index}"] = weights(*data.draw(st.sampled_from([(width,), (1,), (1, width)])))
            inputs.append(f"b{index}")
        nodes.append(helper.make_node("Gemm", inputs, [f"g{index}"], transB=int(turned)))
    nodes.append(helper.make_node("Concat", [f"g{index}" for index in range(count)], ["y"], axis=1))
    before = model(nodes, ["n", 5], constants)
    after, applied = rewrite(before, None, ("merge-gemm",))
    assert applied == (f"merge-gemm x{count - 1}",)
    assert op_types(after) == ["Gemm", "Split", "Concat"]
    same(before, after, (1, 5), (4, 5))


def test_products_of_different_inputs_or_of_an_output_are_not_merged() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "w"], ["y"]),
    ]
    before = model(nodes, ["n", 5], {"w": weights(5, 5)})
    assert rewrite(before, None, ("merge-gemm",))[1] == ()


def modulated(scales: int) -> onnx.ModelProto:
    """A convolution whose result is demodulated, shifted, activated and (with two scales) given the next style."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "m0"], ["g0"]),
        helper.make_node("Gemm", ["f", "m1"], ["g1"]),
        helper.make_node("Unsqueeze", ["g0", "axes"], ["s0"]),
        helper.make_node("Unsqueeze", ["g1", "axes"], ["s1"]),
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["s0", "c"], ["d"]),
        helper.make_node("Add", ["d", "b"], ["e"]),
        helper.make_node("LeakyRelu", ["e"], ["y" if scales == 1 else "l"], alpha=0.2),
    ]
    if scales == 2:
        nodes.append(helper.make_node("Mul", ["l", "s1"], ["y"]))
    constants = {"w": weights(6, 3, 3, 3), "m0": weights(3, 6), "m1": weights(3, 6), "b": weights(6, 1, 1)}
    return model(nodes, ["n", 3, "h", "w_"], constants | {"axes": np.array([2, 3], np.int64)})


def test_a_scale_takes_the_layout_of_its_convolution_where_two_would_outvote_it() -> None:
    before = modulated(2)
    after, applied = rewrite(before, Target("openvino", "int8"), ("nhwc-scales",))
    assert applied == ("nhwc-scales x1",)
    assert op_types(after).count("Conv") == 2
    same(before, after, (1, 3, 4, 5), (3, 3, 4, 5))
    again, applied = rewrite(after, Target("openvino", "int8"), ("nhwc-scales",))
    assert applied == ()
    same(before, again, (2, 3, 4, 5))


@pytest.mark.parametrize(
    ("scales", "target"),
    [(1, Target("openvino", "int8")), (2, Target("onnxruntime", "int8")), (2, Target("trt", "fp16")), (2, None)],
)
def test_a_scale_stays_as_it_is_elsewhere(scales: int, target: Target | None) -> None:
    assert rewrite(modulated(scales), target, ("nhwc-scales",))[1] == ()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_blur_behind_many_channels_is_left_to_its_own_kernel(precision: str) -> None:
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["c"], strides=[2, 2]),
        helper.make_node("Conv", ["c", "k"], ["y"], group=256, pads=[1, 1, 1, 1]),
    ]
    constants = {"w": weights(256, 256, 3, 3), "k": weights(256, 1, 4, 4)}
    before = model(nodes, ["n", 256, 32, 32], constants)
    target = Target("openvino", precision)
    assert rewrite(before, target, ("fold-blur",))[1] == ()
    assert rewrite(before, target, ("fold-blur",), {"fold-blur": {"always": True}})[1] == ("fold-blur x1",)


def test_an_activation_that_someone_else_reads_stays() -> None:
    nodes = [
        helper.make_node("DepthToSpace", ["x"], ["d"], blocksize=2),
        helper.make_node("Relu", ["d"], ["r"]),
        helper.make_node("Add", ["d", "r"], ["y"]),
    ]
    before = model(nodes, ["n", 4, "h", "w_"], {})
    after, applied = rewrite(before, None, ("hoist-pointwise",))
    assert applied == ()
    same(before, after, (1, 4, 3, 3))


def test_dead_nodes_and_identities_disappear() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("Dropout", ["a"], ["b"]),
        helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Exp", ["d"], ["unused"]),
        helper.make_node("Identity", ["d"], ["y"]),
    ]
    before = model(nodes, ["n", 3], {})
    after, applied = rewrite(before, None, ("remove-dead",))
    assert applied == ("remove-dead x5",)
    assert op_types(after) == ["Relu"]
    same(before, after, (2, 3))


def test_reshapings_that_lead_back_disappear() -> None:
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axes"], ["a"]),
        helper.make_node("Flatten", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    before = model(nodes, ["batch", 5], {"axes": np.array([2, 3], np.int64)})
    after, _ = rewrite(before, None, ("remove-dead",))
    assert op_types(after) == ["Relu"]
    same(before, after, (3, 5))
    changed = [nodes[0], helper.make_node("Reshape", ["a", "shape"], ["b"]), nodes[2]]
    other = model(changed, ["batch", 4], {"axes": np.array([2, 3], np.int64), "shape": np.array([-1, 2], np.int64)})
    after, _ = rewrite(other, None, ("remove-dead",))
    assert "Reshape" in op_types(after)
    same(other, after, (3, 4))


def test_an_identity_between_input_and_output_stays() -> None:
    before = model([helper.make_node("Identity", ["x"], ["y"])], ["n", 3], {})
    after, _ = rewrite(before, None, ("remove-dead",))
    same(before, after, (2, 3))


def small_generator() -> onnx.ModelProto:
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w0"], ["a"]),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("ConvTranspose", ["c", "w1", "b1"], ["d"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("ConvTranspose", ["e", "w2"], ["f"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["f"], ["y"]),
    ]
    constants = {
        "w0": weights(7, 8, 4, 4),
        "w1": weights(8, 6, 4, 4),
        "b1": weights(6),
        "w2": weights(6, 3, 4, 4),
        "scale": weights(8),
        "shift": weights(8),
        "mean": weights(8),
        "var": np.abs(weights(8)) + 0.1,
    }
    return model(nodes, ["batch", 7, 1, 1], constants)


@pytest.mark.parametrize(
    "target", [None, Target("openvino", "int8"), Target("onnxruntime", "fp32"), Target("trt", "fp16")]
)
def test_the_default_order_on_a_generator(target: Target | None) -> None:
    before = small_generator()
    snapshot = before.SerializeToString(deterministic=True)
    after, _ = rewrite(before, target, DEFAULT_ORDER)
    assert before.SerializeToString(deterministic=True) == snapshot
    assert "BatchNormalization" not in op_types(after)
    assert after.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    same(before, after, (1, 7, 1, 1), (5, 7, 1, 1))


def test_every_pass_of_the_registry_is_ordered_or_asked_for() -> None:
    assert set(DEFAULT_ORDER) | {"fix-input"} == set(REWRITES.names())


def test_unknown_pass_is_refused() -> None:
    with pytest.raises(UsageError, match="conv-transpose"):
        rewrite(small_generator(), None, ("conv-transposed",))
