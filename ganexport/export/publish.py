"""Certify each file as it is made, refuse what is outside tolerance, and publish the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ganexport.artifact import SCHEMA_VERSION, Artifact, ArtifactFile, ArtifactWriter, Manifest, Provenance
from ganexport.build import certify as certifying
from ganexport.build.golden import write_golden
from ganexport.build.options import Built
from ganexport.errors import BackendUnavailableError, ParityError
from ganexport.export.convert import ConvertSettings
from ganexport.export.engines import open_engine, why_not
from ganexport.export.verify import draw_worst
from ganexport.parity import Certificate
from ganexport.spec import GeneratorSpec


class Publication:
    """An artifact under construction.

    Args:
        writer: Where files are written.
        spec: Of the generator.
        reference: The truth.
        reference_name: As written into certificates.
        settings: Budget, tolerance, what to do with a mismatch.
        passes: What was done to the source before any format.
        say: Progress.
    """

    def __init__(
        self, writer: ArtifactWriter, spec: GeneratorSpec, reference: certifying.Engine, reference_name: str,
        settings: ConvertSettings, passes: Sequence[str], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.writer = writer
        self.spec = spec
        self.reference = reference
        self.reference_name = reference_name
        self.settings = settings
        self.passes = tuple(passes)
        self.say = say
        self.files: list[ArtifactFile] = []

    @property
    def folder(self) -> Path:
        """Where files are written."""
        return self.writer.folder

    def certify(
        self, path: Path, format: str, precision: str, seen: Sequence[Mapping[str, int]],  # noqa: A002
        requires: Mapping[str, str], notes: Sequence[str] = (), fallback: str = "",
    ) -> tuple[Certificate, str]:  # fmt: skip
        """Certify one file; a file that this machine cannot run gets a partial certificate.

        Args:
            path: The file.
            format: Of it.
            precision: Of it.
            seen: Sizes that its maker was shown.
            requires: What it needs to run.
            notes: What its builder said.
            fallback: What else vouches for it where it cannot run.

        Returns:
            (certificate, path of the picture of the worst sample).
        """
        self.say(f"verifying {path.name}")
        try:
            engine = open_engine(path, self.spec, format, precision, requires)
        except BackendUnavailableError as error:
            reasons = [*notes, f"not run here: {why_not(error)}", *([fallback] if fallback else [])]
            return certifying.unmeasured(precision, reasons), ""
        with engine:
            outcome = certifying.certify(
                engine, self.reference, self.spec, precision,
                reference_name=self.reference_name, runtime=engine.runtime, seen=seen,
                budget=self.settings.budget, min_psnr=self.settings.min_psnr,
            )  # fmt: skip
            picture = ""
            if outcome.certificate.failures:
                target = self.writer.destination
                path_out = target.absolute().parent / f"{target.name}-{format}-{precision}-worst.png"
                picture = draw_worst(outcome, engine, self.reference, self.spec, path_out)
        return outcome.certificate, picture

    def add(
        self,
        built: Built,
        format: str,  # noqa: A002
        precision: str,
        certificate: Certificate,
        picture: str = "",
        hint: str = "",
    ) -> None:
        """Take a certified file into the artifact.

        Args:
            built: The file.
            format: Of it.
            precision: Of it.
            certificate: Of it.
            picture: Of its worst sample.
            hint: What the user can do about a failure.

        Raises:
            ParityError: It is outside tolerance and that was not allowed.
        """
        if certificate.failures and not self.settings.allow_mismatch:
            shown = f"; the worst sample is drawn in {picture}" if picture else ""
            raise ParityError(
                f"{built.path} is outside tolerance, nothing was published: {'; '.join(certificate.failures[:3])}"
                f"{f'; {hint}' if hint else ''}{shown} (--allow-mismatch publishes it all the same)"
            )
        self.files.append(
            self.writer.describe(
                built.path,
                format,
                precision,
                requires=built.requires,
                companions=built.companions,
                passes=(*self.passes, *built.passes),
                certificate=certificate,
            )
        )

    def publish(
        self, provenance: Provenance, *, golden: bool = True, kept: Sequence[ArtifactFile] = (), report: Any = None
    ) -> Artifact:
        """Write golden outputs and the manifest, and make the artifact visible."""
        if golden:
            self.say("writing golden outputs")
            write_golden(self.folder, self.spec, self.reference)
        replaced = {(f.format, f.precision) for f in self.files}
        files = [f for f in kept if (f.format, f.precision) not in replaced] + self.files
        manifest = Manifest(SCHEMA_VERSION, self.spec, tuple(files), provenance, report=report or {})
        return self.writer.publish(manifest)


def vouched(certificate: Certificate, name: str) -> str:
    """What an ONNX file's certificate says for the engine that was built from it, and could not run."""
    if not certificate.outputs:
        return ""
    worst = min((o.worst_psnr for o in certificate.outputs if o.worst_psnr is not None), default=None)
    figure = "identical" if worst is None else f"{worst:.1f} dB at worst"
    samples = min(o.samples for o in certificate.outputs)
    verdict = "passed" if certificate.passed else "failed"
    return f"its source {name} {verdict} on {certificate.runtime}: {figure} over {samples} samples"
