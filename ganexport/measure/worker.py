"""The process that holds one candidate: ``python -m ganexport.measure.worker``.

Commands come on stdin, answers go to what was stdout (:mod:`ganexport.measure.protocol`); anything
a library prints lands on stderr. One command is answered before the next is read, so the measuring
process decides who is active. Every failure is an answer with its kind and reason.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from ganexport.environment import cpu_counters, energy_counters, energy_joules, gpu_state
from ganexport.errors import GanExportError
from ganexport.measure import feeds as inputs
from ganexport.measure import memory, server, timing
from ganexport.measure.candidate import resolve
from ganexport.measure.protocol import ConnectionClosedError, receive, send
from ganexport.runtime.base import Runner


class Worker:
    """Answers the commands; holds the runner between them."""

    def __init__(self) -> None:
        self.runner: Runner | None = None
        self.sets: list[Any] = []
        self.items = 1
        self.runs = 0

    @property
    def opened(self) -> Runner:
        """The runner; only asked for after ``open``."""
        assert self.runner is not None
        return self.runner

    @property
    def _gpu(self) -> int | None:
        device = self.opened.device
        return int(device.partition(":")[2] or 0) if device.startswith("cuda") else None

    def open(self, factory: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Make the runner."""
        start = time.perf_counter_ns()
        function = resolve(factory)
        imported = time.perf_counter_ns()
        runner = function(**arguments)
        self.runner = runner
        return {
            "import_ns": imported - start,
            "open_ns": time.perf_counter_ns() - imported,
            "backend": runner.backend,
            "device": runner.device,
            "runtime": runner.runtime,
        }

    def prepare(self, sizes: dict[str, int], seed: int = 0) -> dict[str, Any]:
        """Draw the inputs of these sizes and run once (compiles and allocates)."""
        self.sets = []
        memory.reset_peak()
        self.sets = list(inputs.rotation(self.opened.spec, sizes, seed))
        self.items = inputs.items(self.opened.spec, sizes)
        start = time.perf_counter_ns()
        self.opened.run(self.sets[0])
        self.runs += 1
        return {"first_run_ns": time.perf_counter_ns() - start, "items": self.items}

    def warm(self, min_seconds: float, max_seconds: float) -> dict[str, Any]:
        """Run until steady."""
        done = timing.warm_up(self.opened, self.sets, min_seconds=min_seconds, max_seconds=max_seconds)
        self.runs += done.iterations
        return {"iterations": done.iterations, "seconds": done.seconds, "steady": done.steady}

    def turn(self, seconds: float, min_iterations: int, max_iterations: int) -> dict[str, Any]:
        """Take samples, and what the machine says about them."""
        counters, energy = cpu_counters(), energy_counters(self._gpu)
        start, cpu = time.perf_counter(), time.process_time()
        series, runs = timing.take_turn(
            self.opened,
            self.sets,
            seconds=seconds,
            min_iterations=min_iterations,
            max_iterations=max_iterations,
        )
        wall = time.perf_counter() - start
        own = time.process_time() - cpu
        energy_after, later = energy_counters(self._gpu), cpu_counters()
        self.runs += runs
        return {
            "series": series,
            "runs": self.runs,
            "cores": own / wall if wall else 0.0,
            "cpu": {"own": own, **{name: later[name] - value for name, value in counters.items() if name in later}},
            "joules": energy_joules(energy, energy_after, wall),
            "wall": wall,
            "energy_items": runs * self.items,
            "memory": memory.status(),
            "device_peak_bytes": memory.device_peak(),
            "gpu": gpu_state(self._gpu) if self._gpu is not None else {},
        }

    def reference(self, path: str, batches: list[int]) -> dict[str, Any]:
        """Write this candidate's outputs as the reference."""
        inputs.write_reference(Path(path), self.opened, tuple(batches))
        return {}

    def parity(self, path: str, precision: str) -> dict[str, Any]:
        """Compare with the reference."""
        return {"parity": inputs.compare(self.opened, inputs.read_reference(Path(path)), precision)}

    def serve(
        self,
        *,
        rate: float,
        count: int,
        sizes: list[int],
        others: dict[str, int],
        max_delay_ns: int,
        limit_ns: int,
        seed: int,
    ) -> dict[str, Any]:
        """One trial of the server scenario on the real clock."""
        spec, runner = self.opened.spec, self.opened
        batches = {size: inputs.draw(spec, {**others, "batch": size}) for size in sizes}
        for feeds in batches.values():
            runner.run(feeds)
        batching = server.Batching(tuple(sizes), max_delay_ns)

        def run(size: int) -> None:
            runner.run(batches[size])

        clock = server.RealClock()
        result = server.trial(rate, run, batching, clock, count=count, limit_ns=limit_ns, seed=seed)
        return {
            "rate": result.rate,
            "latencies": result.latencies,
            "batches": result.batches,
            "planned": result.planned,
            "p99": result.p99,
            "kept": result.kept,
        }

    def spec(self) -> dict[str, Any]:
        """The generator's spec as JSON."""
        from ganexport.spec import spec_to_json

        return {"spec": spec_to_json(self.opened.spec)}

    def call(self, function: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Call any function here, where nothing else runs (the machine's peaks)."""
        return {"value": resolve(function)(**arguments)}

    def close(self) -> dict[str, Any]:
        """Release the engine."""
        if self.runner is not None:
            self.runner.close()
            self.runner = None
        return {}


COMMANDS = ("open", "prepare", "warm", "turn", "reference", "parity", "serve", "spec", "call", "close")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library means that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    signs = ("out of memory", "bad_alloc", "failed to allocate", "cudaerrormemoryallocation", "unable to allocate")
    return any(sign in text for sign in signs)


def explain(error: BaseException) -> dict[str, Any]:
    """A failure as an answer: its kind and one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 300 else text[:297] + "…"
    if is_out_of_memory(error):
        said = text if text.lower().startswith("out of memory") else f"out of memory: {text}"
        return {"error": "out of memory", "reason": said}
    if isinstance(error, GanExportError):
        return {"error": "refused", "reason": text}
    if isinstance(error, ImportError):
        return {"error": "unavailable", "reason": text}
    return {"error": "failed", "reason": f"{type(error).__name__}: {text}"}


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the measuring one dies, for a stopped process cannot notice."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> None:
    """Answer commands until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the measuring process's to handle
    _die_with_parent()
    answers = os.dup(1)
    os.dup2(2, 1)
    commands = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    worker = Worker()
    with contextlib.suppress(ConnectionClosedError):
        send(answers, {"ready": time.perf_counter_ns(), "numpy": np.__version__})
        while True:
            message = receive(commands)
            name = message.pop("do")
            try:
                assert name in COMMANDS, name
                answer = getattr(worker, name)(**message)
            except Exception as error:  # noqa: BLE001 - a candidate may fail in any way; the reason is the answer
                answer = explain(error)
            send(answers, answer)
            if name == "close":
                return


if __name__ == "__main__":
    main()
