"""Learn a module's outputs and random calls by running it at a few sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import torch

from ganexport.errors import ExportError, UsageError
from ganexport.export.complex_pairs import COMPLEX_OUTPUT
from ganexport.export.prepare.randomness import Draw
from ganexport.export.wrapped import Wrapped, draw_inputs, run_module, tensors_of
from ganexport.spec import BATCH, GeneratorSpec, TensorSpec, check_layout

Shape = tuple[int | str, ...]


class Probe(msgspec.Struct, frozen=True):
    """What was learnt.

    Attributes:
        outputs: With symbolic shapes, "4*height" where a size is a multiple of a dimension.
        draws: Random calls of one forward, in order.
        noise_shapes: Symbolic shape of each of them.
    """

    outputs: tuple[TensorSpec, ...]
    draws: tuple[Draw, ...]
    noise_shapes: tuple[Shape, ...]


def probe_sizes(spec: GeneratorSpec) -> list[dict[str, int]]:
    """A base point and, for each free dimension, points that differ from it in that dimension alone.

    Two make a line; where there are several dimensions, a third is above all others, as outputs may follow the larger.
    """
    base = {dim.name: _near(dim.min, dim.step, dim.max, 2 if dim.name == BATCH else 0) for dim in spec.dims}
    points = [base]
    for dim in spec.dims:
        others = [dim.min, base[dim.name] + dim.step, base[dim.name] + 2 * dim.step, dim.max]
        allowed = [size for size in dict.fromkeys(others) if dim.min <= size <= dim.max and size != base[dim.name]]
        taken = sorted(allowed)[:2]
        above = max((size for name, size in base.items() if name not in (dim.name, BATCH)), default=0)
        over = _near(above + 1, dim.step, dim.max, 0)
        if dim.name != BATCH and max([base[dim.name], *taken]) <= above < over:
            taken.append(over)
        points += [base | {dim.name: size} for size in taken]
    return points


def _near(low: int, step: int, high: int, wanted: int) -> int:
    return min(max(low, -(-wanted // step) * step), high)


def probe(
    function: Wrapped, spec: GeneratorSpec, declared: Sequence[tuple[str, tuple[float, float], str | None]] = ()
) -> Probe:
    """Run the module and describe what comes out.

    Args:
        function: The module as the exporters will see it, without noise supplied.
        spec: With inputs and dims; its outputs, when it has any, keep their names, ranges and layouts.
        declared: (name, range, layout) from the user.

    Raises:
        ExportError: forward fails, its outputs change in number with the size, or with every call.
        UsageError: The declared outputs do not fit.
    """
    points = probe_sizes(spec)
    shapes: list[list[tuple[int, ...]]] = []
    draws: list[list[Draw]] = []
    names: list[str] | None = None
    dtypes: list[str] = []
    for index, sizes in enumerate(points):
        feeds = tensors_of(spec, draw_inputs(spec, sizes))
        try:
            outputs = run_module(function, feeds)
        except ExportError as error:
            raise _at_another_size(error, points[0], sizes) if index else error from None
        if index == 0 and not function.seen.draws:
            _refuse_hidden_randomness(function, feeds, outputs)
        if index == 0:
            names = function.seen.names
            dtypes = [str(t.dtype).removeprefix("torch.") for t in outputs]
        shapes.append([tuple(t.shape) for t in outputs])
        draws.append(function.seen.draws)
    if any(len(s) != len(shapes[0]) for s in shapes) or any(len(d) != len(draws[0]) for d in draws):
        raise ExportError("the module returns another number of tensors, or draws noise more often, at another size")
    symbolic = [_symbolic(points, [s[i] for s in shapes], f"output_{i}") for i in range(len(shapes[0]))]
    noise = [_symbolic(points, [d[i].shape for d in draws], f"noise_{i}") for i in range(len(draws[0]))]
    outputs_spec = _describe(spec, names, dtypes, symbolic, declared)
    return Probe(outputs_spec, tuple(draws[0]), tuple(noise))


def _refuse_hidden_randomness(
    function: Wrapped, feeds: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], again: int = 2
) -> None:
    """The same input gives the same output, unless forward draws from numpy's or Python's generator, or keeps state.

    Raises:
        ExportError: It does not.
    """
    for _ in range(again):
        state = torch.get_rng_state()
        other = run_module(function, feeds)
        if any(
            a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(outputs, other, strict=True)
        ):
            if not torch.equal(state, torch.get_rng_state()):
                cause = "an operator of torch draws random numbers inside forward that --noise has no form for"
                remedy = "make the noise an argument of forward, or draw it with torch.rand or torch.randn"
            else:
                cause = (
                    "no random call of torch is the cause: forward draws from numpy or Python's random, or keeps state "
                    "between calls"
                )
                remedy = "make the noise an argument of forward, or draw it with torch, which --noise can handle"
            raise ExportError(f"the module gives two outputs for the same input, and {cause}; {remedy}")


def _at_another_size(error: ExportError, base: dict[str, int], sizes: dict[str, int]) -> ExportError:
    """forward runs at one size and fails at another that the range allows: say what may be meant."""
    name = next(n for n in sizes if sizes[n] != base[n])
    return ExportError(
        f"{error}; it does run with {name} {base[name]}: if {name} must be a multiple of something, say so with a step "
        f"(--dim {name}=min:opt:max/step), and if it must equal another dimension, use one name for both"
    )


def _symbolic(points: list[dict[str, int]], shapes: list[tuple[int, ...]], name: str) -> Shape:
    if any(len(shape) != len(shapes[0]) for shape in shapes):
        raise ExportError(f"{name} has {len(shapes[0])} dimensions at one size and another number at another")
    return tuple(
        _expression(points, [shape[axis] for shape in shapes], f"{name}_{axis}") for axis in range(len(shapes[0]))
    )


def _expression(points: list[dict[str, int]], sizes: list[int], fallback: str) -> int | str:
    if len(set(sizes)) == 1:
        return sizes[0]
    moving = [
        n for n in points[0] if any(p[n] != points[0][n] and s != sizes[0] for p, s in zip(points, sizes, strict=True))
    ]
    if len(moving) != 1:
        return fallback
    pairs = [(p[moving[0]], s) for p, s in zip(points, sizes, strict=True)]
    (x0, y0), (x1, y1) = pairs[0], next(pair for pair in pairs if pair[0] != pairs[0][0])
    if (y1 - y0) % (x1 - x0):
        return fallback
    slope = (y1 - y0) // (x1 - x0)
    offset = y0 - slope * x0
    if any(y != slope * x + offset for x, y in pairs):
        return fallback
    text = moving[0] if slope == 1 else f"{slope}*{moving[0]}"
    return text if offset == 0 else f"{text}{offset:+d}"


def _describe(
    spec: GeneratorSpec, names: list[str] | None, dtypes: list[str], shapes: list[Shape],
    declared: Sequence[tuple[str, tuple[float, float], str | None]],
) -> tuple[TensorSpec, ...]:  # fmt: skip
    if any(dtype.startswith("complex") for dtype in dtypes):
        raise ExportError(COMPLEX_OUTPUT)
    count = len(shapes)
    if spec.outputs:
        if len(spec.outputs) != count:
            raise UsageError(f"the spec names {len(spec.outputs)} outputs, the module returns {count}")
        return tuple(
            msgspec.structs.replace(tensor, shape=shape, dtype=dtype)
            for tensor, shape, dtype in zip(spec.outputs, shapes, dtypes, strict=True)
        )
    if len(declared) > count:
        raise UsageError(f"--output given {len(declared)} times, the module returns {count}")
    given = {name: (value_range, layout) for name, value_range, layout in declared}
    if names is None:
        default = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
        names = [declared[i][0] if i < len(declared) else default[i] for i in range(count)]
    inputs = {tensor.name for tensor in spec.inputs}
    free = [f"{name}_out" if name in inputs else name for name in names]
    if unknown := sorted(set(given) - {*names, *free}):
        raise UsageError(f"--output {unknown[0]}: the module returns {', '.join(names)}")
    made = []
    for name, own, dtype, shape in zip(free, names, dtypes, shapes, strict=True):
        value_range, layout = given.get(own) or given.get(name) or (None, None)
        made.append(check_layout(TensorSpec(name, dtype, shape, None, value_range, layout)))
    return tuple(made)


def unrelated_to_batch(spec: GeneratorSpec) -> list[str]:
    """Outputs that stay as they are when the batch grows."""
    if spec.batch is None or spec.batch.static:
        return []
    return [tensor.name for tensor in spec.outputs if BATCH not in itertools.chain(map(str, tensor.shape))]
