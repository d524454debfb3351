"""What a production machine installs: a wheel without torch, light, that generates from an ONNX artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ganexport.artifact import ArtifactWriter, Manifest, Provenance
from ganexport.spec import Dim, GeneratorSpec, TensorSpec, parse_input

ROOT = Path(__file__).parent.parent
RUNTIME_LIMIT_MB = 180


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def small_artifact(path: Path) -> Path:
    """A linear generator of 1x8x8 images, written by hand."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(0, 0.3, (16, 64)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["z", "weight"], ["flat"]),
            helper.make_node("Tanh", ["flat"], ["bounded"]),
            helper.make_node("Reshape", ["bounded", "shape"], ["image"]),
        ],
        "generator",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.array([-1, 1, 8, 8]), "shape")],
    )
    spec = GeneratorSpec(
        (parse_input("z=normal[batch,16]"),),
        (TensorSpec("image", "float32", ("batch", 1, 8, 8), None, (-1.0, 1.0), "NCHW"),),
        (Dim("batch"),),
    )
    with ArtifactWriter(path) as writer:
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
            writer.folder / "generator.onnx",
        )
        file = writer.describe("generator.onnx", "onnx", "fp32")
        writer.publish(Manifest(1, spec, (file,), Provenance("a linear map")))
    return path


@pytest.fixture(scope="module")
def production(tmp_path_factory):
    """A fresh virtual environment with the wheel and ONNX Runtime, nothing else; returns its Python."""
    folder = tmp_path_factory.mktemp("production")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT, cwd=folder)
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", next(folder.glob("*.whl")), "onnxruntime", cwd=folder)
    return python


def test_generates_without_torch(production, tmp_path):
    artifact = small_artifact(tmp_path / "artifact")
    ganexport = production.parent / "ganexport"
    run(ganexport, "generate", artifact, "-n", "9", "-o", "grid.png", cwd=tmp_path)
    assert (tmp_path / "grid.png").stat().st_size > 100
    code = (
        "import sys, json, ganexport\n"
        f"g = ganexport.load({str(artifact)!r})\n"
        "images = g.generate(3, seed=7)\n"
        "print(json.dumps([list(images.shape), str(images.dtype), 'torch' in sys.modules]))"
    )
    assert json.loads(run(production, "-c", code, cwd=tmp_path)) == [[3, 8, 8, 1], "uint8", False]
    with pytest.raises(AssertionError, match="No module named 'torch'"):
        run(production, "-c", "import torch", cwd=tmp_path)


def test_recipes_and_shipped_data_are_in_the_wheel(production, tmp_path):
    ganexport = production.parent / "ganexport"
    assert "dcgan-mnist" in run(ganexport, "recipes", cwd=tmp_path)
    doctor = json.loads(run(ganexport, "doctor", "--json", cwd=tmp_path))
    assert doctor


def test_a_command_that_needs_torch_says_what_to_install(production, tmp_path):
    done = subprocess.run(
        [production.parent / "ganexport", "train", "dcgan-mnist", "--out", "run"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "ganexport[train]" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_runtime_install_is_light(production, tmp_path):
    """numpy, msgspec, pillow, onnxruntime and ganexport with what they need at run time."""
    site = Path(run(production, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip())
    wanted = ("numpy", "msgspec", "PIL", "pillow", "onnxruntime", "ganexport")
    files = [p for p in site.rglob("*") if p.is_file() and p.relative_to(site).parts[0].startswith(wanted)]
    files = [p for p in files if p.suffix != ".pyc"]
    assert sum(p.stat().st_size for p in files) < RUNTIME_LIMIT_MB * 1e6
