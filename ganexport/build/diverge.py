"""Which layer leaves the fp32 values first: every tensor of two graphs, compared in order."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganexport.build.onnx_file import load_model, origin_of, require_onnx, save_model
from ganexport.build.precision import FP16_MAX, float_tensors, name_nodes
from ganexport.seeding import Sampling, batched
from ganexport.spec import BATCH, GeneratorSpec

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[Any]
#: Relative error (root mean square) from which a layer counts as diverged: 26 dB.
DIVERGED = 0.05


class Layer(msgspec.Struct, frozen=True):
    """How far one node's output is from the fp32 graph's.

    Attributes:
        node: Its name.
        operator: Its type.
        origin: file:line in the user's code, empty when not recorded.
        error: Root mean square error over root mean square value; infinite when not finite.
        growth: How much of it arose here (beyond what its inputs brought).
        peak: Largest magnitude in the fp32 graph.
    """

    node: str
    operator: str
    origin: str
    error: float
    growth: float
    peak: float

    def told(self) -> str:
        """For a message: ``Conv conv_3 (net.py:12)``."""
        return f"{self.operator} {self.node}{f' ({self.origin})' if self.origin else ''}"


def outputs_of_all_nodes(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy whose outputs are these tensors."""
    onnx = require_onnx()
    copy: ModelProto = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def run_all(model: ModelProto, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Values of the named tensors, by ONNX Runtime without graph optimisation, which would remove them."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.onnx"
        save_model(_typed_outputs(outputs_of_all_nodes(model, names)), path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))


def _typed_outputs(model: ModelProto) -> ModelProto:
    onnx = require_onnx()
    bare: ModelProto = onnx.ModelProto()
    bare.CopyFrom(model)
    names = [value.name for value in bare.graph.output]
    del bare.graph.output[:]
    inferred = onnx.shape_inference.infer_shapes(bare)
    types = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.input)}
    for name in names:
        if name in types:
            bare.graph.output.append(types[name])
        else:
            bare.graph.output.append(onnx.ValueInfoProto(name=name))
    return bare


def divergence(full: ModelProto, low: ModelProto, feeds: Sequence[Mapping[str, Array]], precision: str) -> list[Layer]:
    """Compare every fp32 tensor of ``full`` with its counterpart in ``low``.

    Args:
        full: The fp32 graph.
        low: Made from it by :func:`~ganexport.build.precision.low_precision` or quantization.
        feeds: Inputs.
        precision: Of ``low``.

    Returns:
        One entry a node, in the graph's order.
    """
    full = _named(full)
    floats = float_tensors(full)
    made = {name for node in low.graph.node for name in node.output}
    pairs = {}
    for node in full.graph.node:
        for name in node.output:
            narrow = f"{name}_{precision}"
            if name in floats and (narrow in made or name in made):
                pairs[name] = narrow if narrow in made else name
    errors, peaks = _measure(full, low, pairs, feeds)
    layers = []
    for node in full.graph.node:
        known = [name for name in node.output if name in errors]
        if not known:
            continue
        error = max(errors[name] for name in known)
        brought = max((errors.get(name, 0.0) for name in node.input), default=0.0)
        growth = error if np.isinf(error) and not np.isinf(brought) else 0.0 if np.isinf(brought) else error - brought
        layers.append(
            Layer(node.name, node.op_type, origin_of(node), error, growth, max(peaks[name] for name in known))
        )
    return layers


def _named(model: ModelProto) -> ModelProto:
    onnx = require_onnx()
    copy: ModelProto = onnx.ModelProto()
    copy.CopyFrom(model)
    name_nodes(copy)
    return copy


def _measure(
    full: Any, low: Any, pairs: dict[str, str], feeds: Sequence[Mapping[str, Array]]
) -> tuple[dict[str, float], dict[str, float]]:
    squares = dict.fromkeys(pairs, 0.0)
    truths = dict.fromkeys(pairs, 0.0)
    peaks = dict.fromkeys(pairs, 0.0)
    for feed in feeds:
        wanted = run_all(full, list(pairs), feed)
        got = run_all(low, list(pairs.values()), feed)
        for name, narrow in pairs.items():
            truth, value = wanted[name].astype(np.float64), got[narrow].astype(np.float64)
            with np.errstate(invalid="ignore"):
                error = value - truth
            squares[name] += float((error * error).sum()) if np.isfinite(error).all() else np.inf
            truths[name] += float((truth * truth).sum())
            peaks[name] = max(peaks[name], float(np.abs(truth).max(initial=0.0)))
    return {name: float(np.sqrt(squares[name] / (truths[name] + 1e-20))) for name in pairs}, peaks


def first_diverging(layers: Sequence[Layer]) -> Layer | None:
    """The first layer that is not finite or beyond :data:`DIVERGED`; else the one where most error arose."""
    for layer in layers:
        if layer.error > DIVERGED:
            return layer
    return max(layers, key=lambda layer: layer.growth, default=None)


def overflowing(layers: Sequence[Layer], limit: float = FP16_MAX / 2) -> list[str]:
    """Nodes whose fp32 output comes within a factor of two of fp16's largest value."""
    return [layer.node for layer in layers if layer.peak > limit]


def neighbours(model: ModelProto, nodes: set[str]) -> set[str]:
    """These nodes and those that read their outputs: a value too large for fp16 must not be cast in between."""
    produced = {name for node in model.graph.node if node.name in nodes for name in node.output}
    return nodes | {node.name for node in model.graph.node if produced & set(node.input)}


def small_feed(spec: GeneratorSpec) -> dict[str, Array]:
    """One small set of inputs, for comparing layers."""
    named = batched(spec)
    small = {dim.name: dim.min for dim in named.dims if dim.name != BATCH}
    count = 1 if named.batch is None else named.batch.min
    return Sampling(spec, small).draw(0, 0, count)


def read(path: Path) -> ModelProto:
    """The model of a file, its nodes named."""
    return _named(load_model(path))
