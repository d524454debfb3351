"""Measure a generator on everything that can run it: what ``ganexport bench`` calls."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ganexport.artifact import MANIFEST, Artifact
from ganexport.bench import roofline
from ganexport.bench.candidates import find_candidates, onnx_file_of, onnx_spec, parse_cores
from ganexport.environment import describe, usable_cores
from ganexport.errors import STOPS, GanExportError, UsageError, stop_name, unknown_name
from ganexport.measure.candidate import Candidate
from ganexport.measure.conductor import Conductor
from ganexport.measure.feeds import static_batch
from ganexport.measure.peaks import THREAD_VARIABLES
from ganexport.measure.plan import Plan, Progress, ServerPlan, silent
from ganexport.measure.process import CandidateFailedError, WorkerProcess
from ganexport.measurement import SCHEMA_VERSION, Measurement, Report
from ganexport.spec import BATCH, Dim, GeneratorSpec, TensorSpec, spec_from_json

#: MLPerf Inference's scenarios, and the cold start that it leaves out.
SCENARIOS = ("single-stream", "multi-stream", "offline", "server", "cold-start")
#: Samples in one multi-stream query (MLCommons inference rules).
MULTI_STREAM = 8


def benchmark(
    *sources: str | Path,
    backends: Sequence[str] = (),
    devices: Sequence[str] = (),
    batches: Sequence[int] = (),
    sizes: dict[str, int] | None = None,
    scenarios: Sequence[str] = ("single-stream", "offline"),
    threads: Sequence[int] = (),
    precisions: Sequence[str] = (),
    cores: Sequence[tuple[int, ...]] = (),
    seconds: float = 2.0,
    rounds: int = 8,
    within: float = 0.0,
    at_most: float = 60.0,
    warm_up: float = 10.0,
    server: ServerPlan | None = None,
    cold_starts: int = 5,
    inputs: Sequence[TensorSpec] = (),
    dims: Sequence[Dim] = (),
    baseline: str | None = None,
    peaks: bool = True,
    title: str = "",
    command: str = "",
    progress: Progress = silent,
    keep: Callable[[Candidate], bool] | None = None,
    on_row: Callable[[Measurement], None] | None = None,
) -> Report:
    """Measure sources on every backend that can run them, a process each, in turn.

    Args:
        sources: Artifacts, runs, models, ``package.module:factory`` or lone files
            (:data:`~ganexport.bench.candidates.LONE`) of ONE generator. Outputs are compared with the
            golden ones of the first artifact that has them, else with those of the first candidate that runs.
        backends: Only these; see :func:`~ganexport.bench.candidates.backend_names`.
        devices: "cpu", "cuda", and no other; by default the CPU, and the first GPU where there is one.
        batches: Of the offline scenario; by default the generator's smallest, optimal and largest.
        sizes: Of dimensions other than the batch; their optimum by default.
        scenarios: Of :data:`SCENARIOS`.
        threads: Thread counts to sweep on the CPU.
        precisions: Of torch candidates, and of a lone file that does not say its own.
        cores: Sets of CPU cores that candidates are pinned to, each measured; none pins nothing.
        seconds: Sampling time of each candidate in each cell, spread over the rounds.
        rounds: Turns of each candidate.
        within: Add turns until every ratio to the baseline is known within this share; 0 adds none.
        at_most: Seconds after which no turn is added in a cell.
        warm_up: Longest warm-up in seconds.
        server: Limits of the server scenario.
        cold_starts: Fresh processes a candidate in the cold-start scenario.
        inputs: What to feed to a lone file that does not say it itself.
        dims: Ranges of such a file's free dimensions.
        baseline: Name of the candidate that others are held against; by default the first.
        peaks: Measure the machine's peaks for the roofline.
        title: Of the report.
        command: What to type to repeat it.
        progress: Called before every step.
        keep: Leaves out the candidates that it says no to.
        on_row: Given every row as soon as it is complete (its share of the peak comes later).

    Returns:
        Every row, also those that could not be run, with their reasons. After Ctrl-C (or
        :class:`~ganexport.errors.Terminated`, which the command line makes of SIGTERM) it holds what
        was measured until then, and a note that begins with "interrupted".

    Raises:
        UsageError: Unknown scenario, backend, source or baseline, a number out of range, or nothing to measure.
        ArtifactError: A damaged artifact.
    """
    if not scenarios:
        raise UsageError(f"name at least one scenario: {', '.join(SCENARIOS)}")
    for name in scenarios:
        if name not in SCENARIOS:
            raise unknown_name("scenario", name, SCENARIOS)
    positive = {"seconds": seconds, "rounds": rounds, "warm-up": warm_up, "cold starts": cold_starts}
    _require_in_range(positive, at_most, server or ServerPlan())
    if any(batch < 1 for batch in batches):
        raise UsageError(f"batch sizes must be positive, got {', '.join(map(str, batches))}")
    names = [str(source) for source in sources]
    candidates = find_candidates(
        names,
        backends=backends,
        devices=devices,
        threads=threads,
        precisions=precisions,
        cores=cores,
        inputs=inputs,
        dims=dims,
    )
    if keep is not None:
        candidates = [candidate for candidate in candidates if keep(candidate)]
    if not candidates:
        where = f" on {' or '.join(devices)}" if devices else ""
        raise UsageError(f"nothing can run {', '.join(names) or 'no source'}{where}; see: ganexport doctor")
    if baseline is not None and baseline not in [candidate.name for candidate in candidates]:
        raise unknown_name("baseline", baseline, [candidate.name for candidate in candidates])
    reference = _golden_of(names)
    plan = Plan(
        rounds=rounds,
        within=within,
        at_most_seconds=at_most,
        turn_seconds=seconds / rounds,
        max_warm_seconds=warm_up,
        reference=reference,
        baseline=baseline,
    )
    environment, spec = describe(), None
    with Conductor(candidates, plan, progress, on_row) as conductor:
        conductor.open()
        spec = _spec_of(conductor)
        others = _other_sizes(sizes or {}, spec)
        if "cold-start" in scenarios:
            smallest = static_batch(spec) if spec is not None else None
            conductor.cold_start(cold_starts, {BATCH: smallest.min if smallest is not None else 1} | others)
        conductor.measure(_cells(scenarios, batches, others, spec))
        if "server" in scenarios:
            conductor.serve(server or ServerPlan(), others)
    rows = tuple(conductor.rows)
    if peaks and not conductor.interrupted:
        try:
            rows = _with_roofline(rows, names, spec, environment, progress)
        except STOPS as stop:
            conductor.notes.append(
                f"interrupted by {stop_name(stop)} while measuring the machine's peaks: no share of the peak is known"
            )
    notes = (*conductor.notes, *_notes(rows))
    heading = title or f"{(spec.name if spec else Path(names[0]).name)} on {_machine(environment)}"
    return Report(SCHEMA_VERSION, heading, environment, rows, notes, command)


def _require_in_range(positive: dict[str, float], at_most: float, server: ServerPlan) -> None:
    limits = {"slo-ms": server.slo_ms, "max-batch": server.max_batch, "trial-seconds": server.trial_seconds}
    for name, value in (positive | limits).items():
        if not 0 < value < math.inf:
            raise UsageError(f"{name} must be positive, got {value:g}")
    for name, value in {"at-most": at_most, "max-delay-ms": server.max_delay_ms}.items():
        if not 0 <= value < math.inf:
            raise UsageError(f"{name} must not be negative, got {value:g}")


def _golden_of(sources: Sequence[str]) -> str | None:
    """Golden inputs and fp32 outputs of the first artifact that has them."""
    for source in sources:
        if (Path(source) / MANIFEST).is_file():
            path = Artifact(source).golden_path()
            if path is not None:
                return str(path)
    return None


def _spec_of(conductor: Conductor) -> GeneratorSpec | None:
    return next((spec_from_json(text) for text in conductor.specs.values()), None)


def _other_sizes(sizes: dict[str, int], spec: GeneratorSpec | None) -> dict[str, int]:
    """The sizes that were asked for, of dimensions that the generator has (where it could be opened).

    Raises:
        UsageError: It has no such dimension, or it is the batch.
    """
    known = [dim.name for dim in spec.dims if dim.name != BATCH] if spec is not None else list(sizes)
    for name in sizes:
        if name == BATCH:
            raise UsageError(f"--size {BATCH}: use --batch")
        if name not in known:
            raise UsageError(f"--size {name}: the generator has no such dimension; it has {', '.join(known) or 'none'}")
    return dict(sizes)


def _machine(environment: dict[str, Any]) -> str:
    if environment["gpus"]:
        return str(environment["gpus"][0]["name"])
    cpu = environment["cpu"]
    return f"{cpu['model'] or 'CPU'}, {cpu['affinity'] or cpu['logical']} cores"


def _cells(
    scenarios: Sequence[str], batches: Sequence[int], sizes: dict[str, int], spec: GeneratorSpec | None
) -> list[tuple[str, dict[str, int]]]:
    """(scenario, sizes) in the order of measuring; a batch that two scenarios want is measured once."""
    batch = static_batch(spec) if spec is not None else None
    wanted: dict[int, str] = {}
    if "single-stream" in scenarios:
        wanted[1 if batch is None else batch.min] = "single-stream"
    if "multi-stream" in scenarios:
        wanted.setdefault(MULTI_STREAM, "multi-stream")
    if "offline" in scenarios:
        default = (batch.min, batch.opt, batch.max) if batch is not None else (1,)
        for size in batches or default:
            wanted.setdefault(size, "offline")
    has_batch = batch is not None or spec is None
    return [(name, ({BATCH: size} if has_batch else {}) | sizes) for size, name in sorted(wanted.items())]


def _with_roofline(
    rows: tuple[Measurement, ...],
    sources: Sequence[str],
    spec: GeneratorSpec | None,
    environment: dict[str, Any],
    progress: Progress,
) -> tuple[Measurement, ...]:
    """Rows with their share of this machine's peak; unchanged where nothing can be counted."""
    path = onnx_file_of(sources)
    if path is None or not any(row.series for row in rows):
        return rows
    costs: dict[str, roofline.Cost] = {}
    for row in rows:
        key = roofline.cell_key(row.conditions.get("sizes", {}))
        if row.series and key not in costs:
            with contextlib.suppress(GanExportError):
                costs[key] = roofline.count(path, onnx_spec(path) if spec is None else spec, row.conditions["sizes"])
    peaks: dict[str, Any] = {}
    wanted: dict[str, set[str]] = {}
    limits: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.series:
            key = roofline.peak_key(row.candidate)
            limits.setdefault(key, row.candidate)
            wanted.setdefault(key, set()).add(str(row.candidate.get("precision", "fp32")))
    for key, precisions in wanted.items():
        progress(f"peak of {key}", 0, 1)
        found = _measure_peaks(
            str(limits[key].get("device", "cpu")),
            sorted(precisions - {"int8"}),
            threads=limits[key].get("threads"),
            cores=parse_cores(limits[key].get("cores", "")) if limits[key].get("cores") else (),
        )
        if found is not None:
            peaks[key] = found
    environment["peaks"] = peaks
    return tuple(roofline.annotate(rows, costs, peaks))


