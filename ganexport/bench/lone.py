"""Lone files as candidates: what an engine, a TorchScript file, a package or an OpenVINO model does not say itself.

A file without a manifest names its inputs at best. The rest is read off it (an engine's profiles, a model's
partial shapes), taken from another source of the same benchmark, or from the user's ``--input`` and ``--dim``;
outputs are found by running it. :func:`describe` runs in a process of its own, because opening a foreign file
runs its code.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ganexport.errors import ArtifactError, BackendUnavailableError, UsageError
from ganexport.runtime.base import Tensor, first_line
from ganexport.spec import BATCH, Dim, GeneratorSpec, Normal, TensorSpec, spec_to_json

#: What a lone file's suffix says about its format (``.onnx`` files describe themselves: see candidates.py).
SUFFIXES = {
    ".engine": "trt",
    ".plan": "trt",
    ".ts": "torchscript",
    ".torchscript": "torchscript",
    ".pt": "torchscript",
    ".pth": "torchscript",
    ".pt2": "aoti",
    ".xml": "openvino",
}
_TORCH_PRECISION = {"float16": "fp16", "bfloat16": "bf16", "qint8": "int8", "quint8": "int8"}


class Said(msgspec.Struct, frozen=True):
    """What is known about a generator besides the file.

    Attributes:
        inputs: The user's descriptions, or another source's, in the order in which the generator takes them.
        dims: Ranges of free dimensions.
        outputs: Another source's outputs, for their names and ranges.
    """

    inputs: tuple[TensorSpec, ...] = ()
    dims: tuple[Dim, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()


def describe(path: str, kind: str, device: str, said: dict[str, Any]) -> dict[str, Any]:
    """Open a file and say what it is, as plain JSON values.

    Args:
        path: The file.
        kind: A value of :data:`SUFFIXES`.
        device: "cpu" or "cuda:0": where it is opened.
        said: A :class:`Said` as JSON values.

    Returns:
        ``spec`` (as JSON), ``precision`` ("" where the file does not tell), ``requires`` (for the runner), or
        ``unavailable`` alone: why it cannot be opened on this machine.

    Raises:
        UsageError: Something that only the user can describe, or a description that does not fit.
        ArtifactError: The file is not of its kind, or does not do what it says.
    """
    known = msgspec.convert(said, Said)
    readers = {"openvino": _openvino, "trt": _tensorrt, "torchscript": _torchscript, "aoti": _aoti}
    try:
        spec, precision, requires = readers[kind](Path(path), device, known)
    except BackendUnavailableError as error:
        return {"unavailable": str(error)}
    return {"spec": spec_to_json(spec), "precision": precision, "requires": requires}


Found = tuple[GeneratorSpec, str, dict[str, str]]


def _openvino(path: Path, _device: str, said: Said) -> Found:
    import openvino

    from ganexport.runtime.openvino import signature

    if not path.with_suffix(".bin").is_file():
        raise ArtifactError(f"{path}: its weights are missing, put {path.with_suffix('.bin').name} beside it")
    try:
        model = openvino.Core().read_model(str(path))
    except Exception as error:  # noqa: BLE001 - the frontends raise RuntimeError and their own classes
        lines = [line for line in str(error).splitlines() if not line.startswith(("Exception from", "Check '"))]
        raise ArtifactError(f"{path}: OpenVINO cannot read it: {first_line(' '.join(lines))}") from None
    sizes: dict[str, int] = {}
    for operation in model.get_ops():
        if operation.get_type_name() == "Constant":
            name = operation.get_output_element_type(0).get_type_name()
            count = math.prod(operation.get_output_partial_shape(0).to_shape())
            sizes[name] = sizes.get(name, 0) + int(count)
    heaviest = max(sizes, key=lambda name: sizes[name], default="f32")
    precision = {"f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}.get(heaviest, "fp32")
    spec = spec_of_ports(signature(model.inputs), signature(model.outputs), said, path)
    return spec, precision, {}


def _tensorrt(path: Path, device: str, said: Said) -> Found:
    from ganexport.runtime import _cuda, tensorrt
    from ganexport.runtime.base import device_index

    owner = _cuda.Device(device_index(device) or 0)
    reasons = []
    try:
        for flavour in tensorrt.installed():
            try:
                engine, owners = tensorrt._deserialise(tensorrt._import(flavour), path)
            except ArtifactError as error:
                reasons.append(str(error).removeprefix(f"{path}: "))
                continue
            inputs, outputs = tensorrt._signature(tensorrt._import(flavour), engine)
            spec = spec_of_ports(inputs, outputs, said, path, profiles(engine, inputs))
            del engine, owners
            return spec, "", {"flavour": flavour}
    finally:
        owner.close()
    raise ArtifactError(f"{path}: {'; '.join(reasons)}")


def profiles(engine: Any, inputs: Sequence[Tensor]) -> dict[str, list[tuple[int, int, int]]]:
    """(min, opt, max) of each axis of each input in an engine's first optimisation profile."""
    return {
        tensor.name: list(zip(*(tuple(s) for s in engine.get_tensor_profile_shape(tensor.name, 0)), strict=True))
        for tensor in inputs
    }


