"""Style generators: the mean latent baked in, truncation behind the mapping network, and the cut into two artifacts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import ganexport
from ganexport.build.golden import read_golden
from ganexport.cli.main import run
from ganexport.errors import GanExportError, OutputError, UsageError
from ganexport.export.convert import convert, split
from ganexport.export.mapping import latent_moments
from ganexport.export.source import TorchSource
from ganexport.export.verify import verify

from ganexport.artifact import Provenance  # isort: skip
from ganexport.export.convert import describe  # isort: skip
from ganexport.spec import GeneratorSpec  # isort: skip

DESCRIBED = {"inputs": ["z=normal[batch,8]"], "outputs": ["image=[-1,1]:NCHW"], "batch": "1:3:6", "verify_budget": 3.0}


def source_of(module, **described):
    given = describe(**{k: v for k, v in (DESCRIBED | described).items() if k != "verify_budget"})
    return TorchSource(module.eval(), GeneratorSpec(given.inputs, (), given.dims), Provenance("test"), {})


def by_hand(module, z, psi):
    """Truncation as the papers write it, with the mean over 4,096 draws."""
    mean, _ = latent_moments(source_of(module), "to_w")
    with torch.no_grad():
        w = module.to_w(torch.from_numpy(z))
        return module.image(mean + psi * (w - mean)).numpy()


def test_the_mean_latent_is_that_of_w():
    from generators.styles import Plain

    module = Plain()
    mean, deviation = latent_moments(source_of(module), "to_w")
    assert mean.shape == (1, 2, 12)
    with torch.no_grad():
        w = module.to_w(torch.randn(20_000, 8, generator=torch.Generator().manual_seed(3)))
    assert torch.allclose(mean[0], w.mean(0), atol=0.03)
    assert torch.allclose(deviation[0], w.std(0), rtol=0.1)


@pytest.mark.parametrize("name", ["Plain", "WithArgument"])
def test_truncation_bakes_the_mean_latent_in(name, tmp_path):
    import generators.styles

    made = convert(f"generators.styles:{name}", output=tmp_path / "a", truncation=0.6, mapping="to_w", **DESCRIBED)
    file = made.find("onnx")
    assert file.certificate.verdict == "pass"
    assert "truncation: 0.6 baked in" in file.passes
    assert "latent-mean: 4096 draws through to_w baked in" in file.passes
    assert [t.name for t in made.spec.inputs] == ["z"]
    (feeds, outputs), *_ = read_golden(made.golden_path(), made.spec)
    module = getattr(generators.styles, name)().eval()
    assert np.allclose(outputs["image"], by_hand(module, feeds["z"], 0.6), atol=1e-5)
    assert not np.allclose(outputs["image"], by_hand(module, feeds["z"], 1.0), atol=1e-2)
    # The source need not be described again: inputs, sizes and ranges are the artifact's.
    source = {"against": f"generators.styles:{name}", "budget": 2.0, "mapping": "to_w"}
    assert verify(made.path, truncation=0.6, **source).passed
    assert not verify(made.path, truncation=0.9, picture=tmp_path / "worst.png", **source).passed


@pytest.mark.parametrize(
    ("name", "described", "words"),
    [
        ("Plain", {"truncation": 0.5}, "--mapping PATH"),
        ("WithArgument", {"truncation": 0.5}, "forward needs truncation_latent, the mean latent"),
        ("Plain", {"truncation": 0.5, "mapping": "style"}, "no such sub-module; there is: to_w, to_w.network"),
        pytest.param("Plain", {"truncation": 0.5, "mapping": "image.last"}, None, marks=pytest.mark.slow),
        ("Plain", {"mapping": "to_w"}, "serves --truncation and --split"),
    ],
)
def test_what_is_missing_for_truncation_is_told(name, described, words, tmp_path):
    if words is None:  # the last layer is a latent like any other: an odd wish, and honoured
        convert(f"generators.styles:{name}", output=tmp_path / "a", **DESCRIBED, **described)
        return
    with pytest.raises(UsageError) as refusal:
        convert(f"generators.styles:{name}", output=tmp_path / "a", **DESCRIBED, **described)
    assert words in str(refusal.value)
    assert not (tmp_path / "a").exists()


def test_both_halves_are_the_whole(tmp_path, capsys):
    arguments = ["convert", "generators.styles:Plain", "--input", "z=normal[batch,8]", "--output", "image=[-1,1]:NCHW",
                 "--batch", "1:3:6", "--mapping", "to_w", "--split", "--truncation", "0.6", "--to", "onnx",
                 "--verify-budget", "3", "-o", str(tmp_path / "parts"), "--json"]  # fmt: skip
    assert run(arguments) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    proof = json.loads((tmp_path / "parts" / "certificate.json").read_text())
    assert proof["verdict"] == "pass"
    assert {"batch": 6} in proof["sizes"]
    with ganexport.load(tmp_path / "parts" / "mapping") as mapping:
        assert mapping.spec.outputs[0].name == "w"
        assert mapping.spec.outputs[0].shape == ("batch", 2, 12)
        z = ganexport.latents(mapping.spec, 0, 0, 5)["z"]
        w = mapping.run({"z": z})["w"]
    with ganexport.load(tmp_path / "parts" / "synthesis") as synthesis:
        assert [t.name for t in synthesis.spec.inputs] == ["w"]
        image = synthesis.run({"w": w})["image"]
        assert synthesis.generate(2).shape == (2, 16, 16, 3)  # w is drawn with the spread of real ones
    from generators.styles import Plain

    assert np.allclose(image, by_hand(Plain().eval(), z, 0.6), atol=1e-4)
    assert run([*arguments[:-3], "-o", str(tmp_path / "parts"), "--json"]) == 0  # an earlier split is replaced


def test_inputs_stay_with_the_half_that_needs_them(tmp_path):
    described = DESCRIBED | {
        "inputs": ["z=normal[batch,8]", "y=label(5)[batch]", "brightness=uniform(0.5,1)[batch]"],
    }
    mapping, synthesis = split("generators.styles:Conditional", "to_w", output=tmp_path / "parts", **described)
    assert [t.name for t in mapping.spec.inputs] == ["z", "y"]
    assert [t.name for t in synthesis.spec.inputs] == ["w", "brightness"]
    assert json.loads((tmp_path / "parts" / "certificate.json").read_text())["verdict"] == "pass"


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("Twice", "to_w", "calls it 2 times"),
        ("Plain", "nothing", "no such sub-module"),
        ("Plain", "image.styles", "running the module"),
    ],
)
def test_a_cut_that_does_not_hold_is_refused(name, path, words, tmp_path):
    with pytest.raises(GanExportError, match=words):
        split(f"generators.styles:{name}", path, output=tmp_path / "parts", **DESCRIBED)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_something_else_is_never_replaced(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "photo.jpg").touch()
    with pytest.raises(OutputError, match="no split generator"):
        split("generators.styles:Plain", "to_w", output=tmp_path / "parts", **DESCRIBED)
    assert (tmp_path / "parts" / "photo.jpg").exists()
