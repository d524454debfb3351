"""A lone ONNX file is first opened in a child process with limits on memory and time.

A file without a manifest can come from anywhere: one that crashes, hangs or exhausts the runtime
must not take the service that opens it along. The child also reports what is needed to derive a spec.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from ganexport.errors import ArtifactError, BackendUnavailableError, GanExportError, UsageError
from ganexport.seeding import TRUNCATION, batched
from ganexport.spec import BATCH, Constant, Dim, GeneratorSpec, Normal, TensorSpec, spec_from_json

SPEC_KEY = "ganexport.spec"
TIME_LIMIT_S = 120
#: Data beyond a multiple of the file: libraries, thread stacks, optimised copies of the weights.
MEMORY_BASE = 6 << 30
MEMORY_FACTOR = 8
#: Ranges of dimensions about which the file says nothing.
FREE_BATCH = Dim(BATCH, 1, 8, 1024)
FREE_SIZE = (1, 64, 8192)


class Port(msgspec.Struct, frozen=True):
    """One input or output: sizes are numbers, names, or None where the file gives neither."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Description(msgspec.Struct, frozen=True):
    """What the child saw; ``error`` is set when the runtime refused the file."""

    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    metadata: dict[str, str] = {}
    producers: dict[str, str] = {}
    error: str = ""


def probe(path: Path, backend: str) -> GeneratorSpec:
    """Open a file in a child process, and return the spec in its metadata or one derived from its graph.

    Args:
        path: The ONNX file.
        backend: "onnxruntime" or "openvino".

    Raises:
        ArtifactError: The runtime refuses it, crashes, or exceeds the limits.
    """
    found = describe(path, backend)
    if SPEC_KEY in found.metadata:
        try:
            return spec_from_json(found.metadata[SPEC_KEY])
        except UsageError as error:
            raise ArtifactError(f"{path}: its metadata {SPEC_KEY}: {error}") from None
    try:
        return derive_spec(found, path.stem)
    except UsageError as error:
        raise ArtifactError(
            f"{path}: {error}; describe it with: ganexport convert {path} --to onnx --input …"
        ) from None


def describe(path: Path, backend: str) -> Description:
    """What a child process sees in the file."""
    answer = in_child("ganexport.runtime._probe", path, (backend,), backend)
    try:
        found = msgspec.json.decode(answer, type=Description)
    except msgspec.DecodeError:
        raise ArtifactError(f"{path}: {backend} broke off while loading it") from None
    if found.error:
        raise ArtifactError(found.error)
    return found


def in_child(module: str, path: Path, arguments: tuple[str, ...], what: str) -> bytes:
    """Run ``python -m module path arguments…`` with limits; the last line that it prints.

    Args:
        module: Its ``main`` calls :func:`limit_memory` first and prints its answer last.
        path: The file under suspicion.
        arguments: What else the module is told.
        what: Who opens the file, for messages.

    Raises:
        ArtifactError: It crashed, hung, or exceeded its memory.
        BackendUnavailableError: No process can be started.
    """
    if not sys.executable:
        raise BackendUnavailableError("no Python executable to check a lone ONNX file with: load an artifact instead")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }
    command = [sys.executable, "-P", "-m", module, str(path.absolute()), *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=TIME_LIMIT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ArtifactError(f"{path}: {what} did not finish loading it within {TIME_LIMIT_S} s") from None
    except OSError as error:
        raise BackendUnavailableError(f"cannot start a process to check {path}: {error.strerror}") from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
        raise ArtifactError(f"{path}: {what} crashed or ran out of memory while loading it ({how})") from None
    return lines[-1]


def derive_spec(found: Description, name: str) -> GeneratorSpec:
    """A spec from a graph alone: free first axes are the batch, floating-point vectors are drawn from N(0, 1).

    Raises:
        UsageError: A tensor whose name or dtype a spec cannot hold.
    """
    symbols: dict[str, Dim] = {}
    inputs = [_derive(port, symbols) for port in found.inputs]
    inputs = [_with_sampler(tensor) for tensor in inputs]
    outputs = [_as_image(_derive(port, symbols), found.producers.get(port.name, "")) for port in found.outputs]
    used = {size for tensor in inputs for size in tensor.shape}
    dims = tuple(dim for dim in symbols.values() if dim.name in used)
    clean = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    return batched(GeneratorSpec(tuple(inputs), tuple(outputs), dims, clean))


def _derive(port: Port, symbols: dict[str, Dim]) -> TensorSpec:
    shape: list[int | str] = []
    for axis, size in enumerate(port.shape):
        if isinstance(size, int):
            shape.append(size)
            continue
        if axis == 0:
            symbols.setdefault(BATCH, FREE_BATCH)
            shape.append(BATCH)
            continue
        label = size if size and size != BATCH else f"{port.name}_{axis}"
        label = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in label)
        label = label if label[:1].isalpha() or label[:1] == "_" else f"_{label}"
        symbols.setdefault(label, Dim(label, *FREE_SIZE))
        shape.append(label)
    return TensorSpec(port.name, port.dtype, tuple(shape))


