"""Every inference backend on a GPU: eager, torch.compile, TorchScript, ONNX Runtime CUDA, TensorRT.

    PYTHONPATH=. python -m benchmarks.backends --output backends.json [--models dcgan-64,resnet-64]

Generators of :mod:`benchmarks._models` are converted here, side by side. Then, model by model, every candidate runs
in a process of its own: they load side by side, tune themselves and are measured one at a time, in turn, and are
compared with eager fp32. In torch, fp16 is the module's own weights and activations in half precision, in
channels_last, which is the fastest that torch has. A row is written when it is measured; what the deadline cuts off
stands there as not run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks._rows import NOT_RUN, Deadline, Results, say

ROOT = Path(__file__).resolve().parent.parent
#: Model → batches, in order of value.
MODELS: dict[str, tuple[int, ...]] = {
    "dcgan-64": (1, 64),
    "resnet-64": (1, 64),
    "stylegan2-256": (1, 16),
    "rrdbnet": (1,),
    "dcgan-128": (1, 64),
}
REWRITTEN = "+rewritten"
#: torch's own ways (the strongest with CUDA graphs) and files, each with its precisions.
TORCH = {"eager": ("fp32", "tf32", "fp16"), "compile-max-autotune": ("fp16",)}
FILES = {
    "torchscript": ("fp32",),
    "onnxruntime": ("fp32", "fp16"),
    "onnxruntime+graph": ("fp32", "fp16"),
    "onnxruntime+graph+nhwc": ("fp16",),
    "onnxruntime+graph+nhwc+rewritten": ("fp16",),
    "tensorrt": ("fp32", "fp16"),
}
#: Parts of those names → the backend's settings.
SETTINGS = {"graph": "cuda_graph", "nhwc": "nhwc"}
#: What is converted, a process each: formats by precision, those between commas together. Rewritten: transposed
#: convolutions as convolutions, as it pays on processors in bf16.
CONVERSIONS = {"fp32": ("onnx,torchscript", "trt"), "fp16": ("onnx", "trt"), f"fp16{REWRITTEN}": ("onnx",)}
ROUNDS = 4


def main(arguments: list[str] | None = None) -> int:
    """Measure; 0 also when parts were not available."""
    options = _options(arguments)
    if options.convert:
        return _convert(*options.convert)
    if options.warm:
        return _warm(options.warm)
    deadline = Deadline(options.deadline)
    models = {name: MODELS[name] for name in options.models.split(",")}
    if options.cpu:
        models = {"tiny": (1, 4)}
    results = Results(options.output, f"Inference backends: {', '.join(models)}", list(_plan(models, options.cpu)))
    try:
        import ganexport.bench.candidates
        import ganexport.export.convert
        import ganexport.measure.conductor  # noqa: F401
    except ImportError as error:
        for index in range(len(results.rows)):
            results.add(index, unavailable=f"not available: {error}")
        return 0
    _interrupt_at(deadline.left - 2)
    try:
        with tempfile.TemporaryDirectory() as folder:
            artifacts = _convert_all(list(models), options.artifacts or Path(folder), options.cpu, results)
            peaks = _peaks(results, options.cpu)
            for model, batches in models.items():
                say(f"  {model}, {deadline.left:.0f} s left")
                if _one(model, batches, artifacts[model], options.cpu, peaks, results):
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
            for backend, precisions in _wanted(cpu).items():
                for precision in precisions:
                    name = f"{backend} {precision}" + ("" if cpu else " cuda")
                    yield {"name": name}, {"scenario": "offline", "sizes": {"batch": batch}, "model": model}


def _wanted(cpu: bool) -> dict[str, tuple[str, ...]]:
    """Backend → precisions."""
    return {"eager": ("fp32",), "onnxruntime": ("fp32",)} if cpu else {**TORCH, **FILES}


def _interrupt_at(seconds: float) -> None:
    """At the deadline, or when told to end, stop as Ctrl-C does: what was measured is kept."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))


# ---- conversion ----------------------------------------------------------------------------------


