"""Activation before the interleave instead of after it.

relu(depth_to_space(conv(x))) = depth_to_space(relu(conv(x))), and the same for a reshape behind a
matrix product and for a concatenation of convolutions. A backend then fuses the activation, and the
rounding to int8 or bf16 behind it, into the convolution, and the interleave moves the narrow numbers.
A product or sum with one number a channel (a style, a demodulation, a bias) moves through an interleave
too, its numbers repeated for every phase.
Exact: an element-wise function commutes with a rearrangement of elements.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ganexport.build.cost import Target
from ganexport.build.rewrites._graph import (
    POINTWISE,
    Builder,
    attribute,
    constant,
    is_op,
    nodes_of,
    only_consumer,
    shape,
    sizes_of,
)

MOVES = ("DepthToSpace", "Slice", "Reshape", "Transpose")
#: Element-wise operators of two operands.
BINARY = ("Mul", "Add", "Sub", "Div")


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
        steps += [_hoist_binary(model, node) for node in nodes_of(model, *BINARY)]
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


def _hoist_binary(model: ir.Model, node: ir.Node) -> bool:
    """Move an operator of the interleave's result and one number a channel in front of the interleave."""
    for index in (0, 1):
        value, other = node.inputs[index], node.inputs[1 - index]
        mover = value.producer() if value is not None else None
        if value is None or other is None or mover is None or not is_op(mover, "DepthToSpace"):
            continue
        source = mover.inputs[0]
        if only_consumer(value) is not node or source is None or source.producer() is None:
            continue
        repeated = _each_phase(model, mover, other, shape(value))
        if repeated is None:
            continue
        operands = [source, repeated] if index == 0 else [repeated, source]
        moved = Builder(model, mover).op(node.op_type, operands, sizes_of(source))
        mover.replace_input_with(0, moved)
        _drop(node, value)
        return True
    return False


def _each_phase(model: ir.Model, mover: ir.Node, other: ir.Value, sizes: list[int | None] | None) -> ir.Value | None:
    """One number a channel, [C, 1, 1] or [N, C, 1, 1], repeated for the phases; None for any other operand."""
    found = shape(other)
    if found is None or sizes is None or len(sizes) != 4:
        return None
    if all(size == 1 for size in found) and len(found) <= 4:
        return other
    if len(found) not in (3, 4) or found[-2:] != [1, 1] or found[-3] != sizes[1]:
        return None
    block = attribute(mover, "blocksize") ** 2
    phase_major = attribute(mover, "mode", "DCR") == "DCR"
    array = constant(other)
    builder = Builder(model, mover)
    if array is not None:
        axis = array.ndim - 3
        wide = np.concatenate([array] * block, axis=axis) if phase_major else np.repeat(array, block, axis=axis)
        return builder.constant(wide, "phases")
    maker = other.producer()
    if not phase_major or maker is None or not _before(maker, mover):
        return None
    rows = sizes_of(other)
    assert rows is not None
    return builder.op("Concat", [other] * block, [*rows[:-3], block * (found[-3] or 0), 1, 1], {"axis": len(found) - 3})


def _before(node: ir.Node, other: ir.Node) -> bool:
    """Whether a node's result does not depend on another node, so that its result can be used before it."""
    seen, waiting = set(), [node]
    while waiting:
        current = waiting.pop()
        if current is other:
            return False
        if current in seen:
            continue
        seen.add(current)
        waiting += [maker for value in current.inputs if value is not None and (maker := value.producer()) is not None]
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
