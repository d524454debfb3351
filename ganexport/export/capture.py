"""``torch.export`` with the spec's dimensions; what it refuses is told in the user's terms.

The program is captured with explicit dimensions, never through the exporters' fallbacks: those
write a fixed batch without a word when the code specializes it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx.traceback

from ganexport.errors import ExportError
from ganexport.export.complex_pairs import PairedModule, has_complex, is_complex
from ganexport.export.prepare._location import foreign, innermost
from ganexport.export.symbolic_numbers import Globals, symbolic_numbers
from ganexport.export.wrapped import Seen, Wrapped, draw_inputs, tensors_of
from ganexport.spec import BATCH, Dim, GeneratorSpec


def example_sizes(spec: GeneratorSpec) -> dict[str, int]:
    """Sizes shown to the exporters: neither 0 nor 1, which torch treats specially, small, and like no training size.

    An odd number of steps, and another for each dimension: code asks whether the size is the one it was trained at, or
    height equals width, and a graph should hold what it does otherwise.
    """
    sizes: dict[str, int] = {}
    for dim in spec.dims:
        if dim.name == BATCH:
            sizes[dim.name] = min(max(dim.min, -(-3 // dim.step) * dim.step), dim.max)
            continue
        steps = max(-(-dim.min // dim.step), 2) | 1
        while steps * dim.step in sizes.values():
            steps += 2
        fits = dim.min <= steps * dim.step <= dim.max
        smallest = min(max(dim.min, 2 * dim.step), dim.max)
        sizes[dim.name] = steps * dim.step if fits else smallest
    return sizes


def example_inputs(spec: GeneratorSpec) -> tuple[torch.Tensor, ...]:
    """Inputs at :func:`example_sizes`."""
    return tensors_of(spec, draw_inputs(spec, example_sizes(spec)))


def _symbol(dim: Dim) -> Any:
    """torch.export's dimension: a multiple of a symbol where there is a step."""
    if dim.step == 1:
        return torch.export.Dim(f"_{dim.name}", min=dim.min, max=dim.max)
    steps = torch.export.Dim(f"_{dim.name}_steps", min=dim.min // dim.step, max=dim.max // dim.step)
    return dim.step * steps


def dynamic_shapes(spec: GeneratorSpec) -> tuple[Any, ...]:
    """For a forward of ``*inputs``: one mapping from axis to dimension an input."""
    symbols = {dim.name: _symbol(dim) for dim in spec.dims if not dim.static}
    return (
        tuple(
            {axis: symbols[size] for axis, size in enumerate(tensor.shape) if size in symbols} for tensor in spec.inputs
        ),
    )


def capture(function: Wrapped, spec: GeneratorSpec) -> torch.export.ExportedProgram:
    """Trace the module with symbolic dimensions.

    Raises:
        ExportError: A branch on values, a dimension that the code fixes, or anything torch cannot
            trace; file, line and the fix are named.
    """
    for name, child in function.module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise ExportError(
                f"{name or 'the module'} is TorchScript, which torch.export cannot read: hand on the Python module "
                "that it was made from"
            )
    inputs = example_inputs(spec)
    decisions = Decisions()
    # torch logs its own tracebacks of what is told below in one line.
    loggers = [logging.getLogger(name) for name in ("torch.fx", "torch._dynamo", "torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            _watch_sizes(decisions),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            program = _export(function, inputs, spec, decisions, function.seen)
            if not has_complex(program):
                return program
            paired = PairedModule(program)
            function.seen.complex = sum(is_complex(node.meta.get("val")) for node in program.graph.nodes)
            with torch.fx.traceback.preserve_node_meta():
                return _export(paired, inputs, spec, decisions, function.seen)
    except ExportError as error:
        # torch's interpreter adds the node and a traceback of its own
        raise ExportError(str(error).partition("\n\nWhile executing")[0]) from None
    except Exception as error:  # noqa: BLE001 - torch.export raises dozens of classes
        raise explain(error, spec, decisions.places) from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Decisions:
    """Where the user's code looked at a symbolic size while it was traced.

    Attributes:
        places: ``file.py:12`` of each line that turned one into a plain bool, int or float.
        scopes: Global namespaces of the files that asked for a plain number, by name of the file.
    """

    def __init__(self) -> None:
        self.places: list[str] = []
        self.scopes: dict[str, Globals] = {}


def _export(
    module: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    spec: GeneratorSpec,
    decisions: Decisions,
    seen: Seen,
) -> torch.export.ExportedProgram:
    """Trace; where a size was fixed and lines of the user's code made plain numbers of sizes, with these symbolic."""
    try:
        return _traced(module, inputs, spec, decisions, seen)
    except Exception:
        places, scopes = list(decisions.places), dict(decisions.scopes)
        if not scopes:
            raise
        decisions.places.clear()
        try:
            with symbolic_numbers(list(scopes.values())):
                program = _traced(module, inputs, spec, decisions, seen)
        except Exception as error:
            if "Constraints violated" in str(error) and decisions.places:
                raise  # with int() out of the way, what is left is a branch on a size
            decisions.places[:] = places
        else:
            seen.numbers = tuple(scopes)
            return program
        raise


def _traced(
    module: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    spec: GeneratorSpec,
    decisions: Decisions,
    seen: Seen,
) -> torch.export.ExportedProgram:
    """Trace; facts about sizes that only torch itself asked for, and could not prove, are left to the certificate.

    An image padded to a multiple and cropped again asks whether h <= 8 * ceil(h / 8), and a crop of every second
    pixel whether its memory is contiguous: true everywhere, or of no consequence, and beyond torch's prover. It then
    refuses the dimension. Where no line of the user's code looked at a size, the module is traced again with these
    facts as run-time checks, which are taken out: no branch of the user's hangs on them, and the certificate compares
    sizes from the smallest to the largest.
    """
    shapes = dynamic_shapes(spec)
    try:
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if decisions.places or not _unproved(str(error)):
            raise
    program = torch.export.export(
        module, inputs, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )
    if decisions.places:
        raise ExportError(f"{_told(decisions.places)}: the code branches on a size, so one graph does not hold")
    graph = program.graph
    checks = graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default)
    for node in checks:
        graph.erase_node(node)
    seen.unproved = len(checks)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _told(places: Sequence[str]) -> str:
    return " or ".join(places[:3])


def _unproved(text: str) -> bool:
    """Whether every complaint is of a relation between sizes, none of a dimension that the code fixes to a number."""
    return "Constraints violated" in text and "specialized" not in text and "generated guard" in text


@contextlib.contextmanager
def _watch_sizes(found: Decisions) -> Iterator[None]:
    """Collect the lines of user code that turn a symbolic number into a plain bool, int or float.

    torch says which dimension was restricted, but not where.
    """
    watched = [
        (owner, name)
        for owner in (torch.SymBool, torch.SymInt, torch.SymFloat)
        for name in ("__bool__", "__int__", "__index__", "__float__")
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name in watched if name in vars(owner)]

    def watching(name: str, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(size: Any) -> Any:
            frame = sys._getframe(1)
            if not foreign(frame.f_code.co_filename):
                file = Path(frame.f_code.co_filename).name
                place = f"{file}:{frame.f_lineno}"
                if place not in found.places:
                    found.places.append(place)
                if name != "__bool__":  # float() of a SymInt asks for its __index__
                    found.scopes[file] = frame.f_globals
            return original(size)

        return call

    try:
        for owner, name, original in originals:
            setattr(owner, name, watching(name, original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def explain(error: BaseException, spec: GeneratorSpec, decisions: Sequence[str] = ()) -> ExportError:
    """torch's refusal as one line with file, line and what to do.

    Args:
        error: Whatever torch raised.
        spec: Of the generator.
        decisions: Lines of user code that looked at a symbolic size.
    """
    text = str(error)
    where = innermost(error.__traceback__) or _quoted_place(text)
    at = f"{where}: " if where else ""
    if "data-dependent" in text or "DataDependent" in type(error).__name__ or "unbacked" in text:
        return ExportError(
            f"{at}Python branches on (or reads) a value that depends on the input, so one graph cannot hold both "
            "paths; use torch.where (or torch.cond), or pass the choice with --call"
        )
    if (
        "specialized" in text
        or "Constraints violated" in text
        or "not all values" in text
        or "ConstraintViolation" in type(error).__name__
    ):
        at = at or (f"{_told(decisions)}: " if decisions else "")
        return _specialised(text, at, spec)
    return ExportError(f"{at}torch.export cannot trace the module: {type(error).__name__}: {_first(text)}")


def _specialised(text: str, at: str, spec: GeneratorSpec) -> ExportError:
    place = _quoted_place(text)
    at = at or (f"{place}: " if place else "")
    for dim in spec.dims:
        symbol = rf"_{dim.name}(?:_steps)?\b"
        if fixed := re.search(rf"\n\s*{symbol}\s*=\s*(\d+)\s*(?:\n|$)", text):
            size = int(fixed.group(1)) * dim.step
            return ExportError(
                f"{at}the code fixes {dim.name} (to {size}), for instance by int(), len(), a loop or a "
                "table of that size; "
                "keep it symbolic (x.shape[…] as it is, torch.arange(n) for range(n)), or export the one size: "
                f"--dim {dim.name}={size}"
            )
        if multiple := re.search(rf"\n\s*{symbol}\s*=\s*(\d+)\s*\*", text):
            step = int(multiple.group(1)) * dim.step
            return ExportError(
                f"{at}the code needs {dim.name} to be a multiple of {step}: say so with a step, "
                f"--dim {dim.name}={_up(dim.min, step)}:{_up(dim.opt, step)}:{max(dim.max // step, 1) * step}/{step}"
            )
        if bound := re.search(rf"Dim\('{symbol}',?\s*([^)]*)\)", text):
            return ExportError(
                f"{at}the code branches on the size of {dim.name}, so one graph does not hold for "
                f"{dim.min} to {dim.max} (it asks for {bound.group(1).strip()}); make the branch independent of the "
                f"size, or narrow --dim {dim.name}=min:opt:max to one side of it"
            )
    if equal := re.search(r"\n\s*_(\w+?)(?:_steps)? = _(\w+?)(?:_steps)?\s*(?:\n|$)", text):
        return ExportError(
            f"{at}the code needs {equal.group(1)} and {equal.group(2)} to be equal: use one --dim for both"
        )
    return ExportError(f"{at}the code restricts a symbolic dimension: {_first(text)}")


def _up(size: int, step: int) -> int:
    return max(-(-size // step) * step, step)


def _quoted_place(text: str) -> str:
    frames = re.findall(r'File "([^"]+)", line (\d+)', text) + re.findall(r"(\S+\.py):(\d+) in \w+", text)
    own = [f for f in frames if not foreign(f[0])]
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""


def _first(text: str, limit: int = 300) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:limit] if lines else "no reason given"
