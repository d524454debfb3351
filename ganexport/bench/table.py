"""Reports as tables: for the terminal, and as Markdown for a README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ganexport.bench.compare import Difference
from ganexport.bench.digest import (
    Line,
    bytes_words,
    digest,
    interval_words,
    milliseconds,
    ratio_words,
    sizes_words,
    speedup_words,
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


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        title: Its heading, with the unit.
        text: What stands in it.
        rank: On a terminal that is too narrow the highest ranks are left out; 0 never is.
        short: What stands in it instead, where leaving out the others is not enough.
    """

    title: str
    text: Callable[[Line], str]
    rank: int = 0
    short: Callable[[Line], str] | None = None


_CANDIDATE = Column("candidate", lambda line: line.name + (" *" if line.remarks else ""))
_MEDIAN = Column("median ms", lambda line: interval_words(line.median))
_P99 = Column("p99", lambda line: milliseconds(line.p99), 4)
_RATE = Column("images/s", lambda line: _rate(line.throughput))
_SPEEDUP = Column(
    "speedup",
    lambda line: speedup_words(line.speedup),
    1,
    lambda line: ratio_words(line.speedup).partition(" ")[0],
)
_PARITY = Column("parity", lambda line: line.parity)
_COPIES = (
    Column("to device", lambda line: milliseconds(line.to_device), 7),
    Column("to host", lambda line: milliseconds(line.to_host), 8),
)
_LATENCY = (
    _CANDIDATE,
    _MEDIAN,
    Column("p90", lambda line: milliseconds(line.p90), 5),
    _P99,
    Column("compute ms", lambda line: milliseconds(line.compute), 6),
    _RATE,
    _SPEEDUP,
    _PARITY,
    Column("CV", lambda line: "–" if line.noise is None else f"{max(line.noise.within, line.noise.between):.0%}", 3),
    Column("of peak", lambda line: "–" if line.share is None else f"{line.share:.0%} {line.bound}", 2),
)
_COLD = (
    _CANDIDATE,
    _MEDIAN,
    Column("slowest", lambda line: milliseconds(line.slowest)),
    Column("load ms", lambda line: milliseconds(line.load), 2),
    Column("first run ms", lambda line: milliseconds(line.first_run), 3),
    _SPEEDUP,
    _PARITY,
)
_SERVER = (
    _CANDIDATE,
    _RATE,
    Column("p50 ms", lambda line: milliseconds(line.median.value if line.median else None)),
    _P99,
    _PARITY,
)


def columns(scenario: str, members: Sequence[Line]) -> tuple[Column, ...]:
    """Columns of a scenario's table; the copies to and from a device where one of the lines has them."""
    if scenario == "server":
        return _SERVER
    if scenario == "cold-start":
        return _COLD
    if any(line.to_device is not None for line in members):
        return (*_LATENCY[:5], *_COPIES, *_LATENCY[5:])
    return _LATENCY


# ---- what it costs ------------------------------------------------------------------------------------------

_SUMMARY = (
    Column("candidate", lambda line: line.name),
    Column("best batch", lambda line: f"{line.batch:,}"),
    Column("images/s", lambda line: _rate(line.throughput)),
    _PARITY,
    Column("images a dollar", lambda line: "–" if line.items_per_dollar is None else f"{line.items_per_dollar:,.0f}"),
    Column("J/1000 images", lambda line: "–" if line.joules_per_1000 is None else f"{line.joules_per_1000:.3g}"),
    Column("cores", lambda line: "–" if line.cores is None else f"{line.cores:.1f}", 1),
    Column("host memory", lambda line: bytes_words(line.peak_host)),
    Column("device memory", lambda line: bytes_words(line.peak_device)),
    Column("file", lambda line: bytes_words(line.file_bytes), 2),
)


def best_batches(lines: Sequence[Line]) -> list[Line]:
    """Each candidate's line with the highest throughput, of the scenarios that keep an engine busy."""
    found: dict[str, Line] = {}
    for line in lines:
        if line.throughput is not None and line.scenario in ("single-stream", "multi-stream", "offline"):
            known = found.get(line.name)
            if known is None or line.throughput > (known.throughput or 0):
                found[line.name] = line
    return list(found.values())


def summary_columns(best: Sequence[Line]) -> tuple[Column, ...]:
    """Columns of the summary, without those that no candidate fills."""
    return tuple(c for c in _SUMMARY if any(c.text(line) != "–" for line in best))


