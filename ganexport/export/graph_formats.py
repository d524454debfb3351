"""From a fp32 ONNX file to every graph format in the wanted precision, each certified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ganexport.build.options import Built
from ganexport.export import formats
from ganexport.export.publish import Publication, vouched
from ganexport.parity import Certificate


def add_graph_formats(
    publication: Publication, built: Built, wanted: Sequence[str], seen: Sequence[Mapping[str, int]]
) -> None:
    """Make the ONNX file of the wanted precision, and what is built from it.

    The ONNX file is always part of the artifact: engines belong to one machine, and it is what they
    are rebuilt from.

    Args:
        publication: Takes the files.
        built: The fp32 ONNX file in the publication's folder.
        wanted: Formats; those made from torch are not looked at.
        seen: Sizes that the exporter was shown.

    Raises:
        ParityError: A file is outside tolerance.
        ExportError: A builder refuses the graph.
    """
    precision = publication.settings.precision
    source = built
    if precision != "fp32":
        from ganexport.export.lower import lower

        built, precision, certificate, picture, hint = lower(publication, built, precision, seen, wanted)
        (publication.folder / source.path).unlink(missing_ok=True)
        for companion in source.companions:
            (publication.folder / companion).unlink(missing_ok=True)
    else:
        path = publication.folder / built.path
        certificate, picture = publication.certify(path, "onnx", "fp32", seen, built.requires, built.notes)
        hint = ""
    publication.add(built, "onnx", precision, certificate, picture, hint)
    add_built_from_onnx(publication, built, precision, certificate, wanted, seen)


def add_built_from_onnx(
    publication: Publication, built: Built, precision: str, certificate: Certificate, wanted: Sequence[str],
    seen: Sequence[Mapping[str, int]],
) -> None:  # fmt: skip
    """Build and certify TensorRT engines and OpenVINO files from an ONNX file."""
    for name in wanted:
        if name in formats.PACKAGES:
            _add_package(publication, built, precision, certificate, name)
        if name not in formats.GRAPH_FORMATS:
            continue
        publication.say(f"building {name}")
        module = formats.load(name)
        made = module.build(
            publication.folder / built.path,
            publication.spec,
            publication.folder,
            precision,
            publication.settings.options,
        )
        judged, picture = publication.certify(
            publication.folder / made.path,
            name,
            precision,
            seen,
            made.requires,
            made.notes,
            vouched(certificate, built.path),
        )
        origin = tuple(p for p in built.passes)
        publication.add(
            Built(made.path, made.companions, made.requires, (*origin, *made.passes), made.notes),
            name,
            precision,
            judged,
            picture,
        )


def _add_package(publication: Publication, built: Built, precision: str, certificate: Certificate, name: str) -> None:
    """Put the ONNX file, as it is, into the folder that Triton or a browser wants; its certificate holds there."""
    publication.say(f"packing {name}")
    made = formats.load(name).build(
        publication.folder / built.path, publication.spec, publication.folder, precision, publication.settings.options
    )
    passes = (*built.passes, *made.passes)
    publication.add(Built(made.path, made.companions, made.requires, passes, made.notes), name, precision, certificate)
