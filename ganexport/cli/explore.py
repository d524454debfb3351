"""``ganexport explore``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ganexport.cli._console import remarks, whole_numbers
from ganexport.errors import UsageError


@click.group(
    epilog="\b\nExamples:\n  ganexport explore walk digits --seeds 3,9,4 -o walk.gif\n"
    "  ganexport explore classes sagan-mnist -o classes.png"
)
def command() -> None:
    """Look into a generator: walks, truncation, classes, nearest training images.

    SOURCE is a run, an artifact, an .onnx file or a trained model.
    """


def _shared(function: Callable[..., None]) -> Callable[..., None]:
    options: list[Callable[..., Any]] = [
        click.argument("source"),
        click.option("--backend", help="Runtime for an artifact: onnxruntime, openvino, tensorrt, torchscript, aoti."),
        click.option("--device", help="cpu, cuda or cuda:1."),
        click.option("--scale", type=click.IntRange(1, 32), default=1, show_default=True, help="Enlarge every pixel."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _output(example: str) -> Callable[..., Any]:
    return click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help=example)


def _floats(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r}: write numbers separated by commas") from None


def _save(output: Path, images: Any, scale: int) -> None:
    from ganexport.explore.picture import enlarged, grid, write_png

    if output.suffix.lower() != ".png":
        raise UsageError(f"-o {output}: the picture's name must end in .png")
    picture = enlarged(grid(images, gap=1), scale)
    write_png(output, picture)
    click.echo(f"{output}: {picture.shape[1]}x{picture.shape[0]} pixels")


@command.command("walk", epilog="\b\nExamples:\n  ganexport explore walk digits --seeds 3,9,4 --steps 20 -o walk.gif")
@_shared
@click.option("--seeds", default="0,1,2,3", show_default=True, help="The samples to walk through, comma-separated.")
@click.option("--steps", type=click.IntRange(1, 1000), default=12, show_default=True, help="Images between two seeds.")
@click.option("--label", "--class", "label", type=int, help="The class; that of the first seed by default.")
@click.option("--truncation", type=float, help="Cut the latents to this many standard deviations (or feed it).")
@click.option("--milliseconds", type=click.IntRange(20, 10_000), default=60, show_default=True, help="Of a frame.")
@_output("walk.gif, or walk.png for a grid with one row a pair of seeds.")
def walk(
    source: str, backend: str | None, device: str | None, scale: int, seeds: str, steps: int, label: int | None,
    truncation: float | None, milliseconds: int, output: Path,
) -> None:  # fmt: skip
    """Walk from seed to seed through the latent space."""
    from ganexport.evaluation.source import open_generator
    from ganexport.explore.latents import walk as walked
    from ganexport.explore.picture import enlarged, write_gif

    kind = output.suffix.lower()
    if kind not in (".gif", ".png"):
        raise UsageError(f"-o {output}: the name must end in .gif or .png")
    places = whole_numbers(seeds, "--seeds")
    with open_generator(source, backend, device) as generator:
        frames = walked(generator, places, steps, label=label, truncation=truncation)
    if kind == ".gif":
        write_gif(output, enlarged(frames, scale), milliseconds=milliseconds)
        click.echo(f"{output}: {len(frames)} frames")
        return
    rows = [frames[begin : begin + steps + 1] for begin in range(0, len(frames) - 1, steps)]
    _save(output, np.stack(rows), scale)


@command.command(
    "truncation", epilog="\b\nExamples:\n  ganexport explore truncation digits --values 0.4,0.7,1,1.5 -o truncation.png"
)
@_shared
@click.option("--values", default="0.25,0.5,0.75,1,1.5,2", show_default=True, help="Truncations, comma-separated.")
@click.option("-n", "--count", type=click.IntRange(1, 1000), default=10, show_default=True, help="Samples a row.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Seed of the samples.")
@click.option("--label", "--class", "label", type=int, help="One class for all; random ones by default.")
@_output("truncation.png")
def truncation(
    source: str, backend: str | None, device: str | None, scale: int, values: str, count: int, seed: int,
    label: int | None, output: Path,
) -> None:  # fmt: skip
    """The same samples at several truncations: one row a value."""
    from ganexport.evaluation.source import open_generator
    from ganexport.explore.latents import truncations

    with open_generator(source, backend, device) as generator:
        images = truncations(generator, _floats(values, "--values"), count, seed=seed, label=label)
    _save(output, images, scale)


@command.command("classes", epilog="\b\nExamples:\n  ganexport explore classes sagan-mnist -n 12 -o classes.png")
@_shared
@click.option("-n", "--count", type=click.IntRange(1, 1000), default=10, show_default=True, help="Samples a class.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Seed of the samples.")
@click.option("--truncation", type=float, help="Cut the latents to this many standard deviations (or feed it).")
@_output("classes.png")
def classes(
    source: str, backend: str | None, device: str | None, scale: int, count: int, seed: int,
    truncation: float | None, output: Path,
) -> None:  # fmt: skip
    """Every class of a conditional generator: one row a class, the same latents in each."""
    from ganexport.evaluation.source import open_generator
    from ganexport.explore.latents import by_class

    with open_generator(source, backend, device) as generator:
        images = by_class(generator, count, seed=seed, truncation=truncation)
    _save(output, images, scale)


@command.command(
    "neighbours", epilog="\b\nExamples:\n  ganexport explore neighbours digits --data mnist/ -n 8 -o neighbours.png"
)
@_shared
@click.option("--data", default="mnist-10k", show_default=True, help="Training images, as for ganexport train.")
@click.option("-n", "--count", type=click.IntRange(1, 1000), default=8, show_default=True, help="Generated samples.")
@click.option("-k", type=click.IntRange(1, 100), default=5, show_default=True, help="Neighbours of each.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Seed of the samples.")
@_output("neighbours.png")
def neighbours(
    source: str, backend: str | None, device: str | None, scale: int, data: str, count: int, k: int, seed: int,
    output: Path,
) -> None:  # fmt: skip
    """Each sample beside the training images nearest to it: has the generator learnt them by heart?"""
    from ganexport.data import open_images_like
    from ganexport.data.fit import fit
    from ganexport.evaluation.source import open_generator
    from ganexport.explore.latents import neighbours as nearest

    with open_generator(source, backend, device) as generator:
        made = generator.generate(count, seed)
    shape = (made.shape[1], made.shape[2], made.shape[3])
    images = open_images_like(data, lambda: shape)
    smaller = images.size[0] <= shape[0] and images.size[1] <= shape[1]
    real = fit(images, shape, "pad" if smaller else "resize").array()
    remarks().print(f"comparing {count} samples with {len(real)} images of {images.name}")
    indices, distances = nearest(made, real, k)
    rows = np.concatenate([made[:, None], real[indices]], axis=1)
    for row in range(count):
        listed = ", ".join(f"{i} ({d:.1f})" for i, d in zip(indices[row], distances[row], strict=True))
        click.echo(f"sample {row}: nearest {listed}")
    click.echo("distances: root mean square, in grey levels of 255")
    _save(output, rows, scale)
