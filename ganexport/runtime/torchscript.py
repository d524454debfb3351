"""TorchScript files, on the CPU or CUDA. The only place, with aoti.py, where the runtime imports torch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from ganexport.errors import ArtifactError
from ganexport.runtime._torch import SETTINGS, TorchRunner, open_torch
from ganexport.runtime.base import Setting, first_line
from ganexport.spec import GeneratorSpec


class TorchScriptRunner(TorchRunner):
    """One scripted or traced module, in evaluation mode."""

    backend: ClassVar[str] = "torchscript"
    formats: ClassVar[tuple[str, ...]] = ("torchscript",)
    settings: ClassVar[Mapping[str, Setting]] = {
        **SETTINGS,
        "tf32": Setting(
            bool, "on CUDA: products of float32 as the process has set them, by default TF32 in convolutions"
        ),
    }

    @classmethod
    def _open(
        cls,
        path: Path,
        spec: GeneratorSpec,
        device: str | None,
        settings: Mapping[str, Any],
        requires: Mapping[str, str],
    ) -> Self:
        """A TorchScript file (it is code: its hash was checked first)."""
        torch, where = open_torch(device, settings)
        try:
            with warnings.catch_warnings():
                # torch deprecates TorchScript as a whole; who opens such a file has already chosen it.
                warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
                module = torch.jit.load(str(path), map_location=where).eval()
        except Exception as error:  # noqa: BLE001 - torch raises RuntimeError and others for damaged files
            raise ArtifactError(f"{path}: torch cannot load this TorchScript file: {first_line(error)}") from None
        # TF32 has fp16's mantissa: a file called fp32 must not use it behind the user's back.
        return cls(torch, module, spec, where, exact=where != "cpu" and not settings.get("tf32", False))


RUNNER = TorchScriptRunner
