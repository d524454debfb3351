"""Verify an artifact: its files against its golden outputs, or against its source. Torch only where a file needs it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganexport.artifact import FORMATS, Artifact, ArtifactFile
from ganexport.build import certify as certifying
from ganexport.build.golden import read_golden
from ganexport.build.picture import write_comparison
from ganexport.errors import BackendUnavailableError, ParityError, UsageError
from ganexport.export.engines import open_engine, why_not
from ganexport.export.formats import PACKAGES, UNSAID
from ganexport.parity import Certificate, Comparison, tolerance
from ganexport.spec import BATCH, GeneratorSpec, TensorSpec

Array = NDArray[Any]


#: The words of :func:`verify`'s ``description`` as the command line has them.
_OPTIONS = {"inputs": "--input", "outputs": "--output", "dims": "--dim", "weights_key": "--weights-key"} | {
    name: f"--{name}" for name in ("batch", "weights", "call", "noise", "truncation", "mapping")
}


class FileReport(msgspec.Struct, frozen=True):
    """What verifying one file said.

    Attributes:
        path: The file, relative to the artifact.
        format: As in the manifest.
        precision: As in the manifest.
        certificate: Of this verification, not the stored one.
        picture: PNG of the worst sample beside the reference, empty when it passed or is no image.
    """

    path: str
    format: str
    precision: str
    certificate: Certificate
    picture: str = ""


class VerifyReport(msgspec.Struct, frozen=True):
    """All files of an artifact.

    Attributes:
        files: One entry a file.
    """

    files: tuple[FileReport, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing that was run is outside its tolerance, and something was run."""
        return all(f.certificate.passed for f in self.files) and any(f.certificate.outputs for f in self.files)

    def raise_for_failures(self) -> None:
        """Raise when not :attr:`passed`.

        Raises:
            ParityError: Naming each failure, or that nothing could be run here.
        """
        failures = [f"{f.path}: {'; '.join(f.certificate.failures)}" for f in self.files if f.certificate.failures]
        if failures:
            raise ParityError("outside tolerance: " + " | ".join(failures))
        if not self.passed:
            notes = "; ".join(note for f in self.files for note in f.certificate.notes)
            raise ParityError(f"nothing could be run here, so nothing is verified: {notes}")


def verify(
    artifact: str | os.PathLike[str],
    *,
    against: Any = None,
    formats: Sequence[str] = (),
    budget: float = 120.0,
    min_psnr: float | None = None,
    picture: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    **description: Any,
) -> VerifyReport:
    """Compare what an artifact's files give with the truth.

    Args:
        artifact: The artifact's folder.
        against: A source to compare with over the whole range of sizes (a run, an artifact, an
            .onnx, ``package.module:factory``); without it, the golden outputs in the artifact.
        formats: Only these; all files when empty.
        budget: Seconds a file, when comparing with a source.
        min_psnr: dB; overrides the tolerance table's.
        picture: Where to write the worst sample's PNG; beside the artifact when not said.
        progress: Told what happens.
        **description: As for :func:`ganexport.convert`, when ``against`` needs describing
            (inputs, outputs, dims, weights, weights_key, call, noise, truncation, mapping); inputs, sizes and
            ranges that are not given are the artifact's.

    Returns:
        One certificate a file; ask :attr:`VerifyReport.passed`.

    Raises:
        ArtifactError, IntegrityError: Missing or changed files.
        UsageError: Nothing to compare with, or no such format in it.
    """
    certifying.check_limits(budget, min_psnr)
    if against is None and (said := [name for name, value in description.items() if value not in UNSAID]):
        raise UsageError(f"{_OPTIONS.get(said[0], said[0])}: describes --against SOURCE, which is missing")
    opened = Artifact(artifact)
    say = progress or (lambda _text: None)
    # Packages (triton, web) hold the ONNX file once more: it is run there when they are asked for.
    files = [f for f in opened.manifest.files if f.format in (formats or FORMATS)]
    for name in formats:
        opened.find(name)
    golden = None
    reference = None
    if against is None:
        path = opened.golden_path()
        if path is None:
            raise UsageError(f"{opened.path}: has no golden outputs; verify it with --against SOURCE")
        golden = read_golden(path, opened.spec)
    else:
        reference = _open_reference(against, opened.spec, description)
    reports = []
    others = _other_weights(opened, reference)
    for file in files:
        say(f"verifying {file.path}")
        report = _verify_file(opened, file, golden, reference, budget, min_psnr, picture)
        if others and (failures := report.certificate.failures):
            certificate = msgspec.structs.replace(report.certificate, failures=(others, *failures))
            report = msgspec.structs.replace(report, certificate=certificate)
        reports.append(report)
    close = getattr(reference, "close", None)
    if close is not None:
        close()
    return VerifyReport(tuple(reports))


