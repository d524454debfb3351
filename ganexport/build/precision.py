"""fp32 ONNX graphs in fp16 or bf16, made on the graph: inputs and outputs stay fp32.

Every fp32 tensor may exist in two versions, and casts are put only between a node that computes in
one and a node that computes in the other. Which operators can compute in the narrow type is read
off the ONNX operator schemas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ganexport.build.onnx_file import require_onnx
from ganexport.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto

#: Operators that sum, square or exponentiate: their results leave fp16's range or lose its 11 bits.
#: Recurrent ones add up their rounding step by step, and ONNX Runtime 1.32 crashes on an fp16 GRU.
SENSITIVE = frozenset(
    {
        "CumSum", "Exp", "GRU", "LSTM", "RNN", "GroupNormalization", "InstanceNormalization", "LayerNormalization",
        "Log", "LogSoftmax",
        "LpNormalization", "MeanVarianceNormalization", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum",
        "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Softmax", "Softplus", "Sqrt",
    }
)  # fmt: skip
#: Operators that only rename elements: beside a node in fp32 they stay in fp32, and the cast moves past
#: them (ONNX Runtime 1.32 crashes on a cast between a Transpose and a GRU).
_RENAMING = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
#: Largest finite fp16; bf16 has fp32's range.
FP16_MAX = 65504.0
#: Smallest fp16 with all its bits; half of what is below rounds away, and below 3e-8 all of it.
FP16_NORMAL = 6.104e-5
#: Operators whose output type is an attribute, and which nothing is gained by changing.
_TYPED_BY_ATTRIBUTE = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "EyeLike"})
#: From this opset on every arithmetic operator takes bf16.
BF16_OPSET = 22


def low_precision(model: ModelProto, precision: str, keep: Collection[str] = ()) -> ModelProto:
    """A copy of an fp32 model that computes in fp16 or bf16.

    Args:
        model: fp32, shape-inferred or not.
        precision: "fp16" or "bf16".
        keep: Names of nodes, or operator types, that stay in fp32, beside :data:`SENSITIVE`.

    Returns:
        The new model; narrow tensors are called as before with the precision appended.

    Raises:
        ExportError: The graph's types cannot be inferred.
    """
    onnx = require_onnx()
    copy: ModelProto = onnx.ModelProto()
    copy.CopyFrom(model)
    if precision == "bf16":
        copy = _raise_opset(copy)
    name_nodes(copy)
    _constants_to_initializers(copy)
    _Conversion(copy, precision, frozenset(keep)).run()
    return copy


def name_nodes(model: ModelProto) -> None:
    """Give every node a name of its own."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)


def _raise_opset(model: ModelProto) -> ModelProto:
    onnx = require_onnx()
    current = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0)
    if current >= BF16_OPSET:
        return model
    try:
        raised: ModelProto = onnx.version_converter.convert_version(model, BF16_OPSET)
    except Exception as error:  # noqa: BLE001 - the converter raises bare RuntimeErrors
        raise ExportError(
            f"bf16 needs ONNX opset {BF16_OPSET}, and the graph cannot be raised to it ({str(error)[:200]}): "
            f"convert the source with --opset {BF16_OPSET}"
        ) from None
    return raised


def _constants_to_initializers(model: ModelProto) -> None:
    onnx = require_onnx()
    kept = []
    for node in model.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
        number = (
            next((a for a in node.attribute if a.name == "value_float"), None) if node.op_type == "Constant" else None
        )
        if value is not None:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        elif number is not None:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(number.f), node.output[0]))
        else:
            kept.append(node)
    kept = [_copied(node) for node in kept]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _copied(node: Any) -> Any:
    copy = type(node)()
    copy.CopyFrom(node)
    return copy


def float_tensors(model: ModelProto) -> set[str]:
    """Names of all fp32 tensors of the main graph.

    Raises:
        ExportError: Type inference fails.
    """
    onnx = require_onnx()
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception as error:  # noqa: BLE001 - InferenceError and protobuf's own
        raise ExportError(f"the types of the graph cannot be inferred: {str(error)[:200]}") from None
    wanted = onnx.TensorProto.FLOAT
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    names = {v.name for v in values if v.type.tensor_type.elem_type == wanted}
    return names | {t.name for t in model.graph.initializer if t.data_type == wanted}


