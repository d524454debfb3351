"""Other people's generators, as pip installs them; run where they are installed, skipped with the reason elsewhere."""

from __future__ import annotations

import importlib.util

import pytest

from ganexport.export.convert import convert

Z = "z=normal[batch,32]"
#: factory → (what to install, what a user types)
GENERATORS = {
    "biggan": (
        "pytorch-pretrained-biggan",
        {"inputs": ["z=normal[batch,24]", "class_label=onehot(10)[batch,10]"], "call": "truncation=0.43"},
    ),
    "lightweight_gan": ("lightweight-gan", {"inputs": [Z], "noise": "input"}),
    "lightweight_gan_frequencies": ("lightweight-gan", {"inputs": [Z], "noise": "constant"}),
    "torchgan_dcgan": ("torchgan", {"inputs": [Z]}),
    "torchgan_conditional": ("torchgan", {"inputs": [Z, "y=label(10)[batch]"]}),
    "torchgan_autoencoding": ("torchgan", {"inputs": [Z]}),
}
IMPORTED = {"pytorch-pretrained-biggan": "pytorch_pretrained_biggan"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_from_pypi_converts_and_holds_at_unseen_sizes(name, precision, tmp_path):
    package, described = GENERATORS[name]
    module = IMPORTED.get(package, package.replace("-", "_"))
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{package} is not installed here: pip install {package}")
    made = convert(
        f"generators.from_pypi:{name}", to=["onnx", "trt"], output=tmp_path / "out", precision=precision,
        batch="1:3:6", verify_budget=30, **described,
    )  # fmt: skip
    certificate = made.find("onnx", precision).certificate
    assert certificate.verdict == "pass"
    assert certificate.deterministic is True
    assert {1, 6} <= {sizes["batch"] for sizes in certificate.unseen}
    assert made.find("trt", precision).bytes > 1000
    names = [tensor.name for tensor in made.spec.inputs]
    assert any(name.startswith("noise_") for name in names) is (described.get("noise") == "input")
