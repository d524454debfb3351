"""The digit classifier that ships with ganexport: for grey, MNIST-like images."""

from __future__ import annotations

from pathlib import Path

from ganexport.errors import UsageError
from ganexport.evaluation.backbones import Backbone
from ganexport.evaluation.classifier import classify, load_classifier


def backbone(weights: Path | None = None, device: str | None = None) -> Backbone:
    """84 features and the ten classes.

    Args:
        weights: None: its weights come with ganexport.
        device: Not used: it is small enough for the CPU.

    Raises:
        UsageError: Weights were given.
    """
    if weights is not None:
        raise UsageError("--backbone-weights: the digit classifier brings its own; they are for --backbone inception")
    model = load_classifier()
    return Backbone(
        "digit classifier, 84 features, 28x28 grey (32x32 cropped, others antialiased bilinear)",
        lambda images: classify(model, images),
    )
