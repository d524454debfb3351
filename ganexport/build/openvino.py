"""ONNX to OpenVINO's intermediate representation (``.xml`` with its ``.bin``)."""

from __future__ import annotations

from pathlib import Path

from ganexport.artifact import writing
from ganexport.build.onnx_file import first_line, load_model
from ganexport.build.options import BuildOptions, Built, file_name
from ganexport.build.quantize import int8_weights
from ganexport.errors import ExportError, MissingDependencyError
from ganexport.spec import GeneratorSpec

#: Precisions of the ONNX file that the converter takes.
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


def unavailable() -> str | None:
    """Why OpenVINO files cannot be built here; None when they can."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        return "OpenVINO is not installed: pip install openvino"
    return None


def build(model: Path, spec: GeneratorSpec, folder: Path, precision: str, options: BuildOptions) -> Built:
    """Convert an ONNX file.

    Args:
        model: The ONNX file, already in the wanted precision.
        spec: The generator's spec.
        folder: Where to write.
        precision: Of the ONNX file; it only names the result.
        options: Nothing of it concerns this format.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        ExportError: OpenVINO cannot convert the graph.
    """
    if reason := unavailable():
        raise MissingDependencyError(reason)
    import openvino

    try:
        converted = openvino.convert_model(str(model))
    except Exception as error:  # noqa: BLE001 - the frontend raises RuntimeError and its own classes
        raise ExportError(f"OpenVINO {openvino.__version__} cannot convert {model.name}: {_reason(error)}") from None
    name = file_name("xml", precision)
    with writing(folder / name):
        # Weights stay as they are: compressing them to fp16 would change an fp32 file behind the user's back.
        openvino.save_model(converted, str(folder / name), compress_to_fp16=False)
    weights = name.removesuffix(".xml") + ".bin"
    version = openvino.__version__.split("-")[0]
    requires = {"openvino": version, **(int8_weights(load_model(model)) if precision == "int8" else {})}
    return Built(name, (weights,), requires, (f"openvino {version}",))


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line for line in lines if "error" in line.lower() or "unsupported" in line.lower() or "failed" in line.lower()
    ]
    return first_line((telling or lines or [type(error).__name__])[-1])
