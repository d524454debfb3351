"""Turn a machine with a GPU into evidence: what ``make gpu`` runs.

    PYTHONPATH=. python -m benchmarks.gpu [--stage environment,build,…] [--out FOLDER] [--cpu]

Works from the source tree without installing anything. Stages run in the order of their value, each
in its own process, within ``GANEXPORT_GPU_DEADLINE`` seconds (540). Every stage writes one JSON file,
row by row as measured; what the deadline cut off stands in it as not run. ``--cpu`` goes through the
same motions with tiny sizes on a machine without a GPU, as a test of this driver.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._rows import Deadline, Results, say

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Run:
    """What the stages need to know.

    Attributes:
        out: Folder of the results.
        cpu: Dry run without a GPU.
        deadline: When nothing new is started, and what runs is stopped.
    """

    out: Path
    cpu: bool
    deadline: Deadline

    def python(self, *arguments: str, limit: float | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run this Python on something, within the deadline."""
        return self.command([sys.executable, *arguments], limit=limit, **variables)

    def command(
        self, command: list[str], *, limit: float | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the source tree; at the deadline it gets SIGTERM, and five seconds later SIGKILL."""
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=min(limit or 1e9, max(self.deadline.left, 1)))
        except subprocess.TimeoutExpired:
            output = _stop(process)
            return subprocess.CompletedProcess(command, 124, output, "")
        except BaseException:
            _stop(process)
            raise
        return subprocess.CompletedProcess(command, process.returncode, output, "")


def _stop(process: subprocess.Popen[str]) -> str:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=5)[0] or ""
        except subprocess.TimeoutExpired:
            continue
    return ""


@dataclass
class Outcome:
    """How a stage ended.

    Attributes:
        status: "ok", "failed", "cut off" (by the deadline) or "not available".
        detail: One line.
    """

    status: str
    detail: str = ""


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _last_lines(text: str, count: int = 3) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:])[-600:]


# ---- environment: what runs here ---------------------------------------------------------------

_TORCH = (
    "import json, torch; ok = torch.cuda.is_available(); "
    "x = torch.randn(256, 256, device='cuda' if ok else 'cpu'); y = (x @ x).sum().item(); "
    "print(json.dumps({'version': torch.__version__, 'runs': ok, 'cuda': torch.version.cuda, "
    "'cudnn': torch.backends.cudnn.version(), "
    "'capability': list(torch.cuda.get_device_capability()) if ok else None}))"
)
_BINDINGS = (
    "import json; from cuda.bindings import runtime as r; e, n = r.cudaGetDeviceCount(); "
    "print(json.dumps({'runs': int(e) == 0 and n > 0, 'reason': '' if int(e) == 0 else f'CUDA error {int(e)}'}))"
)


def environment(run: Run) -> Outcome:
    """GPU, compilers, and which inference libraries work on this card."""
    probes: list[tuple[str, list[str]]] = [
        ("torch CUDA", ["-c", _TORCH]),
        ("cuda-bindings", ["-c", _BINDINGS]),
        ("TensorRT", ["-m", "benchmarks._tensorrt_probe", "tensorrt"]),
        ("TensorRT-RTX", ["-m", "benchmarks._tensorrt_probe", "tensorrt_rtx"]),
        ("ONNX Runtime CUDA", ["-m", "benchmarks._onnxruntime_probe"]),
        ("TensorRT libraries", []),
        ("compilers", []),
    ]
    results = Results(
        run.out / "environment.json",
        "What runs on this machine",
        [({"name": name}, {"scenario": "probe"}) for name, _ in probes],
    )
    working = []
    for index, (name, arguments) in enumerate(probes):
        if name == "TensorRT libraries":
            facts: dict[str, Any] = {"found": _find_libraries()}
        elif name == "compilers":
            facts = {tool: _version_of(tool) for tool in ("nvcc", "cmake", "ninja", "compute-sanitizer", "trtexec")}
        else:
            facts = _probe(run, arguments)
            if facts.get("runs"):
                working.append(name)
        results.add(
            index, facts=facts, unavailable="" if facts.get("runs", True) else facts.get("reason", "does not run")
        )
        say(f"  {name}: {json.dumps(facts)[:300]}")
    if "torch CUDA" in working or run.cpu:
        return Outcome("ok", f"work here: {', '.join(working) or 'none (a dry run)'}")
    return Outcome("failed", "torch sees no GPU")


def _probe(run: Run, arguments: list[str]) -> dict[str, Any]:
    done = run.python(*arguments, limit=120)
    for line in reversed(done.stdout.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            found = json.loads(line)
            if isinstance(found, dict):
                if done.returncode and "runs" not in found:
                    found |= {
                        "runs": False,
                        "reason": f"crashed, exit code {done.returncode}: {_last_lines(done.stdout, 1)}",
                    }
                return found
    return {"runs": False, "reason": _last_lines(done.stdout, 1) or f"exit code {done.returncode}"}


def _find_libraries() -> list[str]:
    """File names (never their places) of every TensorRT library the loader or Python would find."""
    found: set[str] = set()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        text = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, timeout=20, check=False).stdout
        found |= {line.split()[0] for line in text.splitlines() if "nvinfer" in line or "tensorrt" in line}
    folders = [Path(p) for p in [*sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)] if p]
    for folder in folders:
        with contextlib.suppress(OSError):
            for pattern in ("libnvinfer*.so*", "tensorrt*_libs/lib*.so*", "libtensorrt*.so*"):
                found |= {path.name for path in folder.glob(pattern)}
    return sorted(found)


def _version_of(tool: str) -> str | None:
    if shutil.which(tool) is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=20, check=False)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if any(c.isdigit() for c in line)]
        release = [line for line in lines if "release" in line]
        return (release or lines or [""])[0].strip()[:120]
    return "present"


# ---- build, tests, benchmarks -------------------------------------------------------------------


def build(run: Run) -> Outcome:
    """The kernels' library, with CMake, for this card."""
    results = Results(run.out / "build.json", "Building the CUDA kernels", [({"name": "cmake"}, {"scenario": "build"})])
    if shutil.which("cmake") is None:
        results.add(0, unavailable="cmake is not installed")
        return Outcome("not available", "cmake is not installed")
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        results.add(0, unavailable="nvcc is not installed")
        return Outcome("not available", "nvcc is not installed")
    folder = "build"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    if run.cpu:  # a dry run configures only, and elsewhere: it must not replace a library that is in use
        folder = str(run.out / "build")
    start = time.perf_counter_ns()
    configured = run.command(["cmake", "-S", ".", "-B", folder, *generator, "-DGANEXPORT_KERNELS=ON"])
    built = configured if configured.returncode or run.cpu else run.command(["cmake", "--build", folder])
    taken = time.perf_counter_ns() - start
    if built.returncode:
        results.add(0, unavailable=_last_lines(built.stdout))
        return Outcome("cut off" if built.returncode == 124 else "failed", _last_lines(built.stdout))
    if run.cpu:
        shutil.rmtree(folder, ignore_errors=True)
        results.add(0, {"configure": [taken]})
        return Outcome("ok", "configured, not compiled (a dry run)")
    libraries = [path.name for path in (ROOT / folder).glob("*.so")]
    said = [line for line in configured.stdout.splitlines() if "ganexport" in line]
    results.add(0, {"build": [taken]}, facts={"libraries": libraries, "said": said[-1:]})
    return Outcome("ok" if libraries else "failed", f"{taken / 1e9:.0f} s: {', '.join(libraries) or 'no library'}")


def tests(run: Run) -> Outcome:
    """tests/gpu: on this machine a missing GPU is a failure."""
    results = Results(run.out / "tests.json", "tests/gpu", [({"name": "pytest --gpu"}, {"scenario": "tests"})])
    if not (ROOT / "tests" / "gpu").is_dir():
        results.add(0, unavailable="there is no tests/gpu")
        return Outcome("not available", "there is no tests/gpu")
    # Not every machine has the plugins that the project's configuration names.
    missing = [] if importlib.util.find_spec("pytest_timeout") else ["-o", "timeout=", "-W", "ignore"]
    side_by_side = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"]
    turns = [["-m", "not alone", *(side_by_side if importlib.util.find_spec("xdist") else [])], ["-m", "alone"]]
    turns = [["--collect-only", "-x"]] if run.cpu else turns
    facts: dict[str, Any] = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, "failed": [], "tails": []}
    for number, turn in enumerate(turns):
        report = run.out / f"pytest{number}.xml"
        kept = ["-p", "no:cacheprovider", f"--junitxml={report}", "--durations=8"]
        done = run.python("-m", "pytest", "--gpu", "tests/gpu", "-q", *kept, *turn, *missing)
        for name, value in _junit(report).items():
            facts[name] += value
        facts["tails"].append(_last_lines(done.stdout, 12))
        report.unlink(missing_ok=True)
        if done.returncode:
            facts.setdefault("reason", f"exit code {done.returncode}: {_last_lines(done.stdout, 2)}")
            say(done.stdout[-9000:])
    reason = facts.pop("reason", "")
    results.add(0, facts=facts, unavailable=reason)
    if reason:
        return Outcome("cut off" if reason.startswith("exit code 124") else "failed", reason)
    return Outcome("ok", "; ".join(_last_lines(tail, 1).rpartition("| ")[2] for tail in facts["tails"]))


