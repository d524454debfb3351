"""Nodes that change nothing, and nodes nobody reads.

Identity, Dropout at inference, Cast to the dtype it already has, Pad by nothing, a Reshape or Expand to
the shape a value statically has, reshapings that lead back to a shape the elements had before, a Concat
of one, an interleave of block 1; then every node and initializer without a reader.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ganexport.build.cost import Target
from ganexport.build.rewrites._graph import attribute, constant, is_op, replace, shape, sizes_of

CANDIDATES = ("Identity", "Dropout", "Cast", "Concat", "DepthToSpace", "Pad", "Reshape", "Expand", "Transpose")
#: Operators that only give the same elements another shape.
RESHAPING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def apply(model: ir.Model, target: Target | None = None) -> int:
    """Remove what has no effect. It pays everywhere.

    Returns:
        How many nodes disappeared.
    """
    del target
    before = len(model.graph)
    for node in list(model.graph):
        if is_op(node, *CANDIDATES) and _changes_nothing(node):
            _bypass(model, node, node.inputs[0])
        elif is_op(node, *RESHAPING) and (origin := _round_trip(node)) is not None:
            _bypass(model, node, origin)
    common.RemoveUnusedNodesPass()(model)
    return before - len(model.graph)


def _changes_nothing(node: ir.Node) -> bool:
    value = node.inputs[0]
    if value is None or any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return False
    if is_op(node, "Identity"):
        return True
    if is_op(node, "Dropout"):
        training = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else False
        return training is not None and not bool(training)
    if is_op(node, "Cast"):
        return bool(value.dtype is not None and int(value.dtype) == attribute(node, "to"))
    if is_op(node, "Concat"):
        return len(node.inputs) == 1
    if is_op(node, "DepthToSpace"):
        return bool(attribute(node, "blocksize") == 1)
    if is_op(node, "Transpose"):
        order = attribute(node, "perm")
        return bool(order is not None and order == sorted(order))
    if is_op(node, "Pad"):
        pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return bool(pads is not None and not np.any(pads))
    before, after = shape(value), shape(node.outputs[0])
    return before is not None and None not in before and before == after


def _round_trip(node: ir.Node) -> ir.Value | None:
    """The value further up that already has the node's output shape, symbols included, elements untouched since."""
    wanted = sizes_of(node.outputs[0])
    value = node.inputs[0]
    if wanted is None or value is None or sum(not isinstance(size, int) for size in wanted) > 1:
        return None
    if any(not isinstance(size, int) and size.value is None for size in wanted):
        return None
    maker = value.producer()
    while is_op(maker, *RESHAPING):
        assert maker is not None
        value = maker.inputs[0]
        if value is None:
            return None
        if sizes_of(value) == wanted:
            return value
        maker = value.producer()
    return None


def _bypass(model: ir.Model, node: ir.Node, value: ir.Value | None) -> None:
    output = node.outputs[0]
    assert value is not None
    if output.is_graph_output() and (value.is_graph_input() or value.is_graph_output() or value.is_initializer()):
        return  # the graph's interface needs a node between two of its names
    replace(model, output, value)
