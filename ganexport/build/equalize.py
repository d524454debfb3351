"""Channel ranges made alike before int8: what one layer writes is divided, what the next reads is multiplied.

One scale serves all channels of an activation, so a quiet channel beside a loud one gets few of its 255
levels. Between two layers with only positively homogeneous, channel-wise operators (LeakyReLU, ReLU, upsampling,
a reshape) each channel c can be divided by a factor s_c in the first layer's weights and multiplied by it in the
second's: the same function (cross-layer equalisation, Nagel et al. 2019, arXiv 1906.04721; SmoothQuant, Xiao et
al. 2023, arXiv 2211.10438). ``s_c = r_c^a / w_c^(1-a)``, r_c the channel's largest activation, w_c the largest weight
that reads it: a = 1 makes the activations alike, a = 0 the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]

#: f(s x) = s f(x) for s > 0 and channel by channel.
HOMOGENEOUS = ("LeakyRelu", "Relu", "PRelu", "Identity", "Dropout", "MaxPool", "AveragePool", "GlobalAveragePool")
#: Homogeneous under conditions on their attributes.
CONDITIONAL = ("Resize", "Pad", "Reshape", "Flatten")
#: Rewrites after which neighbouring layers have nothing between them but their activation.
FOLDING = ("remove-dead", "fold-batch-norm", "fold-scale")
#: Balances worth trying: activations alike, for a first layer whose reader stays wide; both alike.
BALANCES = (1.0, 0.5)
#: Factors further apart than this are dead channels, not scales.
LIMIT = 1e3


@dataclass(frozen=True)
class Link:
    """Two layers and the tensor between them that the second reads.

    Attributes:
        first: Name of the layer whose outputs are divided.
        second: Name of the layer whose inputs are multiplied.
        tensor: The second layer's input.
        channels: How many.
        block: Consecutive output features of ``first`` that are one channel of ``second``.
    """

    first: str
    second: str
    tensor: str
    channels: int
    block: int


def links(model: onnx.ModelProto) -> list[Link]:
    """Pairs of layers that can share out their channels' scales, in the graph's order.

    Args:
        model: fp32; every node has a name.
    """
    graph = _Graph(model)
    found = [link for node in model.graph.node if (link := graph.link(node)) is not None]
    firsts = [link.first for link in found]
    return [link for link in found if firsts.count(link.first) == 1]


def equalise(model: onnx.ModelProto, feeds: Sequence[Mapping[str, Array]], balance: float) -> tuple[Any, int]:
    """The same function with the channels' scales shared out.

    Args:
        model: fp32; unchanged by this call.
        feeds: Inputs on which the activations' ranges are measured.
        balance: ``a`` above, 0 to 1.

    Returns:
        (model, number of pairs of layers that were changed).
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for number, node in enumerate(copy.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    pairs = links(copy)
    if not pairs:
        return copy, 0
    ranges = _channel_ranges(copy, pairs, feeds)
    graph = _Graph(copy)
    for link in pairs:
        graph.scale(link, ranges[link.tensor], balance)
    return copy, len(pairs)


def equalised_forms(
    model: onnx.ModelProto,
    feeds: Callable[[], Sequence[Mapping[str, Array]]],
    finish: Callable[[onnx.ModelProto], onnx.ModelProto],
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The variants for :func:`ganexport.build.quantize.quantize`, made when they are asked for.

    Args:
        model: fp32, normalisations folded into the weights.
        feeds: Gives calibration inputs.
        finish: Further rewrites of each.
    """
    inputs = feeds()
    for balance in BALANCES:
        made, count = equalise(model, inputs, balance)
        if not count:
            return
        yield f"channels of {count} layers equalised by {balance:g}", finish(made)


class _Graph:
    """A model's connections, and its weights by channel."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self.model = model
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.nodes = {node.name: node for node in model.graph.node}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers: dict[str, int] = {value.name: 2 for value in model.graph.output}  # an output is never scaled
        for node in model.graph.node:
            for name in node.input:
                self.readers[name] = self.readers.get(name, 0) + 1
        inferred = onnx.shape_inference.infer_shapes(model)
        self.shapes = {
            value.name: [
                dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim
            ]
            for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
        }

    def link(self, second: Any) -> Link | None:
        """The pair that ends in this node, if there is one."""
        channels = self._width(second, inputs=True)
        if channels is None:
            return None
        name = second.input[0]
        features, block = channels, 1
        while self.readers.get(name) == 1:
            node = self.producers.get(name)
            if node is None:
                return None
            width = self._width(node, inputs=False)
            if width is not None:
                return Link(node.name, second.name, second.input[0], channels, block) if width == features else None
            if node.op_type in ("Reshape", "Flatten"):
                spread = self._spread(node, features)
                if spread is None or block != 1:
                    return None
                block, features = spread, features * spread
            elif not self._homogeneous(node):
                return None
            name = node.input[0]
        return None

    def _keeps_channels(self, node: Any) -> bool:
        before, after = self.shapes.get(node.input[0]), self.shapes.get(node.output[0])
        return bool(
            before and after and len(before) > 1 and len(after) > 1 and before[1] is not None and before[1] == after[1]
        )

    def _spread(self, node: Any, channels: int) -> int | None:
        """[batch, channels * k] to [batch, channels, ...]: k; None for other reshapes."""
        before, after = self.shapes.get(node.input[0]), self.shapes.get(node.output[0])
        if not before or not after or len(before) != 2 or len(after) < 3 or after[1] != channels:
            return None
        rest = after[2:]
        if None in rest or before[1] != channels * math.prod(int(size or 0) for size in rest):
            return None
        return math.prod(int(size or 0) for size in rest)

    def _homogeneous(self, node: Any) -> bool:
        attributes = {a.name: a for a in node.attribute}
        if node.op_type == "Resize":
            mode = attributes["mode"].s.decode() if "mode" in attributes else "nearest"
            position = attributes.get("coordinate_transformation_mode")
            fills = position is not None and b"crop" in position.s  # with a constant
            return mode in ("nearest", "linear", "cubic") and self._keeps_channels(node) and not fills
        if node.op_type == "Pad":
            if not self._keeps_channels(node):
                return False
            if "mode" in attributes and attributes["mode"].s != b"constant":
                return True
            return len(node.input) < 3 or not node.input[2] or self._is_zero(node.input[2])
        if node.op_type == "PRelu":
            return node.input[1] in self.constants
        return node.op_type in HOMOGENEOUS

    def _is_zero(self, name: str) -> bool:
        from onnx import numpy_helper

        return name in self.constants and not numpy_helper.to_array(self.constants[name]).any()

    def _axes(self, node: Any) -> tuple[int, int] | None:
        """(axis of outputs, axis of inputs) in a layer's weights; None where the node is no plain layer."""
        attributes = {a.name: a.i for a in node.attribute}
        if node.op_type == "Conv":
            return (0, 1) if attributes.get("group", 1) == 1 else None
        if node.op_type == "ConvTranspose":
            return (1, 0) if attributes.get("group", 1) == 1 else None
        if node.op_type == "Gemm":
            if attributes.get("transA", 0):
                return None
            return (0, 1) if attributes.get("transB", 0) else (1, 0)
        return None

    def _width(self, node: Any, *, inputs: bool) -> int | None:
        """Input or output channels of a layer with constant weights of its own."""
        axes = self._axes(node)
        if axes is None:
            return None
        for position, name in enumerate(node.input[1:3]):
            if name and (name not in self.constants or self.readers.get(name) != 1):
                return None
            if name and position == 1 and len(self.constants[name].dims) != 1:
                return None
        dims = self.constants[node.input[1]].dims
        return int(dims[axes[1] if inputs else axes[0]])

    def scale(self, link: Link, ranges: Array, balance: float) -> None:
        """Divide what the first layer writes and multiply what the second reads."""
        first, second = self.nodes[link.first], self.nodes[link.second]
        reading = self._axes(second)
        writing = self._axes(first)
        assert reading is not None
        assert writing is not None
        weight = self._values(second.input[1])
        others = tuple(axis for axis in range(weight.ndim) if axis != reading[1])
        largest = np.abs(weight).max(axis=others)  # [channels]
        factors = self._factors(ranges, largest, balance)
        self._write(second.input[1], weight * _along(factors, reading[1], weight.ndim))
        spread = np.repeat(factors, link.block)
        own = self._values(first.input[1])
        self._write(first.input[1], own / _along(spread, writing[0], own.ndim))
        if len(first.input) > 2 and first.input[2]:
            self._write(first.input[2], self._values(first.input[2]) / spread)

    @staticmethod
    def _factors(ranges: Array, weights: Array, balance: float) -> Array:
        alive = (ranges > 0) & (weights > 0)
        factors = np.ones(len(ranges), np.float64)
        if not alive.any():
            return factors
        raw = np.log(ranges[alive].astype(np.float64)) * balance - np.log(weights[alive].astype(np.float64)) * (
            1 - balance
        )
        factors[alive] = np.exp(np.clip(raw - raw.mean(), -math.log(LIMIT), math.log(LIMIT)))
        return factors

    def _values(self, name: str) -> Array:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name]).astype(np.float64)

    def _write(self, name: str, values: Array) -> None:
        from onnx import numpy_helper

        self.constants[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))


def _along(factors: Array, axis: int, rank: int) -> Array:
    return factors.reshape([-1 if position == axis else 1 for position in range(rank)])


def _channel_ranges(
    model: onnx.ModelProto, pairs: Sequence[Link], feeds: Sequence[Mapping[str, Array]]
) -> dict[str, Array]:
    """The largest absolute value of each channel of the tensors between the pairs."""
    import onnx
    import onnxruntime

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    names = list(dict.fromkeys(link.tensor for link in pairs))
    present = {value.name for value in watched.graph.output}
    for name in names:
        if name not in present:
            watched.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ranges: dict[str, Array] = {}
    for feed in feeds:
        for name, value in zip(names, session.run(names, dict(feed)), strict=True):
            axes = tuple(axis for axis in range(value.ndim) if axis != 1)
            seen = np.abs(value).max(axis=axes)
            ranges[name] = np.maximum(ranges[name], seen) if name in ranges else seen
    return ranges
