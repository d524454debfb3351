"""ganexport inspect --diff and --layers: what two artifacts do not share, and each layer's precision."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from ganexport.artifact import ArtifactWriter, Manifest, Provenance
from ganexport.build.golden import write_golden
from ganexport.build.layers import layer_precisions
from ganexport.build.precision import low_precision
from ganexport.cli.main import run
from ganexport.parity import Certificate, TensorParity

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
import tiny_generators as tiny


@pytest.fixture
def ganexport_command(capfd):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def publish(path, model, precision, *, shift=0.0, decibels=120.0):
    """An artifact with one ONNX file and the golden outputs of a source that is ``shift`` away."""
    spec = tiny.image_spec()
    parity = TensorParity("image", 256, 1e-5, 1e-6, decibels, decibels, (0, 0), 2.0)
    certificate = Certificate("pass", "eager", "onnxruntime", precision, (parity,), notes=(f"note of {path.name}",))

    class Source:
        def run(self, feeds):
            return {"image": (tiny.reference(tiny.image_model(), feeds["z"]) + np.float32(shift)).astype(np.float32)}

    with ArtifactWriter(path) as writer:
        name = "generator.onnx" if precision == "fp32" else f"generator.{precision}.onnx"
        (writer.folder / name).write_bytes(model.SerializeToString())
        file = writer.describe(name, "onnx", precision, certificate=certificate, requires={"opset": "17"})
        write_golden(writer.folder, spec, Source())
        writer.publish(Manifest(1, spec, (file,), Provenance("dcgan", "ab" * 32)))
    return path


@pytest.fixture
def pair(tmp_path):
    model = tiny.image_model()
    low = low_precision(model, "fp16", {"Tanh"})
    return publish(tmp_path / "full", model, "fp32"), publish(tmp_path / "half", low, "fp16", shift=0.01, decibels=60.0)


def test_a_difference_names_precision_parity_layers_and_outputs(pair, ganexport_command):
    code, out, _ = ganexport_command("inspect", "--diff", *pair, "--json")
    assert code == 0
    found = json.loads(out)
    assert not found["same"]
    changed = found["changed"]
    assert changed["files.onnx.precision"] == ["fp32", "fp16"]
    assert changed["files.onnx.certificate.outputs.image.worst_psnr"] == [120.0, 60.0]
    assert changed["files.onnx.graph.layers.fp32.Gemm"][1] is None
    assert not [name for name in changed if name.startswith(("spec", "provenance")) or "notes" in name]
    assert found["outputs"] == {"image": "46.0 dB at worst"}
    code, out, _ = ganexport_command("inspect", "--diff", *pair)
    assert code == 0
    for text in ("files.onnx.precision", "46.0 dB at worst"):
        assert text in out


def test_the_same_artifact_twice_holds_the_same(pair, tmp_path, ganexport_command):
    shutil.copytree(pair[0], tmp_path / "copy")
    assert "hold the same" in " ".join(ganexport_command("inspect", pair[0], tmp_path / "copy", "--diff")[1].split())


def test_a_file_on_one_side_is_one_line(pair, tmp_path, ganexport_command):
    with ArtifactWriter(tmp_path / "two") as writer:
        files = []
        for kind in ("onnx", "openvino"):
            (writer.folder / f"generator.{kind}").write_bytes(tiny.image_model().SerializeToString())
            files.append(writer.describe(f"generator.{kind}", kind, "fp32"))
        writer.publish(Manifest(1, tiny.image_spec(), tuple(files), Provenance("dcgan", "ab" * 32)))
    found = json.loads(ganexport_command("inspect", "--diff", pair[0], tmp_path / "two", "--json")[1])
    alone = [name for name in found["changed"] if name.startswith("files.openvino")]
    assert alone == ["files.openvino"]
    assert found["changed"]["files.openvino"][0] is None
    assert found["outputs"] == {}


@pytest.mark.parametrize("words", [["--diff", "a"], ["a", "b"], []])
def test_the_wrong_number_of_paths_is_one_line(words, ganexport_command):
    code, _, err = ganexport_command("inspect", *words)
    assert code == 2
    assert "Traceback" not in err


def test_layers_and_operations_are_shown(pair, ganexport_command):
    code, out, _ = ganexport_command("inspect", pair[1], "--layers")
    assert code == 0
    told = " ".join(out.split())
    assert "GFLOP a sample" in told
    assert "fp32 Tanh" in told
    assert "fp16 Gemm" in told or "fp16 ConvTranspose" in told
    graph = json.loads(ganexport_command("inspect", pair[0], "--json")[1])["files"][0]["graph"]
    assert graph["flops"] > 0
    assert set(graph["layers"]) == {"fp32"}
    assert "each" not in graph


def test_a_lone_files_layers_are_counted_too(pair, tmp_path, ganexport_command):
    lone = tmp_path / "x.onnx"
    shutil.copyfile(pair[0] / "generator.onnx", lone)
    assert "GFLOP a sample" in " ".join(ganexport_command("inspect", lone)[1].split())


def test_layers_of_an_int8_graph():
    model = tiny.image_model()
    from ganexport.build.quantize import quantize

    made = quantize(model, tiny.image_spec(), samples=4, min_psnr=5.0).model
    kinds = {layer.precision for layer in layer_precisions(made)}
    assert "int8" in kinds
    assert all(layer.operator not in ("QuantizeLinear", "DequantizeLinear") for layer in layer_precisions(made))
    assert onnx.checker.check_model(made) is None
