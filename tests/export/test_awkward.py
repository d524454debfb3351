"""Generators with a catch: it is noticed, worked around, or refused with its line and what to do."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import torch

import ganexport
from ganexport.artifact import Artifact
from ganexport.build.options import BuildOptions
from ganexport.errors import ExportError, ParityError, UsageError
from ganexport.export.convert import convert
from ganexport.export.verify import verify

ANY = {
    "inputs": ["image=uniform(-1,1)[batch,3,height,width]"],
    "batch": "1:1:3",
    "dims": ["height=5:16:31", "width=9:16:24"],
}
Z = {"inputs": ["z=normal[batch,16]"], "batch": "1:4:9"}


@pytest.mark.parametrize("name", ["BatchStatistics", "MinibatchDeviation"])
def test_samples_that_depend_on_their_batch_are_refused_and_hold_one_at_a_time(name, tmp_path):
    torch.manual_seed(0)
    with pytest.raises(ParityError, match=r"changes with the others in its batch \(.* dB.*--batch 1"):
        convert(f"generators.awkward:{name}", to="onnx", output=tmp_path / "many", **Z)
    assert not (tmp_path / "many").exists()
    alone = convert(f"generators.awkward:{name}", to="onnx", output=tmp_path / "one", **Z | {"batch": "1"})
    assert alone.find("onnx").certificate.verdict == "pass"
    assert alone.find("onnx").certificate.independent is None


def test_who_allows_the_mismatch_gets_it_on_record(tmp_path):
    torch.manual_seed(0)
    convert("generators.awkward:BatchStatistics", to="onnx", output=tmp_path / "out", allow_mismatch=True, **Z)
    certificate = Artifact(tmp_path / "out").find("onnx").certificate
    assert certificate.verdict == "fail"
    assert certificate.independent is False
    assert len(certificate.failures) == 1
    assert "others in its batch" in certificate.failures[0]
    assert verify(tmp_path / "out").passed  # the golden outputs are those of its source


@pytest.mark.parametrize(("name", "count"), [("PyramidPooling", 6), ("LargestPooling", 6)])
def test_adaptive_pooling_follows_a_free_size(name, count, tmp_path):
    torch.manual_seed(0)
    made = convert(f"generators.awkward:{name}", to=["onnx", "torchscript", "trt"], output=tmp_path / "out", **ANY)
    for kind in ("onnx", "torchscript"):
        assert made.find(kind).certificate.verdict == "pass"
    assert f"adaptive-pooling: {count} poolings whose windows follow the input's size" in made.find("onnx").passes


def test_adaptive_pooling_of_a_free_length(tmp_path):
    made = convert(
        "generators.awkward:PooledSpeech", to="onnx", output=tmp_path / "out",
        inputs=["x=normal[batch,4,frames]"], batch="1:2:3", dims=["frames=5:40:99"],
    )  # fmt: skip
    assert made.find("onnx").certificate.verdict == "pass"
    assert {5, 99} <= {sizes["frames"] for sizes in made.find("onnx").certificate.unseen}


ADAPTED = {"inputs": ["image=uniform(-1,1)[batch,3,16,16]", "style=normal[batch,8]"], "batch": "1:2:4"}
FOURS = ANY | {"dims": ["height=8:16:32/4", "width=8:16:24/4"]}


@pytest.mark.parametrize(
    ("name", "described"), [("WindowsCountedByInt", FOURS), ("SizesAsInts", ANY)], ids=lambda value: str(value)[:20]
)
def test_plain_numbers_of_sizes_stay_symbolic(name, described, tmp_path):
    torch.manual_seed(0)
    made = convert(f"generators.awkward:{name}", to=["onnx", "torchscript"], output=tmp_path / "out", **described)
    for kind in ("onnx", "torchscript"):
        assert made.find(kind).certificate.verdict == "pass"
    assert "symbolic-numbers: int() and float() of sizes in awkward.py" in made.find("onnx").passes
    assert "torchscript scripted from torch.export's graph" in made.find("torchscript").passes
    from generators import awkward

    assert not {"int", "float"} & set(vars(awkward))


def test_int_does_not_hide_a_branch(tmp_path):
    with pytest.raises(ExportError, match=r"awkward\.py:\d+: the code branches on the size of height"):
        convert("generators.awkward:IntHidesABranch", to="onnx", output=tmp_path / "out", **ANY)


def test_an_output_as_long_as_the_larger_side(tmp_path):
    torch.manual_seed(0)
    made = convert("generators.awkward:LargerSide", to=["onnx", "torchscript"], output=tmp_path / "out", **ANY)
    shape = made.spec.outputs[0].shape
    assert shape[:2] == ("batch", 3)
    assert not {"height", "width"} & set(shape)
    assert all(file.certificate.verdict == "pass" for file in made.manifest.files)


@pytest.mark.parametrize(
    ("name", "described", "line"),
    [
        (
            "AdaptedByBatchNorm",
            ADAPTED,
            "batch-statistics: 1 normalisations by the statistics of their input",
        ),
        ("RoundedSize", ANY, "mean-slopes: 1 randomised leaky ReLUs in evaluation as leaky ReLUs"),
        ("SampledRays", Z, "counted-search: 2 searches in sorted values as counts"),
        ("TakesAlong", Z, "take-along-dim: 2 as gather"),
        ("CentredSpectrum", ANY, "sliced-roll: 3 shifts that follow the input's size"),
        ("Slopes", Z, "mean-slopes: 1 randomised leaky ReLUs in evaluation as leaky ReLUs"),
        ("DoubleWeights", Z, "float32-weights: 4 tensors of float64"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_an_operator_that_exporters_lack_converts(name, described, line, tmp_path):
    torch.manual_seed(0)
    made = convert(f"generators.awkward:{name}", to="onnx", output=tmp_path / "out", **described)
    assert made.find("onnx").certificate.verdict == "pass"
    assert any(told.startswith(line) for told in made.find("onnx").passes)


@pytest.mark.parametrize("name", ["random_slopes", "Gumbel", "hard_gumbel"])
def test_noise_behind_a_function_is_found(name, tmp_path):
    torch.manual_seed(0)
    with pytest.raises(ExportError, match=r"awkward\.py:\d+: (rrelu|gumbel_softmax) draws fresh random numbers"):
        convert(f"generators.awkward:{name}", to="onnx", output=tmp_path / "out", **Z)
    for mode in ("input", "constant"):
        made = convert(f"generators.awkward:{name}", to="onnx", output=tmp_path / mode, noise=mode, **Z)
        assert made.find("onnx").certificate.verdict == "pass"
        assert ("noise_0" in {tensor.name for tensor in made.spec.inputs}) is (mode == "input")


def test_gumbel_noise_has_its_distribution():
    from ganexport.export.prepare.randomness import Randomness

    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.0, -1.0]).log_softmax(0)
    with Randomness(lambda _, shape: torch.rand(shape)):
        picked = torch.nn.functional.gumbel_softmax(logits.expand(200_000, 3), hard=True).mean(0)
    assert torch.allclose(picked, logits.exp(), atol=0.005)


@pytest.mark.parametrize(
    ("name", "described", "words"),
    [
        ("ShiftedBatch", ANY, r"awkward\.py:\d+: fftshift without dim shifts the batch too.*dim=\(-2, -1\)"),
        ("AttentionDropout", Z, r"dropout_p draws random numbers.*set it to 0 in evaluation"),
        ("Inverts", Z, r"awkward\.py:\d+: aten\.linalg_inv_ex has no ONNX form"),
        (
            "HalfSpectrum",
            Z,
            r"awkward\.py:\d+: fft_ihfft of complex numbers has no real form here[^\n]*\)\Z",
        ),
        ("HiddenDraw", Z, r"fractional_max_pool2d|an operator of torch draws random numbers"),
    ],
    ids=["batch shifted", "attention", "inverse", "complex", "operator"],
)
def test_what_cannot_hold_is_refused_with_its_line(name, described, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        convert(f"generators.awkward:{name}", to="onnx", output=tmp_path / "out", **described)


def test_another_source_in_the_same_place_is_told(tmp_path):
    told: list[str] = []
    for name in ("Slopes", "Slopes", "TakesAlong"):
        convert(f"generators.awkward:{name}", to="onnx", output=tmp_path / "out", progress=told.append, **Z)
    assert [line for line in told if "will be replaced" in line] == [
        f"{tmp_path / 'out'} holds generators.awkward:Slopes, and will be replaced"
    ]


def test_other_weights_are_named_when_a_source_is_compared(tmp_path):
    torch.manual_seed(0)
    convert("generators.awkward:Slopes", to="onnx", output=tmp_path / "out", **Z)
    torch.manual_seed(0)
    assert verify(tmp_path / "out", against="generators.awkward:Slopes").passed
    report = verify(tmp_path / "out", against="generators.awkward:Slopes")  # drawn anew
    assert "factory that draws its weights and is not seeded" in report.files[0].certificate.failures[0]
    assert len(report.files[0].certificate.failures) > 1


def test_data_has_to_be_described(tmp_path):
    with pytest.raises(UsageError, match=r'"z=uniform\(-1,1\)\[batch,16\]"'):
        convert("generators.awkward:Slopes", to="onnx", output=tmp_path / "out", **Z | {"inputs": ["z=data[batch,16]"]})


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("image=[-1,1]:ABCD", "layout ABCD: letters"),
        ("image=[-1,1]:NCCW", "each once"),
        ("image=[-1,1]:NHWC", "would give it output_0_3 channels: declare NCHW"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(output, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        convert("generators.awkward:LargerSide", to="onnx", output=tmp_path / "out", outputs=[output], **ANY)


def test_values_beyond_their_range_are_told(tmp_path):
    torch.manual_seed(0)
    made = convert(
        "generators.awkward:DoubleWeights", to="onnx", output=tmp_path / "out", outputs=["image=[0,0.01]:NCHW"], **Z
    )
    (warning,) = made.find("onnx").certificate.warnings
    assert warning.startswith("image: the source's values reach from -")
    assert "[0,0.01]" in warning
    half = convert(
        "generators.awkward:Positive", to="onnx", output=tmp_path / "half", outputs=["image=[-1,1]:NCHW"], **Z
    )
    assert "if it begins at 0, say so" in half.find("onnx").certificate.warnings[0]
    other = convert(
        "generators.awkward:DoubleWeights", to="onnx", output=tmp_path / "out", outputs=["image=[-1,1]:NCHW"], **Z
    )
    assert other.find("onnx").certificate.warnings == ()


@pytest.mark.parametrize("name", ["PyramidPooling", "NamedLikeItsInput"])
def test_an_output_called_like_an_input_keeps_what_was_said_of_it(name, tmp_path):
    source = f"generators.awkward:{name}"
    torch.manual_seed(0)
    made = convert(source, to="onnx", output=tmp_path / "out", outputs=["image=[-1,1]:NCHW"], **ANY)
    torch.manual_seed(0)
    assert verify(tmp_path / "out", against=source).passed
    (tensor,) = made.spec.outputs
    assert (tensor.name, tensor.range, tensor.layout) == ("image_out", (-1.0, 1.0), "NCHW")


def test_infinite_values_are_a_failure_without_warnings_of_numpy(tmp_path, recwarn):
    torch.manual_seed(0)
    with pytest.raises(ParityError, match="the reference itself has NaN or infinite values"):
        convert("generators.awkward:Infinite", to="onnx", output=tmp_path / "out", outputs=["image=[-1,1]:NCHW"], **Z)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_a_module_that_stands_in_a_file_is_a_source(tmp_path):
    made = convert("generators.awkward:trained", to="onnx", output=tmp_path / "out", **Z)
    assert made.find("onnx").certificate.verdict == "pass"


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("nets/style.py:Generator", {}, "name the module, not its file: nets.style:Generator"),
        ("/opt/nets/style.py:Generator", {}, "run ganexport in /opt/nets with style:Generator"),
        ("generators.awkward:trained", {"to": "onnx,trt"}, "--to onnx --to trt"),
        ("generators.awkward:trained", {"options": BuildOptions(keep_fp32=("Conv",))}, "everything is fp32"),
        ("generators.awkward:trained", {"options": BuildOptions(calibration_samples=9)}, "for int8 alone"),
    ],
    ids=["file", "file elsewhere", "two formats", "keep-fp32", "calibration"],
)
def test_what_cannot_be_meant_is_told(source, options, words, tmp_path):
    with pytest.raises(UsageError, match=re.escape(words)):
        convert(source, output=tmp_path / "out", **{"to": "onnx"} | options, **Z)


def test_arguments_and_outputs_may_be_called_like_operators(tmp_path):
    torch.manual_seed(0)
    made = convert(
        "generators.awkward:NamedLikeOperators", to=["onnx", "trt"], output=tmp_path / "out", batch="1:4:9",
        inputs=["linear=normal[batch,16]", "view=normal[batch,16]"], outputs=["add=[-9,9]"],
    )  # fmt: skip
    assert made.find("onnx").certificate.verdict == "pass"
    assert [t.name for t in (*made.spec.inputs, *made.spec.outputs)] == ["linear", "view", "add"]
    graph = onnx.load(tmp_path / "out" / "generator.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["linear", "view", "add"]


def test_the_smallest_epsilon_stays_in_the_file(tmp_path):
    inputs = ["z=normal[batch,16]", "mask=label(2)[batch,16]:float32"]
    convert("generators.awkward:SmallEpsilons", to="onnx", output=tmp_path / "out", inputs=inputs, batch="1:4:9")
    z, mask = np.ones((2, 16), np.float32), np.zeros((2, 16), np.float32)
    with ganexport.load(tmp_path / "out") as generator:
        pooled, logarithm = generator.run({"z": z, "mask": mask}).values()
    assert np.array_equal(pooled, z * np.float32(1.000001))
    assert np.allclose(logarithm, np.log(1e-10), rtol=1e-5)


def test_constant_noise_may_be_written_into(tmp_path):
    made = convert("generators.awkward:WritesIntoNoise", to="onnx", output=tmp_path / "out", noise="constant", **Z)
    assert made.find("onnx").certificate.verdict == "pass"


def test_the_size_it_was_trained_at_is_no_example(tmp_path):
    torch.manual_seed(0)
    sizes = ANY | {"dims": ["height=16:32:48/4", "width=16:32:48/4"]}
    made = convert("generators.awkward:TrainedAtSixteen", to="onnx", output=tmp_path / "out", **sizes)
    certificate = made.find("onnx").certificate
    assert certificate.verdict == "pass"
    assert {"batch": 1, "height": 16, "width": 16} in certificate.sizes
