"""A fixed depthwise filter (the blur of upfirdn) folded into the convolution before it.

blur(conv(x)) is one convolution with the convolved kernels. It is exact only where nothing is cut off
or padded in between: behind a transposed convolution without padding the blur's zero padding continues
the true values, behind an ordinary convolution the blur must not pad. It saves a pass over the
activations and costs a larger kernel, so it pays for few channels only: the cost model decides.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ganexport.build.cost import Target, Work
from ganexport.build.rewrites._graph import (
    Array,
    Builder,
    attribute,
    constant,
    is_op,
    nodes_of,
    replace,
    shape,
    sizes_of,
)
from ganexport.build.rewrites.conv_transpose import NOMINAL_SIZE


def apply(model: ir.Model, target: Target | None = None) -> int:
    """Fold every depthwise stride-1 filter whose input is a (transposed) convolution read by nobody else.

    Returns:
        How many were folded.
    """
    return sum(_fold(model, node, target) for node in nodes_of(model, "Conv"))


def _fold(model: ir.Model, blur: ir.Node, target: Target | None) -> bool:
    source = blur.inputs[0]
    conv = source.producer() if source is not None else None
    if source is None or conv is None or not is_op(conv, "Conv", "ConvTranspose"):
        return False
    if len(source.uses()) != 1 or source.is_graph_output() or not _is_blur(blur):
        return False
    kernel, weight = constant(blur.inputs[1]), constant(conv.inputs[1])
    if kernel is None or weight is None or not _plain(conv):
        return False
    if weight.ndim != kernel.ndim or attribute(conv, "group", 1) != 1:
        return False
    blur_bias, bias = _bias(blur), _bias(conv)
    if blur_bias is False or bias is False:
        return False
    pads = attribute(blur, "pads") or [0] * (2 * (kernel.ndim - 2))
    combined_pads = _combined_pads(conv, pads, kernel.ndim - 2)
    if combined_pads is None or (any(pads) and bias is not None):
        return False
    transposed = is_op(conv, "ConvTranspose")
    combined = convolve(weight, kernel, transposed=transposed)
    if target is not None and not _pays(conv, weight, kernel, combined, target):
        return False
    channels = kernel.shape[0]
    total = np.zeros(channels)
    if bias is not None and bias is not True:
        total += bias * kernel.reshape(channels, -1).sum(axis=1)
    if blur_bias is not None and blur_bias is not True:
        total += blur_bias
    builder = Builder(model, blur)
    attributes = {
        "kernel_shape": list(combined.shape[2:]),
        "pads": combined_pads,
        "strides": attribute(conv, "strides") or [1] * (kernel.ndim - 2),
    }
    inputs = [conv.inputs[0], builder.constant(combined, "weight")]
    inputs.append(builder.constant(total.astype(weight.dtype), "bias"))
    value = builder.op(conv.op_type, inputs, sizes_of(blur.outputs[0]), attributes)
    replace(model, blur.outputs[0], value)
    if not source.uses():
        model.graph.remove(conv, safe=True)
    return True


def _is_blur(node: ir.Node) -> bool:
    weight = constant(node.inputs[1])
    ones = all(value == 1 for name in ("strides", "dilations") for value in attribute(node, name) or [1])
    fixed = attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return (
        weight is not None
        and weight.shape[1] == 1
        and attribute(node, "group", 1) == weight.shape[0]
        and ones
        and fixed
    )


def _plain(conv: ir.Node) -> bool:
    undilated = all(value == 1 for value in attribute(conv, "dilations") or [1])
    ones = is_op(conv, "ConvTranspose") or all(value == 1 for value in attribute(conv, "strides") or [1])
    unpadded = not any(attribute(conv, "output_padding") or [0]) and "output_shape" not in conv.attributes
    return undilated and ones and unpadded and attribute(conv, "auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _bias(node: ir.Node) -> Array | bool | None:
    """The bias, None without one, False when it is computed at run time."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    found = constant(node.inputs[2])
    return False if found is None else found


def _combined_pads(conv: ir.Node, blur_pads: list[int], rank: int) -> list[int] | None:
    pads = attribute(conv, "pads") or [0] * (2 * rank)
    if is_op(conv, "Conv"):
        return list(pads) if not any(blur_pads) else None
    if any(pads):
        # What the padding cuts off would be seen by a blur that reaches over the edge.
        return None
    kernel = constant(conv.inputs[1])
    assert kernel is not None
    combined = [0] * (2 * rank)
    blur_kernel = list(_blur_shape(conv))
    for i, taps in enumerate(blur_kernel):
        for side in (i, rank + i):
            combined[side] = taps - 1 - blur_pads[side]
            if combined[side] < 0:
                return None
    return combined


def _blur_shape(conv: ir.Node) -> tuple[int, ...]:
    reader = next(iter(conv.outputs[0].uses())).node
    weight = constant(reader.inputs[1])
    assert weight is not None
    return weight.shape[2:]


def convolve(weight: Array, kernel: Array, *, transposed: bool) -> Array:
    """The kernel of filter-after-convolution.

    Args:
        weight: [C_out, C_in, ...], or [C_in, C_out, ...] when transposed.
        kernel: [C_out, 1, ...], applied as a correlation.
        transposed: Which of the two the weight is.
    """
    taps = np.swapaxes(kernel, 0, 1)[:, :] if transposed else kernel  # broadcast over C_in
    base = weight.astype(np.float64)
    sizes = [a + b - 1 for a, b in zip(weight.shape[2:], kernel.shape[2:], strict=True)]
    out = np.zeros((*weight.shape[:2], *sizes))
    for position in np.ndindex(*kernel.shape[2:]):
        # A correlation after a scatter shifts the other way than after a correlation.
        at = tuple(k - 1 - p for k, p in zip(kernel.shape[2:], position, strict=True)) if transposed else position
        window = tuple(slice(a, a + n) for a, n in zip(at, weight.shape[2:], strict=True))
        out[(slice(None), slice(None), *window)] += base * taps[(..., *position)].reshape(
            taps.shape[0], taps.shape[1], *([1] * len(position))
        )
    return out.astype(weight.dtype)


def _pays(conv: ir.Node, weight: Array, kernel: Array, combined: Array, target: Target) -> bool:
    sizes = shape(conv.outputs[0]) or [None] * weight.ndim
    outputs = math.prod(size or NOMINAL_SIZE for size in sizes[2:])
    strides = attribute(conv, "strides") or [1] * (weight.ndim - 2)
    steps = outputs / math.prod(strides) if is_op(conv, "ConvTranspose") else outputs
    channels = kernel.shape[0]
    before = [
        Work(conv.op_type, steps * weight.size, outputs * channels, weight.size),
        Work("Conv", outputs * kernel.size, 2 * outputs * channels, kernel.size),
    ]
    after = Work(conv.op_type, steps * combined.size, outputs * channels, combined.size)
    return target.seconds(after) < sum(map(target.seconds, before))