def _other_weights(artifact: Artifact, reference: Any) -> str:
    """That the source holds other weights than the artifact was made from, in plain words; empty when it does not."""
    mine = artifact.manifest.provenance.weights_sha256
    theirs = getattr(reference, "weights_sha256", "")
    if not mine or not theirs or mine == theirs:
        return ""
    return (
        f"the source's weights are others than the artifact was made from (sha256 {theirs[:12]}…, not {mine[:12]}…): "
        "another checkpoint (--weights), or a factory that draws its weights and is not seeded"
    )


def _open_reference(against: Any, spec: GeneratorSpec, description: Mapping[str, Any]) -> Any:
    from ganexport.export.convert import open_reference

    reference = open_reference(against, uint8=_gives_bytes(spec), assumed=spec, **description)
    _check_same_interface(spec, reference.spec)
    return reference


def _gives_bytes(spec: GeneratorSpec) -> bool:
    return spec.image_output is not None and spec.image_output.dtype == "uint8"


def _check_same_interface(mine: GeneratorSpec, theirs: GeneratorSpec) -> None:
    for kind in ("inputs", "outputs"):
        have = [t.name for t in getattr(mine, kind)]
        other = [t.name for t in getattr(theirs, kind)]
        if have != other:
            raise UsageError(
                f"the artifact's {kind} are {', '.join(have)}, the source's {', '.join(other)}: another generator"
            )


def _verify_file(
    artifact: Artifact, file: ArtifactFile, golden: Any, reference: Any, budget: float,
    min_psnr: float | None, picture: Any,
) -> FileReport:  # fmt: skip
    path, kind = artifact.verified_path(file), file.format
    if kind in PACKAGES:
        path, kind = artifact.path / next(name for name in file.companions if name.endswith(".onnx")), "onnx"
    spec = artifact.spec
    try:
        engine = open_engine(path, spec, kind, file.precision, file.requires)
    except BackendUnavailableError as error:
        note = f"not run here: {why_not(error)}"
        return FileReport(file.path, file.format, file.precision, certifying.unmeasured(file.precision, [note]))
    drawn = ""
    with engine:
        if golden is not None:
            certificate, worst = compare_golden(engine, golden, spec, file.precision, min_psnr)
            if certificate.failures and worst is not None:
                drawn = _draw(artifact, file, picture, *worst)
        else:
            outcome = certifying.certify(
                engine, reference, spec, file.precision,
                reference_name=reference.name, runtime=engine.runtime, budget=budget, min_psnr=min_psnr,
            )  # fmt: skip
            certificate = outcome.certificate
            if certificate.failures:
                drawn = draw_worst(outcome, engine, reference, spec, _picture_path(artifact.path, file, picture))
    return FileReport(file.path, file.format, file.precision, certificate, drawn)


