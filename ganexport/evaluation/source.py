"""Open whatever makes images: an artifact, a lone ONNX file, a training run or a shipped model."""

from __future__ import annotations

import os
from pathlib import Path

from ganexport.artifact import MANIFEST
from ganexport.errors import UsageError
from ganexport.runtime.generator import Generator, load


def open_generator(source: str | os.PathLike[str], backend: str | None = None, device: str | None = None) -> Generator:
    """A generator of images from any source.

    Args:
        source: An artifact's folder, an ``.onnx`` file, a training run, or a shipped model's name.
        backend: For artifacts and ONNX files: the runtime; "eager" or None for a run.
        device: "cpu", "cuda" or "cuda:1"; None for the backend's best (the CPU for a run).

    Raises:
        GanExportError: Nothing there, or it cannot be opened here; the message says why.
    """
    path = Path(source)
    if path.is_file() or (path / MANIFEST).is_file():
        return load(path, backend, device)
    if backend not in (None, "eager"):
        raise UsageError(f"{source}: a run is evaluated in eager torch; convert it to evaluate it with {backend}")
    from ganexport.runtime._torch import import_torch, in_memory_runner

    torch, where = import_torch(device)
    from ganexport.checkpoint import load_run

    run = load_run(os.fspath(source))
    module = run.module.eval().to(where)
    return Generator(in_memory_runner(torch, module, run.spec, where, "eager"), path, None)
