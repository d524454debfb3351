"""``--to auto``: build what this machine can run, prove it, measure it, publish the fastest.

Candidates are combinations of backend, precision, graph rewrite and threads. Those whose pictures are
too far from the fp32 source are rejected before any clock starts; the rest are measured in a process
each, in turn (:mod:`ganexport.measure`), on the wanted batches. No torch, unless formats that need it
at run time are allowed to compete.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

import ganexport
from ganexport.artifact import Artifact, ArtifactWriter, Provenance
from ganexport.build import certify as certifying
from ganexport.build.options import BuildOptions
from ganexport.errors import GanExportError, ParityError, UsageError, unknown_name
from ganexport.export.auto_candidates import Option, build_options, with_layouts, with_threads
from ganexport.export.convert import ConvertSettings, convert
from ganexport.export.formats import PRECISIONS, UNSAID
from ganexport.export.publish import Publication
from ganexport.measure.candidate import Candidate
from ganexport.measure.conductor import Conductor
from ganexport.measure.feeds import drawable, static_batch
from ganexport.measure.plan import Plan
from ganexport.measurement import Measurement
from ganexport.parity import Certificate
from ganexport.runtime import BACKENDS
from ganexport.runtime.base import Runner
from ganexport.spec import BATCH, GeneratorSpec, spec_from_json, spec_to_json

#: What may be optimised for: the smallest wanted batch, the largest, or all of them alike.
GOALS = ("latency", "throughput", "balanced")
#: dB that the worst picture must reach unless asked otherwise.
MIN_PSNR = 35.0
#: Samples on which a candidate is judged before it is measured; the winner gets a full certificate.
JUDGED = 32
#: Candidates that are measured again, longer and with other thread counts, after the first look.
FINALISTS = 4


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What :func:`auto` was asked for.

    Attributes:
        batches: Batch sizes to measure; the generator's smallest, optimal and largest when empty.
        goal: One of :data:`GOALS`.
        precision: "auto", or the only precision that may compete.
        min_psnr: dB that the worst picture must reach.
        allow_torch: Whether formats that need torch at run time compete.
        options: Of the builders; ``keep_fp32`` is chosen here.
        rounds: Turns of each finalist.
        turn_seconds: Seconds of a turn.
        budget: Seconds of certifying the winner.
    """

    batches: tuple[int, ...] = ()
    goal: str = "balanced"
    precision: str = "auto"
    min_psnr: float = MIN_PSNR
    allow_torch: bool = False
    options: BuildOptions = BuildOptions()
    rounds: int = 8
    turn_seconds: float = 0.25
    budget: float = 120.0

    def __post_init__(self) -> None:
        certifying.check_limits(self.budget, self.min_psnr)


def auto(
    source: Any,
    output: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    **described: Any,
) -> Artifact:
    """Find the fastest form of a generator on this machine and publish it.

    Args:
        source: Whatever :func:`ganexport.convert` takes; an artifact or .onnx file needs no torch.
        output: The artifact's folder. It holds the winner alone; ``manifest.report["auto"]`` holds
            the table of all candidates, raw samples included.
        settings: What to look for.
        progress: Told what happens, a line at a time.
        described: Further arguments of :func:`ganexport.convert` (inputs, dims, weights, …).

    Raises:
        UsageError: Unknown goal, or a batch that the generator does not take.
        ParityError: No candidate is within tolerance.
        As :func:`ganexport.convert`.
    """
    chosen = settings or Settings()
    if chosen.goal not in GOALS:
        raise UsageError(f"optimize for {chosen.goal!r}: choose {', '.join(GOALS)}")
    if isinstance(source, str | Path) and Path(source).exists() and Path(source).resolve() == Path(output).resolve():
        raise UsageError(f"{output}: --to auto would replace its own source with the winner alone: name another")
    say = progress or (lambda _text: None)
    with tempfile.TemporaryDirectory(prefix="ganexport-auto-") as name, ArtifactWriter(output) as writer:
        folder = Path(name)
        base = _base(source, folder / "base", chosen, described, say)
        if before := writer.replaces(base.manifest.provenance.source):
            say(f"{writer.destination} holds {before}, and will be replaced")
        search = Search(base, folder, chosen, say)
        return search.publish(writer)


