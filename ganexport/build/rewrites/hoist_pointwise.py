"""Activation before the interleave instead of after it.

relu(depth_to_space(conv(x))) = depth_to_space(relu(conv(x))), and the same for a reshape behind a matrix product: a backend then fuses the activation
(and the rounding to int8 or bf16 behind it) into the convolution, and the interleave moves the
narrow numbers. Exact: an element-wise function commutes with a rearrangement of elements.
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
    if mover is None or not is_op(mover, *MOVES) or only_consumer(mover.outputs[0]) is not node:
        return False
    source = mover.inputs[0]
    if source is None or source.producer() is None:
        return False
    graph = mover.graph
    assert graph is not None
    # source -> mover -> node -> out   becomes   source -> node' -> mover' -> out
    activation = ir.Node(node.domain, node.op_type, [source], node.attributes)
    activation.outputs[0].shape, activation.outputs[0].dtype = source.shape, source.dtype
    graph.insert_before(mover, activation)
    mover.replace_input_with(0, activation.outputs[0])
    old, new = node.outputs[0], mover.outputs[0]
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.replaced"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True