def spec_of_ports(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    said: Said,
    path: Path,
    ranges: Mapping[str, Sequence[tuple[int, int, int]]] | None = None,
) -> GeneratorSpec:
    """The spec of a file that names its inputs and outputs, with their types and which sizes are free.

    A free leading size is the batch; other free sizes need a Dim, unless ``ranges`` has them. Floating-point
    inputs that nobody describes are drawn from N(0, 1).

    Args:
        inputs: As the file gives them.
        outputs: As the file gives them.
        said: Descriptions, by the file's names, or in its order where the names differ.
        path: For messages.
        ranges: (min, opt, max) of each axis of each input.

    Raises:
        UsageError: Something that only the user can describe, or a description that does not fit.
    """
    described = {t.name: d for t, d in zip(inputs, _matched(inputs, said.inputs, "input", path), strict=True)}
    dims = {dim.name: dim for dim in said.dims}
    specs = []
    for tensor in inputs:
        shape = _shape(tensor, described[tensor.name], path)
        for axis, size in enumerate(shape):
            if isinstance(size, str) and size not in dims:
                if ranges is not None:
                    dims[size] = Dim(size, *ranges[tensor.name][axis])
                elif size == BATCH:
                    dims[size] = Dim(BATCH)
                else:
                    raise UsageError(f"{path}: size {axis} of input {tensor.name!r} is free: {_hint(tensor)}")
        sampler = described[tensor.name].sampler if described[tensor.name] is not None else None  # type: ignore[union-attr]
        if described[tensor.name] is None:
            if tensor.dtype not in ("float32", "float16", "float64"):
                raise UsageError(f"{path}: input {tensor.name!r} is {tensor.dtype}: {_hint(tensor)}")
            sampler = Normal()
        specs.append(TensorSpec(tensor.name, tensor.dtype, shape, sampler))
    ends = _matched(outputs, said.outputs, "output", path, strict=False)
    results = tuple(
        TensorSpec(
            t.name,
            t.dtype,
            tuple(s if s is not None else BATCH if i == 0 else f"{_clean(t.name)}_{i}" for i, s in enumerate(t.shape)),
            range=like.range if like else None,
            layout=like.layout if like else None,
        )
        for t, like in zip(outputs, ends, strict=True)
    )
    used = {size for tensor in specs for size in tensor.shape if isinstance(size, str)}
    return GeneratorSpec(tuple(specs), results, tuple(d for n, d in dims.items() if n in used), path.stem)


def _clean(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)


def _hint(tensor: Tensor) -> str:
    shape = ",".join(
        "batch" if s is None and i == 0 else f"d{i}" if s is None else str(s) for i, s in enumerate(tensor.shape)
    )
    sampler = "normal" if tensor.dtype.startswith("float") else "label(10)"
    free = [f' --dim "d{i}=min:opt:max"' for i, s in enumerate(tensor.shape) if s is None and i]
    return f'describe it, e.g. --input "{tensor.name}={sampler}[{shape}]"{"".join(free)}'


