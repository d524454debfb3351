"""Batch normalisation with fixed statistics folded into the convolution or matrix product before it.

y = (x - mean) / sqrt(variance + epsilon) * scale + bias is linear in x, so it joins the weights. It is
folded through an interleave (DepthToSpace) and a crop (Slice) of a sub-pixel convolution too.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ganexport.build.cost import Target
from ganexport.build.rewrites._graph import Array, Builder, attribute, chain_back, constant, is_op, nodes_of, replace

LINEAR = ("Conv", "ConvTranspose", "Gemm")


def apply(model: ir.Model, target: Target | None = None) -> int:
    """Fold every batch normalisation that follows a linear operator. It pays everywhere: work disappears.

    Returns:
        How many were folded.
    """
    del target
    return sum(_fold(model, node) for node in nodes_of(model, "BatchNormalization"))


def _fold(model: ir.Model, node: ir.Node) -> bool:
    parameters = [constant(value) for value in node.inputs[1:5]]
    if any(p is None for p in parameters) or attribute(node, "training_mode", 0):
        return False
    scale, bias, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    shift = bias - mean * factor
    value = node.inputs[0]
    assert value is not None
    for mover in chain_back(value, "DepthToSpace", "Slice"):
        if is_op(mover, "Slice") and not _spatial_slice(mover):
            return False
        if is_op(mover, "DepthToSpace"):
            phases = attribute(mover, "blocksize") ** 2
            widen = np.tile if attribute(mover, "mode", "DCR") == "DCR" else np.repeat
            factor, shift = widen(factor, phases), widen(shift, phases)
        assert mover.inputs[0] is not None
        value = mover.inputs[0]
    producer = value.producer()
    if producer is None or not is_op(producer, *LINEAR) or len(value.uses()) != 1 or value.is_graph_output():
        return False
    if not _scale_producer(model, producer, factor, shift):
        return False
    assert node.inputs[0] is not None
    replace(model, node.outputs[0], node.inputs[0])
    return True


def _spatial_slice(node: ir.Node) -> bool:
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    return axes is not None and all(axis >= 2 for axis in axes)


def _scale_producer(model: ir.Model, node: ir.Node, factor: Array, shift: Array) -> bool:
    weight = constant(node.inputs[1])
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    old_bias = constant(node.inputs[2]) if has_bias else np.zeros(factor.shape)
    if weight is None or old_bias is None:
        return False
    if is_op(node, "Gemm"):
        if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
            return False
        columns = weight.shape[0 if attribute(node, "transB", 0) else 1]
        if columns != factor.size or old_bias.size not in (1, columns):
            return False
        old_bias = np.broadcast_to(old_bias.reshape(-1), factor.shape)
        axis_factor = factor[:, None] if attribute(node, "transB", 0) else factor[None, :]
    elif is_op(node, "ConvTranspose"):
        # [C_in, C_out / groups, ...]: rows of one group share that group's output channels.
        groups = attribute(node, "group", 1)
        per_group = factor.reshape(groups, -1)
        rows = np.repeat(per_group, weight.shape[0] // groups, axis=0)
        axis_factor = rows.reshape(*rows.shape, *([1] * (weight.ndim - 2)))
    else:
        if weight.shape[0] != factor.size:
            return False
        axis_factor = factor.reshape(-1, *([1] * (weight.ndim - 1)))
    builder = Builder(model, node)
    folded = (weight.astype(np.float64) * axis_factor).astype(weight.dtype)
    bias = (old_bias.astype(np.float64) * factor + shift).astype(weight.dtype)
    node.replace_input_with(1, builder.constant(folded, "folded_weight"))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, builder.constant(bias, "folded_bias"))
    return True
