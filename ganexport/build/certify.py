"""The parity certificate: which inputs are run, and what they say.

A candidate is anything with ``run(feeds) -> outputs``; so is the reference. No torch, no engine.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganexport.errors import GanExportError, UsageError
from ganexport.frechet import Drift
from ganexport.parity import Certificate, Comparison, tolerance
from ganexport.seeding import Sampling, batched
from ganexport.spec import BATCH, GeneratorSpec

Array = NDArray[Any]
#: Inputs at the optimum, and at each corner of the Dims.
OPTIMUM, CORNER = 256, 2
#: Seed of the certificate's inputs; calibration uses another, so that int8 is judged on inputs it never saw.
SEED = 0x5EED
#: Number of the sample that is put among others; no other call of a certificate draws it.
MIXED = 1 << 40
#: More corners than this are sampled evenly (four dimensions have 16).
MAX_CORNERS = 16


def check_limits(budget: float, min_psnr: float | None) -> None:
    """Refuse limits by which nothing could be judged.

    Raises:
        UsageError: A budget that is not positive, a PSNR that is negative or not finite.
    """
    if not budget > 0:
        raise UsageError(f"--verify-budget {budget:g}: needs a positive number of seconds")
    if min_psnr is not None and not 0 <= min_psnr < math.inf:
        raise UsageError(f"--min-psnr {min_psnr:g}: needs a finite number of dB, 0 or more")


class Engine(Protocol):
    """What can be compared."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        ...


class InputSet(msgspec.Struct, frozen=True):
    """One call: sizes of all dimensions, and which samples of the seed.

    Attributes:
        sizes: Size of each dimension.
        start: Number of the first sample.
        count: Samples in the call.
        role: "optimum", "corner" or "unseen".
    """

    sizes: dict[str, int]
    start: int
    count: int
    role: str


class Outcome(msgspec.Struct, frozen=True):
    """A certificate, and where to look when it failed."""

    certificate: Certificate
    worst: InputSet | None = None
    worst_output: str = ""
    worst_row: int = 0


def plan(spec: GeneratorSpec, seen: Sequence[Mapping[str, int]] = (), optimum: int = OPTIMUM) -> list[InputSet]:
    """The calls of a full certificate, in order of what they tell.

    First one call at the optimum, then sizes between, then the corners (small to large), then the
    rest of the optimum: a budget that ends early has still seen every dimension move.

    Args:
        spec: The generator's spec.
        seen: Sizes that the exporter was shown; they are left out of the sizes between.
        optimum: How many samples at the optimum.
    """
    spec = batched(spec)
    best = spec.sizes()
    small = {dim.name: dim.min for dim in spec.dims}
    per_call = best.get(BATCH, 1)
    counter = itertools.count()

    def calls(sizes: dict[str, int], samples: int, role: str) -> list[InputSet]:
        count = sizes.get(BATCH, 1)
        return [InputSet(sizes, next(counter) * 4096, count, role) for _ in range(math.ceil(samples / count))]

    between = []
    for dim in spec.dims:
        shown = tuple(s[dim.name] for s in seen if dim.name in s)
        others = small
        if dim.name != BATCH and spec.batch is not None:  # a second sample shows whether rows are mixed up
            others = small | {BATCH: min(spec.batch.min + spec.batch.step, spec.batch.max)}
        sizes_between = [size for size in dim.sizes(shown) if size not in (dim.min, dim.max, dim.opt)]
        between += [others | {dim.name: size} for size in sizes_between]
    free = [dim for dim in spec.dims if not dim.static]
    corners = [
        small | dict(zip((d.name for d in free), ends, strict=True))
        for ends in itertools.product(*((d.min, d.max) for d in free))
    ]
    corners = corners[:: math.ceil(len(corners) / MAX_CORNERS)]
    corners.sort(key=lambda sizes: math.prod(sizes.values()))
    sets = calls(best, 1, "optimum")
    for sizes in between:
        sets += calls(sizes, 1, "unseen")
    for sizes in corners if free else []:
        sets += calls(sizes, CORNER, "corner")
    return sets + calls(best, optimum - per_call, "optimum")


def draw(spec: GeneratorSpec, chosen: InputSet, seed: int = SEED) -> dict[str, Array]:
    """The inputs of one call."""
    others = {name: size for name, size in chosen.sizes.items() if name != BATCH}
    return Sampling(spec, others).draw(seed, chosen.start, chosen.count)


