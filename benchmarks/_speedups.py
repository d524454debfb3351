"""How much faster than the stock backends: the results of ``benchmarks.inference`` as a table.

A machine's folder under benchmarks/results holds one ``inference-<model>.json`` a model. Every figure is a ratio of
medians of raw samples. ``benchmarks.tables`` puts the tables into the documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganexport.bench.digest import Line, digest
from ganexport.measurement import Report, report_from_json

AUTO, AUTO_FP32 = "ganexport auto", "ganexport auto fp32"
#: Stock candidates that need no torch where they run.
TORCH_FREE = ("onnxruntime (stock export)", "openvino (stock export)")
#: Load average at the start from which a run does not count as one at rest.
BUSY = 1.0
NOTHING = "Not measured on a machine at rest yet: `make bench` does it."


@dataclass(frozen=True)
class Comparison:
    """One model of one report.

    Attributes:
        model: Its name.
        batches: Measured sizes, ascending.
        best: By batch, (milliseconds, name) of the fastest stock candidate whose pictures are right.
        torch_free: The same among those that need no torch.
        ours: Milliseconds of ``--to auto`` by batch.
        fp32: Milliseconds of ``--to auto --precision fp32`` by batch.
        about: What is recorded of the winner.
        load: Load average at the start, None when not recorded.
    """

    model: str
    batches: tuple[int, ...]
    best: dict[int, tuple[float, str]]
    torch_free: dict[int, tuple[float, str]]
    ours: dict[int, float]
    fp32: dict[int, float]
    about: dict[str, Any]
    load: float | None

    def ratios(self, ours: dict[int, float], peers: dict[int, tuple[float, str]]) -> list[float]:
        """Peer's time over ours by batch; empty when one is missing."""
        if any(batch not in ours or batch not in peers for batch in self.batches):
            return []
        return [peers[batch][0] / ours[batch] for batch in self.batches]


def compare(report: Report, model: str) -> Comparison:
    """What a report says about one model."""
    rows = [row for row in report.measurements if row.conditions.get("model", model) == model]
    lines = [(row, line) for row, line in zip(rows, digest(rows), strict=True) if line.median is not None]
    batches = tuple(sorted({line.batch for _, line in lines}))
    stock = [line for row, line in lines if row.candidate.get("who") == "stock" and not line.parity_failed]
    ours = [row for row in rows if row.candidate.get("name") == AUTO]
    load = report.environment.get("load_average")
    return Comparison(
        model,
        batches,
        _best(stock),
        _best([line for line in stock if line.name in TORCH_FREE]),
        _times([line for _, line in lines if line.name == AUTO]),
        _times([line for _, line in lines if line.name == AUTO_FP32]),
        ours[0].candidate if ours else {},
        None if load is None else float(load),
    )


def _best(lines: Sequence[Line]) -> dict[int, tuple[float, str]]:
    found: dict[int, tuple[float, str]] = {}
    for line in lines:
        assert line.median is not None
        found[line.batch] = min(found.get(line.batch, (math.inf, "")), (line.median.value, line.name))
    return found


def _times(lines: Sequence[Line]) -> dict[int, float]:
    return {line.batch: line.median.value for line in lines if line.median is not None and not line.parity_failed}


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def found_reports(folder: Path) -> Iterator[tuple[str, list[tuple[str, Report]]]]:
    """(machine, [(model, report)]) of every machine's folder."""
    for machine in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = [path for path in sorted(machine.glob("inference-*.json")) if not path.stem.endswith("-under-load")]
        if files:
            named = [(path.stem.removeprefix("inference-"), path) for path in files]
            yield machine.name, [(model, report_from_json(path.read_bytes(), path.name)) for model, path in named]


def render(folder: Path, *, detailed: bool = False) -> str:
    """The tables as Markdown.

    Args:
        folder: Holds a folder a machine.
        detailed: With the peers' names, fp32 and load averages too.
    """
    parts = []
    for machine, reports in found_reports(folder):
        comparisons = [compare(report, model) for model, report in reports]
        parts.append(_detailed(machine, comparisons) if detailed else _short(machine, comparisons))
    return "\n\n".join(parts) or NOTHING


def _short(machine: str, comparisons: Sequence[Comparison]) -> str:
    lines = [
        f"`{machine}`, times faster than the fastest stock fp32 backend (`torch.compile` included):",
        "",
        "| generator | batch 1 / 16 / 64 | geometric mean | worst picture |",
        "|---|---|---|---|",
    ]
    for one in comparisons:
        ratios = one.ratios(one.ours, one.best)
        words = " / ".join(f"{ratio:.2f}" for ratio in ratios) or "not measured"
        mean = f"{geometric_mean(ratios):.2f}" if ratios else "–"
        lines.append(f"| {one.model}{_busy(one)} | {words} | {mean} | {_psnr(one)} |")
    return "\n".join([*lines, *_remark(comparisons)])


def _detailed(machine: str, comparisons: Sequence[Comparison]) -> str:
    lines = [
        f"`{machine}`, medians in milliseconds a run:",
        "",
        "| generator | batch | fastest stock fp32 | `--to auto` | times faster | without torch | `--precision fp32` "
        "| times faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in comparisons:
        for batch in one.batches:
            peer, free = one.best.get(batch), one.torch_free.get(batch)
            ours, fp32 = one.ours.get(batch), one.fp32.get(batch)
            cells = [
                f"{one.model}{_busy(one)}", str(batch), _peer(peer), _ms(ours), _ratio(peer, ours), _peer(free),
                _ms(fp32), _ratio(free, fp32),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        means = [one.ratios(one.ours, one.best), one.ratios(one.fp32, one.torch_free)]
        auto, fp32_mean = (f"**{geometric_mean(ratios):.2f}**" if ratios else "–" for ratios in means)
        what = f"{one.about.get('precision', '–')} on {one.about.get('backend', '–')}, {_psnr(one)}"
        lines.append(f"| {one.model} | all | | {what} | {auto} | | | {fp32_mean} |")
    return "\n".join([*lines, *_remark(comparisons)])


def _busy(one: Comparison) -> str:
    return "" if one.load is not None and one.load < BUSY else " *"


def _remark(comparisons: Sequence[Comparison]) -> list[str]:
    if not any(_busy(one) for one in comparisons):
        return []
    return ["", "\\* Other work ran on the machine (load average of 1 or more at the start): a rough figure."]


def _psnr(one: Comparison) -> str:
    found = one.about.get("certified_psnr")
    return "–" if found is None else f"{found:.1f} dB"


def _peer(found: tuple[float, str] | None) -> str:
    return "–" if found is None else f"{_ms(found[0])} {found[1]}"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _ratio(peer: tuple[float, str] | None, ours: float | None) -> str:
    return "–" if peer is None or ours is None else f"{peer[0] / ours:.2f}"
