"""The report as one HTML file that needs nothing else: tables, charts, conditions; light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from ganexport.bench import svg
from ganexport.bench.digest import Line, digest, display_name, primary, rounds_of, sizes_words
from ganexport.bench.table import (
    CAPTIONS,
    Column,
    best_batches,
    columns,
    conditions,
    groups,
    remarks_of,
    summary_columns,
    summary_notes,
)
from ganexport.measurement import Measurement, Report

_STYLE = """
:root{color-scheme:light dark;--ink:#1a1c20;--soft:#5b616b;--paper:#fff;--panel:#f5f6f8;--line:#d9dce1;--bad:#b3261e;
--c0:#0067a5;--c1:#c8501b;--c2:#00805c;--c3:#a3498b;--c4:#a07400;--c5:#2f93c7;--c6:#6a5acd;--c7:#66707c}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a4abb6;--paper:#15171a;--panel:#1f2226;--line:#363b42;
--bad:#ff8a80;--c0:#5ab4f0;--c1:#ff9a66;--c2:#4fcf9f;--c3:#e79bd0;--c4:#e3b93c;--c5:#9bdcff;--c6:#b3a6ff;--c7:#b4bcc8}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:24px 20px 60px}h1{font-size:1.6rem;margin:0 0 4px}
h2{font-size:1.15rem;margin:34px 0 8px}.soft{color:var(--soft)}.bad{color:var(--bad);font-weight:600}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:4px 7px;font-size:14px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
.notes{background:var(--panel);border-left:4px solid var(--c1);padding:8px 14px;margin:14px 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:18px}
figure{margin:0;background:var(--panel);border-radius:8px;padding:12px}figcaption{font-weight:600;margin-bottom:6px}
svg.chart{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:12.5px}svg .label{fill:var(--ink)}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);fill:none}polyline{fill:none;stroke-width:2}
.legend{list-style:none;margin:8px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.85rem}
.legend svg{margin-right:6px}.legend line{stroke-width:3}code{background:var(--panel);padding:2px 5px;border-radius:4px}
ul.marked li::marker{content:"* "}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px}dt{color:var(--soft)}dd{margin:0}
""" + "".join(
    f"line.c{i},polyline.c{i}{{stroke:var(--c{i})}}circle.c{i}{{fill:var(--c{i})}}" for i in range(svg.COLOURS)
)


def to_html(report: Report, *, baseline: str | None = None) -> str:
    """A complete HTML page; all its content is inside it."""
    lines = digest(report.measurements, baseline=baseline)
    colours = {name: index for index, name in enumerate(dict.fromkeys(display_name(m) for m in report.measurements))}
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    charts = "".join(_charts(report, lines, colours))
    sections = "".join(_section(scenario, title, members) for scenario, title, members in groups(lines))
    repeat = f"<p>Repeat with: <code>{escape(report.command)}</code></p>" if report.command else ""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(report.title)}</h1><p class="soft">{escape(conditions(report))}</p>'
        f"{f'<div class=notes>{notes}</div>' if notes else ''}"
        f'<div class="charts">{charts}</div>{_summary(report, lines)}{sections}'
        f"{_how()}{_environment(report)}{repeat}</main></body></html>\n"
    )


def _section(scenario: str, title: str, members: Sequence[Line]) -> str:
    measured = [line for line in members if not line.unavailable]
    missing = "".join(
        f"<li>{escape(line.name)}: {escape(line.unavailable)}</li>" for line in members if line.unavailable
    )
    remarks = "".join(f"<li>{escape(names)}: {escape(remark)}</li>" for names, remark in remarks_of(members))
    caption = CAPTIONS.get(scenario, "")
    return (
        f'<h2>{escape(title)} <span class="soft">{escape(caption)}</span></h2>'
        + _table(columns(scenario, members), measured)
        + (f'<ul class="soft marked">{remarks}</ul>' if remarks else "")
        + (f'<p class="soft">Not run:</p><ul class="soft">{missing}</ul>' if missing else "")
    )


def _table(chosen: Sequence[Column], lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    header = "".join(f"<th>{escape(column.title)}</th>" for column in chosen)
    rows = []
    for line in lines:
        texts = [column.text(line) for column in chosen]
        entries = (f"<td{' class=bad' if text.startswith('WRONG') else ''}>{escape(text)}</td>" for text in texts)
        rows.append(f"<tr>{''.join(entries)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _summary(report: Report, lines: Sequence[Line]) -> str:
    """What each candidate costs at the batch that suits it best."""
    best = best_batches(lines)
    if not best:
        return ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in summary_notes(report, best))
    title = '<h2>at its best batch <span class="soft">throughput and what it costs</span></h2>'
    return title + _table(summary_columns(best), best) + (f'<ul class="soft">{notes}</ul>' if notes else "")


def _charts(report: Report, lines: Sequence[Line], colours: dict[str, int]) -> list[str]:
    return [
        *_latency_charts(report.measurements, colours),
        _throughput_chart(lines, colours),
        _load_chart(report.measurements, colours),
        _roofline_chart(report, colours),
    ]


def _latency_charts(rows: Sequence[Measurement], colours: dict[str, int]) -> list[str]:
    """Cumulative distributions: of the single-stream cell, else of the smallest batch measured."""
    timed = [r for r in rows if primary(r) == "end_to_end" and rounds_of(r, "end_to_end")]
    chosen = [r for r in timed if r.conditions.get("scenario") == "single-stream"]
    if not chosen and timed:
        sizes = min((r.conditions.get("sizes", {}) for r in timed), key=lambda s: tuple(s.values()))
        chosen = [r for r in timed if r.conditions.get("sizes", {}) == sizes]
    if not chosen:
        return []
    curves = [_distribution(row, colours) for row in chosen]
    where = sizes_words(chosen[0].conditions.get("sizes", {}))
    title = f"Latency, {where}: share of runs that were at least so fast"
    return [svg.chart(title, curves, x_label="end-to-end latency, ms", y_label="share of runs", log_x=True)]


def _distribution(row: Measurement, colours: dict[str, int], resolution: int = 200) -> svg.Curve:
    values = np.sort(np.concatenate(rounds_of(row, primary(row))))
    shares = (np.arange(values.size) + 1) / values.size
    keep = np.unique(np.linspace(0, values.size - 1, min(resolution, values.size)).astype(int))
    points = [(float(values[i]), float(shares[i])) for i in keep]
    name = display_name(row)
    return svg.Curve(name, points, marks=False, index=colours[name])


def _throughput_chart(lines: Sequence[Line], colours: dict[str, int]) -> str:
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        if line.throughput and line.scenario in ("single-stream", "multi-stream", "offline"):
            points.setdefault(line.name, []).append((float(line.batch), line.throughput))
    batches = sorted({x for found in points.values() for x, _ in found})
    if len(batches) < 2:
        return ""
    curves = [svg.Curve(name, sorted(found), index=colours[name]) for name, found in points.items()]
    return svg.chart(
        "Throughput over the batch size",
        curves,
        x_label="batch",
        y_label="images a second",
        log_x=True,
        log_y=True,
        x_ticks=batches,
    )


def _load_chart(rows: Sequence[Measurement], colours: dict[str, int]) -> str:
    curves = []
    for row in rows:
        trials = [t for t in row.facts.get("trials", ()) if t["answered"] == t["planned"]]
        name = display_name(row)
        points = sorted((t["rate"], t["p99_ns"] / 1e6) for t in trials)
        curves.append(svg.Curve(name, points, index=colours[name]))
    limits = {row.conditions.get("slo_ms") for row in rows if row.facts.get("trials")}
    rates = [x for curve in curves for x, _ in curve.points]
    for value in sorted(v for v in limits if v) if rates else ():
        line = [(min(rates), float(value)), (max(rates), float(value))]
        curves.append(svg.Curve(f"limit {value:g} ms", line, marks=False, index=len(colours)))
    limit = f" (limit {', '.join(f'{v:g} ms' for v in limits if v)})" if limits else ""
    return svg.chart(
        f"Latency under load{limit}", curves, x_label="requests a second", y_label="p99 latency, ms", log_y=True
    )


def _roofline_chart(report: Report, colours: dict[str, int]) -> str:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in report.measurements:
        roof = row.facts.get("roofline")
        if roof and roof.get("roof"):
            points.setdefault(display_name(row), []).append((roof["intensity"], roof["achieved"] / 1e9))
    if not points:
        return ""
    curves = [svg.Curve(name, sorted(found), line=False, index=colours[name]) for name, found in points.items()]
    everything = [x for found in points.values() for x, _ in found]
    low, high = min(everything) / 4, max(everything) * 4
    machines: dict[str, Any] = report.environment.get("machines") or {"": report.environment}
    roofs = [
        (f"{f'{machine} ' if machine else ''}{kind} {precision}", rate, peak["copy"])
        for machine, environment in machines.items()
        for kind, peak in environment.get("peaks", {}).items()
        for precision, rate in peak["gemm"].items()
    ]
    for number, (name, rate, copy) in enumerate(roofs):
        ridge = rate / copy
        span = sorted({low, high, *([ridge] if low < ridge < high else [])})
        roof = [(x, min(rate, x * copy) / 1e9) for x in span]
        curves.append(svg.Curve(f"roof: {name}", roof, marks=False, index=len(colours) + number))
    return svg.chart(
        "Roofline: operations reached against what this machine can do",
        curves,
        x_label="operations a byte",
        y_label="GFLOP/s",
        log_x=True,
        log_y=True,
    )


def _how() -> str:
    return (
        "<h2>How this was measured</h2><p>Each candidate in its own process, one awake at a time, taken in turn over "
        "several rounds; warmed up until the timings were steady. Median ± half the 95 % interval of a bootstrap over "
        "rounds; p90 and p99 by nearest rank, shown where the samples support them. Times are end to end, from host "
        "arrays to host arrays; “compute” is the engine alone. Speedup is the first candidate's time over this "
        "one's, with its interval; “equal” means that the interval lies within 5 %, “undecided” that the noise hides "
        "whether it does. CV is the larger of the scatter within rounds and of the movement between them. "
        "Parity compares the outputs with the reference's.</p>"
    )


def _environment(report: Report) -> str:
    machines: dict[str, Any] = report.environment.get("machines") or {"": report.environment}
    parts = []
    for name, environment in machines.items():
        entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(_flat(v))}</dd>" for k, v in environment.items() if v)
        parts.append(f"<h2>Conditions{f': {escape(name)}' if name else ''}</h2><dl>{entries}</dl>")
    return "".join(parts)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items() if v not in (None, [], {}))
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
