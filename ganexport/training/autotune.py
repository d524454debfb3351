"""Find the fastest sound way to train a recipe on this machine: timed, never assumed.

Candidates are {eager, compiled} × {fp32, tf32, bf16, fp16} × {contiguous, channels_last} × threads, and on a GPU
× {launched kernel by kernel, replayed as CUDA graphs}.
Every one starts from the same weights. It is sound when its losses stay finite and its first
gradients point where eager fp32's do. It is judged by the time the whole rest of the run would take:
compile time plus steps left times the time of a step. At the end the winner, the runner-up and eager
fp32 are timed again, in turn, and the fastest of these is taken: a lead that something else on the
machine made does not repeat.

Rather than every combination, thread counts are tried first on eager fp32, then precisions, then
memory formats on the best so far, then thread counts again, since low precision shifts what pays,
then CUDA graphs, then compilation of what is best: 6 to 11 candidates instead of dozens, each for a few steps, and
fewer when it is clearly slower than the best.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor

from ganexport.data import ImageSet
from ganexport.environment import usable_cores
from ganexport.errors import GanExportError
from ganexport.recipe import Recipe
from ganexport.training.distributed import Group
from ganexport.training.loop import Trainer
from ganexport.training.progress import Reporter

#: Timed steps of a candidate: at least, at most, and the seconds after which it is enough.
MIN_STEPS, MAX_STEPS, ENOUGH_SECONDS = 3, 40, 1.5
WARM_UP = 2
#: A candidate whose fastest step so far is slower than the best candidate's median by this factor is given up.
HOPELESS = 1.25
#: An uncompiled candidate is given up at its first warm step when that takes at least these seconds and this many
#: times the best's: bfloat16 takes 13 times float32's on a processor without AVX-512.
LOST, LOST_SECONDS = 3.0, 0.5
#: Gradient scale at which float16's first gradients are compared: low enough for none to overflow.
FIRST_SCALE = 256.0
#: Cosine between a candidate's first gradients and eager fp32's below which it is unsound; bf16's is 0.99
#: and better on the recipes here, a broken kernel's near 0.
MIN_COSINE = 0.95
#: A lead smaller than this is noise.
MIN_GAIN = 0.02
#: float16 is not tried where one small convolution takes this many times as long as in float32: many CPUs have
#: no float16 backward, and a whole step would take minutes.
NOT_WORTH_TRYING = 3.0
#: Compilation is tried when the rest of the run, uncompiled, takes this many seconds.
WORTH_COMPILING = 120.0


class Settings(msgspec.Struct, frozen=True):
    """One candidate: what it changes in the recipe's ``[training]``."""

    precision: str
    compile: str
    memory_format: str
    threads: int
    cuda_graphs: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        mode = "eager" if self.compile == "off" else f"compiled ({self.compile})"
        mode += " + CUDA graphs" if self.cuda_graphs else ""
        return f"{mode}, {self.precision}, {self.memory_format}, {self.threads} threads"


class Row(msgspec.Struct, kw_only=True):
    """What was seen of one candidate.

    Attributes:
        name: Of the settings.
        settings: What it changes.
        step_ms: Median milliseconds of a step; None when it was not timed.
        samples_ns: Each timed step; of the last rivals, those of the round in which they were timed in turn.
        compile_seconds: First steps beyond the later ones' time.
        total_seconds: Of the steps left, compilation included.
        cosine: Of its first gradients with eager fp32's.
        note: Why it was not timed, or not taken.
        chosen: Whether it won.
    """

    name: str
    settings: Settings
    step_ms: float | None = None
    samples_ns: list[int] = []
    compile_seconds: float = 0.0
    total_seconds: float | None = None
    cosine: float | None = None
    note: str = ""
    chosen: bool = False


