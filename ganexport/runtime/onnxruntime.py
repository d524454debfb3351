"""ONNX Runtime: on the CPU, and on CUDA with inputs and outputs bound to device memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from ganexport.artifact import INT8_WEIGHTS
from ganexport.environment import quota_threads
from ganexport.errors import ArtifactError, BackendUnavailableError, UsageError
from ganexport.runtime._dlpack import CUDA as CUDA_DEVICE
from ganexport.runtime._dlpack import Place
from ganexport.runtime._onnxruntime_cuda import Binding, GraphBinding, can_graph
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

_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
SETTINGS = {
    "threads": Setting(int, "threads of one operator"),
    "spinning": Setting(bool, "threads wait by spinning: faster on idle cores, wasteful on shared ones"),
    "optimization": Setting(str, "graph optimisation", tuple(_LEVELS)),
    "tf32": Setting(bool, "on CUDA: products of float32 in TF32, faster and as exact as float16"),
    "cuda_graph": Setting(bool, "on CUDA: replay a captured CUDA graph for shapes seen before"),
    "nhwc": Setting(bool, "on CUDA: convolutions with channels last"),
}
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}
#: What the CUDA provider of a build for CUDA 12 or 13 needs, in the order of loading.
_CUDA_LIBRARIES = {
    "12": (
        "libcudart.so.12",
        "libcublasLt.so.12",
        "libcublas.so.12",
        "libcurand.so.10",
        "libcufft.so.11",
        "libcudnn.so.9",
    ),
    "13": (
        "libcudart.so.13",
        "libcublasLt.so.13",
        "libcublas.so.13",
        "libcurand.so.10",
        "libcufft.so.12",
        "libcudnn.so.9",
    ),
}
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


class OnnxRuntimeRunner(Runner):
    """One ``InferenceSession``."""

    backend: ClassVar[str] = "onnxruntime"
    formats: ClassVar[tuple[str, ...]] = ("onnx",)
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    settings: ClassVar[Mapping[str, Setting]] = SETTINGS

    def __init__(self, session: Any, spec: GeneratorSpec, cuda: int | None, *, graphs: bool = False) -> None:
        super().__init__()
        import onnxruntime

        self.spec = spec
        self.device = "cpu" if cuda is None else f"cuda:{cuda}"
        provider = CPU if cuda is None else CUDA
        self.runtime = f"onnxruntime {onnxruntime.__version__} {provider}"
        self._session = session
        self._cuda = cuda
        self._names = [output.name for output in session.get_outputs()]
        self._feeds: Mapping[str, Array] = {}
        self._outputs: list[Array] = []
        self._binding: Binding | GraphBinding | None = None
        if cuda is not None:
            self._binding = (
                GraphBinding(session, self._names, cuda, spec) if graphs else Binding(session, self._names, cuda)
            )

    @classmethod
    def unavailable(cls) -> str | None:
        """Why ONNX Runtime cannot be used; None when it can."""
        try:
            import onnxruntime
        except Exception as error:  # noqa: BLE001 - a broken install fails with anything
            missing = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
            reason = "not installed" if missing else first_line(error)
            return f"onnxruntime: {reason} (pip install 'ganexport[cpu]')"
        return None if hasattr(onnxruntime, "InferenceSession") else "onnxruntime: broken install, reinstall it"

    @classmethod
    def usable_devices(cls) -> tuple[str, ...]:
        """The CPU, and CUDA where this build has its provider and the machine a GPU."""
        import onnxruntime

        return super().usable_devices() if CUDA in onnxruntime.get_available_providers() else ("cpu",)

    @classmethod
    def _open(
        cls,
        path: Path,
        spec: GeneratorSpec,
        device: str | None,
        settings: Mapping[str, Any],
        requires: Mapping[str, str],
    ) -> Self:
        """An ONNX file. Without a device: CUDA where this build has it and a GPU."""
        cuda = _choose_cuda(device, device_index(device))
        graphs = cuda is not None and settings.get("cuda_graph", False)
        if graphs and not can_graph(spec):
            raise UsageError(
                f"{path}: setting cuda_graph needs outputs whose sizes follow from the inputs'; leave it off"
            )
        session = open_session(path, settings, cuda, narrow_weights=requires.get(INT8_WEIGHTS) == "7 bits")
        if cuda is not None and CUDA not in session.get_providers():
            raise BackendUnavailableError(f"onnxruntime could not start its {CUDA} here; use device cpu")
        check_signature(spec, signature(session.get_inputs()), signature(session.get_outputs()), path)
        return cls(session, spec, cuda, graphs=graphs)

    def run_checked(self, checked: Mapping[str, Array]) -> dict[str, Array]:
        """Sessions on the CPU are thread-safe: calls run side by side, without a lock."""
        if self._cuda is not None:
            return super().run_checked(checked)
        session = self._session
        if session is None:
            raise UsageError("this generator is closed")
        return dict(zip(self._names, self._call(session, checked), strict=True))

    def _call(self, session: Any, feeds: Mapping[str, Array]) -> list[Array]:
        try:
            outputs: list[Array] = session.run(self._names, feeds)
        except Exception as error:  # noqa: BLE001 - the binding raises many classes of its own
            raise _run_error(error) from None
        return outputs

    def prepare(self, feeds: Feeds) -> None:
        """On CUDA: copy the inputs to the device and bind them."""
        self._feeds = dict(feeds)
        if self._binding is None:
            return
        try:
            self._binding.prepare(feeds)
        except Exception as error:  # noqa: BLE001 - as in _call
            raise _run_error(error) from None

    def launch(self) -> None:
        """Run the session on what was prepared."""
        if self._binding is None:
            self._outputs = self._call(self._session, self._feeds)
            return
        try:
            self._binding.launch()
        except Exception as error:  # noqa: BLE001 - as in _call
            raise _run_error(error) from None

    def synchronize(self) -> None:
        """Wait for the device (the CPU is done when ``launch`` returns)."""
        if self._binding is not None:
            self._binding.synchronize()

    def fetch(self) -> dict[str, Array]:
        """The outputs of the last launch."""
        outputs = self._outputs if self._binding is None else self._binding.fetch()
        return dict(zip(self._names, outputs, strict=True))

    def places(self) -> dict[str, Place]:
        """On CUDA: the bound outputs in device memory."""
        if self._binding is None:
            return super().places()
        assert self._cuda is not None
        found = {}
        for name, value in zip(self._names, self._binding.values(), strict=True):
            dtype = _DTYPES.get(value.data_type(), value.data_type().removeprefix("tensor(").removesuffix(")"))
            found[name] = Place(value.data_ptr(), tuple(value.shape()), dtype, (CUDA_DEVICE, self._cuda), value)
        return found

    def close(self) -> None:
        """Drop the session."""
        self._closed = True
        self._session = self._binding = None
        self._feeds, self._outputs = {}, []


def signature(nodes: Any) -> list[Tensor]:
    """A session's inputs or outputs."""
    return [
        Tensor(
            node.name,
            _DTYPES.get(node.type, node.type.removeprefix("tensor(").removesuffix(")")),
            tuple(size if isinstance(size, int) and size >= 0 else None for size in node.shape),
        )
        for node in nodes
    ]


