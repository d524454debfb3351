"""Transposed convolution as an ordinary convolution followed by an interleave (sub-pixel convolution).

A transposed convolution with stride s writes s x s output phases; each phase is an ordinary stride-1
convolution of the input with every s-th tap of the kernel, flipped (Shi et al., "Is the deconvolution
layer the same as a convolutional layer?", arXiv 1609.07009). The same numbers are summed, so the
result is exact up to the order of summation. Why: CPU backends have fast int8 and bf16 kernels for
stride-1 convolutions and none for transposed ones.

Along one axis let K be the dilated kernel's length, T = ceil(K / s) the taps of a phase. Three forms:

``crop``
    One convolution with T taps on the padded input gives all positions of all phases; the
    interleaved result is cropped by the padding's remainder. Fewest operations for most shapes.
``aligned``
    One convolution whose window covers every phase's taps, so that nothing is cropped; 3 instead of
    2 taps for k4 s2 p1 (2.25x the operations in 2-D), but the simplest data movement.
``split``
    One convolution a phase, each with its own taps and padding, and a concatenation: no wasted
    operation and no crop, at the price of s^2 smaller convolutions.

Stride 1 needs no interleave: it becomes one convolution with the flipped kernel.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ganexport.build.cost import Target, Work
from ganexport.build.rewrites._graph import (
    Array,
    Builder,
    attribute,
    constant,
    nodes_of,
    opset,
    replace,
    shape,
    sizes_of,
)

FORMS = ("crop", "aligned", "split")
#: Size assumed for a symbolic height or width when forms are priced.
NOMINAL_SIZE = 32


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a transposed convolution.

    Attributes:
        kernel: Taps, not counting dilation.
        stride: Output positions an input position.
        begin: Padding cut off at the start of the output.
        end: Padding cut off at its end.
        output_padding: Positions added at its end.
        dilation: Distance of two taps.
    """

    kernel: int
    stride: int
    begin: int
    end: int
    output_padding: int
    dilation: int

    @property
    def length(self) -> int:
        """The dilated kernel's length K."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def taps(self) -> int:
        """Taps of a phase, T."""
        return -(-self.length // self.stride)

    @property
    def tail(self) -> int:
        """Positions to cut at the end of the full interleaved result."""
        return self.stride * self.taps - self.length - self.output_padding + self.end

    @property
    def growth(self) -> int | None:
        """Blocks of s outputs beyond one an input position, None when the output is no whole number of blocks."""
        extra = self.length - self.stride + self.output_padding - self.begin - self.end
        return extra // self.stride if extra % self.stride == 0 else None

    def offsets(self, phase: int) -> list[tuple[int, int]]:
        """(input offset, kernel position) of the taps of output ``s*j + phase``, in ascending offset."""
        block, remainder = divmod(phase + self.begin, self.stride)
        positions = range(remainder, self.length, self.stride)
        return sorted((block - position // self.stride, position) for position in positions)


@dataclass(frozen=True)
class Window:
    """Where a stride-1 convolution looks along one axis: padding, taps, and what to crop afterwards."""

    begin: int
    end: int
    taps: int
    crop_begin: int = 0
    crop_end: int = 0


def crop_window(axis: Axis) -> Window | None:
    """The ``crop`` form along one axis; None when it cannot express it."""
    if axis.tail < 0:
        return None
    begin = axis.taps - 1 - axis.begin // axis.stride
    end = axis.taps - 1 - axis.tail // axis.stride
    if begin < 0 or end < 0:
        return None
    return Window(begin, end, axis.taps, axis.begin % axis.stride, axis.tail % axis.stride)


def aligned_window(axis: Axis) -> Window | None:
    """The ``aligned`` form along one axis: the union of every phase's taps; None when it cannot express it."""
    if axis.growth is None:
        return None
    offsets = [offset for phase in range(axis.stride) for offset, _ in axis.offsets(phase)]
    low, high = min(offsets), max(offsets)
    return _window(low, high, axis.growth)


def _window(low: int, high: int, growth: int) -> Window | None:
    begin, end = -low, growth + high
    return Window(begin, end, high - low + 1) if begin >= 0 and end >= 0 else None


def split_windows(axis: Axis) -> list[Window] | None:
    """The ``split`` form along one axis: a window a phase; None when it cannot express it."""
    if axis.growth is None:
        return None
    windows = []
    for phase in range(axis.stride):
        offsets = [offset for offset, _ in axis.offsets(phase)] or [0]
        window = _window(offsets[0], offsets[-1], axis.growth)
        if window is None:
            return None
        windows.append(window)
    return windows