def _measure_peaks(
    device: str, precisions: list[str], *, threads: int | None = None, cores: tuple[int, ...] = ()
) -> dict[str, Any] | None:
    threads = threads or len(cores) or usable_cores()
    variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
    with WorkerProcess(Candidate("peaks", "", variables=variables, cores=cores)) as worker:
        try:
            arguments = {"device": device, "precisions": precisions, "threads": threads}
            answer = worker.ask("call", 120, function="ganexport.measure.peaks:measure", arguments=arguments)
        except CandidateFailedError:
            return None
    value = answer["value"]
    assert isinstance(value, dict)
    return value


def _notes(rows: Sequence[Measurement]) -> list[str]:
    """What a reader must know before believing the table."""
    from ganexport.bench.digest import digest

    lines = digest(rows)
    notes = []
    loud = [line for line in lines if line.noise is not None and not line.noise.quiet and line.scenario != "server"]
    if loud:
        worst = max(max(line.noise.within, line.noise.between) for line in loud if line.noise)
        notes.append(
            f"noisy: {len(loud)} of {len(lines)} rows have a CV of 10% or more (worst {worst:.0%}): "
            "compare candidates by their ratios, not by absolute figures"
        )
    wrong = sorted({line.name for line in lines if line.parity_failed})
    if wrong:
        notes.append(f"outside the tolerance, so its speed means nothing: {', '.join(wrong)}")
    return notes
