"""``ganexport verify``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from ganexport.cli._console import json_option, print_json, remarks, results

EPILOG = """\b
Examples:
  ganexport verify artifact                              against its golden outputs; no torch, no source
  ganexport verify artifact --against runs/mnist         against the source, over the whole range of sizes
"""


#: Options that say what SOURCE is.
DESCRIBING = (
    "inputs", "outputs", "dims", "batch", "weights", "weights_key", "call", "noise", "truncation", "mapping",
)  # fmt: skip


@click.command(epilog=EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--against", metavar="SOURCE", help="A run, a model's name, package.module:factory, an artifact or an .onnx."
)
@click.option(
    "--format", "formats", multiple=True, metavar="FORMAT", help="Only this format; may be given several times."
)
@click.option(
    "--input", "inputs", multiple=True, metavar="SPEC", help="As for convert; the artifact's where it is not given."
)
@click.option("--dim", "dims", multiple=True, metavar="RANGE", help="As for convert.")
@click.option("--batch", metavar="MIN:OPT:MAX", help="As for convert.")
@click.option("--weights", type=click.Path(path_type=Path), help="As for convert.")
@click.option("--weights-key", metavar="KEY", help="As for convert.")
@click.option("--call", default="", metavar="ARGS", help="As for convert.")
@click.option("--output", "outputs", multiple=True, metavar="SPEC", help="As for convert.")
@click.option("--noise", default="error", metavar="MODE", help="As for convert.")
@click.option("--truncation", type=float, help="As for convert.")
@click.option("--mapping", metavar="PATH", help="As for convert.")
@click.option(
    "--verify-budget",
    "budget",
    type=float,
    default=120.0,
    show_default=True,
    metavar="S",
    help="Seconds of comparing a file with SOURCE.",
)
@click.option("--min-psnr", type=float, metavar="DB", help="Instead of the tolerance table's.")
@click.option("--picture", type=click.Path(path_type=Path), help="Where the worst sample is drawn on failure.")
@json_option
def command(artifact: Path, as_json: bool, **settings: Any) -> None:
    """Compare ARTIFACT's outputs with its golden outputs or its source; exit 1 when outside tolerance."""
    from ganexport.export.verify import verify

    console = remarks()
    described = {k: v for k, v in settings.items() if k in DESCRIBING}
    rest = {k: v for k, v in settings.items() if k not in described}
    with redirect_stdout(sys.stderr):  # what the source prints is no result
        report = verify(artifact, progress=None if as_json else console.print, **rest, **described)
    if as_json:
        print_json(report)
    else:
        _show(report)
    report.raise_for_failures()


def _show(report: Any) -> None:
    from rich.table import Table

    from ganexport.cli.convert import told

    table = Table(box=None, pad_edge=False)
    for heading in ("file", "precision", "verdict", "PSNR (worst)", "on", "remarks"):
        table.add_column(heading)
    for file in report.files:
        remarks_of = "; ".join((*file.certificate.notes, *([f"drawn in {file.picture}"] if file.picture else [])))
        table.add_row(file.path, file.precision, *told(file.certificate), remarks_of)
    results().print(table)