class _Conversion:
    """One graph under way: decides per node, then rewires."""

    def __init__(self, model: ModelProto, precision: str, keep: frozenset[str]) -> None:
        onnx = require_onnx()
        self.onnx = onnx
        self.model = model
        self.graph = model.graph
        self.precision = precision
        self.keep = keep
        self.low = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
        self.type_string = "tensor(float16)" if precision == "fp16" else "tensor(bfloat16)"
        self.opset = max(e.version for e in model.opset_import if e.domain in ("", "ai.onnx"))
        self.floats = float_tensors(model)
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        #: tensor → versions that some node produces
        self.made: dict[str, set[bool]] = {}
        self.nodes: list[Any] = []
        self.added: set[str] = set()

    def run(self) -> None:
        interface = [value.name for value in self.graph.output]
        for name in (*(v.name for v in self.graph.input), *self.initializers):
            self.made[name] = {False}
        wide = self._wide()
        for node in self.graph.node:
            self._rewire(_copied(node), node.name in wide)
        for name in interface:
            if name in self.floats:
                self._provide(name, narrow=False)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        self._drop_unused_initializers()
        del self.graph.value_info[:]

    def _wide(self) -> set[str]:
        """Nodes that compute in fp32, renaming ones beside them included."""
        wide = {node.name for node in self.graph.node if self._ports(node) is None}
        if self.precision == "fp16":
            wide |= self._guarded_divisions()
        position = {node.name: index for index, node in enumerate(self.graph.node)}
        made_by = {name: node.name for node in self.graph.node for name in node.output}
        readers: dict[str, set[str]] = {}
        for node in self.graph.node:
            for name in node.input:
                readers.setdefault(name, set()).add(node.name)
        renaming = [node for node in self.graph.node if node.op_type in _RENAMING and node.name not in wide]
        for node in renaming:
            if made_by.get(node.input[0]) in wide:
                wide.add(node.name)
        # TensorRT-RTX 1.7 fails on casts between a Concat and the GRU that reads it.
        joining = [node for node in self.graph.node if node.op_type == "Concat" and node.name not in wide]
        for node in sorted(renaming + joining, key=lambda n: -position[n.name]):
            after = readers.get(node.output[0], set())
            if after and after <= wide:
                wide.add(node.name)
        return wide

    def _guarded_divisions(self) -> set[str]:
        """Nodes that carry an epsilon too small for fp16, up to the division that it guards.

        In fp16 the epsilon of x / (|x| + 1e-8) is zero and that of x * rsqrt(x² + 1e-12) becomes infinite:
        a vector of zeros would turn into NaN. Followed is the smallest value that a tensor can take.
        """
        bounds: dict[str, float] = {}
        wide = set()
        for node in self.graph.node:
            given = next((bounds[name] for name in node.input if name in bounds), None)
            scalar = self._scalar(node)
            if given is not None and not FP16_NORMAL <= given <= FP16_MAX / 2:
                wide.add(node.name)
            if node.op_type in ("Add", "Max", "Clip") and scalar is not None and 0.0 < scalar < FP16_NORMAL:
                wide.add(node.name)
                bounds[node.output[0]] = scalar
            elif given is not None and (bound := _image_of(node, given, scalar)) is not None:
                bounds[node.output[0]] = bound
        return wide

    def _scalar(self, node: Any) -> float | None:
        """The value of the node's first constant of one element."""
        for name in node.input:
            tensor = self.initializers.get(name)
            if tensor is not None and name in self.floats and math.prod(tensor.dims) == 1:
                return float(self.onnx.numpy_helper.to_array(tensor).reshape(-1)[0])
        return None

    def _rewire(self, node: Any, wide: bool) -> None:
        ports = None if wide else self._ports(node)
        inputs, outputs = ports if ports is not None else ([False] * len(node.input), [False] * len(node.output))
        for index, name in enumerate(node.input):
            if name and name in self.floats:
                self._provide(name, narrow=inputs[index])
                if inputs[index]:
                    node.input[index] = self._narrow(name)
        for captured in _captured(node):
            if captured in self.floats:
                self._provide(captured, narrow=False)
        if ports is not None:
            self._retype(node)
        self.nodes.append(node)
        for index, name in enumerate(node.output):
            narrow = bool(outputs[index]) and name in self.floats
            self.made.setdefault(name, set()).add(narrow)
            if narrow:
                node.output[index] = self._narrow(name)

    def _narrow(self, name: str) -> str:
        return f"{name}_{self.precision}"

    def _provide(self, name: str, *, narrow: bool) -> None:
        """Make a version of a tensor exist before the node that is about to be appended."""
        versions = self.made.get(name)
        if versions is None or narrow in versions:
            return
        versions.add(narrow)
        if narrow and name in self.initializers:
            self._narrow_initializer(name)
            return
        source, target = (name, self._narrow(name)) if narrow else (self._narrow(name), name)
        to = self.low if narrow else self.onnx.TensorProto.FLOAT
        label = f"cast_{target}"
        self.nodes.append(self.onnx.helper.make_node("Cast", [source], [target], name=label, to=to))

    def _narrow_initializer(self, name: str) -> None:
        values = self.onnx.numpy_helper.to_array(self.initializers[name])
        tensor = self.onnx.helper.make_tensor(self._narrow(name), self.low, values.shape, self._bits(values), raw=True)
        self.graph.initializer.append(tensor)

    def _bits(self, values: np.ndarray) -> bytes:
        if self.precision == "fp16":
            return np.asarray(values).astype(np.float16).tobytes()
        bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32).astype(np.uint64)
        # Round half to even: add half of the last kept bit, less one where that bit is zero.
        rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
        return rounded.astype(np.uint16).tobytes()

    def _ports(self, node: Any) -> tuple[list[bool], list[bool]] | None:
        """Which inputs and outputs are narrow when the node is; None when it has to compute in fp32."""
        if node.domain not in ("", "ai.onnx") or {node.name, node.op_type} & self.keep or node.op_type in SENSITIVE:
            return None
        if node.op_type in _TYPED_BY_ATTRIBUTE or _captured(node) or self._out_of_range(node):
            return None
        if not any(name in self.floats for name in (*node.input, *node.output)):
            return None
        if _feeds_integers(node, self.floats):
            return None
        schema = _schema(node.op_type, self.opset)
        if schema is None:
            return None
        inputs = self._side(schema, schema.inputs, node.input)
        outputs = self._side(schema, schema.outputs, node.output)
        return None if inputs is None or outputs is None else (inputs, outputs)

    def _side(self, schema: Any, formals: Any, names: Any) -> list[bool] | None:
        narrow = []
        constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        for index, name in enumerate(names):
            formal = formals[min(index, len(formals) - 1)]
            if name not in self.floats:
                narrow.append(False)
            elif formal.type_str not in constraints:
                narrow.append(False)  # the schema wants fp32 here (the scales of Resize)
            elif self.type_string in constraints[formal.type_str]:
                narrow.append(True)
            else:
                return None
        return narrow

    def _out_of_range(self, node: Any) -> bool:
        """Weights that fp16 cannot hold."""
        if self.precision != "fp16":
            return False
        for name in node.input:
            tensor = self.initializers.get(name)
            if tensor is not None and name in self.floats:
                values = self.onnx.numpy_helper.to_array(tensor)
                if values.size and not float(np.abs(values).max()) < FP16_MAX:
                    return True
        return False

    def _retype(self, node: Any) -> None:
        """Attributes that name or hold the output's type."""
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == self.onnx.TensorProto.FLOAT:
                attribute.i = self.low
            if node.op_type == "ConstantOfShape" and attribute.name == "value":
                values = self.onnx.numpy_helper.to_array(attribute.t)
                if values.dtype == np.float32:
                    attribute.t.CopyFrom(
                        self.onnx.helper.make_tensor("value", self.low, values.shape, self._bits(values), raw=True)
                    )
        if node.op_type == "ConstantOfShape" and not node.attribute:
            zero = self.onnx.helper.make_tensor("value", self.low, [1], self._bits(np.zeros(1, np.float32)), raw=True)
            node.attribute.append(self.onnx.helper.make_attribute("value", zero))

    def _drop_unused_initializers(self) -> None:
        used = {name for node in self.graph.node for name in node.input} | {v.name for v in self.graph.output}
        for node in self.graph.node:
            used |= _captured(node)
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        copies = []
        for tensor in kept:
            copy = self.onnx.TensorProto()
            copy.CopyFrom(tensor)
            copies.append(copy)
        del self.graph.initializer[:]
        self.graph.initializer.extend(copies)


