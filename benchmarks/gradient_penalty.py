"""The fused gradient penalty against eager torch, torch.compile and the speed of a plain copy.

    PYTHONPATH=. python -m benchmarks.gradient_penalty --output kernel.json [--deadline 300] [--cpu]
    PYTHONPATH=. python -m benchmarks.gradient_penalty --render kernel.json      the table, in Markdown

Every candidate turns g [N, C, H, W] into the penalty and d(penalty)/dg. It is captured into one CUDA graph that goes
round buffers larger than the L2 cache and keeps every gradient, so neither the launches of Python nor a warm cache
are measured; a sample is one replay divided by its iterations. The copy reads and writes the same bytes as the fused
kernel. Whole critic steps are timed as they are run in training, without such a graph.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._rows import Deadline, Results, median, say
from ganexport.kernels.gradient_penalty import gradient_penalty, gradient_penalty_reference, why_not_cuda

# In order of value: large batches that fit on chip, then small ones, then samples that need the split reduction.
SHAPES = (
    (256, 3, 128, 128), (128, 3, 64, 64), (64, 1, 28, 28), (64, 3, 256, 256), (64, 3, 64, 64), (1024, 3, 64, 64),
    (32, 3, 1024, 1024), (32, 3, 512, 512), (256, 3, 32, 32), (65_536, 1, 28, 28), (256, 3, 127, 127),
    (1024, 3, 128, 128), (256, 3, 256, 256),
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_SHAPES = ((4, 1, 28, 28), (2, 3, 16, 16))
CANDIDATES = ("copy", "fused", "fused through autograd", "eager", "compile max-autotune")
STEPS = ("critic step, plain penalty", "critic step, fused penalty", "critic step, no penalty")
STEP_SHAPE = (64, 3, 64, 64)
ROUND_BYTES = 1 << 28  # at least this many bytes of g are gone round: several times any L2
MOST_ROUNDS = 512
SAMPLES = 30
WEIGHT = 10.0


def main(arguments: list[str] | None = None) -> int:
    """Measure, or render; 0 also when parts were not available."""
    options = _options(arguments)
    if options.render:
        sys.stdout.write(render(json.loads(options.render.read_text(encoding="utf-8"))))
        return 0
    deadline = Deadline(options.deadline)
    device = "cpu" if options.cpu else "cuda"
    shapes = CPU_SHAPES if options.cpu else SHAPES
    dtypes = {"fp32": torch.float32} if options.cpu else DTYPES
    cases = [(shape, name, candidate) for shape in shapes for name in dtypes for candidate in CANDIDATES]
    cases.sort(key=lambda case: case[2].startswith("compile"))  # compiling takes most of the time: last
    step_shape = (2, 3, 16, 16) if options.cpu else STEP_SHAPE
    planned = [_row(candidate, shape, name) for shape, name, candidate in cases]
    planned += [_row(candidate, step_shape, "fp32") for candidate in STEPS]
    results = Results(options.output, "Gradient penalty: value and gradient", planned)
    for index, candidate in enumerate(STEPS, start=len(cases)):
        if deadline.left < 3:
            return 0
        _measure(results, index, candidate, partial(_step_row, candidate, step_shape, device))
    for index, (shape, name, candidate) in enumerate(cases):
        if deadline.left < 3:
            return 0
        _measure(results, index, candidate, partial(_penalty_row, candidate, shape, dtypes[name], device))
    return 0


def _row(candidate: str, shape: tuple[int, ...], dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    conditions = {"scenario": "gradient penalty", "sizes": {"shape": list(shape)}, "batch": shape[0], "dtype": dtype}
    return {"name": candidate}, conditions


def _measure(results: Results, index: int, candidate: str, run: Callable[[], dict[str, Any]]) -> None:
    conditions = results.rows[index]["conditions"]
    try:
        row = run()
    except torch.cuda.OutOfMemoryError:
        row = {"unavailable": "out of memory"}
    except Exception as error:  # noqa: BLE001 - one candidate must not cost the others
        row = {"unavailable": f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"}
    results.add(index, **row)
    samples = row.get("series", {}).get("compute")
    say(
        f"  {conditions['sizes']['shape']} {conditions['dtype']} {candidate}: "
        + (f"{median(samples) / 1e3:.2f} us" if samples else row["unavailable"])
    )


def _fused(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The operator alone: penalty and gradient in one launch, prepared for an upstream gradient of 1."""
    penalty, gradient, _ = torch.ops.ganexport.gradient_penalty(grad, None, None, WEIGHT, 0, 1.0, 1e-12, True)
    return penalty, gradient


