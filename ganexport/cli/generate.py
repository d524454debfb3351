"""``ganexport generate``: a grid, a folder of pictures, or shards of any number of them."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ganexport.cli._console import print_json, progress, remarks, size, whole_numbers
from ganexport.cli._output import Destination, require_writable
from ganexport.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    STOPS,
    InterruptedBySignalError,
    OutputError,
    Terminated,
    UsageError,
    stop_name,
)

if TYPE_CHECKING:
    from ganexport.runtime.generator import Generator

#: Most pixels of a grid, and most files of a plain folder.
GRID_PIXELS = 1 << 28
FOLDER_FILES = 10_000
#: Suffixes of pictures that are not written.
PICTURES = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")

EXAMPLES = """
\b
Examples:
  ganexport generate digits -n 64 -o grid.png
  ganexport generate dcgan-mnist -n 64 -o grid.png
  ganexport generate digits -n 20 --seed 7 --start 100 -o pictures/
  ganexport generate digits -n 1000000 --format webdataset -o shards/
  ganexport generate /shared/digits -n 1000000 --format webdataset --ray head:6379 -o /shared/shards/
"""


@click.command("generate", epilog=EXAMPLES)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-n", "--count", type=int, default=64, show_default=True, help="How many pictures.")
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2^64 - 1.")
@click.option("--start", type=int, default=0, show_default=True, help="Number of the first sample of the seed.")
@click.option("--seeds", help="One seed a picture, comma-separated: sample --start of each.")
@click.option("--labels", "--class", "labels", help="A class for all, or one a picture, comma-separated.")
@click.option("--truncation", type=float, help="Cut the latents to this many standard deviations (or feed it).")
@click.option("--size", "sizes", multiple=True, metavar="NAME=SIZE", help="Size of a symbolic dimension.")
@click.option("--backend", help="onnxruntime, openvino, tensorrt, torchscript or aoti; default: the first that runs.")
@click.option("--device", help="cpu, cuda or cuda:1.")
@click.option("--precision", help="fp32, fp16, bf16 or int8, where the artifact holds several.")
@click.option(
    "--rebuild", is_flag=True, help="Where its TensorRT engine cannot run here, build it again from the ONNX."
)
@click.option("--threads", type=int, help="Threads of the engine.")
@click.option("--batch-size", type=int, help="Samples an engine call; default: the generator's optimum.")
@click.option("--format", "kind", help="Write shards: png, npz, webdataset or parquet (resumable).")
@click.option("--ray", "address", help="With --format: make shards on the Ray cluster at this address.")
@click.option("--shard-size", type=int, help="Samples a shard; default: 1000 for png, else 10000.")
@click.option("-o", "--output", type=Destination(path_type=Path), required=True, help="grid.png, or a folder.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON on stdout.")
def command(artifact: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Make pictures from ARTIFACT, one seed and number a picture.

    ARTIFACT is an artifact's folder or a lone .onnx, which need no torch; with torch also a run, or the name of a
    trained model of `ganexport recipes`.

    -o NAME.png writes a grid, -o FOLDER one PNG a picture, and --format writes shards with
    checksums; the same command continues shards where it was interrupted.
    """
    begun = time.perf_counter()
    asked = _asked(options)
    _check_output(output, options, asked)
    if options["rebuild"]:
        _rebuild(artifact)
    with _open(artifact, options) as generator:
        for remark in generator.remarks:
            remarks().print(f"passed over: {remark}", markup=False)
        remarks().print(f"running on {generator.runtime}", markup=False)
        if options["kind"]:
            made = _shards(generator, output, options, asked)
        elif output.suffix.lower() == ".png":
            made = _grid(generator, output, asked)
        else:
            made = _folder(generator, output, asked)
        what = "picture" if generator.spec.image_output else "sample"
        seconds = time.perf_counter() - begun
        about = {"output": str(output), "count": made, "seconds": round(seconds, 3), "runtime": generator.runtime}
    if as_json:
        print_json(about)
    else:
        click.echo(f"{made} {what}{'' if made == 1 else 's'} in {output} ({seconds:.1f} s)")


