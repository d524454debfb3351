"""Small artifacts to serve, made by hand, and an in-process stand-in for the cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ganexport.artifact import SCHEMA_VERSION, Artifact, ArtifactWriter, Manifest, Provenance
from ganexport.serving.drawing import Job
from ganexport.serving.engine import Answer, Engine, EngineSettings
from ganexport.serving.versions import Version
from ganexport.spec import Dim, GeneratorSpec, Label, Normal, TensorSpec

CLASSES = 5
SIZE = 12


def make_spec(*, labels: bool = True, pictures: bool = True, dim: Dim | None = None) -> GeneratorSpec:
    inputs = [TensorSpec("z", "float32", ("batch", 8), Normal())]
    if labels:
        inputs.append(TensorSpec("label", "int64", ("batch",), Label(CLASSES)))
    image = TensorSpec("image", "float32", ("batch", 3, SIZE, SIZE), None, (-1.0, 1.0), "NCHW")
    audio = TensorSpec("audio", "float32", ("batch", 1, 3 * SIZE * SIZE), None, None, "NCT")
    return GeneratorSpec(tuple(inputs), (image if pictures else audio,), (dim or Dim("batch", 1, 4, 16),), "tiny")


def make_artifact(
    folder: Path, *, seed: int = 0, labels: bool = True, pictures: bool = True, dim: Dim | None = None, work: int = 0
) -> Artifact:
    """tanh(z·W + E[label]), as ONNX; ``work`` adds that many 1024x1024 products to take time."""
    generator = np.random.default_rng(seed)
    spec = make_spec(labels=labels, pictures=pictures, dim=dim)
    width = 3 * SIZE * SIZE
    weights = {
        "W": generator.normal(size=(8, width)).astype(np.float32) * 0.5,
        "E": generator.normal(size=(CLASSES, width)).astype(np.float32),
        "shape": np.array([-1, 3, SIZE, SIZE] if pictures else [-1, 1, width], np.int64),
    }
    nodes = [helper.make_node("MatMul", ["z", "W"], ["base"])]
    last = "base"
    if work:
        weights["grow"] = generator.normal(size=(width, 1024)).astype(np.float32) * 0.03
        weights["heavy"] = generator.normal(size=(1024, 1024)).astype(np.float32) * 0.03
        weights["shrink"] = generator.normal(size=(1024, width)).astype(np.float32) * 0.03
        nodes.append(helper.make_node("MatMul", ["base", "grow"], ["g0"]))
        nodes += [helper.make_node("MatMul", [f"g{k}", "heavy"], [f"g{k + 1}"]) for k in range(work)]
        nodes.append(helper.make_node("MatMul", [f"g{work}", "shrink"], ["shrunk"]))
        last = "shrunk"
    if labels:
        nodes.append(helper.make_node("Gather", ["E", "label"], ["row"]))
        nodes.append(helper.make_node("Add", [last, "row"], ["sum"]))
        last = "sum"
    nodes.append(helper.make_node("Tanh", [last], ["flat"]))
    nodes.append(helper.make_node("Reshape", ["flat", "shape"], [spec.outputs[0].name]))
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in spec.inputs],
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in spec.outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    with ArtifactWriter(folder) as writer:
        (writer.folder / "generator.onnx").write_bytes(model.SerializeToString())
        entry = writer.describe("generator.onnx", "onnx", "fp32")
        return writer.publish(Manifest(SCHEMA_VERSION, spec, (entry,), Provenance("tests")))


class InProcess:
    """Replicas without a cluster: one engine in this process."""

    def __init__(self, settings: EngineSettings) -> None:
        self.engine = Engine(settings)

    async def generate(self, version: Version, job: Job) -> Answer:
        return await self.engine.generate(version.digest, version.path, job)

    async def ping(self) -> bool:
        return await self.engine.ping()