def convert_auto(
    source: Any,
    wanted: Sequence[str],
    output: str | os.PathLike[str],
    words: Mapping[str, Any],
    *,
    precision: str,
    options: BuildOptions,
    budget: float,
    min_psnr: float | None,
    allow_mismatch: bool,
    goal: str,
    batches: Sequence[int],
    allow_torch: bool,
    progress: Callable[[str], None] | None,
) -> Artifact:
    """:func:`auto` in the words of :func:`ganexport.convert`; what was not said is left to the source.

    Raises:
        UsageError: Another format beside "auto", an unknown precision, or options that it cannot honour.
    """
    if tuple(wanted) != ("auto",):
        raise UsageError("--to auto chooses the format itself: name it alone")
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if allow_mismatch or options.keep_fp32:
        raise UsageError("--to auto publishes nothing outside --min-psnr and chooses layers itself: leave "
                         "--allow-mismatch and --keep-fp32 out")  # fmt: skip
    settings = Settings(
        batches=tuple(batches), goal=goal, precision=precision,
        min_psnr=MIN_PSNR if min_psnr is None else min_psnr, allow_torch=allow_torch,
        options=options, budget=budget,
    )  # fmt: skip
    described = {key: value for key, value in words.items() if value not in UNSAID}
    return auto(source, output, settings, progress=progress, **described)


def _base(
    source: Any, output: Path, settings: Settings, described: dict[str, Any], say: Callable[[str], None]
) -> Artifact:
    """An artifact with the fp32 ONNX file that everything is made from."""
    plain = not described and settings.options.opset is None
    if plain and isinstance(source, str | Path) and Path(source).is_dir():
        with contextlib.suppress(GanExportError):
            found = Artifact(source)
            found.find("onnx", "fp32")
            return found
    if isinstance(source, str | Path) and Path(source).suffix.lower() == ".onnx" and Path(source).is_file():
        from ganexport.build.rehearse import rehearse

        rehearse(Path(source), ("openvino", "trt"))  # whose parsers read what is made from it
    formats = ("onnx", "torchscript") if settings.allow_torch else ("onnx",)
    return convert(
        source, to=formats, output=output, options=BuildOptions(opset=settings.options.opset),
        verify_budget=settings.budget, progress=say, **described,
    )  # fmt: skip


class Row(msgspec.Struct):
    """One line of the table of candidates.

    Attributes:
        name: Of the candidate.
        backend: That ran it.
        precision: Of it.
        settings: Of the backend.
        passes: Rewrites and precision steps.
        psnr: dB of the worst judged sample; None when identical or not run.
        milliseconds: Median of a run by batch size.
        verdict: "winner", "slower", "rejected" or "unavailable".
        reason: Why it was rejected or could not be run.
    """

    name: str
    backend: str
    precision: str
    settings: dict[str, Any] = {}
    passes: tuple[str, ...] = ()
    psnr: float | None = None
    milliseconds: dict[str, float] = {}
    verdict: str = "slower"
    reason: str = ""


