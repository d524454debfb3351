"""Reading, writing and checking ONNX files; the generator's spec lives in their metadata.

Needs ``onnx``, never torch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganexport.artifact import writing
from ganexport.errors import ArtifactError, MissingDependencyError, UsageError
from ganexport.spec import BATCH, Dim, GeneratorSpec, Normal, TensorSpec, spec_from_json, spec_to_json

if TYPE_CHECKING:
    from onnx import ModelProto

#: Key of the ONNX metadata entry that holds the spec as JSON.
SPEC_KEY = "ganexport.spec"
#: Protocol buffers cannot hold 2 GiB; weights of larger models go into ``<name>.onnx.data``.
PROTOBUF_LIMIT = (1 << 31) - (16 << 20)
#: Weights at least this large leave the file when it is written with external data.
EXTERNAL_THRESHOLD = 1024


def require_onnx() -> Any:
    """The ``onnx`` package.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependencyError("reading ONNX needs the package onnx: pip install onnx") from None
    return onnx


def load_model(path: Path) -> ModelProto:
    """Read an ONNX file with its external data.

    Raises:
        ArtifactError: Missing, not ONNX, or its external data is missing or leaves the folder.
    """
    onnx = require_onnx()
    if not path.is_file():
        raise ArtifactError(f"{path}: no such ONNX file")
    try:
        model: ModelProto = onnx.load(str(path), load_external_data=True)
    except MemoryError:
        raise ArtifactError(f"{path}: too large for this machine's memory") from None
    except Exception as error:  # noqa: BLE001 - protobuf, onnx and the system raise unrelated classes
        raise ArtifactError(f"{path}: not a readable ONNX file: {first_line(error)}") from None
    if not model.graph.node and not model.graph.output:
        raise ArtifactError(f"{path}: not an ONNX model (it has no graph)")
    return model


def save_model(model: ModelProto, path: Path, *, limit: int = PROTOBUF_LIMIT) -> tuple[str, ...]:
    """Write an ONNX file; a model over ``limit`` bytes keeps its weights in ``<name>.data`` beside it.

    Returns:
        Names of the companion files, relative to the file's folder.

    Raises:
        OutputError: It cannot be written.
    """
    onnx = require_onnx()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if model.ByteSize() <= limit:
            path.write_bytes(model.SerializeToString(deterministic=True))
            return ()
        data = f"{path.name}.data"
        (path.parent / data).unlink(missing_ok=True)  # onnx appends to what is there
        onnx.save_model(model, str(path), save_as_external_data=True, location=data, size_threshold=EXTERNAL_THRESHOLD)
        return (data,)


