"""From what the user names to the candidates that are measured."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ganexport.artifact import FORMATS, MANIFEST, Artifact, ArtifactFile
from ganexport.bench.factories import TORCH_MODES
from ganexport.bench.lone import SUFFIXES, Said
from ganexport.build.rehearse import rehearse
from ganexport.environment import gpus
from ganexport.errors import ArtifactError, UsageError, unknown_name
from ganexport.measure.candidate import Candidate
from ganexport.measure.process import CandidateFailedError, WorkerProcess
from ganexport.runtime import BACKENDS
from ganexport.spec import Dim, GeneratorSpec, TensorSpec, spec_to_json

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "int8")
#: Suffixes of files that can be measured alone.
LONE = (".onnx", *SUFFIXES)
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")
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
    cores: Sequence[tuple[int, ...]] = (),
    inputs: Sequence[TensorSpec] = (),
    dims: Sequence[Dim] = (),
) -> list[Candidate]:
    """Everything that can run these sources: each backend, device and thread count is a candidate.

    Args:
        sources: Artifacts, runs, models of ours, ``package.module:factory``, files as in :data:`LONE`.
        backends: Only these; names as in :func:`backend_names`. A backend that is asked for and has
            nothing to run gets a row with the reason.
        devices: "cpu", "cuda", "cuda:1", and no other; by default the CPU, and the first GPU where there is one.
        threads: Thread counts to sweep; by default each backend's own choice.
        precisions: Of torch candidates; "fp32" by default. A single one is also what a lone file computes
            in that does not tell.
        cores: Sets of CPU cores, each its own candidates pinned to it; see :func:`parse_cores`.
        inputs: What to feed to a lone file that does not say it itself.
        dims: Ranges of such a file's free dimensions.

    Raises:
        UsageError: Unknown backend, precision or device, or a source that is none of those.
        ArtifactError: A damaged artifact.
    """
    for name in backends:
        if name not in backend_names():
            raise unknown_name("backend", name, backend_names())
    for name in precisions:
        if name not in PRECISIONS:
            raise unknown_name("precision", name, PRECISIONS)
    for device in devices:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise UsageError(f"device {device!r}: write cpu, cuda or cuda:1")
    where = tuple(devices) or (("cpu", "cuda") if gpus() else ("cpu",))
    found: list[Candidate] = []
    for source in sources:
        several = len(sources) > 1
        choice = _Choice(tuple(backends), where, bool(devices), tuple(precisions), tuple(inputs), tuple(dims))
        for candidate in _of_source(source, choice, sources):
            found += _with_threads(candidate, threads, source if several else "")
    found = _on_cores(found, cores)
    found += [_nothing_to_run(name, devices) for name in backends if not any(c.about["backend"] == name for c in found)]
    return _distinct(found)


class _Choice(NamedTuple):
    """What the user narrowed down, and what he says about files that do not say it themselves."""

    backends: tuple[str, ...]
    devices: tuple[str, ...]
    only: bool  # on those devices: asked for by name
    precisions: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    dims: tuple[Dim, ...]


def _of_source(source: str, choice: _Choice, sources: Sequence[str]) -> Iterator[Candidate]:
    path = Path(source)
    if path.is_dir() and (path / MANIFEST).is_file():
        artifact = Artifact(path)
        for file in artifact.manifest.files:
            if file.format in FORMATS:  # packages hold the ONNX file once more
                yield from _of_file(file.format, file.precision, choice, artifact=artifact, file=file)
        return
    if path.is_file() and path.suffix == ".onnx":
        rehearse(path)  # of unknown origin: a child process reads it first
        spec = onnx_spec(path, choice.inputs, choice.dims)
        yield from _of_file("onnx", _onnx_precision(path), choice, path=path, spec=spec)
        return
    if path.is_file() and path.suffix in SUFFIXES:
        yield from _of_lone(path, SUFFIXES[path.suffix], choice, sources)
        return
    if path.is_file():
        raise UsageError(f"{source}: not a file that can be measured alone; those are {', '.join(LONE)}")
    if not path.exists() and not _FACTORY.match(source) and path.suffix in LONE:
        raise UsageError(f"{source}: no such file")
    yield from _of_torch(source, choice)


def _of_lone(path: Path, kind: str, choice: _Choice, sources: Sequence[str]) -> Iterator[Candidate]:
    """Candidates of a file without a manifest; a process of its own opens it and says what it is."""
    declared = choice.precisions[0] if len(choice.precisions) == 1 else ""
    blank = GeneratorSpec((), ())
    for shell in _of_file(kind, declared or "fp32", choice, path=path, spec=blank):
        name = f"{shell.about['backend']} {path.name}" + (
            "" if shell.about["device"] == "cpu" else f" {shell.about['device']}"
        )
        candidate = msgspec.structs.replace(shell, name=name)
        if not candidate.unavailable:
            candidate = _described(candidate, kind, declared, _said(choice, sources))
        yield candidate


def _described(candidate: Candidate, kind: str, declared: str, said: Said) -> Candidate:
    path, device = candidate.arguments["path"], str(candidate.about["device"])
    arguments = {"path": path, "kind": kind, "device": device, "said": msgspec.to_builtins(said)}
    try:
        with WorkerProcess(Candidate(f"describe {path}", "")) as worker:
            found = worker.ask("call", 300, function="ganexport.bench.lone:describe", arguments=arguments)["value"]
    except CandidateFailedError as failure:
        if failure.kind == "refused":  # the user's to mend: a description, or another file
            raise UsageError(str(failure)) from None
        return msgspec.structs.replace(candidate, unavailable=str(failure))
    if "unavailable" in found:
        return msgspec.structs.replace(candidate, unavailable=found["unavailable"])
    about = {**candidate.about, "precision": declared or found["precision"] or "fp32"}
    filled = {**candidate.arguments, "spec": found["spec"], "requires": found["requires"]}
    return msgspec.structs.replace(candidate, arguments=filled, about=about)


def _said(choice: _Choice, sources: Sequence[str]) -> Said:
    """What the user says about a lone file, else what another source of the same benchmark knows."""
    known: GeneratorSpec | None = None
    for source in sources:
        path = Path(source)
        if path.is_dir() and (path / MANIFEST).is_file():
            known = Artifact(path).spec
        elif path.is_file() and path.suffix == ".onnx":
            known = onnx_spec(path, choice.inputs, choice.dims)
        if known is not None:
            break
    if known is None:
        return Said(choice.inputs, choice.dims)
    return Said(choice.inputs or known.inputs, choice.dims or known.dims, known.outputs)


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
        for device in usable if choice.only else usable or runner.devices[:1]:
            about: dict[str, Any] = {"backend": backend, "precision": precision, "device": device, "format": kind}
            arguments: dict[str, Any] = {"backend": backend, "device": device}
            if artifact is not None and file is not None:
                arguments |= {"artifact": str(artifact.path), "path": file.path, "settings": dict(file.settings)}
                about["file_bytes"] = artifact.bytes_of(file)
                about |= {name: value for name, value in file.settings.items() if name == "threads"}
            else:
                assert path is not None
                assert spec is not None
                arguments |= {"path": str(path), "spec": spec_to_json(spec)}
                weights = path.with_suffix(".bin")
                extra = weights.stat().st_size if kind == "openvino" and weights.is_file() else 0
                about["file_bytes"] = path.stat().st_size + extra
            factory = f"{_HERE}:{'open_artifact' if artifact is not None else 'open_file'}"
            name = backend if backend != "openvino" or kind == "openvino" else "openvino from onnx"
            yield Candidate(_name(name, precision, device), factory, arguments, about, unavailable=reason)


def _of_torch(source: str, choice: _Choice) -> Iterator[Candidate]:
    for device in choice.devices:
        modes = [m for m in TORCH_MODES if m in (choice.backends or _DEFAULT_MODES[device.partition(":")[0]])]
        for mode in modes:
            for precision in choice.precisions or ("fp32",):
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


def parse_cores(text: str) -> tuple[int, ...]:
    """Parse a set of cores, ``0-3,8``.

    >>> parse_cores("0-3,8")
    (0, 1, 2, 3, 8)

    Raises:
        UsageError: Not of that form, or cores that this process may not use.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None:
            raise UsageError(f"cores {text!r}: write numbers and ranges like 0-3,8")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("cores: this system cannot pin a process to cores")
    allowed = os.sched_getaffinity(0)
    if not found or found - allowed:
        raise UsageError(f"cores {text!r}: this process may use {', '.join(map(str, sorted(allowed)))}")
    return tuple(sorted(found))


