"""How near a candidate comes to what the machine can do.

The roofline (Williams, Waterman, Patterson, "Roofline: an insightful visual performance model",
Communications of the ACM 52, 2009): operations a second are at most the smaller of the arithmetic
peak and intensity · bandwidth. Operations and bytes are counted in the ONNX graph; the peaks are
measured on this machine (:mod:`ganexport.measure.peaks`), not read off a data sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ganexport import stats
from ganexport.measurement import Measurement
from ganexport.spec import BATCH, GeneratorSpec

#: Bytes of an element.
WIDTH = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}
#: Operators that carry nearly all arithmetic; everything between them is taken as fused into them.
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger")


@dataclass(frozen=True)
class Cost:
    """Work of one sample.

    Attributes:
        flops: Floating-point operations, two a multiply-accumulate.
        weights: Weight elements, read once a run whatever its batch.
        activations: Activation elements that the heavy operators read and write.
    """

    flops: float
    weights: float
    activations: float

    def intensity(self, items: int, precision: str) -> float:
        """Operations a byte when ``items`` samples share one read of the weights."""
        moved = WIDTH.get(precision, 4) * (self.weights + items * self.activations)
        return items * self.flops / moved if moved else math.inf


def count(path: Path, spec: GeneratorSpec | None, sizes: Mapping[str, int]) -> Cost:
    """Count an ONNX graph's operations and bytes for one sample at these sizes.

    Args:
        path: The ONNX file.
        spec: Its spec; symbolic dimensions are bound by it. None reads it off the file.
        sizes: Of the dimensions other than the batch.

    Raises:
        ArtifactError: Not a readable file.
        MissingDependencyError: The package onnx is not installed.
    """
    from ganexport.bench.candidates import onnx_spec
    from ganexport.build.onnx_file import load_model, require_onnx

    onnx = require_onnx()
    model = load_model(path)
    known = spec or onnx_spec(path)
    bound = known.sizes(**{name: size for name, size in sizes.items() if name in {d.name for d in known.dims}})
    if BATCH in bound:
        bound[BATCH] = known.dim(BATCH).min
    for tensor, value in zip(known.inputs, _inputs(model), strict=False):
        shape = tensor.resolve(bound)
        for size, dim in zip(shape, value.type.tensor_type.shape.dim, strict=True):
            dim.dim_value = size
    for value in model.graph.output:  # symbolic names there would contradict the bound sizes
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    batch = bound.get(BATCH) or next((t.shape[0] for t in known.inputs if t.shape and isinstance(t.shape[0], int)), 1)
    return _sum(inferred.graph, int(batch))


def _inputs(model: Any) -> list[Any]:
    initializers = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initializers]


def _sum(graph: Any, batch: int) -> Cost:
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes |= weights
    constants = _derived_from(graph, set(weights))
    flops = activations = 0.0
    for node in graph.node:
        if node.op_type in HEAVY and node.output[0] not in constants:
            flops += _flops(node, shapes)
            moved = [name for name in node.input if name and name not in constants] + list(node.output[:1])
            activations += sum(math.prod(shapes.get(name, ())) for name in moved)
    held = sum(math.prod(shape) for shape in weights.values())
    return Cost(flops / batch, float(held), activations / batch)


def _derived_from(graph: Any, constants: set[str]) -> set[str]:
    """Names that depend on weights alone (dequantised weights, folded norms)."""
    found = set(constants)
    for node in graph.node:
        if all(name in found for name in node.input if name):
            found |= set(node.output)
    return found


def _flops(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> float:
    attributes = {a.name: a for a in node.attribute}
    group = attributes["group"].i if "group" in attributes else 1
    output = shapes.get(node.output[0], ())
    weight_at = {"QLinearConv": 3, "QLinearMatMul": 3}.get(node.op_type, 1)
    data, weight = shapes.get(node.input[0], ()), shapes.get(node.input[weight_at], ())
    if not output or not weight or not data:
        return 0.0
    if "Conv" in node.op_type:
        kernel = math.prod(weight[2:])
        if node.op_type == "ConvTranspose":  # every input element meets every weight of its group
            return 2.0 * math.prod(data) * weight[1] * kernel
        return 2.0 * math.prod(output) * (data[1] / group) * kernel
    if node.op_type == "Gemm":
        transposed = attributes["transA"].i if "transA" in attributes else 0
        return 2.0 * math.prod(output) * data[0 if transposed else -1]
    return 2.0 * math.prod(output) * data[-1]


def annotate(rows: Sequence[Measurement], costs: Mapping[str, Cost], peaks: Mapping[str, Any]) -> list[Measurement]:
    """Rows with their share of the roofline in ``facts["roofline"]``.

    Args:
        rows: Measurements.
        costs: Cost of a sample by the cell's sizes without the batch (see :func:`cell_key`).
        peaks: :func:`peak_key` → what :func:`ganexport.measure.peaks.measure` returned.
    """
    return [_annotate(row, costs, peaks) for row in rows]


def cell_key(sizes: Mapping[str, int]) -> str:
    """Sizes other than the batch as a key."""
    return ",".join(f"{name}={size}" for name, size in sorted(sizes.items()) if name != BATCH)


def peak_key(candidate: Mapping[str, Any]) -> str:
    """Which peaks a candidate is held against: its kind of device, and the threads and cores it was limited to."""
    kind = str(candidate.get("device", "cpu")).partition(":")[0]
    if kind != "cpu":
        return kind
    cores, threads = candidate.get("cores"), candidate.get("threads")
    limits = [f"cores {cores}"] if cores else []
    limits += [f"{threads} thread{'s' if threads > 1 else ''}"] if threads else []
    return " ".join([kind, *limits])


def _annotate(row: Measurement, costs: Mapping[str, Cost], peaks: Mapping[str, Any]) -> Measurement:
    cost = costs.get(cell_key(row.conditions.get("sizes", {})))
    peak = peaks.get(peak_key(row.candidate))
    compute = next((s for s in row.series if s.name == "compute"), None)
    if cost is None or peak is None or compute is None or not cost.flops:
        return row
    precision = str(row.candidate.get("precision", "fp32"))
    arithmetic = peak["gemm"].get(precision)
    items = compute.items
    achieved = items * cost.flops / (stats.percentile(np.asarray(compute.samples), 50) / 1e9)
    intensity = cost.intensity(items, precision)
    found: dict[str, Any] = {
        "flops_per_item": cost.flops,
        "bytes_per_item": items * cost.flops / intensity / items if intensity else None,
        "intensity": intensity,
        "achieved": achieved,
    }
    if arithmetic:
        roof = min(arithmetic, intensity * peak["copy"])
        found |= {
            "roof": roof,
            "share": achieved / roof,
            "bound": "compute" if arithmetic <= intensity * peak["copy"] else "memory",
        }
    return msgspec.structs.replace(row, facts={**row.facts, "roofline": found})
