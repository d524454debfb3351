"""Generators rebuilt from their papers: each to ONNX and a TensorRT engine, proved at sizes the exporter never saw."""

from __future__ import annotations

import pytest
from generators import GENERATORS

from ganexport.errors import ParityError
from ganexport.export.convert import convert

#: What every change is tested with: one of each difficulty, within the time of a continuous integration.
QUICK = {("hifigan", "fp32"), ("cyclegan", "fp32"), ("textgan", "fp16")}
CASES = [
    pytest.param(name, precision, marks=() if (name, precision) in QUICK else pytest.mark.slow)
    for name in GENERATORS
    for precision in ("fp32", "fp16")
] + [("sagan", "int8")]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_generator_converts_and_holds_at_unseen_sizes(name, precision, tmp_path):
    made = convert(
        f"generators.{name}:make", to=["onnx", "trt"], output=tmp_path / "out", precision=precision, verify_budget=300,
        **GENERATORS[name],
    )  # fmt: skip
    certificate = made.find("onnx", precision).certificate
    assert certificate.verdict == "pass"
    assert certificate.deterministic is True
    for dim in made.spec.dims:
        sizes = {sizes[dim.name] for sizes in certificate.unseen}
        assert {dim.min, dim.max} <= sizes, f"{dim.name} was not proved at its ends"
        assert len(sizes) >= min(4, (dim.max - dim.min) // dim.step)
    for output in certificate.outputs:
        assert output.samples >= 256
    if name == "hifigan":  # both kinds of weight norm
        assert "strip-parametrizations: 12 weights" in made.find("onnx", precision).passes
        assert made.spec.outputs[0].shape == ("batch", 1, "8*frames")
    engine = made.find("trt", precision)
    assert engine.bytes > 1000
    assert engine.certificate.verdict in ("partial", "pass")


@pytest.mark.slow
def test_int8_that_moves_the_distribution_is_refused_by_name(tmp_path):
    # With random weights its pictures differ by little more than int8's steps, though each is within 35 dB.
    with pytest.raises(ParityError, match=r"moves the Fréchet distance on paired latents by \d+\.\d%, above 2%"):
        convert(
            "generators.rrdbnet:make", to=["onnx", "trt"], output=tmp_path / "out", precision="int8", verify_budget=300,
            **GENERATORS["rrdbnet"],
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_stylegans_batch_folded_convolutions_are_rewritten(tmp_path):
    made = convert("generators.stylegan2:make_small", to="onnx", output=tmp_path / "out", **GENERATORS["stylegan2"])
    file = made.find("onnx")
    assert "per-sample-convolution: 5 grouped convolutions as patches times weights" in file.passes
    assert "truncation: 0.7 baked in" in file.passes
    assert {"batch": 9} in file.certificate.unseen
    import onnx

    for node in onnx.load(made.path / "generator.onnx").graph.node:
        if node.op_type == "Conv":
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            assert groups in (1, 3, 16), "only channel-wise filters are grouped"


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["input", "constant"])
def test_stylegans_noise_as_inputs_or_constant(noise, tmp_path):
    described = GENERATORS["stylegan2"] | {"call": "noise_mode='random'"}
    made = convert("generators.stylegan2:make_small", to="onnx", output=tmp_path / "out", noise=noise, **described)
    assert made.find("onnx").certificate.verdict == "pass"
    noises = [t for t in made.spec.inputs if t.name.startswith("noise_")]
    assert len(noises) == (3 if noise == "input" else 0)
    if noises:
        assert noises[0].shape == ("batch", 1, 4, 4)
