"""A recipe small enough to be trained in a second, and ways to run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ganexport.data import open_images
from ganexport.data.images import ImageSet
from ganexport.recipe import Recipe, resolve
from ganexport.training.distributed import Group
from ganexport.training.loop import Trainer

TOML = """
name = "tiny"
objective = { name = "wasserstein" }
regularizers = [{ name = "gradient-penalty" }]

[architecture]
name = "dcgan-mnist"
latent = 8
width = 4

[training]
steps = 40
batch_size = 8
checkpoint_every = 5
n_critic = 2
threads = 1
device = "cpu"

[optimizer.generator]
rate = 1e-3

[logging]
every = 2
sample_every = 20
samples = 4
tensorboard = false
"""


def plain(**sections: Any) -> dict[str, Any]:
    import tomllib

    raw = tomllib.loads(TOML)
    for key, value in sections.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return raw


def recipe(**sections: Any) -> Recipe:
    return resolve(plain(**sections), "tiny")


def images() -> ImageSet:
    return open_images("mnist-10k")


def trainer(chosen: Recipe, run: Path | None = None, **options: Any) -> Trainer:
    return Trainer(chosen, images(), group=Group(), device=torch.device("cpu"), run=run, **options)


def write(folder: Path) -> Path:
    path = folder / "tiny.toml"
    path.write_text(TOML)
    return path


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "ganexport.cli", "train", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **more}


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=300, check=False, **options
    )


def weights(a_trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything that training changes."""
    tensors = a_trainer._tensors([])
    return {f"{file}.{name}": value.clone() for file, content in tensors.items() for name, value in content.items()}