def dilate(weight: Array, axes: list[Axis]) -> Array:
    """The kernel with its dilation's zeros written out: [..., K1, K2, ...]."""
    full = np.zeros((*weight.shape[:2], *(axis.length for axis in axes)), weight.dtype)
    spread: tuple[Any, ...] = tuple(slice(None, None, axis.dilation) for axis in axes)
    full[(slice(None), slice(None), *spread)] = weight
    return full


def phase_kernel(full: Array, axes: list[Axis], phase: tuple[int, ...], form: str) -> Array:
    """One phase's stride-1 kernel, [C_in, C_out / groups, taps...], in the chosen form's window."""
    kernel = full
    for number, (axis, q) in enumerate(zip(axes, phase, strict=True)):
        pairs = _crop_pairs(axis, q) if form == "crop" else axis.offsets(q)
        if form == "crop":
            low, taps = 0, axis.taps
        elif form == "aligned":
            window = aligned_window(axis)
            assert window is not None
            low, taps = -window.begin, window.taps
        else:
            windows = split_windows(axis)
            assert windows is not None
            low, taps = -windows[q].begin, windows[q].taps
        dimension = number + 2
        out = np.zeros((*kernel.shape[:dimension], taps, *kernel.shape[dimension + 1 :]), kernel.dtype)
        for offset, position in pairs:
            target = [slice(None)] * kernel.ndim
            source = [slice(None)] * kernel.ndim
            target[dimension] = slice(offset - low, offset - low + 1)
            source[dimension] = slice(position, position + 1)
            out[tuple(target)] = kernel[tuple(source)]
        kernel = out
    return kernel


def _crop_pairs(axis: Axis, phase: int) -> list[tuple[int, int]]:
    """(tap of the window, kernel position) of the full result's phase: tap u reads x[m - (T - 1) + u]."""
    return [
        (axis.taps - 1 - t, t * axis.stride + phase) for t in range(axis.taps) if t * axis.stride + phase < axis.length
    ]