class Tuner:
    """Times candidates of one recipe.

    Args:
        recipe: Resolved.
        images: Of the model's size.
        device: To train on.
        reporter: Told of each candidate.
    """

    def __init__(self, recipe: Recipe, images: ImageSet, device: torch.device, reporter: Reporter) -> None:
        self.recipe, self.images, self.device, self.reporter = recipe, images, device, reporter
        self.steps = recipe.training.steps
        self.rows: list[Row] = []
        self._reference: Tensor | None = None
        self._best_seconds = math.inf

    def run(self) -> Row:
        """Try the candidates and choose.

        Returns:
            The chosen row; all rows are in :attr:`rows`.
        """
        cores = usable_cores()
        base = Settings("fp32", "off", "contiguous", self.recipe.training.threads)
        first = self.time(base)
        if first.total_seconds is None:
            raise GanExportError(f"--tune: even eager fp32 fails: {first.note}")
        best = first
        if self.device.type == "cpu":
            for threads in _thread_counts(cores, base.threads):
                best = self._better(best, self.time(msgspec.structs.replace(best.settings, threads=threads)))
        for precision in self._precisions():
            best = self._better(best, self.time(msgspec.structs.replace(best.settings, precision=precision)))
        best = self._better(best, self.time(msgspec.structs.replace(best.settings, memory_format="channels_last")))
        if self.device.type == "cpu":
            for threads in (base.threads, *_thread_counts(cores, base.threads)):
                other = msgspec.structs.replace(best.settings, threads=threads)
                if all(row.settings != other for row in self.rows):
                    best = self._better(best, self.time(other))
        if self.device.type == "cuda":
            best = self._better(best, self.time(msgspec.structs.replace(best.settings, cuda_graphs=True)))
        best = self._try_compiled(best)
        winner = self._confirm(best, first)
        winner.chosen = True
        return winner

    def _precisions(self) -> Iterator[str]:
        if self.device.type == "cuda":
            yield "tf32"
        yield "bf16"
        slowdown = float16_slowdown() if self.device.type == "cpu" else 0.0
        if slowdown < NOT_WORTH_TRYING:
            yield "fp16"
        else:
            settings = Settings("fp16", "off", "contiguous", self.recipe.training.threads)
            note = f"not tried: a float16 convolution with its backward takes {slowdown:.0f} times float32's here"
            self._add(Row(name=settings.name, settings=settings, note=note))

    def _try_compiled(self, best: Row) -> Row:
        assert best.total_seconds is not None
        settings = msgspec.structs.replace(best.settings, compile="default")
        if best.total_seconds >= WORTH_COMPILING:
            return self._better(best, self.time(settings))
        note = f"not tried: the whole run takes {best.total_seconds:.0f} s without, compiling would not pay"
        self._add(Row(name=settings.name, settings=settings, note=note))
        return best

    def _better(self, best: Row, other: Row) -> Row:
        if other.note or other.total_seconds is None or best.total_seconds is None:
            return best
        return other if other.total_seconds < best.total_seconds * (1 - MIN_GAIN) else best

    def _confirm(self, best: Row, first: Row) -> Row:
        """Time the winner, the runner-up and eager fp32 once more, in turn; the fastest over the steps left."""
        limit = HOPELESS * _seconds(best)
        others = [row for row in self.rows if row is not best and row is not first and not row.note]
        rivals = [best, *sorted((row for row in others if _seconds(row) <= limit), key=_seconds)[:1]]
        if best is not first:
            rivals.append(first)
        if len(rivals) == 1:
            return best
        trainers = [self._trainer(row.settings) for row in rivals]
        again: list[list[int]] = [[] for _ in rivals]
        for row, trainer in zip(rivals, trainers, strict=True):
            self._steps(trainer, row.settings, WARM_UP)
        for _ in range(MIN_STEPS):
            for row, trainer, samples in zip(rivals, trainers, again, strict=True):
                samples.extend(self._steps(trainer, row.settings, 2))
        for row, samples in zip(rivals, again, strict=True):
            row.samples_ns = samples
            self._summarise(row)
        fastest = min(rivals, key=_seconds)
        if fastest is not best:
            best.note = f"its lead over {'eager fp32' if fastest is first else fastest.name} did not repeat"
        return fastest

    # ---- one candidate -----------------------------------------------------------------------

    def time(self, settings: Settings) -> Row:
        """Time one candidate for a few steps."""
        row = Row(name=settings.name, settings=settings)
        try:
            self._measure(row)
        except GanExportError as error:
            row.note = str(error)
        except Exception as error:  # noqa: BLE001 - a compiler or kernel may fail in any way; then it is no candidate
            row.note = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
        self._add(row)
        return row

    def _measure(self, row: Row) -> None:
        begin = time.perf_counter()
        trainer = self._trainer(row.settings)
        row.cosine = self._direction(trainer)
        began = time.perf_counter()
        samples = self._steps(trainer, row.settings, 1)
        slower = samples[0] / 1e9 / self._best_seconds
        if row.settings.compile == "off" and slower > LOST and samples[0] > LOST_SECONDS * 1e9:
            row.samples_ns, row.note = samples, f"given up: {slower:.0f} times the best's"
            self._summarise(row)
            return
        self._steps(trainer, row.settings, WARM_UP - 1)
        warm = time.perf_counter() - began
        scales = trainer.networks.scaler_states()
        samples = self._steps(trainer, row.settings, MIN_STEPS)
        while len(samples) < MAX_STEPS and sum(samples) < ENOUGH_SECONDS * 1e9:
            if row.settings.compile == "off" and min(samples) / 1e9 > HOPELESS * self._best_seconds:
                break
            samples += self._steps(trainer, row.settings, MIN_STEPS)
        row.samples_ns = samples
        step = statistics.median(samples) / 1e9
        if row.settings.compile != "off":
            row.compile_seconds = round(max(0.0, began - begin + warm - WARM_UP * step), 3)
        self._summarise(row)
        if not trainer.networks.finite():
            row.note = "unsound: NaN or infinite weights"
        elif not row.cosine >= MIN_COSINE:  # NaN is unsound too
            row.note = f"unsound: its gradients differ from eager fp32's (cosine {row.cosine:.3f})"
        elif _skipped(scales, trainer.networks.scaler_states()) > len(samples) / 2:
            row.note = "unsound: its gradients overflow, most updates are skipped"
        else:
            self._best_seconds = min(self._best_seconds, step)

    def _summarise(self, row: Row) -> None:
        step = statistics.median(row.samples_ns) / 1e9
        row.step_ms = round(step * 1e3, 3)
        row.total_seconds = round(row.compile_seconds + step * self.steps, 3)

    def _trainer(self, settings: Settings) -> Trainer:
        torch.set_num_threads(settings.threads)
        training = msgspec.structs.replace(self.recipe.training, **msgspec.structs.asdict(settings))
        recipe = msgspec.structs.replace(self.recipe, training=training)
        return Trainer(recipe, self.images, group=Group(), device=self.device)

    def _direction(self, trainer: Trainer) -> float:
        """Cosine of the first step's gradients with eager fp32's, from the same weights and data."""
        states = trainer.networks.scaler_states()
        trainer.networks.restore_scalers({name: {**state, "scale": FIRST_SCALE} for name, state in states.items()})
        trainer.advance(log=False)
        parameters = [*trainer.networks.g_parameters, *trainer.networks.d_parameters]
        flat = torch.cat([p.grad.float().flatten() for p in parameters if p.grad is not None]).cpu()
        if self._reference is None:
            self._reference = flat
        return float(torch.nn.functional.cosine_similarity(flat, self._reference, dim=0))

    def _steps(self, trainer: Trainer, settings: Settings, count: int) -> list[int]:
        torch.set_num_threads(settings.threads)
        samples = []
        for _ in range(count):
            self._synchronize()
            begin = time.perf_counter_ns()
            trainer.advance(log=False)
            self._synchronize()
            samples.append(time.perf_counter_ns() - begin)
        return samples

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        took = f"{row.step_ms:8.2f} ms/step" if row.step_ms is not None else " " * 16
        self.reporter.remark(f"tuning: {row.name:55} {took}  {row.note}".rstrip())


