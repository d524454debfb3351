"""What users bring: each construct once, with free sizes, to ONNX and TensorRT."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

import ganexport
from ganexport.build.options import BuildOptions
from ganexport.cli.main import run
from ganexport.errors import ExportError, UsageError
from ganexport.export.convert import convert
from ganexport.export.verify import verify

Z = {"inputs": ["z=normal[batch,16]"], "batch": "1:4:9"}
MEL = {"inputs": ["mel=normal[batch,20,frames]"], "batch": "1:1:3", "dims": ["frames=8:32:60"]}
IMAGE = {"inputs": ["image=uniform(-1,1)[batch,3,16,16]"], "batch": "1:2:5"}
#: Any height and width, odd ones included.
ANY = {
    "inputs": ["image=uniform(-1,1)[batch,3,height,width]"],
    "batch": "1:1:3",
    "dims": ["height=9:16:31", "width=9:16:24"],
}
FOURS = ANY | {"dims": ["height=8:16:32/4", "width=8:16:24/4"]}
CASES = {
    "Vocos": MEL,
    "LSTMVocoder": MEL,
    "LSTMState": MEL,
    "MelGAN": MEL,
    "SPADE": FOURS | {"inputs": ["seg=uniform(0,1)[batch,5,height,width]"], "dims": FOURS["dims"]},
    "ResizeUNet": ANY,
    "PadUNet": ANY,
    "RopeGAN": {"inputs": ["z=normal[batch,8]"], "batch": "1:4:9"},
    "Einsum": Z,
    "ViTGAN": Z,
    "TransGAN": Z,
    "TransDec": {"inputs": ["tokens=label(30)[batch,length]"], "batch": "1:2:4", "dims": ["length=2:8:20"]},
    "AdaINGAN": Z,
    "STN": FOURS,
    "FlowWarp": FOURS,
    "Triplane": {
        "inputs": ["z=normal[batch,16]", "rays=uniform(-1,1)[batch,n,3]"],
        "batch": "1:2:4",
        "dims": ["n=4:16:30"],
    },
    "VQDecoder": {
        "inputs": ["codes=label(64)[batch,height,width]"],
        "batch": "1:2:4",
        "dims": ["height=4:8:12", "width=4:8:12"],
    },
    "UpdatesEMA": Z,
    "DictIn": {"inputs": ["batch.z=normal[batch,16]", "batch.y=label(10)[batch]"], "batch": "1:4:9"},
    "ListIn": {"inputs": ["styles.0=normal[batch,16]", "styles.1=normal[batch,16]"], "batch": "1:4:9"},
    "DataclassOut": Z,
    "NestedOut": Z,
    "HalfWeightsCasts": Z,
    "Ckpt": Z,
    "Vmap": Z,
    "Kitchen": FOURS,
    "Unfolds": IMAGE,
    "Unpool": IMAGE,
    "Video": Z,
    "Parametrized": Z,
    "TopK": Z,
    "GRUCellLoop": Z,
    "ScriptedSub": Z,
    "TracedSub": Z,
    "ScriptFn": Z,
    "CompiledSub": Z,
    "CompiledFn": Z,
    "WindowAttn": FOURS,
    "TVDeepLab": FOURS,
    "FilteredLrelu": Z,
}
#: Operators that TensorRT does not have, and what its refusal names.
NO_ENGINE = {"Kitchen": "Antialiasing is not supported", "Unpool": "MaxPool"}
QUICK = ("LSTMVocoder", "DictIn", "NestedOut", "ScriptFn", "PadUNet")


@pytest.mark.parametrize(
    ("name", "described"),
    [pytest.param(n, d, id=n, marks=() if n in QUICK else pytest.mark.slow) for n, d in CASES.items()],
)
def test_a_construct_converts_and_holds_at_unseen_sizes(name, described, tmp_path):
    torch.manual_seed(0)
    made = convert(
        f"generators.strange:{name}", to=["onnx", *(() if name in NO_ENGINE else ("trt",))], output=tmp_path / "out",
        verify_budget=10, options=BuildOptions(builder_level=0), **described,
    )  # fmt: skip
    certificate = made.find("onnx").certificate
    assert certificate.verdict == "pass"
    assert certificate.deterministic is True
    for dim in made.spec.dims:
        assert {dim.min, dim.max} <= {sizes[dim.name] for sizes in certificate.unseen}
    passes = made.find("onnx").passes
    if name == "LSTMVocoder":
        assert "free-length-recurrence: 1 recurrent layers kept whole" in passes
    if name == "NestedOut":
        assert [t.name for t in made.spec.outputs] == ["image", "feats.0", "feats.1", "aux.k"]
    if name == "DataclassOut":
        assert [t.name for t in made.spec.outputs] == ["image", "w"]
    if name == "HalfWeightsCasts":
        assert "float32-weights: 2 tensors of float16" in passes
        assert "half-casts-off: 1 casts of forward to half precision stay in fp32" in passes


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_ENGINE)
def test_what_tensorrt_cannot_build_is_refused_by_name(name, tmp_path):
    with pytest.raises(ExportError, match=NO_ENGINE[name]):
        convert(f"generators.strange:{name}", to="trt", output=tmp_path / "out", **CASES[name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Window", "Crop"])
def test_padding_to_a_multiple_and_cropping_again_holds_at_every_size(name, tmp_path):
    made = convert(f"generators.strange:{name}", to="onnx", output=tmp_path / "out", **ANY)
    certificate = made.find("onnx").certificate
    assert certificate.verdict == "pass"
    assert {9, 31} <= {sizes["height"] for sizes in certificate.unseen}
    assert any(sizes["height"] % 2 and sizes["width"] % 8 for sizes in certificate.unseen)
    assert any(line.startswith("unproved-sizes: ") for line in made.find("onnx").passes)


def test_a_crop_does_not_hide_a_branch_on_the_size(tmp_path):
    with pytest.raises(ExportError, match=r"strange\.py:\d+"):
        convert("generators.strange:CropAndBranch", to="onnx", output=tmp_path / "out", **ANY)


def test_a_compiled_module_is_exported_as_written(tmp_path):
    from generators.strange import Sub

    torch.manual_seed(0)
    made = convert(torch.compile(Sub()), to="onnx", output=tmp_path / "out", inputs=["x=normal[batch,16]"])
    assert made.find("onnx").certificate.verdict == "pass"


def test_data_parallel_modules_export(tmp_path):
    from generators.strange import Sub

    torch.manual_seed(0)
    made = convert(torch.nn.DataParallel(Sub()), to="onnx", output=tmp_path / "out", inputs=["x=normal[batch,16]"])
    assert made.find("onnx").certificate.verdict == "pass"


def test_a_recurrent_layer_over_a_free_length_is_traced_and_refused_by_aoti_in_one_line(tmp_path):
    made = convert("generators.strange:LSTMVocoder", to="torchscript", output=tmp_path / "traced", **MEL)
    assert made.find("torchscript").certificate.verdict == "pass"
    with pytest.raises(ExportError, match="AOTInductor cannot hold a recurrent layer") as caught:
        convert("generators.strange:LSTMVocoder", to="aoti", output=tmp_path / "aoti", **MEL)
    assert "\n" not in str(caught.value)
    assert "--to onnx" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "WritesInput",
        "Hooked",
        "DictWithNone",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("Called", "KeywordOnly", "Unsaved", "Unchanged")),
    ],
)
def test_a_habit_converts_to_both_formats_and_they_agree(name, tmp_path):
    made = convert(
        f"generators.tiny:{name}", to=["torchscript", "onnx"], output=tmp_path / "out", batch="1:2:5",
        inputs=["z=normal[batch,8]"], verify_budget=5,
    )  # fmt: skip
    assert {file.certificate.verdict for file in made.manifest.files} == {"pass"}
    assert verify(made.path, against=f"generators.tiny:{name}", budget=5).passed
    drawn = []
    for backend in ("torchscript", "onnxruntime"):
        with ganexport.load(made.path, backend) as generator:
            drawn.append(generator.sample(3, seed=1))
    for key, value in drawn[0].items():
        np.testing.assert_allclose(drawn[1][key], value, atol=1e-5)


def test_content_and_style_may_have_batches_of_their_own(tmp_path):
    class Pairs(nn.Module):
        def forward(self, content, style):
            return (content[:, None] * style[None]).flatten(0, 1)

    made = convert(
        Pairs(), to=["torchscript", "onnx"], output=tmp_path / "out", batch="1:2:5", dims=["styles=1:2:4"],
        inputs=["content=normal[batch,8]", "style=normal[styles,8]"],
    )  # fmt: skip
    assert {file.certificate.verdict for file in made.manifest.files} == {"pass"}
    assert {"batch": 5, "styles": 4} in made.find("onnx").certificate.sizes


def test_a_torchscript_module_is_kept_and_refused_for_onnx(tmp_path):
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(16, 12), nn.Tanh()), torch.zeros(2, 16))
    made = convert(scripted, to="torchscript", output=tmp_path / "kept", **Z)
    assert made.find("torchscript").certificate.verdict == "pass"
    with pytest.raises(ExportError, match="the module is TorchScript"):
        convert(scripted, to="onnx", output=tmp_path / "out", **Z)


def test_a_factory_sees_no_command_line_and_its_prints_stay_out_of_the_json(tmp_path, capsys):
    z = ["--input", "z=normal[batch,8]"]
    out = str(tmp_path / "out")
    assert run(["convert", "generators.tiny:parses", "--to", "torchscript", *z, "-o", out, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["files"][0]["format"] == "torchscript"
    assert "seed 0" in told.err
    for name, words in (("needs_an_argument", "(sys.exit);"), ("leaves", "(sys.exit: no checkpoint here);")):
        assert run(["convert", f"generators.tiny:{name}", "--to", "onnx", *z, "-o", str(tmp_path / "no")]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert words in error[0]


def state(module):
    """Everything of a module that converting could change."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return (
        {name: (t.dtype, t.requires_grad, t.tolist()) for name, t in tensors},
        {name: (m.training, type(m), len(m._forward_pre_hooks)) for name, m in module.named_modules()},
        torch.get_rng_state().tolist(),
    )


