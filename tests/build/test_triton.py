"""The model repository: a configuration that Triton's own message parses, beside the untouched file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ganexport.build.options import BuildOptions
from ganexport.build.triton import build, config
from ganexport.errors import ExportError
from ganexport.spec import Dim, GeneratorSpec, Label, Normal, TensorSpec

IMAGE = TensorSpec("image", "float32", ("batch", 3, 64, 64), None, (-1.0, 1.0), "NCHW")
CONDITIONAL = GeneratorSpec(
    (TensorSpec("z", "float32", ("batch", 128), Normal()), TensorSpec("y", "int64", ("batch",), Label(10))),
    (IMAGE,),
    (Dim("batch", 1, 8, 64),),
    "my gan/1",
)


def parsed(text: str):
    proto = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    from google.protobuf import text_format

    return text_format.Parse(text, proto.ModelConfig())


def test_the_published_message_parses_it() -> None:
    message = parsed(config(CONDITIONAL, "gan"))
    assert (message.name, message.backend, message.max_batch_size) == ("gan", "onnxruntime", 64)
    assert [(i.name, list(i.dims), i.data_type) for i in message.input] == [("z", [128], 11), ("y", [1], 9)]
    assert message.input[1].HasField("reshape")
    assert not message.input[0].HasField("reshape")
    assert [(o.name, list(o.dims)) for o in message.output] == [("image", [3, 64, 64])]
    assert list(message.dynamic_batching.preferred_batch_size) == [8, 64]
    assert message.dynamic_batching.max_queue_delay_microseconds > 0
    assert [group.count for group in message.instance_group] == [1]


def test_without_a_batch_axis_first_shapes_are_whole_and_nothing_is_batched() -> None:
    spec = GeneratorSpec(
        (TensorSpec("x", "float32", (1, 3, "height", "width")),),
        (TensorSpec("image", "float32", (1, 3, "height", "width"), None, (-1.0, 1.0), "NCHW"),),
        (Dim("height", 64, 128, 256), Dim("width", 64, 128, 256)),
    )
    message = parsed(config(spec, "x"))
    assert message.max_batch_size == 0
    assert list(message.input[0].dims) == [1, 3, -1, -1]
    assert not message.HasField("dynamic_batching")


def test_the_repository_has_triton_s_layout_and_the_untouched_file(tmp_path: Path) -> None:
    model = tmp_path / "generator.onnx"
    model.write_bytes(b"any bytes")
    built = build(model, CONDITIONAL, tmp_path, "fp32", BuildOptions())
    assert built.path == "triton/my_gan_1/config.pbtxt"
    assert (tmp_path / built.companions[0]).read_bytes() == b"any bytes"
    assert built.companions[0] == "triton/my_gan_1/1/model.onnx"
    with pytest.raises(ExportError, match="bf16"):
        build(model, CONDITIONAL, tmp_path, "bf16", BuildOptions())
