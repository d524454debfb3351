"""Artifacts made once, for tests that only read them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_generators import image_model, image_spec, make_artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """A colour generator."""
    return make_artifact(tmp_path_factory.mktemp("artifact") / "tiny")


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A greyscale generator of ten classes."""
    path = tmp_path_factory.mktemp("labelled") / "tiny"
    return make_artifact(path, image_spec(1, classes=10), image_model(1, classes=10))
