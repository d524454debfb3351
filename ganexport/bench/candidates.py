"""From what the user names to the candidates that are measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ganexport.artifact import FORMATS, MANIFEST, Artifact, ArtifactFile
from ganexport.bench.factories import TORCH_MODES
from ganexport.build.rehearse import rehearse
from ganexport.environment import gpus
from ganexport.errors import ArtifactError, UsageError, unknown_name
from ganexport.measure.candidate import Candidate
from ganexport.runtime import BACKENDS
from ganexport.spec import Dim, GeneratorSpec, TensorSpec, spec_to_json

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")
_SUFFIXES = {".onnx": "onnx", ".engine": "trt", ".plan": "trt", ".ts": "torchscript", ".pt": "torchscript"}
_HERE = "ganexport.bench.factories"
#: torch.compile's modes that are measured unless asked otherwise: one on a CPU, where compiling takes
#: long; on a GPU also the strongest, with CUDA graphs.
_DEFAULT_MODES = {"cpu": ("eager", "compile"), "cuda": ("eager", "compile", "compile-max-autotune")}


def backend_names() -> tuple[str, ...]:
    """Everything ``--backends`` takes."""
    return (*BACKENDS.names(), *TORCH_MODES)


def find_candidates(
    sources: Sequence[str],
    *,
    backends: Sequence[str] = (),
    devices: Sequence[str] = (),
    threads: Sequence[int] = (),
    precisions: Sequence[str] = (),
    inputs: Sequence[TensorSpec] = (),
    dims: Sequence[Dim] = (),
) -> list[Candidate]:
    """Everything that can run these sources: each backend, device and thread count is a candidate.

    Args:
        sources: Artifacts, runs, models of ours, ``package.module:factory``, ``.onnx`` files.
        backends: Only these; names as in :func:`backend_names`. A backend that is asked for and has
            nothing to run gets a row with the reason.
        devices: "cpu", "cuda", "cuda:1"; by default the CPU, and the first GPU where there is one.
        threads: Thread counts to sweep; by default each backend's own choice.
        precisions: Of torch candidates; "fp32" by default.
        inputs: What to feed to an ``.onnx`` file that does not say it itself.
        dims: Ranges of such a file's free dimensions.

    Raises:
        UsageError: Unknown backend or device, or a source that is none of those.
        ArtifactError: A damaged artifact.
    """
    for name in backends:
        if name not in backend_names():
            raise unknown_name("backend", name, backend_names())
    for device in devices:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise UsageError(f"device {device!r}: write cpu, cuda or cuda:1")
    where = tuple(devices) or (("cpu", "cuda") if gpus() else ("cpu",))
    found: list[Candidate] = []
    for source in sources:
        several = len(sources) > 1
        choice = _Choice(tuple(backends), where, tuple(precisions) or ("fp32",), tuple(inputs), tuple(dims))
        for candidate in _of_source(source, choice):
            found += _with_threads(candidate, threads, source if several else "")
    found += [_nothing_to_run(name) for name in backends if not any(c.about["backend"] == name for c in found)]
    return _distinct(found)


class _Choice(NamedTuple):
    """What the user narrowed down, and what he says about files that do not say it themselves."""

    backends: tuple[str, ...]
    devices: tuple[str, ...]
    precisions: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    dims: tuple[Dim, ...]


def _of_source(source: str, choice: _Choice) -> Iterator[Candidate]:
    path = Path(source)
    if path.is_dir() and (path / MANIFEST).is_file():
        artifact = Artifact(path)
        for file in artifact.manifest.files:
            if file.format in FORMATS:  # packages hold the ONNX file once more
                yield from _of_file(file.format, file.precision, choice, artifact=artifact, file=file)
        return
    if path.is_file():
        kind = _SUFFIXES.get(path.suffix)
        if kind != "onnx":
            raise UsageError(
                f"{source}: only .onnx files can be measured alone; for others name the artifact that holds them"
            )
        rehearse(path)  # of unknown origin: a child process reads it first
        spec = onnx_spec(path, choice.inputs, choice.dims)
        yield from _of_file("onnx", _onnx_precision(path), choice, path=path, spec=spec)
        return
    if not path.exists() and not _FACTORY.match(source) and path.suffix in _SUFFIXES:
        raise UsageError(f"{source}: no such file")
    yield from _of_torch(source, choice)


def _of_file(
    kind: str,
    precision: str,
    choice: _Choice,
    *,
    artifact: Artifact | None = None,
    file: ArtifactFile | None = None,
    path: Path | None = None,
    spec: GeneratorSpec | None = None,
) -> Iterator[Candidate]:
    for backend in BACKENDS.names():
        runner = BACKENDS.load(backend).RUNNER
        if kind not in runner.formats or (choice.backends and backend not in choice.backends):
            continue
        reason = runner.unavailable() or ""
        usable = [d for d in choice.devices if d.partition(":")[0] in runner.devices]
        for device in usable or runner.devices[:1]:
            about: dict[str, Any] = {"backend": backend, "precision": precision, "device": device, "format": kind}
            arguments: dict[str, Any] = {"backend": backend, "device": device}
            if artifact is not None and file is not None:
                arguments |= {"artifact": str(artifact.path), "path": file.path, "settings": dict(file.settings)}
                about["file_bytes"] = file.bytes
            else:
                assert path is not None
                assert spec is not None
                arguments |= {"path": str(path), "spec": spec_to_json(spec)}
                about["file_bytes"] = path.stat().st_size
            factory = f"{_HERE}:{'open_artifact' if artifact is not None else 'open_file'}"
            name = backend if backend != "openvino" or kind == "openvino" else "openvino from onnx"
            yield Candidate(_name(name, precision, device), factory, arguments, about, unavailable=reason)


def _of_torch(source: str, choice: _Choice) -> Iterator[Candidate]:
    for device in choice.devices:
        modes = [m for m in TORCH_MODES if m in (choice.backends or _DEFAULT_MODES[device.partition(":")[0]])]
        for mode in modes:
            for precision in choice.precisions:
                about = {"backend": mode, "precision": precision, "device": device, "format": "torch"}
                arguments = {"source": source, "mode": mode, "device": device, "precision": precision}
                name = _name(mode, precision, device)
                yield Candidate(name, f"{_HERE}:open_torch", arguments, about, unavailable=_no_torch())


def _no_torch() -> str:
    from importlib.util import find_spec

    return "" if find_spec("torch") else "torch is not installed: pip install 'ganexport[export]'"


def _name(backend: str, precision: str, device: str) -> str:
    return f"{backend} {precision}" + ("" if device == "cpu" else f" {device}")


def _with_threads(candidate: Candidate, threads: Sequence[int], source: str) -> list[Candidate]:
    import msgspec

    about = {**candidate.about, **({"source": Path(source).name} if source else {})}
    if not threads or not str(candidate.about["device"]).startswith("cpu"):
        return [msgspec.structs.replace(candidate, about=about)]
    found = []
    for count in threads:
        arguments = dict(candidate.arguments)
        if candidate.factory.endswith(":open_torch"):
            arguments["threads"] = count
        else:
            arguments["settings"] = {**arguments.get("settings", {}), "threads": count}
        suffix = f" {count} thread{'s' if count > 1 else ''}" if len(threads) > 1 else ""
        found.append(
            msgspec.structs.replace(
                candidate,
                name=candidate.name + suffix,
                arguments=arguments,
                about={**about, "threads": count},
                variables={"OMP_NUM_THREADS": str(count)},
            )
        )
    return found


def _nothing_to_run(backend: str) -> Candidate:
    if backend in TORCH_MODES:
        why = "needs a run, a model or package.module:factory as a source, and only finished files were named"
    else:
        runner = BACKENDS.load(backend).RUNNER
        wanted = " or ".join(runner.formats)
        why = runner.unavailable() or f"no {wanted} file among the sources; make one with ganexport convert"
    return Candidate(backend, "", about={"backend": backend}, unavailable=why)


def _distinct(candidates: list[Candidate]) -> list[Candidate]:
    """Names that clash get their source in front, and a number when that does not tell them apart."""
    import msgspec

    names = [c.name for c in candidates]
    found: list[Candidate] = []
    taken: set[str] = set()
    for candidate in candidates:
        name = candidate.name
        if names.count(name) > 1 and candidate.about.get("source"):
            name = f"{candidate.about['source']}: {name}"
        base, number = name, 2
        while name in taken:
            name, number = f"{base} ({number})", number + 1
        taken.add(name)
        found.append(msgspec.structs.replace(candidate, name=name))
    return found


def onnx_spec(path: Path, inputs: Sequence[TensorSpec] = (), dims: Sequence[Dim] = ()) -> GeneratorSpec:
    """The spec of a lone ONNX file: from its metadata, else from its graph and what the user says.

    Raises:
        ArtifactError: Not a readable ONNX file.
        UsageError: Something that only the user can describe.
        MissingDependencyError: The package onnx is not installed.
    """
    from ganexport.build.onnx_file import derive_spec, load_model, read_spec

    model = load_model(path)
    return read_spec(model) or derive_spec(model, inputs, dims, path.stem)


def _onnx_precision(path: Path) -> str:
    """Precision of the arithmetic: int8 when the graph is quantised, else the dtype of most weights."""
    from ganexport.build.onnx_file import load_model

    model = load_model(path)
    if any(node.op_type in ("QLinearConv", "ConvInteger", "DequantizeLinear") for node in model.graph.node):
        return "int8"
    sizes: dict[int, int] = {}
    for tensor in model.graph.initializer:
        count = 1
        for size in tensor.dims:
            count *= size
        sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + count
    if not sizes:
        return "fp32"
    return {10: "fp16", 16: "bf16", 1: "fp32"}.get(max(sizes, key=lambda kind: sizes[kind]), "fp32")


def onnx_file_of(sources: Sequence[str]) -> Path | None:
    """The first fp32 ONNX file among the sources, to count operations in; None without one."""
    for source in sources:
        path = Path(source)
        if path.is_file() and path.suffix == ".onnx":
            return path
        if path.is_dir() and (path / MANIFEST).is_file():
            artifact = Artifact(path)
            try:
                return artifact.verified_path(artifact.find("onnx"))
            except ArtifactError:
                continue
    return None
