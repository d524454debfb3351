"""What stock exporters publish silently wrong is refused with the line and the fix, or made right and proved."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from ganexport.artifact import Artifact
from ganexport.build.golden import read_golden
from ganexport.build.options import BuildOptions
from ganexport.errors import ExportError, ParityError
from ganexport.export.convert import convert

DESCRIBED = {"inputs": ["z=normal[batch,8]"], "outputs": ["image=[-1,1]:NCHW"], "batch": "1:6:9"}


def export(name, tmp_path, to="onnx", **settings):
    return convert(f"generators.tiny:{name}", to=to, output=tmp_path / "out", **{**DESCRIBED, **settings})


def line_of(name, text):
    from pathlib import Path

    source = (Path(__file__).parent / "generators" / "tiny.py").read_text().splitlines()
    start = next(i for i, line in enumerate(source) if line.startswith(f"class {name}("))
    return next(i + 1 for i in range(start, len(source)) if text in source[i])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("FreshNoise", "randn_like", ["randn_like", "--noise input", "--noise constant"]),
        ("LiveDropout", "F.dropout", ["dropout is left on", "--noise input"]),
        ("GumbelNoise", "exponential_", ["exponential_", "--noise input"]),
        ("RandomChoice", "randperm", ["randperm", "argument of forward"]),
        ("SizeBranch", "shape[0] > 4", ["branches on the size of batch", "max=4", "--dim batch"]),
        ("DataBranch", "h.mean() > 0", ["depends on the input", "torch.where"]),
        ("FixedBatch", "range(h.shape[0])", ["fixes batch (to 3)", "--dim batch=3"]),
    ],
)
def test_a_trap_is_refused_with_file_line_and_fix(name, text, words, tmp_path):
    with pytest.raises(ExportError) as caught:
        export(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"tiny.py:{line_of(name, text)}: ")
    for word in words:
        assert word in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["NumpyNoise", "Counts"])
@pytest.mark.parametrize("noise", ["error", "input"])
def test_randomness_outside_torch_is_refused_before_anything_is_exported(name, noise, tmp_path):
    with pytest.raises(ExportError, match=r"two outputs for the same input.*numpy or Python's random"):
        export(name, tmp_path, noise=noise)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["FreshNoise", "LiveDropout", "GumbelNoise", "Reparametrised"])
def test_noise_becomes_a_named_input(name, tmp_path):
    made = export(name, tmp_path, to=["onnx", "torchscript"], noise="input")
    assert [t.name for t in made.spec.inputs] == ["z", "noise_0"]
    assert made.spec.input("noise_0").shape == ("batch", 16)
    for file in made.manifest.files:
        assert file.certificate.verdict == "pass"
        assert file.certificate.deterministic
        assert any(line.startswith("noise-input: 1 random calls, first tiny.py:") for line in file.passes)
    (feeds, outputs), *_ = read_golden(made.golden_path(), made.spec)
    assert np.ptp(feeds["noise_0"]) > 0
    assert np.isfinite(outputs["image"]).all()


@pytest.mark.parametrize("name", ["FreshNoise", "LiveDropout"])
def test_noise_becomes_a_constant_that_every_sample_shares(name, tmp_path):
    made = export(name, tmp_path, noise="constant")
    assert [t.name for t in made.spec.inputs] == ["z"]
    assert made.find("onnx").certificate.verdict == "pass"
    model = onnx.load(made.path / "generator.onnx")
    assert not [node for node in model.graph.node if node.op_type.startswith(("Random", "Dropout", "Bernoulli"))]


def test_a_size_branch_is_caught_by_torchscripts_certificate_too(tmp_path):
    with pytest.raises((ExportError, ParityError), match=r"TorchScript cannot hold|outside tolerance"):
        export("SizeBranch", tmp_path, to="torchscript")
    assert not (tmp_path / "out").exists()


def test_a_data_branch_is_not_traced_into_torchscript(tmp_path):
    with pytest.raises((ExportError, ParityError), match=r"TorchScript cannot hold|outside tolerance"):
        export("DataBranch", tmp_path, to="torchscript")


def test_a_layer_that_overflows_fp16_is_named_with_its_line(tmp_path):
    with pytest.raises(ParityError) as caught:
        export("OverflowsHalf", tmp_path, precision="fp16")
    message = str(caught.value)
    assert "first layer to diverge is Mul" in message
    # torch records where forward stood, not the function that it called.
    assert f"tiny.py:{line_of('Trap', 'torch.tanh')}" in message
    assert "--precision auto" in message
    assert (tmp_path / "out-onnx-fp16-worst.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out").exists()


def test_precision_auto_keeps_the_overflowing_layer_in_fp32_and_records_it(tmp_path):
    file = export("OverflowsHalf", tmp_path, precision="auto").find("onnx")
    assert file.precision == "fp16"
    assert file.certificate.verdict == "pass"
    kept = next(line for line in file.passes if line.startswith("keep-fp32: "))
    assert "mul" in kept


def test_a_layer_can_be_kept_in_fp32_by_name_and_an_unknown_one_is_refused(tmp_path):
    kept = export("OverflowsHalf", tmp_path, precision="fp16", options=BuildOptions(keep_fp32=("Mul",)))
    assert kept.find("onnx").certificate.verdict == "pass"
    with pytest.raises(Exception, match="no node or operator"):
        export("OverflowsHalf", tmp_path, precision="fp16", options=BuildOptions(keep_fp32=("Mull",)))


def test_a_mismatch_is_published_only_when_allowed_and_is_recorded(tmp_path):
    made = export("OverflowsHalf", tmp_path, precision="fp16", allow_mismatch=True)
    found = made.find("onnx").certificate
    assert found.verdict == "fail"
    assert not found.passed
    assert "dB" in found.failures[0]


def test_custom_autograd_functions_run_as_their_forward(tmp_path):
    made = export("CustomFunctions", tmp_path, to=["torchscript", "onnx"])
    assert {f.certificate.verdict for f in made.manifest.files} == {"pass"}


def test_a_size_that_the_network_cannot_take_says_to_give_a_step(tmp_path):
    described = {"inputs": ["x=normal[batch,3,h,w]"], "outputs": [], "dims": ["h=8:8:12", "w=8:8:12"], "batch": "1:1:2"}
    with pytest.raises(ExportError, match=r"--dim h=min:opt:max/step"):
        export("NeedsEven", tmp_path, **described)
    described["dims"] = ["h=8:8:12/2", "w=8:8:12/2"]
    made = export("NeedsEven", tmp_path, **described)
    assert made.find("onnx").certificate.verdict == "pass"
    assert made.spec.outputs[0].shape == ("batch", 3, "h", "w")


def test_outputs_keep_the_modules_names_and_order(tmp_path):
    named = export("Named", tmp_path, call="gain=0.5")
    assert [t.name for t in named.spec.outputs] == ["image", "features"]
    assert [v.name for v in onnx.load(named.path / "generator.onnx").graph.output] == ["image", "features"]
    listed = export("AsTuple", tmp_path)
    assert [t.name for t in listed.spec.outputs] == ["image", "output_1"]
    assert export("AsTuple", tmp_path, outputs=["image=[-1,1]:NCHW", "code=[-9,9]"]).spec.outputs[1].name == "code"


def test_a_constant_flag_is_no_data_branch(tmp_path):
    assert export("ReadsFlag", tmp_path).find("onnx").certificate.verdict == "pass"


@pytest.mark.slow  # the C++ compiler takes half a minute
def test_aot_inductor_packages_hold_at_sizes_they_were_not_compiled_with(tmp_path):
    file = export("Trap", tmp_path, to="aoti").find("aoti")
    assert file.certificate.verdict == "pass"
    assert {"batch": 9} in file.certificate.unseen
    assert file.requires["device"] == "cpu"


def test_a_grid_of_the_inputs_size_stays_symbolic(tmp_path):
    described = {"inputs": ["x=normal[batch,3,h,w]"], "outputs": [], "dims": ["h=2:8:12", "w=3:8:13"], "batch": "1:1:2"}
    file = export("Warps", tmp_path, **described).find("onnx")
    assert file.certificate.verdict == "pass"
    assert "symbolic-linspace: 2 grids whose size follows the input's" in file.passes


def test_a_module_that_autocasts_itself_is_proved_in_fp32(tmp_path):
    file = export("AutocastsItself", tmp_path, to=["onnx", "torchscript"]).find("onnx")
    assert file.certificate.verdict == "pass"
    assert "autocast-off: 1 regions of forward run in fp32" in file.passes
    (feeds, outputs), *_ = read_golden((tmp_path / "out" / "golden.npz"), Artifact(tmp_path / "out").spec)
    import torch
    from generators.tiny import Trap

    with torch.no_grad():
        truth = Trap().eval()(torch.from_numpy(feeds["z"])).numpy()
    assert np.abs(outputs["image"] - truth).max() < 1e-6
