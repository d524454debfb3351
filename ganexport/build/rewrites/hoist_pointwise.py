"""Activation before the interleave instead of after it.

relu(depth_to_space(conv(x))) = depth_to_space(relu(conv(x))), and the same for a reshape behind a
matrix product and for a concatenation of convolutions. A backend then fuses the activation, and the
rounding to int8 or bf16 behind it, into the convolution, and the interleave moves the narrow numbers.
Exact: an element-wise function commutes with a rearrangement of elements.
"""

from __future__ import annotations

import onnx_ir as ir

from ganexport.build.cost import Target
from ganexport.build.rewrites._graph import POINTWISE, is_op, nodes_of, only_consumer

MOVES = ("DepthToSpace", "Slice", "Reshape", "Transpose")


def apply(model: ir.Model, target: Target | None = None) -> int:
    """Move every activation up through the interleave and crop in front of it. It pays everywhere.

    Returns:
        How many steps were moved.
    """
    del target
    moved = 0
    changed = True
    while changed:
        steps = [_hoist(node) for node in nodes_of(model, *sorted(POINTWISE))]
        changed = any(steps)
        moved += sum(steps)
    return moved


def _hoist(node: ir.Node) -> bool:
    value = node.inputs[0]
    mover = value.producer() if value is not None else None
    if mover is not None and is_op(mover, "Concat"):
        return _hoist_over_concat(mover, node)
    if mover is None or not is_op(mover, *MOVES) or only_consumer(mover.outputs[0]) is not node:
        return False
    source = mover.inputs[0]
    if source is None or source.producer() is None:
        return False
    # source -> mover -> node -> out   becomes   source -> node' -> mover' -> out
    mover.replace_input_with(0, _activate(mover, node, source))
    _drop(node, mover.outputs[0])
    return True


def _hoist_over_concat(mover: ir.Node, node: ir.Node) -> bool:
    """Every part gets the activation of the whole, when each part is a convolution of its own (the split form)."""
    if only_consumer(mover.outputs[0]) is not node:
        return False
    parts = list(mover.inputs)
    for part in parts:
        maker = part.producer() if part is not None else None
        if part is None or not is_op(maker, "Conv") or only_consumer(part) is not mover:
            return False
    for index, part in enumerate(parts):
        assert part is not None
        mover.replace_input_with(index, _activate(mover, node, part))
    _drop(node, mover.outputs[0])
    return True


def _activate(before: ir.Node, node: ir.Node, source: ir.Value) -> ir.Value:
    activation = ir.Node(node.domain, node.op_type, [source], node.attributes)
    output = activation.outputs[0]
    output.shape = source.shape
    if source.dtype is not None:
        output.dtype = source.dtype
    assert before.graph is not None
    before.graph.insert_before(before, activation)
    return output


def _drop(node: ir.Node, new: ir.Value) -> None:
    """Let the readers of a node read ``new`` instead, and remove the node."""
    old = node.outputs[0]
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.replaced"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