def test_a_module_in_training_is_converted_and_stays_as_it_was(tmp_path):
    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = parametrizations.spectral_norm(nn.Linear(16, 8))
            self.low = nn.Linear(8, 8).bfloat16()
            self.norm = nn.BatchNorm1d(8)
            with pytest.warns(FutureWarning):
                self.last = old_weight_norm(nn.Linear(8, 12))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, z):
            self.calls += 1
            hidden = self.low(self.first(z).bfloat16()).float()
            return torch.tanh(self.last(self.norm(hidden))).view(-1, 3, 2, 2)

    torch.manual_seed(0)
    module = Training()
    module(torch.randn(4, 16)).sum().backward()  # weight norm now holds a tensor with a history
    before = state(module)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    made = convert(
        module, to=["onnx", "torchscript"], output=tmp_path / "out", verify_budget=5, mapping="first", truncation=0.7,
        **Z,
    )  # fmt: skip
    assert {f.certificate.verdict for f in made.manifest.files} == {"pass"}
    assert state(module) == before
    assert all(torch.equal(p.grad, gradients[name]) for name, p in module.named_parameters())
    module(torch.randn(4, 16)).sum().backward()


def test_a_module_without_values_or_a_copy_is_refused_in_one_line(tmp_path):
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 12)
            self.inner.guard = threading.Lock()

        def forward(self, z):
            return self.inner(z)

    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(16, 12))
    for module, error, words in (
        (empty, UsageError, "0.weight is on the meta device"),
        (nn.Sequential(nn.LazyLinear(12)), UsageError, "0.weight has no size yet"),
        (Locked(), ExportError, r"cannot be copied: guard of Linear \(TypeError"),
    ):
        with pytest.raises(error, match=words) as caught:
            convert(module, to="onnx", output=tmp_path / "out", **Z)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