def to_conv_weight(kernel: Array, groups: int) -> Array:
    """[C_in, C_out / groups, taps...] of a transposed convolution as [C_out, C_in / groups, taps...]."""
    c_in, per_group = kernel.shape[:2]
    grouped = kernel.reshape(groups, c_in // groups, per_group, *kernel.shape[2:])
    return np.ascontiguousarray(grouped.swapaxes(1, 2).reshape(groups * per_group, c_in // groups, *kernel.shape[2:]))


def read_axes(node: ir.Node, spatial: tuple[int, ...]) -> list[Axis] | None:
    """The node's axes, or None when its padding is computed at run time."""
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in node.attributes:
        return None
    rank = len(spatial)
    pads = attribute(node, "pads") or [0] * (2 * rank)
    strides = attribute(node, "strides") or [1] * rank
    extra = attribute(node, "output_padding") or [0] * rank
    dilations = attribute(node, "dilations") or [1] * rank
    return [Axis(spatial[i], strides[i], pads[i], pads[rank + i], extra[i], dilations[i]) for i in range(rank)]


def apply(model: ir.Model, target: Target | None = None, form: str | None = None) -> int:
    """Rewrite every transposed convolution that qualifies.

    Args:
        model: Changed in place; shapes of its values must be inferred.
        target: Prices each form; a rewrite that does not pay there is left out. None: always rewrite,
            in the form with the fewest operations.
        form: One of :data:`FORMS` to allow only that one.

    Returns:
        How many were rewritten.
    """
    if opset(model) < 13:
        return 0
    return sum(_rewrite(model, node, target, form) for node in nodes_of(model, "ConvTranspose"))


def _rewrite(model: ir.Model, node: ir.Node, target: Target | None, form: str | None) -> bool:
    weight = constant(node.inputs[1])
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if weight is None or weight.ndim not in (3, 4):
        return False
    if bias is None and len(node.inputs) > 2 and node.inputs[2] is not None:
        return False
    axes = read_axes(node, weight.shape[2:])
    sizes = shape(node.inputs[0]) or [None] * weight.ndim
    if axes is None or not interleavable(axes, sizes):
        return False
    groups = attribute(node, "group", 1)
    chosen = choose_form(axes, sizes, weight.shape, groups, target, form)
    if chosen is None:
        return False
    emit(model, node, weight, bias, axes, groups, chosen)
    return True


def interleavable(axes: list[Axis], sizes: list[int | None]) -> bool:
    """Whether ONNX can express the interleave with these (perhaps symbolic) sizes."""
    strides = {axis.stride for axis in axes}
    return len(axes) == 1 or len(strides) == 1 or sizes[-1] is not None


def choose_form(
    axes: list[Axis],
    sizes: list[int | None],
    weight_shape: tuple[int, ...],
    groups: int,
    target: Target | None,
    form: str | None = None,
) -> str | None:
    """The cheapest form that can express the node, None when there is none or keeping it is cheaper."""
    spatial = [size or NOMINAL_SIZE for size in sizes[2:]]
    options = {
        name: work
        for name in (FORMS if form is None else (form,))
        if (work := form_work(name, axes, spatial, weight_shape, groups)) is not None
    }
    if not options:
        return None
    if target is None:
        return min(options, key=lambda name: sum(work.macs for work in options[name]))
    price = {name: sum(map(target.seconds, work)) for name, work in options.items()}
    best = min(price, key=lambda name: price[name])
    return best if price[best] < target.seconds(original_work(axes, spatial, weight_shape)) else None


def original_work(axes: list[Axis], spatial: list[int], weight_shape: tuple[int, ...]) -> Work:
    """What the transposed convolution itself costs for one sample."""
    c_in, per_group = weight_shape[:2]
    positions = math.prod(spatial)
    outputs = math.prod(axis.stride for axis in axes) * positions * per_group
    return Work(
        "ConvTranspose",
        macs=positions * c_in * per_group * math.prod(axis.kernel for axis in axes),
        elements=positions * c_in + outputs,
        weights=math.prod(weight_shape),
    )


def form_work(
    form: str, axes: list[Axis], spatial: list[int], weight_shape: tuple[int, ...], groups: int
) -> list[Work] | None:
    """Works of one form for one sample, None when it cannot express the node."""
    c_in, per_group = weight_shape[:2]
    phases = math.prod(axis.stride for axis in axes)
    if form == "split":
        splits = [split_windows(axis) for axis in axes]
        if any(split is None for split in splits):
            return None
        combinations = list(itertools.product(*[split or [] for split in splits]))
    else:
        windows = [crop_window(axis) if form == "crop" else aligned_window(axis) for axis in axes]
        if any(window is None for window in windows):
            return None
        combinations = [tuple(window for window in windows if window)]
    channels = per_group * (1 if form == "split" else phases)
    works, outputs = [], 0
    for combination in combinations:
        sizes = [n + w.begin + w.end - w.taps + 1 for n, w in zip(spatial, combination, strict=True)]
        taps = math.prod(window.taps for window in combination)
        produced = math.prod(sizes) * channels * groups
        outputs += produced
        works.append(
            Work(
                "Conv",
                macs=math.prod(sizes) * c_in * channels * taps,
                elements=math.prod(spatial) * c_in + produced,
                weights=c_in * channels * taps,
            )
        )
    if phases > 1:
        works.append(Work("DepthToSpace", elements=2 * outputs))
        if form == "split":
            # Every phase is rounded and moved on its own before it is joined: twice through memory.
            works += [Work("Concat", elements=2 * outputs), *[Work("Concat", elements=2 * outputs / phases)] * phases]
        elif any(window.crop_begin or window.crop_end for window in combinations[0]):
            works.append(Work("Slice", elements=2 * outputs))
    return works


def emit(
    model: ir.Model, node: ir.Node, weight: Array, bias: Array | None, axes: list[Axis], groups: int, form: str
) -> None:
    """Put the chosen form in the node's place."""
    builder = Builder(model, node)
    full = dilate(weight, axes)
    strides = [axis.stride for axis in axes]
    phases = list(itertools.product(*(range(stride) for stride in strides)))
    channels = weight.shape[1] * groups
    assert node.inputs[0] is not None
    in_shape = sizes_of(node.inputs[0]) or [None] * weight.ndim
    kernels = [to_conv_weight(phase_kernel(full, axes, phase, form), groups) for phase in phases]
    # [phases, C_out, ...] keeps the channels together; groups need every group's phases side by side.
    channel_major = groups > 1 and form != "split"
    if form == "split":
        parts = []
        splits = [split_windows(axis) or [] for axis in axes]
        for phase, kernel in zip(phases, kernels, strict=True):
            windows = [split[q] for split, q in zip(splits, phase, strict=True)]
            parts.append(_conv(builder, node, kernel, bias, windows, groups, in_shape))
        value = parts[0] if len(parts) == 1 else _concat(builder, parts, channels * len(phases))
        windows = [Window(0, 0, 1)] * len(axes)
    else:
        windows = [(crop_window if form == "crop" else aligned_window)(axis) or Window(0, 0, 1) for axis in axes]
        stacked = np.stack(kernels, axis=1 if channel_major else 0)
        merged = stacked.reshape(-1, *kernels[0].shape[1:])
        wide = None
        if bias is not None:
            wide = np.repeat(bias, len(phases)) if channel_major else np.tile(bias, len(phases))
        value = _conv(builder, node, merged, wide, windows, groups, in_shape)
    if len(phases) > 1:
        value = interleave(builder, value, strides, channels, channel_major=channel_major)
    value = _crop(builder, value, windows)
    replace(model, node.outputs[0], value)


def _conv(
    builder: Builder,
    node: ir.Node,
    kernel: Array,
    bias: Array | None,
    windows: list[Window],
    groups: int,
    in_shape: list[object],
) -> ir.Value:
    inputs = [node.inputs[0], builder.constant(kernel, "weight")]
    if bias is not None:
        inputs.append(builder.constant(bias, "bias"))
    pads = [window.begin for window in windows] + [window.end for window in windows]
    spatial = [
        size + window.begin + window.end - window.taps + 1 if isinstance(size, int) else None
        for size, window in zip(in_shape[2:], windows, strict=True)
    ]
    attributes = {
        "kernel_shape": list(kernel.shape[2:]),
        "pads": pads,
        "strides": [1] * len(windows),
        "dilations": [1] * len(windows),
        "group": groups,
    }
    return builder.op("Conv", inputs, [in_shape[0], kernel.shape[0], *spatial], attributes)


def _concat(builder: Builder, parts: list[ir.Value], channels: int) -> ir.Value:
    first = sizes_of(parts[0]) or []
    return builder.op("Concat", parts, [first[0], channels, *first[2:]], {"axis": 1})


def interleave(
    builder: Builder, value: ir.Value, strides: list[int], channels: int, *, channel_major: bool
) -> ir.Value:
    """Phases in the channels to phases in space: [N, s1*s2*C, H, W] to [N, C, s1*H, s2*W].

    Args:
        builder: Where to add the nodes.
        value: Channels are ordered (phase, C), or (C, phase) when ``channel_major``.
        strides: Of each spatial axis.
        channels: C.
        channel_major: Order of the channels.
    """
    sizes = sizes_of(value) or []
    out = [size * s if isinstance(size, int) else None for size, s in zip(sizes[2:], strides, strict=True)]
    result = [sizes[0], channels, *out]
    if len(strides) == 2 and strides[0] == strides[1]:
        mode = "CRD" if channel_major else "DCR"
        return builder.op("DepthToSpace", [value], result, {"blocksize": strides[0], "mode": mode})
    rank = len(strides)
    tail = [] if rank == 1 else [sizes[-1]]
    block = [channels, *strides] if channel_major else [*strides, channels]
    wide = builder.op("Reshape", [value, _shape_constant(builder, [0, *block, -1, *tail])])
    c = 1 if channel_major else 1 + rank
    first = 2 if channel_major else 1
    order = [0, c]
    for axis in range(rank):
        order += [2 + rank + axis, first + axis]
    moved = builder.op("Transpose", [wide], attributes={"perm": order})
    last = [] if rank == 1 else [tail[0] * strides[1]]
    return builder.op("Reshape", [moved, _shape_constant(builder, [0, channels, -1, *last])], result)


def _shape_constant(builder: Builder, sizes: list[int]) -> ir.Value:
    return builder.constant(np.array(sizes, np.int64), "shape")


def _crop(builder: Builder, value: ir.Value, windows: list[Window]) -> ir.Value:
    cut = [i for i, window in enumerate(windows) if window.crop_begin or window.crop_end]
    if not cut:
        return value
    far = np.iinfo(np.int64).max
    starts = np.array([windows[i].crop_begin for i in cut], np.int64)
    ends = np.array([-windows[i].crop_end if windows[i].crop_end else far for i in cut], np.int64)
    axes = np.array([i + 2 for i in cut], np.int64)
    sizes = sizes_of(value)
    if sizes is not None:
        for i in cut:
            size = sizes[i + 2]
            sizes[i + 2] = size - windows[i].crop_begin - windows[i].crop_end if isinstance(size, int) else None
    inputs = [value, *(builder.constant(a, h) for a, h in ((starts, "starts"), (ends, "ends"), (axes, "axes")))]
    return builder.op("Slice", inputs, sizes)
