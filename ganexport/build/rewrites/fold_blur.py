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
from ganexport.build.rewrites.conv_transpose import FORMS, NOMINAL_SIZE, Axis, form_work, original_work


def apply(model: ir.Model, target: Target | None = None, *, always: bool = False) -> int:
    """Fold every depthwise stride-1 filter whose input is a (transposed) convolution read by nobody else.

    Args:
        model: Changed in place.
        target: Prices the larger kernel against the filter; None: always fold.
        always: Fold whatever the price, to be measured.

    Returns:
        How many were folded.
    """
    return sum(_fold(model, node, None if always else target) for node in nodes_of(model, "Conv"))


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
    weight = constant(_blur_of(conv).inputs[1])
    assert weight is not None
    return weight.shape[2:]


def _blur_of(conv: ir.Node) -> ir.Node:
    """Its only reader."""
    return next(iter(conv.outputs[0].uses())).node


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
    rank, channels = weight.ndim - 2, kernel.shape[0]
    sizes = shape(conv.outputs[0]) or [None] * weight.ndim
    spatial = [size or NOMINAL_SIZE for size in sizes[2:]]
    outputs = math.prod(spatial)
    blur = Work("Conv", outputs * kernel.size, 2 * outputs * channels, kernel.size)
    if not is_op(conv, "ConvTranspose"):
        before = [Work("Conv", outputs * weight.size, outputs * channels, weight.size), blur]
        after = [Work("Conv", outputs * combined.size, outputs * channels, combined.size)]
        return sum(map(target.seconds, after)) < sum(map(target.seconds, before))
    strides = attribute(conv, "strides") or [1] * rank
    inside = [max(1, size // stride) for size, stride in zip(spatial, strides, strict=True)]
    given = shape(conv.inputs[0]) or [None] * weight.ndim
    inside = [size or guess for size, guess in zip(given[2:], inside, strict=True)]
    blur_pads = attribute(_blur_of(conv), "pads") or [0] * (2 * rank)
    plain = [Axis(weight.shape[i + 2], strides[i], 0, 0, 0, 1) for i in range(rank)]
    cut = [kernel.shape[j % rank + 2] - 1 - pad for j, pad in enumerate(blur_pads)]
    joined = [Axis(combined.shape[i + 2], strides[i], cut[i], cut[rank + i], 0, 1) for i in range(rank)]
    separate = _transposed_seconds(plain, inside, weight, target) + target.seconds(blur)
    return _transposed_seconds(joined, inside, combined, target) < separate


def _transposed_seconds(axes: list[Axis], spatial: list[int], weight: Array, target: Target) -> float:
    """Of a transposed convolution in the form that is cheapest on the target."""
    options = [[original_work(axes, spatial, weight.shape)]]
    options += [work for form in FORMS if (work := form_work(form, axes, spatial, weight.shape, 1)) is not None]
    return min(sum(map(target.seconds, works)) for works in options)
