"""Train the digit classifier that ``ganexport evaluate`` uses: the recipe behind the shipped weights.

Repeat it with the full MNIST idx files in a folder::

    python -m ganexport.evaluation.train_classifier --data mnist/ --output mnist_classifier.safetensors

Adam with a one-cycle rate and cross-entropy, 8 epochs, random shifts of up to 2 pixels; float16 weights.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ganexport.evaluation.classifier import DigitClassifier


def _idx(folder: Path, name: str) -> NDArray[np.uint8]:
    path = folder / f"{name}.gz"
    raw = gzip.decompress(path.read_bytes()) if path.exists() else (folder / name).read_bytes()
    dimensions = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dimensions)


def _load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(_idx(folder, f"{split}-images-idx3-ubyte").copy())
    labels = torch.from_numpy(_idx(folder, f"{split}-labels-idx1-ubyte").copy()).long()
    return images[:, None].float().div(127.5).sub(1.0), labels


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    padded = nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    down, right = (int(torch.randint(0, 5, (), generator=generator)) for _ in range(2))
    return padded[..., down : down + 28, right : right + 28]


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--epochs", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(data: Path, output: Path, epochs: int, seed: int) -> None:
    """Train, print the test accuracy after each epoch and write the weights."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = _load(data, "train")
    test_images, test_labels = _load(data, "t10k")
    model = DigitClassifier()
    optimizer = torch.optim.Adam(model.parameters())
    steps = epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(order) // 128 * 128].view(-1, 128):
            loss = nn.functional.cross_entropy(model(_shift(images[batch], generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            answers = torch.cat([model(part).argmax(1) for part in test_images.split(1000)])
        click.echo(f"epoch {epoch + 1}: test accuracy {(answers == test_labels).float().mean():.4f}")
    floats = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    half = {name: value.half().contiguous() for name, value in floats.items()}
    save_file(half | {k: v for k, v in model.state_dict().items() if k not in half}, output)


if __name__ == "__main__":
    main()
