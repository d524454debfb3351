"""Inception's features from a weights file: real torch-fidelity, random weights; no code in the file, no download."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ganexport.cli.main import run
from ganexport.errors import CheckpointError, DataError, UsageError
from ganexport.evaluation.backbones import BACKBONES
from ganexport.evaluation.backbones import inception as module

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the right names and shapes, with random content."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        model = fidelity.FeatureExtractorInceptionV3("inception", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


def test_features_have_their_shape_and_grey_counts_as_colour(weights):
    backbone = BACKBONES.load("inception").backbone(weights)
    grey = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 1), np.uint8)
    features, probabilities = backbone.features(grey)
    assert features.shape == (2, 2048)
    assert probabilities is None
    assert np.isfinite(features).all()
    assert not np.allclose(features[0], features[1])
    assert np.array_equal(features, backbone.features(grey.repeat(3, axis=3))[0])
    assert "2048 features, 299x299" in backbone.description
    with pytest.raises(DataError, match="1 or 3"):
        backbone.features(grey.repeat(4, axis=3))


def test_weights_are_not_fetched_and_a_bad_file_is_one_error(tmp_path, monkeypatch, weights):
    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("tried to download")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", fetched)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    backbone = BACKBONES.load("inception").backbone
    with pytest.raises(UsageError, match="never downloaded"):
        backbone()
    with pytest.raises(CheckpointError, match="no such weights file"):
        backbone(tmp_path / "missing.pth")
    (tmp_path / "torn.pth").write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="not readable"):
        backbone(tmp_path / "torn.pth")
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not Inception's weights"):
        backbone(tmp_path / "other.pth")
    # Where torch's cache holds them, they are found.
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / module.FILE).symlink_to(weights)
    assert module.cached_weights() == tmp_path / "checkpoints" / module.FILE


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_code_in_the_weights_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"fc.weight": Code()}))
    with pytest.raises(CheckpointError, match="not readable as tensors alone"):
        BACKBONES.load("inception").backbone(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_colour_images_are_evaluated_with_inception(tmp_path, weights, capsys):
    import sys

    import onnx

    sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
    import tiny_generators as tiny

    onnx.save(tiny.image_model(spec=tiny.image_spec()), tmp_path / "tiny.onnx")
    np.save(tmp_path / "real.npy", np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8))
    model, real = str(tmp_path / "tiny.onnx"), str(tmp_path / "real.npy")
    code = run(["evaluate", model, "--data", real, "-n", "100", "--backbone-weights", str(weights), "--json"])
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backbone"].startswith("Inception-v3")
    assert found["confidence"] is None
    assert found["frechet"] > 0
