"""A model repository of NVIDIA's Triton Inference Server: ``config.pbtxt`` and the untouched ONNX file.

The configuration follows the ModelConfig message of Triton's ``model_config.proto``. Triton's ONNX
Runtime backend runs the file; latents come from the client, who draws them by the seed contract.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ganexport.artifact import writing
from ganexport.build.options import BuildOptions, Built
from ganexport.errors import ExportError
from ganexport.spec import BATCH, Dim, GeneratorSpec, TensorSpec

#: Precisions of the ONNX file; the backend takes what ONNX Runtime takes.
PRECISIONS = ("fp32", "fp16", "int8")
FOLDER = "triton"
#: Microseconds a request may wait for company.
QUEUE_DELAY = 2000
_TYPES = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "float64": "TYPE_FP64",
    "int64": "TYPE_INT64", "int32": "TYPE_INT32", "uint8": "TYPE_UINT8", "int8": "TYPE_INT8", "bool": "TYPE_BOOL",
}  # fmt: skip


def unavailable() -> str | None:
    """Why the repository cannot be built here; nothing is needed, so it always can."""
    return None


def build(model: Path, spec: GeneratorSpec, folder: Path, precision: str, options: BuildOptions) -> Built:
    """Write ``triton/<name>/config.pbtxt`` and ``triton/<name>/1/model.onnx``; ``<name>_int8`` and so on beside fp32.

    Args:
        model: The ONNX file.
        spec: The generator's spec.
        folder: Where to write.
        precision: Of the ONNX file.
        options: Nothing of it concerns this format.

    Raises:
        ExportError: A precision that ONNX Runtime does not run.
        OutputError: The folder cannot be written.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"triton: ONNX Runtime runs no {precision}; convert to {', '.join(PRECISIONS)}")
    name = re.sub(r"[^A-Za-z0-9_-]", "_", spec.name) or "generator"
    name = name if precision == "fp32" else f"{name}_{precision}"  # models of one repository, side by side
    home = folder / FOLDER / name
    companions = []
    with writing(home):
        (home / "1").mkdir(parents=True, exist_ok=True)
        (home / "config.pbtxt").write_text(config(spec, name), encoding="utf-8")
        shutil.copyfile(model, home / "1" / "model.onnx")
        for extra in (*model.parent.glob(f"{model.name}.data"), *model.parent.glob(f"{model.name}_data")):
            # Weights beside the file are found by the name that the file itself says.
            shutil.copyfile(extra, home / "1" / extra.name)
            companions.append(f"{FOLDER}/{name}/1/{extra.name}")
    return Built(
        f"{FOLDER}/{name}/config.pbtxt",
        (f"{FOLDER}/{name}/1/model.onnx", *companions),
        {"triton": "onnxruntime backend"},
        ("triton",),
        (f"start with: tritonserver --model-repository={FOLDER}",),
    )


def config(spec: GeneratorSpec, name: str) -> str:
    """``config.pbtxt`` in protobuf's text form.

    Triton counts samples along the first axis when every input and output has ``batch`` there; it then
    batches on its own. Otherwise shapes are given whole, and it does not.
    """
    batch = spec.batch if all(t.shape and t.shape[0] == BATCH for t in (*spec.inputs, *spec.outputs)) else None
    if batch is not None and (batch.step > 1 or batch.min > 1):
        batch = None  # Triton forms batches of any size
    parts = [f'name: "{name}"', 'backend: "onnxruntime"', f"max_batch_size: {batch.max if batch else 0}"]
    parts += [_tensor("input", tensor, batch) for tensor in spec.inputs]
    parts += [_tensor("output", tensor, batch) for tensor in spec.outputs]
    if batch is not None and batch.max > 1:
        sizes = ", ".join(str(size) for size in sorted({batch.opt, batch.max}))
        parts.append(
            f"dynamic_batching {{\n  preferred_batch_size: [ {sizes} ]\n"
            f"  max_queue_delay_microseconds: {QUEUE_DELAY}\n}}"
        )
    parts.append("instance_group [\n  {\n    count: 1\n    kind: KIND_AUTO\n  }\n]")
    return "\n".join(parts) + "\n"


def _tensor(kind: str, tensor: TensorSpec, batch: Dim | None) -> str:
    shape = tensor.shape[1:] if batch is not None else tensor.shape
    lines = [f'    name: "{tensor.name}"', f"    data_type: {_TYPES[tensor.dtype]}"]
    if shape:
        lines.append(f"    dims: [ {', '.join(str(s) if isinstance(s, int) else '-1' for s in shape)} ]")
    else:
        # A scalar (a sample's label) has no dimension left; Triton wants one and takes it away again.
        lines += ["    dims: [ 1 ]", "    reshape { shape: [ ] }"]
    return f"{kind} [\n  {{\n" + "\n".join(lines) + "\n  }\n]"
