"""Nearest-neighbour upsampling and a convolution as one sub-pixel convolution with summed kernels.

After repeating every pixel s x s times, several taps of the convolution read the same pixel: their
weights can be added beforehand. The pair equals a transposed convolution with stride s and a kernel of
K + s - 1 taps, and is written in whichever of its forms is cheapest: for K = 3 and s = 2 each output
needs 4 instead of 9 products, 2.25x fewer. A 1x1 convolution commutes with the repetition: convolving
first leaves a quarter of the products.
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
    only_consumer,
    opset,
    replace,
    shape,
    sizes_of,
)
from ganexport.build.rewrites.conv_transpose import (
    FORMS,
    NOMINAL_SIZE,
    Axis,
    emit,
    form_work,
    interleavable,
    original_work,
)

#: (coordinate transformation, nearest mode) that repeat every pixel s times for every whole s.
REPEATING = {
    ("asymmetric", "floor"),
    ("half_pixel", "round_prefer_floor"),
    ("half_pixel", "round_prefer_ceil"),
    ("pytorch_half_pixel", "round_prefer_floor"),
    ("pytorch_half_pixel", "round_prefer_ceil"),
}


def apply(model: ir.Model, target: Target | None = None, form: str | None = None) -> int:
    """Rewrite every upsampling whose only reader is a stride-1 convolution.

    Args:
        model: Changed in place; shapes must be inferred.
        target: Prices the forms; None takes the one with the fewest operations.
        form: Only this form: "commute", "transposed" or one of
            :data:`~ganexport.build.rewrites.conv_transpose.FORMS`.

    Returns:
        How many were rewritten.
    """
    if opset(model) < 13:
        return 0
    return sum(_rewrite(model, node, target, form) for node in nodes_of(model, "Resize"))


def _rewrite(model: ir.Model, resize: ir.Node, target: Target | None, form: str | None) -> bool:
    scales = repeats(resize)
    conv = only_consumer(resize.outputs[0])
    source = resize.inputs[0]
    if (
        scales is None
        or source is None
        or not is_op(conv, "Conv")
        or conv is None
        or conv.inputs[0] is not resize.outputs[0]
    ):
        return False
    weight = constant(conv.inputs[1])
    has_bias = len(conv.inputs) > 2 and conv.inputs[2] is not None
    bias = constant(conv.inputs[2]) if has_bias else None
    if weight is None or weight.ndim - 2 != len(scales) or (has_bias and bias is None):
        return False
    axes = transposed_axes(conv, weight.shape[2:], scales)
    sizes = shape(source) or [None] * weight.ndim
    if axes is None or not interleavable(axes, sizes):
        return False
    groups = attribute(conv, "group", 1)
    transposed = to_transposed_weight(weight, scales, groups)
    if form in (None, "commute") and _commute(model, resize, conv, weight, axes, sizes, target):
        return True
    chosen = _choose(axes, sizes, weight, transposed, groups, target, form)
    if chosen is None:
        return False
    conv.replace_input_with(0, source)
    if chosen == "transposed":
        _emit_transposed(model, conv, transposed, bias, axes, groups)
    else:
        emit(model, conv, transposed, bias, axes, groups, chosen)
    model.graph.remove(resize, safe=True)
    return True


def _commute(
    model: ir.Model,
    resize: ir.Node,
    conv: ir.Node,
    weight: Array,
    axes: list[Axis],
    sizes: list[int | None],
    target: Target | None,
) -> bool:
    """Convolve, then repeat: exact for an unpadded 1x1 kernel."""
    if any(taps != 1 for taps in weight.shape[2:]) or any(attribute(conv, "pads") or [0]):
        return False
    positions = math.prod(size or NOMINAL_SIZE for size in sizes[2:])
    repeated = positions * math.prod(axis.stride for axis in axes)
    c_out, c_in = weight.shape[0], (sizes[1] or weight.shape[1])

    def cost(target: Target, at: int, moved: int) -> float:
        convolution = Work("Conv", at * weight.size, at * (c_in + c_out), weight.size)
        return target.seconds(convolution) + target.seconds(Work("Resize", elements=(positions + repeated) * moved))

    if target is not None and cost(target, positions, c_out) >= cost(target, repeated, c_in):
        return False
    builder = Builder(model, resize)
    builder.stem = conv.outputs[0].name or builder.stem
    source = resize.inputs[0]
    inside = sizes_of(source) if source is not None else None
    small = [*inside[:1], c_out, *inside[2:]] if inside is not None else None
    attributes = {name: value.value for name, value in conv.attributes.items()}
    first = builder.op("Conv", [source, *conv.inputs[1:]], small, attributes)
    resize.replace_input_with(0, first)
    resize.outputs[0].shape = conv.outputs[0].shape
    replace(model, conv.outputs[0], resize.outputs[0])
    return True


def repeats(node: ir.Node) -> list[int] | None:
    """Whole factors by which a Resize repeats each spatial axis; None when it does anything else."""
    if attribute(node, "mode", "nearest") != "nearest" or attribute(node, "axes") is not None:
        return None
    modes = (
        attribute(node, "coordinate_transformation_mode", "half_pixel"),
        attribute(node, "nearest_mode", "round_prefer_floor"),
    )
    if modes not in REPEATING:
        return None
    scales = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is None or scales.size == 0:
        before, after = shape(node.inputs[0]), shape(node.outputs[0])
        if before is None or after is None or any(not a or not b for a, b in zip(before[2:], after[2:], strict=True)):
            return None
        scales = np.array([1, 1, *(b / a for a, b in zip(before[2:], after[2:], strict=True) if a and b)])
    whole = [round(float(scale)) for scale in scales]
    if any(abs(w - s) > 1e-6 or w < 1 for w, s in zip(whole, scales, strict=True)) or whole[:2] != [1, 1]:
        return None
    return whole[2:] if max(whole) > 1 else None


def transposed_axes(conv: ir.Node, spatial: tuple[int, ...], scales: list[int]) -> list[Axis] | None:
    """Axes of the transposed convolution that equals the pair; None when there is none."""
    rank = len(spatial)
    pads = attribute(conv, "pads") or [0] * (2 * rank)
    plain = all(value == 1 for name in ("strides", "dilations") for value in attribute(conv, name) or [1])
    if not plain or attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    begin = [k - 1 - pads[i] for i, k in enumerate(spatial)]
    end = [k - 1 - pads[rank + i] for i, k in enumerate(spatial)]
    if min(*begin, *end) < 0:
        return None
    return [Axis(k + s - 1, s, b, e, 0, 1) for k, s, b, e in zip(spatial, scales, begin, end, strict=True)]


def to_transposed_weight(weight: Array, scales: list[int], groups: int) -> Array:
    """[C_out, C_in / g, K...] as the transposed kernel [C_in, C_out / g, (K + s - 1)...]."""
    kernel = weight.astype(np.float64)
    for number, scale in enumerate(scales):
        axis = number + 2
        flipped = np.flip(kernel, axis)
        taps = flipped.shape[axis]
        summed = np.zeros((*kernel.shape[:axis], taps + scale - 1, *kernel.shape[axis + 1 :]))
        for shift in range(scale):
            select = [slice(None)] * kernel.ndim
            select[axis] = slice(shift, shift + taps)
            summed[tuple(select)] += flipped
        kernel = summed
    c_out, per_group = kernel.shape[:2]
    grouped = kernel.reshape(groups, c_out // groups, per_group, *kernel.shape[2:]).swapaxes(1, 2)
    return np.ascontiguousarray(grouped.reshape(groups * per_group, c_out // groups, *kernel.shape[2:])).astype(
        weight.dtype
    )


def _choose(
    axes: list[Axis],
    sizes: list[int | None],
    weight: Array,
    transposed: Array,
    groups: int,
    target: Target | None,
    form: str | None,
) -> str | None:
    spatial = [size or NOMINAL_SIZE for size in sizes[2:]]
    options = {name: form_work(name, axes, spatial, transposed.shape, groups) for name in FORMS}
    options["transposed"] = [original_work(axes, spatial, transposed.shape)]
    allowed = {name: work for name, work in options.items() if work is not None and form in (None, name)}
    if not allowed:
        return None
    if target is None:
        return min(allowed, key=lambda name: sum(work.macs for work in allowed[name]))
    positions = math.prod(spatial) * math.prod(axis.stride for axis in axes)
    channels = transposed.shape[0]
    before = [
        Work("Resize", elements=math.prod(spatial) * channels + positions * channels),
        Work("Conv", positions * weight.size, positions * (channels + weight.shape[0]), weight.size),
    ]
    price = {name: sum(map(target.seconds, work)) for name, work in allowed.items()}
    best = min(price, key=lambda name: price[name])
    return best if price[best] < sum(map(target.seconds, before)) else None


def _emit_transposed(
    model: ir.Model, conv: ir.Node, weight: Array, bias: Array | None, axes: list[Axis], groups: int
) -> None:
    builder = Builder(model, conv)
    inputs = [conv.inputs[0], builder.constant(weight, "weight")]
    if bias is not None:
        inputs.append(builder.constant(bias, "bias"))
    attributes = {
        "kernel_shape": list(weight.shape[2:]),
        "strides": [axis.stride for axis in axes],
        "pads": [axis.begin for axis in axes] + [axis.end for axis in axes],
        "group": groups,
    }
    value = builder.op("ConvTranspose", inputs, sizes_of(conv.outputs[0]), attributes)
    replace(model, conv.outputs[0], value)
