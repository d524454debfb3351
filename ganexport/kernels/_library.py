"""Find and load the CUDA kernels' shared library, and keep the reason when that is not possible. Imports no torch."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import NamedTuple

FILE_NAME = "libganexport_kernels.so"
PATH_VARIABLE = "GANEXPORT_KERNELS_LIBRARY"
ABI_VERSION = 1


class Status(NamedTuple):
    """Whether the kernels' library is loaded.

    Attributes:
        available: The library is loaded (whether this machine has a GPU to run it is another question).
        path: The file that was loaded or refused; None when none was found.
        reason: Why it isn't available, in one line; empty when it is.
        architectures: What it was compiled for, such as ("90-real", "120-virtual"); empty when unavailable.
    """

    available: bool
    path: Path | None
    reason: str
    architectures: tuple[str, ...]


def candidates() -> list[Path]:
    """Where the library is looked for: the environment's file alone if it names one, else package, then build tree."""
    named = os.environ.get(PATH_VARIABLE)
    if named:
        return [Path(named)]
    package = Path(__file__).resolve().parent
    return [package / FILE_NAME, *_installed(package), package.parents[1] / "build" / FILE_NAME]


def _installed(package: Path) -> list[Path]:
    """An editable install keeps the library in site-packages while this file stays in the source tree."""
    import sysconfig

    installed = Path(sysconfig.get_path("platlib")) / "ganexport" / "kernels"
    return [installed / FILE_NAME] if installed != package else []


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, Status]:
    tried = candidates()
    path = next((candidate for candidate in tried if candidate.is_file()), None)
    if path is None:
        where = ", ".join(str(candidate.parent) for candidate in tried)
        named = f"{PATH_VARIABLE} names {tried[0]}, which does not exist" if os.environ.get(PATH_VARIABLE) else ""
        reason = named or (
            f"{FILE_NAME} was not built (looked in {where}): install with nvcc on PATH, "
            f"or run `cmake -S . -B build && cmake --build build`, or set {PATH_VARIABLE}"
        )
        return None, Status(False, None, reason, ())
    try:
        library = ctypes.CDLL(str(path))
        library.ganexport_kernels_abi_version.restype = ctypes.c_int
        library.ganexport_kernels_architectures.restype = ctypes.c_char_p
        version = library.ganexport_kernels_abi_version()
        compiled = library.ganexport_kernels_architectures().decode()
    except (OSError, AttributeError) as error:
        return None, Status(False, path, f"{path} cannot be loaded: {error}", ())
    if version != ABI_VERSION:
        reason = f"{path} has ABI version {version}, this ganexport needs {ABI_VERSION}: build it again"
        return None, Status(False, path, reason, ())
    return library, Status(True, path, "", tuple(compiled.split(",")))


def status() -> Status:
    """Whether the kernels' library could be loaded, and why not. Never raises."""
    return _load()[1]


def library() -> ctypes.CDLL | None:
    """The loaded library, or None (see :func:`status` for the reason)."""
    return _load()[0]