def _image_of(node: Any, bound: float, scalar: float | None) -> float | None:
    """What a node makes of the smallest value of its input; None when that says nothing any more."""
    if node.op_type in _RENAMING or node.op_type == "Expand":
        return bound
    if node.op_type == "Sqrt":
        return math.sqrt(bound)
    if node.op_type == "Reciprocal":
        return 1.0 / bound
    if node.op_type == "Pow" and scalar is not None and abs(scalar) <= 2.0:
        return math.pow(bound, scalar)
    return None


def _feeds_integers(node: Any, floats: set[str]) -> bool:
    """Float to integer: the image's last steps and index arithmetic, where narrow rounding shows."""
    return node.op_type == "Round" or (node.op_type == "Cast" and not all(name in floats for name in node.output))


def _captured(node: Any) -> set[str]:
    """Names that a node's subgraphs read, its own included."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            for inner in graph.node:
                names |= set(inner.input) | _captured(inner)
            names |= {value.name for value in graph.output}
    return names


@functools.lru_cache(maxsize=512)
def _schema(operator: str, opset: int) -> Any:
    onnx = require_onnx()
    try:
        return onnx.defs.get_schema(operator, opset, "")
    except Exception:  # noqa: BLE001 - SchemaError is not exported everywhere
        return None


def matching(model: ModelProto, wanted: Iterable[str]) -> list[str]:
    """Those of ``wanted`` that are neither a node's name nor an operator type of the graph."""
    known = {name for node in model.graph.node for name in (node.name, node.op_type)}
    return [name for name in wanted if name not in known]
