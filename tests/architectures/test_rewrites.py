"""The zoo's own graphs: every rewrite leaves their pictures, and TensorRT parses and builds what it leaves."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small import CASES, options

import ganexport
from ganexport.architectures import ARCHITECTURES
from ganexport.build import onnx_file, tensorrt
from ganexport.build.cost import Target
from ganexport.build.options import BuildOptions
from ganexport.build.rewrites import rewrite
from ganexport.seeding import latents

#: Always run; the others, alike in their layers, only among the slow tests.
QUICK = (("resnet", 0), ("stylegan2", 0))
TARGETS = {
    "all": None,
    "openvino int8": Target("openvino", "int8", 4),
    "onnxruntime int8": Target("onnxruntime", "int8", 4),
    "trt fp32": Target("trt", "fp32", 4),
}


def run(model, feeds):
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


@pytest.mark.parametrize(
    ("name", "number"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_rewritten_zoo_graphs_are_exact_and_tensorrt_builds_them(name, number, tmp_path):
    architecture, chosen = ARCHITECTURES.load(name), options(name, number)
    torch.manual_seed(0)
    spec = architecture.spec(chosen)
    artifact = ganexport.convert(
        architecture.generator(chosen).eval(), to=["onnx"], inputs=spec.inputs, outputs=["image=[-1,1]:NCHW"],
        batch="1:2:4", output=tmp_path / "artifact", verify_budget=2.0,
    )  # fmt: skip
    spec = artifact.spec
    original = onnx.load(artifact.path / "generator.onnx")
    feeds = latents(spec, 3, 0, 3)
    expected = run(original, feeds)
    engines = tensorrt.unavailable() is None
    for key, target in TARGETS.items():
        model, _ = rewrite(original, target)
        onnx.checker.check_model(model, full_check=True)
        np.testing.assert_allclose(run(model, feeds), expected, atol=1e-4, err_msg=key)
        if engines:
            folder = tmp_path / key.replace(" ", "-")
            folder.mkdir()
            onnx_file.write_spec(model, spec)
            onnx_file.save_model(model, folder / "g.onnx")
            built = tensorrt.build(folder / "g.onnx", spec, folder, "fp32", BuildOptions())
            assert (folder / built.path).stat().st_size > 1000
    if not engines:
        pytest.skip("the rewrites are exact; no TensorRT builder is installed here")