def _shape(tensor: Tensor, described: TensorSpec | None, path: Path) -> tuple[int | str, ...]:
    if described is None:
        return tuple(s if s is not None else BATCH if i == 0 else f"d{i}" for i, s in enumerate(tensor.shape))
    fits = len(described.shape) == len(tensor.shape) and all(
        have is None or have == want or isinstance(want, str)
        for have, want in zip(tensor.shape, described.shape, strict=True)
    )
    if not fits:
        have_words = ", ".join("?" if s is None else str(s) for s in tensor.shape)
        raise UsageError(
            f"{path}: input {tensor.name!r} is [{have_words}], described as [{', '.join(map(str, described.shape))}]"
        )
    # A size that the file fixes stays fixed, whatever another source says about that dimension.
    return tuple(w if h is None else h for h, w in zip(tensor.shape, described.shape, strict=True))


def _matched(
    have: Sequence[Tensor], described: Sequence[TensorSpec], what: str, path: Path, *, strict: bool = True
) -> list[TensorSpec | None]:
    """For each tensor of a file its description: by name, or by position where as many differ in name."""
    names = [tensor.name for tensor in have]
    by_name = {tensor.name: tensor for tensor in described}
    if not set(by_name) - set(names):
        return [by_name.get(name) for name in names]
    if len(described) == len(have):
        return list(described)
    if strict:
        raise UsageError(f"{path}: has {what}s {', '.join(names)}; described were {', '.join(by_name)}")
    return [None] * len(have)


# ---- torch: what neither names sizes nor outputs ------------------------------------------------------------


