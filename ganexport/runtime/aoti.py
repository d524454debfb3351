"""AOTInductor packages (.pt2), on the device they were compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from ganexport.errors import ArtifactError, BackendUnavailableError
from ganexport.runtime._torch import TorchRunner, open_torch
from ganexport.runtime.base import first_line
from ganexport.spec import GeneratorSpec


class AotiRunner(TorchRunner):
    """One compiled package."""

    backend: ClassVar[str] = "aoti"
    formats: ClassVar[tuple[str, ...]] = ("aoti",)

    @classmethod
    def _open(
        cls,
        path: Path,
        spec: GeneratorSpec,
        device: str | None,
        settings: Mapping[str, Any],
        requires: Mapping[str, str],
    ) -> Self:
        """A package (it is machine code: its hash was checked first), on the kind of device it was compiled for."""
        built_for = requires.get("device", "cpu")
        if device is not None and device.partition(":")[0] != built_for.partition(":")[0]:
            raise BackendUnavailableError(f"device {device}: {path} was compiled for {built_for}; convert again on it")
        torch, where = open_torch(device or built_for, settings)
        built_by = requires.get("torch", "")
        if built_by and built_by.partition("+")[0] != torch.__version__.partition("+")[0]:
            raise BackendUnavailableError(
                f"{path}: compiled by torch {built_by}, here is torch {torch.__version__}; rebuild it: "
                f"ganexport convert SOURCE --to aoti -o {path.parent}"
            )
        try:
            from torch._inductor import aoti_load_package

            package = aoti_load_package(str(path))
        except Exception as error:  # noqa: BLE001 - torch raises RuntimeError and others for damaged files
            raise ArtifactError(f"{path}: torch cannot load this package: {first_line(error)}") from None
        return cls(torch, package, spec, where)


RUNNER = AotiRunner
