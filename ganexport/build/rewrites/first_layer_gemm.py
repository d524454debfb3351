"""A transposed convolution of a 1x1 input (the first layer of DCGAN-like generators) as one matrix product.

[N, C, 1, 1] -> [N, C_out, h, w] uses every weight once a sample: a Gemm of [C, C_out*h*w] and a reshape.
The sub-pixel form would compute 16 times the operations for k4 s1 p0.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ganexport.build.cost import Target, Work
from ganexport.build.rewrites._graph import Array, Builder, attribute, constant, nodes_of, opset, replace, shape
from ganexport.build.rewrites.conv_transpose import Axis, dilate, original_work, read_axes


def apply(model: ir.Model, target: Target | None = None) -> int:
    """Rewrite every ungrouped transposed convolution whose input is 1 in every spatial size.

    Returns:
        How many were rewritten.
    """
    if opset(model) < 13:
        return 0
    return sum(_rewrite(model, node, target) for node in nodes_of(model, "ConvTranspose"))


def _rewrite(model: ir.Model, node: ir.Node, target: Target | None) -> bool:
    sizes = shape(node.inputs[0])
    weight = constant(node.inputs[1])
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    bias = constant(node.inputs[2]) if has_bias else None
    if weight is None or sizes is None or any(size != 1 for size in sizes[2:]) or attribute(node, "group", 1) != 1:
        return False
    axes = read_axes(node, weight.shape[2:])
    if axes is None or (has_bias and bias is None):
        return False
    dense = _output_kernel(weight, axes)
    if dense is None:
        return False
    macs = float(dense.size)
    after = [Work("Gemm", macs, weight.shape[0] + dense.size / weight.shape[0], dense.size), Work("Reshape")]
    before = original_work(axes, [1] * len(axes), weight.shape)
    if target is not None and sum(map(target.seconds, after)) >= target.seconds(before) + target.rates.launch:
        return False
    out = dense.shape[1:]
    builder = Builder(model, node)
    batch = node.inputs[0].shape[0] if node.inputs[0] is not None and node.inputs[0].shape is not None else None
    flat = builder.op("Flatten", [node.inputs[0]], [batch, weight.shape[0]], {"axis": 1})
    wide = np.zeros(out[0], weight.dtype) if bias is None else bias
    inputs = [
        flat,
        builder.constant(dense.reshape(weight.shape[0], -1), "weight"),
        builder.constant(np.repeat(wide, math.prod(out[1:])), "bias"),
    ]
    product = builder.op("Gemm", inputs, [batch, math.prod(out)])
    target_shape = builder.constant(np.array([0, *out], np.int64), "shape")
    value = builder.op("Reshape", [product, target_shape], [batch, *out])
    replace(model, node.outputs[0], value)
    return True


def _output_kernel(weight: Array, axes: list[Axis]) -> Array | None:
    """[C_in, C_out, h, w]: what one input element adds to every output; None when nothing is left of it."""
    full = dilate(weight, axes)
    for number, axis in enumerate(axes):
        length = axis.length + axis.output_padding - axis.begin - axis.end
        if length < 1:
            return None
        padded = np.zeros((*full.shape[: number + 2], axis.length + axis.output_padding, *full.shape[number + 3 :]))
        select = [slice(None)] * full.ndim
        select[number + 2] = slice(0, axis.length)
        padded[tuple(select)] = full
        select[number + 2] = slice(axis.begin, axis.begin + length)
        full = padded[tuple(select)]
    return full.astype(weight.dtype)
