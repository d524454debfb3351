"""Keeps convolutions that are scaled a sample and channel in their own memory layout on OpenVINO.

OpenVINO computes convolutions with the channels innermost, and lets an element-wise kernel take the layout
that most of its operands have. A demodulation and a style, [N, C, 1, 1] made by matrix products, outvote the
convolution between them, and its large result is then converted to channels-first and back. A depthwise 1x1
convolution by ones, which changes no number, gives the small operand the layout that its large neighbour has.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ganexport.build.cost import Target
from ganexport.build.rewrites._graph import (
    POINTWISE,
    Builder,
    constant,
    is_op,
    nodes_of,
    only_consumer,
    shape,
    sizes_of,
)


def apply(model: ir.Model, target: Target | None = None) -> int:
    """Give the scale of every convolution that is scaled more than once the convolution's layout.

    Returns:
        How many scales; 0 for any backend but OpenVINO.
    """
    if target is None or target.backend != "openvino":
        return 0
    return sum(_arrange(model, node) for node in nodes_of(model, "Mul"))


def _arrange(model: ir.Model, node: ir.Node) -> bool:
    for index in (0, 1):
        large, scale = node.inputs[index], node.inputs[1 - index]
        maker = large.producer() if large is not None else None
        if maker is None or not is_op(maker, "Conv") or not _a_number_a_channel(scale):
            continue
        if not _scaled_again(node):
            return False
        assert scale is not None
        channels = int((shape(scale) or [])[1] or 0)
        builder = Builder(model, node)
        ones = builder.constant(np.ones((channels, 1, 1, 1), np.float32), "ones")
        same = builder.op("Conv", [scale, ones], sizes_of(scale), {"kernel_shape": [1, 1], "group": channels})
        node.replace_input_with(1 - index, same)
        return True
    return False


def _a_number_a_channel(value: ir.Value | None) -> bool:
    """Whether it is computed, float32 [N, C, 1, 1], and not by a convolution."""
    sizes = shape(value)
    if value is None or sizes is None or len(sizes) != 4 or sizes[2:] != [1, 1] or not sizes[1] or sizes[1] == 1:
        return False
    return value.dtype == ir.DataType.FLOAT and constant(value) is None and not is_op(value.producer(), "Conv")


def _scaled_again(node: ir.Node) -> bool:
    """Whether another number a channel joins before the chain of element-wise operators ends."""
    value = node.outputs[0]
    while (reader := only_consumer(value)) is not None and is_op(reader, "Mul", "Add", *POINTWISE):
        if any(other is not value and _a_number_a_channel(other) for other in reader.inputs):
            return True
        value = reader.outputs[0]
    return False
