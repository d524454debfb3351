"""OpenVINO on the CPU: its own format, and ONNX files as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from ganexport.artifact import INT8_WEIGHTS
from ganexport.environment import int8_overflows, quota_threads
from ganexport.errors import ArtifactError, BackendUnavailableError
from ganexport.runtime._dlpack import Place, place
from ganexport.runtime.base import (
    Array,
    Feeds,
    Runner,
    Setting,
    Tensor,
    check_signature,
    first_line,
)
from ganexport.spec import GeneratorSpec, TensorSpec

SETTINGS = {
    "threads": Setting(int, "threads of the engine"),
    "streams": Setting(int, "requests computed side by side"),
    "precision": Setting(str, "arithmetic of the engine", ("f32", "bf16")),
}
_DTYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "bf16": "bfloat16", "boolean": "bool"}
_DTYPES |= {"i64": "int64", "i32": "int32", "u8": "uint8", "i8": "int8"}


class OpenVinoRunner(Runner):
    """One compiled model with one inference request."""

    backend: ClassVar[str] = "openvino"
    formats: ClassVar[tuple[str, ...]] = ("openvino", "onnx")
    settings: ClassVar[Mapping[str, Setting]] = SETTINGS

    def __init__(self, compiled: Any, spec: GeneratorSpec) -> None:
        super().__init__()
        import openvino

        self.spec = spec
        self.device = "cpu"
        self.runtime = f"openvino {openvino.__version__.split('-')[0]} CPU"
        self._openvino = openvino
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._inputs = {_name(port, spec.inputs): port for port in compiled.inputs}
        self._outputs = {_name(port, spec.outputs): port for port in compiled.outputs}
        self._held: list[Any] = []

    @classmethod
    def unavailable(cls) -> str | None:
        """Why OpenVINO cannot be used; None when it can."""
        try:
            import openvino
        except Exception as error:  # noqa: BLE001 - a broken install fails with anything
            missing = isinstance(error, ModuleNotFoundError) and error.name == "openvino"
            return f"openvino: {'not installed' if missing else first_line(error)} (pip install 'ganexport[cpu]')"
        return None if hasattr(openvino, "Core") else "openvino: broken install, reinstall it"

    @classmethod
    def preflight(cls, path: Path, requires: Mapping[str, str], device: str | None) -> None:
        """As :meth:`Runner.preflight`; int8 files whose numbers would overflow on this processor are refused."""
        super().preflight(path, requires, device)
        if requires.get(INT8_WEIGHTS) == "8 bits" and int8_overflows() is not False:
            this = "like this one" if int8_overflows() else "(this one does not tell)"
            raise BackendUnavailableError(
                f"{path.name} has int8 weights of 8 bits, which overflow in OpenVINO on a processor without VNNI "
                f"{this}: the pictures would be wrong; convert with --precision int8 here, which makes 7-bit weights"
            )

    @classmethod
    def _open(
        cls,
        path: Path,
        spec: GeneratorSpec,
        device: str | None,
        settings: Mapping[str, Any],
        requires: Mapping[str, str],
    ) -> Self:
        """An ``.xml`` (with its ``.bin``) or an ``.onnx``."""
        compiled = compile_model(path, settings)
        check_signature(spec, signature(compiled.inputs, spec.inputs), signature(compiled.outputs, spec.outputs), path)
        return cls(compiled, spec)

    def prepare(self, feeds: Feeds) -> None:
        """Hand the arrays over; they are read in place."""
        held = []
        for name, array in feeds.items():
            owned = array if array.flags.writeable else array.copy()  # it shares writable memory only
            tensor = self._openvino.Tensor(owned, shared_memory=True)
            self._request.set_tensor(self._inputs[name], tensor)
            held.append((owned, tensor))
        self._held = held

    def launch(self) -> None:
        """Start the request."""
        self._request.start_async()

    def synchronize(self) -> None:
        """Wait for the request."""
        try:
            self._request.wait()
        except Exception as error:  # noqa: BLE001 - the binding raises RuntimeError and its own classes
            raise ArtifactError(f"OpenVINO failed while running: {_reason(error)}") from None

    def fetch(self) -> dict[str, Array]:
        """Copies of the outputs, which the request otherwise overwrites."""
        return {name: np.array(self._request.get_tensor(port).data) for name, port in self._outputs.items()}

    def places(self) -> dict[str, Place]:
        """The request's own output tensors."""
        return {name: place(self._request.get_tensor(port).data) for name, port in self._outputs.items()}

    def close(self) -> None:
        """Drop the compiled model."""
        with self._lock:
            self._closed = True
            self._request = self._compiled = None
            self._inputs, self._outputs, self._held = {}, {}, []


def compile_model(path: Path, settings: Mapping[str, Any]) -> Any:
    """A model compiled for the CPU, in fp32 arithmetic unless asked otherwise.

    Raises:
        ArtifactError: OpenVINO cannot read or compile it.
    """
    import openvino

    config: dict[str, Any] = {
        # Some processors would silently compute in bf16.
        "INFERENCE_PRECISION_HINT": settings.get("precision", "f32"),
        "PERFORMANCE_HINT": "LATENCY",
    }
    if (threads := settings.get("threads", quota_threads())) is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    if "streams" in settings:
        config["NUM_STREAMS"] = settings["streams"]
        del config["PERFORMANCE_HINT"]
    try:
        return openvino.Core().compile_model(str(path), "CPU", config)
    except Exception as error:  # noqa: BLE001 - the frontends raise RuntimeError and their own classes
        raise ArtifactError(f"{path}: OpenVINO cannot load it: {_reason(error)}") from None


def _name(port: Any, wanted: Sequence[TensorSpec] = ()) -> str:
    """The port's name: the spec's where it is one of several (tensors that the compiler merged keep all names)."""
    names: set[str] = port.get_names()
    known = [tensor.name for tensor in wanted if tensor.name in names]
    return known[0] if known else str(port.get_any_name())


def signature(ports: Any, wanted: Sequence[TensorSpec] = ()) -> list[Tensor]:
    """A model's inputs or outputs; ``wanted`` says which of a merged tensor's names counts."""
    return [
        Tensor(
            _name(port, wanted),
            _DTYPES.get(port.get_element_type().get_type_name(), port.get_element_type().get_type_name()),
            tuple(None if size.is_dynamic else size.get_length() for size in port.get_partial_shape()),
        )
        for port in ports
    ]


def _reason(error: BaseException) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    # The first lines say where in OpenVINO's own source a check failed; the last ones say what.
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return first_line((telling or lines or [type(error).__name__])[0])


RUNNER = OpenVinoRunner
