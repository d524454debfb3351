"""Ours against the stock ways of running a generator, in one run on this machine's CPU.

    python -m benchmarks.inference [--models dcgan-64,resnet-64] [--output FOLDER]
    python -m benchmarks.tables                 # the tables in README.md and docs/optimisation.md

Stock: the eager module, ``torch.compile`` with frozen weights, TorchScript, ONNX Runtime and OpenVINO on the
file that ``torch.onnx.export`` writes by itself (symbolic batch, nothing of ours), AOTInductor. Ours: what
``ganexport convert --to auto`` publishes, and what it publishes when only fp32 may compete; with ``--all`` also
every format and precision by itself and plain ``torch.compile``. A process each, one awake at a time, taken in
turn; each output is compared with eager fp32. One file a model, so that a run can be split and joined. Generators
are those of ``benchmarks/_models.py``, and shipped trained models by their names; where these make grey digits, the
Fréchet distance from real ones is taken of 10,000 images of ``--to auto``'s and of as many of the fp32 file's.

    python -m benchmarks.inference --work FOLDER --prepare      # exports and converts, measures nothing
    python -m benchmarks.inference --work FOLDER                # measures what lies there, converting what does not
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks._models import MODELS
from benchmarks._rows import say
from ganexport.artifact import MANIFEST, Artifact, write_atomic
from ganexport.bench import roofline
from ganexport.bench.table import print_report, to_markdown
from ganexport.environment import describe, device_key
from ganexport.errors import GanExportError
from ganexport.measure.candidate import Candidate
from ganexport.measure.conductor import Conductor
from ganexport.measure.plan import Plan
from ganexport.measurement import SCHEMA_VERSION, Report, report_to_json
from ganexport.seeding import Sampling
from ganexport.spec import BATCH, GeneratorSpec, spec_to_json

ROOT = Path(__file__).resolve().parent.parent
BATCHES = (1, 16, 64)
#: Range of the batch that is converted and certified.
RANGE = "1:16:64"
#: What ``--all`` adds of ours.
EACH = (("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"), ("onnx", "int8"), ("openvino", "int8"))
OURS = "ganexport"
AUTO, AUTO_FP32 = f"{OURS} auto", f"{OURS} auto fp32"
DEFAULT = ("dcgan-64", "resnet-64", "stylegan2-64")
#: Images on each side of a Fréchet distance.
JUDGED = 10_000


def source_of(model: str) -> str:
    """What ``ganexport convert`` takes for a generator of ours or a shipped model."""
    return f"benchmarks._models:{MODELS[model].__name__}" if model in MODELS else model


def opened(model: str) -> Any:
    """Its module and spec."""
    from ganexport.export.source import Description, open_source

    return open_source(source_of(model), Description())


def _candidate(name: str, factory: str, arguments: dict[str, Any], **about: Any) -> Candidate:
    return Candidate(name, factory, arguments, {"precision": "fp32", "device": "cpu", **about})


def _unavailable(name: str, reason: object, **about: Any) -> Candidate:
    text = " ".join(str(reason).split())[:300]
    return Candidate(name, "", about={"precision": "fp32", "device": "cpu", **about}, unavailable=text)


# ---- stock ---------------------------------------------------------------------------------------


def stock(model: str, folder: Path, wanted: Callable[[str], bool], *, everything: bool) -> Iterator[Candidate]:
    """What a user has without ganexport."""
    function = source_of(model)
    for mode in ("eager", "compile", "compile-frozen"):
        if wanted(mode) and (everything or mode != "compile"):
            arguments = {"source": function, "mode": mode}
            yield _candidate(mode, "ganexport.bench.factories:open_torch", arguments, who="stock")
    source = opened(model)
    text = spec_to_json(source.spec)
    path = folder / "stock.onnx"
    for name, backend, target, make in (
        ("torchscript (trace, freeze)", "torchscript", folder / "stock.pt", _trace),
        ("aoti", "aoti", folder / "stock.pt2", _package),
        ("onnxruntime (stock export)", "onnxruntime", path, _export),
        ("openvino (stock export)", "openvino", path, _export),
    ):
        if wanted(name):
            yield _file(name, backend, target, text, make, source)


def _file(name: str, backend: str, path: Path, spec: str, make: Any, source: Any) -> Candidate:
    try:
        if not path.exists():
            make(source.module.eval(), source.spec, path)
    except Exception as error:  # noqa: BLE001 - a stock exporter may fail in any way: that is its row
        return _unavailable(name, error, who="stock")
    arguments = {"path": str(path), "backend": backend, "device": "cpu", "spec": spec}
    return _candidate(name, "ganexport.bench.factories:open_file", arguments, who="stock")


def _examples(spec: GeneratorSpec, size: int = 2) -> tuple[Any, ...]:
    """One tensor an input, in order."""
    import torch

    feeds = Sampling(spec, {name: n for name, n in spec.sizes().items() if name != BATCH}).draw(0, 0, size)
    return tuple(torch.from_numpy(feeds[tensor.name]) for tensor in spec.inputs)


def _batched(spec: GeneratorSpec) -> tuple[dict[int, Any], ...]:
    """The symbolic batch of each input, as torch.export takes it."""
    import torch

    batch = torch.export.Dim("batch", min=1, max=64)
    return tuple({tensor.shape.index(BATCH): batch} for tensor in spec.inputs)


def _trace(module: Any, spec: GeneratorSpec, path: Path) -> None:
    import torch

    with torch.no_grad():
        torch.jit.freeze(torch.jit.trace(module, _examples(spec))).save(str(path))


def _export(module: Any, spec: GeneratorSpec, path: Path) -> None:
    import torch

    torch.onnx.export(
        module,
        _examples(spec),
        str(path),
        input_names=[tensor.name for tensor in spec.inputs],
        output_names=[tensor.name for tensor in spec.outputs],
        dynamic_shapes=_batched(spec),
        dynamo=True,
        verbose=False,
    )


def _package(module: Any, spec: GeneratorSpec, path: Path) -> None:
    import torch

    with torch.no_grad():
        program = torch.export.export(module, _examples(spec), dynamic_shapes=_batched(spec))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


# ---- ours ----------------------------------------------------------------------------------------


def ours(
    model: str, folder: Path, wanted: Callable[[str], bool], batches: tuple[int, ...], *, everything: bool
) -> Iterator[Candidate]:
    """What ``ganexport convert`` makes: the choice of ``--to auto``; every format and precision if asked for."""
    from ganexport.export.convert import convert

    function = source_of(model)
    for name, precision in ((AUTO, "auto"), (AUTO_FP32, "fp32")):
        if wanted(name):
            yield _auto(name, function, folder, precision, batches)
    for kind, precision in EACH if everything else ():
        backend = {"onnx": "onnxruntime"}.get(kind, kind)
        name = f"{OURS} {backend} {precision}"
        target = folder / f"{kind}-{precision}"
        if not wanted(name):
            continue
        say(f"  converting: {name}")
        try:
            artifact = convert(function, to=[kind], batch=RANGE, output=target, precision=precision, verify_budget=10.0)
            file = artifact.find(kind, precision)
        except (GanExportError, ImportError) as error:
            yield _unavailable(name, error, who="ours", precision=precision)
            continue
        arguments: dict[str, Any] = {"artifact": str(target), "path": file.path, "backend": backend, "device": "cpu"}
        arguments["settings"] = dict(file.settings)
        about = {"who": "ours", "precision": precision, "passes": list(file.passes), "file_bytes": file.bytes}
        yield _candidate(name, "ganexport.bench.factories:open_artifact", arguments, **about)


def _auto(name: str, function: str, folder: Path, precision: str, batches: tuple[int, ...]) -> Candidate:
    """What ``ganexport convert --to auto`` publishes: torch-free at run time, 35 dB or better."""
    from ganexport.export.convert import convert

    source, target = folder / "source", folder / f"auto-{precision}"
    say(f"  converting: {name}")
    try:
        if not source.exists():
            convert(function, to=["onnx"], batch=RANGE, output=source, verify_budget=10.0)
        if (target / MANIFEST).is_file():
            artifact = Artifact(target)
        else:
            artifact = convert(source, to="auto", output=target, precision=precision, bench_batches=batches,
                               verify_budget=30.0, progress=_told)  # fmt: skip
    except (GanExportError, ImportError) as error:
        return _unavailable(name, error, who="ours", precision=precision)
    (file,) = artifact.manifest.files
    settings = {key: value for key, value in file.settings.items() if key != "backend"}
    arguments = {"artifact": str(target), "path": file.path, "backend": file.settings["backend"], "device": "cpu"}
    table = [
        {key: row.get(key) for key in ("name", "milliseconds", "psnr", "verdict", "reason", "passes") if row.get(key)}
        for row in artifact.manifest.report["auto"]["candidates"]
    ]
    worst = [output.worst_psnr for output in file.certificate.outputs] if file.certificate else []
    about = {"who": "ours", "precision": file.precision, "passes": list(file.passes), "file_bytes": file.bytes}
    about |= {"table": table, "certified_psnr": min((p for p in worst if p is not None), default=None)}
    about |= {"certified_drift": file.certificate.frechet_drift if file.certificate else None}
    if file.precision != "fp32":
        about |= quality(target, source)
    return _candidate(name, "ganexport.bench.factories:open_artifact", {**arguments, "settings": settings}, **about)


def quality(artifact: Path, source: Path, count: int = JUDGED) -> dict[str, Any]:
    """Fréchet distances from real digits, of the artifact's images and of the source's for the same latents.

    Empty where the images are no grey digits of 28 pixels, which is what the classifier that ships can judge.
    """
    import ganexport
    from ganexport.data import open_images
    from ganexport.evaluation.backbones import BACKBONES
    from ganexport.frechet import frechet_distance

    image = Artifact(source).spec.image_output
    if image is None or image.layout != "NCHW" or image.shape[1:] != (1, 28, 28):
        return {}
    backbone = BACKBONES.load("digits").backbone()
    real, _ = backbone.features(open_images("mnist-10k").array())
    found = {}
    for key, path in (("frechet", artifact), ("frechet_fp32", source)):
        with ganexport.load(path) as generator:
            features, _ = backbone.features(generator.generate(count, seed=0, batch_size=64))
        found[key] = frechet_distance(real, features)
    return {**found, "frechet_moved": found["frechet"] / found["frechet_fp32"] - 1.0, "frechet_images": count}


def _told(text: str) -> None:
    """What --to auto does; not each of its many turns."""
    if not text.startswith("batch "):
        say(f"    {text}")


# ---- the run -------------------------------------------------------------------------------------


def measure(model: str, options: argparse.Namespace, load: object) -> Report | None:
    """One model: everything in one run; ``load`` is the load average before this program began.

    None when it only had to be prepared.
    """
    environment = describe() | {"load_average": load}
    plan = Plan(
        rounds=options.rounds, turn_seconds=options.seconds / options.rounds, max_warm_seconds=options.warm_up,
        min_iterations=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if options.work is None else options.work / model
        folder.mkdir(parents=True, exist_ok=True)
        say(f"{model}: exporting")

        def wanted(name: str) -> bool:
            return not options.only or any(word in name for word in ("eager", *options.only.split(",")))

        everything = options.all or bool(options.only)
        candidates = [
            *stock(model, folder, wanted, everything=everything),
            *ours(model, folder, wanted, options.batches, everything=everything),
        ]
        if options.prepare:
            for one in candidates:
                say(f"  {one.name}: {one.unavailable or one.about.get('passes', 'ready')}")
            return None
        with Conductor(candidates, plan, lambda text, *_: say(f"  {text}") if options.verbose else None) as conductor:
            conductor.open()
            conductor.measure([("offline" if b > 1 else "single-stream", {"batch": b}) for b in options.batches])
        rows = list(conductor.rows)
        onnx = folder / "stock.onnx"
        if onnx.exists() and not conductor.interrupted:
            from ganexport.bench.api import _measure_peaks

            peak = _measure_peaks("cpu", ["bf16", "fp32"])
            if peak is not None:
                environment["peaks"] = {"cpu": peak}
                rows = roofline.annotate(rows, {"": roofline.count(onnx, opened(model).spec, {})}, {"cpu": peak})
    rows = [msgspec.structs.replace(row, conditions={**row.conditions, "model": model}) for row in rows]
    environment["load_average_after"] = describe()["load_average"]
    command = shlex.join(["python", "-m", "benchmarks.inference", *_repeatable(sys.argv[1:])])
    title = f"{model}: ours against stock"
    notes = (*conductor.notes, *_quality_notes(candidates))
    return Report(SCHEMA_VERSION, title, environment, tuple(rows), notes, command)


def _quality_notes(candidates: list[Candidate]) -> Iterator[str]:
    for one in candidates:
        if (moved := one.about.get("frechet_moved")) is not None:
            yield (
                f"{one.name}: Fréchet distance {one.about['frechet']:.2f} from the real digits, fp32 "
                f"{one.about['frechet_fp32']:.2f} ({moved:+.1%}; {one.about['frechet_images']:,} images each)"
            )


def _repeatable(arguments: Sequence[str]) -> list[str]:
    """The arguments without --work, whose folder is nobody else's."""
    shelf = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shelf.add_argument("--work")
    return shelf.parse_known_args(list(arguments))[1]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and keep the raw samples."""
    from rich.console import Console

    options = _options(arguments)
    load = describe()["load_average"]
    for model in options.models.split(","):
        report = measure(model, options, load)
        if report is None:
            continue
        folder = options.output or ROOT / "benchmarks" / "results" / device_key(report.environment)
        write_atomic(folder / f"inference-{model}.json", report_to_json(report))
        write_atomic(folder / f"inference-{model}.md", to_markdown(report, baseline="eager").encode())
        print_report(report, Console(width=180, highlight=False), baseline="eager")
        if report.interrupted_by:
            return 130
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.inference", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(DEFAULT), help=f"of {', '.join(MODELS)}, or shipped models")
    parser.add_argument("--all", action="store_true", help="every format and precision of ours, and plain compile")
    parser.add_argument("--output", type=Path, help="folder; by default benchmarks/results/<machine>")
    parser.add_argument("--work", type=Path, help="keep what was exported and converted here, and use what is there")
    parser.add_argument("--prepare", action="store_true", help="fill --work and measure nothing")
    parser.add_argument("--only", default="", help="candidates whose names hold one of these words, beside eager")
    parser.add_argument("--batches", type=lambda t: tuple(map(int, t.split(","))), default=BATCHES)
    parser.add_argument("--seconds", type=float, default=2.5, help="sampling time a candidate and batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=float, default=4.0, help="longest warm-up in seconds")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(arguments)
    if options.prepare and options.work is None:
        parser.error("--prepare needs --work FOLDER")
    return options


if __name__ == "__main__":
    sys.exit(main())
