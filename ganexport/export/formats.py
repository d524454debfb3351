"""Every format by name, without importing any.

Torch formats are made from a module (``export(prepared, program, folder, precision, options)``),
graph formats from an ONNX file (``build(model, spec, folder, precision, options)``). Both kinds of
module say in ``PRECISIONS`` what they take.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from ganexport.build.options import BuildOptions
from ganexport.errors import UsageError, unknown_name

#: Made from a torch module.
TORCH_FORMATS = {"torchscript": "ganexport.export.torchscript", "aoti": "ganexport.export.aoti"}
#: Made from an ONNX file, which is itself the first of them.
GRAPH_FORMATS = {"trt": "ganexport.build.tensorrt", "openvino": "ganexport.build.openvino"}
#: Folders around the untouched ONNX file for someone else's runtime: its certificate holds for them.
PACKAGES = {"triton": "ganexport.build.triton", "web": "ganexport.build.web"}
FORMATS = ("torchscript", "onnx", "trt", "openvino", "aoti", "triton", "web")
#: "auto": fp16 with the layers that need it in fp32.
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "auto")
#: Values of a source's description that say nothing.
UNSAID: tuple[Any, ...] = (None, (), "", "error", [], {})


def load(name: str) -> ModuleType:
    """The module of a format.

    Raises:
        UsageError: Unknown; the known ones and the nearest are named.
    """
    if name not in FORMATS:
        raise unknown_name("format", name, FORMATS)
    return importlib.import_module({**TORCH_FORMATS, **GRAPH_FORMATS, **PACKAGES}[name])


def check(names: tuple[str, ...], precision: str, options: BuildOptions) -> None:
    """Refuse unknown formats and precisions, combinations that do not exist, and options that nothing would read.

    Raises:
        UsageError: Naming what exists.
    """
    if not names:
        raise UsageError(f"no format asked for; choose with --to from {', '.join(FORMATS)}")
    for name in names:
        if name not in FORMATS and set(name.split(",")) <= set(FORMATS):
            raise UsageError(f"--to {name}: give --to once a format: {' '.join(f'--to {n}' for n in name.split(','))}")
        if name not in FORMATS:
            raise unknown_name("format", name, FORMATS)
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if "trt" not in names and (said := options.only_for_tensorrt()):
        raise UsageError(f"{', '.join(said)}: for TensorRT alone; add --to trt, or leave it out")
    if precision == "fp32" and options.keep_fp32:
        raise UsageError(f"--keep-fp32 {options.keep_fp32[0]}: everything is fp32; add --precision fp16, bf16 or int8")
    if precision != "int8" and options.calibration_samples != BuildOptions().calibration_samples:
        raise UsageError("--calibration-samples: for int8 alone; add --precision int8, or leave it out")
    for name in names:
        if name in TORCH_FORMATS and precision != "fp32":
            raise UsageError(
                f"{name} exists in fp32 only: {precision} is made on the ONNX graph; use --to onnx, trt or openvino, "
                f"or convert {name} apart"
            )