def first_line(error: BaseException | str, limit: int = 300) -> str:
    """The first line of an error that says something, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]


def read_spec(model: ModelProto) -> GeneratorSpec | None:
    """The spec in the model's metadata; None when it has none.

    Raises:
        ArtifactError: The metadata is there but damaged.
    """
    for entry in model.metadata_props:
        if entry.key == SPEC_KEY:
            try:
                return spec_from_json(entry.value)
            except UsageError as error:
                raise ArtifactError(f"ONNX metadata {SPEC_KEY}: {error}") from None
    return None


def write_spec(model: ModelProto, spec: GeneratorSpec) -> None:
    """Store the spec in the metadata and give the graph's inputs and outputs its symbolic shapes."""
    kept = [entry for entry in model.metadata_props if entry.key != SPEC_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    entry = model.metadata_props.add()
    entry.key, entry.value = SPEC_KEY, spec_to_json(spec)
    for tensor, value in zip((*spec.inputs, *spec.outputs), (*graph_inputs(model), *model.graph.output), strict=True):
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for size in tensor.shape:
            if isinstance(size, int):
                shape.dim.add().dim_value = size
            else:
                shape.dim.add().dim_param = size


def graph_inputs(model: ModelProto) -> list[Any]:
    """The graph's real inputs: without initializers, which old files list among them."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initializers]


def static_inputs(model: ModelProto, spec: GeneratorSpec) -> list[str]:
    """Dimensions that the spec calls symbolic and the graph fixed, as "z: batch is 2"."""
    found = []
    for value in graph_inputs(model):
        tensor = spec.input(value.name)
        for size, dim in zip(tensor.shape, value.type.tensor_type.shape.dim, strict=True):
            if isinstance(size, str) and not spec.dim(size).static and dim.HasField("dim_value"):
                found.append(f"{tensor.name}: {size} is {dim.dim_value}")
    return found


def dtype_name(element: int) -> str:
    """ONNX element type as one of :data:`ganexport.spec.DTYPES`.

    Raises:
        ArtifactError: A type that no generator here has (strings, complex numbers).
    """
    onnx = require_onnx()
    name = str(onnx.TensorProto.DataType.Name(element)).lower()
    known = {"float": "float32", "double": "float64"}
    name = known.get(name, name)
    if name not in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "int8", "bool"):
        raise ArtifactError(f"ONNX element type {name} is not supported")
    return name


def derive_spec(
    model: ModelProto, inputs: Iterable[TensorSpec] = (), dims: Iterable[Dim] = (), name: str = "generator"
) -> GeneratorSpec:
    """A spec for a file that carries none, from its graph and what the user says.

    The leading symbolic dimension is called "batch"; every other symbolic dimension needs a Dim.
    Floating-point inputs that the user does not describe are drawn from N(0, 1).

    Args:
        model: The model; its symbolic dimensions are renamed in place where needed.
        inputs: The user's descriptions, by name.
        dims: Ranges of symbolic dimensions.
        name: Name of the spec.

    Raises:
        UsageError: An integer input or a symbolic dimension that only the user can describe.
    """
    described = {tensor.name: tensor for tensor in inputs}
    symbols: dict[str, str] = {}
    specs = []
    for value in graph_inputs(model):
        tensor = _derive_tensor(value, symbols, described.pop(value.name, None))
        if tensor.sampler is None and value.name not in {t.name for t in inputs}:
            if tensor.dtype not in ("float32", "float16", "float64"):
                raise UsageError(
                    f'input {tensor.name!r} is {tensor.dtype}: say how to draw it, e.g. --input "{tensor.name}='
                    f'label(10)[{",".join(map(str, tensor.shape))}]"'
                )
            tensor = TensorSpec(tensor.name, tensor.dtype, tensor.shape, Normal())
        specs.append(tensor)
    if described:
        raise UsageError(
            f"no input {sorted(described)[0]!r} in the ONNX file; it has: {', '.join(t.name for t in specs)}"
        )
    outputs = [_derive_tensor(value, symbols, None, output=True) for value in model.graph.output]
    given = {dim.name: dim for dim in dims}
    used = [size for tensor in specs for size in tensor.shape if isinstance(size, str)]
    for symbol in dict.fromkeys(used):
        if symbol not in given:
            if symbol != BATCH:
                raise UsageError(
                    f"dimension {symbol!r} of the ONNX file is free: give its range, --dim {symbol}=min:opt:max"
                )
            given[symbol] = Dim(BATCH)
    return GeneratorSpec(tuple(specs), tuple(outputs), tuple(given[s] for s in dict.fromkeys(used)), name)


def _derive_tensor(
    value: Any, symbols: dict[str, str], described: TensorSpec | None, *, output: bool = False
) -> TensorSpec:
    kind = value.type.tensor_type
    shape: list[int | str] = []
    for position, dim in enumerate(kind.shape.dim):
        if dim.HasField("dim_value"):
            shape.append(int(dim.dim_value))
            continue
        original = dim.dim_param or f"{value.name}_{position}"
        clean = re.sub(r"\W", "_", original) or f"dim_{position}"
        default = clean if output or position else BATCH
        shape.append(symbols.setdefault(original, default) if dim.dim_param else default)
    dtype = dtype_name(kind.elem_type)
    if described is not None:
        if len(described.shape) != len(shape) or any(
            isinstance(have, int) and have != want for have, want in zip(shape, described.shape, strict=True)
        ):
            raise UsageError(
                f"input {described.name!r} is {shape} in the ONNX file, described as {list(described.shape)}"
            )
        return TensorSpec(described.name, dtype, described.shape, described.sampler)
    return TensorSpec(value.name, dtype, tuple(shape))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of optimisers, which speak to their own authors."""
    import logging
    import warnings

    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def optimise(model: ModelProto) -> ModelProto:
    """Fold constants and fuse with onnxslim where it is installed; the interface never changes.

    Returns:
        The optimised model, or the one given when the optimiser is absent or altered its interface.
    """
    onnx = require_onnx()
    try:
        import onnxslim
    except ImportError:
        return model
    interface = [v.name for v in graph_inputs(model)], [v.name for v in model.graph.output]
    copy: ModelProto = onnx.ModelProto()
    copy.CopyFrom(model)
    with quiet():
        try:
            slim: ModelProto | None = onnxslim.slim(copy)
        except Exception:  # noqa: BLE001 - an optimisation is never worth failing an export
            return model
    if slim is None or ([v.name for v in graph_inputs(slim)], [v.name for v in slim.graph.output]) != interface:
        return model
    _restore_origins(slim, model)
    return slim


def _restore_origins(slim: ModelProto, model: ModelProto) -> None:
    """The optimiser drops metadata: nodes that it kept (by output or by name) get theirs back."""
    origins = {key: origin_of(node) for node in model.graph.node for key in (node.name, *node.output)}
    for node in slim.graph.node:
        origin = next((origins[key] for key in (*node.output, node.name) if origins.get(key)), "")
        if origin and not origin_of(node):
            entry = node.metadata_props.add()
            entry.key, entry.value = ORIGIN_KEY, origin


def check_model(path: Path) -> None:
    """Run the ONNX checker with shape inference on a written file.

    Raises:
        ArtifactError: The file is not valid ONNX.
    """
    onnx = require_onnx()
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # noqa: BLE001 - ValidationError, InferenceError and bare RuntimeError
        raise ArtifactError(f"{path.name}: the ONNX checker refuses it: {first_line(error)}") from None


def infer_shapes(model: ModelProto) -> ModelProto:
    """Fresh shape inference from the symbolic inputs; the model itself when it is too large for it."""
    onnx = require_onnx()
    del model.graph.value_info[:]
    if model.ByteSize() > PROTOBUF_LIMIT:
        return model
    with contextlib.suppress(Exception):
        inferred: ModelProto = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
        return inferred
    return model


def sort_nodes(model: ModelProto) -> None:
    """Put every node after those whose outputs it reads, as the ONNX standard asks; stable otherwise."""
    made_by = {name: index for index, node in enumerate(model.graph.node) for name in node.output if name}
    order: list[int] = []
    state: dict[int, bool] = {}  # False: being visited, True: placed
    for root in range(len(model.graph.node)):
        stack = [root]
        while stack:
            index = stack[-1]
            if index in state:
                stack.pop()
                if not state[index]:
                    state[index] = True
                    order.append(index)
                continue
            state[index] = False
            reads = _reads(model.graph.node[index])
            stack += [made_by[name] for name in reversed(reads) if name in made_by and made_by[name] not in state]
    if order == sorted(order):
        return
    nodes = [type(node)() for node in model.graph.node]
    for target, index in zip(nodes, order, strict=True):
        target.CopyFrom(model.graph.node[index])
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _reads(node: Any) -> list[str]:
    """Names that a node reads, those of its subgraphs included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            for inner in graph.node:
                names += _reads(inner)
    return names


RANDOM_OPERATORS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)


def random_nodes(model: ModelProto) -> list[str]:
    """Nodes that draw fresh random numbers at run time, as "RandomNormalLike node_7"."""
    return [
        f"{node.op_type} {node.name or node.output[0]}" for node in model.graph.node if node.op_type in RANDOM_OPERATORS
    ]


_PACKAGE = str(Path(__file__).resolve().parents[1])
#: Key of the node metadata entry with the line of the user's code it came from.
ORIGIN_KEY = "origin"


def origin_of(node: Any) -> str:
    """``file.py:12`` of the user's code in a node's metadata, empty without one."""
    for entry in node.metadata_props:
        if entry.key == ORIGIN_KEY:
            return str(entry.value)
        if entry.key == "pkg.torch.onnx.stack_trace":
            frames = re.findall(r'File "([^"]+)", line (\d+)', entry.value)
            own = [f for f in frames if "/torch/" not in f[0] and not f[0].startswith(_PACKAGE)]
            if own:
                return f"{Path(own[-1][0]).name}:{own[-1][1]}"
    return ""
