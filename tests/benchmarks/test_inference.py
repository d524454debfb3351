"""The inference benchmark's own parts: any generator by name, right stock exports, quality beside speed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import inference
from ganexport.errors import GanExportError
from ganexport.export.convert import convert


def test_ours_and_shipped_models_go_by_name():
    assert inference.source_of("dcgan-64") == "benchmarks._models:dcgan64"
    shipped = inference.opened(inference.source_of("dcgan-mnist"))
    assert shipped.spec.image_output.shape == ("batch", 1, 28, 28)
    with pytest.raises(GanExportError, match="no-such-model"):
        inference.opened("no-such-model")


@pytest.mark.parametrize("model", ["tiny", "dcgan-mnist"])
def test_the_stock_file_takes_any_batch_and_gives_the_modules_pictures(tmp_path, model):
    import onnxruntime

    source = inference.opened(model)
    inference._export(source.module.eval(), source.spec, tmp_path / "stock.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "stock.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 5):
        (z,) = inference._examples(source.spec, size)
        with torch.no_grad():
            truth = source.module(z).numpy()
        (found,) = session.run(None, {"z": z.numpy()})
        assert np.allclose(found, truth, atol=1e-4)


def test_preparing_needs_a_folder_to_keep_things_in(capsys):
    with pytest.raises(SystemExit):
        inference._options(["--prepare"])
    assert "--prepare needs --work FOLDER" in capsys.readouterr().err


def test_quality_is_the_distance_from_real_digits_beside_that_of_fp32(tmp_path):
    fp32 = tmp_path / "fp32"
    convert("dcgan-mnist", to=["onnx"], output=fp32, verify_budget=2.0)
    found = inference.quality(fp32, fp32, count=300)
    assert found["frechet_moved"] == 0.0
    assert 5.0 < found["frechet"] < 200.0, "300 images read more than 10,000 do"
    assert found["frechet_images"] == 300


def test_what_the_digit_classifier_cannot_judge_has_no_such_figure(tmp_path):
    fp32 = tmp_path / "fp32"
    convert("benchmarks._models:tiny", to=["onnx"], output=fp32, verify_budget=1.0)
    assert inference.quality(fp32, fp32) == {}


def test_the_command_to_repeat_names_no_folder_of_this_machine():
    given = ["--work", "/somewhere/of/mine", "--models", "dcgan-64", "--work=x", "--seconds", "1.5"]
    assert inference._repeatable(given) == ["--models", "dcgan-64", "--seconds", "1.5"]