def _open(source: Path, options: dict[str, Any]) -> Generator:
    """The generator of an artifact or ONNX file, without torch; of a run or a trained model with it.

    For shards on the CPU the engine's threads sleep while they wait, as encoders want the cores.
    """
    from ganexport.artifact import MANIFEST
    from ganexport.recipe import FILE, recipe_names
    from ganexport.runtime.generator import load

    trained = (source / FILE).is_file() or (str(source) in recipe_names() and not source.exists())
    if trained and not (source / MANIFEST).is_file():
        return _open_trained(source, options)
    settings = {"threads": options["threads"]} if options["threads"] is not None else {}
    generator = load(source, options["backend"], options["device"], precision=options["precision"], settings=settings)
    if not options["kind"] or (generator.backend, generator.device) != ("onnxruntime", "cpu"):
        return generator
    remarks_before = generator.remarks
    generator.close()
    generator = load(
        source, "onnxruntime", "cpu", precision=options["precision"], settings={"spinning": False, **settings}
    )
    generator.remarks = remarks_before
    return generator


def _open_trained(source: Path, options: dict[str, Any]) -> Generator:
    from ganexport.evaluation.source import open_generator

    # Shards record the hash of the file that made them; a run has none.
    for name, option in (("precision",) * 2, ("threads",) * 2, ("rebuild",) * 2, ("kind", "format")):
        if options[name]:
            raise UsageError(f"--{option}: {source} is a run, not an artifact: ganexport convert it first")
    return open_generator(str(source), options["backend"], options["device"])


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``Generator.generate`` from the options."""
    asked: dict[str, Any] = {
        "n": options["count"],
        "seed": options["seed"],
        "start": options["start"],
        "truncation": options["truncation"],
        "batch_size": options["batch_size"],
    }
    if options["seeds"] is not None:
        given = click.get_current_context().get_parameter_source
        if given("seed") is ParameterSource.COMMANDLINE:
            raise UsageError("--seed and --seeds: give one seed for all pictures, or one a picture")
        asked["seeds"] = whole_numbers(options["seeds"], "--seeds")
        if given("count") is not ParameterSource.COMMANDLINE:
            asked["n"] = len(asked["seeds"])
    if options["labels"] is not None:
        labels = whole_numbers(options["labels"], "--labels")
        asked["labels"] = labels[0] if len(labels) == 1 else labels
    if options["sizes"]:
        asked["sizes"] = dict(size(text) for text in options["sizes"])
    return asked


def _rebuild(path: Path) -> None:
    """Build the engines that this machine's preflight refuses again, from the ONNX file beside them.

    Raises:
        BackendUnavailableError: There is no GPU to run the result.
        ExportError, ParityError: As ``ganexport convert``.
    """
    from ganexport.artifact import Artifact
    from ganexport.errors import BackendUnavailableError
    from ganexport.runtime import _cuda
    from ganexport.runtime.tensorrt import gpu_or_reason, installed, preflight

    if reason := _cuda.unavailable():
        raise BackendUnavailableError(f"--rebuild: an engine needs a GPU to run on: {reason}")
    artifact = Artifact(path)
    for file in artifact.manifest.files:
        if file.format != "trt":
            continue
        try:
            preflight(artifact.path / file.path, file.requires, gpu_or_reason(0), installed())
        except BackendUnavailableError as error:
            from ganexport.export.convert import convert

            remarks().print(f"building again: {error}", markup=False)
            convert(path, to="trt", precision=file.precision, output=path)


def _check_output(output: Path, options: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse what cannot be written before anything is computed."""
    from ganexport.artifact import MANIFEST, writing
    from ganexport.recipe import FILE

    if options["kind"] is None and options["shard_size"] is not None:
        raise UsageError("--shard-size needs --format")
    if options["kind"] is None and options["address"] is not None:
        raise UsageError("--ray needs --format: a cluster makes shards")
    if not options["kind"] and output.suffix.lower() in (".npz", ".npy"):
        raise UsageError(f"{output}: arrays are written as shards: --format npz -o FOLDER")
    if options["kind"] and output.suffix.lower() == ".png":
        raise UsageError(f"--format writes a folder of shards, {output} is a file's name")
    if output.suffix.lower() == ".png" and not options["kind"]:
        require_writable(output)
        return
    with writing(output):
        if any((output / name).is_file() for name in (MANIFEST, FILE)):
            raise OutputError(f"{output}: is an artifact or a run; choose another folder for what is made")
        if output.exists() and not output.is_dir():
            raise OutputError(f"{output}: is a file; a folder, or NAME.png for a grid, is wanted")
    if output.suffix.lower() in PICTURES:
        raise UsageError(f"{output}: a grid is written as NAME.png, and a folder is not called so")
    if not options["kind"] and asked["n"] > FOLDER_FILES:
        raise UsageError(f"{asked['n']} files in one folder are too many: use --format png, webdataset or parquet")
    twice = [seed for seed, times in Counter(asked.get("seeds", ())).items() if times > 1]
    if twice:
        raise UsageError(f"--seeds names {twice[0]} twice, and files are called by their seeds: use -o NAME.png")