def compare_golden(
    engine: certifying.Engine, golden: Any, spec: GeneratorSpec, precision: str, min_psnr: float | None = None
) -> tuple[Certificate, tuple[TensorSpec, Array, Array] | None]:
    """Judge an engine by golden inputs and outputs.

    Returns:
        The certificate, and (image tensor, reference sample, candidate sample) of the worst image.
    """
    comparisons = {tensor.name: Comparison(tensor.name, tensor.range) for tensor in spec.outputs}
    failures: list[str] = []
    sizes: list[dict[str, int]] = []
    kept: list[tuple[dict[str, Array], dict[str, Array]]] = []
    deterministic: bool | None = None
    samples = 0
    for number, (feeds, truth) in enumerate(golden):
        here = spec.infer_sizes(feeds)
        if here not in sizes:
            sizes.append(here)
        samples += here.get(BATCH, 1)
        try:
            value = engine.run(feeds)
        except Exception as error:  # noqa: BLE001 - engines raise their own classes
            failures.append(f"at {certifying.told_sizes(here)} it does not run: {' '.join(str(error).split())[:300]}")
            kept.append((truth, {}))
            continue
        kept.append((truth, value))
        for name, comparison in comparisons.items():
            if wrong := certifying.mismatch(name, truth, value):
                failures += [wrong] if wrong not in failures else []
            else:
                comparison.add(truth[name], value[name], number)
        if deterministic is None:
            again = engine.run(feeds)
            deterministic = all(np.array_equal(value[n], again[n], equal_nan=True) for n in value)
            if not deterministic:
                failures.append("the same input twice gives two outputs: something in the file is random")
    results = []
    for name, comparison in comparisons.items():
        if comparison.samples or not failures:
            row = "uint8" if spec_dtype(spec, name) == "uint8" and precision == "fp32" else precision
            failures += comparison.judge(tolerance(row), min_psnr)
            results.append(comparison.result())
        else:
            failures += comparison.failures
    runtime = getattr(engine, "runtime", "unknown")
    note = f"{samples} golden samples"
    certificate = Certificate(
        "fail" if failures else "pass", "golden outputs", runtime, precision, tuple(results), tuple(sizes),
        (), deterministic, (note,), tuple(failures),
    )  # fmt: skip
    return certificate, _worst_image(spec, results, kept)


def spec_dtype(spec: GeneratorSpec, name: str) -> str:
    """dtype of the output of that name."""
    return next(tensor.dtype for tensor in spec.outputs if tensor.name == name)


def _worst_image(spec: GeneratorSpec, results: Any, kept: Any) -> tuple[TensorSpec, Array, Array] | None:
    image = spec.image_output
    result = next((r for r in results if image is not None and r.name == image.name), None)
    if image is None or result is None or result.worst[0] < 0:
        return None
    number, row = result.worst
    truth, value = kept[number]
    return image, truth[image.name][row], value[image.name][row]


def _picture_path(artifact: Path, file: ArtifactFile, picture: Any) -> Path:
    if picture is not None:
        return Path(picture)
    return artifact.parent / f"{artifact.name}-{file.format}-{file.precision}-worst.png"


def _draw(artifact: Artifact, file: ArtifactFile, picture: Any, tensor: TensorSpec, truth: Array, value: Array) -> str:
    path = _picture_path(artifact.path, file, picture)
    write_comparison(path, tensor, truth, value)
    return str(path)


def draw_worst(
    outcome: certifying.Outcome,
    engine: certifying.Engine,
    reference: certifying.Engine,
    spec: GeneratorSpec,
    path: Path,
) -> str:
    """Draw the worst sample of an outcome beside its reference.

    Returns:
        The PNG's path; empty when there is no image to draw.
    """
    image = spec.image_output
    if image is None or outcome.worst is None:
        return ""
    feeds = certifying.draw(spec, outcome.worst)
    try:
        truth, value = reference.run(feeds)[image.name], engine.run(feeds)[image.name]
    except Exception:  # noqa: BLE001 - it failed before as well; a picture is a courtesy
        return ""
    if truth.shape != value.shape or image.layout is None:
        return ""
    row = min(outcome.worst_row, len(truth) - 1)
    write_comparison(path, image, truth[row], value[row])
    return str(path)
