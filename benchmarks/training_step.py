"""The training step: eager, compiled and with CUDA graphs, in fp32, TF32, bf16 and fp16.

    PYTHONPATH=. python -m benchmarks.training_step --output training.json

One iteration is what a training loop does: ``n_critic`` updates of the discriminator (penalty with its
double backward included), one of the generator, both optimizers. Images a second count the real images
that the discriminator saw. Every row has a process of its own. The processes of a wave compile and warm up
side by side, which takes most of the time; then they are measured one after the other, while the others wait.
Every row is written when measured, and what the deadline cuts off stands in the file as not run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import re
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks._rows import Deadline, Results, median, say

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        architecture: Registry name.
        options: Of the architecture.
        objective: Registry name.
        regularizers: Registry names, with their default options.
        n_critic: Discriminator updates a generator update.
        betas: Of Adam.
    """

    architecture: str
    options: dict[str, Any]
    objective: str
    regularizers: tuple[str, ...]
    n_critic: int
    betas: tuple[float, float]


WORKS = {
    # Gulrajani et al. 2017 (arXiv:1704.00028), algorithm 1 and appendix F.
    "wgan-gp-resnet-64": Work(
        "resnet", {"image_size": 64, "norm": "layer"}, "wasserstein", ("gradient-penalty",), 5, (0.0, 0.9)
    ),
    # Radford et al. 2016 (arXiv:1511.06434).
    "dcgan-64": Work("dcgan", {"image_size": 64}, "non-saturating", (), 1, (0.5, 0.999)),
    # Huang et al. 2024 (arXiv:2501.05441): relativistic pairing loss with both zero-centred penalties.
    "r3gan-64": Work("r3gan", {"image_size": 64}, "relativistic", ("r1", "r2"), 1, (0.0, 0.99)),
    "tiny": Work(
        "dcgan",
        {"image_size": 16, "width": 4, "norm": "none"},
        "wasserstein",
        ("gradient-penalty",),
        2,
        (0.0, 0.9),
    ),
}


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        model: A key of :data:`WORKS`.
        compile: A mode of the training step.
        precision: "fp32", "tf32", "bf16", "fp16".
        batch: Images a update.
        channels_last: Memory format of weights and images.
        cuda_graphs: Whether whole updates are replayed.
        penalty: Whether the regularizers are on; without them, the difference is their share.
    """

    model: str
    compile: str
    precision: str
    batch: int
    channels_last: bool = False
    cuda_graphs: bool = False
    penalty: bool = True

    @property
    def name(self) -> str:
        """Shown in tables."""
        mode = {"off": "eager", "default": "compile", "reduce-overhead": "compile reduce-overhead"}
        graphs = ["+ CUDA graphs"] if self.cuda_graphs else []
        parts = [f"{self.model}:", mode.get(self.compile, self.compile), *graphs, self.precision]
        parts += ["channels_last"] if self.channels_last else []
        parts += [] if self.penalty else ["without penalty"]
        return " ".join(parts)


_MODELS = ("wgan-gp-resnet-64", "dcgan-64", "r3gan-64")
#: (compile, precision, channels_last, cuda_graphs), the most telling first.
_FIRST = (
    ("off", "fp32", False, False),
    ("off", "bf16", True, True),
    ("default", "bf16", True, True),
    ("off", "bf16", True, False),
    ("off", "tf32", False, False),
    ("off", "fp16", True, True),
)
_LATER = (
    ("off", "bf16", False, True),
    ("default", "bf16", False, True),
    ("reduce-overhead", "bf16", True, False),
    ("default", "bf16", True, False),
    ("off", "tf32", False, True),
    ("default", "tf32", False, True),
    ("default", "fp16", True, True),
    ("off", "fp16", True, False),
    ("off", "fp32", False, True),
    ("default", "fp32", False, True),
    ("max-autotune", "bf16", True, True),
)
_ENDS = (_FIRST[0], _FIRST[1])


def settings(cpu: bool) -> Iterator[Setting]:
    """Every row in the order of its value."""
    if cpu:
        yield Setting("tiny", "off", "fp32", 4)
        yield Setting("tiny", "aot_eager", "bf16", 4, channels_last=True)
        yield Setting("r3gan-64", "off", "tf32", 4)
        return
    for way in _FIRST:
        for model in _MODELS:
            yield _setting(model, way)
    for way in _ENDS:
        for model in (_MODELS[0], _MODELS[2]):
            yield _setting(model, way, penalty=False)
    for batch in (256, 128):
        for way in _ENDS:
            for model in _MODELS:
                yield _setting(model, way, batch)
    for way in _LATER:
        for model in _MODELS:
            yield _setting(model, way)


def _setting(model: str, way: tuple[str, str, bool, bool], batch: int = 64, *, penalty: bool = True) -> Setting:
    compiling, precision, channels_last, graphs = way
    return Setting(model, compiling, precision, batch, channels_last, graphs, penalty)


# ---- in the worker -------------------------------------------------------------------------------


def measure(setting: Setting, device_name: str, seconds: float, turn: Callable[[], None]) -> dict[str, Any]:
    """Train for a while; series in nanoseconds and facts.

    Args:
        setting: What and how.
        device_name: "cuda" or "cpu".
        seconds: Of sampling.
        turn: Called when compiled and warm; returns when nobody else is at work.
    """
    # What is missing is found before torch is loaded, which is slow.
    importlib.import_module("ganexport.spec")
    import torch

    work = WORKS[setting.model]
    device = torch.device(device_name)
    torch.manual_seed(0)
    start = time.perf_counter_ns()
    trainer = _Trainer(setting, work, device)
    trainer.iteration()
    trainer.wait()
    facts: dict[str, Any] = {"first_iteration_seconds": (time.perf_counter_ns() - start) / 1e9}
    _repeat(trainer.iteration, trainer.wait, min(seconds, 1.0), least=5)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the others need memory too
    turn()
    _repeat(trainer.iteration, trainer.wait, min(seconds / 3, 0.5), least=3)  # warm-up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    series = {
        "end_to_end": _repeat(trainer.iteration, trainer.wait, seconds),
        "discriminator": _repeat(trainer.update_discriminator, trainer.wait, seconds / 3),
        "generator": _repeat(trainer.update_generator, trainer.wait, seconds / 3),
        "pipelined": _bursts(trainer, seconds / 2),
    }
    if device.type == "cuda":
        # What a graph's replay works in is the pool's, which the allocator does not count as allocated.
        held = setting.cuda_graphs or trainer.step.replays
        facts |= (
            {"reserved_device_bytes": torch.cuda.memory_reserved()}
            if held
            else {"peak_device_bytes": torch.cuda.max_memory_allocated()}
        )
        facts |= _profile(trainer)
    facts["losses"] = [float(value) for value in trainer.losses[-2:]]
    facts["finite"] = all(math.isfinite(value) for value in facts["losses"])
    return {"series": series, "facts": facts, "items": setting.batch * work.n_critic}


class _Trainer:
    """One model with its optimizers and a batch that stays on the device."""

    def __init__(self, setting: Setting, work: Work, device: Any) -> None:
        import torch

        from ganexport.architectures import ARCHITECTURES
        from ganexport.objectives import OBJECTIVES
        from ganexport.objectives.regularizers import REGULARIZERS
        from ganexport.training.step import TrainingStep

        self.torch, self.work, self.device = torch, work, device
        torch.backends.cudnn.benchmark = True
        module = ARCHITECTURES.load(work.architecture)
        options = module.Options(**work.options)
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        generator, discriminator = (
            make(options).to(device, memory_format=layout) for make in (module.generator, module.discriminator)
        )
        names = work.regularizers if setting.penalty else ()
        regularizers = [(loaded, loaded.Options()) for loaded in map(REGULARIZERS.load, names)]
        self.scalers: list[Any] = [None, None]
        if setting.precision == "fp16":
            self.scalers = [torch.amp.GradScaler(device.type) for _ in range(2)]
        self.step = TrainingStep(
            generator,
            discriminator,
            OBJECTIVES.load(work.objective),
            regularizers,
            precision=setting.precision,
            compile=setting.compile,
            cuda_graphs=setting.cuda_graphs,
            loss_scale_d=self.scalers[0],
            loss_scale_g=self.scalers[1],
        )
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=1e-4, betas=work.betas, fused=True)
            for network in (discriminator, generator)
        ]
        size = work.options["image_size"]
        real = torch.rand(setting.batch, 3, size, size, device=device) * 2 - 1
        self.real = real.to(memory_format=layout)
        self.latent = (setting.batch, options.latent)
        self.count = 0
        self.losses: list[Any] = []

    def _latents(self) -> dict[str, Any]:
        return {"z": self.torch.randn(self.latent, device=self.device)}

    def _update(self, which: int, metrics: Callable[[], dict[str, Any]]) -> None:
        optimizer, scaler = self.optimizers[which], self.scalers[which]
        optimizer.zero_grad(set_to_none=True)
        self.losses = [*self.losses[-3:], metrics()["loss"]]
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    def update_discriminator(self) -> None:
        """One update of the discriminator."""
        self._update(0, lambda: self.step.discriminator(self.real, self._latents(), step=self.count))
        self.step.after_discriminator_update(self.count)
        self.count += 1

    def update_generator(self) -> None:
        """One update of the generator."""
        self._update(1, lambda: self.step.generator(self.real, self._latents(), step=self.count))

    def iteration(self) -> None:
        """What one step of a training loop does."""
        for _ in range(self.work.n_critic):
            self.update_discriminator()
        self.update_generator()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()


def _repeat(run: Callable[[], None], wait: Callable[[], None], seconds: float, least: int = 5) -> list[int]:
    samples: list[int] = []
    end = time.perf_counter() + seconds
    while len(samples) < least or (time.perf_counter() < end and len(samples) < 2000):
        start = time.perf_counter_ns()
        run()
        wait()
        samples.append(time.perf_counter_ns() - start)
    return samples


def _profile(trainer: _Trainer, iterations: int = 3) -> dict[str, Any]:
    """What the GPU does: its busy share of an iteration, and the kernels that take most of it.

    Returns:
        ``gpu_busy_ns`` and ``gpu_kernels`` (launches) an iteration; ``kernels``: name, ns and launches of the longest.
    """
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(iterations):
                trainer.iteration()
            trainer.wait()
        kernels: dict[str, list[float]] = {}
        for event in profiler.events() or ():
            if event.device_type == DeviceType.CUDA:
                entry = kernels.setdefault(event.name, [0.0, 0.0])
                entry[0] += event.device_time * 1e3 / iterations
                entry[1] += 1 / iterations
    except RuntimeError as error:  # no profiler on this machine
        return {"profile": f"not available: {error}"}
    ordered = sorted(kernels.items(), key=lambda item: -item[1][0])
    return {
        "gpu_busy_ns": round(sum(entry[0] for entry in kernels.values())),
        "gpu_kernels": round(sum(entry[1] for entry in kernels.values())),
        "kernels": [[name[:90], round(taken), round(count, 1)] for name, (taken, count) in ordered[:12]],
    }


def _bursts(trainer: _Trainer, seconds: float, length: int = 10) -> list[int]:
    """Time an iteration when the host never waits in between, as in a real loop."""

    def burst() -> None:
        for _ in range(length):
            trainer.iteration()

    return [sample // length for sample in _repeat(burst, trainer.wait, seconds, least=2)]


# ---- in the driver -------------------------------------------------------------------------------


class _Worker:
    """The process of one row.

    Args:
        setting: The row.
        options: Of the command line.
        cores: For its compiler.
    """

    def __init__(self, setting: Setting, options: argparse.Namespace, cores: int) -> None:
        command = [sys.executable, "-m", "benchmarks.training_step", "--one", json.dumps(asdict(setting))]
        command += ["--seconds", str(options.seconds), *(["--cpu"] if options.cpu else [])]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=_environment() | {"TORCHINDUCTOR_COMPILE_THREADS": str(cores)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
        )  # fmt: skip

    def go(self) -> None:
        """It is this worker's turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def line(self) -> dict[str, Any] | None:
        """Its next word, None when it ended instead."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        return json.loads(text) if text else None

    def reason(self) -> str:
        """Why it ended."""
        code = self.process.wait()
        self._said.seek(0)
        said = [line for line in self._said.read().splitlines() if line.strip()]
        errors = [number for number, line in enumerate(said) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
        return _reason(" ".join(said[errors[-1] :]) if errors else said[-1] if said else f"exit code {code}")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._said):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def main(arguments: list[str] | None = None) -> int:
    """Measure every row within the deadline."""
    options = _options(arguments)
    if options.one:
        return _work(options)
    deadline = Deadline(options.deadline)
    wanted = options.only.split("|") if options.only else [""]
    rows = [s for s in settings(options.cpu) if any(text in s.name for text in wanted)]
    planned = [({"name": s.name, **asdict(s)}, {"scenario": "train-step", "sizes": {"batch": s.batch}}) for s in rows]
    results = Results(options.output, "Training step", planned[: options.most])
    rows = rows[: options.most]
    for first in range(0, len(rows), options.wave):
        if deadline.left < (5 if options.cpu else 30):
            break
        _wave(rows[first : first + options.wave], first, results, options, deadline)
    return 0


def _work(options: argparse.Namespace) -> int:
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not stand between the answers

    def say_line(found: dict[str, Any]) -> None:
        os.write(answers, (json.dumps(found) + "\n").encode())

    def turn() -> None:
        say_line({"ready": True})
        sys.stdin.readline()

    device = "cpu" if options.cpu else "cuda"
    say_line(measure(Setting(**json.loads(options.one)), device, options.seconds, turn))
    return 0


def _wave(
    rows: Sequence[Setting], first: int, results: Results, options: argparse.Namespace, deadline: Deadline
) -> None:
    """Prepare some rows side by side, then measure them in turn."""
    begin = time.monotonic()
    compiling = sum(setting.compile != "off" for setting in rows)
    cores = max(1, 2 * (os.cpu_count() or 1) // max(compiling, 1))  # half the time, each traces on one core
    workers = {index: _Worker(setting, options, cores) for index, setting in enumerate(rows, first)}

    def give_up(index: int, reason: str) -> None:
        workers.pop(index).close()
        results.add(index, unavailable=reason)
        say(f"  {rows[index - first].name}: {reason}")

    try:
        for index in _unready(workers, min(options.limit, max(deadline.left - 5, 1))):
            worker = workers[index]
            ended = worker.process.poll() is not None
            late = "not run: the deadline came first" if deadline.left < 6 else f"not ready in {options.limit:.0f} s"
            give_up(index, worker.reason() if ended else late)
        say(f"  {len(workers)} of {len(rows)} are ready after {time.monotonic() - begin:.0f} s")
        for index in list(workers):
            if deadline.left < 3:
                return  # they stand as not run
            worker = workers[index]
            worker.go()
            found = worker.line() if _readable([worker], options.limit) else None
            if found is None:
                give_up(index, worker.reason() if worker.process.poll() is not None else "no result")
                continue
            results.add(index, found["series"], items=found["items"], facts=found["facts"])
            say(f"  {rows[index - first].name}: {_outcome(results.rows[index])}")
            workers.pop(index).close()
    finally:
        for worker in workers.values():
            worker.close()


def _unready(workers: dict[int, _Worker], seconds: float) -> list[int]:
    """Wait until every worker is ready; those that ended or are not."""
    waiting, lost = dict(workers), []
    end = time.monotonic() + seconds
    while waiting and time.monotonic() < end:
        ready = _readable(list(waiting.values()), end - time.monotonic())
        for index, worker in list(waiting.items()):
            if worker in ready:
                del waiting[index]
                if worker.line() is None:
                    worker.process.wait()
                    lost.append(index)
    return lost + list(waiting)


def _readable(workers: Sequence[_Worker], seconds: float) -> list[_Worker]:
    """The workers that have said something (or ended), after at most so long."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            assert worker.process.stdout is not None
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        return [key.data for key, _ in selector.select(max(0.0, seconds))]


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _reason(line: str) -> str:
    if "out of memory" in line.lower():
        return f"out of memory: {line[:200]}"
    kind, _, rest = line.partition(": ")
    return (
        f"not available: {rest or kind}"[:300] if kind.endswith(("UsageError", "ModuleNotFoundError")) else line[:300]
    )


