"""Convert an artifact or a lone ONNX file. No torch anywhere on this way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

import ganexport
from ganexport.artifact import GOLDEN, Artifact, ArtifactFile, ArtifactWriter, writing
from ganexport.build import onnx_file
from ganexport.build.options import Built, file_name
from ganexport.build.uint8_output import append_uint8
from ganexport.errors import ArtifactError, ExportError, ParityError, UsageError
from ganexport.export import formats
from ganexport.export.convert import ConvertSettings
from ganexport.export.engines import open_engine
from ganexport.export.graph_formats import add_built_from_onnx, add_graph_formats
from ganexport.export.publish import Publication
from ganexport.export.source import Description, GraphSource
from ganexport.runtime.base import Runner
from ganexport.spec import Dim, GeneratorSpec, check_layout

Array = NDArray[Any]


class GraphReference:
    """An ONNX file as the truth, run by ONNX Runtime.

    Args:
        engine: The runner.
        spec: Of the file.
        label: Where it came from.
    """

    def __init__(self, engine: Runner, spec: GeneratorSpec, label: str) -> None:
        self.engine = engine
        self.spec = spec
        self.name = f"{label} on {engine.runtime}"

    @classmethod
    def open(cls, source: GraphSource, description: Description) -> GraphReference:
        """From an artifact or a lone file.

        Raises:
            As ``convert``.
        """
        model = onnx_file.load_model(source.path)
        spec = _spec_of(source, model, description)
        precision = source.file.precision if source.file else onnx_precision(model)
        return cls(open_engine(source.path, spec, "onnx", precision), spec, f"{source.path.name} {precision}")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        return self.engine.run(feeds)

    def close(self) -> None:
        """Release the engine."""
        self.engine.close()


def onnx_precision(model: Any) -> str:
    """The precision of a graph, read off its weights: the narrowest type among them."""
    from onnx import TensorProto

    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        return "int8"
    types = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    if TensorProto.FLOAT16 in types:
        return "fp16"
    return "bf16" if TensorProto.BFLOAT16 in types else "fp32"


def _spec_of(source: GraphSource, model: Any, description: Description) -> GeneratorSpec:
    own = source.artifact.spec if source.artifact else onnx_file.read_spec(model)
    if own is None:
        spec = onnx_file.derive_spec(model, description.inputs, description.dims, source.path.stem)
    else:
        if description.inputs and source.artifact is None:
            raise UsageError(f"--input: {source.path} already says what its inputs are")
        spec = _narrowed(own, description.dims)
    return _declared(spec, description.outputs)


def _narrowed(spec: GeneratorSpec, dims: tuple[Dim, ...]) -> GeneratorSpec:
    """The spec with other ranges for some dimensions (another profile of the same graph)."""
    for dim in dims:
        old = spec.dim(dim.name)
        if dim.step % old.step:
            raise UsageError(f"--dim {dim.name}: this graph needs multiples of {old.step}")
    given = {dim.name: dim for dim in dims}
    return msgspec.structs.replace(spec, dims=tuple(given.get(dim.name, dim) for dim in spec.dims))


def _declared(spec: GeneratorSpec, outputs: Any) -> GeneratorSpec:
    known = {tensor.name: tensor for tensor in spec.outputs}
    for name, value_range, layout in outputs:
        if name not in known:
            raise UsageError(f"--output {name}: this graph's outputs are {', '.join(known)}")
        declared = msgspec.structs.replace(known[name], range=value_range, layout=layout or known[name].layout)
        known[name] = check_layout(declared)
    return msgspec.structs.replace(spec, outputs=tuple(known.values()))


def convert_graph(
    source: GraphSource, description: Description, wanted: tuple[str, ...], settings: ConvertSettings,
    writer: ArtifactWriter, say: Callable[[str], None],
) -> Artifact:  # fmt: skip
    """Build the formats from the ONNX file, with its fp32 outputs on ONNX Runtime as the truth."""
    if torch_only := [name for name in wanted if name in formats.TORCH_FORMATS]:
        raise UsageError(
            f"{torch_only[0]} is made from a torch module; convert the original source (a run, package.module:factory)"
        )
    refuse_module_options(source.path.name, settings.noise, settings.truncation, settings.mapping)
    say(f"reading {source.path.name}")
    model = onnx_file.load_model(source.path)
    spec = _spec_of(source, model, description)
    precision = source.file.precision if source.file else onnx_precision(model)
    _refuse(source, model, spec, precision, settings)
    truth, truth_precision = _truth(source, spec, precision)
    for line in _beyond(source, spec):
        say(line)
    with open_engine(truth, spec, "onnx", truth_precision) as engine:
        reference: Any = engine
        changed = spec
        if settings.uint8:
            changed = append_uint8(model, spec)
            reference = _BytesReference(engine, spec)
        onnx_file.write_spec(model, changed)
        name = f"{truth.name} {truth_precision} on {engine.runtime}"
        publication = Publication(writer, changed, reference, name, settings, _passes(source), say)
        built = _write(model, precision, writer, settings)
        if settings.precision == precision:
            _build_only(publication, source, built, wanted, precision, engine.runtime)
        else:
            add_graph_formats(publication, built, wanted, [])
        kept = _keep(publication, source)
        golden = _keep_golden(source, writer, unchanged=changed == source_spec(source))
        provenance = msgspec.structs.replace(
            source.provenance, versions=source.provenance.versions | {"ganexport": ganexport.__version__}
        )
        return publication.publish(provenance, golden=not golden, kept=kept)


def refuse_module_options(what: str, noise: str, truncation: float | None, mapping: str | None) -> None:
    """Refuse what only a module's export can honour.

    Raises:
        UsageError: Naming the option.
    """
    for name, said in (("--truncation", truncation is not None), ("--noise", noise != "error"), ("--mapping", mapping)):
        if said:
            raise UsageError(f"{name} is baked in when a module is exported; {what} is a finished graph")


def source_spec(source: GraphSource) -> GeneratorSpec | None:
    """The spec that the source's golden outputs belong to."""
    return source.artifact.spec if source.artifact else None


