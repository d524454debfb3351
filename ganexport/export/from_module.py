"""Convert a torch module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec
import torch

import ganexport
from ganexport.artifact import Artifact, ArtifactWriter
from ganexport.errors import ExportError
from ganexport.export import formats
from ganexport.export.capture import capture, example_sizes
from ganexport.export.convert import ConvertSettings
from ganexport.export.graph_formats import add_graph_formats
from ganexport.export.prepared import Prepared, prepare
from ganexport.export.publish import Publication
from ganexport.export.source import Description, TorchSource


def convert_module(
    source: TorchSource, description: Description, wanted: tuple[str, ...], settings: ConvertSettings,
    writer: ArtifactWriter, say: Callable[[str], None], passes: tuple[str, ...] = (),
) -> Artifact:  # fmt: skip
    """Prepare, capture, export each format, certify against eager torch, publish."""
    say("preparing the module")
    prepared = prepare(
        source, declared=description.outputs, noise=settings.noise, truncation=settings.truncation,
        mapping=settings.mapping, uint8=settings.uint8,
    )  # fmt: skip
    publication = Publication(
        writer, prepared.spec, prepared.reference, prepared.reference.name, settings, [*passes, *prepared.passes], say
    )
    program = functools.cache(lambda: _capture(prepared, say))
    seen = [example_sizes(prepared.spec)]
    if any(name not in formats.TORCH_FORMATS for name in wanted):
        from ganexport.export import onnx as onnx_format

        say("exporting to ONNX")
        built = onnx_format.export(prepared, program(), writer.folder, "fp32", settings.options)
        publication.passes += _rewritten(prepared)
        add_graph_formats(publication, built, wanted, seen)
    for name in wanted:
        if name in formats.TORCH_FORMATS:
            say(f"exporting to {name}")
            _add_torch_format(publication, prepared, name, program, seen)
    provenance = msgspec.structs.replace(source.provenance, versions=versions())
    return publication.publish(provenance)


def _capture(prepared: Prepared, say: Callable[[str], None]) -> torch.export.ExportedProgram:
    say("capturing the module with symbolic dimensions")
    return capture(prepared.function, prepared.spec)


def _rewritten(prepared: Prepared) -> tuple[str, ...]:
    seen = prepared.function.seen
    lines = list(seen.rewritten)
    if seen.complex:
        lines.append(f"complex-pairs: {seen.complex} complex tensors as real and imaginary parts")
    if seen.numbers:
        lines.append(f"symbolic-numbers: int() and float() of sizes in {', '.join(seen.numbers)}")
    if seen.unproved:
        lines.append(f"unproved-sizes: {seen.unproved} relations of sizes left to the certificate")
    return tuple(lines)


def _add_torch_format(
    publication: Publication, prepared: Prepared, name: str, program: Callable[[], Any], seen: list[dict[str, int]]
) -> None:
    module = formats.load(name)
    if name == "torchscript":
        try:
            captured = program()
        except ExportError:
            captured = None  # a trace or script may hold all the same; the certificate decides
    else:
        captured = program()
    built = module.export(prepared, captured, publication.folder, "fp32", publication.settings.options)
    path = publication.folder / built.path
    certificate, picture = publication.certify(path, name, "fp32", seen, built.requires, built.notes)
    publication.add(built, name, "fp32", certificate, picture)


def versions() -> dict[str, str]:
    """Versions that made the artifact."""
    import onnx

    return {"ganexport": ganexport.__version__, "torch": str(torch.__version__), "onnx": onnx.__version__}
