"""convert and verify on a tiny generator: formats, certificates, golden outputs, life without torch."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import ganexport
from ganexport.artifact import GOLDEN, Artifact, sha256_file
from ganexport.build.golden import read_golden
from ganexport.cli.main import run
from ganexport.errors import ArtifactError, BackendUnavailableError, IntegrityError, ParityError, UsageError
from ganexport.export.convert import convert
from ganexport.export.verify import verify
from ganexport.spec import Dim, spec_from_json

DESCRIBED = {"inputs": ["z=normal[batch,16]"], "outputs": ["image=[-1,1]:NCHW"], "batch": "1:8:20"}


Z = ("--input", "z=normal[batch,16]")


def certificate(artifact, name):
    return artifact.find(name).certificate


def test_every_format_is_certified_over_the_whole_range(artifact):
    assert [f.format for f in artifact.manifest.files] == ["onnx", "trt", "openvino", "torchscript"]
    for name in ("onnx", "openvino", "torchscript"):
        found = certificate(artifact, name)
        assert found.verdict == "pass"
        assert found.reference.startswith("eager torch")
        assert found.deterministic is True
        assert {"batch": 1} in found.sizes
        assert {"batch": 20} in found.sizes
        assert {"batch": 3} not in found.unseen, "3 was shown to the exporter"
        assert len(found.unseen) >= 4
        (image,) = found.outputs
        assert image.samples >= 256
        assert image.psnr is None or image.psnr > 100


def test_an_engine_that_cannot_run_here_says_exactly_what_was_done(artifact):
    found = certificate(artifact, "trt")
    if found.verdict != "partial":
        pytest.skip("this machine has a GPU: the engine was run")
    assert found.outputs == ()
    told = " ".join(found.notes)
    assert "layers parsed" in told
    assert "profile batch 1:8:20" in told
    assert "not run here" in told
    assert "generator.onnx passed on onnxruntime" in told
    requires = artifact.find("trt").requires
    assert requires["flavour"] in ("tensorrt", "tensorrt_rtx")
    assert requires["version"][0].isdigit()


def test_the_onnx_file_is_standard_and_carries_the_spec(artifact):
    model = onnx.load(artifact.path / "generator.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [v.name for v in model.graph.input] == ["z"]
    assert [v.name for v in model.graph.output] == ["image"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert spec_from_json(metadata["ganexport.spec"]) == artifact.spec
    assert artifact.spec.outputs[0].shape == ("batch", 1, 8, 8)
    assert artifact.spec.outputs[0].range == (-1.0, 1.0)


def test_no_path_of_this_machine_is_left_in_the_artifact(artifact):
    for file in artifact.path.iterdir():
        if file.suffix in (".onnx", ".json", ".xml"):
            content = file.read_bytes()
            assert str(Path(__file__).parent).encode() not in content, file
            assert sys.prefix.encode() not in content, file


def test_golden_outputs_cover_the_corners(artifact):
    sets = read_golden(artifact.golden_path(), artifact.spec)
    batches = {feeds["z"].shape[0] for feeds, _ in sets}
    assert {1, 8, 20} <= batches
    assert sum(feeds["z"].shape[0] for feeds, _ in sets) >= 16
    for feeds, outputs in sets:
        assert outputs["image"].shape == (feeds["z"].shape[0], 1, 8, 8)
        assert outputs["image"].dtype == np.float32


def test_verify_needs_neither_the_source_nor_torch(artifact, tmp_path):
    copy = tmp_path / "moved"
    shutil.copytree(artifact.path, copy)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from ganexport.cli.main import run\n"
        f"code = run(['verify', {str(copy)!r}, '--format', 'onnx', '--format', 'openvino', '--format', 'trt'])\n"
        "def build(source, *rest): return run(['convert', source, '--to', 'openvino', *rest])\n"
        f"made = build({str(copy)!r}, '--to', 'trt', '-o', {str(tmp_path / 'built')!r})\n"
        f"lone = build({str(copy / 'generator.onnx')!r}, '-o', {str(tmp_path / 'lone')!r})\n"
        "sys.exit(code or made or lone)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = Artifact(tmp_path / "built")
    assert {f.format for f in built.manifest.files} == {"onnx", "openvino", "trt"}
    assert built.find("openvino").certificate.verdict == "pass"
    assert built.golden_path() is not None
    lone = Artifact(tmp_path / "lone")
    assert lone.spec == artifact.spec
    assert lone.find("openvino").certificate.reference.startswith("generator.onnx fp32 on onnxruntime")


def test_converting_an_artifact_into_itself_keeps_its_files(artifact, tmp_path):
    copy = tmp_path / "own"
    shutil.copytree(artifact.path, copy)
    grown = convert(copy, to="onnx", output=copy, precision="fp16")
    assert {(f.format, f.precision) for f in grown.manifest.files} == {
        ("onnx", "fp32"), ("trt", "fp32"), ("openvino", "fp32"), ("torchscript", "fp32"), ("onnx", "fp16"),
    }  # fmt: skip
    for file in grown.manifest.files:
        grown.verified_path(file)
    assert (copy / GOLDEN).read_bytes() == (artifact.path / GOLDEN).read_bytes()


def doubled_beyond_twenty(artifact):
    """Its TorchScript file, made to give twice the image for more than 20 samples."""
    import torch

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            image = self.inner(z)
            return image * 2 if z.shape[0] > 20 else image

    path = artifact.path / artifact.find("torchscript").path
    torch.jit.save(torch.jit.script(Doubled(torch.jit.load(path))), path)
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    next(f for f in manifest["files"] if f["format"] == "torchscript")["sha256"] = sha256_file(path)
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))


def test_wider_sizes_are_proved_again_and_what_does_not_hold_there_is_left_out(artifact, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(artifact.path, own)
    doubled_beyond_twenty(convert(own, to="triton", output=own))
    assert verify(own, formats=["torchscript", "triton"]).passed
    said = []
    wider = convert(own, to="onnx", output=own, batch="1:8:40", progress=said.append)
    left = [line for line in said if "is left out" in line]
    if certificate(artifact, "trt").verdict == "partial":
        assert left.pop(0) == (
            "generator.engine is left out: it cannot be run here, and was proved for batch 1 to 20 alone"
        )
        assert {f.format for f in wider.manifest.files} == {"onnx", "openvino"}
    assert left[0].startswith("generator.torchscript.pt is left out: image: worst sample")
    assert left[1] == (
        "triton/make/config.pbtxt is left out: it names the sizes and ranges of before; add it again with --to triton"
    )
    for file in wider.manifest.files:
        assert {"batch": 40} in file.certificate.sizes
        wider.verified_path(file)
    assert certificate(wider, "onnx").reference.startswith("generator.onnx fp32 on")
    assert "compared with its source for batch 1 to 20 only" in " ".join(certificate(wider, "onnx").notes)
    assert not (own / "triton").exists()
    assert not (own / "generator.torchscript.pt").exists()
    assert verify(own).passed


def test_a_kept_file_carries_the_new_range_and_a_narrower_one_keeps_its_certificate(artifact, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(artifact.path, own)
    said = []
    narrow = convert(own, to="onnx", output=own, precision="fp16", batch="2:4:6", progress=said.append)
    assert not [line for line in said if "is left out" in line]
    assert narrow.find("onnx", "fp32").certificate == artifact.find("onnx", "fp32").certificate
    for name in ("generator.onnx", "generator.fp16.onnx"):
        metadata = {entry.key: entry.value for entry in onnx.load(own / name).metadata_props}
        assert spec_from_json(metadata["ganexport.spec"]) == narrow.spec
    for file in narrow.manifest.files:
        narrow.verified_path(file)


def test_low_precision_is_compared_with_the_fp32_file_beside_it_and_not_widened_without_it(artifact, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(artifact.path, both)
    convert(both, to="onnx", output=both, precision="fp16")
    wider = convert(both, to="onnx", output=tmp_path / "wider", precision="fp16", batch="1:8:30")
    found = wider.find("onnx", "fp16").certificate
    assert found.reference.startswith("generator.onnx fp32 on")
    assert found.outputs[0].max_abs > 0
    with pytest.raises(UsageError, match="holds fp16 alone, proved for batch 1 to 30"):
        convert(wider.path, to="openvino", output=tmp_path / "x", precision="fp16", batch="1:8:40")


def test_verify_against_the_source_runs_the_whole_range(artifact):
    report = verify(artifact.path, against="generators.tiny:make", formats=["onnx"], **DESCRIBED)
    (file,) = report.files
    assert report.passed
    assert file.certificate.reference.startswith("eager torch")
    assert file.certificate.outputs[0].samples >= 256


def test_verify_catches_a_changed_graph_and_draws_the_worst_sample(artifact, tmp_path):
    copy = tmp_path / "changed"
    shutil.copytree(artifact.path, copy)
    model = onnx.load(copy / "generator.onnx")
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 4:
            values = onnx.numpy_helper.to_array(tensor) * 1.2
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))
    onnx.save(model, copy / "generator.onnx")
    with pytest.raises(IntegrityError, match="sha256"):
        verify(copy, formats=["onnx"])
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][0]["sha256"] = sha256_file(copy / "generator.onnx")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    report = verify(copy, formats=["onnx"], picture=tmp_path / "worst.png")
    assert not report.passed
    assert "worst sample" in report.files[0].certificate.failures[0]
    assert (tmp_path / "worst.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ParityError, match="outside tolerance"):
        report.raise_for_failures()
    assert run(["verify", str(copy), "--format", "onnx", "--picture", str(tmp_path / "worst.png")]) == 1


def test_damaged_golden_outputs_are_one_clear_error(artifact, tmp_path):
    copy = tmp_path / "golden"
    shutil.copytree(artifact.path, copy)
    (copy / GOLDEN).write_bytes((copy / GOLDEN).read_bytes()[:-200])
    with pytest.raises(IntegrityError, match="golden"):
        verify(copy)
    with pytest.raises(ArtifactError, match="damaged"):
        read_golden(copy / GOLDEN, artifact.spec)


def test_a_profile_can_be_narrowed_without_the_source(artifact, tmp_path):
    narrow = convert(artifact.path, to="onnx", output=tmp_path / "narrow", batch="2:4:6")
    assert narrow.spec.dims == (Dim("batch", 2, 4, 6),)
    assert {s["batch"] for s in (narrow.find("onnx").certificate.sizes)} <= set(range(1, 21))
    model = onnx.load(narrow.path / "generator.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert spec_from_json(metadata["ganexport.spec"]).dims == narrow.spec.dims


def test_uint8_images_leave_the_graph_as_bytes(artifact, tmp_path):
    from_module = convert("generators.tiny:make", to="onnx", output=tmp_path / "a", output_dtype="uint8", **DESCRIBED)
    from_graph = convert(artifact.path, to="onnx", output=tmp_path / "b", output_dtype="uint8")
    pictures = []
    for made in (from_module, from_graph):
        (image,) = made.spec.outputs
        assert (image.dtype, image.shape, image.layout, image.range) == (
            "uint8", ("batch", 8, 8, 1), "NHWC", (0.0, 255.0),
        )  # fmt: skip
        assert made.find("onnx").certificate.verdict == "pass"
        (_, outputs), *_ = read_golden(made.golden_path(), made.spec)
        pictures.append(outputs["image"])
        assert outputs["image"].dtype == np.uint8
    difference = np.abs(pictures[0].astype(int) - pictures[1].astype(int))
    assert difference.max() <= 1
    truth = read_golden(artifact.golden_path(), artifact.spec)[0][1]["image"]
    expected = np.clip(np.rint((truth + 1) * 127.5), 0, 255).transpose(0, 2, 3, 1)
    assert np.abs(pictures[0] - expected).max() <= 1


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "auto"])
def test_precisions_are_made_on_the_graph_and_keep_fp32_at_the_edges(artifact, tmp_path, precision):
    # TensorRT-RTX has no bf16 deconvolution, and here is nothing else: beside it the graph would stay fp32.
    formats = ["onnx", "openvino", *(["trt"] if precision != "bf16" else [])]
    made = convert(artifact.path, to=formats, output=tmp_path / "low", precision=precision)
    stored = "fp16" if precision == "auto" else precision
    assert {f.precision for f in made.manifest.files} == {stored}
    model = onnx.load(made.path / f"generator.{stored}.onnx")
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    wanted = {"fp16": 10, "bf16": 16, "int8": 3}[stored]
    assert wanted in {tensor.data_type for tensor in model.graph.initializer}
    found = made.find("onnx").certificate
    assert found.verdict == "pass"
    assert found.precision == stored
    # ONNX Runtime's CPU has no bf16 convolution, so that file is certified by OpenVINO, and says so.
    assert found.runtime.startswith("openvino" if stored == "bf16" else "onnxruntime")
    assert any(stored in line for line in made.find("onnx").passes)


@pytest.mark.parametrize("overflows", [False, True])
def test_int8_weights_of_8_bits_are_not_run_where_they_overflow(overflows, artifact, tmp_path, monkeypatch):
    # An artifact made on a processor with VNNI (or without) comes to one without.
    monkeypatch.setattr("ganexport.build.quantize.int8_overflows", lambda: overflows)
    monkeypatch.setattr("ganexport.runtime.openvino.int8_overflows", lambda: True)
    made = convert(artifact.path, to="onnx", output=tmp_path / "int8", precision="int8")
    assert made.find("onnx").requires["int8_weights"] == ("7 bits" if overflows else "8 bits")
    pictures = {}
    for name, path in (("fp32", artifact.path), ("int8", made.path)):
        with ganexport.load(path, "onnxruntime") as generator:
            pictures[name] = generator.sample(64, seed=3)["image"]
    reference = pictures["fp32"]
    assert 10 * np.log10(4 / np.mean((pictures["int8"] - reference) ** 2)) > 35
    if not overflows:
        with pytest.raises(BackendUnavailableError, match="convert with --precision int8 here"):
            ganexport.load(made.path, "openvino")
        return
    with ganexport.load(made.path, "openvino") as generator:
        image = generator.sample(64, seed=3)["image"]
    assert 10 * np.log10(4 / np.mean((image - reference) ** 2)) > 35


def test_an_artifact_in_one_precision_is_not_made_into_a_wider_one(artifact, tmp_path):
    half = convert(artifact.path, to="onnx", output=tmp_path / "half", precision="fp16")
    with pytest.raises(UsageError, match="is fp16: other precisions are made from fp32"):
        convert(half.path, to="openvino", output=tmp_path / "x")
    again = convert(half.path, to="openvino", output=tmp_path / "y", precision="fp16")
    assert again.find("openvino", "fp16").certificate.verdict == "pass"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing/folder", "--to", "onnx"], "missing"),
        (["generators.tiny:make", "--to", "onnx"], "describe its inputs"),
        (["generators.tiny:make", "--to", "onyx", *Z], "Did you mean 'onnx'"),
        (["generators.tiny:make", "--to", "onnx", "--precision", "fp8", *Z], "unknown precision"),
        (["generators.tiny:nothing", "--to", "onnx", *Z], "has no 'nothing'"),
        (["generators.nowhere:make", "--to", "onnx", *Z], "no module"),
        (["generators.tiny:number", "--to", "onnx", *Z], "gives a int"),
        (["generators.tiny:broken", "--to", "onnx", *Z], "no weights here (tiny.py:"),
        (["generators.tiny:make", "--to", "onnx", "--input", "z=gauss[batch,16]"], "unknown sampler"),
        (["generators.tiny:make", "--to", "onnx", "--input", "z=normal[batch,16]", "--dim", "h=1:2:3"], "--dim h"),
        (["generators.tiny:make", "--to", "onnx", "--input", "z=normal[batch,17]"], "running the module on"),
        (["generators.tiny:make", "--to", "torchscript", "--precision", "fp16", *Z], "fp32 only"),
        (["generators.tiny:make", "--to", "onnx", "--noise", "maybe", *Z], "--noise"),
        (["generators.tiny:make", "--to", "onnx", "--truncation", "0.5", *Z], "--truncation"),
        (["generators.tiny:make", "--to", "onnx", "--output-dtype", "uint8", *Z], "image"),
        (["generators.tiny:make", "--to", "onnx", "--weights", "none.safetensors", *Z], "no such weights"),
        (["generators.tiny:make", "--to", "onnx", "--batch", "9:3:1", *Z], "min <= opt <= max"),
        (["generators.tiny:make", "--to", "onnx", "--min-psnr", "nan", *Z], "--min-psnr nan"),
        (["generators.tiny:make", "--to", "onnx", "--min-psnr", "inf", *Z], "--min-psnr inf"),
        (["generators.tiny:make", "--to", "onnx", "--min-psnr", "-3", *Z], "--min-psnr -3"),
        (["generators.tiny:make", "--to", "onnx", "--verify-budget", "nan", *Z], "--verify-budget nan"),
        (["generators.tiny:make", "--to", "auto", "--min-psnr", "nan", *Z], "--min-psnr nan"),
        (["generators.tiny:make", "--to", "onnx", "--truncation", "nan", *Z], "--truncation nan"),
        (["dcgan-mnist", "--to", "onnx", *Z], "--input: dcgan-mnist already says"),
        (["dcgan-mnist", "--to", "onnx", "--output", "image=[0,1]"], "--output: dcgan-mnist already says"),
        (["dcgan-mnist", "--to", "onnx", "--weights-key", "ema"], "--weights-key is for package.module:factory"),
        (["generators.tiny:described", "--to", "onnx", "--output", "image=[0,1]"], "--output: generators.tiny:descr"),
    ],
)  # fmt: skip
def test_user_errors_are_one_line_and_exit_2(arguments, words, tmp_path, capsys):
    assert run(["convert", *arguments, "-o", str(tmp_path / "out")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert words in error[0]
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == [], "nothing half-written is left"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--noise", "input"], "--noise is baked in when a module is exported"),
        (["--weights-key", "g_ema"], "--weights-key is for package.module:factory"),
        (["--opset", "18"], "--opset 18: generator.onnx is a finished graph of opset 20"),
        (["--truncation", "0.5", "--mapping", "style"], "--truncation is baked in when a module is exported"),
    ],
)
def test_options_that_only_a_module_can_honour_are_refused_for_graphs(artifact, arguments, words, tmp_path, capsys):
    for to in ("onnx", "auto"):
        assert run(["convert", str(artifact.path), "--to", to, *arguments, "-o", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    if arguments[0] != "--opset":
        against = ["--against", str(artifact.path / "generator.onnx")]
        assert run(["verify", str(artifact.path), "--format", "onnx", *against, *arguments]) == 2
        assert words in capsys.readouterr().err
        assert run(["verify", str(artifact.path), "--format", "onnx", *arguments]) == 2
        assert "describes --against SOURCE, which is missing" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--min-psnr", "nan"], ["--min-psnr", "-inf"], ["--verify-budget", "-1"]])
def test_verify_refuses_limits_that_judge_nothing(artifact, arguments, capsys):
    assert run(["verify", str(artifact.path), "--format", "onnx", *arguments]) == 2
    assert f"error: {' '.join(arguments)}: needs a" in capsys.readouterr().err


def test_the_output_option_takes_the_artifact_and_the_descriptions(tmp_path):
    from ganexport.cli.convert import split_outputs

    path, specs = split_outputs(("a/b", "image=[-1,1]:NCHW", "mask = [0,1]"))
    assert (str(path), specs) == ("a/b", ("image=[-1,1]:NCHW", "mask = [0,1]"))
    for given in ((), ("a", "b"), ("image=[-1,1]",)):
        with pytest.raises(UsageError, match="exactly one"):
            split_outputs(given)


def test_a_foreign_folder_is_not_overwritten(artifact, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert run(["convert", str(artifact.path), "--to", "openvino", "-o", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


class FixedShapes(torch.nn.Module):
    """z [4, 8] → [4, 3, 4, 4], or z [8] → [3, 4, 4]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(8, 48)

    def forward(self, z):
        return torch.tanh(self.project(z)).view(*z.shape[:-1], 3, 4, 4)


