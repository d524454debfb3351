"""Does ganexport's harness read the same as an independent one? MLCommons LoadGen beside it, in one run.

    pip install mlcommons-loadgen
    python -m benchmarks.loadgen [--model dcgan-64] [--output loadgen.json]

Both drive the same ONNX file through ONNX Runtime with the same threads and optimisations, in a process
each, in turn: single-stream (batch 1) and offline (``--batch``). LoadGen (github.com/mlcommons/inference,
loadgen/) makes its own queries, reads its own clock and computes its own figures; its trace gives the raw
samples, its summary is kept beside them. Exit code 1 when the medians differ by more than ``--within``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks._rows import say
from ganexport import stats
from ganexport.artifact import write_atomic
from ganexport.bench.digest import rounds_of
from ganexport.environment import describe, device_key
from ganexport.measure.candidate import Candidate
from ganexport.measure.process import WorkerProcess
from ganexport.measurement import SCHEMA_VERSION, Measurement, Report, Series, report_to_json
from ganexport.spec import spec_to_json

ROOT = Path(__file__).resolve().parent.parent
OURS, THEIRS = "ganexport", "mlcommons-loadgen"
_SUT = "benchmarks._loadgen_sut"


class Row:
    """Samples of one harness in one scenario, turn by turn."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.sizes: list[int] = []
        self.says: list[dict[str, Any]] = []

    def add(self, samples: list[int], says: dict[str, Any] | None = None) -> None:
        """Take one turn."""
        self.samples += samples
        self.sizes.append(len(samples))
        if says:
            self.says.append(says)


def measure(model: str, options: argparse.Namespace) -> Report:
    """Both harnesses in both scenarios."""
    from benchmarks._models import MODELS

    module, spec = MODELS[model]()
    environment = describe()
    with tempfile.TemporaryDirectory(prefix="ganexport-loadgen-") as temporary:
        path = Path(temporary) / f"{model}.onnx"
        say(f"{model}: exporting")
        _export(module, path)
        ours = WorkerProcess(Candidate(OURS, "", variables={"OMP_NUM_THREADS": str(options.threads)}))
        theirs = WorkerProcess(Candidate(THEIRS, "", variables={"OMP_NUM_THREADS": str(options.threads)}))
        with ours, theirs:
            arguments = {
                "path": str(path),
                "backend": "onnxruntime",
                "device": "cpu",
                "spec": spec_to_json(spec),
                "settings": {"threads": options.threads},
            }
            opened = ours.ask("open", factory="ganexport.bench.factories:open_file", arguments=arguments)
            ours.pause()
            about = _call(theirs, "open_model", path=str(path), threads=options.threads)
            rows = []
            for scenario, batch in (("single-stream", 1), ("offline", options.batch)):
                pair = _scenario(ours, theirs, scenario, batch, options)
                rows.append(_row(OURS, opened["runtime"], "ganexport", scenario, batch, options, pair[0]))
                rows.append(_row(THEIRS, about["runtime"], about["harness"], scenario, batch, options, pair[1]))
    environment["load_average_after"] = describe()["load_average"]
    command = shlex.join(["python", "-m", "benchmarks.loadgen", *sys.argv[1:]])
    return Report(SCHEMA_VERSION, f"{model}: ganexport and LoadGen", environment, tuple(rows), (), command)


def _scenario(
    ours: WorkerProcess, theirs: WorkerProcess, scenario: str, batch: int, options: argparse.Namespace
) -> tuple[Row, Row]:
    ours.ask("prepare", sizes={"batch": batch})
    ours.ask("warm", min_seconds=0.3, max_seconds=options.warm_up)
    first = ours.ask("turn", seconds=0.3, min_iterations=3, max_iterations=1000)["series"]["end_to_end"]
    ours.pause()
    latency = int(stats.percentile(first, 50))
    warm: dict[str, Any] = {"scenario": scenario, "batch": batch, "latency_ns": latency}
    _call(theirs, "turn", **warm, seconds=1.0)
    mine, other = Row(), Row()
    turn_seconds = options.seconds / options.rounds
    for index in range(options.rounds):
        say(f"  {scenario} batch {batch}: round {index + 1} of {options.rounds}")
        for name in (OURS, THEIRS) if index % 2 == 0 else (THEIRS, OURS):
            if name == OURS:
                found = ours.ask("turn", seconds=turn_seconds, min_iterations=3, max_iterations=100_000)
                ours.pause()
                mine.add(found["series"]["end_to_end"])
            else:
                found = _call(theirs, "turn", **warm, seconds=turn_seconds)
                other.add(found["samples"], found["says"])
    return mine, other


def _call(worker: WorkerProcess, function: str, **arguments: Any) -> dict[str, Any]:
    answer: dict[str, Any] = worker.ask("call", function=f"{_SUT}:{function}", arguments=arguments)["value"]
    worker.pause()
    return answer


