"""Small real ONNX generators and artifacts, made without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ganexport.artifact import Artifact, ArtifactWriter, Manifest, Provenance
from ganexport.spec import Dim, GeneratorSpec, TensorSpec, parse_input, spec_to_json

LATENT, CHANNELS, SIDE = 16, 3, 8


def image_spec(channels: int = CHANNELS, dim: Dim | None = None, classes: int = 0) -> GeneratorSpec:
    """z [batch, 16] (and labels) to tanh pictures of 8x8."""
    inputs = [parse_input(f"z=normal[batch,{LATENT}]")]
    if classes:
        inputs.append(parse_input(f"y=label({classes})[batch]"))
    image = TensorSpec("image", "float32", ("batch", channels, SIDE, SIDE), None, (-1.0, 1.0), "NCHW")
    return GeneratorSpec(tuple(inputs), (image,), (dim or Dim("batch", 1, 8, 64),), "tiny")


def image_model(
    channels: int = CHANNELS,
    *,
    classes: int = 0,
    batch: int | str | None = "batch",
    last: str = "Tanh",
    spec: GeneratorSpec | None = None,
    weights_seed: int = 0,
) -> onnx.ModelProto:
    """Gemm, (+ class embedding), activation, reshape."""
    random = np.random.default_rng(weights_seed)
    size = channels * SIDE * SIDE
    constants = {
        "weight": random.normal(0, 0.4, (LATENT, size)).astype(np.float32),
        "bias": random.normal(0, 0.1, (size,)).astype(np.float32),
        "shape": np.array([batch if isinstance(batch, int) else -1, channels, SIDE, SIDE], np.int64),
    }
    inputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [batch, LATENT])]
    nodes = [helper.make_node("Gemm", ["z", "weight", "bias"], ["linear"])]
    hidden = "linear"
    if classes:
        constants["table"] = random.normal(0, 0.5, (classes, size)).astype(np.float32)
        inputs.append(helper.make_tensor_value_info("y", TensorProto.INT64, [batch]))
        nodes.append(helper.make_node("Gather", ["table", "y"], ["embedded"]))
        nodes.append(helper.make_node("Add", ["linear", "embedded"], ["sum"]))
        hidden = "sum"
    nodes.append(helper.make_node(last, [hidden], ["activated"]))
    nodes.append(helper.make_node("Reshape", ["activated", "shape"], ["image"]))
    output = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, channels, SIDE, SIDE])
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if spec is not None:
        helper.set_model_props(model, {"ganexport.spec": spec_to_json(spec)})
    onnx.checker.check_model(model)
    return model


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def make_artifact(
    path: Path,
    spec: GeneratorSpec | None = None,
    model: onnx.ModelProto | None = None,
    *,
    extra: dict[str, tuple[bytes, dict]] | None = None,
    **fields,
) -> Artifact:
    """An artifact with ``generator.onnx`` and whatever else: file name → (content, fields with ``format``)."""
    with ArtifactWriter(path) as writer:
        (writer.folder / "generator.onnx").write_bytes((model or image_model()).SerializeToString())
        files = [writer.describe("generator.onnx", "onnx", "fp32", **fields)]
        for name, (content, about) in (extra or {}).items():
            (writer.folder / name).write_bytes(content)
            files.append(writer.describe(name, **{"precision": "fp32", **about}))
        return writer.publish(Manifest(1, spec or image_spec(), tuple(files), Provenance("a test")))


def reference(model: onnx.ModelProto, z: np.ndarray) -> np.ndarray:
    """The tiny generator's images, in numpy."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    hidden = z.astype(np.float64) @ constants["weight"] + constants["bias"]
    return np.tanh(hidden).reshape(len(z), -1, SIDE, SIDE)
