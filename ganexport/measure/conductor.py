"""Take candidates in turn: a process each, one active at a time, round after round.

Why so: in one process spinning thread pools distort each other two- to threefold, and on a shared
machine a slow minute must hit every candidate alike for ratios to hold.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec

from ganexport import stats
from ganexport.errors import STOPS, stop_name
from ganexport.measure import server
from ganexport.measure.candidate import Candidate
from ganexport.measure.cell import Cell
from ganexport.measure.plan import Plan, Progress, ServerPlan, silent
from ganexport.measure.process import CandidateFailedError, WorkerProcess
from ganexport.measurement import Measurement, Series
from ganexport.spec import BATCH


class Conductor:
    """Measures a list of candidates; what was measured stays in :attr:`rows`, also after Ctrl-C or SIGTERM.

    Use as a context manager: the workers are gone afterwards.

    Args:
        candidates: Names must differ.
        plan: How long and how often.
        progress: Told before every turn.
        on_row: Given every row as soon as it is complete.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        plan: Plan | None = None,
        progress: Progress = silent,
        on_row: Callable[[Measurement], None] | None = None,
    ) -> None:
        names = [c.name for c in candidates]
        assert len(set(names)) == len(names), f"candidate names must differ: {names}"
        self.candidates = tuple(candidates)
        self.plan = plan or Plan()
        self.progress = progress
        self.on_row = on_row
        self.rows: list[Measurement] = []
        self.notes: list[str] = []
        self.stop: BaseException | None = None
        self.specs: dict[str, str] = {}
        self._workers: dict[str, WorkerProcess] = {}
        self._opened: dict[str, dict[str, Any]] = {}
        self._parity: dict[str, dict[str, Any] | None] = {}
        self._reasons: dict[str, str] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="ganexport-measure-")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Conductor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self._stack.close()
        self._folder.cleanup()
        if not isinstance(error, STOPS):
            return False
        self.stop = error
        self.notes.append(f"interrupted by {stop_name(error)}: {len(self.rows)} rows were measured, the rest was not")
        return True

    @property
    def interrupted(self) -> bool:
        """Whether a signal (Ctrl-C, or :attr:`stop` says which) ended the block early."""
        return self.stop is not None

    def _add(self, row: Measurement) -> None:
        self.rows.append(row)
        if self.on_row is not None:
            self.on_row(row)

    # ---- opening ------------------------------------------------------------------------------

    def open(self) -> None:
        """Start every candidate and compare its outputs with the reference, one after the other."""
        reference = self.plan.reference
        started = self._start_together() if self.plan.opening > 1 else {}
        for number, candidate in enumerate(self.candidates):
            self.progress(f"open {candidate.name}", number, len(self.candidates))
            if candidate.unavailable:
                self._reasons[candidate.name] = candidate.unavailable
                continue
            try:
                worker = started[candidate.name].result() if started else self._start(candidate)
                if reference is None:
                    reference = str(Path(self._folder.name) / "reference.npz")
                    try:
                        batches = self.plan.parity_batches
                        worker.ask("reference", self.plan.timeout, path=reference, batches=batches)
                    except CandidateFailedError:
                        reference = None
                        raise
                    self._parity[candidate.name] = {"verdict": "reference"}
                elif reference:
                    precision = str(candidate.about.get("precision", "fp32"))
                    answer = worker.ask("parity", self.plan.timeout, path=reference, precision=precision)
                    self._parity[candidate.name] = answer["parity"]
                self.specs[candidate.name] = worker.ask("spec")["spec"]
                worker.pause()
            except CandidateFailedError as failure:
                self._lose(candidate.name, failure, fatal=True)

    def _start_together(self) -> dict[str, Future[WorkerProcess]]:
        """Start the processes and let several open their candidates at once."""
        pool = ThreadPoolExecutor(self.plan.opening)
        try:
            # Started here and not in the pool: a worker dies with the thread that started it.
            found = {c.name: pool.submit(self._open, c, self._launch(c)) for c in self.candidates if not c.unavailable}
            wait(found.values())
        except BaseException:  # a signal: nobody waits for what is still opening
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in list(self._workers.values()):
                worker.kill()
            raise
        pool.shutdown()
        return found

    def _start(self, candidate: Candidate) -> WorkerProcess:
        return self._open(candidate, self._launch(candidate))

    def _launch(self, candidate: Candidate) -> WorkerProcess:
        worker = self._stack.enter_context(WorkerProcess(candidate))
        self._workers[candidate.name] = worker
        return worker

    def _open(self, candidate: Candidate, worker: WorkerProcess) -> WorkerProcess:
        self._opened[candidate.name] = worker.ask(
            "open", self.plan.timeout, factory=candidate.factory, arguments=candidate.arguments
        )
        worker.pause()
        return worker

    def _lose(self, name: str, failure: CandidateFailedError, *, fatal: bool = False) -> str:
        """Note a failure; a candidate whose process is gone (or that never opened) is out for good."""
        reason = str(failure)
        worker = self._workers.get(name)
        if fatal or not failure.alive:
            self._reasons[name] = reason
            if worker is not None:
                worker.kill()
                del self._workers[name]
        elif worker is not None:
            worker.pause()
        return reason

    # ---- cells: single-stream, multi-stream, offline -----------------------------------------

    def measure(self, cells: Sequence[tuple[str, dict[str, int]]]) -> None:
        """Measure every candidate in every cell.

        Args:
            cells: (scenario, sizes) pairs, ("single-stream", {"batch": 1}), ….
        """
        for number, (scenario, sizes) in enumerate(cells):
            self._measure_cell(scenario, sizes, number, len(cells))

    def _measure_cell(self, scenario: str, sizes: dict[str, int], number: int, total: int) -> None:
        label = " ".join(f"{name} {size}" for name, size in sizes.items())
        gathered: dict[str, Cell] = {}
        failures: dict[str, str] = dict(self._reasons)
        steps = total * (self.plan.rounds + 1)
        try:
            for name, worker in list(self._workers.items()):
                self.progress(f"{label}: warm {name}", number * (self.plan.rounds + 1), steps)
                try:
                    gathered[name] = self._warm(worker, sizes)
                except CandidateFailedError as failure:
                    failures[name] = self._lose(name, failure)
            end = time.monotonic() + self.plan.at_most_seconds
            for index in itertools.count():
                if index >= self.plan.rounds and (time.monotonic() > end or self._decided(gathered, index)):
                    break
                for name in self._order(list(gathered), index):
                    self.progress(f"{label}: {name}", number * (self.plan.rounds + 1) + index + 1, steps)
                    try:
                        gathered[name].add(self._turn(self._workers[name]))
                    except CandidateFailedError as failure:
                        failures[name] = self._lose(name, failure)
                        del gathered[name]
        finally:
            for candidate in self.candidates:
                cell = gathered.get(candidate.name)
                if cell is not None and cell.turns:
                    self._add(self._row(candidate, scenario, sizes, cell))
                elif candidate.name in failures:
                    self._add(self._missing(candidate, scenario, sizes, failures[candidate.name]))

    def _decided(self, gathered: dict[str, Cell], index: int) -> bool:
        """Whether further rounds would change nothing; looked at now and then, because looking takes time too."""
        if not self.plan.within or len(gathered) < 2:
            return True
        if (index - self.plan.rounds) % 4:
            return False
        name = self.plan.baseline if self.plan.baseline in gathered else next(iter(gathered))
        baseline = gathered[name].rounds("end_to_end")
        others = (cell.rounds("end_to_end") for other, cell in gathered.items() if other != name)
        ratios = (stats.ratio_interval(other, baseline) for other in others)
        return all(
            r.half_width <= self.plan.within and stats.verdict(r, self.plan.within) != "undecided" for r in ratios
        )

    @staticmethod
    def _order(names: list[str], index: int) -> list[str]:
        """Another one first in each round, and every second round backwards, so that no one always follows the same."""
        turn = index % len(names) if names else 0
        rotated = names[turn:] + names[:turn]
        return rotated[::-1] if index % 2 else rotated

    def _warm(self, worker: WorkerProcess, sizes: dict[str, int]) -> Cell:
        plan, cell = self.plan, Cell()
        prepared = worker.ask("prepare", plan.timeout, sizes=sizes)
        cell.items = prepared["items"]
        cell.warm = worker.ask(
            "warm", plan.timeout, min_seconds=plan.min_warm_seconds, max_seconds=plan.max_warm_seconds
        )
        cell.warm["first_run_ns"] = prepared["first_run_ns"]
        worker.pause()
        return cell

    def _turn(self, worker: WorkerProcess) -> dict[str, Any]:
        plan = self.plan
        answer = worker.ask(
            "turn",
            plan.timeout,
            seconds=plan.turn_seconds,
            min_iterations=plan.min_iterations,
            max_iterations=plan.max_iterations,
        )
        worker.pause()
        return answer

    def _row(self, candidate: Candidate, scenario: str, sizes: dict[str, int], cell: Cell) -> Measurement:
        series = tuple(Series(name, tuple(samples), cell.items) for name, samples in cell.series.items())
        conditions = {
            "scenario": scenario,
            "sizes": sizes,
            "items": cell.items,
            "warm_up": cell.warm,
            "rounds": len(cell.turns),
            "turn_seconds": self.plan.turn_seconds,
        }
        return Measurement(
            self._describe(candidate), conditions, series, parity=self._parity.get(candidate.name), facts=cell.facts()
        )

    def _missing(self, candidate: Candidate, scenario: str, sizes: dict[str, int], reason: str) -> Measurement:
        conditions = {"scenario": scenario, "sizes": sizes}
        return Measurement(
            self._describe(candidate), conditions, unavailable=reason, parity=self._parity.get(candidate.name)
        )

    def _describe(self, candidate: Candidate) -> dict[str, Any]:
        opened = self._opened.get(candidate.name, {})
        return candidate.described() | {key: opened[key] for key in ("backend", "device", "runtime") if key in opened}

    # ---- cold start ---------------------------------------------------------------------------

    def cold_start(self, repeats: int = 5, sizes: Mapping[str, int] | None = None) -> None:
        """Process start to first output, each time in a fresh process, in turn; files are in the page cache.

        Args:
            repeats: Fresh processes of each candidate.
            sizes: Of that output; batch 1 when not given.
        """
        sizes = dict(sizes or {BATCH: 1})
        samples: dict[str, dict[str, list[int]]] = {c.name: {} for c in self.candidates}
        failures = dict(self._reasons)
        try:
            for index in range(repeats):
                for candidate in self.candidates:
                    if candidate.name in failures:
                        continue
                    self.progress(f"cold start: {candidate.name}", index, repeats)
                    try:
                        for name, value in self._start_cold(candidate, sizes).items():
                            samples[candidate.name].setdefault(name, []).append(value)
                    except CandidateFailedError as failure:
                        failures[candidate.name] = str(failure)
        finally:
            for candidate in self.candidates:
                taken = samples[candidate.name]
                if taken:
                    conditions = {"scenario": "cold-start", "sizes": sizes, "rounds": len(taken["cold_start"])}
                    series = tuple(Series(name, tuple(values)) for name, values in taken.items())
                    parity = self._parity.get(candidate.name)
                    self._add(Measurement(self._describe(candidate), conditions, series, parity=parity))
                elif candidate.name in failures:
                    self._add(self._missing(candidate, "cold-start", sizes, failures[candidate.name]))

    def _start_cold(self, candidate: Candidate, sizes: dict[str, int]) -> dict[str, int]:
        with WorkerProcess(candidate) as worker:
            opened = worker.ask("open", self.plan.timeout, factory=candidate.factory, arguments=candidate.arguments)
            self._opened.setdefault(candidate.name, opened)
            prepared = worker.ask("prepare", self.plan.timeout, sizes=sizes)
            total = time.perf_counter_ns() - worker.started_ns
        return {"cold_start": total, "load": opened["open_ns"], "first_run": prepared["first_run_ns"]}

    # ---- server -------------------------------------------------------------------------------

    def serve(self, plan: ServerPlan, sizes: Mapping[str, int] | None = None) -> None:
        """The highest rate of Poisson arrivals that keeps p99 under the limit, candidate by candidate.

        Args:
            plan: The limits.
            sizes: Of dimensions other than the batch.
        """
        sizes = dict(sizes or {})
        for number, candidate in enumerate(self.candidates):
            conditions: dict[str, Any] = {"scenario": "server", "sizes": sizes, **msgspec.to_builtins(plan)}
            worker = self._workers.get(candidate.name)
            if worker is None:
                reason = self._reasons.get(candidate.name, "not opened")
                self._add(Measurement(self._describe(candidate), conditions, unavailable=reason))
                continue
            trials: list[server.Trial] = []
            reason = ""
            try:
                self.progress(f"server: {candidate.name}", number, len(self.candidates))
                reason = self._serve(worker, plan, trials, sizes, number)
                worker.pause()
            except CandidateFailedError as failure:
                reason = self._lose(candidate.name, failure)
            finally:
                self._add(self._server_row(candidate, conditions, trials, reason))

    def _serve(
        self, worker: WorkerProcess, plan: ServerPlan, trials: list[server.Trial], others: dict[str, int], number: int
    ) -> str:
        """Fill ``trials``; returns why there are none where even a request alone exceeds the limit."""
        from ganexport.measure.feeds import static_batch
        from ganexport.spec import spec_from_json

        batch = static_batch(spec_from_json(worker.ask("spec")["spec"]))
        low, high = (batch.min, batch.max) if batch is not None else (1, 1)
        step = batch.step if batch is not None else 1
        largest = max(low, min(high, plan.max_batch) // step * step)
        sizes = sorted(
            {largest, low, *(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if low <= s < largest and not s % step)}
        )
        medians: dict[int, float] = {}
        for size in (sizes[0], largest):
            worker.ask("prepare", self.plan.timeout, sizes=others | ({BATCH: size} if batch is not None else {}))
            worker.ask("warm", self.plan.timeout, min_seconds=0.1, max_seconds=self.plan.max_warm_seconds / 2)
            turn = worker.ask("turn", self.plan.timeout, seconds=0.3, min_iterations=3, max_iterations=1000)
            times = turn["series"]["end_to_end"]
            medians[size] = stats.percentile(times, 50)
            if size == sizes[0] and min(times) > plan.slo_ms * 1e6:
                return f"no rate keeps p99 under {plan.slo_ms:g} ms: one alone takes {min(times) / 1e6:.3g} ms"
        capacity = max(size * 1e9 / median for size, median in medians.items())

        def attempt(rate: float) -> server.Trial:
            count = max(int(rate * plan.trial_seconds), plan.min_requests)
            seconds = count / min(rate, capacity)
            said = f"server: {worker.candidate.name}, {rate:.3g} requests a second for {seconds:.0f} s"
            self.progress(said, number, len(self.candidates))
            answer = worker.ask(
                "serve",
                self.plan.timeout + 2 * seconds,
                rate=rate,
                count=count,
                sizes=sizes if batch is not None else [1],
                others=others,
                max_delay_ns=int(plan.max_delay_ms * 1e6),
                limit_ns=int(plan.slo_ms * 1e6),
                seed=plan.seed,
            )
            found = server.Trial(
                answer["rate"],
                tuple(answer["latencies"]),
                tuple(answer["batches"]),
                answer["planned"],
                answer["p99"],
                answer["kept"],
            )
            trials.append(found)
            return found

        server.highest_rate(attempt, 0.3 * capacity, 1.05 * capacity, steps=plan.steps)
        return ""

    def _server_row(
        self, candidate: Candidate, conditions: dict[str, Any], trials: list[server.Trial], reason: str
    ) -> Measurement:
        winner = server.best(trials)
        facts: dict[str, Any] = {
            "trials": [
                {
                    "rate": t.rate,
                    "p99_ns": t.p99,
                    "p50_ns": stats.percentile(t.latencies, 50),
                    "kept": t.kept,
                    "answered": len(t.latencies),
                    "planned": t.planned,
                    "mean_batch": sum(t.batches) / len(t.batches),
                }
                for t in trials
            ]
        }
        if trials and winner is None and not reason:
            lowest = min(t.rate for t in trials)
            reason = f"no rate kept p99 under {conditions['slo_ms']:g} ms (lowest tried: {lowest:.3g}/s)"
        if winner is not None:
            facts["rate"] = winner.rate
        series = (Series("latency", winner.latencies),) if winner is not None else ()
        parity = self._parity.get(candidate.name)
        return Measurement(
            self._describe(candidate), conditions, series, "" if winner else reason or "interrupted", parity, facts
        )
