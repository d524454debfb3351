"""A lone ONNX file goes through every library that will read it, first in a child process with limits.

``convert`` hands a file of unknown origin to the onnx package's checker, to ONNX Runtime and to the parsers of
TensorRT and OpenVINO, all of them C++: one that crashes, hangs or exhausts memory there is refused in one line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from ganexport.errors import ArtifactError, GanExportError
from ganexport.runtime._probe import in_child, limit_memory

#: Readers of this process's own, whatever is built.
ALWAYS = ("onnx", "onnxruntime")


def rehearse(path: Path, formats: Collection[str] = ()) -> None:
    """Open a lone file in a child process as ``convert`` will.

    Args:
        path: The ONNX file.
        formats: What will be built from it; "trt" and "openvino" bring parsers of their own.

    Raises:
        ArtifactError: It is damaged, or a library crashed, hung or ran out of memory over it.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such ONNX file")
    readers = (*ALWAYS, *(name for name in ("openvino", "trt") if name in formats))
    for reader in readers:
        answer = in_child(__name__, path, (reader,), LIBRARIES[reader]).decode("utf-8", "replace")
        if answer != "ok":
            raise ArtifactError(answer)


# ---- the child ------------------------------------------------------------------------------------


def _onnx(path: Path) -> None:
    from ganexport.build import onnx_file

    model = onnx_file.load_model(path)
    onnx_file.check_model(path)
    onnx_file.infer_shapes(model)


def _onnxruntime(path: Path) -> None:
    from ganexport.runtime.onnxruntime import OnnxRuntimeRunner, open_session

    if OnnxRuntimeRunner.unavailable() is None:
        open_session(path, {"threads": 1}, None)


def _openvino(path: Path) -> None:
    from ganexport.build import openvino
    from ganexport.runtime.openvino import compile_model

    if openvino.unavailable() is None:
        compile_model(path, {"threads": 1})


def _trt(path: Path) -> None:
    from ganexport.build import tensorrt

    if tensorrt.unavailable() is None:
        tensorrt.parse(path)


_READERS: dict[str, Callable[[Path], None]] = {
    "onnx": _onnx, "onnxruntime": _onnxruntime, "openvino": _openvino, "trt": _trt,
}  # fmt: skip
LIBRARIES = {"onnx": "the onnx package", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "trt": "TensorRT"}


def main() -> None:
    """Let one library read the file, and print "ok" or what it says."""
    path, reader = Path(sys.argv[1]), sys.argv[2]
    limit_memory(path)
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not the answer
    answer = "ok"
    try:
        _READERS[reader](path)
    except GanExportError as error:
        answer = " ".join(str(error).split())
        if str(path) not in answer:
            answer = f"{path}: {answer}"
    except MemoryError:
        answer = f"{path}: {LIBRARIES[reader]} ran out of memory while loading it"
    os.write(answers, answer.encode() + b"\n")


if __name__ == "__main__":
    main()