@pytest.mark.parametrize(("shape", "layout"), [("4,8", "NCHW"), ("8", "CHW")])
def test_a_generator_of_fixed_shapes_is_shown_them(tmp_path, shape, layout):
    artifact = convert(
        FixedShapes().eval(), to=["onnx", "torchscript"], output=tmp_path / "a", inputs=[f"z=normal[{shape}]"],
        outputs=[f"image=[-1,1]:{layout}"], verify_budget=2.0,
    )  # fmt: skip
    sizes = tuple(map(int, shape.split(",")))
    assert artifact.spec.inputs[0].shape == sizes
    assert artifact.spec.outputs[0].shape == (*sizes[:-1], 3, 4, 4)
    z = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    for backend in ("onnxruntime", "torchscript"):
        with ganexport.load(artifact.path, backend) as generator, torch.no_grad():
            found = generator.run({"z": z})["image"]
            np.testing.assert_allclose(found, FixedShapes()(torch.from_numpy(z)).numpy(), atol=1e-5)


def test_the_next_command_can_be_pasted(tmp_path, capsys):
    folder = tmp_path / "it's here"
    described = ["--input", "z=normal[batch,8]", "--batch", "1:2:3", "--verify-budget", "1"]
    assert run(["convert", "generators.tiny:Trap", "--to", "onnx", *described, "-o", str(folder)]) == 0
    told = capsys.readouterr().out.split("next: ")[1]
    assert shlex.split(told)[:3] == ["ganexport", "generate", str(folder)]
