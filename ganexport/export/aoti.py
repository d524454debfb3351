"""A prepared module to an AOTInductor package (``.pt2``): machine code for this kind of device."""

from __future__ import annotations

import platform
import shutil
import warnings
from pathlib import Path

import torch

from ganexport.build.options import BuildOptions, Built, file_name
from ganexport.errors import ExportError, MissingDependencyError
from ganexport.export.prepare.recurrent import refuse
from ganexport.export.prepared import Prepared

PRECISIONS = ("fp32",)


def export(
    prepared: Prepared, program: torch.export.ExportedProgram, folder: Path, precision: str, options: BuildOptions
) -> Built:
    """Compile the captured program.

    Args:
        prepared: The module and its spec.
        program: It, captured with symbolic dimensions.
        folder: Where to write.
        precision: "fp32".
        options: Nothing of it concerns this format.

    Raises:
        MissingDependencyError: No C++ compiler.
        ExportError: The compiler refuses the program.
    """
    if not any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++")):
        raise MissingDependencyError("AOTInductor compiles C++: install a compiler (g++), or use --to onnx")
    if reason := refuse(program, "AOTInductor"):
        raise ExportError(reason)
    from torch._inductor import aoti_compile_and_package

    name = file_name("pt2", precision)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            aoti_compile_and_package(program, package_path=str(folder / name))
    except Exception as error:  # noqa: BLE001 - inductor wraps whatever happened
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ExportError(f"AOTInductor cannot compile it: {(lines or [type(error).__name__])[0][:300]}") from None
    requires = {
        "torch": torch.__version__.partition("+")[0],
        "device": "cpu",
        "platform": f"{platform.system()}-{platform.machine()}".lower(),
    }
    return Built(name, (), requires, (f"aotinductor {requires['torch']}",))
