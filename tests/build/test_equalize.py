"""Channels' scales are shared out exactly, only where that is exact, and int8 gains by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from ganexport.build.cost import Target
from ganexport.build.equalize import equalise, equalised_forms, links
from ganexport.build.quantize import SMALL_MARGIN, Quantized, calibration_inputs, quantize
from ganexport.build.rewrites import rewrite
from ganexport.seeding import latents
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec

SPEC = GeneratorSpec(
    (TensorSpec("z", "float32", ("batch", 16), Normal()),),
    (TensorSpec("image", "float32", ("batch", 3, 16, 16), range=(-1.0, 1.0), layout="NCHW"),),
    (Dim("batch", 1, 8, 64),),
)


def generator(*, spread: float = 1.0, middle: list[Any] | None = None, shared: bool = False) -> onnx.ModelProto:
    """z -> Gemm -> LeakyReLU -> [8, 4, 4] -> transposed -> LeakyReLU -> transposed -> tanh.

    Args:
        spread: Ratio of the loudest channel to the quietest between the layers, the same function whatever it is.
        middle: Nodes from "e" to "e2" between the second activation and the last layer.
        shared: Whether something else reads the first activation.
    """
    rng = np.random.default_rng(0)

    def weights(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    constants = {
        "w0": weights(8 * 16, 16, scale=0.25), "b0": weights(8 * 16, scale=0.1),
        "w1": weights(8, 12, 4, 4, scale=0.2), "b1": weights(12, scale=0.1),
        "w2": weights(12, 3, 4, 4, scale=0.2),
        "shape": np.array([0, 8, 4, 4], np.int64), "scales": np.array([1, 1, 1, 1], np.float32),
        "pads": np.array([0, 0, 1, 1, 0, 0, -1, -1], np.int64), "one": np.array(1.0, np.float32),
        "slope": np.linspace(0.1, 0.9, 12, dtype=np.float32).reshape(12, 1, 1),
    }  # fmt: skip
    factors = np.geomspace(1.0, spread, 8).astype(np.float32)
    constants["w0"] *= np.repeat(factors, 16)[:, None]
    constants["b0"] *= np.repeat(factors, 16)
    constants["w1"] /= factors[:, None, None, None]
    factors = np.geomspace(spread, 1.0, 12).astype(np.float32)
    constants["w1"] *= factors[None, :, None, None]
    constants["b1"] *= factors
    constants["w2"] /= factors[:, None, None, None]
    double = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Gemm", ["z", "w0", "b0"], ["a"], name="first", transB=1),
        helper.make_node("LeakyRelu", ["a"], ["b"], alpha=0.2),
        helper.make_node("Reshape", ["b", "shape"], ["c"]),
        helper.make_node("ConvTranspose", ["c", "w1", "b1"], ["d"], name="second", **double),
        helper.make_node("LeakyRelu", ["d"], ["e"], alpha=0.2),
        *(middle or [helper.make_node("Identity", ["e"], ["e2"])]),
        helper.make_node("ConvTranspose", ["e2", "w2"], ["f"], name="third", **double),
        *([helper.make_node("ReduceMean", ["b"], ["mean"], keepdims=0)] if shared else []),
        helper.make_node("Add", ["f", "mean"], ["g"]) if shared else helper.make_node("Identity", ["f"], ["g"]),
        helper.make_node("Tanh", ["g"], ["image"]),
    ]
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 16])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])
    used = {name for node in nodes for name in node.input}
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used]
    graph = helper.make_graph(nodes, "g", [z], [image], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def outputs(model: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in calibration_inputs(SPEC, 16)])


def latents_beyond(samples: int) -> Iterator[dict[str, np.ndarray]]:
    """Inputs that neither calibration nor judgement drew."""
    for start in range(0, samples, 50):
        yield latents(SPEC, 4242, start, 50)


def pairs(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(link.first, link.second) for link in links(model)]


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_the_function_stays_and_the_channels_become_alike(balance: float) -> None:
    model = generator(spread=100.0)
    before = model.SerializeToString(deterministic=True)
    made, count = equalise(model, calibration_inputs(SPEC, 16), balance)
    assert model.SerializeToString(deterministic=True) == before
    assert count == 2
    assert pairs(model) == [("first", "second"), ("second", "third")]
    np.testing.assert_allclose(outputs(made), outputs(model), atol=2e-6)
    weights = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    reading = np.abs(weights["w2"]).max(axis=(1, 2, 3))
    if balance == 0.0:
        assert reading.max() / reading.min() < 1.001
    if balance == 1.0:
        made.graph.output.append(helper.make_tensor_value_info("e2", TensorProto.FLOAT, None))
        session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        seen = np.concatenate([session.run(["e2"], feed)[0] for feed in calibration_inputs(SPEC, 16)])
        ranges = np.abs(seen).max(axis=(0, 2, 3))
        assert ranges.max() / ranges.min() < 1.001


BETWEEN = {
    "upsampling": (True, [helper.make_node("Resize", ["e", "", "scales"], ["e2"], mode="linear")]),
    "padding with zeros": (True, [helper.make_node("Pad", ["e", "pads"], ["e2"])]),
    "padding by reflection": (True, [helper.make_node("Pad", ["e", "pads"], ["e2"], mode="reflect")]),
    "padding with ones": (False, [helper.make_node("Pad", ["e", "pads", "one"], ["e2"])]),
    "a slope a channel": (True, [helper.make_node("PRelu", ["e", "slope"], ["e2"])]),
    "a curve": (False, [helper.make_node("Tanh", ["e"], ["e2"])]),
    "a sum": (False, [helper.make_node("Add", ["e", "one"], ["e2"])]),
}


@pytest.mark.parametrize(("linked", "middle"), BETWEEN.values(), ids=BETWEEN)
def test_layers_are_linked_only_where_scaling_passes_through(linked: bool, middle: list[Any]) -> None:
    model = generator(spread=30.0, middle=middle)
    assert (("second", "third") in pairs(model)) is linked
    made, count = equalise(model, calibration_inputs(SPEC, 16), 0.7)
    assert count == 1 + linked
    np.testing.assert_allclose(outputs(made), outputs(model), atol=2e-6)


def test_what_something_else_reads_is_left_alone() -> None:
    model = generator(spread=30.0, shared=True)
    assert pairs(model) == [("second", "third")]
    made, _ = equalise(model, calibration_inputs(SPEC, 16), 0.7)
    np.testing.assert_allclose(outputs(made), outputs(model), atol=2e-6)


def test_weights_that_two_layers_share_are_left_alone() -> None:
    model = generator()
    again = helper.make_node("ConvTranspose", ["c", "w1", "b1"], ["unused"], name="twin", strides=[2, 2])
    model.graph.node.append(again)
    assert pairs(model) == []


def quantized(model: onnx.ModelProto, *, help_it: bool, min_psnr: float) -> Quantized:
    target = Target("onnxruntime", "int8")

    def finish(form: onnx.ModelProto) -> onnx.ModelProto:
        return rewrite(form, target)[0]

    forms = equalised_forms(model, lambda: calibration_inputs(SPEC, 32), finish) if help_it else ()
    return quantize(finish(model), SPEC, samples=32, methods=("minmax",), min_psnr=min_psnr, variants=forms)


def test_int8_reaches_by_equalising_what_it_misses_without() -> None:
    model = generator(spread=200.0)
    plain = quantized(model, help_it=False, min_psnr=1.0)
    wanted = plain.psnr + 6.0
    made = quantized(model, help_it=True, min_psnr=wanted)
    assert made.psnr >= wanted
    assert made.wide == ()
    assert made.variant.startswith("channels of 2 layers equalised by ")
    assert made.variant in made.passes[0]


def test_outputs_stay_unrounded_where_nothing_else_reaches_the_figure() -> None:
    def made(**given: Any) -> Quantized:
        return quantize(generator(), SPEC, samples=32, methods=("minmax",), keep=("first", "third"), **given)

    rounded, exact = made(min_psnr=1.0), made(min_psnr=1.0, wide_outputs=True)
    assert not rounded.unrounded
    assert exact.psnr > rounded.psnr + 1.0
    wanted = (rounded.psnr + exact.psnr) / 2 - SMALL_MARGIN
    found = made(min_psnr=wanted)  # one layer is left, so no selection helps
    assert found.unrounded
    assert found.psnr >= wanted
    assert "unrounded outputs (ONNX Runtime computes those layers in fp32)" in found.passes[0]


def test_ranges_and_judgement_see_more_samples_than_were_asked_for() -> None:
    model = generator()
    made = quantized(model, help_it=False, min_psnr=1.0)
    session = ort.InferenceSession(made.model.SerializeToString(), providers=["CPUExecutionProvider"])
    truth = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    worst = np.inf
    for feed in latents_beyond(2000):
        error = session.run(None, feed)[0] - truth.run(None, feed)[0]
        worst = min(worst, float((10 * np.log10(4 / (error**2).mean(axis=(1, 2, 3)))).min()))
    assert worst > made.psnr - 1.5
