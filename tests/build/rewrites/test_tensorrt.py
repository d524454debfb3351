"""What the rewrites leave of every recipe's generator, TensorRT parses and builds, in fp32 and fp16."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from ganexport.artifact import Artifact
from ganexport.build import onnx_file, tensorrt
from ganexport.build.cost import Target
from ganexport.build.options import BuildOptions
from ganexport.build.precision import low_precision
from ganexport.build.rewrites import rewrite
from ganexport.export.convert import convert
from ganexport.recipe import load_recipe, models_folder, to_plain

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
#: One recipe for each network: its architecture with all options.
RECIPES = sorted(
    {
        json.dumps(to_plain(load_recipe(path.parent.name))["architecture"], sort_keys=True): path.parent.name
        for path in sorted(models_folder().glob("*/recipe.toml"), reverse=True)
    }.values()
)
FACTORY = """
import torch
from ganexport.checkpoint import build_generator
from ganexport.recipe import load_recipe

def make():
    torch.manual_seed(0)
    return build_generator(load_recipe({name!r}))
"""


def test_every_architecture_has_a_recipe() -> None:
    found = {load_recipe(name).architecture.name for name in RECIPES}
    assert {"dcgan-mnist", "dcgan", "resnet", "sagan", "stylegan2", "r3gan"} <= found


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_rewritten_generators_parse_and_build(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory = f"recipe_{name.replace('-', '_')}"
    (tmp_path / f"{factory}.py").write_text(FACTORY.format(name=name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    convert(f"{factory}:make", to=["onnx"], output=tmp_path / "fp32", verify_budget=1.0)
    artifact = Artifact(tmp_path / "fp32")
    model = onnx.load(artifact.path / "generator.onnx")
    seen: set[bytes] = set()
    for target in (None, Target("openvino", "int8"), Target("trt", "fp16"), Target("trt", "fp32")):
        rewritten, passes = rewrite(model, target)
        content = rewritten.SerializeToString(deterministic=True)
        if content in seen:
            continue
        seen.add(content)
        if target is None:  # R3GAN has no transposed convolution, no normalisation and no 1x1 map: nothing to do
            assert bool(passes) != (load_recipe(name).architecture.name == "r3gan"), passes
        for precision in ("fp32", "fp16"):
            made = rewritten if precision == "fp32" else low_precision(rewritten, precision)
            path = tmp_path / "rewritten.onnx"
            onnx_file.save_model(made, path)
            built = tensorrt.build(path, artifact.spec, tmp_path, precision, BuildOptions())
            assert (tmp_path / built.path).stat().st_size > 1000, (target, precision, passes)
