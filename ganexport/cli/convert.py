"""``ganexport convert``."""

from __future__ import annotations

import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from ganexport.cli._console import json_option, print_json, remarks, results

EPILOG = """\b
Examples:
  ganexport convert runs/mnist --to onnx --to trt -o artifact
  ganexport convert mynet:make --weights g.safetensors --input "z=normal[batch,512]" \\
      --output "image=[-1,1]:NCHW" --batch 1:8:64 --to onnx -o artifact
  ganexport convert mynet:make --input "z=normal[batch,512]" --mapping style --truncation 0.7 --split \\
      --to onnx -o parts
  ganexport convert artifact --to trt -o artifact        (on the machine that runs it; no torch)
  ganexport convert artifact --to auto -o fastest        (measures what this machine can run)
"""


@click.command(epilog=EPILOG)
@click.argument("source")
@click.option(
    "--to",
    "formats",
    multiple=True,
    required=True,
    metavar="FORMAT",
    help="torchscript, onnx, trt, openvino, aoti, triton, web; may be given several times. Or auto: the fastest here.",
)
@click.option(
    "-o",
    "--output",
    "given",
    required=True,
    multiple=True,
    metavar="ARTIFACT|SPEC",
    help="The artifact (a folder); or what an output means: --output image=[-1,1]:NCHW.",
)
@click.option("--precision", metavar="P", help="fp32, fp16, bf16, int8 or auto.  [default: fp32; auto with --to auto]")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SPEC",
    help='An input of your module, in its order: "z=normal[batch,512]", "y=label(10)[batch]".',
)
@click.option("--dim", "dims", multiple=True, metavar="RANGE", help="Range of a dimension: height=64:256:1024/8.")
@click.option("--batch", metavar="MIN:OPT:MAX", help="Range of the batch, short for --dim batch=….")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights for a factory's module.")
@click.option("--weights-key", metavar="KEY", help="Where the weights are in a nested checkpoint: g_ema.")
@click.option("--call", default="", metavar="ARGS", help="Keyword arguments of every call: \"noise_mode='const'\".")
@click.option(
    "--noise",
    default="error",
    show_default=True,
    metavar="MODE",
    help="Random numbers drawn inside forward: error, input or constant.",
)
@click.option("--truncation", type=float, help="Truncation to bake into the graph.")
@click.option(
    "--mapping",
    metavar="PATH",
    help="The sub-module that maps z to w, for --truncation (its mean latent is baked in) and --split.",
)
@click.option("--split", is_flag=True, help="Write ARTIFACT/mapping (z to w) and ARTIFACT/synthesis (w to the image).")
@click.option("--output-dtype", metavar="DTYPE", help="uint8: the image leaves the graph as NHWC bytes.")
@click.option("--opset", type=click.IntRange(17, 23), help="ONNX opset of an exported module.  [default: 20]")
@click.option("--builder-level", type=click.IntRange(0, 5), help="TensorRT's effort, 0 to 5.")
@click.option("--workspace", type=click.IntRange(min=1), metavar="MIB", help="TensorRT's scratch memory limit.")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="TensorRT's timing cache file.")
@click.option("--version-compatible", is_flag=True, help="TensorRT: loadable by later versions of the same major.")
@click.option("--hardware-compatible", is_flag=True, help="TensorRT: loadable by later GPU generations.")
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    metavar="CC",
    help="TensorRT-RTX: target GPU, 8.9; may be given several times.",
)
@click.option("--keep-fp32", multiple=True, metavar="NODE", help="ONNX node or operator that stays in fp32.")
@click.option(
    "--calibration-samples", type=click.IntRange(1), default=64, show_default=True, help="Inputs drawn for int8."
)
@click.option(
    "--verify-budget", type=float, default=120.0, show_default=True, metavar="S", help="Seconds of comparing a file."
)
@click.option("--min-psnr", type=float, metavar="DB", help="Instead of the tolerance table's.")
@click.option(
    "--optimize-for",
    type=click.Choice(["latency", "throughput", "balanced"]),
    default="balanced",
    show_default=True,
    help="--to auto: the smallest batch, the largest, or all alike.",
)
@click.option(
    "--bench-batch",
    "bench_batches",
    type=click.IntRange(1),
    multiple=True,
    metavar="N",
    help="--to auto: a batch size to measure; may be given several times.",
)
@click.option("--allow-torch", is_flag=True, help="--to auto: formats that need torch at run time compete too.")
@click.option("--allow-mismatch", is_flag=True, help="Publish files outside tolerance, and record it.")
@json_option
def command(
    source: str, formats: tuple[str, ...], given: tuple[str, ...], as_json: bool, workspace: int | None,
    capabilities: tuple[str, ...], opset: int | None, builder_level: int | None, timing_cache: Path | None,
    version_compatible: bool, hardware_compatible: bool, keep_fp32: tuple[str, ...], calibration_samples: int,
    split: bool, mapping: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Export SOURCE with proof that every file makes the same images.

    SOURCE is a run, a trained model's name, package.module:factory, an artifact or an .onnx file.
    """
    from ganexport.build.options import BuildOptions
    from ganexport.export.convert import convert

    options = BuildOptions(
        opset, builder_level, workspace, timing_cache, version_compatible, hardware_compatible, capabilities,
        calibration_samples, keep_fp32,
    )  # fmt: skip
    console = remarks()
    say = console.print if console.is_terminal or not as_json else None
    output, outputs = split_outputs(given)
    common: dict[str, Any] = {
        "to": formats, "output": output, "outputs": outputs, "options": options, "progress": say, **settings,
    }  # fmt: skip
    with redirect_stdout(sys.stderr):  # what the source prints is no result
        made = _split(source, mapping, common) if split else (convert(source, mapping=mapping, **common),)
    if as_json:
        print_json([artifact.manifest for artifact in made] if split else made[0].manifest)
        return
    for artifact in made:
        show(artifact)


def _split(source: str, mapping: str | None, common: dict[str, Any]) -> tuple[Any, ...]:
    from ganexport.errors import UsageError
    from ganexport.export.convert import split

    if mapping is None:
        raise UsageError("--split cuts behind the network that maps z to w: name it, --mapping PATH")
    for name, unset in (("optimize_for", "balanced"), ("bench_batches", ()), ("allow_torch", False)):
        if common.pop(name) != unset:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --to auto, which --split does not take")
    return split(source, mapping, **common)


def split_outputs(given: tuple[str, ...]) -> tuple[Path, tuple[str, ...]]:
    """The artifact among the values of ``-o``/``--output``, and those that describe an output (``name=[``).

    Raises:
        UsageError: Not exactly one artifact.
    """
    from ganexport.errors import UsageError

    specs = tuple(text for text in given if re.match(r"\s*[A-Za-z_][\w.]*\s*=\s*\[", text))
    paths = [text for text in given if text not in specs]
    if len(paths) != 1 or not paths[0]:
        told = ", ".join(paths) or "none"
        raise UsageError(f"-o names the artifact to write, exactly one; got {told}")
    return Path(paths[0]), specs


def show(artifact: Any) -> None:
    """A table of the artifact's files with what their certificates say."""
    from rich.table import Table

    table = Table(title=None, box=None, pad_edge=False)
    for heading in ("file", "precision", "size", "verdict", "PSNR (worst)", "on"):
        table.add_column(heading, justify="right" if heading in ("size", "PSNR (worst)") else "left")
    for file in artifact.manifest.files:
        table.add_row(file.path, file.precision, f"{artifact.bytes_of(file) / 1e6:.1f} MB", *told(file.certificate))
    console = results()
    console.print(table)
    for file in artifact.manifest.files:
        if file.certificate and file.certificate.verdict == "partial":
            console.print(f"{file.path}: {'; '.join(file.certificate.notes)}")
    certificates = [file.certificate for file in artifact.manifest.files if file.certificate]
    for text in dict.fromkeys(text for certificate in certificates for text in certificate.warnings):
        console.print(f"note: {text}", soft_wrap=True)
    named = shlex.quote(str(artifact.path))
    made = "-n 64 -o grid.png" if artifact.spec.image_output else "-n 1000 --format npz -o samples"
    console.print(f"wrote {artifact.path}; next: ganexport generate {named} {made}", soft_wrap=True)


def told(certificate: Any) -> tuple[str, str, str]:
    """Verdict, worst PSNR and runtime of a certificate, for a table."""
    if certificate is None:
        return "none", "", ""
    if not certificate.outputs:
        return certificate.verdict, "not run", ""
    known = [o.worst_psnr for o in certificate.outputs if o.worst_psnr is not None]
    return certificate.verdict, f"{min(known):.1f} dB" if known else "identical", certificate.runtime
