"""Lone files, made by the libraries themselves, measured through the command."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ganexport.bench.api import benchmark
from ganexport.bench.candidates import find_candidates
from ganexport.bench.factories import open_torch
from ganexport.bench.lone import Said, profiles, spec_of_ports
from ganexport.errors import BackendUnavailableError, UsageError
from ganexport.runtime.base import Tensor
from ganexport.spec import Dim, Normal, parse_dim, parse_input, spec_from_json
from tests.bench import onnx_models

torch = pytest.importorskip("torch")
QUICK = {"seconds": 0.1, "rounds": 2, "warm_up": 0.3, "peaks": False, "scenarios": ("single-stream",)}
Z = parse_input("z=normal[batch,16]")


class Net(torch.nn.Module):
    def __init__(self, baked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.up = torch.nn.Linear(16, 128), torch.nn.ConvTranspose2d(8, 3, 4, 2, 1)
        self.baked = baked

    def forward(self, z):
        x = self.up(self.project(z).view(-1, 8, 4, 4)).tanh()
        return x[:1] if self.baked else x


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lone")
    (path / "g.onnx").write_bytes(onnx_models.generator().SerializeToString())
    torch.jit.trace(Net().eval(), torch.zeros(2, 16)).save(str(path / "g.ts"))
    torch.jit.trace(Net(baked=True).eval(), torch.zeros(2, 16)).save(str(path / "baked.pt"))
    torch.save(Net().state_dict(), path / "weights.pt")
    return path


@pytest.fixture(scope="module")
def openvino_file(folder):
    openvino = pytest.importorskip("openvino")
    model = openvino.convert_model(str(folder / "g.onnx"))
    openvino.save_model(model, str(folder / "g.xml"), compress_to_fp16=False)
    openvino.save_model(model, str(folder / "half.xml"))
    return folder / "g.xml"


def run(*arguments):
    command = [sys.executable, "-m", "ganexport", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_torchscript_file_described_by_the_user_is_measured(folder):
    (row,) = benchmark(folder / "g.ts", inputs=[Z], **QUICK).measurements
    assert row.series, row.unavailable
    assert row.candidate["name"] == "torchscript g.ts"
    assert row.candidate["precision"] == "fp32"
    assert row.conditions["items"] == 1


def test_its_spec_is_found_by_running_it(folder):
    (candidate,) = find_candidates([str(folder / "g.ts")], inputs=[Z], dims=[Dim("batch", 1, 2, 4)])
    spec = spec_from_json(candidate.arguments["spec"])
    assert spec.outputs[0].shape == ("batch", 3, 8, 8)
    assert spec.dims == (Dim("batch", 1, 2, 4),)


def test_openvino_files_describe_themselves_and_say_their_precision(openvino_file):
    whole, half = find_candidates([str(openvino_file), str(openvino_file.with_name("half.xml"))])
    assert [c.about["precision"] for c in (whole, half)] == ["fp32", "fp16"]
    spec = spec_from_json(whole.arguments["spec"])
    assert spec.inputs[0].shape == ("batch", 16)
    assert spec.inputs[0].sampler == Normal()
    rows = benchmark(openvino_file, openvino_file.with_name("half.xml"), **QUICK).measurements
    assert [row.parity["verdict"] for row in rows] == ["reference", "pass"]


def test_another_source_describes_what_a_file_does_not_say(folder, openvino_file):
    """An ONNX file beside it knows the inputs, and the names and order of the outputs."""
    rows = benchmark(folder / "g.ts", openvino_file, folder / "g.onnx", backends=(), **QUICK).measurements
    verdicts = {row.candidate["name"]: row.parity["verdict"] for row in rows if row.series}
    assert verdicts.pop("torchscript g.ts") == "reference"
    # Other weights than the ONNX file's: compared by the same names, and found to be another generator.
    assert set(verdicts.values()) == {"fail"}
    assert all("no such" not in text for row in rows[1:] for text in row.parity["failures"])


def test_outputs_of_other_names_are_compared_by_position(folder, openvino_file):
    """Two lone files, described by the user alone: output_0 of the one is image of the other."""
    rows = benchmark(folder / "g.ts", openvino_file, inputs=[Z], **QUICK).measurements
    assert rows[1].parity["verdict"] == "fail"  # other weights: compared, and found to differ
    assert "no such output" not in " ".join(rows[1].parity["failures"])
    assert 0 < rows[1].parity["max_abs"] < 3


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("g.ts", (), 'does not say the shapes of its inputs (z): describe them, e.g. --input "z=normal[batch,128]"'),
        ("g.ts", ("--input", "z=normal[batch,17]"), "g.ts: fails on z [1, 17]"),
        ("g.ts", ("--input", "z=normal[batch,w]"), "--dim w=min:opt:max"),
        ("baked.pt", ("--input", "z=normal[batch,16]"), "its batch size is baked in"),
        ("weights.pt", ("--input", "z=normal[batch,16]"), "not TorchScript; weights alone cannot be run"),
        ("cut.ts", ("--input", "z=normal[batch,16]"), "not a .ts file of torch, or cut short"),
        ("program.pt2", ("--input", "z=normal[batch,16]"), "an exported program, not compiled"),
        ("alone.xml", (), "its weights are missing, put alone.bin beside it"),
        ("bad.xml", (), "OpenVINO cannot read it"),
        ("notes.txt", (), "not a file that can be measured alone"),
        ("gone.engine", (), "no such file"),
    ],
)
def test_what_cannot_be_measured_says_why_and_what_to_do(folder, name, options, words):
    for file, content in (("cut.ts", (folder / "g.ts").read_bytes()[:999]), ("alone.xml", b"<net/>")):
        (folder / file).write_bytes(content)
    for file in ("bad.xml", "bad.bin", "notes.txt"):
        (folder / file).write_text("hello")
    if name == "program.pt2":
        torch.export.save(torch.export.export(Net().eval(), (torch.zeros(2, 16),)), folder / name)
    done = run(folder / name, *options, "--seconds", "0.1")
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_lone_engine_without_a_gpu_is_a_row_with_its_reason(folder):
    from ganexport.runtime.tensorrt import TensorRtRunner

    if TensorRtRunner.unavailable() is None:
        pytest.skip("tests/gpu opens real engines")
    (folder / "x.engine").write_bytes(b"engine")
    rows = benchmark(folder / "g.onnx", folder / "x.engine", backends=("onnxruntime", "tensorrt"), **QUICK).measurements
    assert [bool(row.unavailable) for row in rows] == [False, True]
    assert rows[1].candidate["name"] == "tensorrt x.engine cuda"
    assert "no usable GPU" in rows[1].unavailable or "not installed" in rows[1].unavailable


def test_an_engine_says_the_ranges_of_its_sizes():
    ranges = {"z": ((1, 16), (8, 16), (32, 16)), "y": ((1,), (8,), (32,))}
    engine = SimpleNamespace(get_tensor_profile_shape=lambda name, _profile: ranges[name])
    inputs = [Tensor("z", "float32", (None, 16)), Tensor("y", "int64", (None,))]
    outputs = [Tensor("image", "float32", (None, 3, 8, 8))]
    said = Said((parse_input("z=normal[batch,16]"), parse_input("y=label(10)[batch]")))
    spec = spec_of_ports(inputs, outputs, said, onnx_models.Path("x.engine"), profiles(engine, inputs))
    assert spec.dims == (Dim("batch", 1, 8, 32),)
    assert spec.outputs[0].shape == ("batch", 3, 8, 8)


def test_ports_that_only_the_user_can_describe():
    path = onnx_models.Path("x.xml")
    with pytest.raises(UsageError, match=r"input 'y' is int64: describe it, e.g. --input \"y=label\(10\)\[batch\]\""):
        spec_of_ports([Tensor("y", "int64", (None,))], [], Said(), path)
    with pytest.raises(UsageError, match=r"size 2 of input 'x' is free.* --dim \"d2=min:opt:max\""):
        spec_of_ports([Tensor("x", "float32", (None, 3, None))], [], Said(), path)
    with pytest.raises(UsageError, match=r"input 'z' is \[\?, 16\], described as \[batch, 17\]"):
        spec_of_ports([Tensor("z", "float32", (None, 16))], [], Said((parse_input("z=normal[batch,17]"),)), path)
    two = Said((parse_input("a=normal[batch,16]"), parse_input("b=normal[batch,16]")))
    with pytest.raises(UsageError, match="has inputs z; described were a, b"):
        spec_of_ports([Tensor("z", "float32", (None, 16))], [], two, path)
    picture = Said((parse_input("x=uniform(0,1)[batch,3,height]"),), (parse_dim("height=64:128:256/8"),))
    spec = spec_of_ports([Tensor("image", "float32", (None, 3, None))], [], picture, path)
    assert (spec.inputs[0].name, spec.inputs[0].shape) == ("image", ("batch", 3, "height"))
    assert {dim.name for dim in spec.dims} == {"batch", "height"}


@pytest.mark.slow
def test_a_compiled_package_is_measured(folder):
    batch = torch.export.Dim("batch", min=1, max=32)
    program = torch.export.export(Net().eval(), (torch.zeros(2, 16),), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "g.pt2"))
    rows = benchmark(folder / "g.ts", folder / "g.pt2", inputs=[Z], dims=[Dim("batch", 1, 2, 32)], **QUICK).measurements
    assert [row.parity["verdict"] for row in rows] == ["reference", "pass"]
    assert rows[1].candidate["name"] == "aoti g.pt2"


def test_a_report_of_lone_files_is_plain_json(folder, tmp_path):
    done = run(folder / "g.ts", "--input", "z=normal[batch,16]", "--seconds", "0.1", "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measurements"][0]["candidate"]["format"] == "torchscript"


def test_a_factory_that_says_nothing_of_its_inputs_is_told_to_be_converted(tmp_path, monkeypatch):
    (tmp_path / "bare_factory.py").write_text("import torch\n\n\ndef make():\n    return torch.nn.Linear(8, 3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailableError, match="not described; convert it and measure the artifact"):
        open_torch("bare_factory:make")
