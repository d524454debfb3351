"""Files called fp32 are multiplied in float32 on CUDA, and the process's own switches stay as they are."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from ganexport.errors import ArtifactError
from ganexport.runtime._torch import TorchRunner
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec

SPEC = GeneratorSpec(
    (TensorSpec("z", "float32", ("batch", 4), Normal()),), (TensorSpec("y", "float32", ("batch", 4)),),
    (Dim("batch", 1, 2, 4),), "identity",
)  # fmt: skip


class Recording(TorchRunner):
    backend = "recording"

    @classmethod
    def _open(cls, *_, **__):
        raise NotImplementedError


def switches() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("exact", [True, False])
def test_a_run_holds_float32_and_leaves_the_process_as_it_was(exact: bool) -> None:
    seen = []

    def function(z: torch.Tensor) -> torch.Tensor:
        seen.append(switches())
        if z[0, 0] > 5:
            raise RuntimeError("as asked")
        return z

    torch.set_float32_matmul_precision("high")
    try:
        before = switches()
        assert before == (True, "high")
        runner = Recording(torch, function, SPEC, "cpu", exact=exact)
        runner.run({"z": np.zeros((2, 4), np.float32)})
        assert seen == [(False, "highest") if exact else before]
        assert switches() == before
        with pytest.raises(ArtifactError, match="as asked"):
            runner.run({"z": np.full((2, 4), 9, np.float32)})
        assert switches() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_switches_that_were_set_the_new_way_are_kept_too() -> None:
    script = """
import torch
from ganexport.runtime._torch import full_float32
parts = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
parts[0].fp32_precision, parts[1].fp32_precision = "ieee", "tf32"
with full_float32(torch):
    print([part.fp32_precision for part in parts])
print([part.fp32_precision for part in parts])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["['ieee', 'ieee']", "['ieee', 'tf32']"], done.stderr
