"""One input fixed to a value for good: a class label, a truncation.

Everything that depends on that input alone (an embedding, a mapping of it) is computed once and stored.
The input then disappears from the graph, so this pass is never applied unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ganexport.build.cost import Target
from ganexport.build.rewrites._graph import Array, Builder, constant, is_op
from ganexport.errors import UsageError

#: Operators that broadcast a batch of one by themselves.
BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Where", "Min", "Max"})


def apply(model: ir.Model, target: Target | None = None, *, values: Mapping[str, Any]) -> int:
    """Replace inputs by constants and compute what depends on nothing else.

    Args:
        model: Changed in place.
        target: Not needed.
        values: By input name. For an input [batch, ...] the value of one sample, without the batch;
            for an input without a batch dimension the whole value.

    Returns:
        How many inputs were fixed.

    Raises:
        UsageError: No such input, a value of the wrong shape, or no input would be left to
            say how large the batch is.
    """
    del target
    for name, value in values.items():
        _fix(model, name, np.asarray(value))
    return len(values)


def _fix(model: ir.Model, name: str, value: Array) -> None:
    graph = model.graph
    found = {entry.name: entry for entry in graph.inputs}
    if name not in found:
        raise UsageError(f"no input {name!r} to fix; this generator has: {', '.join(str(n) for n in found)}")
    source = found[name]
    wanted = list(source.shape) if source.shape is not None else []
    batch = wanted[0] if wanted and not isinstance(wanted[0], int) else None
    inner = wanted[1:] if batch is not None else wanted
    if list(value.shape) != inner:
        raise UsageError(f"input {name!r}: a fixed value has shape {inner}, got {list(value.shape)}")
    carrier = next((v for v in graph.inputs if v is not source and v.shape and str(v.shape[0]) == str(batch)), None)
    if batch is not None and carrier is None:
        raise UsageError(f"input {name!r} cannot be fixed: no other input carries the batch")
    assert source.dtype is not None
    array = value.astype(source.dtype.numpy())
    stored = array[None] if batch is not None else array
    frontier = _frontier(model, source)
    results = _evaluate(model, source, stored, frontier)
    for edge, result in zip(frontier, results, strict=True):
        _store(edge, result, model, carrier)
    graph.inputs.remove(source)


def _frontier(model: ir.Model, source: ir.Value) -> list[ir.Value]:
    """Values that follow from the input and constants alone, and that something else reads."""
    known = {source}
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if any(value in known for value in inputs) and all(
            value in known or constant(value) is not None for value in inputs
        ):
            known |= set(node.outputs)
    outside = [
        value
        for value in known
        if value.is_graph_output() or any(not set(use.node.outputs) <= known for use in value.uses())
    ]
    return sorted(outside, key=lambda value: value.name or "")


def _evaluate(model: ir.Model, source: ir.Value, value: Array, wanted: list[ir.Value]) -> list[Array]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    if wanted == [source]:
        return [value]
    names = [str(entry.name) for entry in wanted]
    others = [name for name in names if name != source.name]
    part = onnx.utils.Extractor(ir.to_proto(model)).extract_model([str(source.name)], others)
    computed = dict(zip(others, ReferenceEvaluator(part).run(None, {str(source.name): value}), strict=True))
    return [value if name == source.name else np.asarray(computed[name]) for name in names]


def _store(edge: ir.Value, array: Array, model: ir.Model, carrier: ir.Value | None) -> None:
    batched = edge.shape is not None and len(edge.shape) == array.ndim and not isinstance(edge.shape[0], int)
    for use in list(edge.uses()):
        builder = Builder(model, use.node)
        stored = builder.constant(array, "fixed")
        if batched and not is_op(use.node, *BROADCASTING):
            assert carrier is not None
            stored = _expand(builder, stored, array.ndim, carrier)
        use.node.replace_input_with(use.idx, stored)
    if edge.is_graph_output():
        raise UsageError(f"output {edge.name!r} depends on the fixed input alone")


def _expand(builder: Builder, stored: ir.Value, rank: int, carrier: ir.Value) -> ir.Value:
    size = builder.op("Shape", [carrier], [1], {"start": 0, "end": 1})
    size.dtype = ir.DataType.INT64
    if rank > 1:
        ones = builder.constant(np.ones(rank - 1, np.int64), "ones")
        size = builder.op("Concat", [size, ones], [rank], {"axis": 0})
        size.dtype = ir.DataType.INT64
    expanded = builder.op("Expand", [stored, size])
    if stored.dtype is not None:
        expanded.dtype = stored.dtype
    return expanded