def certify(
    candidate: Engine,
    reference: Engine,
    spec: GeneratorSpec,
    precision: str,
    *,
    reference_name: str,
    runtime: str,
    seen: Sequence[Mapping[str, int]] = (),
    budget: float = 120.0,
    min_psnr: float | None = None,
    optimum: int = OPTIMUM,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run the plan and judge.

    Args:
        candidate: To be judged.
        reference: The truth.
        spec: Of both.
        precision: Row of the tolerance table.
        reference_name: As written into the certificate.
        runtime: As written into the certificate.
        seen: Sizes that the exporter was shown.
        budget: Seconds after which no further call starts; the first always runs.
        min_psnr: Overrides the row's.
        optimum: Samples at the optimum.
        clock: Seconds, monotonic.
    """
    run = _Run(candidate, reference, spec)
    sets = plan(spec, seen, optimum)
    begin, skipped, rate = clock(), [], 0.0
    for number, chosen in enumerate(sets):
        before = clock()
        elements = math.prod(chosen.sizes.values())
        if number and (before - begin >= budget or before - begin + rate * elements > budget):
            skipped.append(chosen)
            continue
        run.call(number, chosen)
        rate = max(rate, (clock() - before) / elements) if number else (clock() - before) / elements
        if run.broken:
            break
    if not run.broken:
        run.mix(precision, min_psnr)
    return run.outcome(sets, skipped, precision, reference_name, runtime, seen, min_psnr, budget)


class _Run:
    """Comparisons under way."""

    def __init__(self, candidate: Engine, reference: Engine, spec: GeneratorSpec) -> None:
        self.candidate, self.reference, self.spec = candidate, reference, spec
        self.comparisons = {tensor.name: Comparison(tensor.name, tensor.range) for tensor in spec.outputs}
        self.drift = Drift(spec.image_output)
        self.failures: list[str] = []
        self.done: list[InputSet] = []
        self.deterministic: bool | None = None
        self.independent: bool | None = None
        self.broken = False

    def call(self, number: int, chosen: InputSet) -> None:
        feeds = draw(self.spec, chosen)
        truth = self.reference.run(feeds)
        self.done.append(chosen)
        value = self._outputs(feeds, chosen.sizes)
        if value is None:
            return
        for name, comparison in self.comparisons.items():
            self._compare(comparison, truth, value, name, number, chosen)
        if chosen.role == "optimum":
            self.drift.add(truth, value)
        if self.deterministic is None:
            again = self.candidate.run(feeds)
            self.deterministic = all(np.array_equal(value[n], again[n], equal_nan=_floating(again[n])) for n in value)
            if not self.deterministic:
                self.failures.append("the same input twice gives two outputs: something in the file is random")

    def _outputs(self, feeds: dict[str, Array], sizes: Mapping[str, int]) -> dict[str, Array] | None:
        """The candidate's outputs; None, and a failure on record, where it does not run."""
        try:
            return self.candidate.run(feeds)
        except GanExportError as error:
            self._fail(f"at {told_sizes(sizes)} it does not run: {error}")
        except Exception as error:  # noqa: BLE001 - engines raise their own classes
            self._fail(f"at {told_sizes(sizes)} it does not run: {_line(error)}")
        return None

    def mix(self, precision: str, min_psnr: float | None) -> None:
        """Put one sample among others, at another place in the batch: it has to stay what it was.

        Statistics over the batch (normalisation without running ones, minibatch deviation) and scales of a whole
        tensor pass every comparison with their source, and break what generating and serving in batches rest on.
        """
        spec = batched(self.spec)
        sizes = _pair(spec)
        if sizes is None or self.failures:
            return
        count = sizes[BATCH]
        first = draw(self.spec, InputSet(sizes, MIXED, count, "mixed"))
        other = draw(self.spec, InputSet(sizes, MIXED + count, count, "mixed"))
        for tensor in spec.inputs:
            if BATCH in tensor.shape:
                axis = tensor.shape.index(BATCH)
                np.moveaxis(other[tensor.name], axis, 0)[-1] = np.moveaxis(first[tensor.name], axis, 0)[0]
            else:
                other[tensor.name] = first[tensor.name]
        alone, among = self._outputs(first, sizes), self._outputs(other, sizes)
        if alone is None or among is None:
            return
        failures = []
        for tensor in spec.outputs:
            if BATCH not in tensor.shape:
                continue
            axis = tensor.shape.index(BATCH)
            comparison = Comparison(tensor.name, tensor.range)
            before, after = (np.moveaxis(value[tensor.name], axis, 0) for value in (alone, among))
            comparison.add(before[:1], after[-1:])
            row = tolerance(_row(self.spec, tensor.name, precision))
            failures += [f"{text} of itself" for text in comparison.judge(row, min_psnr)]
        self.independent = not failures
        if failures:
            self.failures.append(
                f"a sample changes with the others in its batch ({failures[0]}): something is computed over the batch "
                "(normalisation without running statistics, minibatch deviation, one scale for a whole tensor); "
                "compute it for each sample, or export one sample a call: --batch 1"
            )

    def _compare(
        self, comparison: Comparison, truth: dict[str, Array], value: dict[str, Array], name: str, number: int,
        chosen: InputSet,
    ) -> None:  # fmt: skip
        if wrong := mismatch(name, truth, value):
            self._fail(wrong)
            return
        tensor = next(tensor for tensor in self.spec.outputs if tensor.name == name)
        wanted = [chosen.sizes.get(str(size), size) for size in tensor.shape]
        shape = truth[name].shape
        if len(shape) != len(wanted) or any(isinstance(w, int) and w != s for w, s in zip(wanted, shape, strict=True)):
            self._fail(
                f"{name}: the source gives {list(shape)} at {told_sizes(chosen.sizes)}, its spec says "
                f"{list(tensor.shape)}: narrow the sizes (--dim), or make this size follow the inputs in one way"
            )
            return
        before = len(comparison.failures)
        comparison.add(truth[name], value[name], number)
        for index in range(before, len(comparison.failures)):
            comparison.failures[index] += f" at {told_sizes(chosen.sizes)}"
        if not np.isfinite(truth[name]).all():
            self._fail(f"{name}: the reference itself has NaN or infinite values at {told_sizes(chosen.sizes)}")

    def _fail(self, text: str) -> None:
        if text not in self.failures:
            self.failures.append(text)
        if len(self.failures) >= 8:
            self.broken = True

    def outcome(
        self, sets: list[InputSet], skipped: list[InputSet], precision: str, reference_name: str, runtime: str,
        seen: Sequence[Mapping[str, int]], min_psnr: float | None, budget: float,
    ) -> Outcome:  # fmt: skip
        failures = list(self.failures)
        outputs, worst = [], (math.inf, "", 0, 0)
        for name, comparison in self.comparisons.items():
            row = tolerance(_row(self.spec, name, precision))
            if comparison.samples:
                failures += comparison.judge(row, min_psnr)
                result = comparison.result()
                outputs.append(result)
                worst = min(worst, (_decibel(result.worst_psnr), name, *result.worst))
            else:
                failures += comparison.failures or ([] if failures else [f"{name}: nothing was compared"])
        sizes = _distinct([s.sizes for s in self.done])
        shown = [dict(s) for s in seen]
        notes = _notes(self.done, skipped, budget)
        drift, limit = self.drift.result(), tolerance(precision).max_drift
        if drift is not None and limit is not None and not drift <= limit:
            failures.append(f"it moves the Fréchet distance on paired latents by {drift:.1%}, above {limit:.0%}")
        certificate = Certificate(
            "fail" if failures else "pass",
            reference_name,
            runtime,
            precision,
            tuple(outputs),
            sizes,
            tuple(s for s in sizes if s not in shown),
            self.deterministic,
            notes,
            tuple(failures),
            drift,
            self.independent,
            tuple(filter(None, (comparison.beyond_range() for comparison in self.comparisons.values()))),
        )
        position = worst[2] if 0 <= worst[2] < len(sets) else 0
        return Outcome(certificate, sets[position], worst[1], max(worst[3], 0))


def _pair(spec: GeneratorSpec) -> dict[str, int] | None:
    """The smallest sizes with two samples or more; None where a call is one sample, or no axis is the samples'."""
    batch = spec.batch
    if batch is None or batch.max < 2 or not any(BATCH in tensor.shape for tensor in spec.outputs):
        return None
    sizes = {dim.name: dim.min for dim in spec.dims}
    return sizes | {BATCH: batch.min if batch.min > 1 else batch.min + batch.step}


def mismatch(name: str, truth: Mapping[str, Array], value: Mapping[str, Array]) -> str:
    """Why an output cannot be compared at all: missing, or of another dtype; empty when it can."""
    if name not in value:
        return f"output {name} is missing; there is: {', '.join(value)}"
    if value[name].dtype != truth[name].dtype:
        return f"{name}: dtype {value[name].dtype} where the reference has {truth[name].dtype}"
    return ""


def _row(spec: GeneratorSpec, name: str, precision: str) -> str:
    dtype = next(tensor.dtype for tensor in spec.outputs if tensor.name == name)
    return "uint8" if dtype == "uint8" and precision == "fp32" else precision


def _decibel(value: float | None) -> float:
    return math.inf if value is None else value


def _floating(array: Array) -> bool:
    return array.dtype.kind == "f"


def _distinct(sizes: list[dict[str, int]]) -> tuple[dict[str, int], ...]:
    found: list[dict[str, int]] = []
    for entry in sizes:
        if entry not in found:
            found.append(entry)
    return tuple(found)


def _notes(done: list[InputSet], skipped: list[InputSet], budget: float) -> tuple[str, ...]:
    counts = {role: sum(s.count for s in done if s.role == role) for role in ("optimum", "corner", "unseen")}
    notes = [
        f"{counts['optimum']} inputs at the optimum, {counts['corner']} at corners, {counts['unseen']} at sizes between"
    ]
    if skipped:
        left = {role: sum(s.count for s in skipped if s.role == role) for role in counts}
        told = ", ".join(f"{n} {role}" for role, n in left.items() if n)
        notes.append(f"the budget of {budget:g} s ended before: {told} inputs (raise --verify-budget)")
    return tuple(notes)


def told_sizes(sizes: Mapping[str, int]) -> str:
    """``batch 3, height 64``, or "its fixed size"."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "its fixed size"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def unmeasured(precision: str, notes: Sequence[str]) -> Certificate:
    """The certificate of a file that could not be run here: what was done, and nothing more."""
    return Certificate("partial", "none", "none", precision, notes=tuple(notes))
