"""Every inference backend on a GPU: eager, torch.compile, TorchScript, ONNX Runtime CUDA, TensorRT.

    PYTHONPATH=. python -m benchmarks.backends --output backends.json

Generators of :mod:`benchmarks._models` are converted here, each file is compared with eager fp32, and
every candidate runs in a process of its own, taken in turn. A row is written when it is measured; what
the deadline cuts off stands there as not run.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._rows import Deadline, Results, say

#: Model → batches, in order of value.
MODELS = {"dcgan-64": (1, 16, 64, 256), "resnet-64": (1, 64, 256), "dcgan-128": (1, 64)}
#: torch candidates: the plain module, and the strongest that torch itself offers (CUDA graphs included).
TORCH = {"eager": ("fp32", "tf32", "fp16"), "compile-max-autotune": ("tf32", "fp16")}
FILES = {"torchscript": ("fp32",), "onnxruntime": ("fp32", "fp16"), "tensorrt": ("fp32", "fp16")}


def main(arguments: list[str] | None = None) -> int:
    """Measure; 0 also when parts were not available."""
    options = _options(arguments)
    deadline = Deadline(options.deadline)
    models = {"tiny": (1, 4)} if options.cpu else MODELS
    results = Results(options.output, f"Inference backends: {', '.join(models)}", list(_plan(models, options.cpu)))
    try:
        import ganexport.bench.api
        import ganexport.export.convert  # noqa: F401
    except ImportError as error:
        for index in range(len(results.rows)):
            results.add(index, unavailable=f"not available: {error}")
        return 0
    _interrupt_at(deadline.left - 2)
    try:
        for model, batches in models.items():
            say(f"  {model}, {deadline.left:.0f} s left")
            if _one(model, batches, options.cpu, results):
                break
    except BaseException as error:
        # The alarm may strike inside a library's import or compiler, which turn it into errors of their own.
        if not isinstance(error, KeyboardInterrupt) and deadline.left > 2:
            raise
        results.note("stopped at the deadline")
    return 0


def _plan(models: dict[str, tuple[int, ...]], cpu: bool) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for model, batches in models.items():
        for batch in batches:
            for backend, precisions in _candidates(cpu).items():
                for precision in precisions:
                    name = f"{backend} {precision}" + ("" if cpu else " cuda")
                    yield {"name": name}, {"scenario": "offline", "sizes": {"batch": batch}, "model": model}


def _candidates(cpu: bool) -> dict[str, tuple[str, ...]]:
    """Backend → precisions."""
    return {"eager": ("fp32",), "onnxruntime": ("fp32",)} if cpu else {**TORCH, **FILES}


def _interrupt_at(seconds: float) -> None:
    """At the deadline, or when told to end, stop as Ctrl-C does: what was measured is kept."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))


def _one(model: str, batches: tuple[int, ...], cpu: bool, results: Results) -> bool:
    """Convert and measure one model; whether it was interrupted."""
    from ganexport.bench.api import benchmark
    from ganexport.measure.candidate import Candidate
    from ganexport.measurement import Measurement

    function = f"benchmarks._models:{model.replace('-', '')}"

    def keep(candidate: Candidate) -> bool:
        backend, precision = candidate.about["backend"], candidate.about.get("precision")
        return precision in _candidates(cpu).get(backend, ())

    def put(row: Measurement) -> None:
        import msgspec

        built = msgspec.json.decode(msgspec.json.encode(row))
        built["candidate"]["name"] = name = re.sub(r"^[^ ]+: ", "", built["candidate"]["name"])
        built["conditions"]["model"] = model
        key = (name, model, built["conditions"]["sizes"])
        for index, planned in enumerate(results.rows):
            if (planned["candidate"]["name"], planned["conditions"]["model"], planned["conditions"]["sizes"]) == key:
                results.rows[index] = built
                break
        else:
            results.rows.append(built)
        results.write()

    with tempfile.TemporaryDirectory() as folder:
        report = benchmark(
            function,
            *_convert(function, Path(folder), cpu, results),
            devices=("cpu",) if cpu else ("cuda",),
            backends=tuple(_candidates(cpu)),
            batches=batches,
            scenarios=("offline",),
            precisions=("fp32",) if cpu else ("fp32", "tf32", "fp16"),
            seconds=0.2 if cpu else 1.0,
            rounds=2 if cpu else 5,
            warm_up=0.5 if cpu else 3.0,
            peaks=not cpu,
            keep=keep,
            on_row=put,
        )
    for row in report.measurements:  # once more, now with their share of the peak
        put(row)
    if "peaks" in report.environment:
        results.head["environment"]["peaks"] = report.environment["peaks"]
    for note in report.notes:
        results.note(f"{model}: {note}")
    return bool(report.interrupted_by)


def _convert(function: str, folder: Path, cpu: bool, results: Results) -> list[str]:
    """Artifacts of every format and precision; one that cannot be made is a note, not the end."""
    from ganexport.errors import GanExportError
    from ganexport.export.convert import convert

    wanted = [("onnx", "fp32"), ("torchscript", "fp32"), ("trt", "fp32"), ("onnx", "fp16"), ("trt", "fp16")]
    made = []
    for kind, precision in wanted[:1] if cpu else wanted:
        target = folder / f"{kind}-{precision}"
        try:
            convert(function, to=[kind], output=target, precision=precision, verify_budget=5.0)
            made.append(str(target))
        except (GanExportError, ImportError, RuntimeError) as error:
            results.note(f"{function.partition(':')[2]} to {kind} {precision}: {error}")
    return made


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.backends")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--deadline", type=float, default=500.0, help="seconds")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU, to test this script")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on disk, and what the alarm interrupted (an import, a compilation) cannot be torn down in order.
    os._exit(code)
