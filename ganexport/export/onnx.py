"""A prepared module to ONNX, through torch's dynamo exporter."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ganexport.build import onnx_file
from ganexport.build.options import OPSET, BuildOptions, Built, file_name
from ganexport.errors import ExportError
from ganexport.export.exact_constants import exact_constants
from ganexport.export.floor_division import floor_forms
from ganexport.export.prepare.recurrent import onnx_forms
from ganexport.export.prepared import Prepared
from ganexport.export.symbolic_numbers import number_forms
from ganexport.spec import GeneratorSpec

#: What inputs and outputs are called until every value inside has its name.
_INPUT, _OUTPUT = "ganexport.input.", "ganexport.output."
#: The exporter writes fp32; other precisions are made on its graph.
PRECISIONS = ("fp32",)


def export(
    prepared: Prepared, program: torch.export.ExportedProgram, folder: Path, precision: str, options: BuildOptions
) -> Built:
    """Write ``generator.onnx``: the spec's names, symbolic dimensions, optimised, checked, shape-inferred.

    Args:
        prepared: The module and its spec.
        program: It, captured.
        folder: Where to write.
        precision: "fp32".
        options: ``opset``.

    Raises:
        ExportError: An operator without an ONNX form (named, with the user's line), a dimension
            that ended up fixed, or random numbers left in the graph.
    """
    import onnx

    spec = prepared.spec
    opset = options.opset or OPSET
    program_onnx = _run_exporter(prepared, program, opset)
    model = program_onnx.model_proto
    _name_interface(model, spec)
    _keep_origins_short(model)
    fixed = onnx_file.static_inputs(model, spec)
    if fixed:
        raise ExportError(f"the exporter fixed a dimension that should be free ({'; '.join(fixed)})")
    names = [tensor.name for tensor in spec.inputs]
    missing = set(names) - {value.name for value in model.graph.input}
    for tensor in spec.inputs:  # an input that nothing depends on is still part of the interface
        if tensor.name in missing:
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape)))
    model = onnx_file.optimise(model)
    _order_inputs(model, names)
    onnx_file.write_spec(model, spec)
    model = onnx_file.infer_shapes(model)
    onnx_file.write_spec(model, spec)
    if left := onnx_file.random_nodes(model):
        raise ExportError(f"random numbers are left in the graph ({left[0]}): use --noise input or --noise constant")
    model.producer_name = "ganexport"
    name = file_name("onnx", "fp32")
    companions = onnx_file.save_model(model, folder / name)
    onnx_file.check_model(folder / name)
    return Built(name, companions, {"opset": str(opset)}, (f"onnx-dynamo opset {opset}",))


def _run_exporter(prepared: Prepared, program: torch.export.ExportedProgram, opset: int) -> torch.onnx.ONNXProgram:
    spec = prepared.spec
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            onnx_file.quiet(),
            exact_constants(),
        ):
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=[f"{_INPUT}{number}" for number in range(len(spec.inputs))],
                output_names=[f"{_OUTPUT}{number}" for number in range(len(spec.outputs))],
                opset_version=opset,
                custom_translation_table=onnx_forms() | floor_forms(program) | number_forms(),
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # noqa: BLE001 - the exporter wraps whatever happened
        raise _explain(error, program) from None
    assert made is not None
    return made


def _name_interface(model: Any, spec: GeneratorSpec) -> None:
    """The spec's names for inputs and outputs; values inside that are called so (``view``, ``linear``) get others.

    The exporter names inputs as it is told, beside operators' results of the same name.
    """
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    taken |= {tensor.name for tensor in model.graph.initializer}
    names: dict[str, str] = {}
    for prefix, tensors in ((_INPUT, spec.inputs), (_OUTPUT, spec.outputs)):
        for number, tensor in enumerate(tensors):
            names[f"{prefix}{number}"] = tensor.name
            if tensor.name in taken:
                inside = tensor.name
                while inside in taken:
                    inside += "_"
                taken.add(inside)
                names[tensor.name] = inside
    _rename(model.graph, names)


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(inner, names)


def _place_of(program: torch.export.ExportedProgram, operator: str) -> str:
    """Where the user's code called an operator ("aten.erfinv", "prims.erf_inv"), as torch recorded it."""
    from ganexport.export.capture import _quoted_place

    wanted = re.sub(r"\W|_", "", operator.partition(".")[2])
    akin = ""
    for node in program.graph.nodes:
        called = str(node.target).split(".")
        name = called[1].replace("_", "") if node.op == "call_function" and len(called) > 1 else ""
        place = _quoted_place(node.meta.get("stack_trace") or "") if name else ""
        if name == wanted:
            return place
        if name and (name in wanted or wanted in name):  # linalg_inv is made of linalg_inv_ex, i0 of bessel_i0
            akin = akin or place
    return akin


def _explain(error: BaseException, program: torch.export.ExportedProgram) -> ExportError:

    chain: BaseException | None = error
    texts = []
    while chain is not None:
        texts.append(str(chain))
        chain = chain.__cause__ or chain.__context__
    text = "\n".join(texts)
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text) or re.search(
        r"No decompositions registered for.*?'([\w.:]+)'", text
    )
    from ganexport.export.capture import _quoted_place

    place = _quoted_place(text) or (_place_of(program, operator.group(1)) if operator else "")
    at = f"{place}: " if place else ""
    if operator:
        return ExportError(f"{at}{operator.group(1)} has no ONNX form; write it with other operators")
    last = [line.strip() for line in texts[-1].splitlines() if line.strip()]
    return ExportError(f"{at}the ONNX exporter failed: {(last or [type(error).__name__])[0][:300]}")


def _keep_origins_short(model: object) -> None:
    """Where a node came from, as ``file:line`` of the user's code alone: no machine's paths in the file."""
    for node in model.graph.node:  # type: ignore[attr-defined]
        origin = onnx_file.origin_of(node)
        del node.metadata_props[:]
        if origin:
            entry = node.metadata_props.add()
            entry.key, entry.value = onnx_file.ORIGIN_KEY, origin
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):  # type: ignore[attr-defined]
        del value.metadata_props[:]
    del model.graph.metadata_props[:]  # type: ignore[attr-defined]
    for function in model.functions:  # type: ignore[attr-defined]
        del function.metadata_props[:]


def _order_inputs(model: object, names: list[str]) -> None:
    inputs = {value.name: value for value in model.graph.input}  # type: ignore[attr-defined]
    ordered = [inputs[name] for name in names]
    del model.graph.input[:]  # type: ignore[attr-defined]
    model.graph.input.extend(ordered)  # type: ignore[attr-defined]
