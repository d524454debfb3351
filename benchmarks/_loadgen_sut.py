"""MLCommons LoadGen driving an ONNX model: the half of benchmarks/loadgen.py that uses nothing of ganexport's timing.

Called inside a process of its own. The session is made here with ONNX Runtime's own interface, the queries,
the clock and the statistics are LoadGen's (github.com/mlcommons/inference, loadgen/).
"""

from __future__ import annotations

import array
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

_SUMMARY = re.compile(r"^([\w. ]+?(?:\(ns\))?)\s*:\s*([\d.]+|\w+)\s*$", re.MULTILINE)
#: Nanoseconds from a sample's issue to its answer.
_SAMPLE = re.compile(r'"name":"Sample",[^\n]*?"ph":"b",[^\n]*?"complete_ns":(\d+)')
_SETS = 4
_state: dict[str, Any] = {}


def open_model(path: str, threads: int) -> dict[str, Any]:
    """Load the model; answers what runs and who measures."""
    from importlib.metadata import version

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    _state["session"] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    runtime = f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"
    return {"runtime": runtime, "harness": f"mlcommons-loadgen {version('mlcommons-loadgen')}"}


def turn(scenario: str, batch: int, seconds: float, latency_ns: int, discard: int = 2) -> dict[str, Any]:
    """One LoadGen test.

    Args:
        scenario: "single-stream" (one query after the other) or "offline" (all samples at once, run in batches).
        batch: Samples of one run.
        seconds: Shortest duration.
        latency_ns: What one run takes about; LoadGen makes its queries beforehand and asks for it.
        discard: Runs before the test, for the process was asleep.

    Returns:
        ``samples`` (nanoseconds of each run, from LoadGen's trace), ``says`` (LoadGen's own summary).
    """
    import mlperf_loadgen as loadgen

    session = _state["session"]
    generator = np.random.default_rng(0)
    shapes = {i.name: [batch if not isinstance(size, int) else size for size in i.shape] for i in session.get_inputs()}
    sets = [
        {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        for _ in range(_SETS)
    ]
    names = [output.name for output in session.get_outputs()]
    for index in range(discard):
        session.run(names, sets[index % _SETS])
    answer = array.array("B", bytes(8))
    address, length = answer.buffer_info()

    def issue(queries: Any) -> None:
        for start in range(0, len(queries), batch):
            session.run(names, sets[start // batch % _SETS])
            part = queries[start : start + batch]
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(q.id, address, length) for q in part])

    settings = loadgen.TestSettings()
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(seconds * 1000)
    if scenario == "single-stream":
        settings.scenario = loadgen.TestScenario.SingleStream
        settings.single_stream_expected_latency_ns = latency_ns
        settings.min_query_count = 3
    else:
        settings.scenario = loadgen.TestScenario.Offline
        runs = max(3, round(seconds * 1e9 / latency_ns))
        settings.offline_expected_qps = batch * 1e9 / latency_ns
        settings.min_duration_ms = 1  # the number of samples follows from min_query_count instead, in whole batches
        settings.min_query_count = runs * batch
    with tempfile.TemporaryDirectory(prefix="loadgen-") as folder:
        logs = loadgen.LogSettings()
        logs.enable_trace = True
        output = loadgen.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = folder, False
        logs.log_output = output
        system = loadgen.ConstructSUT(issue, lambda: None)
        library = loadgen.ConstructQSL(_SETS, _SETS, lambda _samples: None, lambda _samples: None)
        try:
            loadgen.StartTestWithLogSettings(system, library, settings, logs)
        finally:
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(system)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text(encoding="utf-8")
        # Read line by line: LoadGen's trace is not always well-formed JSON.
        ended = [int(text) for text in _SAMPLE.findall((Path(folder) / "mlperf_log_trace.json").read_text())]
    if scenario == "offline":  # all samples were issued at once: a batch took what lies between two answers
        ends = np.sort(np.asarray(ended))[batch - 1 :: batch]
        ended = [int(v) for v in np.diff(ends, prepend=0)]
    return {"samples": ended, "says": {key.strip(): value for key, value in _SUMMARY.findall(summary)}}
