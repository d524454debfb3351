"""8-bit graphs as TensorRT takes them: symmetric int8 activations, and biases in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ganexport.build.onnx_file import require_onnx

if TYPE_CHECKING:
    import onnx


def symmetric_activations(model: onnx.ModelProto) -> int:
    """Rewrite every QuantizeLinear/DequantizeLinear with a uint8 zero point, keeping the larger half of its range.

    A tensor quantized to [-z·s, (255 - z)·s] becomes one quantized to ±max(z, 255 - z)·s with
    127 steps a side; one bit is lost where all values are positive.

    Args:
        model: A QDQ model, changed in place.

    Returns:
        How many nodes were rewritten, int32 biases dequantized into weights included.
    """
    onnx = require_onnx()
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    made: dict[tuple[str, str], tuple[str, str]] = {}
    count = 0
    rectified: list[tuple[int, Any]] = []
    for index, node in enumerate(model.graph.node):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        scale, zero = initializers.get(node.input[1]), initializers.get(node.input[2])
        if scale is None or zero is None or zero.data_type != onnx.TensorProto.UINT8:
            continue
        key = (node.input[1], node.input[2])
        if key not in made:
            made[key] = _symmetric_pair(model, onnx, scale, zero)
        if node.op_type == "QuantizeLinear" and not onnx.numpy_helper.to_array(zero).any():
            # A zero point of 0 cuts negative values off: quantizers drop the Relu before it.
            name = f"{node.output[0]}_rectified"
            rectified.append((index, onnx.helper.make_node("Relu", [node.input[0]], [name], name=name)))
            node.input[0] = name
        node.input[1], node.input[2] = made[key]
        count += 1
    for index, relu in reversed(rectified):
        model.graph.node.insert(index, relu)
    count += _float_biases(model, onnx, initializers)
    used = {name for node in model.graph.node for name in node.input}
    kept = []
    for tensor in model.graph.initializer:
        if tensor.name in used:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            kept.append(copy)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return count


def _float_biases(model: Any, onnx: Any, initializers: dict[str, Any]) -> int:
    """DequantizeLinear of a constant int32 bias becomes the fp32 constant that it gives."""
    gone = []
    for index, node in enumerate(model.graph.node):
        bias = initializers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if bias is None or bias.data_type != onnx.TensorProto.INT32 or node.input[1] not in initializers:
            continue
        steps = onnx.numpy_helper.to_array(bias).astype(np.float64)
        scale = onnx.numpy_helper.to_array(initializers[node.input[1]]).astype(np.float64)
        value = np.asarray((steps * scale).astype(np.float32))
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, node.output[0]))
        gone.append(index)
    for index in reversed(gone):
        del model.graph.node[index]
    return len(gone)


def _symmetric_pair(model: Any, onnx: Any, scale: Any, zero: Any) -> tuple[str, str]:
    steps = onnx.numpy_helper.to_array(zero).astype(np.float64)
    width = onnx.numpy_helper.to_array(scale).astype(np.float64)
    widest = np.maximum(steps, 255.0 - steps) * width
    names = (f"{scale.name}_symmetric", f"{zero.name}_symmetric")
    values = ((widest / 127.0).astype(np.float32), np.zeros(steps.shape, np.int8))
    for name, value in zip(names, values, strict=True):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return names