def float16_slowdown() -> float:
    """Time of a small convolution and its backward in float16 over that in float32, on this CPU."""
    seconds = {}
    for dtype in (torch.float32, torch.float16):
        layer = torch.nn.Conv2d(32, 32, 4, 2, 1, dtype=dtype)
        images = torch.ones(8, 32, 8, 8, dtype=dtype, requires_grad=True)
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            layer(images).sum().backward()
            taken.append(time.perf_counter() - begin)
        seconds[dtype] = min(taken)
    return seconds[torch.float16] / seconds[torch.float32]


def _seconds(row: Row) -> float:
    """Of the steps left; infinite for a candidate that was not timed."""
    return row.total_seconds if row.total_seconds is not None else math.inf


def _skipped(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Updates left out because gradients overflowed: each halves its network's scale; the worse network's count."""
    return max((math.log2(before[name]["scale"] / after[name]["scale"]) for name in before), default=0.0)


def _thread_counts(cores: int, base: int) -> list[int]:
    """Counts worth trying besides the base: 1, halves of the cores, all cores."""
    counts = {1, cores}
    while cores > 2:
        cores //= 2
        counts.add(cores)
    return sorted((count for count in counts if count != base), reverse=True)[:3]


def tune(
    recipe: Recipe, images: ImageSet, device: torch.device, reporter: Reporter
) -> tuple[Recipe, list[dict[str, Any]]]:
    """Choose precision, compilation, memory format and threads for a recipe on this machine.

    Args:
        recipe: Resolved; its own settings of these four are replaced.
        images: Of the model's size.
        device: To train on.
        reporter: Shown the table.

    Returns:
        The recipe with the chosen settings, and the table's rows as plain values.

    Raises:
        GanExportError: Even eager fp32 cannot train it.
    """
    tuner = Tuner(recipe, images, device, reporter)
    threads = torch.get_num_threads()
    try:
        chosen = tuner.run()
    finally:
        torch.set_num_threads(threads)
    reporter.remark(format_table(tuner.rows, recipe.training.steps))
    training = msgspec.structs.replace(recipe.training, **msgspec.structs.asdict(chosen.settings))
    return msgspec.structs.replace(recipe, training=training), [msgspec.to_builtins(row) for row in tuner.rows]


def format_table(rows: list[Row], steps: int) -> str:
    """The table, one line a candidate, the chosen one marked."""
    lines = [f"{'settings':58} {'ms/step':>9} {'compile s':>10} {f'{steps} steps, s':>14}  cosine"]
    for row in rows:
        mark = "→ " if row.chosen else "  "
        if row.step_ms is None:
            lines.append(f"{mark}{row.name:56} {row.note}")
            continue
        cosine = f"{row.cosine:.4f}" if row.cosine is not None else ""
        numbers = f"{row.step_ms:9.2f} {row.compile_seconds:10.1f} {row.total_seconds or 0:14.1f}"
        lines.append(f"{mark}{row.name:56} {numbers}  {cosine} {row.note}".rstrip())
    return "\n".join(lines)