def _junit(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    suites = list(ET.parse(path).getroot().iter("testsuite"))
    counts = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = [f"{c.get('classname')}::{c.get('name')}" for s in suites for c in s.iter("testcase")
              if c.find("failure") is not None or c.find("error") is not None]  # fmt: skip
    return {**counts, "failed": failed}


def _script(module: str, file: str) -> Callable[[Run], Outcome]:
    def stage(run: Run) -> Outcome:
        path = run.out / file
        if importlib.util.find_spec(module) is None:
            Results(path, module, [({"name": module}, {})]).add(0, unavailable=f"there is no {module}")
            return Outcome("not available", f"there is no {module}")
        path.unlink(missing_ok=True)
        arguments = ["-m", module, "--output", str(path), "--deadline", f"{max(run.deadline.left - 5, 1):.0f}"]
        done = run.python(*arguments, *(["--cpu"] if run.cpu else []))
        say(done.stdout[-4000:].rstrip())
        if not path.is_file():
            Results(path, module, [({"name": module}, {})]).add(0, unavailable=_last_lines(done.stdout))
        if done.returncode not in (0, 124):
            return Outcome("failed", _last_lines(done.stdout))
        return _measured(path)

    stage.__doc__ = f"{module}."
    return stage


def _measured(path: Path) -> Outcome:
    rows = json.loads(path.read_text(encoding="utf-8"))["measurements"]
    cut = [row for row in rows if str(row.get("unavailable", "")).startswith("not run")]
    missing = [row for row in rows if row.get("unavailable") and row not in cut]
    ran = len(rows) - len(cut) - len(missing)
    detail = f"{ran} of {len(rows)} rows measured, {len(missing)} not available, {len(cut)} not run"
    return Outcome("cut off" if cut else "ok", detail)


#: In order of value.
STAGES: dict[str, Callable[[Run], Outcome]] = {
    "environment": environment,
    "build": build,
    "tests": tests,
    "kernel": _script("benchmarks.gradient_penalty", "kernel.json"),
    "training": _script("benchmarks.training_step", "training.json"),
    "backends": _script("benchmarks.backends", "backends.json"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; 0 when none failed."""
    options = _options(arguments)
    chosen = list(STAGES) if options.stage == "all" else [name.strip() for name in options.stage.split(",")]
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        say(f"error: unknown stage {', '.join(unknown)}; known: {', '.join(STAGES)}, all")
        return 2
    from ganexport.environment import describe, device_key

    machine = describe()
    if not machine["gpus"] and not options.cpu:
        say("error: no NVIDIA GPU here; --cpu goes through the motions without one")
        return 2
    out = options.out or ROOT / "benchmarks" / "results" / (device_key(machine) + ("-dry-run" if options.cpu else ""))
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, options.cpu, Deadline(options.deadline))
    summary = Results(out / "summary.json", "make gpu", [({"name": name}, {"scenario": "stage"}) for name in chosen])
    failed = []
    for index, name in enumerate(chosen):
        if run.deadline.left < 5:
            say(f"{name}: not run: the deadline came first")
            continue
        say(f"{name} …")
        start = time.perf_counter_ns()
        outcome = _attempt(name, run)
        taken = time.perf_counter_ns() - start
        reason = "" if outcome.status == "ok" else f"{outcome.status}: {outcome.detail}"
        summary.add(
            index, {"stage": [taken]}, unavailable=reason, facts={"status": outcome.status, "detail": outcome.detail}
        )
        say(f"{name}: {outcome.status} after {taken / 1e9:.0f} s: {outcome.detail}")
        failed += [name] if outcome.status == "failed" else []
    say(f"results are in {out.name}/" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _attempt(name: str, run: Run) -> Outcome:
    try:
        return STAGES[name](run)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # noqa: BLE001 - one broken stage must not cost the others
        return Outcome("failed", f"{type(error).__name__}: {error}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stage", default=os.environ.get("STAGE", "all"), help=f"{', '.join(STAGES)} or all")
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), help="folder of the results")
    parser.add_argument("--cpu", "--dry-run", action="store_true", help="tiny sizes on a machine without a GPU")
    default = float(os.environ.get("GANEXPORT_GPU_DEADLINE", "540"))
    parser.add_argument("--deadline", type=float, default=default, help="seconds for everything")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