def _choose_cuda(device: str | None, wanted: int | None) -> int | None:
    import onnxruntime

    built_with_cuda = CUDA in onnxruntime.get_available_providers()
    if wanted is not None and not built_with_cuda:
        raise BackendUnavailableError(
            f"device {device}: this onnxruntime {onnxruntime.__version__} has no {CUDA}; "
            "pip install onnxruntime-gpu in its place, or use device cpu"
        )
    if wanted is None and device is None and built_with_cuda:
        from ganexport.runtime import _cuda

        return 0 if _cuda.unavailable() is None else None
    return wanted


def open_session(path: Path, settings: Mapping[str, Any], cuda: int | None, *, narrow_weights: bool = False) -> Any:
    """An ``InferenceSession`` for a file.

    Args:
        path: The ONNX file.
        settings: Some of :data:`SETTINGS`.
        cuda: Number of the GPU; None for the CPU.
        narrow_weights: Its int8 weights are known to have 7 bits.

    Raises:
        ArtifactError: ONNX Runtime refuses it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; warnings on stderr are not for the user
    if (threads := settings.get("threads", quota_threads())) is not None:
        options.intra_op_num_threads = threads
    if "spinning" in settings:
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(settings["spinning"])))
    if cuda is not None:
        preload_cuda()
    level = _LEVELS[settings.get("optimization", "all")]
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    providers: list[Any] = [CPU] if cuda is None else [(CUDA, _cuda_options(settings, cuda)), CPU]
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        if cuda is None and not narrow_weights:
            return exact_session(str(path), options)
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # noqa: BLE001 - the binding raises many classes of its own
        raise ArtifactError(f"{path}: ONNX Runtime cannot load it: {_reason(error)}") from None


def exact_session(model: str | bytes, options: Any) -> Any:
    """A session on the CPU whose int8 products do not overflow, whatever the processor.

    Without VNNI they do with 8-bit weights unless that is asked for; with it, nothing changes. Where weights meet two
    layers, ONNX Runtime (1.32) stumbles over its own conversion of them: those files compute in float what int8 means.

    Args:
        model: Path or content of an ONNX file.
        options: ``SessionOptions``; changed.

    Raises:
        Exception: Whatever ONNX Runtime raises over the file.
    """
    import onnxruntime

    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(model, options, providers=[CPU])
    except Exception as error:
        if "AddInitializedOrtValue" not in str(error):
            raise
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(model, options, providers=[CPU])


def _cuda_options(settings: Mapping[str, Any], cuda: int) -> dict[str, Any]:
    # TF32 has fp16's mantissa: a file called fp32 must not use it behind the user's back.
    return {
        "device_id": cuda,
        "use_tf32": int(settings.get("tf32", False)),
        "enable_cuda_graph": int(settings.get("cuda_graph", False)),
        "prefer_nhwc": int(settings.get("nhwc", False)),
    }


@functools.cache
def preload_cuda() -> tuple[str, ...]:
    """Load the CUDA libraries of pip's ``nvidia-*`` packages, which ONNX Runtime needs and the loader cannot find.

    ``onnxruntime.preload_dlls`` looks beside its own package only; these may lie in another folder of ``sys.path``.

    Returns:
        Names of what was loaded; libraries that are nowhere among the packages are left to the system's loader.
    """
    import onnxruntime

    major = str(getattr(onnxruntime, "cuda_version", "") or "").partition(".")[0]
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    loaded = []
    for name in _CUDA_LIBRARIES.get(major, ()):
        for path in (path for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path))
                loaded.append(name)
                break
    return tuple(loaded)


def _reason(error: BaseException) -> str:
    text = first_line(error)
    if found := re.search(r"Could not find an implementation for (\w+)\(", text):
        return f"it has no {found.group(1)} for the dtype asked of it here (float64? declare the inputs as float32)"
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from … failed:Protobuf parsing failed."
    return text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text


def _run_error(error: BaseException) -> Exception:
    text = str(error)
    if isinstance(error, MemoryError) or "bad_alloc" in text or "Failed to allocate memory" in text:
        return BackendUnavailableError("out of memory while running; use a smaller batch size")
    return ArtifactError(f"ONNX Runtime failed while running: {_reason(error)}")


RUNNER = OnnxRuntimeRunner