def _on_cores(candidates: list[Candidate], cores: Sequence[tuple[int, ...]]) -> list[Candidate]:
    """Each candidate once a set of cores."""
    found = []
    for candidate in candidates if cores else ():
        for chosen in cores:
            words = ",".join(map(str, chosen))
            name = candidate.name + (f" cores {words}" if len(cores) > 1 else "")
            about = {**candidate.about, "cores": words}
            found.append(msgspec.structs.replace(candidate, name=name, about=about, cores=chosen))
    return found or candidates


def _nothing_to_run(backend: str, devices: Sequence[str]) -> Candidate:
    if backend in TORCH_MODES:
        why = "needs a run, a model or package.module:factory as a source, and only finished files were named"
    else:
        runner = BACKENDS.load(backend).RUNNER
        wanted = " or ".join(runner.formats)
        elsewhere = devices and not {d.partition(":")[0] for d in devices} & set(runner.devices)
        why = f"runs on {' or '.join(runner.devices)} alone, not on {' or '.join(devices)}" if elsewhere else ""
        why = why or runner.unavailable() or f"no {wanted} file among the sources; make one with ganexport convert"
    return Candidate(backend, "", about={"backend": backend}, unavailable=why)


def _distinct(candidates: list[Candidate]) -> list[Candidate]:
    """Names that clash get their source in front, and a number when that does not tell them apart."""
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