def _refuse(source: GraphSource, model: Any, spec: GeneratorSpec, precision: str, settings: ConvertSettings) -> None:
    if precision not in ("fp32", settings.precision):
        raise UsageError(
            f"{source.path.name} is {precision}: other precisions are made from fp32; ask for --precision {precision}, "
            "or convert the original source"
        )
    if settings.options.opset not in (None, opset := _opset(model)):
        raise UsageError(f"--opset {settings.options.opset}: {source.path.name} is a finished graph of opset {opset}")
    if fixed := onnx_file.static_inputs(model, spec):
        raise UsageError(f"the ONNX file fixes {'; '.join(fixed)}: it cannot take other sizes; export it again")
    if random := onnx_file.random_nodes(model):
        raise ExportError(
            f"{source.path.name} draws random numbers at run time ({random[0]}): two runs differ; export it again with "
            "--noise input or --noise constant"
        )


def _truth(source: GraphSource, spec: GeneratorSpec, precision: str) -> tuple[Path, str]:
    """The ONNX file that everything is compared with, and its precision: the artifact's fp32 one where it has it.

    Raises:
        UsageError: Other sizes or ranges are asked for of a low-precision file that has no fp32 one beside it.
    """
    artifact = source.artifact
    if artifact is None or precision == "fp32":
        return source.path, precision
    full = next((f for f in artifact.manifest.files if (f.format, f.precision) == ("onnx", "fp32")), None)
    if full is not None:
        return artifact.verified_path(full), "fp32"
    if not _covers(artifact.spec, spec):
        raise UsageError(
            f"{artifact.path}: holds {precision} alone, proved for {_told_dims(artifact.spec)}; convert its source "
            "again for other sizes or ranges"
        )
    return source.path, precision


def _opset(model: Any) -> int:
    return max((int(e.version) for e in model.opset_import if e.domain in ("", "ai.onnx")), default=0)


def _covers(proved: GeneratorSpec, asked: GeneratorSpec) -> bool:
    """Whether a certificate for one spec holds for another: the same tensors, at sizes within."""
    return msgspec.structs.replace(asked, dims=proved.dims) == proved and _within(proved, asked)


def _within(proved: GeneratorSpec, asked: GeneratorSpec) -> bool:
    return all(
        old.min <= new.min and new.max <= old.max and new.step % old.step == 0
        for old, new in zip(proved.dims, asked.dims, strict=True)
    )


def _beyond(source: GraphSource, spec: GeneratorSpec) -> list[str]:
    """What has to be said of an artifact at sizes that its own source was never compared at."""
    if source.artifact is None or _within(source.artifact.spec, spec):
        return []
    told = _told_dims(source.artifact.spec)
    return [f"compared with its source for {told} only; for the sizes beyond: ganexport verify --against SOURCE"]


def _told_dims(spec: GeneratorSpec) -> str:
    return ", ".join(f"{dim.name} {dim.min} to {dim.max}" for dim in spec.dims) or "its fixed size"


def _passes(source: GraphSource) -> tuple[str, ...]:
    return source.file.passes if source.file else ()


