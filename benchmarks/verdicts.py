"""How often is the harness right? Identical candidates, and one that is 10 % slower, over and over.

    python -m benchmarks.verdicts [--pairs known,onnxruntime] [--runs 20] [--output verdicts.json]

Every run is a whole measurement with fresh processes, of at most a minute, taken and judged as by
``ganexport bench --within 5%`` (5 % threshold, 95 % interval). ``known`` takes a known time with known scatter;
``onnxruntime`` is real work, a chain of identical convolutions, 20 in the one and 22 in the slower one. Exit code 1
when either kind of pair is called rightly in fewer than 19 of 20 runs.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks._rows import say
from ganexport import stats
from ganexport.artifact import write_atomic
from ganexport.bench.digest import rounds_of
from ganexport.environment import describe, device_key
from ganexport.measure.candidate import Candidate
from ganexport.measure.conductor import Conductor
from ganexport.measure.plan import Plan
from ganexport.measurement import SCHEMA_VERSION, Measurement, Report, report_from_json, report_to_json
from ganexport.runtime.base import Feeds, Runner
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec, spec_to_json

ROOT = Path(__file__).resolve().parent.parent
#: Verdict that is right for each kind of pair.
RIGHT = {"identical": "equal", "10 % slower": "slower"}
PAIRS = ("known", "onnxruntime")
LAYERS, MORE = 20, 22
THRESHOLD = 0.05
_CHANNELS, _SIDE = 16, 16


class KnownRunner(Runner):
    """Takes ``milliseconds`` times exp(N(0, 0.05²)), asleep: its median is known whatever else the machine does."""

    backend = "known"

    def __init__(self, milliseconds: float, seed: int) -> None:
        super().__init__()
        self.spec = GeneratorSpec(
            (TensorSpec("z", "float32", ("batch", 4), Normal()),),
            (TensorSpec("image", "float32", ("batch", 4), range=(-1.0, 1.0)),),
            (Dim("batch", 1, 1, 8),),
        )
        self.device, self.runtime = "cpu", "known 1.0"
        self._generator = np.random.Generator(np.random.Philox(seed))
        self._milliseconds, self._end = milliseconds, 0.0
        self._feeds: Feeds = {}

    @classmethod
    def unavailable(cls) -> str | None:
        """Always available."""
        return None

    @classmethod
    def _open(cls, *_: Any, **__: Any) -> KnownRunner:
        """It opens no files."""
        raise NotImplementedError

    def prepare(self, feeds: Any) -> None:
        """Keep the inputs."""
        self._feeds = feeds

    def launch(self) -> None:
        """Begin to sleep."""
        self._end = time.perf_counter() + self._milliseconds / 1e3 * math.exp(self._generator.normal(0, 0.05))

    def synchronize(self) -> None:
        """Sleep to the end."""
        while (left := self._end - time.perf_counter()) > 0:
            time.sleep(left)

    def fetch(self) -> dict[str, Any]:
        """An answer."""
        return {"image": np.tanh(self._feeds["z"])}

    def close(self) -> None:
        """Nothing to release."""
        self._closed = True


def known(milliseconds: float, seed: int) -> Runner:
    """What the worker calls."""
    return KnownRunner(milliseconds, seed)


def chain(path: Path, layers: int) -> GeneratorSpec:
    """Write an ONNX file of ``layers`` equal 3x3 convolutions; its time grows with their number."""
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    nodes, weights, name = [], [], "z"
    for index in range(layers):
        kernel = draw.standard_normal((_CHANNELS, _CHANNELS, 3, 3)).astype(np.float32) / math.sqrt(9 * _CHANNELS)
        weights.append(numpy_helper.from_array(kernel, f"w{index}"))
        result = "image" if index == layers - 1 else f"h{index}"
        nodes.append(helper.make_node("Conv", [name, f"w{index}"], [result], pads=[1, 1, 1, 1]))
        name = result
    shape = ("batch", _CHANNELS, _SIDE, _SIDE)
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    inputs = (TensorSpec("z", "float32", shape, Normal()),)
    return GeneratorSpec(inputs, (TensorSpec("image", "float32", shape),), (Dim("batch", 1, 1, 8),))


def candidates(pair: str, kind: str, run: int, folder: Path, threads: int) -> list[Candidate]:
    """The old one and the new one."""
    slower = kind != "identical"
    if pair == "known":
        times = (2.0, 2.2 if slower else 2.0)
        return [
            Candidate(name, "benchmarks.verdicts:known", {"milliseconds": ms, "seed": 2 * run + i})
            for i, (name, ms) in enumerate(zip(("old", "new"), times, strict=True))
        ]
    found = []
    for name, layers in (("old", LAYERS), ("new", MORE if slower else LAYERS)):
        path = folder / f"chain{layers}.onnx"
        spec = chain(path, layers)
        arguments = {
            "path": str(path),
            "backend": "onnxruntime",
            "device": "cpu",
            "spec": spec_to_json(spec),
            "settings": {"threads": threads},
        }
        about = {"backend": "onnxruntime", "layers": layers, "threads": threads}
        variables = {"OMP_NUM_THREADS": str(threads)}
        found.append(Candidate(name, "ganexport.bench.factories:open_file", arguments, about, variables))
    return found


def measure(options: argparse.Namespace, before: Report | None = None) -> Report:
    """Every run of every pair that ``before`` does not hold yet; after Ctrl-C what was measured stays."""
    plan = Plan(
        rounds=options.rounds,
        turn_seconds=options.seconds / options.rounds,
        within=THRESHOLD,
        at_most_seconds=options.longest,
        max_warm_seconds=2,
        reference="",
    )
    rows: list[Measurement] = list(before.measurements) if before else []
    environment = before.environment if before else describe()
    done = {_key(row) for row in rows}
    planned = [(pair, kind, run) for run in range(options.runs) for pair in options.pairs for kind in RIGHT]
    note, end = "", time.monotonic() + options.at_most
    with tempfile.TemporaryDirectory(prefix="ganexport-verdicts-") as temporary:
        for pair, kind, run in planned:
            if (pair, kind, run) in done:
                continue
            if time.monotonic() > end:
                note = "unfinished: go on with --continue"
                break
            start = time.perf_counter()
            with Conductor(candidates(pair, kind, run, Path(temporary), options.threads), plan) as conductor:
                conductor.open()
                conductor.measure([("single-stream", {"batch": 1})])
            if conductor.interrupted:
                note = "interrupted: go on with --continue"
                break
            took, load = round(time.perf_counter() - start, 1), describe()["load_average"]
            about = {"pair": pair, "kind": kind, "run": run, "took_seconds": took, "load_average": load}
            new = [_slim(row, about) for row in conductor.rows]
            rows += new
            found = judge(*new)
            ratio = found.ratio
            words = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] {found.verdict}"
            say(f"run {run + 1} {pair} {kind}: {words} ({took} s, load {load})")
    words = shlex.join(["python", "-m", "benchmarks.verdicts", *(a for a in sys.argv[1:] if a != "--continue")])
    notes = (note,) if note else ()
    return Report(SCHEMA_VERSION, "How often the verdict is right", environment, tuple(rows), notes, words)


def _key(row: Measurement) -> tuple[str, str, int]:
    return str(row.conditions["pair"]), str(row.conditions["kind"]), int(row.conditions["run"])


def _slim(row: Measurement, about: dict[str, Any]) -> Measurement:
    """The row with what the verdict needs, and in which run it was taken."""
    series = tuple(s for s in row.series if s.name == "end_to_end")
    facts = {"round_sizes": {"end_to_end": row.facts["round_sizes"]["end_to_end"]}}
    return msgspec.structs.replace(row, conditions={**row.conditions, **about}, series=series, facts=facts)


def judge(old: Measurement, new: Measurement) -> stats.Comparison:
    """The verdict about one run."""
    return stats.compare(rounds_of(new, "end_to_end"), rounds_of(old, "end_to_end"), threshold=THRESHOLD)


def counts(report: Report) -> dict[tuple[str, str], dict[str, int]]:
    """(pair, kind) → verdict → how often."""
    runs: dict[tuple[str, str, int], dict[str, Measurement]] = {}
    for row in report.measurements:
        runs.setdefault(_key(row), {})[str(row.candidate["name"])] = row
    found: dict[tuple[str, str], dict[str, int]] = {}
    for (pair, kind, _), rows in runs.items():
        verdict = judge(rows["old"], rows["new"]).verdict
        verdicts = found.setdefault((pair, kind), {})
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
    return found


def table(report: Report) -> str:
    """How often each verdict was given, as Markdown."""
    lines = [
        "| pair | truth | called rightly | otherwise | longest run | load |",
        "|---|---|---:|---|---:|---:|",
    ]
    for (pair, kind), verdicts in counts(report).items():
        rows = [r for r in report.measurements if (r.conditions["pair"], r.conditions["kind"]) == (pair, kind)]
        other = ", ".join(f"{verdict} {n}" for verdict, n in verdicts.items() if verdict != RIGHT[kind]) or "–"
        took = max(float(r.conditions["took_seconds"]) for r in rows)
        loads = [float(r.conditions["load_average"]) for r in rows]
        lines.append(
            f"| {pair} | {kind} | {verdicts.get(RIGHT[kind], 0)} of {sum(verdicts.values())} | {other} "
            f"| {took:.0f} s | {min(loads):.1f} to {max(loads):.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, keep the raw samples; 1 when fewer than 19 of 20 are right."""
    options = _options(arguments)
    path = options.output or ROOT / "benchmarks" / "results" / device_key(describe()) / "verdicts.json"
    before = report_from_json(path.read_bytes(), str(path)) if options.go_on and path.exists() else None
    report = measure(options, before)
    write_atomic(path, report_to_json(report))
    print(table(report), end="")
    if report.notes:
        say(report.notes[0])
        return 130
    enough = [v.get(RIGHT[kind], 0) >= 0.95 * sum(v.values()) for (_, kind), v in counts(report).items()]
    return 0 if all(enough) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    import os

    parser = argparse.ArgumentParser(prog="benchmarks.verdicts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=lambda t: tuple(t.split(",")), default=PAIRS, help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4.0, help="sampling time of each candidate in each run")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--longest", type=float, default=45.0, help="add rounds until it is clear, up to these seconds")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of ONNX Runtime")
    parser.add_argument("--at-most", type=float, default=3600.0, help="begin no run after so many seconds")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="add to the output's runs")
    parser.add_argument("--output", type=Path, help="JSON; by default benchmarks/results/<machine>/verdicts.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