def _with_sampler(tensor: TensorSpec) -> TensorSpec:
    """Latents are drawn; pictures, labels and everything else that only the user knows is to be fed."""
    if not tensor.dtype.startswith("float"):
        return tensor
    if tensor.name == TRUNCATION or not tensor.shape:
        sampler = Constant(1.0) if tensor.name == TRUNCATION else None
        return msgspec.structs.replace(tensor, sampler=sampler)
    picture = len(tensor.shape) == 4 and tensor.shape[1] in (1, 3, 4) and tensor.shape[2:] != (1, 1)
    return tensor if picture else msgspec.structs.replace(tensor, sampler=Normal())


def _as_image(tensor: TensorSpec, producer: str) -> TensorSpec:
    """The layout of what looks like a picture, and its range where the last operator leaves no doubt."""
    if len(tensor.shape) != 4 or tensor.dtype not in ("float32", "float16", "uint8"):
        return tensor
    layout = "NCHW" if tensor.shape[1] in (1, 3, 4) else "NHWC" if tensor.shape[3] in (1, 3, 4) else None
    known = {"Tanh": (-1.0, 1.0), "Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0)}
    values = (0.0, 255.0) if tensor.dtype == "uint8" else known.get(producer)
    return msgspec.structs.replace(tensor, layout=layout, range=values if layout else None)


# ---- the child ------------------------------------------------------------------------------------


def limit_memory(path: Path) -> None:
    """Cap this process's memory by the file's size (its external weights included), and write no core.

    Data is what is counted, not addresses: CUDA's driver reserves more of those than there is memory.
    Systems that know no such limit are left without.
    """
    try:
        import resource
    except ImportError:
        return
    siblings = sum(p.stat().st_size for p in path.parent.glob(path.name + "*") if p.is_file())
    limit = MEMORY_BASE + MEMORY_FACTOR * siblings
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _look(path: Path, backend: str) -> Description:
    from ganexport.runtime._onnx_file import metadata_and_producers

    metadata, producers = metadata_and_producers(path)
    wanted = {SPEC_KEY: metadata[SPEC_KEY]} if SPEC_KEY in metadata else {}
    if backend == "openvino":
        from ganexport.runtime.openvino import compile_model, signature

        compiled = compile_model(path, {"threads": 1})
        ports = [[Port(*tensor) for tensor in signature(side)] for side in (compiled.inputs, compiled.outputs)]
    else:
        from ganexport.runtime.onnxruntime import open_session
        from ganexport.runtime.onnxruntime import signature as nodes_of

        session = open_session(path, {"threads": 1}, None)
        ports = []
        for side in (session.get_inputs(), session.get_outputs()):
            shapes = [tuple(s if isinstance(s, str) or (s or -1) >= 0 else None for s in node.shape) for node in side]
            ports.append([Port(t.name, t.dtype, s) for t, s in zip(nodes_of(side), shapes, strict=True)])
    return Description(tuple(ports[0]), tuple(ports[1]), wanted, producers)


def main() -> None:
    """Print the description of a file as one line of JSON."""
    path, backend = Path(sys.argv[1]), sys.argv[2]
    limit_memory(path)
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not the answer
    try:
        found = _look(path, backend)
    except GanExportError as error:
        found = Description(error=" ".join(str(error).split()))
    except MemoryError:
        found = Description(error=f"{path}: {backend} ran out of memory while loading it")
    os.write(answers, msgspec.json.encode(found) + b"\n")


if __name__ == "__main__":
    main()