def _grid(generator: Generator, output: Path, asked: dict[str, Any]) -> int:
    """All pictures in one PNG, as near to a square as their number allows."""
    import numpy as np

    from ganexport.artifact import write_atomic
    from ganexport.bulk import png

    n = asked["n"]
    grid: Any = None
    for position, picture in enumerate(_pictures(generator, asked)):
        height, width, channels = picture.shape
        if grid is None:
            if n * height * width > GRID_PIXELS:
                raise UsageError(f"{n} pictures of {width}x{height} are too many for one grid: give a folder with -o")
            png.encode(picture[None])  # refuses a number of channels that PNG has not, before the rest is made
            columns = math.ceil(math.sqrt(n * height / width))
            grid = np.zeros((math.ceil(n / columns), height, columns, width, channels), np.uint8)
        grid[position // columns, :, position % columns] = picture
    rows, height, columns, width, channels = grid.shape
    write_atomic(output, png.encode(grid.reshape(1, rows * height, columns * width, channels))[0])
    return int(n)


def _folder(generator: Generator, output: Path, asked: dict[str, Any]) -> int:
    """One PNG a picture, named by its number (or its seed, with --seeds)."""
    from ganexport.artifact import write_atomic, writing
    from ganexport.bulk import png

    pictures = _pictures(generator, asked)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    names = [f"seed-{seed}" for seed in asked.get("seeds", ())] or [
        f"{asked['start'] + position:06d}" for position in range(asked["n"])
    ]
    for name, picture in zip(names, pictures, strict=True):
        write_atomic(output / f"{name}.png", png.encode(picture[None])[0])
    return len(names)


def _pictures(generator: Generator, asked: dict[str, Any]) -> Any:
    stream = generator.stream(**asked)

    def each() -> Any:
        with progress("generating", asked["n"]) as (bar, task):
            for batch in stream:
                yield from batch
                bar.advance(task, len(batch))

    return each()


def _shards(generator: Generator, output: Path, options: dict[str, Any], asked: dict[str, Any]) -> int:
    from ganexport.bulk.job import generate_bulk
    from ganexport.bulk.plan import Progress

    if "seeds" in asked:
        raise UsageError("--seeds does not go with --format: shards count the samples of one seed")
    if isinstance(asked.get("labels"), list):
        raise UsageError("--format takes one class for all, or random ones")
    last, done = time.monotonic(), 0
    with progress("generating", asked["n"]) as (bar, task):

        def show(state: Progress) -> None:
            nonlocal last, done
            done = state.done
            text = f"{state.rate:,.0f} images/s" if state.rate else "generating"
            bar.update(task, completed=state.done, description=text)
            if not bar.console.is_terminal and time.monotonic() - last > 10:
                last = time.monotonic()
                left = f", {state.eta:.0f} s left" if state.eta is not None else ""
                remarks().print(f"{state.done} of {state.total} ({text}{left})")

        try:
            generate_bulk(
                generator,
                output,
                format=options["kind"],
                shard_size=options["shard_size"],
                address=options["address"],
                threads=options["threads"],
                on_progress=show,
                **asked,
            )
        except STOPS as stop:
            raise InterruptedBySignalError(
                f"stopped by {stop_name(stop)}; {done} of {asked['n']} pictures are whole; the same command continues",
                exit_code=EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED,
            ) from None
    return done
