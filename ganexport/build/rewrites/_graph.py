"""Small tools over ``onnx_ir`` graphs that every rewrite uses: read constants and shapes, add nodes, replace values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]

#: Operators that act on every element alone, so that they commute with any rearrangement of elements.
POINTWISE = frozenset(
    {"Relu", "LeakyRelu", "Tanh", "Sigmoid", "Elu", "Selu", "Softplus", "Erf", "Exp", "Gelu", "HardSigmoid", "Abs"}
)


def opset(model: ir.Model) -> int:
    """Version of the default operator set that the model imports (0 when it imports none)."""
    return model.opset_imports.get("", 0)


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether a node is one of these operators of the default domain."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def nodes_of(model: ir.Model, *op_types: str) -> list[ir.Node]:
    """All nodes of these types in the main graph, in order; safe to change the graph while using it."""
    return [node for node in model.graph if is_op(node, *op_types)]


def constant(value: ir.Value | None) -> Array | None:
    """The array behind a value that can never change, else None."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def shape(value: ir.Value | None) -> list[int | None] | None:
    """Sizes of a value, None for each symbolic one; None when not even the rank is known."""
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else None for size in value.shape]


def sizes_of(value: ir.Value) -> list[Any] | None:
    """Sizes as they stand, symbols included; None when not even the rank is known."""
    return None if value.shape is None else list(value.shape)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's plain value, or the default when the node has none of that name."""
    found = node.attributes.get(name)
    if found is None:
        return default
    value = found.value
    return list(value) if isinstance(value, tuple) else value


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value and nobody else does (not even the graph's outputs)."""
    uses = value.uses()
    if value.is_graph_output() or len(uses) != 1:
        return None
    return next(iter(uses)).node


class Builder:
    """Adds nodes and constants to a graph, just before an anchor node.

    Args:
        model: To add to.
        anchor: New nodes are placed before it; their names derive from its first output's name.
    """

    def __init__(self, model: ir.Model, anchor: ir.Node) -> None:
        self.graph = model.graph
        self.anchor = anchor
        self.stem = anchor.outputs[0].name or anchor.op_type
        self.nodes: list[ir.Node] = []

    def constant(self, array: Array, hint: str) -> ir.Value:
        """A new initializer holding the array."""
        name = self._fresh(f"{self.stem}.{hint}")
        value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
        assert value.const_value is not None
        value.dtype = value.const_value.dtype
        value.shape = ir.Shape(array.shape)
        self.graph.register_initializer(value)
        return value

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[Any] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """A new node of the default domain; its output, of the anchor's dtype and the given shape."""
        made = ir.convenience.convert_attributes(dict(attributes or {}))
        node = ir.Node("", op_type, inputs, made)
        output = node.outputs[0]
        if (dtype := self.anchor.outputs[0].dtype) is not None:
            output.dtype = dtype
        if shape is not None:
            output.shape = ir.Shape(shape)
        self.graph.insert_before(self.anchor, node)
        self.nodes.append(node)
        return output

    def _fresh(self, name: str) -> str:
        taken = self.graph.initializers
        count, candidate = 0, name
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        return candidate


def replace(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old``, the graph's outputs included, read ``new``; output names stay.

    The node that made ``old`` is removed when nothing else needs it.
    """
    producer = old.producer()
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}.replaced"
        new.name = name
        if new.shape is None:
            new.shape = old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if producer is not None and not any(output.uses() or output.is_graph_output() for output in producer.outputs):
        model.graph.remove(producer, safe=True)


def chain_back(value: ir.Value, *op_types: str) -> Iterator[ir.Node]:
    """Producers upwards from a value while each is one of these operators and feeds only the chain."""
    while True:
        node = value.producer()
        if node is None or not is_op(node, *op_types) or len(value.uses()) != 1 or value.is_graph_output():
            return
        yield node
        first = node.inputs[0]
        if first is None:
            return
        value = first


def infer_shapes(model: ir.Model) -> ir.Model:
    """The model with every shape that ONNX's own inference can find (data propagation included)."""
    import onnx

    proto = ir.to_proto(model)
    try:
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return model  # a custom operator or a file over 2 GB: rewrites that need shapes then find no match
