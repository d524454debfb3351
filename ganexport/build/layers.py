"""In which precision each layer of an ONNX graph computes, read off its types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ganexport.build.onnx_file import origin_of, require_onnx

if TYPE_CHECKING:
    from onnx import ModelProto

#: Operators that convert or only move elements: no layers of their own.
_MOVES = frozenset(
    {
        "Cast", "Concat", "Constant", "ConstantOfShape", "DequantizeLinear", "Expand", "Flatten", "Gather", "Identity",
        "Pad", "QuantizeLinear", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
_NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}


class LayerPrecision(msgspec.Struct, frozen=True):
    """One node that computes.

    Attributes:
        node: Its name, or its first output's.
        operator: Its type.
        precision: "fp32", "fp16", "bf16", "fp64" or "int8" (it reads dequantised values, which runtimes fuse).
        origin: file:line of the user's code, empty when not recorded.
    """

    node: str
    operator: str
    precision: str
    origin: str


def layer_precisions(model: ModelProto) -> list[LayerPrecision]:
    """Every node that computes on real numbers, in the graph's order.

    Raises:
        MissingDependencyError: The package onnx is not installed.
    """
    onnx = require_onnx()
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    dequantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type in _MOVES:
            continue
        precision = _precision(onnx, node, kinds, dequantised)
        if precision:
            found.append(LayerPrecision(node.name or node.output[0], node.op_type, precision, origin_of(node)))
    return found


def _precision(onnx: Any, node: Any, kinds: dict[str, int], dequantised: set[str]) -> str:
    if len(node.input) > 1 and node.input[0] in dequantised and node.input[1] in dequantised:
        return "int8"
    for name in (*node.input, *node.output):
        told = _NAMES.get(onnx.TensorProto.DataType.Name(kinds.get(name, 0)), "")
        if told:
            return told
    return ""


def counted(layers: list[LayerPrecision]) -> dict[str, dict[str, int]]:
    """Number of layers by precision and operator, the commonest first."""
    counts: dict[str, dict[str, int]] = {}
    for layer in layers:
        row = counts.setdefault(layer.precision, {})
        row[layer.operator] = row.get(layer.operator, 0) + 1
    by_size = sorted(counts.items(), key=lambda item: -sum(item[1].values()))
    return {precision: dict(sorted(row.items(), key=lambda item: (-item[1], item[0]))) for precision, row in by_size}