def table(report: Any) -> str:
    """A read report (:class:`ganexport.measurement.Report`) in Markdown: rates, and what the GPU had to do."""
    lines = [
        "| model, batch | how | images/s | × eager fp32 | GPU busy | kernels a step | peak memory, GB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    base: dict[tuple[str, int], float] = {}
    for row in report.measurements:
        if not row.series:
            continue
        about, facts = row.candidate, row.facts
        key = about["model"], about["batch"]
        taken = {s.name: median(list(s.samples)) for s in row.series}
        fastest = min(taken["end_to_end"], taken["pipelined"])
        rate = row.series[0].items / fastest * 1e9
        how = about["name"].partition(": ")[2]
        if how == "eager fp32":
            base[key] = rate
        cells = [f"{key[0]}, {key[1]}", how, f"{rate:,.0f}", f"{rate / base[key]:.2f}" if key in base else "–"]
        cells += [_share(facts.get("gpu_busy_ns"), fastest), str(facts.get("gpu_kernels", "–"))]
        cells += [_memory(facts, graphs=about.get("cuda_graphs") or about["compile"] == "reduce-overhead")]
        lines.append("| " + " | ".join(cells) + " |")
    missing = sum(not row.series for row in report.measurements)
    lines += ["", f"{missing} planned rows were not measured; the result says why."] if missing else []
    return "\n".join(lines) + "\n"


def _memory(facts: dict[str, Any], *, graphs: bool) -> str:
    found = facts.get("reserved_device_bytes" if graphs else "peak_device_bytes")
    return f"{found / 1e9:.2f}" if found else "–"


def _share(busy: float | None, whole: float) -> str:
    return "–" if busy is None else f"{min(1.0, busy / whole):.0%}"


def _outcome(row: dict[str, Any]) -> str:
    if row.get("unavailable"):
        return str(row["unavailable"])
    series = {s["name"]: s for s in row["series"]}
    fastest = min(median(series[name]["samples"]) for name in ("end_to_end", "pipelined"))
    return f"{series['end_to_end']['items'] / fastest * 1e9:,.0f} images/s"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.training_step")
    parser.add_argument("--output", type=Path, default=Path("training.json"), help="JSON file")
    parser.add_argument("--deadline", type=float, default=500.0, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for compiling, and for measuring a row")
    parser.add_argument("--only", default="", help="rows whose name holds this text, or one of several between |")
    parser.add_argument("--most", type=int, help="rows at most")
    parser.add_argument("--wave", type=int, default=22, help="rows that compile side by side")
    parser.add_argument("--seconds", type=float, default=None, help="sampling time of a row")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU, to test this script")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 0.2 if options.cpu else 1.2
    return options


if __name__ == "__main__":
    sys.exit(main())
