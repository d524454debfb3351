"""Reports as tables: for the terminal, and as Markdown for a README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ganexport.bench.compare import Difference
from ganexport.bench.digest import (
    Line,
    bytes_words,
    digest,
    interval_words,
    milliseconds,
    ratio_words,
    sizes_words,
)
from ganexport.measurement import Report

#: Explanations of the scenarios, shown above their tables.
CAPTIONS = {
    "single-stream": "one image after the other",
    "multi-stream": "one query of 8 images after the other",
    "offline": "as many images as possible",
    "server": "random arrivals; the highest rate whose p99 keeps the limit",
    "cold-start": "a fresh process, to its first image",
}
_HEAD = {
    "latency": (
        "candidate",
        "median ms",
        "p90",
        "p99",
        "compute ms",
        "images/s",
        "speedup",
        "parity",
        "peak mem",
        "of peak",
    ),
    "server": ("candidate", "images/s", "p50 ms", "p99", "parity"),
    "cold-start": ("candidate", "median ms", "slowest", "speedup", "parity"),
}


def head(scenario: str) -> tuple[str, ...]:
    """Column titles of a scenario's table."""
    return _HEAD.get(scenario, _HEAD["latency"])


def cells(line: Line) -> list[str]:
    """A measured line's columns, matching :func:`head`."""
    name = line.name + (" *" if line.remarks else "")
    median = interval_words(line.median)
    if line.scenario == "server":
        return [
            name,
            _rate(line.throughput),
            milliseconds(line.median.value if line.median else None),
            milliseconds(line.p99),
            line.parity,
        ]
    if line.scenario == "cold-start":
        slowest = line.median.high if line.median else None
        return [name, median, milliseconds(slowest), ratio_words(line.speedup), line.parity]
    share = "–" if line.share is None else f"{line.share:.0%} {line.bound}"
    return [
        name,
        median,
        milliseconds(line.p90),
        milliseconds(line.p99),
        milliseconds(line.compute),
        _rate(line.throughput),
        ratio_words(line.speedup),
        line.parity,
        bytes_words(line.peak_device or line.peak_host),
        share,
    ]


def _rate(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def groups(lines: Sequence[Line]) -> list[tuple[str, str, list[Line]]]:
    """(scenario, title, lines) a cell, in order of appearance."""
    found: dict[Any, list[Line]] = {}
    for line in lines:
        found.setdefault(line.cell, []).append(line)
    titled = []
    for members in found.values():
        first = members[0]
        where = f", {sizes_words(first.sizes)}" if first.sizes else ""
        titled.append((first.scenario, f"{first.scenario}{where}", members))
    return titled


def print_report(report: Report, console: Any, *, baseline: str | None = None) -> None:
    """Print every cell's table, the rows that could not be run, remarks and notes.

    Args:
        report: What was measured.
        console: A rich console.
        baseline: See :func:`~ganexport.bench.digest.digest`.
    """
    from rich.table import Table

    for scenario, title, members in groups(digest(report.measurements, baseline=baseline)):
        table = Table(title=f"{title}: {CAPTIONS.get(scenario, '')}".rstrip(": "), title_justify="left")
        for index, name in enumerate(head(scenario)):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for line in members:
            if line.unavailable:
                continue
            style = "red" if line.parity_failed else None
            table.add_row(*cells(line), style=style)
        if table.row_count:
            console.print(table)
        for line in members:
            if line.unavailable:
                console.print(f"  not run: {line.name}: {line.unavailable}", markup=False)
            for remark in line.remarks:
                console.print(f"  * {line.name}: {remark}", markup=False)
        console.print()
    for note in report.notes:
        console.print(f"note: {note}", markup=False)


def to_markdown(report: Report, *, baseline: str | None = None) -> str:
    """The report as Markdown tables with their conditions, for a README."""
    parts = [f"### {report.title}", "", conditions(report), ""]
    for scenario, title, members in groups(digest(report.measurements, baseline=baseline)):
        names = head(scenario)
        parts += [f"**{title}**", "", "| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
        parts += ["| " + " | ".join(map(_escape, cells(line))) + " |" for line in members if not line.unavailable]
        parts.append("")
        parts += [f"- not run: {line.name}: {_escape(line.unavailable)}" for line in members if line.unavailable]
        parts += [f"- \\* {line.name}: {remark}" for line in members for remark in line.remarks]
        if parts[-1]:
            parts.append("")
    parts += [f"> {note}" for note in report.notes]
    if report.command:
        parts += ["", f"Repeat with: `{report.command}`"]
    return "\n".join(parts).rstrip() + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def conditions(report: Report) -> str:
    """Machine and versions in one line; a merged report names its machines."""
    machines = report.environment.get("machines")
    if isinstance(machines, dict):
        return "; ".join(f"{name}: {_conditions(environment)}" for name, environment in machines.items())
    return _conditions(report.environment)


def _conditions(environment: dict[str, Any]) -> str:
    cpu = environment.get("cpu", {})
    parts = [f"{cpu.get('model') or 'CPU'}, {cpu.get('affinity') or cpu.get('logical')} cores"]
    parts += [f"{gpu.get('name')} (driver {gpu.get('driver')})" for gpu in environment.get("gpus", ())]
    parts += [str(environment.get("os", "")), f"Python {environment.get('python', '?')}"]
    wanted = ("ganexport", "torch", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
    libraries = environment.get("libraries", {})
    parts += [f"{name} {libraries[name]}" for name in wanted if libraries.get(name)]
    for kind, peak in environment.get("peaks", {}).items():
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in peak["gemm"].items())
        parts.append(f"measured peak {kind}: {rates}, copy {peak['copy'] / 1e9:,.1f} GB/s")
    return " · ".join(part for part in parts if part)


def print_differences(differences: Sequence[Difference], changes: Sequence[str], console: Any) -> None:
    """Print a comparison of two reports."""
    from rich.table import Table

    table = Table(title="new time over old time", title_justify="left")
    for index, name in enumerate(("candidate", "scenario", "sizes", "new / old", "verdict")):
        table.add_column(name, justify="right" if index == 3 else "left")
    styles = {"slower": "red", "faster": "green"}
    for found in differences:
        ratio = ratio_words(found.comparison.ratio if found.comparison else None)
        verdict = found.verdict + (f": {found.reason}" if found.reason else "")
        sizes = sizes_words(found.sizes)
        table.add_row(found.name, found.scenario, sizes, ratio, verdict, style=styles.get(found.verdict))
    console.print(table)
    for change in changes:
        console.print(f"changed: {change}", markup=False)
