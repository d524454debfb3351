"""``ganexport evaluate`` on a real artifact run by real ONNX Runtime."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ganexport.artifact import ArtifactWriter, Manifest, Provenance
from ganexport.cli.main import cli, run
from ganexport.spec import Dim, GeneratorSpec, TensorSpec, parse_input


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A linear generator of 28x28 grey images."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(0, 0.5, (8, 784)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["z", "weight"], ["flat"]),
            helper.make_node("Tanh", ["flat"], ["bounded"]),
            helper.make_node("Reshape", ["bounded", "shape"], ["image"]),
        ],
        "generator",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 28, 28])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.array([-1, 1, 28, 28]), "shape")],
    )
    spec = GeneratorSpec(
        (parse_input("z=normal[batch,8]"),),
        (TensorSpec("image", "float32", ("batch", 1, 28, 28), None, (-1.0, 1.0), "NCHW"),),
        (Dim("batch", 1, 64, 64),),
    )
    path = tmp_path_factory.mktemp("evaluate") / "artifact"
    with ArtifactWriter(path) as writer:
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.save(model, writer.folder / "generator.onnx")
        file = writer.describe("generator.onnx", "onnx", "fp32")
        writer.publish(Manifest(1, spec, (file,), Provenance("a linear map")))
    return path


def test_figures_and_conditions_as_json(artifact):
    result = CliRunner().invoke(cli, ["evaluate", str(artifact), "-n", "300", "--seed", "3", "--json"])
    assert result.exit_code == 0, result.output
    evaluation = json.loads(result.stdout)
    assert evaluation["generated"] == 300
    assert evaluation["real"] == 10_000
    assert evaluation["seed"] == 3
    assert "onnxruntime" in evaluation["source"]
    assert evaluation["frechet"] > 100  # a random linear map makes no digits


def test_two_evaluations_of_the_same_weights_agree_within_the_interval(artifact):
    def evaluate(seed):
        return json.loads(
            CliRunner().invoke(cli, ["evaluate", str(artifact), "-n", "2000", "--seed", str(seed), "--json"]).stdout
        )

    first, second = evaluate(1), evaluate(2)
    low, high = first["frechet_interval"]
    assert low <= second["frechet"] <= high


def test_the_table_names_the_conditions(artifact):
    result = CliRunner().invoke(cli, ["evaluate", str(artifact), "-n", "100"])
    assert result.exit_code == 0, result.output
    assert "100 generated (seed 0) against 10000" in result.stdout


def test_holes_are_one_line(artifact, tmp_path, capsys):
    for arguments in (
        [str(tmp_path / "missing")],
        [str(artifact), "--data", str(tmp_path / "nothing")],
        [str(artifact), "--backend", "tensorflow"],
        [str(artifact), "-n", "5"],
        ["dcgan-mnist", "--device", "cuda:99"],
        ["dcgan-mnist", "--device", "tpu"],
    ):
        assert run(["evaluate", *arguments]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_pictures_of_several_sizes_are_brought_to_the_generators(artifact, tmp_path, capsys):
    draw = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(120):
        shape = [(28, 28), (40, 30), (64, 90)][number % 3]
        Image.fromarray(draw.integers(0, 255, shape, np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    for command in (["evaluate"], ["explore", "neighbours", "-o", str(tmp_path / "n.png")]):
        assert run([*command, str(artifact), "--data", str(tmp_path / "photos"), "-n", "100"]) == 0
    said = capsys.readouterr()
    assert "the middle of each is resized to the generator's size" in said.err
    assert "100 generated (seed 0) against 120" in said.out
    Image.fromarray(draw.integers(0, 255, (28, 28, 3), np.uint8)).save(tmp_path / "photos" / "colour.png")
    assert run(["evaluate", str(artifact), "--data", str(tmp_path / "photos"), "-n", "100"]) == 2
    assert "3 channels" in capsys.readouterr().err
    np.save(tmp_path / "colour.npy", draw.integers(0, 255, (120, 28, 28, 3), np.uint8))
    arguments = ["--data", str(tmp_path / "colour.npy"), "--backbone", "digits", "-n", "100"]
    assert run(["evaluate", str(artifact), *arguments]) == 2
    assert "makes images of 1 channels" in capsys.readouterr().err


def test_drift_against_itself_is_none_and_against_a_rounded_copy_is_small(artifact, tmp_path, capsys):
    import onnx
    from onnx import numpy_helper

    assert run(["evaluate", str(artifact), "-n", "200", "--against", str(artifact), "--json"]) == 0
    drift = json.loads(capsys.readouterr().out)["drift"]
    assert drift["frechet"] == pytest.approx(0, abs=1e-3)
    assert drift["moved"] == 0
    assert drift["psnr"] is None
    model = onnx.load(artifact / "generator.onnx")
    weight = model.graph.initializer[0]
    rounded = np.round(numpy_helper.to_array(weight) * 8) / 8
    weight.CopyFrom(numpy_helper.from_array(rounded.astype(np.float32), weight.name))
    from ganexport.artifact import Artifact
    from ganexport.spec import spec_to_json

    onnx.helper.set_model_props(model, {"ganexport.spec": spec_to_json(Artifact(artifact).spec)})
    onnx.save(model, tmp_path / "rounded.onnx")
    assert run(["evaluate", str(tmp_path / "rounded.onnx"), "-n", "200", "--against", str(artifact)]) == 0
    shown = capsys.readouterr().out
    assert "PSNR between the two" in shown
    assert "moved against it" in shown
    assert run(["evaluate", str(artifact), "-n", "200", "--against", str(tmp_path / "gone")]) == 2


def test_a_backbone_that_does_not_fit_is_one_line(artifact, tmp_path, capsys):
    for arguments in (
        ["--backbone", "digits", "--backbone-weights", str(tmp_path / "w.pth")],
        ["--backbone-weights", str(tmp_path / "missing.pth")],
    ):
        assert run(["evaluate", str(artifact), "-n", "100", *arguments]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
