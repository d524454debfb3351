"""Hand-made ONNX generators and artifacts: no torch, known operations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ganexport.artifact import Artifact, ArtifactWriter, Manifest, Provenance
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec

SPEC = GeneratorSpec(
    (TensorSpec("z", "float32", ("batch", 16), Normal()),),
    (TensorSpec("image", "float32", ("batch", 3, 8, 8), range=(-1.0, 1.0), layout="NCHW"),),
    (Dim("batch", 1, 4, 32),),
)


def generator(scale: float = 1.0) -> onnx.ModelProto:
    """z [batch, 16] → Gemm → [batch, 8, 4, 4] → ConvTranspose 4x4 stride 2 → tanh [batch, 3, 8, 8]."""
    draw = np.random.default_rng(0)
    weights = {
        "w1": draw.standard_normal((16, 128)).astype(np.float32) * 0.2,
        "w2": draw.standard_normal((8, 3, 4, 4)).astype(np.float32) * 0.2 * scale,
        "shape": np.array([0, 8, 4, 4], np.int64),
    }
    nodes = [
        helper.make_node("Gemm", ["z", "w1"], ["h"]),
        helper.make_node("Reshape", ["h", "shape"], ["r"]),
        helper.make_node("ConvTranspose", ["r", "w2"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["c"], ["image"]),
    ]
    graph = helper.make_graph(
        nodes,
        "generator",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def artifact(folder: Path, scale: float = 1.0) -> Artifact:
    """An artifact that holds it, without golden outputs."""
    with ArtifactWriter(folder) as writer:
        (writer.folder / "generator.onnx").write_bytes(generator(scale).SerializeToString())
        file = writer.describe("generator.onnx", "onnx", "fp32")
        return writer.publish(Manifest(1, SPEC, (file,), Provenance("hand-made")))
