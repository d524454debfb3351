"""A positive constant factor folded into the weights it can be traced back to.

StyleGAN2 multiplies every activation by sqrt(2) to keep its variance. Relu and LeakyRelu are positively
homogeneous, g·f(x) = f(g·x) for g > 0, a sum distributes and a product needs only one of its factors
scaled; so the factor wanders up to constant weights and biases and the pass over memory disappears.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ganexport.build.cost import Target
from ganexport.build.rewrites._graph import Builder, attribute, constant, is_op, nodes_of, replace

#: f(g·x) = g·f(x) for every g > 0.
HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Abs")
#: Rearrange elements, or repeat them.
MOVES = ("DepthToSpace", "Reshape", "Transpose", "Slice", "Unsqueeze", "Squeeze", "Flatten", "Expand", "Identity")
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def apply(model: ir.Model, target: Target | None = None) -> int:
    """Fold every multiplication by a positive number. It pays everywhere: work disappears.

    Returns:
        How many were folded.
    """
    del target
    return sum(_fold(model, node) for node in nodes_of(model, "Mul"))


def _fold(model: ir.Model, node: ir.Node) -> bool:
    for index in (0, 1):
        factor, value = constant(node.inputs[index]), node.inputs[1 - index]
        if factor is None or factor.size != 1 or value is None or value.shape is None:
            continue
        number = float(factor.reshape(-1)[0])
        if not np.isfinite(number) or number <= 0 or factor.ndim > len(value.shape) or not _absorbs(value):
            continue
        _scale(model, value, number)
        replace(model, node.outputs[0], value)
        return True
    return False


def _absorbs(value: ir.Value | None) -> bool:
    """Whether a factor can be taken in by what makes the value, for its only reader."""
    if value is None:
        return False
    if constant(value) is not None:
        return True
    node = value.producer()
    if node is None or value.is_graph_output() or len(value.uses()) != 1 or len(node.outputs) != 1:
        return False
    if is_op(node, *HOMOGENEOUS, *MOVES):
        return _absorbs(node.inputs[0]) and constant(node.inputs[0]) is None
    if is_op(node, "Mul"):
        return any(_absorbs(factor) for factor in node.inputs)
    if is_op(node, "Add", "Sub"):
        return all(_absorbs(term) for term in node.inputs)
    if is_op(node, *LINEAR):
        if is_op(node, "Gemm") and (attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0):
            return False
        return all(operand is None or constant(operand) is not None for operand in node.inputs[1:])
    return False


def _scale(model: ir.Model, value: ir.Value, factor: float) -> None:
    """Multiply a value that absorbs the factor."""
    node = value.producer()
    assert node is not None
    if is_op(node, *LINEAR):
        indices = [index for index in range(1, len(node.inputs)) if node.inputs[index] is not None]
    elif is_op(node, "Add", "Sub"):
        indices = [0, 1]
    elif is_op(node, "Mul"):
        # A constant by preference: the other factor may be larger.
        order = sorted((0, 1), key=lambda index: constant(node.inputs[index]) is None)
        indices = [next(index for index in order if _absorbs(node.inputs[index]))]
    else:
        indices = [0]
    for index in indices:
        given = node.inputs[index]
        assert given is not None
        array = constant(given)
        if array is None:
            _scale(model, given, factor)
        else:
            scaled = (array.astype(np.float64) * factor).astype(array.dtype)
            node.replace_input_with(index, Builder(model, node).constant(scaled, "scaled"))
