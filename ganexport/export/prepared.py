"""From a source with a module to what exporters and the certificate need: one prepared, one untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from ganexport.errors import ExportError, UsageError
from ganexport.export.prepare import prepare_module
from ganexport.export.prepare.randomness import MODES, refuse
from ganexport.export.probe import Probe, probe
from ganexport.export.source import TorchSource
from ganexport.export.wrapped import EagerReference, Wrapped
from ganexport.spec import BATCH, GeneratorSpec, Normal, TensorSpec, Uniform

Declared = Sequence[tuple[str, tuple[float, float], str | None]]
#: Names that forward uses for the truncation of the style literature.
_TRUNCATION_NAMES = ("truncation", "truncation_psi", "psi")


class Prepared:
    """A module ready for every exporter.

    Attributes:
        function: The module with all passes applied, as exporters see it.
        reference: The module as it came (evaluation mode), for the certificate.
        spec: Complete: inputs (with noise inputs), outputs, dims.
        passes: What was changed, for the manifest.
    """

    def __init__(self, function: Wrapped, reference: EagerReference, spec: GeneratorSpec, passes: list[str]) -> None:
        self.function = function
        self.reference = reference
        self.spec = spec
        self.passes = passes


def prepare(
    source: TorchSource,
    *,
    declared: Declared = (),
    noise: str = "error",
    truncation: float | None = None,
    uint8: bool = False,
) -> Prepared:
    """Apply the passes and learn the outputs.

    Args:
        source: Module, inputs, dims.
        declared: The user's outputs.
        noise: "error", "input" or "constant": what becomes of random calls inside forward.
        truncation: Baked in: as forward's keyword or in place of an input of that name.
        uint8: Whether images leave as NHWC uint8.

    Raises:
        ExportError: forward fails, or draws random numbers and ``noise`` is "error".
        UsageError: An option that this module cannot take.
    """
    if noise not in MODES:
        raise UsageError(f"--noise {noise!r}: choose {', '.join(MODES)}")
    source = _bake_truncation(source, truncation) if truncation is not None else source
    _evaluation(source.module)
    names = [tensor.name for tensor in source.spec.inputs]
    original = Wrapped(source.module, names, source.call, rewrite=False)
    found = probe(original, source.spec, declared)
    refuse(list(found.draws), noise)
    spec = msgspec.structs.replace(source.spec, outputs=found.outputs)
    finish, spec = _uint8(spec) if uint8 else (None, spec)
    supply, spec = _supply_noise(found, spec, noise)
    changed = _copy(source.module)
    passes = prepare_module(changed)
    reference = Wrapped(source.module, names, source.call, rewrite=False, finish=finish, **supply)
    function = Wrapped(changed, names, source.call, rewrite=True, finish=finish, **supply)
    if found.draws:
        passes.append(f"noise-{noise}: {len(found.draws)} random calls, first {found.draws[0].where}")
    if truncation is not None:
        passes.append(f"truncation: {truncation:g} baked in")
    return Prepared(function.eval(), EagerReference(reference.eval(), spec), spec, passes)


def _evaluation(module: torch.nn.Module) -> None:
    module.eval()
    module.requires_grad_(False)


def _copy(module: torch.nn.Module) -> torch.nn.Module:
    """A deep copy; after the probe ran without gradients, even weight-normed modules allow it."""
    try:
        return copy.deepcopy(module)
    except Exception as error:  # noqa: BLE001 - copying runs the user's code
        raise ExportError(f"the module cannot be copied ({type(error).__name__}: {error})") from None


def _bake_truncation(source: TorchSource, value: float) -> TorchSource:
    import inspect

    parameters = inspect.signature(source.module.forward).parameters
    for tensor in source.spec.inputs:
        if tensor.name in _TRUNCATION_NAMES:
            inputs = tuple(t for t in source.spec.inputs if t is not tensor)
            if tensor.name not in parameters:
                raise UsageError(f"--truncation: input {tensor.name!r} is positional; leave it out of --input")
            shape = tensor.resolve({})
            constant = torch.full(shape, value) if shape else torch.tensor(value)
            spec = msgspec.structs.replace(source.spec, inputs=inputs)
            return TorchSource(source.module, spec, source.provenance, source.call | {tensor.name: constant})
    for name in _TRUNCATION_NAMES:
        if name in parameters:
            return TorchSource(source.module, source.spec, source.provenance, source.call | {name: value})
    raise UsageError(
        "--truncation: forward has no argument of that name (truncation, truncation_psi, psi); for a generator "
        "without one, truncate when drawing: ganexport generate --truncation"
    )


def _uint8(spec: GeneratorSpec) -> tuple[Callable[..., Any], GeneratorSpec]:
    """The last step that turns the image into bytes, and the spec after it."""
    from ganexport.build.uint8_output import uint8_spec

    image = spec.image_output
    changed = uint8_spec(spec)
    assert image is not None
    assert image.range is not None
    low, high = image.range
    position = spec.outputs.index(image)
    to_nhwc = image.layout == "NCHW"

    def finish(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        value = tensors[position].float()  # [batch, channels, height, width]
        value = ((value - low) * (255.0 / (high - low))).round().clamp(0.0, 255.0).to(torch.uint8)
        value = value.permute(0, 2, 3, 1) if to_nhwc else value
        return (*tensors[:position], value.contiguous(), *tensors[position + 1 :])

    return finish, changed


def _supply_noise(found: Probe, spec: GeneratorSpec, noise: str) -> tuple[dict[str, Any], GeneratorSpec]:
    if not found.draws:
        return {}, spec
    declared = {dim.name for dim in spec.dims}
    if noise == "input":
        for draw, shape in zip(found.draws, found.noise_shapes, strict=True):
            if bad := [s for s in shape if isinstance(s, str) and s not in declared]:
                raise ExportError(
                    f"{draw.where}: {draw.function} draws noise of size {bad[0]}, which no dimension of the inputs "
                    "is; use --noise constant at a fixed size, or make the noise an argument of forward"
                )
        taken = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        inputs = [
            TensorSpec(_free(f"noise_{i}", taken), "float32", shape, Normal() if draw.kind == "normal" else Uniform())
            for i, (draw, shape) in enumerate(zip(found.draws, found.noise_shapes, strict=True))
        ]
        return {"noise_inputs": len(inputs)}, msgspec.structs.replace(spec, inputs=(*spec.inputs, *inputs))
    return {
        "constants": [_constant(d, s, i) for i, (d, s) in enumerate(zip(found.draws, found.noise_shapes, strict=True))]
    }, spec


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _constant(draw: Any, shape: tuple[int | str, ...], number: int) -> torch.Tensor:
    """Fixed noise, the same for every sample: N(0, 1) or U[0, 1) from a fixed seed."""
    free = [size for size in shape if isinstance(size, str) and size != BATCH]
    if free:
        raise ExportError(
            f"{draw.where}: {draw.function} draws noise of size {free[0]}, which has no one constant; use --noise input"
        )
    size = [1 if s == BATCH else int(s) for s in shape]
    generator = torch.Generator().manual_seed(number)
    make = torch.randn if draw.kind == "normal" else torch.rand
    return make(size, generator=generator)