def _write(model: Any, precision: str, writer: ArtifactWriter, settings: ConvertSettings) -> Built:
    """The graph in the artifact's folder; under a passing name when only something made from it stays."""
    name = file_name("onnx", precision) if settings.precision == precision else "source.onnx"
    companions = onnx_file.save_model(model, writer.folder / name)
    onnx_file.check_model(writer.folder / name)
    return Built(name, companions, {"opset": str(_opset(model))}, ("uint8-output",) if settings.uint8 else ())


def _build_only(
    publication: Publication, source: GraphSource, built: Built, wanted: tuple[str, ...], precision: str, runtime: str
) -> None:
    """The graph is in the wanted precision already: it keeps a certificate that covers it, engines get theirs."""
    stored = source.file.certificate if source.file else None
    if stored is not None and source.artifact is not None and _covers(source.artifact.spec, publication.spec):
        certificate = stored
    else:
        certificate, _ = publication.certify(
            publication.folder / built.path, "onnx", precision, [], built.requires, (f"certified on {runtime}",)
        )
        notes = (*certificate.notes, *_beyond(source, publication.spec))
        certificate = msgspec.structs.replace(certificate, notes=notes)
    publication.add(built, "onnx", precision, certificate)
    add_built_from_onnx(publication, built, precision, certificate, wanted, [])


def _keep(publication: Publication, source: GraphSource) -> list[ArtifactFile]:
    """An artifact converted into itself keeps its other files; one that cannot stay is left out with its reason."""
    artifact = source.artifact
    if artifact is None or artifact.path.resolve() != publication.writer.destination.resolve():
        return []
    made = {(file.format, file.precision) for file in publication.files}
    kept = []
    for file in artifact.manifest.files:
        if (file.format, file.precision) in made:
            continue
        try:
            kept.append(_kept(publication, artifact, file))
        except (ArtifactError, ParityError, UsageError) as error:
            publication.say(f"{file.path} is left out: {error}")
    return kept


def _kept(publication: Publication, artifact: Artifact, file: ArtifactFile) -> ArtifactFile:
    """A file of the artifact in the new one, proved again where its certificate does not cover the new spec.

    Raises:
        ArtifactError: It is missing or damaged.
        ParityError: It does not hold there.
        UsageError: It has to be made again.
    """
    spec = publication.spec
    if [t.dtype for t in spec.outputs] != [t.dtype for t in artifact.spec.outputs]:
        raise UsageError("its outputs have another dtype")
    if file.format in formats.PACKAGES and spec != artifact.spec:
        raise UsageError(f"it names the sizes and ranges of before; add it again with --to {file.format}")
    path = artifact.verified_path(file)
    if not _covers(artifact.spec, spec):
        certificate, _ = publication.certify(path, file.format, file.precision, [], file.requires)
        if certificate.failures and not publication.settings.allow_mismatch:
            raise ParityError("; ".join(certificate.failures[:3]))
        if not certificate.outputs and spec.dims != artifact.spec.dims:
            raise UsageError(f"it cannot be run here, and was proved for {_told_dims(artifact.spec)} alone")
        file = msgspec.structs.replace(file, certificate=certificate)
    for name in (file.path, *file.companions):
        target = publication.folder / name
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.path / name, target)
    if file.format != "onnx" or spec == artifact.spec:
        return file
    path = publication.folder / file.path
    model = onnx_file.load_model(path)
    onnx_file.write_spec(model, spec)
    again = publication.writer.describe(
        file.path, file.format, file.precision, companions=onnx_file.save_model(model, path)
    )
    return msgspec.structs.replace(file, sha256=again.sha256, bytes=again.bytes, companions=again.companions)


def _keep_golden(source: GraphSource, writer: ArtifactWriter, *, unchanged: bool) -> bool:
    if not unchanged or source.artifact is None:
        return False
    path = source.artifact.golden_path()
    if path is None:
        return False
    with writing(writer.folder / GOLDEN):
        shutil.copyfile(path, writer.folder / GOLDEN)
    return True


class _BytesReference:
    """The source's image as NHWC bytes, by the formula that the graph's last steps follow."""

    def __init__(self, engine: Runner, spec: GeneratorSpec) -> None:
        image = spec.image_output
        assert image is not None
        assert image.range is not None
        self.engine, self.image = engine, image
        self.low, self.high = image.range

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        outputs = self.engine.run(feeds)
        value = outputs[self.image.name].astype(np.float32)
        scaled = (value - np.float32(self.low)) * np.float32(255.0 / (self.high - self.low))
        pixels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        outputs[self.image.name] = pixels.transpose(0, 2, 3, 1) if self.image.layout == "NCHW" else pixels
        return outputs
