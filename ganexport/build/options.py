"""What a builder may be told, the same object for every format."""

from __future__ import annotations

from pathlib import Path

import msgspec

#: ONNX opset of exported modules unless asked otherwise.
OPSET = 20


class BuildOptions(msgspec.Struct, frozen=True):
    """Options of the builders; a format ignores none of those that it names in its documentation.

    Attributes:
        opset: ONNX opset to export a module with; :data:`OPSET` when not said.
        builder_level: TensorRT's effort, 0 (fastest build) to 5 (fastest engine); None for its default.
        workspace_mb: TensorRT's scratch memory limit in MiB; None for its default.
        timing_cache: File in which TensorRT keeps its measurements between builds.
        version_compatible: Build an engine that later TensorRT versions of the same major load.
        hardware_compatible: Build an engine that later GPU generations load (TensorRT 10: Ampere+).
        compute_capabilities: Target GPUs of TensorRT-RTX, e.g. ("8.9", "12.0"); empty for all.
        calibration_samples: Inputs drawn to calibrate int8.
        keep_fp32: Names or operator types of ONNX nodes that stay in fp32.
    """

    opset: int | None = None
    builder_level: int | None = None
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()
    calibration_samples: int = 64
    keep_fp32: tuple[str, ...] = ()

    def only_for_tensorrt(self) -> tuple[str, ...]:
        """Options, by their names on the command line, that were said and that no other builder reads."""
        said = {
            "--builder-level": self.builder_level is not None,
            "--workspace": self.workspace_mb is not None,
            "--timing-cache": self.timing_cache is not None,
            "--version-compatible": self.version_compatible,
            "--hardware-compatible": self.hardware_compatible,
            "--compute-capability": bool(self.compute_capabilities),
        }
        return tuple(name for name, was in said.items() if was)


class Built(msgspec.Struct, frozen=True):
    """What a builder left in the artifact's folder.

    Attributes:
        path: The file, relative to the folder.
        companions: Files that belong to it, relative to the folder.
        requires: What a machine needs to run it.
        passes: Named steps that led to it.
        notes: Facts about the build for the certificate.
    """

    path: str
    companions: tuple[str, ...] = ()
    requires: dict[str, str] = {}
    passes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def file_name(extension: str, precision: str) -> str:
    """``generator.onnx``, ``generator.fp16.onnx``: fp32 is the plain name."""
    return f"generator.{extension}" if precision == "fp32" else f"generator.{precision}.{extension}"
