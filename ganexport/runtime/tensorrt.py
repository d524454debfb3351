"""TensorRT 10, 11 and TensorRT-RTX through one code path; device memory through cuda.bindings, no torch."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import numpy as np

from ganexport.errors import ArtifactError, BackendUnavailableError
from ganexport.runtime import _cuda
from ganexport.runtime._dlpack import CUDA, Place
from ganexport.runtime.base import (
    Array,
    Feeds,
    Runner,
    Setting,
    Tensor,
    check_signature,
    device_index,
    first_line,
)
from ganexport.spec import GeneratorSpec

SETTINGS = {"cuda_graph": Setting(bool, "replay a captured CUDA graph for shapes seen before")}
#: Python module of each flavour and the package that brings it.
FLAVOURS = {"tensorrt": "tensorrt-cu13", "tensorrt_rtx": "tensorrt-rtx-cu13"}
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}
_DTYPES |= {"INT8": "int8", "UINT8": "uint8", "BOOL": "bool"}
#: Captured graphs kept, one a combination of shapes.
_GRAPHS = 16


def installed() -> dict[str, str]:
    """Version of each flavour that is installed, without importing it."""
    from importlib import metadata, util

    found = {}
    for flavour, package in FLAVOURS.items():
        if util.find_spec(flavour) is None:
            continue
        for name in (package, f"{package.removesuffix('-cu13')}-cu12", package.removesuffix("-cu13")):
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[flavour] = metadata.version(name)
                break
        else:
            with contextlib.suppress(Exception):
                found[flavour] = str(_import(flavour).__version__)
    return found


def _import(flavour: str) -> Any:
    import importlib

    try:
        return importlib.import_module(flavour)
    except Exception as error:  # noqa: BLE001 - a broken install fails with anything
        raise BackendUnavailableError(f"{flavour}: {first_line(error)}; pip install {FLAVOURS[flavour]}") from None


def preflight(path: Path, requires: Mapping[str, str], gpu: _cuda.Gpu | str, have: Mapping[str, str]) -> str:
    """Compare what an engine needs with what is here, before anything is loaded.

    Args:
        path: The engine, for the message.
        requires: ``flavour``, ``version``, ``platform`` and ``compute_capability`` of the manifest, any
            of them may be missing.
        gpu: The GPU it would run on, or why there is none.
        have: Installed flavours and their versions.

    Returns:
        The flavour to use.

    Raises:
        BackendUnavailableError: All that does not fit, both sides named, and the command that rebuilds it.
    """
    # From a manifest that anyone may have written: in a message every value is one line.
    requires = {key: " ".join(value.split()) for key, value in requires.items()}
    flavour = _flavour(requires, have)
    if flavour not in FLAVOURS:
        raise ArtifactError(f"{path}: unknown TensorRT flavour {flavour!r}; known: {', '.join(FLAVOURS)}")
    wrong = []
    here = ", ".join(f"{name} {version}" for name, version in have.items()) or "no TensorRT"
    version = requires.get("version", "")
    if flavour not in have:
        wrong.append(f"it was built by {flavour} {version}, here is {here} (pip install {FLAVOURS[flavour]})")
    elif version and not _same_version(version, have[flavour]):
        wrong.append(f"it was built by {flavour} {version}, here is {flavour} {have[flavour]}")
    machine = f"{platform.system()}-{platform.machine()}".lower()
    if requires.get("platform", machine) != machine:
        wrong.append(f"it was built for {requires['platform']}, this is {machine}")
    wanted = requires.get("compute_capability", "")
    if isinstance(gpu, str):
        wrong.append(f"it needs a GPU{f' of compute capability {wanted}' if wanted else ''}, here is {gpu}")
    elif wanted and not _capability_fits(wanted, gpu.capability):
        wrong.append(f"it was built for compute capability {wanted}, this {gpu.name} has {gpu.capability}")
    if wrong:
        raise BackendUnavailableError(
            f"{path}: this engine cannot run here: {'; '.join(wrong)}; rebuild it on the machine that runs it: "
            f"ganexport convert {path.parent} --to trt -o {path.parent}"
        )
    return flavour


def unsupported(trt: Any, gpu: _cuda.Gpu) -> str | None:
    """Why a TensorRT cannot run engines on a GPU; None when it can, as far as it says itself.

    TensorRT-RTX lists the compute capabilities that it has code for, and runs on newer ones too; Hopper (9.0) is not
    among those of 1.7, though its engines can be built there.
    """
    names = [name[2:] for name in dir(getattr(trt, "ComputeCapability", None)) if re.fullmatch(r"SM\d+", name)]
    known = sorted((int(name[:-1]), int(name[-1])) for name in names)
    major, _, minor = gpu.capability.partition(".")
    here = (int(major), int(minor or 0))
    if not known or here in known or here > known[-1]:
        return None
    listed = ", ".join(f"{a}.{b}" for a, b in known)
    return (
        f"{trt.__name__} {trt.__version__} has no code for compute capability {gpu.capability} ({gpu.name}), only for "
        f"{listed} and newer; install tensorrt-cu13, or use the ONNX file"
    )


def _flavour(requires: Mapping[str, str], have: Mapping[str, str]) -> str:
    """The one that built the engine; where the manifest does not say, the one that is here."""
    return requires.get("flavour") or next(iter(have), "tensorrt")


def _same_version(built: str, here: str) -> bool:
    """Whether an engine of one version loads in another: TensorRT wants them equal.

    The library and its package may write the same version with or without the build number.
    """
    left, right = built.split("."), here.split(".")
    shared = min(len(left), len(right))
    return shared >= 3 and left[:shared] == right[:shared]


def _capability_fits(wanted: str, actual: str) -> bool:
    """Whether "8.9,12.0" or "8.0+" admits a GPU."""

    def number(text: str) -> tuple[int, ...]:
        return tuple(int(part) if part.isdigit() else -1 for part in text.split("."))

    return any(
        number(actual) >= number(entry[:-1]) if entry.endswith("+") else entry == actual
        for entry in (part.strip() for part in wanted.split(","))
    )


class TensorRtRunner(Runner):
    """One engine with one execution context on one stream."""

    backend: ClassVar[str] = "tensorrt"
    formats: ClassVar[tuple[str, ...]] = ("trt",)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    settings: ClassVar[Mapping[str, Setting]] = SETTINGS

    def __init__(self, trt: Any, engine: Any, spec: GeneratorSpec, device: _cuda.Device, *, cuda_graph: bool) -> None:
        super().__init__()
        self.spec = spec
        self.device = f"cuda:{device.index}"
        self.runtime = f"{trt.__name__} {trt.__version__} on {_cuda.gpu(device.index).name}"
        self._engine, self._device = engine, device
        # TensorRT-RTX compiles for the shapes it meets and captures its graphs itself.
        self._own_graphs = cuda_graph and not hasattr(trt, "CudaGraphStrategy")
        self._context = _create_context(trt, engine, cuda_graph)
        self._profile = 0
        self._buffers: dict[str, tuple[int, int]] = {}  # name → address, capacity in bytes
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self._output_shapes: dict[str, tuple[int, ...]] = {}
        self._host: dict[str, Array] = {}  # inputs that the engine reads on the host
        self._graphs: dict[tuple[tuple[int, ...], ...], Any] = {}  # None: run once, not captured yet
        self._owners: tuple[Any, ...] = ()  # the engine's runtime and logger, which must outlive it
        host = trt.TensorLocation.HOST
        self._on_host = {t.name for t in spec.inputs if engine.get_tensor_location(t.name) == host}

    @classmethod
    def unavailable(cls) -> str | None:
        """Why engines cannot run here; None when they can."""
        if not installed():
            return "tensorrt: not installed (pip install 'ganexport[gpu]', or 'ganexport[rtx]' for TensorRT-RTX)"
        if reason := _cuda.unavailable():
            return reason
        # Whatever TensorRT there is besides RTX has code for every GPU that its driver still supports.
        return None if "tensorrt" in installed() else unsupported(_import("tensorrt_rtx"), _cuda.gpu(0))

    @classmethod
    def _open(
        cls,
        path: Path,
        spec: GeneratorSpec,
        device: str | None,
        settings: Mapping[str, Any],
        requires: Mapping[str, str],
    ) -> Self:
        """Deserialise an engine."""
        trt = _import(_flavour(requires, installed()))
        owner = _cuda.Device(device_index(device) or 0)
        if reason := unsupported(trt, _cuda.gpu(owner.index)):
            raise BackendUnavailableError(f"{path}: this engine cannot run here: {reason}")
        engine, owners = _deserialise(trt, path)
        inputs, outputs = _signature(trt, engine)
        check_signature(spec, inputs, outputs, path)
        runner = cls(trt, engine, spec, owner, cuda_graph=settings.get("cuda_graph", True))
        runner._owners = owners
        return runner

    @classmethod
    def preflight(cls, path: Path, requires: Mapping[str, str], device: str | None) -> None:
        """What the engine needs beside what is here: see :func:`preflight`."""
        preflight(path, requires, gpu_or_reason(device_index(device) or 0), installed())

    def prepare(self, feeds: Feeds) -> None:
        """Copy the inputs to the device; on new shapes, choose the profile and size the buffers."""
        self._device.select()
        shapes = tuple(feeds[tensor.name].shape for tensor in self.spec.inputs)
        if shapes != self._shapes:
            self._reshape(feeds)
            self._shapes = shapes
        for name, array in feeds.items():
            if name in self._on_host:
                np.copyto(self._host[name], array)
            else:
                self._device.to_device(self._buffers[name][0], array)

    def _reshape(self, feeds: Feeds) -> None:
        self._shapes = ()
        self._choose_profile({name: array.shape for name, array in feeds.items()})
        for name, array in feeds.items():
            if not self._context.set_input_shape(name, array.shape):
                raise ArtifactError(f"the engine does not take shape {list(array.shape)} for input {name!r}")
            if name in self._on_host:
                # TensorRT reads shape inputs while shapes are set, so the values must be there already.
                self._host[name] = array.copy()
                self._context.set_tensor_address(name, self._host[name].ctypes.data)
            else:
                self._context.set_tensor_address(name, self._buffer(name, array.nbytes))
        self._infer_shapes()
        self._output_shapes = {}
        for tensor in self.spec.outputs:
            shape = tuple(self._context.get_tensor_shape(tensor.name))
            if any(size < 0 for size in shape):
                raise ArtifactError(f"the shape of output {tensor.name!r} depends on the data: not supported")
            self._output_shapes[tensor.name] = shape
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
            self._context.set_tensor_address(tensor.name, self._buffer(tensor.name, size))

    def _infer_shapes(self) -> None:
        try:
            unknown = self._context.infer_shapes()
        except RuntimeError as error:
            raise ArtifactError(f"TensorRT cannot infer the output's shape: {first_line(error)}") from None
        if unknown:
            raise ArtifactError(f"TensorRT misses the shape or the values of {', '.join(unknown)}")

    def _choose_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for profile in range(self._engine.num_optimization_profiles):
            ranges = {name: self._engine.get_tensor_profile_shape(name, profile) for name in shapes}
            fits = all(
                all(low <= size <= high for low, size, high in zip(r[0], shapes[name], r[2], strict=False))
                for name, r in ranges.items()
            )
            if fits:
                if profile != self._profile:
                    self._context.set_optimization_profile_async(profile, int(self._device.stream))
                    self._profile = profile
                return
        wanted = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ArtifactError(f"no optimisation profile of this engine covers {wanted}; convert with a wider --dim")

    def _buffer(self, name: str, size: int) -> int:
        address, capacity = self._buffers.get(name, (0, -1))
        if size > capacity:
            self._device.synchronize()
            self._forget_graphs()  # they hold the old address
            if capacity >= 0:
                del self._buffers[name]
                self._device.free(address)
            address = self._device.allocate(size)
            self._buffers[name] = (address, size)
        return address

    def launch(self) -> None:
        """Put the engine's work on the stream."""
        if not self._own_graphs:
            self._enqueue()
            return
        key = self._shapes
        if key not in self._graphs:
            # The first run of a shape may allocate, which must not happen while capturing.
            self._enqueue()
            if len(self._graphs) < _GRAPHS:
                self._graphs[key] = None
        else:
            if self._graphs[key] is None:
                self._graphs[key] = self._device.capture(self._enqueue)
            self._device.replay(self._graphs[key])

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._device.stream)):
            raise ArtifactError("TensorRT refused to run the engine; run with a smaller batch or rebuild it")

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._device.synchronize()

    def fetch(self) -> dict[str, Array]:
        """Copy the outputs to the host."""
        outputs = {
            tensor.name: np.empty(self._output_shapes[tensor.name], tensor.dtype) for tensor in self.spec.outputs
        }
        for name, array in outputs.items():
            self._device.to_host(array, self._buffers[name][0])
        self._device.synchronize()
        return outputs

    def places(self) -> dict[str, Place]:
        """The engine's own output buffers."""
        where = (CUDA, self._device.index)
        return {
            tensor.name: Place(self._buffers[tensor.name][0], self._output_shapes[tensor.name], tensor.dtype, where)
            for tensor in self.spec.outputs
        }

    def _forget_graphs(self) -> None:
        for graph in self._graphs.values():
            if graph is not None:
                self._device.forget(graph)
        self._graphs = {}

    def close(self) -> None:
        """Free device memory, context and engine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._device.select()
            self._device.synchronize()
            self._forget_graphs()
            for address, _ in self._buffers.values():
                self._device.free(address)
            self._buffers = {}
            self._context = self._engine = None
            self._owners = ()
            self._device.close()


def gpu_or_reason(index: int) -> _cuda.Gpu | str:
    """The GPU of that number, or why there is none."""
    try:
        count = len(_cuda.gpus())
        return _cuda.gpu(index) if index < count else f"no GPU {index}, only {count}"
    except BackendUnavailableError as error:
        return f"no usable GPU ({error})"


def _deserialise(trt: Any, path: Path) -> tuple[Any, tuple[Any, ...]]:
    """The engine, and what must live as long as it."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps the last error, which TensorRT reports only here."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT."""
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = " ".join(message.split())[:300]

    log = Log()

    def refuse(reason: object) -> NoReturn:
        raise ArtifactError(f"{path}: {trt.__name__} {trt.__version__} cannot load this engine: {log.last or reason}")

    try:
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    except Exception as error:  # noqa: BLE001 - pybind raises TypeError when a factory returns null
        refuse(first_line(error))
    if engine is None:
        refuse("no reason given")
    return engine, (runtime, log)


def _create_context(trt: Any, engine: Any, cuda_graph: bool) -> Any:
    if hasattr(trt, "CudaGraphStrategy"):
        config = engine.create_runtime_config()
        strategy = trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if cuda_graph else strategy.DISABLED
        context = engine.create_execution_context(config)
    else:
        context = engine.create_execution_context()
    if context is None:
        raise BackendUnavailableError("TensorRT has not enough GPU memory for this engine")
    return context


def _signature(trt: Any, engine: Any) -> tuple[list[Tensor], list[Tensor]]:
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name).name
        shape = tuple(None if size < 0 else size for size in engine.get_tensor_shape(name))
        into = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        into.append(Tensor(name, _DTYPES.get(dtype, dtype.lower()), shape))
    return inputs, outputs


RUNNER = TensorRtRunner
