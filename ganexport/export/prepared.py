"""From a source with a module to what exporters and the certificate need: one prepared, one untouched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec
import torch

from ganexport.errors import ExportError, UsageError
from ganexport.export.mapping import latent_moments, truncate_mapping
from ganexport.export.prepare import prepare_module
from ganexport.export.prepare._copying import copied
from ganexport.export.prepare.autocast import HALF, FullPrecision
from ganexport.export.prepare.evaluation_mode import freeze
from ganexport.export.prepare.mapping import MEAN_DRAWS
from ganexport.export.prepare.randomness import MODES, refuse
from ganexport.export.probe import Probe, probe
from ganexport.export.source import TorchSource
from ganexport.export.wrapped import EagerReference, Wrapped
from ganexport.spec import BATCH, GeneratorSpec, Normal, TensorSpec, Uniform

Declared = Sequence[tuple[str, tuple[float, float], str | None]]
#: Names that forward uses for the truncation of the style literature.
_TRUNCATION_NAMES = ("truncation", "truncation_psi", "psi")
#: Names that forward uses for the mean latent, where it does not keep it in a buffer.
_MEAN_NAMES = ("truncation_latent", "mean_latent", "latent_mean", "w_avg")


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
    mapping: str | None = None,
    uint8: bool = False,
) -> Prepared:
    """Apply the passes and learn the outputs.

    Args:
        source: Module, inputs, dims.
        declared: The user's outputs.
        noise: "error", "input" or "constant": what becomes of random calls inside forward.
        truncation: Baked in: as forward's keyword, in place of an input of that name, or behind the mapping network.
        mapping: Path of the mapping network, whose mean latent truncation needs where the module has none.
        uint8: Whether images leave as NHWC uint8.

    Raises:
        ExportError: forward fails, or draws random numbers and ``noise`` is "error".
        UsageError: An option that this module cannot take.
    """
    if noise not in MODES:
        raise UsageError(f"--noise {noise!r}: choose {', '.join(MODES)}")
    source, baked = bake_truncation(source, truncation, mapping)
    source.module.eval()
    freeze(source.module)
    widened = _full_precision(source.module)
    names = [tensor.name for tensor in source.spec.inputs]
    original = Wrapped(source.module, names, source.call, rewrite=False)
    try:
        found = probe(original, source.spec, declared)
    except ExportError:
        if not (narrowed := _single_precision(source.module)):
            raise
        widened += narrowed
        found = probe(original, source.spec, declared)
    refuse(list(found.draws), noise)
    spec = msgspec.structs.replace(source.spec, outputs=found.outputs)
    finish, spec = _uint8(spec) if uint8 else (None, spec)
    supply, spec = _supply_noise(found, spec, noise)
    changed = copied(source.module)
    passes = [*widened, *prepare_module(changed)]
    supply["own_inputs"] = original.seen.writes
    reference = Wrapped(source.module, names, source.call, rewrite=False, finish=finish, **supply)
    function = Wrapped(changed, names, source.call, rewrite=True, finish=finish, **supply)
    if original.seen.autocast:
        passes.append(f"autocast-off: {original.seen.autocast} regions of forward run in fp32")
    if original.seen.half:
        passes.append(FullPrecision.line.format(original.seen.half))
    if found.draws:
        passes.append(f"noise-{noise}: {len(found.draws)} random calls, first {found.draws[0].where}")
    passes += baked
    return Prepared(function.eval(), EagerReference(reference.eval(), spec), spec, passes)


def _full_precision(module: torch.nn.Module) -> list[str]:
    """Half-precision weights as fp32 ones of the same values: --precision says what is wanted, on the graph."""
    return _float_weights(module, HALF)


def _single_precision(module: torch.nn.Module) -> list[str]:
    """The weights of a module in double precision, which cannot take fp32 inputs, rounded to fp32."""
    return _float_weights(module, (torch.float64,))


def _float_weights(module: torch.nn.Module, kinds: Collection[torch.dtype]) -> list[str]:
    found = [tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in kinds]
    if not found:
        return []
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.dtype in kinds:
                    tensor.data = tensor.data.float()
    return [f"float32-weights: {len(found)} tensors of {str(found[0]).removeprefix('torch.')}"]


def bake_truncation(
    source: TorchSource, value: float | None, mapping: str | None = None
) -> tuple[TorchSource, list[str]]:
    """The source with truncation (and the mean latent, where it is needed) baked in, and the lines for the manifest.

    Args:
        source: Module, inputs, dims.
        value: The truncation; None leaves the source as it is.
        mapping: Path of the mapping network.

    Raises:
        UsageError: forward has no such argument and no mapping network is named.
    """
    if value is None:
        return source, []
    lines = [f"truncation: {value:g} baked in"]
    parameters = inspect.signature(source.module.forward).parameters
    mean = next((name for name in _MEAN_NAMES if name in parameters and name not in source.call), None)
    named = next((name for name in _TRUNCATION_NAMES if name in parameters), None)
    tensor = next((t for t in source.spec.inputs if t.name in _TRUNCATION_NAMES), None)
    if tensor is None and named is None and mapping is None:
        raise UsageError(
            "--truncation: forward has no argument of that name (truncation, truncation_psi, psi); name the network "
            "that maps z to w (--mapping PATH), or truncate when drawing: ganexport generate --truncation"
        )
    if tensor is not None and tensor.name not in parameters:
        raise UsageError(f"--truncation: input {tensor.name!r} is positional; leave it out of --input")
    given: dict[str, Any] = {}
    inputs = source.spec.inputs
    if tensor is not None:
        inputs = tuple(t for t in inputs if t is not tensor)
        shape = tensor.resolve({})
        given[tensor.name] = torch.full(shape, value) if shape else torch.tensor(value)
    elif named is not None:
        given[named] = value
    without = TorchSource(
        source.module, msgspec.structs.replace(source.spec, inputs=inputs), source.provenance, source.call
    )
    if given and mean is not None:
        if mapping is None:
            raise UsageError(
                f"--truncation: forward needs {mean}, the mean latent: name the network that maps z to w, "
                "--mapping PATH, and it is computed and baked in"
            )
        given[mean] = latent_moments(without, mapping)[0]
    if given:
        lines += [f"latent-mean: {MEAN_DRAWS} draws through {mapping} baked in"] if mean in given else []
        return TorchSource(without.module, without.spec, without.provenance, without.call | given), lines
    assert mapping is not None
    lines.append(f"latent-mean: {MEAN_DRAWS} draws through {mapping} baked in")
    return truncate_mapping(source, mapping, value), lines


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