def _convert_all(models: Sequence[str], folder: Path, cpu: bool, results: Results) -> dict[str, list[str]]:
    """Artifacts by model; one that cannot be made is a note, not the end."""
    begin = time.monotonic()
    running: list[tuple[str, Path, subprocess.Popen[str]]] = []
    at_once = max(1, (os.cpu_count() or 2) // 2)
    try:
        for model in models:
            for name in ("fp32",) if cpu else tuple(CONVERSIONS):
                while sum(process.poll() is None for *_, process in running) >= at_once:
                    time.sleep(0.1)
                kinds = ["onnx"] if cpu else CONVERSIONS[name]
                target = folder / f"{model}-{name}"
                if (target / "manifest.json").is_file():
                    kinds = []
                command = [sys.executable, "-m", "benchmarks.backends", "--output", "-", "--convert", model, name]
                process = subprocess.Popen(
                    [*command, str(target), *kinds], cwd=ROOT, text=True, start_new_session=True,
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                )  # fmt: skip
                running.append((model, target, process))
        made: dict[str, list[str]] = {model: [] for model in models}
        for model, target, process in running:
            said = process.communicate()[1]
            if (target / "manifest.json").is_file():
                made[model].append(str(target))
            for line in said.splitlines():
                if line.startswith("error: "):
                    results.note(f"{target.name}: {line[7:]}")
    finally:
        for *_, process in running:
            process.kill()
    say(f"  converted in {time.monotonic() - begin:.0f} s")
    return made


def _convert(model: str, name: str, target: str, *kinds: str) -> int:
    """Convert one model, in this process; engines from its ONNX file, so that one that fails costs the file nothing."""
    from benchmarks._models import MODELS as FACTORIES
    from ganexport.errors import GanExportError
    from ganexport.export.convert import convert

    precision = name.removesuffix(REWRITTEN)
    source = f"benchmarks._models:{FACTORIES[model].__name__}"
    if name != precision:
        source = _rewritten(source, Path(f"{target}.onnx"))
    for kind in kinds:
        try:
            convert(source, to=kind.split(","), output=target, precision=precision, verify_budget=5.0)
        except (GanExportError, ImportError, RuntimeError) as error:
            say(f"error: to {kind}: {' '.join(str(error).split())[:300]}")
        source = target if Path(target, "manifest.json").is_file() else source
    return 0


def _rewritten(source: str, path: Path) -> str:
    """The fp32 ONNX file of a source, rewritten."""
    from ganexport.build import onnx_file
    from ganexport.build.cost import Target
    from ganexport.build.rewrites import rewrite
    from ganexport.export.convert import convert

    with tempfile.TemporaryDirectory() as folder:
        plain = convert(source, to="onnx", output=Path(folder) / "plain", verify_budget=5.0)
        model = onnx_file.load_model(plain.path / plain.manifest.files[0].path)
        changed, _ = rewrite(model, Target("openvino", "bf16", 64))
        onnx_file.write_spec(changed, plain.spec)
        onnx_file.save_model(changed, path)
    return str(path)


def _warm(models: str) -> int:
    """Let torch.compile tune itself for some models; what it finds stays in its cache on disk."""
    from ganexport.measure.feeds import draw

    for model in models.split(","):
        for mode, precisions in TORCH.items():
            for precision in precisions if mode != "eager" else ():
                with open_torch(model, mode, "cuda", precision) as runner:
                    for batch in MODELS[model]:
                        begin = time.monotonic()
                        for _ in range(2):
                            runner.run(draw(runner.spec, {"batch": batch}))
                        say(f"  {model} {mode} {precision}, batch {batch}: {time.monotonic() - begin:.0f} s")
    return 0


# ---- measuring -----------------------------------------------------------------------------------


def open_torch(model: str, mode: str, device: str, precision: str) -> Any:
    """A model of :mod:`benchmarks._models` under torch, as a runner."""
    from benchmarks._models import MODELS as FACTORIES
    from ganexport.bench.factories import module_runner

    module, spec = FACTORIES[model]()
    if precision == "fp16":
        module, precision = _half(module), "fp32"  # in itself: no autocast around it
    return module_runner(module, spec, mode=mode, device=device, precision=precision)


def _half(module: Any) -> Any:
    """The module in float16 and channels_last, float32 in and out as exported files are."""
    import torch

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module.half().to(memory_format=torch.channels_last)

        def forward(self, *inputs: Any) -> Any:
            return self.module(*(x.half() for x in inputs)).float()

    return Half()


def _candidates(model: str, artifacts: Sequence[str], cpu: bool) -> list[Any]:
    from ganexport.bench.candidates import find_candidates
    from ganexport.measure.candidate import Candidate

    device = "cpu" if cpu else "cuda"
    found = []
    for mode, precisions in TORCH.items():
        for precision in precisions:
            if precision not in _wanted(cpu).get(mode, ()):
                continue
            about = {"backend": mode, "precision": precision, "device": device, "format": "torch"}
            arguments = {"model": model, "mode": mode, "device": device, "precision": precision}
            name = f"{mode} {precision}" + ("" if cpu else " cuda")
            found.append(Candidate(name, "benchmarks.backends:open_torch", arguments, about))
    for artifact in artifacts:
        rewritten = artifact.endswith(REWRITTEN)
        ways = [name for name in _wanted(cpu) if name in FILES and name.endswith(REWRITTEN) == rewritten]
        backends = sorted({name.partition("+")[0] for name in ways})
        for candidate in find_candidates([artifact], backends=backends, devices=(device,)):
            found += [
                _with(candidate, way)
                for way in ways
                if way.partition("+")[0] == candidate.about.get("backend")
                and candidate.about.get("precision") in _wanted(cpu)[way]
            ]
    return found


def _with(candidate: Any, way: str) -> Any:
    """A candidate under the settings of a way to run it, and its name."""
    import msgspec

    if "+" not in way:
        return candidate
    chosen = {SETTINGS[part]: True for part in way.split("+") if part in SETTINGS}
    settings = candidate.arguments.get("settings", {}) | chosen
    name = candidate.name.replace(candidate.about["backend"], way, 1)
    return msgspec.structs.replace(candidate, name=name, arguments=candidate.arguments | {"settings": settings})


def _one(
    model: str, batches: tuple[int, ...], artifacts: Sequence[str], cpu: bool, peaks: dict[str, Any], results: Results
) -> bool:
    """Measure one model; whether it was interrupted."""
    import msgspec

    from ganexport.bench import roofline
    from ganexport.bench.candidates import onnx_file_of
    from ganexport.measure.conductor import Conductor
    from ganexport.measure.plan import Plan
    from ganexport.measurement import Measurement
    from ganexport.runtime import BACKENDS

    file = onnx_file_of(artifacts)
    costs = {"": roofline.count(file, None, {})} if file is not None else {}

    def put(row: Measurement) -> None:
        built = msgspec.json.decode(msgspec.json.encode(roofline.annotate([row], costs, peaks)[0]))
        built["conditions"]["model"] = model
        key = (built["candidate"]["name"], model, built["conditions"]["sizes"])
        for index, planned in enumerate(results.rows):
            if (planned["candidate"]["name"], planned["conditions"]["model"], planned["conditions"]["sizes"]) == key:
                results.rows[index] = built
                break
        else:
            results.rows.append(built)
        results.write()

    plan = Plan(
        rounds=2 if cpu else ROUNDS,
        turn_seconds=0.1,
        min_warm_seconds=0.1,
        max_warm_seconds=0.5 if cpu else 0.8,
        parity_batches=batches[:2],
        opening=1 if cpu else 8,
        max_iterations=400,
    )
    begin = time.monotonic()

    def progress(text: str, _done: int, _total: int) -> None:
        if text.startswith("open") or ": warm" in text:
            say(f"    {time.monotonic() - begin:4.0f} s {text}")

    with Conductor(_candidates(model, artifacts, cpu), plan, progress, put) as conductor:
        conductor.open()
        conductor.measure([("offline", {"batch": batch}) for batch in batches])
    for row in results.rows:
        backend = row["candidate"]["name"].partition(" ")[0]
        if row["conditions"]["model"] == model and row.get("unavailable") == NOT_RUN and backend in FILES:
            row["unavailable"] = BACKENDS.load(backend.partition("+")[0]).RUNNER.unavailable() or NOT_RUN
    for note in conductor.notes:
        results.note(f"{model}: {note}")
    for row in results.rows:
        if row["conditions"]["model"] == model:
            say(f"    {_line(row)}")
    return conductor.interrupted


def _line(row: dict[str, Any]) -> str:
    from benchmarks._rows import median

    name = f"{row['candidate']['name']}, batch {row['conditions']['sizes']['batch']}"
    if row.get("unavailable"):
        return f"{name}: {row['unavailable']}"
    series = {s["name"]: median(s["samples"]) / 1e3 for s in row["series"]}
    return (
        f"{name}: "
        + ", ".join(f"{key} {value:.1f} us" for key, value in series.items())
        + f"; {_quality(row.get('parity') or {})}"
    )


def _quality(parity: dict[str, Any]) -> str:
    return str(parity.get("verdict", "")) + (f", {parity['psnr']:.0f} dB" if parity.get("psnr") else "")


def table(report: Any) -> str:
    """A read report (:class:`ganexport.measurement.Report`) in Markdown, with each row against the compiled one."""
    lines = [
        "| model, batch | how | whole call, µs | compute, µs | back to back, µs | of peak | × compiled | parity |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    taken: dict[tuple[str, int], dict[str, float]] = {}
    for row in report.measurements:
        if row.series:
            key = row.conditions["model"], row.conditions["sizes"]["batch"]
            taken.setdefault(key, {})[row.candidate["name"]] = _medians(row)["end_to_end"]
    for row in report.measurements:
        if not row.series:
            continue
        key = row.conditions["model"], row.conditions["sizes"]["batch"]
        name, medians = row.candidate["name"], _medians(row)
        best = taken[key].get("compile-max-autotune fp16 cuda")
        cells = [f"{key[0]}, {key[1]}", name.removesuffix(" cuda")]
        cells += [f"{medians[part]:,.0f}" for part in ("end_to_end", "compute", "pipelined")]
        roofline = row.facts.get("roofline") or {}
        cells += [f"{roofline['share']:.1%}" if "share" in roofline else "–"]
        cells += [f"{best / medians['end_to_end']:.2f}" if best else "–", _quality(row.parity or {})]
        lines.append("| " + " | ".join(cells) + " |")
    missing = [row.unavailable for row in report.measurements if not row.series]
    lines += ["", f"{len(missing)} planned rows were not measured; the result says why."] if missing else []
    return "\n".join(lines) + "\n"


def _medians(row: Any) -> dict[str, float]:
    """Microseconds by series."""
    from benchmarks._rows import median

    return {series.name: median(list(series.samples)) / 1e3 for series in row.series}


def _peaks(results: Results, cpu: bool) -> dict[str, Any]:
    """What the card reaches at best, for the roofline."""
    if cpu:
        return {}
    from ganexport.measure.candidate import Candidate
    from ganexport.measure.process import CandidateFailedError, WorkerProcess

    with WorkerProcess(Candidate("peaks", "")) as worker:
        try:
            arguments = {"device": "cuda", "precisions": ["fp32", "tf32", "fp16"]}
            answer = worker.ask("call", 60, function="ganexport.measure.peaks:measure", arguments=arguments)
        except CandidateFailedError as failure:
            results.note(f"peaks: {failure}")
            return {}
    peaks = {"cuda": answer["value"]}
    results.head["environment"]["peaks"] = peaks
    say(f"  peaks: {answer['value']}")
    return peaks


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.backends")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--deadline", type=float, default=500.0, help="seconds")
    parser.add_argument("--models", default=",".join(MODELS), help="of these, in this order")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU, to test this script")
    parser.add_argument("--artifacts", type=Path, help="folder of the conversions, kept and used again")
    parser.add_argument("--warm", help="only let torch.compile tune itself for these models, into its cache on disk")
    parser.add_argument("--convert", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on disk, and what the alarm interrupted (an import, a compilation) cannot be torn down in order.
    os._exit(code)