class Search:
    """The candidates of one generator on this machine.

    Args:
        base: Holds the fp32 ONNX file.
        folder: Where candidates are built.
        settings: What to look for.
        say: Progress.
    """

    def __init__(self, base: Artifact, folder: Path, settings: Settings, say: Callable[[str], None]) -> None:
        self.base, self.folder, self.settings, self.say = base, folder, settings, say
        self.spec = base.spec
        self.file = base.find("onnx", "fp32")
        self.path = base.verified_path(self.file)
        self.batches = _batches(self.spec, settings)
        self.rows: dict[str, Row] = {}
        self.measurements: list[Measurement] = []
        self.options: dict[str, Option] = {}

    def publish(self, writer: ArtifactWriter) -> Artifact:
        """Build, judge, measure; write the winner and the table."""
        with self._open(Option("reference", "onnxruntime", "onnx", "fp32", str(self.path))) as reference:
            self._build()
            self._judge(reference)
            passed = [name for name, row in self.rows.items() if row.verdict == "slower"]
            if not passed:
                raise ParityError(f"no candidate is within tolerance on this machine: {self._reasons()}")
            for name in self._measured(passed):
                certificate = self._certify(name, reference)
                if certificate.passed:
                    return self._write(writer, name, certificate, reference)
                self.rows[name].verdict, self.rows[name].reason = "rejected", "; ".join(certificate.failures)
        raise ParityError(f"no candidate could be measured and passed its full certificate: {self._reasons()}")

    def _reasons(self) -> str:
        return "; ".join(f"{row.name}: {row.reason or 'not measured'}" for row in self.rows.values())

    # ---- candidates ---------------------------------------------------------------------------

    def _build(self) -> None:
        batch = self.batches[len(self.batches) // 2]
        for option in build_options(self.path, self.spec, self.folder, batch, self.settings, self.say):
            self._add(option)
        for file in self.base.manifest.files if self.settings.allow_torch else ():
            if file.format == "torchscript":
                path, kind = str(self.base.verified_path(file)), file.format
                self._add(Option(f"{kind} fp32", kind, kind, "fp32", path, requires=file.requires))

    def _add(self, option: Option) -> None:
        self.options[option.name] = option
        verdict = "unavailable" if option.unavailable else "slower"
        self.rows[option.name] = Row(
            option.name, option.backend, option.precision, dict(option.settings), option.passes,
            verdict=verdict, reason=option.unavailable,
        )  # fmt: skip

    def _open(self, option: Option) -> Runner:
        return open_option(option.path, option.backend, option.device, option.settings, spec_to_json(self.spec))

    # ---- parity -------------------------------------------------------------------------------

    def _judge(self, reference: Runner) -> None:
        """Reject what is outside tolerance, on a few samples."""
        for name, row in self.rows.items():
            if row.verdict != "slower":
                continue
            self.say(f"checking {name}")
            certificate = self._certify(name, reference, optimum=JUDGED, budget=20.0)
            found = [output.worst_psnr for output in certificate.outputs if output.worst_psnr is not None]
            row.psnr = round(min(found), 2) if found else None
            if not certificate.passed:
                row.verdict, row.reason = "rejected", "; ".join(certificate.failures)[:300]

    def _certify(
        self, name: str, reference: Runner, *, optimum: int = certifying.OPTIMUM, budget: float | None = None
    ) -> Certificate:
        option = self.options[name]
        floor = None if option.precision == "fp32" else self.settings.min_psnr
        try:
            with self._open(option) as engine:
                outcome = certifying.certify(
                    engine, reference, drawable(self.spec), option.precision,
                    reference_name=f"{self.file.path} fp32 on {reference.runtime}", runtime=engine.runtime,
                    budget=self.settings.budget if budget is None else budget, min_psnr=floor, optimum=optimum,
                )  # fmt: skip
        except GanExportError as error:
            return Certificate("fail", "none", option.backend, option.precision, failures=(str(error),))
        return outcome.certificate

    # ---- time ---------------------------------------------------------------------------------

    def _measured(self, names: Sequence[str]) -> list[str]:
        """Names within tolerance, fastest first: a first look at all, then the finalists in earnest."""
        first = Plan(rounds=3, turn_seconds=0.12, max_iterations=60, max_warm_seconds=2.0, reference="")
        order = self._take(names, first, "first look")
        finalists = list(order[:FINALISTS])
        for name in order[: FINALISTS // 2]:
            for variant in (*with_threads(self.options[name]), *with_layouts(self.options[name])):
                self._add(variant)
                self.rows[variant.name].psnr = self.rows[name].psnr
                finalists.append(variant.name)
        plan = Plan(
            rounds=self.settings.rounds, turn_seconds=self.settings.turn_seconds, max_iterations=200,
            max_warm_seconds=4.0, reference="",
        )  # fmt: skip
        return [*self._take(finalists, plan, "finalists"), *order[FINALISTS:]]

    def _take(self, names: Sequence[str], plan: Plan, what: str) -> list[str]:
        candidates = [self._candidate(self.options[name]) for name in names]
        self.say(f"measuring {len(candidates)} candidates ({what})")
        with Conductor(candidates, plan, lambda text, _done, _total: self.say(text)) as conductor:
            conductor.open()
            conductor.measure([("offline", {BATCH: size} if self._has_batch else {}) for size in self.batches])
            rows = list(conductor.rows)
        if conductor.stop is not None:
            raise conductor.stop
        self.measurements = [m for m in self.measurements if m.candidate["name"] not in names] + rows
        for name in names:
            self.rows[name].milliseconds = {}
        for row in rows:
            self._note(row)
        return sorted((n for n in names if math.isfinite(self.score(n))), key=self.score)

    @property
    def _has_batch(self) -> bool:
        """Whether the generator counts samples at all."""
        return static_batch(self.spec) is not None

    def _candidate(self, option: Option) -> Candidate:
        arguments = {
            "path": option.path,
            "backend": option.backend,
            "device": option.device,
            "settings": dict(option.settings),
            "spec": spec_to_json(self.spec),
        }
        about = {"backend": option.backend, "precision": option.precision, "settings": dict(option.settings)}
        if option.device:
            about["device"] = option.device
        return Candidate(option.name, "ganexport.export.auto:open_option", arguments, about)

    def _note(self, row: Measurement) -> None:
        entry = self.rows[row.candidate["name"]]
        if row.unavailable:
            entry.verdict, entry.reason = "unavailable", row.unavailable
            return
        size = str(row.conditions["sizes"].get(BATCH, 1))
        samples = sorted(next(s for s in row.series if s.name == "end_to_end").samples)
        entry.milliseconds[size] = round(samples[len(samples) // 2] / 1e6, 4)

    def score(self, name: str) -> float:
        """Logarithm of the time, averaged over the batches that the goal looks at; infinite when one is missing."""
        times = self.rows[name].milliseconds
        wanted = {"latency": self.batches[:1], "throughput": self.batches[-1:]}.get(self.settings.goal, self.batches)
        if any(str(size) not in times for size in wanted):
            return math.inf
        return sum(math.log(times[str(size)] / size) for size in wanted) / len(wanted)

    # ---- the winner ---------------------------------------------------------------------------

    def _write(self, writer: ArtifactWriter, name: str, certificate: Certificate, reference: Runner) -> Artifact:
        option, row = self.options[name], self.rows[name]
        row.verdict = "winner"
        source = Path(option.path)
        for file in (source, *(source.parent / companion for companion in option.companions)):
            shutil.copyfile(file, writer.folder / file.name)
        settings = ConvertSettings(budget=self.settings.budget, min_psnr=self.settings.min_psnr)
        measured_with = {"backend": option.backend} | ({"device": option.device} if option.device else {})
        publication = Publication(writer, self.spec, reference, "", settings, self.file.passes, self.say)
        files = writer.describe(
            source.name, option.format, option.precision, requires=dict(option.requires),
            companions=option.companions, settings={**option.settings, **measured_with},
            passes=(*self.file.passes, *option.passes), certificate=certificate,
        )  # fmt: skip
        publication.files.append(files)
        provenance: Provenance = msgspec.structs.replace(
            self.base.manifest.provenance,
            versions=self.base.manifest.provenance.versions | {"ganexport": ganexport.__version__},
        )
        return publication.publish(provenance, report={"auto": self.report(name)})

    def report(self, winner: str) -> dict[str, Any]:
        """The table of all candidates, with raw samples and the machine they were taken on."""
        from ganexport.environment import describe

        order = sorted(self.rows.values(), key=lambda row: (row.verdict == "unavailable", self.score(row.name)))
        return {
            "winner": winner,
            "goal": self.settings.goal,
            "batches": list(self.batches),
            "min_psnr": self.settings.min_psnr,
            "fastest_by_batch": {str(size): self._fastest(str(size)) for size in self.batches},
            "candidates": msgspec.to_builtins(order),
            "environment": describe(),
            "measurements": msgspec.to_builtins(self.measurements),
        }

    def _fastest(self, size: str) -> str:
        rows = [row for row in self.rows.values() if size in row.milliseconds and row.verdict != "rejected"]
        timed = {row.name: row.milliseconds[size] for row in rows}
        return min(timed, key=lambda name: timed[name])


def _batches(spec: GeneratorSpec, settings: Settings) -> tuple[int, ...]:
    dim = static_batch(spec)
    if dim is None:
        if any(size != 1 for size in settings.batches):
            raise UsageError("this generator has no batch dimension: leave the batches out")
        return (1,)
    if not settings.batches:
        return tuple(sorted({dim.min, dim.opt, dim.max}))
    for size in settings.batches:
        dim.check(size)
    return tuple(sorted(set(settings.batches)))


def open_option(path: str, backend: str, device: str, settings: Mapping[str, Any], spec: str) -> Runner:
    """A candidate's runner, in its worker process too."""
    opener: type[Runner] = BACKENDS.load(backend).RUNNER
    return opener.open(Path(path), spec_from_json(spec), device=device or None, settings=dict(settings))
