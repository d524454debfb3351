"""What the export tests share: tiny modules as a user would have them, and an artifact made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if str(HERE) not in sys.path:  # so that "generators.stylegan2:make" is importable, as from a user's own folder
    sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """A tiny image generator in four formats."""
    from ganexport.export.convert import convert

    return convert(
        "generators.tiny:make",
        to=["torchscript", "onnx", "trt", "openvino"],
        output=tmp_path_factory.mktemp("export") / "artifact",
        inputs=["z=normal[batch,16]"],
        outputs=["image=[-1,1]:NCHW"],
        batch="1:8:20",
    )
