"""Matrix products of one input as a single product that is split afterwards.

A style-based generator derives each layer's style from the same vector by a small matrix: one product
with the matrices side by side reads the vector once and starts one kernel instead of one a layer. The
same sums of the same numbers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ganexport.build.cost import Target, Work
from ganexport.build.rewrites._graph import Array, Builder, attribute, constant, nodes_of, opset, replace, sizes_of


def apply(model: ir.Model, target: Target | None = None) -> int:
    """Merge every group of Gemms with constant weights that read one value.

    Args:
        model: Changed in place.
        target: Prices the kernels saved against the split; None: always merge.

    Returns:
        How many products disappeared.
    """
    if opset(model) < 13:
        return 0
    groups: dict[ir.Value, list[ir.Node]] = {}
    for node in nodes_of(model, "Gemm"):
        value = node.inputs[0]
        if value is not None and _matrix(node) is not None and not node.outputs[0].is_graph_output():
            groups.setdefault(value, []).append(node)
    return sum(_merge(model, value, nodes, target) for value, nodes in groups.items() if len(nodes) > 1)


def _matrix(node: ir.Node) -> tuple[Array, Array] | None:
    """Weights [inputs, outputs] and bias [outputs] of a plain Gemm with constants; None for any other."""
    weight = constant(node.inputs[1])
    plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
    if weight is None or not plain or attribute(node, "transA", 0):
        return None
    matrix = weight.T if attribute(node, "transB", 0) else weight
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return matrix, np.zeros(matrix.shape[1], matrix.dtype)
    bias = constant(node.inputs[2])
    if bias is None or bias.size not in (1, matrix.shape[1]) or bias.ndim > 2:
        return None
    return matrix, np.broadcast_to(bias.reshape(-1), matrix.shape[1:])


def _merge(model: ir.Model, value: ir.Value, nodes: list[ir.Node], target: Target | None) -> int:
    parts = [part for node in nodes if (part := _matrix(node)) is not None]
    widths = [matrix.shape[1] for matrix, _ in parts]
    if target is not None and not _pays(parts, widths, target):
        return 0
    builder = Builder(model, nodes[0])
    weight = builder.constant(np.concatenate([matrix for matrix, _ in parts], axis=1), "merged_weight")
    bias = builder.constant(np.concatenate([bias for _, bias in parts]), "merged_bias")
    sizes = sizes_of(value)
    rows = None if sizes is None else sizes[0]
    product = builder.op("Gemm", [value, weight, bias], [rows, sum(widths)])
    split = ir.Node(
        "", "Split", [product, builder.constant(np.array(widths, np.int64), "widths")],
        [ir.AttrInt64("axis", 1)], num_outputs=len(nodes),
    )  # fmt: skip
    nodes[0].graph.insert_before(nodes[0], split)  # type: ignore[union-attr]
    for node, output, width in zip(nodes, split.outputs, widths, strict=True):
        output.shape = ir.Shape([rows, width])
        if product.dtype is not None:
            output.dtype = product.dtype
        replace(model, node.outputs[0], output)
    return len(nodes) - 1


def _pays(parts: list[tuple[Array, Array]], widths: list[int], target: Target) -> bool:
    before = [Work("Gemm", matrix.size, sum(matrix.shape), matrix.size) for matrix, _ in parts]
    inputs, total = parts[0][0].shape[0], sum(widths)
    after = [Work("Gemm", inputs * total, inputs + total, inputs * total), Work("Slice", elements=2 * total)]
    return sum(map(target.seconds, after)) < sum(map(target.seconds, before))