def _torchscript(path: Path, device: str, said: Said) -> Found:
    from ganexport.runtime.torchscript import TorchScriptRunner

    if not any(name.endswith("/constants.pkl") for name in _members(path)):
        raise ArtifactError(
            f"{path}: not TorchScript; weights alone cannot be run: name their module, package.module:factory"
        )
    torch = _torch(device)
    module = TorchScriptRunner.open(path, GeneratorSpec((), ()), device=device)._function
    names = [a.name for a in module.forward.schema.arguments[1:] if not a.has_default_value()]
    dtypes: dict[str, int] = {}
    for parameter in (*module.parameters(), *module.buffers()):
        name = str(parameter.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + parameter.numel()
    heaviest = max(dtypes, key=lambda name: dtypes[name], default="float32")
    spec = _probed(torch, module, names, said, path, device)
    return spec, _TORCH_PRECISION.get(heaviest, "fp32"), {}


def _aoti(path: Path, device: str, said: Said) -> Found:
    from ganexport.runtime.aoti import AotiRunner

    if not any("/aotinductor/" in name for name in _members(path)):
        raise ArtifactError(
            f"{path}: an exported program, not compiled; torch._inductor.aoti_compile_and_package makes a package of it"
        )
    requires = {"device": _built_for(path) or device}
    torch = _torch(requires["device"])
    package = AotiRunner.open(path, GeneratorSpec((), ()), requires=requires)._function
    return _probed(torch, package, None, said, path, requires["device"]), "", requires


def _members(path: Path) -> list[str]:
    """Names in a file of torch's, all of which are zip archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        raise ArtifactError(f"{path}: not a {path.suffix} file of torch, or cut short") from None


def _built_for(path: Path) -> str:
    """Device of a package, from the metadata that lies beside its code; empty when it does not say."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("metadata.json"):
                found = msgspec.json.decode(archive.read(name))
                if isinstance(found, dict) and "AOTI_DEVICE_KEY" in found:
                    return str(found["AOTI_DEVICE_KEY"])
    return ""


def _torch(device: str) -> Any:
    from ganexport.runtime._torch import import_torch

    return import_torch(device)[0]


def _dims(said: Said) -> tuple[Dim, ...]:
    given = {dim.name: dim for dim in said.dims}
    used = [size for tensor in said.inputs for size in tensor.shape if isinstance(size, str)]
    for size in used:
        if size == BATCH:
            given.setdefault(BATCH, Dim(BATCH))
    return tuple(given[size] for size in dict.fromkeys(used) if size in given)


class _Output(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str


def _probed(torch: Any, function: Any, names: list[str] | None, said: Said, path: Path, device: str) -> GeneratorSpec:
    """The spec of a torch file: inputs as described, outputs as it returns them at several sizes."""
    inputs = _described(names, said, path)
    whole = GeneratorSpec(inputs, (), _dims(said), path.stem)
    base = {dim.name: dim.min for dim in whole.dims}
    first = _run(torch, function, whole, said, base, path, device)
    shapes: list[list[int | str]] = [list(output.shape) for output in first]
    for dim in whole.dims:
        if dim.static:
            continue
        size, follows = dim.min + dim.step, False
        second = _run(torch, function, whole, said, {**base, dim.name: size}, path, device)
        for number, (before, after) in enumerate(zip(first, second, strict=True)):
            for axis, pair in enumerate(zip(before.shape, after.shape, strict=True)):
                if pair[0] != pair[1]:
                    shapes[number][axis] = dim.name if pair == (dim.min, size) else f"{before.name}_{axis}"
                    follows |= axis == 0
        if dim.name == BATCH and not follows:
            raise ArtifactError(
                f"{path}: returns as many samples for batch {size} as for batch {dim.min}: its batch size is baked in; "
                "write that size in --input in place of the word batch"
            )
    outputs = []
    for number, output in enumerate(first):
        like = said.outputs[number] if number < len(said.outputs) else None
        told = (like.range, like.layout) if like else (None, None)
        outputs.append(TensorSpec(output.name, output.dtype, tuple(shapes[number]), range=told[0], layout=told[1]))
    return GeneratorSpec(inputs, tuple(outputs), whole.dims, path.stem)


def _described(names: list[str] | None, said: Said, path: Path) -> tuple[TensorSpec, ...]:
    """Descriptions in the order in which a torch file takes its inputs; ``names`` are the file's where it has some."""
    count = len(names) if names is not None else max(len(said.inputs), 1)
    if len(said.inputs) != count:
        wanted = names or ["z"]
        got = f"; described were {', '.join(t.name for t in said.inputs)}" if said.inputs else ""
        example = " ".join(f'--input "{name}=normal[batch,128]"' for name in wanted)
        raise UsageError(
            f"{path}: does not say the shapes of its inputs ({', '.join(wanted)}){got}: describe them, e.g. {example}"
        )
    if names is not None and {t.name for t in said.inputs} == set(names):
        return tuple(next(t for t in said.inputs if t.name == name) for name in names)
    return said.inputs


def _run(
    torch: Any, function: Any, spec: GeneratorSpec, said: Said, sizes: dict[str, int], path: Path, device: str
) -> list[_Output]:
    """The outputs at these sizes, named as they name themselves, as another source does, or by number."""
    from ganexport.measure.feeds import draw
    from ganexport.runtime._torch import _last_line

    tensors = []
    for tensor, array in zip(spec.inputs, draw(spec, sizes).values(), strict=True):
        value = torch.from_numpy(array.copy())
        tensors.append((value.to(torch.bfloat16) if tensor.dtype == "bfloat16" else value).to(device))
    try:
        with torch.inference_mode():
            outputs = function(*tensors)
    except Exception as error:  # noqa: BLE001 - a module may raise anything
        shapes = ", ".join(f"{t.name} {list(v.shape)}" for t, v in zip(spec.inputs, tensors, strict=True))
        raise UsageError(f"{path}: fails on {shapes}: {_last_line(error)}; do --input and --dim fit it?") from None
    names = [tensor.name for tensor in said.outputs]
    if isinstance(outputs, Mapping):
        names, outputs = [str(name) for name in outputs], list(outputs.values())
    flat = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    if len(names) != len(flat):
        names = [f"output_{number}" for number in range(len(flat))]
    return [_Output(n, tuple(v.shape), str(v.dtype).removeprefix("torch.")) for n, v in zip(names, flat, strict=True)]
