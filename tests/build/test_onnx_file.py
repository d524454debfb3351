"""ONNX files: external data, specs for files that carry none, TensorRT's refusals, damaged files."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ganexport.build import onnx_file, openvino, tensorrt
from ganexport.build.options import BuildOptions
from ganexport.cli.main import run
from ganexport.errors import ArtifactError, ExportError, GanExportError, UsageError
from ganexport.spec import Dim, Normal, parse_dim, parse_input


def model(first="N", op="MatMul", rows=64, dtype=TensorProto.FLOAT):
    weight = np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32)
    nodes = [helper.make_node(op, ["z", "w"], ["y"], name="product")]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("z", dtype, [first, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [first, 8])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_large_weights_go_beside_the_file_and_come_back(tmp_path):
    original = model()
    companions = onnx_file.save_model(original, tmp_path / "a.onnx", limit=1000)
    assert companions == ("a.onnx.data",)
    assert (tmp_path / "a.onnx").stat().st_size < 1000 < (tmp_path / "a.onnx.data").stat().st_size
    onnx_file.check_model(tmp_path / "a.onnx")
    back = onnx_file.load_model(tmp_path / "a.onnx")
    np.testing.assert_array_equal(
        numpy_helper.to_array(back.graph.initializer[0]), numpy_helper.to_array(model().graph.initializer[0])
    )
    size = (tmp_path / "a.onnx.data").stat().st_size
    onnx_file.save_model(model(), tmp_path / "a.onnx", limit=1000)
    assert (tmp_path / "a.onnx.data").stat().st_size == size, "written anew, not appended to"
    assert onnx_file.save_model(model(), tmp_path / "b.onnx") == ()


def test_a_lone_file_is_described_from_its_graph():
    made = model("N")
    spec = onnx_file.derive_spec(made)
    assert spec.inputs[0].shape == ("batch", 64)
    assert spec.inputs[0].sampler == Normal()
    assert spec.outputs[0].shape == ("batch", 8)
    assert spec.dims == (Dim("batch"),)
    onnx_file.write_spec(made, spec)
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert onnx_file.read_spec(made) == spec
    said = onnx_file.derive_spec(model("N"), [parse_input("z=uniform(0,1)[batch,64]")], [parse_dim("batch=1:2:4")])
    assert (said.inputs[0].sampler.high, said.dims[0].max) == (1.0, 4)
    with pytest.raises(UsageError, match="no input 'x'"):
        onnx_file.derive_spec(model("N"), [parse_input("x=normal[batch,64]")])
    with pytest.raises(UsageError, match="described as"):
        onnx_file.derive_spec(model("N"), [parse_input("z=normal[batch,65]")])


def test_integer_inputs_must_be_described():
    nodes = [helper.make_node("Cast", ["y"], ["o"], to=TensorProto.FLOAT)]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("y", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, ["N"])],
    )  # fmt: skip
    with pytest.raises(UsageError, match="say how to draw it"):
        onnx_file.derive_spec(helper.make_model(graph))


def test_a_fixed_batch_is_seen():
    made = model(4)
    spec = onnx_file.derive_spec(model("N"))
    assert onnx_file.static_inputs(made, spec) == ["z: batch is 4"]


def test_random_nodes_are_refused_in_finished_files(tmp_path, capsys):
    made = model()
    made.graph.node.insert(0, helper.make_node("RandomNormalLike", ["z"], ["r"], name="noise"))
    made.graph.node[1].input[0] = "r"
    onnx.save(made, tmp_path / "random.onnx")
    assert onnx_file.random_nodes(made) == ["RandomNormalLike noise"]
    assert run(["convert", str(tmp_path / "random.onnx"), "--to", "openvino", "-o", str(tmp_path / "out")]) == 2
    assert "RandomNormalLike noise" in capsys.readouterr().err


@pytest.fixture
def unknown_operator(tmp_path):
    made = model(op="MatMul")
    made.graph.node[0].op_type = "NotAnOperator"
    made.graph.node[0].domain = "nowhere"
    made.opset_import.append(helper.make_opsetid("nowhere", 1))
    entry = made.graph.node[0].metadata_props.add()
    entry.key, entry.value = onnx_file.ORIGIN_KEY, "net.py:12"
    onnx.save(made, tmp_path / "odd.onnx")
    return tmp_path / "odd.onnx"


def test_the_parsers_refusal_names_node_and_origin(unknown_operator, tmp_path):
    spec = onnx_file.derive_spec(model("N"))
    with pytest.raises(ExportError, match=r"cannot parse NotAnOperator product from net\.py:12"):
        tensorrt.build(unknown_operator, spec, tmp_path, "fp32", BuildOptions())
    with pytest.raises(ExportError, match=r"OpenVINO .* cannot convert"):
        openvino.build(unknown_operator, spec, tmp_path, "fp32", BuildOptions())


def test_engine_options_are_used_or_refused(tmp_path):
    made = model("N")
    spec = onnx_file.derive_spec(made)
    onnx_file.write_spec(made, spec)
    onnx.save(made, tmp_path / "g.onnx")
    flavour, _ = tensorrt.load_library()
    cache = tmp_path / "cache" if flavour == "tensorrt" else None
    options = BuildOptions(builder_level=1, workspace_mb=64, timing_cache=cache)
    built = tensorrt.build(tmp_path / "g.onnx", spec, tmp_path, "fp32", options)
    assert (tmp_path / built.path).stat().st_size > 0
    assert cache is None or cache.is_file()
    again = tensorrt.build(tmp_path / "g.onnx", spec, tmp_path, "fp32", options)
    assert again.requires == built.requires
    if flavour == "tensorrt_rtx":
        with pytest.raises(UsageError, match="--timing-cache: TensorRT-RTX measures nothing"):
            tensorrt.build(tmp_path / "g.onnx", spec, tmp_path, "fp32", BuildOptions(timing_cache=tmp_path / "cache"))
        targeted = BuildOptions(compute_capabilities=("8.9",))
        assert (
            tensorrt.build(tmp_path / "g.onnx", spec, tmp_path, "fp32", targeted).requires["compute_capability"]
            == "8.9"
        )
        with pytest.raises(UsageError, match=r"compute capability '1\.0' is not one of"):
            tensorrt.build(tmp_path / "g.onnx", spec, tmp_path, "fp32", BuildOptions(compute_capabilities=("1.0",)))
    with pytest.raises(UsageError, match="0 to 5"):
        tensorrt.build(tmp_path / "g.onnx", spec, tmp_path, "fp32", BuildOptions(builder_level=9))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_one_clear_error_or_load(tmp_path_factory, data):
    content = bytearray(model(rows=4).SerializeToString())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(bytes(content))
    refusal = ""
    try:
        loaded = onnx_file.load_model(path)
        onnx_file.derive_spec(loaded)
        onnx_file.check_model(path)
    except GanExportError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ArtifactError, match="no such ONNX file"):
        onnx_file.load_model(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ArtifactError, match="not a"):
        onnx_file.load_model(tmp_path / "text.onnx")


def test_a_spec_is_written_into_a_file_that_lists_its_weights_among_its_inputs():
    from onnx import TensorProto, helper, numpy_helper

    from ganexport.build.onnx_file import read_spec, write_spec
    from ganexport.spec import Dim, GeneratorSpec, TensorSpec, parse_input

    made = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("w", [4, 6]), ("z", [2, 4]), ("y", [2, 6]))
    ]
    weight = numpy_helper.from_array(np.zeros((4, 6), np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["z", "w"], ["y"])], "g", made[:2], made[2:], [weight])
    model = helper.make_model(graph)
    output = TensorSpec("y", "float32", ("batch", 6))
    spec = GeneratorSpec((parse_input("z=normal[batch,4]"),), (output,), (Dim("batch", 1, 2, 4),))
    write_spec(model, spec)
    assert read_spec(model) == spec
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    assert shapes["z"][0].dim_param == "batch"
    assert [dim.dim_value for dim in shapes["w"]] == [4, 6]
