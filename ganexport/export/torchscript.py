"""A prepared module to TorchScript: traced; scripted where a trace would not hold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ganexport.artifact import writing
from ganexport.build.options import BuildOptions, Built, file_name
from ganexport.errors import ExportError
from ganexport.export.capture import example_inputs, example_sizes
from ganexport.export.prepare.recurrent import refuse
from ganexport.export.prepared import Prepared
from ganexport.export.wrapped import draw_inputs, tensors_of
from ganexport.spec import Dim

PRECISIONS = ("fp32",)


def export(
    prepared: Prepared,
    program: torch.export.ExportedProgram | None,
    folder: Path,
    precision: str,
    options: BuildOptions,
) -> Built:
    """Write ``generator.torchscript.pt``.

    A trace keeps whatever Python decided on the example; it is taken only when it gives the
    module's output at other sizes too, otherwise the captured program is scripted, whose sizes
    are symbolic.

    Args:
        prepared: The module and its spec.
        program: It, captured by torch.export; None when that failed.
        folder: Where to write.
        precision: "fp32".
        options: Nothing of it concerns this format.

    Raises:
        ExportError: Neither a trace nor a script holds at every size.
    """
    traced = _trace(prepared)
    method = "traced"
    problem = _differs(prepared, traced)
    if problem:
        scripted = None if program is None else _script(program)
        if scripted is None or _differs(prepared, scripted):
            raise ExportError(
                f"TorchScript cannot hold this module: its trace {problem}, and it cannot be scripted; make the branch "
                "or size in forward depend on tensors alone, or use --to onnx"
            )
        traced, method = scripted, "scripted from torch.export's graph"
    name = file_name("torchscript.pt", precision)
    with writing(folder / name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it will drop TorchScript one day
        torch.jit.save(traced, str(folder / name))
    return Built(name, (), {"torch": torch.__version__.partition("+")[0]}, (f"torchscript {method}",))


def _trace(prepared: Prepared) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.jit.trace(prepared.function, example_inputs(prepared.spec), check_trace=False, strict=False)
        except ExportError:
            raise
        except Exception as error:  # noqa: BLE001 - the tracer raises many classes
            from ganexport.export.capture import explain

            raise explain(error, prepared.spec) from None


def _script(program: torch.export.ExportedProgram) -> Any:
    if refuse(program, "TorchScript"):
        return None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.jit.script(_scriptable(program))
        except Exception:  # noqa: BLE001 - the caller says what it means for the user
            return None


#: Symbolic conversions as what they are for plain numbers.
_PLAIN: dict[Any, Callable[..., Any]] = {
    torch.sym_float: float,
    torch.sym_int: int,
    math.trunc: int,
    torch.sym_max: max,
    torch.sym_min: min,
}


def _scriptable(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """The program's graph in the Python that TorchScript reads: no pytrees, no hooks, operators by their names."""
    module = program.module(check_guards=False)
    graph = torch.fx.Graph()
    found: dict[torch.fx.Node, Any] = {}
    for node in module.graph.nodes:
        copy = graph.node_copy(node, found.__getitem__)
        found[node] = copy
        if node.op == "output":
            values: Any = copy.args[0]
            copy.args = (values[0] if len(values) == 1 else tuple(values),)
        elif node.target is torch.ops.aten.sym_size.int:
            copy.op, copy.target = "call_method", "size"
        elif isinstance(node.target, torch._ops.OpOverload):
            copy.target = node.target.overloadpacket
        elif node.op == "call_function":
            copy.target = _PLAIN.get(node.target, node.target)
    return torch.fx.GraphModule(module, graph)


def _over(dim: Dim, size: int) -> int:
    """The smallest size of a dimension above another size; its largest where it ends before."""
    return min(dim.min + (max(size - dim.min, 0) // dim.step + 1) * dim.step, dim.max)


def _differs(prepared: Prepared, module: Any) -> str:
    """How a TorchScript module differs from the reference at sizes it was not made with; empty when it does not."""
    spec = prepared.spec
    shown = example_sizes(spec)
    above = max(shown.values(), default=0)  # beyond every other size: a trace keeps which of two was the larger
    trials = [shown] + [
        shown | {dim.name: size}
        for dim in spec.dims
        for size in dict.fromkeys((dim.min, min(shown[dim.name] + dim.step, dim.max), _over(dim, above)))
        if size != shown[dim.name]
    ]
    for number, sizes in enumerate(trials):
        feeds = draw_inputs(spec, sizes, 1, number)
        truth = prepared.reference.run(feeds)
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        try:
            with torch.no_grad():
                value = module(*tensors_of(spec, feeds))
        except Exception as error:  # noqa: BLE001 - TorchScript raises RuntimeError and its own
            return f"fails at {told} ({' '.join(str(error).split())[-160:]})"
        outputs = [value] if isinstance(value, torch.Tensor) else list(value)
        for tensor, output in zip(spec.outputs, outputs, strict=True):
            wanted = torch.from_numpy(truth[tensor.name])
            if output.shape != wanted.shape:
                return f"gives {list(output.shape)} for {list(wanted.shape)} at {told}"
            scale = float(wanted.float().abs().max()) + 1e-6
            if output.numel() and float((output.float() - wanted.float()).abs().max()) > 1e-2 * scale:
                return f"gives other values at {told}"
    return ""
