"""Shared fixtures, and the rule for GPU tests: asked for with --gpu, and then a missing GPU is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="collect tests/gpu; a machine without a GPU then fails them")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not config.getoption("--gpu") and collection_path.is_relative_to(GPU_TESTS):
        return True
    return None