def _row(
    name: str, runtime: str, harness: str, scenario: str, batch: int, options: argparse.Namespace, row: Row
) -> Measurement:
    about = {"name": name, "harness": harness, "runtime": runtime, "backend": "onnxruntime", "precision": "fp32"}
    about |= {"device": "cpu", "threads": options.threads}
    conditions = {"scenario": scenario, "sizes": {"batch": batch}, "items": batch, "rounds": options.rounds}
    conditions["turn_seconds"] = options.seconds / options.rounds
    facts: dict[str, Any] = {"round_sizes": {"end_to_end": row.sizes}}
    if row.says:
        facts["loadgen_summaries"] = row.says
    return Measurement(about, conditions, (Series("end_to_end", tuple(row.samples), batch),), facts=facts)


def _export(module: Any, path: Path) -> None:
    """torch's own exporter, symbolic batch: nothing of ganexport is in the file that both harnesses run."""
    import numpy as np
    import torch

    example = torch.from_numpy(np.zeros((2, 128), np.float32))
    torch.onnx.export(
        module,
        (example,),
        str(path),
        input_names=["z"],
        output_names=["image"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},),
        dynamo=True,
        verbose=False,
    )


def agreement(report: Report) -> list[tuple[str, int, float, float, stats.Interval]]:
    """(scenario, batch, our median ms, LoadGen's median ms, ours over LoadGen's with its interval)."""
    rows = {(str(r.conditions["scenario"]), str(r.candidate["name"])): r for r in report.measurements}
    found = []
    for scenario in dict.fromkeys(scenario for scenario, _ in rows):
        ours, theirs = (rounds_of(rows[scenario, name], "end_to_end") for name in (OURS, THEIRS))
        own, other = (stats.median_interval(rounds).value for rounds in (ours, theirs))
        batch = int(rows[scenario, OURS].conditions["sizes"]["batch"])
        found.append((scenario, batch, own, other, stats.ratio_interval(ours, theirs)))
    return found


def table(report: Report) -> str:
    """The comparison as Markdown."""
    lines = ["| scenario | ganexport, median | LoadGen, median | ratio | LoadGen's own figure, median of its turns |"]
    lines.append("|---|---:|---:|---:|---:|")
    for scenario, batch, ours, theirs, ratio in agreement(report):
        own = _own_figure(report, scenario)
        lines.append(
            f"| {scenario}, batch {batch} | {ours:.3f} ms | {theirs:.3f} ms | "
            f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] | {own} |"
        )
    return "\n".join(lines) + "\n"


def _own_figure(report: Report, scenario: str) -> str:
    row = next(r for r in report.measurements if r.candidate["name"] == THEIRS and r.conditions["scenario"] == scenario)
    if scenario == "single-stream":
        values = [float(s["50.00 percentile latency (ns)"]) / 1e6 for s in row.facts["loadgen_summaries"]]
        return f"{stats.percentile(values, 50):.3f} ms at p50"
    rates = [float(s["Samples per second"]) for s in row.facts["loadgen_summaries"]]
    ours = next(r for r in report.measurements if r.candidate["name"] == OURS and r.conditions["scenario"] == scenario)
    medians = stats.median_interval(rounds_of(ours, "end_to_end")).value
    rate = ours.conditions["items"] * 1e3 / medians
    return f"{stats.percentile(rates, 50):,.0f} images/s (ganexport {rate:,.0f})"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, keep the raw samples; 1 when the two differ."""
    options = _options(arguments)
    if find_spec("mlperf_loadgen") is None:
        say("benchmarks.loadgen: needs MLCommons LoadGen: pip install mlcommons-loadgen")
        return 2
    report = measure(options.model, options)
    path = options.output or ROOT / "benchmarks" / "results" / device_key(report.environment) / "loadgen.json"
    write_atomic(path, report_to_json(report))
    print(table(report), end="")
    apart = [
        (s, r.value)
        for s, _, _, _, r in agreement(report)
        if not 1 / (1 + options.within) <= r.value <= 1 + options.within
    ]
    for scenario, ratio in apart:
        say(f"{scenario}: the medians differ by {abs(ratio - 1):.1%}, more than {options.within:.0%}")
    return 1 if apart else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.loadgen", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="dcgan-64", help="of benchmarks/_models.py")
    parser.add_argument("--batch", type=int, default=16, help="of the offline scenario")
    parser.add_argument("--threads", type=int, default=len(__import__("os").sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=10.0, help="sampling time of each harness and scenario")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-up", type=float, default=8.0, help="longest warm-up in seconds")
    parser.add_argument("--within", type=float, default=0.05, help="share by which the medians may differ")
    parser.add_argument("--output", type=Path, help="JSON; by default benchmarks/results/<machine>/loadgen.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
