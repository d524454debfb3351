"""Run the files of an artifact under construction, on whatever backend this machine has for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ganexport.errors import BackendUnavailableError, GanExportError
from ganexport.runtime import BACKENDS
from ganexport.runtime.base import Runner
from ganexport.spec import GeneratorSpec

#: Format → the backend that certifies it. A bf16 ONNX file is certified by OpenVINO: ONNX Runtime's
#: CPU has no bf16 convolution.
CERTIFIER = {
    "onnx": "onnxruntime",
    "trt": "tensorrt",
    "openvino": "openvino",
    "torchscript": "torchscript",
    "aoti": "aoti",
}


def open_engine(
    path: Path,
    spec: GeneratorSpec,
    format: str,  # noqa: A002 - the field's word
    precision: str,
    requires: Mapping[str, str] | None = None,
) -> Runner:
    """A runner for one file.

    Raises:
        BackendUnavailableError: This machine cannot run it; the reason is in the message.
        ArtifactError: The file is damaged.
    """
    backend = "openvino" if format == "onnx" and precision == "bf16" else CERTIFIER[format]
    runner = BACKENDS.load(backend).RUNNER
    if reason := runner.unavailable():
        raise BackendUnavailableError(reason)
    settings: dict[str, Any] = {}
    # Certified where files run everywhere: a GPU's TF32 convolutions are not the fp32 of the table.
    device = "cpu" if backend == "onnxruntime" else None
    opened = runner.open(path, spec, device=device, settings=settings, requires=requires)
    assert isinstance(opened, Runner)
    return opened


def why_not(error: GanExportError) -> str:
    """A backend's refusal as a clause of a certificate's note."""
    return str(error).split("; ")[0]
