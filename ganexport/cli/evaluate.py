"""``ganexport evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ganexport.cli._console import json_option, print_json, progress, remarks, results

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ganexport.evaluation.backbones import Backbone
    from ganexport.evaluation.evaluate import Evaluation

EPILOG = """\b
Examples:
  ganexport evaluate run
  ganexport evaluate artifact --backend onnxruntime --data mnist/ -n 10000 --json
  ganexport evaluate artifact --against run
  ganexport evaluate faces --data photos/ --backbone inception --backbone-weights inception.pth
"""


@click.command(epilog=EPILOG)
@click.argument("source")
@click.option(
    "--data",
    default="mnist-10k",
    show_default=True,
    help="Real images: mnist-10k (shipped), a folder, idx, .npz or .npy file, or a torchvision set.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    default="train",
    show_default=True,
    help="Which part of the data, where it has both.",
)
@click.option("-n", "--count", type=click.IntRange(100), default=10_000, show_default=True, help="Images to generate.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Seed of the latents.")
@click.option("--backend", help="Runtime for an artifact: onnxruntime, openvino, tensorrt, torchscript, aoti.")
@click.option("--device", help="cpu, cuda or cuda:1.")
@click.option(
    "--against", metavar="OTHER", help="Also compare with OTHER's images of the same latents (the run an engine is of)."
)
@click.option(
    "--backbone",
    type=click.Choice(["auto", "digits", "inception"]),
    default="auto",
    show_default=True,
    help="Whose features: auto takes digits for grey images, inception for colour.",
)
@click.option(
    "--backbone-weights", type=click.Path(path_type=Path), metavar="F", help="Inception's weights (torch-fidelity's)."
)
@click.option("--batch-size", type=click.IntRange(1), help="Images at a time; the generator's optimum by default.")
@json_option
def command(
    source: str, data: str, split: str, count: int, seed: int, backend: str | None, device: str | None,
    against: str | None, backbone: str, backbone_weights: Path | None, batch_size: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure the quality of SOURCE's images against real ones.

    SOURCE is a run, an artifact, an .onnx file or a shipped model. Grey digit-like images are compared by the
    features of a small classifier that ships with ganexport, colour images by Inception's, whose weights you
    provide. All figures are printed with their conditions.
    """
    from ganexport.data import open_images_like
    from ganexport.errors import MissingDependencyError

    try:
        from ganexport.evaluation.evaluate import collect, evaluate_images
        from ganexport.evaluation.source import open_generator
    except ImportError as error:
        raise MissingDependencyError(f"evaluating needs {error.name}: pip install 'ganexport[train]'") from None

    def picture_size() -> tuple[int, int, int]:
        remarks().print(f"{data}: pictures of several sizes; the middle of each is resized to the generator's size")
        with open_generator(source, backend, device) as generator:
            height, width, channels = generator.generate(1).shape[1:]
        return height, width, channels

    real = open_images_like(data, picture_size, split=split)
    chosen = _backbone(backbone, backbone_weights, real.size[2], device)

    def made(name: str, backend: str | None) -> tuple[str, NDArray[np.uint8]]:
        with open_generator(name, backend, device) as generator:
            size = batch_size or (generator.spec.batch.opt if generator.spec.batch else 1)
            with progress(f"generating {count} images", count) as (bar, task):
                images = collect(
                    lambda start, n: generator.generate(n, seed, start=start),
                    count, max(size, 64), lambda n: bar.advance(task, n),
                )  # fmt: skip
            return f"{name} ({generator.runner.runtime})", images

    name, fake = made(source, backend)
    other = made(against, None) if against is not None else None
    remarks().print(f"comparing with {len(real)} real images of {real.name} ({split})")
    evaluation = evaluate_images(
        fake, real.array(), source=name, data=f"{real.name} ({split})", seed=seed, backbone=chosen, against=other
    )
    if as_json:
        print_json(evaluation)
    else:
        _show(evaluation)


def _backbone(name: str, weights: Path | None, channels: int, device: str | None) -> Backbone:
    from ganexport.evaluation.backbones import BACKBONES

    if name == "auto":
        name = "digits" if channels == 1 and weights is None else "inception"
    found: Backbone = BACKBONES.load(name).backbone(weights, device)
    return found


def _show(evaluation: Evaluation) -> None:
    from rich.table import Table

    low, high = evaluation.frechet_interval
    table = Table("figure", "value", "better", title=evaluation.source)
    table.add_row("Fréchet distance", f"{evaluation.frechet:.2f}  (95%: {low:.2f} to {high:.2f})", "lower")
    table.add_row("kernel distance", f"{evaluation.kernel[0]:.4f} ± {evaluation.kernel[1]:.4f}", "lower")
    for figure in ("precision", "recall", "density", "coverage"):
        table.add_row(figure, f"{getattr(evaluation, figure):.3f}", "higher")
    if evaluation.confidence is not None:
        table.add_row("mean confidence", f"{evaluation.confidence:.3f}", "higher")
        table.add_row("class shares", " ".join(f"{share:.1%}" for share in evaluation.class_shares), "as in the data")
    copies = evaluation.memorisation
    table.add_row("copies of training images", f"{copies.copies:.1%} (1% by chance)", "lower")
    table.add_row("distance to nearest training image", f"{copies.median_ratio:.2f} x that among them", "about 1")
    if (drift := evaluation.drift) is not None:
        table.add_row(f"Fréchet distance of {drift.against}", f"{drift.reference:.2f}", "")
        table.add_row("moved against it", f"{drift.moved:+.2%}", "about 0")
        table.add_row("Fréchet distance between the two", f"{drift.frechet:.3f}", "lower")
        same = "all pixels alike" if drift.psnr is None else f"{drift.psnr:.1f} dB"
        table.add_row("PSNR between the two, as pictures", same, "higher")
    console = results()
    console.print(table)
    console.print(
        f"{evaluation.generated} generated (seed {evaluation.seed}) against {evaluation.real} of {evaluation.data}; "
        f"features: {evaluation.backbone}"
    )
    if copies.suspicious:
        console.print("[bold]Many of these images are near-copies of training images.[/bold]")