def summary_notes(report: Report, best: Sequence[Line]) -> list[str]:
    """What a reader must know about the summary."""
    notes = []
    if any(line.joules_per_1000 is not None for line in best):
        notes.append(
            "energy: of the GPU (NVML), or on a CPU of the whole processor packages (RAPL), idle power and other "
            "processes included"
        )
    else:
        notes.append("energy: not available, no counter (NVML of a GPU, RAPL of the processor) can be read here")
    prices = sorted({row.facts["price_per_hour"] for row in report.measurements if "price_per_hour" in row.facts})
    if prices:
        notes.append(f"images a dollar at {' or '.join(f'${price:g}' for price in prices)} an hour")
    return notes


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


def fitting(chosen: Sequence[Column], lines: Sequence[Line], width: int) -> tuple[Column, ...]:
    """The columns that fit a terminal: the least important are left out, the text of none is cut."""
    kept = list(chosen)

    def needed() -> int:
        return sum(max(len(c.title), *(len(c.text(line)) for line in lines)) + 3 for c in kept) - 2

    while needed() > width and (out := max(kept, key=lambda c: c.rank)).rank:
        if out.short is not None:
            kept[kept.index(out)] = Column(out.title, out.short)
        else:
            kept.remove(out)
    return tuple(kept)


def remarks_of(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """(candidates, remark) of a table: what holds for several is said once."""
    found: dict[str, list[str]] = {}
    for line in lines:
        for remark in line.remarks:
            found.setdefault(remark, []).append(line.name)
    return [(", ".join(names), remark) for remark, names in found.items()]


def print_report(report: Report, console: Any, *, baseline: str | None = None) -> None:
    """Print every cell's table, the rows that could not be run, remarks, the summary and notes.

    Args:
        report: What was measured.
        console: A rich console.
        baseline: See :func:`~ganexport.bench.digest.digest`.
    """
    lines = digest(report.measurements, baseline=baseline)
    left_out: dict[str, None] = {}
    for scenario, title, members in groups(lines):
        measured = [line for line in members if not line.unavailable]
        caption = f"{title}: {CAPTIONS.get(scenario, '')}".rstrip(": ")
        left_out |= dict.fromkeys(_print_table(console, caption, columns(scenario, members), measured))
        for line in members:
            if line.unavailable:
                console.print(f"  not run: {line.name}: {line.unavailable}", markup=False)
        for names, remark in remarks_of(members):
            console.print(f"  * {names}: {remark}", markup=False)
        console.print()
    best = best_batches(lines)
    if best:
        left_out |= dict.fromkeys(_print_table(console, "at its best batch", summary_columns(best), best))
        for note in summary_notes(report, best):
            console.print(f"  {note}", markup=False)
        console.print()
    if left_out:
        console.print(f"note: columns that did not fit: {', '.join(left_out)}; --html shows all", markup=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)


def _print_table(console: Any, title: str, chosen: Sequence[Column], lines: Sequence[Line]) -> list[str]:
    """Print a table as wide as the terminal allows; titles of the columns that were left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if not lines:
        console.print(title, markup=False, style="bold")
        return []
    kept = fitting(chosen, lines, console.width)
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 1))
    table.pad_edge = False
    table.show_edge = False
    for index, column in enumerate(kept):
        table.add_column(column.title, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for line in lines:
        table.add_row(*(column.text(line) for column in kept), style="red" if line.parity_failed else None)
    console.print(table)
    titles = {column.title for column in kept}
    return [column.title for column in chosen if column.title not in titles]


def to_markdown(report: Report, *, baseline: str | None = None) -> str:
    """The report as Markdown tables with their conditions, for a README."""
    parts = [f"### {report.title}", "", conditions(report), ""]
    lines = digest(report.measurements, baseline=baseline)
    for scenario, title, members in groups(lines):
        parts += [f"**{title}**", ""]
        parts += _markdown_table(columns(scenario, members), [line for line in members if not line.unavailable])
        parts.append("")
        parts += [f"- not run: {line.name}: {_escape(line.unavailable)}" for line in members if line.unavailable]
        parts += [f"- \\* {names}: {remark}" for names, remark in remarks_of(members)]
        if parts[-1]:
            parts.append("")
    best = best_batches(lines)
    if best:
        parts += ["**at its best batch**", "", *_markdown_table(summary_columns(best), best), ""]
        parts += [*(f"- {note}" for note in summary_notes(report, best)), ""]
    parts += [f"> {note}" for note in report.notes]
    if report.command:
        parts += ["", f"Repeat with: `{report.command}`"]
    return "\n".join(parts).rstrip() + "\n"


def _markdown_table(chosen: Sequence[Column], lines: Sequence[Line]) -> list[str]:
    if not lines:
        return []
    head = "| " + " | ".join(column.title for column in chosen) + " |"
    rows = ["| " + " | ".join(_escape(column.text(line)) for column in chosen) + " |" for line in lines]
    return [head, "|---|" + "---:|" * (len(chosen) - 1), *rows]


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