def _through_autograd(function: Callable[[Tensor], Tensor], grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = grad.detach().requires_grad_()
    penalty = function(leaf)
    return penalty, torch.autograd.grad(penalty, leaf)[0]


def _functions(device: str) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    reference = partial(gradient_penalty_reference, weight=WEIGHT)
    compiled = torch.compile(reference, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
    fused = partial(gradient_penalty, weight=WEIGHT, impl="cuda")
    return {
        "copy": lambda grad: (grad, torch.empty_like(grad).copy_(grad)),
        "fused": _fused,
        "fused through autograd": partial(_through_autograd, fused),
        "eager": partial(_through_autograd, reference),
        "compile max-autotune": partial(_through_autograd, compiled if device == "cuda" else reference),
    }


def _penalty_row(candidate: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    reason = _reason(candidate, device, dtype)
    if reason:
        return {"unavailable": reason}
    torch._dynamo.reset()
    function = _functions(device)[candidate]
    size = torch.Size(shape).numel() * dtype.itemsize
    rounds = 2 if device == "cpu" else min(MOST_ROUNDS, max(4, -(-ROUND_BYTES // size)))
    generator = torch.Generator(device).manual_seed(0)
    scale = 2.0 / torch.Size(shape[1:]).numel() ** 0.5  # norms of about 2
    batches = [(torch.randn(shape, device=device, generator=generator) * scale).to(dtype) for _ in range(rounds)]
    parity = None if candidate == "copy" else _parity(function, batches[0])
    samples = _on_cpu(function, batches) if device == "cpu" else _in_graph(function, batches)
    facts = {"gradient_bytes": size, "rounds": rounds}
    if candidate in ("copy", "fused"):
        facts["bytes_moved"] = 2 * size
    return {"series": {"compute": samples}, "items": shape[0], "facts": facts, "parity": parity}


def _reason(candidate: str, device: str, dtype: torch.dtype) -> str:
    if candidate == "compile max-autotune" and device == "cpu":
        return "not available: compared on CUDA only"
    if candidate.startswith("fused through"):
        reason = why_not_cuda(device, dtype)
        return f"not available: {reason}" if reason else ""
    if candidate == "fused" and (device == "cpu" or why_not_cuda(device, dtype)):
        return f"not available: {why_not_cuda(device, dtype)}"
    return ""


def _parity(function: Callable[[Tensor], tuple[Tensor, Tensor]], grad: Tensor) -> dict[str, float]:
    """Penalty and gradient against the reference in float64."""
    penalty, gradient = function(grad)
    wanted, wanted_gradient = _through_autograd(partial(gradient_penalty_reference, weight=WEIGHT), grad.double())
    return {
        "penalty_relative_error": abs(float(penalty.detach().double() / wanted.detach()) - 1),
        "gradient_relative_l2": float((gradient.double() - wanted_gradient).norm() / wanted_gradient.norm()),
    }


def _in_graph(function: Callable[[Tensor], tuple[Tensor, Tensor]], batches: list[Tensor]) -> list[int]:
    """Nanoseconds an iteration, from replays of one graph over all batches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in batches[:3]:
            function(batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    kept: list[Any] = []
    with torch.cuda.graph(graph):
        kept.extend(function(batch) for batch in batches)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    samples = []
    for number in range(SAMPLES + 5):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= 5:  # warm-up
            samples.append(round(start.elapsed_time(end) * 1e6 / len(batches)))
    del kept
    return samples


def _on_cpu(function: Callable[[Tensor], Any], batches: list[Tensor]) -> list[int]:
    samples = []
    for _ in range(5):
        start = time.perf_counter_ns()
        for batch in batches:
            function(batch)
        samples.append((time.perf_counter_ns() - start) // len(batches))
    return samples


def _critic(resolution: int, device: str) -> torch.nn.Module:
    """A DCGAN critic (arXiv:1511.06434) without normalisation, as the penalty requires."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    channels, width = 3, 64
    while resolution > 4:
        layers += [torch.nn.Conv2d(channels, width, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
        channels, width, resolution = width, width * 2, resolution // 2
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(channels, 1, resolution)).to(device)


def _step_row(candidate: str, shape: tuple[int, ...], device: str) -> dict[str, Any]:
    """Forward and backward of a whole WGAN-GP critic step (arXiv:1704.00028), eager, fp32, TF32 as torch sets it."""
    reason = why_not_cuda(device) if candidate == "critic step, fused penalty" else ""
    if reason:
        return {"unavailable": f"not available: {reason}"}
    critic = _critic(shape[-1], device)
    real, fake, mixed = (torch.randn(shape, device=device) for _ in range(3))
    impl = "cuda" if "fused" in candidate else "reference"

    def step() -> None:
        critic.zero_grad(set_to_none=True)
        loss = critic(fake).mean() - critic(real).mean()
        if candidate != "critic step, no penalty":
            points = mixed.detach().requires_grad_()
            grad = torch.autograd.grad(critic(points).sum(), points, create_graph=True)[0]
            loss = loss + gradient_penalty(grad, weight=WEIGHT, impl=impl)
        loss.backward()

    samples = []
    for number in range(3 if device == "cpu" else SAMPLES + 10):
        _synchronize(device)
        start = time.perf_counter_ns()
        step()
        _synchronize(device)
        if number >= (1 if device == "cpu" else 10):  # warm-up
            samples.append(time.perf_counter_ns() - start)
    return {"series": {"compute": samples}, "items": shape[0]}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def render(report: dict[str, Any]) -> str:
    """The table of a report in Markdown: medians, and the ratios that the targets are about."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in report["measurements"]:
        key = "×".join(map(str, row["conditions"]["sizes"]["shape"])), row["conditions"]["dtype"]
        found.setdefault(key, {})[row["candidate"]["name"]] = row
    lines = [
        "| g | dtype | MB | fused, µs | GB/s | of copy | through autograd, µs | eager, µs | × | compiled, µs | × |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (shape, dtype), rows in found.items():
        times = {name: _microseconds(row) for name, row in rows.items()}
        fused = times.get("fused")
        if "copy" not in rows or fused is None:
            continue
        size = rows["fused"]["facts"]["gradient_bytes"]
        cells = [shape, dtype, f"{size / 1e6:.1f}", f"{fused:.2f}", f"{2 * size / fused / 1e3:.0f}"]
        cells += [_ratio(times["copy"], fused, percent=True), _time(times["fused through autograd"])]
        for other in ("eager", "compile max-autotune"):
            cells += [_time(times[other]), _ratio(times[other], fused)]
        lines.append("| " + " | ".join(cells) + " |")
    steps = [(name, _microseconds(row)) for rows in found.values() for name, row in rows.items() if name in STEPS]
    lines += ["", "| whole critic step | ms |", "|---|---:|"]
    lines += [f"| {name} | {'–' if taken is None else f'{taken / 1e3:.2f}'} |" for name, taken in steps]
    return "\n".join(lines) + "\n"


def table(report: Any) -> str:
    """The same of a read report (:class:`ganexport.measurement.Report`)."""
    import msgspec

    return render(msgspec.to_builtins(report))


def _microseconds(row: dict[str, Any]) -> float | None:
    return median(row["series"][0]["samples"]) / 1e3 if row.get("series") else None


def _time(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _ratio(value: float | None, unit: float, *, percent: bool = False) -> str:
    if value is None:
        return "–"
    return f"{100 * value / unit:.0f}%" if percent else f"{value / unit:.2f}"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gradient_penalty", description="The fused gradient penalty")
    parser.add_argument("-o", "--output", "--out", type=Path, default=Path("kernel.json"), help="JSON of the samples")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds after which nothing new is started")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on a machine without a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is the same as --cpu")
    parser.add_argument("--render", type=Path, help="print the table of a report instead of measuring")
    options = parser.parse_args(arguments)
    options.cpu = options.cpu or options.device == "cpu"
    return options


if __name__ == "__main__":
    sys.exit(main())
