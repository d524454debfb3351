"""Runners whose every figure is known beforehand. Loaded in worker processes by path, as candidates are."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ganexport.measure.candidate import Candidate
from ganexport.runtime.base import Runner
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec

SPEC = GeneratorSpec(
    (TensorSpec("z", "float32", ("batch", 4), Normal()),),
    (TensorSpec("image", "float32", ("batch", 4), range=(-1.0, 1.0)),),
    (Dim("batch", 1, 8, 64),),
)


class KnownRunner(Runner):
    """Computes ``scale · tanh(z)`` in a time given by ``duration(run number, batch)`` seconds."""

    backend = "known"

    def __init__(self, duration: Callable[[int, int], float], *, scale: float = 1.0, device: str = "cpu") -> None:
        super().__init__()
        self.duration, self.scale, self.device = duration, scale, device
        self.spec, self.runtime = SPEC, "known 1.0"
        self.count = 0
        self.feeds: dict[str, Any] = {}
        self.ready = 0.0

    @classmethod
    def unavailable(cls):
        return None

    @classmethod
    def _open(cls, *_):
        raise NotImplementedError

    def prepare(self, feeds):
        self.feeds = dict(feeds)

    def launch(self):
        """Start the work and return at once, as a GPU does."""
        self.ready = time.perf_counter() + self.duration(self.count, len(self.feeds["z"]))
        self.count += 1

    def synchronize(self):
        left = self.ready - time.perf_counter()
        if left > 0.002:
            time.sleep(left - 0.001)
        while time.perf_counter() < self.ready:
            pass

    def fetch(self):
        assert time.perf_counter() >= self.ready, "fetched before the answer was there"
        return {"image": self.scale * np.tanh(self.feeds["z"])}

    def close(self):
        self._closed = True


def constant(milliseconds=2.0, scale=1.0, device="cpu"):
    return KnownRunner(lambda _i, _b: milliseconds / 1e3, scale=scale, device=device)


def per_batch(base=1.0, each=0.25):
    """base + each · batch milliseconds: the best batch and its throughput are known."""
    return KnownRunner(lambda _i, b: (base + each * b) / 1e3)


def exponential(mean=2.0):
    generator = np.random.Generator(np.random.Philox(1))
    return KnownRunner(lambda _i, _b: 1e-3 + generator.exponential(mean) / 1e3)


def ramp(plateau=2.0):
    """Starts at five times the plateau and falls to it over about a hundred runs."""
    return KnownRunner(lambda i, _b: plateau / 1e3 * (1 + 4 * np.exp(-i / 20)))


def tail():
    """1 ms, and exactly every 50th run 20 ms: p99 is the tail, p90 is not."""
    return KnownRunner(lambda i, _b: 0.02 if i % 50 == 49 else 0.001)


def restless(milliseconds=2.0, seed=0):
    """A slow minute now and then: the time changes by up to 40 % every ten runs."""
    generator = np.random.Generator(np.random.Philox(seed))
    levels = generator.uniform(0.8, 1.2, 10_000)
    return KnownRunner(lambda i, _b: milliseconds / 1e3 * levels[i // 10])


class WideRunner(KnownRunner):
    """Takes batches of 4 and more; refuses to run at another width than 16, which is not its optimum."""

    def __init__(self) -> None:
        super().__init__(lambda _i, _b: 0.0005)
        z = TensorSpec("z", "float32", ("batch", "width"), Normal())
        image = TensorSpec("image", "float32", ("batch", "width"), range=(-1.0, 1.0))
        self.spec = GeneratorSpec((z,), (image,), (Dim("batch", 4, 8, 64), Dim("width", 8, 8, 64)))

    def launch(self):
        if self.feeds["z"].shape[1] != 16:
            raise RuntimeError(f"run at width {self.feeds['z'].shape[1]}")
        super().launch()


def wide():
    return WideRunner()


class LeakingRunner(KnownRunner):
    KEPT = 256 * 1024

    def __init__(self) -> None:
        super().__init__(lambda _i, _b: 0.0005)
        self.kept: list[Any] = []

    def launch(self):
        super().launch()
        self.kept.append(np.ones(self.KEPT, np.uint8))


def leaking():
    return LeakingRunner()


def hungry():
    """Runs small batches; says out of memory, as an engine does, beyond 8."""

    def duration(_index, batch):
        if batch > 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return 0.001

    return KnownRunner(duration)


def crashing(after=30):
    def duration(index, _batch):
        if index >= after:
            sys.stdout.write("illegal instruction in kernel_17\n")
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGSEGV)
        return 0.001

    return KnownRunner(duration)


def missing():
    raise ImportError("No module named 'unobtainium'; install it with: pip install unobtainium")


def hanging():
    return KnownRunner(lambda i, _b: 0.001 if i == 0 else 3600.0)


def interrupting(after=60):
    """Ctrl-C reaches the measuring process while this one is being measured."""

    def duration(index, _batch):
        if index == after:
            os.kill(os.getppid(), signal.SIGINT)
        return 0.002

    return KnownRunner(duration)


class SpinningRunner(KnownRunner):
    """Keeps a thread spinning after its run, as OpenMP's pools do."""

    def __init__(self) -> None:
        super().__init__(lambda _i, _b: 0.001)
        threading.Thread(target=self._spin, daemon=True).start()

    @staticmethod
    def _spin() -> None:
        while True:
            pass


def spinning():
    return SpinningRunner()


def candidate(name: str, factory: str | None = None, **arguments: Any) -> Candidate:
    return Candidate(name, f"tests.measure.known:{factory or name}", arguments)
