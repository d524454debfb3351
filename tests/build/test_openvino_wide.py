"""Vectors stay in fp32 under bf16: the right layers are marked, and OpenVINO obeys the mark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ganexport.build.openvino_wide import keep_vectors_wide

openvino = pytest.importorskip("openvino")
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def styled(folder: Path) -> Path:
    """Two matrix products make a style; a convolution's input is scaled by it, as StyleGAN2 does."""
    rng = np.random.default_rng(0)
    constants = {
        "m0": rng.standard_normal((16, 32)).astype(np.float32) / 4,
        "m1": rng.standard_normal((32, 32)).astype(np.float32) / 6,
        "axes": np.array([2, 3], np.int64),
        "x": rng.standard_normal((1, 32, 32, 32)).astype(np.float32),
        "w": rng.standard_normal((32, 32, 3, 3)).astype(np.float32) / 17,
        "v": rng.standard_normal((3, 32, 3, 3)).astype(np.float32) / 17,
    }
    nodes = [
        helper.make_node("MatMul", ["z", "m0"], ["a"], name="first"),
        helper.make_node("Tanh", ["a"], ["b"], name="between"),
        helper.make_node("MatMul", ["b", "m1"], ["c"], name="second"),
        helper.make_node("Unsqueeze", ["c", "axes"], ["style"], name="shaped"),
        helper.make_node("Mul", ["x", "style"], ["d"], name="scaled"),
        helper.make_node("Conv", ["d", "w"], ["e"], name="wide_conv", pads=[1] * 4),
        helper.make_node("Relu", ["e"], ["f"], name="active"),
        helper.make_node("Conv", ["f", "v"], ["image"], name="last_conv", pads=[1] * 4),
    ]
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 16])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [z], [image], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "g.onnx")
    path = folder / "g.xml"
    openvino.save_model(openvino.convert_model(str(folder / "g.onnx")), str(path), compress_to_fp16=False)
    return path


def run(path: Path, precision: str) -> tuple[np.ndarray, dict[str, str]]:
    """The output, and the precision that each layer computed in."""
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": precision})
    z = np.random.default_rng(1).standard_normal((8, 16)).astype(np.float32)
    image = np.array(compiled([z])[0])
    layers = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        layers[op.get_friendly_name()] = str(info["runtimePrecision"].astype(str))
    return image, layers


def marked(path: Path) -> set[str]:
    import xml.etree.ElementTree as ET

    layers = ET.parse(path).getroot().findall("layers/layer")
    return {str(layer.get("name")) for layer in layers if layer.find("rt_info/attribute[@name='precise']") is not None}


def test_only_what_holds_a_vector_a_sample_is_marked(tmp_path: Path) -> None:
    path = styled(tmp_path)
    count = keep_vectors_wide(path)
    names = marked(path)
    assert count == len(names)
    assert {"first", "between", "second", "shaped"} <= names
    assert not names & {"scaled", "wide_conv", "active", "last_conv", "z"}


def test_a_matrix_product_with_much_of_the_work_is_left_alone_and_so_is_its_activation(tmp_path: Path) -> None:
    constants = {"m": np.ones((16, 64), np.float32), "n": np.ones((64, 32), np.float32)}
    nodes = [
        helper.make_node("MatMul", ["z", "m"], ["a"], name="large"),
        helper.make_node("Tanh", ["a"], ["b"], name="active"),
        helper.make_node("MatMul", ["b", "n"], ["y"], name="larger"),
    ]
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])
    graph = helper.make_graph(nodes, "g", [z], [y], [numpy_helper.from_array(v, n) for n, v in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    path = tmp_path / "m.xml"
    openvino.save_model(openvino.convert_model(str(tmp_path / "m.onnx")), str(path), compress_to_fp16=False)
    before = path.read_bytes()
    assert keep_vectors_wide(path) == 0
    assert path.read_bytes() == before


def test_fp32_is_unchanged(tmp_path: Path) -> None:
    path = styled(tmp_path)
    before, _ = run(path, "f32")
    keep_vectors_wide(path)
    after, _ = run(path, "f32")
    assert np.array_equal(before, after)


@pytest.mark.skipif(not BF16, reason="this processor has no bf16 arithmetic")
def test_openvino_computes_marked_layers_in_fp32_and_the_picture_is_closer(tmp_path: Path) -> None:
    path = styled(tmp_path)
    truth, _ = run(path, "f32")
    narrow, plain = run(path, "bf16")
    keep_vectors_wide(path)
    mixed, kept = run(path, "bf16")
    assert plain["second"] == "bf16"
    assert kept["second"] == kept["first"] == "f32"
    assert kept["wide_conv"] == "bf16"
    error = {name: float(np.square(image - truth).mean()) for name, image in (("narrow", narrow), ("mixed", mixed))}
    assert error["mixed"] < 0.9 * error["narrow"]
