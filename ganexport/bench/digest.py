"""Figures computed from raw samples, one line a measurement: what tables, reports and comparisons show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganexport import stats
from ganexport.measurement import Measurement, Series

Floats = NDArray[np.float64]

#: The series that a scenario is judged by.
PRIMARY = {"cold-start": "cold_start", "server": "latency"}


def series_of(row: Measurement, name: str) -> Series | None:
    """The series of that name, None when the row has none."""
    return next((s for s in row.series if s.name == name), None)


def primary(row: Measurement) -> str:
    """Name of the series that this row is judged by."""
    return PRIMARY.get(str(row.conditions.get("scenario")), "end_to_end")


def rounds_of(row: Measurement, name: str) -> list[Floats]:
    """Samples of a series in milliseconds, round by round; one round when the row does not say."""
    series = series_of(row, name)
    if series is None or not series.samples:
        return []
    values = np.asarray(series.samples, dtype=np.float64) / 1e6
    sizes: Sequence[int] = row.facts.get("round_sizes", {}).get(name) or [len(values)]
    return [part for part in np.split(values, np.cumsum(sizes)[:-1]) if part.size]


@dataclass(frozen=True)
class Line:
    """One measurement in figures; times in milliseconds.

    Attributes:
        name: The candidate, with the machine before it in a merged report.
        scenario: "single-stream", "multi-stream", "offline", "server", "cold-start".
        sizes: Dimension sizes.
        items: Samples produced by one run.
        median: Of the primary series, with its interval; None when nothing was measured.
        p90: None where the samples do not support it; so are the next two.
        p99: See p90.
        p999: See p90.
        compute: Median of the engine's work alone.
        throughput: Items a second at the median; of the server scenario, the highest kept rate.
        speedup: Baseline's time over this one's, above 1 is faster; None for the baseline itself.
        noise: How much the rounds moved.
        parity: In a few words.
        parity_failed: Whether the outputs are outside the tolerance.
        peak_host: Bytes.
        peak_device: Bytes.
        share: Of this machine's own roofline, 0 to 1; None when not known.
        bound: What limits: "compute" or "memory".
        joules_per_1000: Energy for a thousand items; None where the machine does not count it.
        to_device: Median of the copies from host to device; None on a CPU, where there are none.
        to_host: Median of the copies from device to host.
        file_bytes: Size of the file that ran.
        cores: Cores that the candidate kept busy.
        items_per_dollar: At the price that was given.
        remarks: What a reader must know ("not steady", "leaks", "throttled").
        unavailable: Why there are no figures.
        slowest: The largest sample.
        load: Of the cold start, the median time to load the file.
        first_run: Of the cold start, the median time of the first run.
    """

    name: str
    scenario: str
    sizes: dict[str, int]
    items: int = 1
    median: stats.Interval | None = None
    p90: float | None = None
    p99: float | None = None
    p999: float | None = None
    compute: float | None = None
    throughput: float | None = None
    speedup: stats.Interval | None = None
    noise: stats.Noise | None = None
    parity: str = ""
    parity_failed: bool = False
    peak_host: int | None = None
    peak_device: int | None = None
    share: float | None = None
    bound: str = ""
    joules_per_1000: float | None = None
    to_device: float | None = None
    to_host: float | None = None
    file_bytes: int | None = None
    cores: float | None = None
    items_per_dollar: float | None = None
    remarks: tuple[str, ...] = field(default=())
    unavailable: str = ""
    slowest: float | None = None
    load: float | None = None
    first_run: float | None = None

    @property
    def batch(self) -> int:
        """Size of the batch (items when the generator has no such dimension)."""
        return self.sizes.get("batch", self.items)

    @property
    def cell(self) -> tuple[str, tuple[tuple[str, int], ...]]:
        """What lines must share to be compared: scenario and sizes."""
        return self.scenario, tuple(sorted(self.sizes.items()))


def display_name(row: Measurement) -> str:
    """The candidate's name, after its machine's in a merged report."""
    name = str(row.candidate.get("name", "?"))
    machine = row.conditions.get("machine")
    return f"{machine}: {name}" if machine else name


def digest(rows: Sequence[Measurement], *, baseline: str | None = None) -> list[Line]:
    """Every row in figures.

    Args:
        rows: Measurements, in the order to be shown.
        baseline: Candidate whose time is the numerator of every speedup; by default the first that
            was measured in each cell.
    """
    return [_line(row, _baseline_of(row, rows, baseline)) for row in rows]


def _baseline_of(row: Measurement, rows: Sequence[Measurement], name: str | None) -> Measurement | None:
    same = [
        other
        for other in rows
        if other.series
        and other.conditions.get("scenario") == row.conditions.get("scenario")
        and other.conditions.get("sizes") == row.conditions.get("sizes")
        and other.conditions.get("machine") == row.conditions.get("machine")
        and (name is None or other.candidate.get("name") == name)
    ]
    return same[0] if same and same[0] is not row else None


def _line(row: Measurement, baseline: Measurement | None) -> Line:
    scenario = str(row.conditions.get("scenario", ""))
    sizes = dict(row.conditions.get("sizes", {}))
    name, items = display_name(row), int(row.conditions.get("items", 1))
    words, failed = parity_words(row.parity)
    rounds = rounds_of(row, primary(row))
    if not rounds:
        return Line(
            name,
            scenario,
            sizes,
            items,
            parity=words,
            parity_failed=failed,
            unavailable=row.unavailable or "no samples",
        )
    pooled = np.concatenate(rounds)
    figures = stats.summary(pooled)
    median = stats.median_interval(rounds)
    noise = stats.noise(rounds)
    roof = row.facts.get("roofline", {})
    return Line(
        name,
        scenario,
        sizes,
        items,
        median,
        figures.get("p90"),
        figures.get("p99"),
        figures.get("p99.9"),
        _median(row, "compute"),
        _throughput(row, median.value, items),
        _speedup(rounds, baseline),
        noise,
        words,
        failed,
        row.facts.get("peak_host_bytes"),
        row.facts.get("peak_device_bytes"),
        roof.get("share"),
        str(roof.get("bound", "")),
        row.facts.get("joules_per_1000"),
        _median(row, "host_to_device"),
        _median(row, "device_to_host"),
        row.candidate.get("file_bytes"),
        row.facts.get("cores_used"),
        row.facts.get("items_per_dollar"),
        _remarks(row, noise),
        row.unavailable,
        figures["max"],
        _median(row, "load"),
        _median(row, "first_run"),
    )


def _median(row: Measurement, name: str) -> float | None:
    """Median of a series in milliseconds; None when the row has none."""
    rounds = rounds_of(row, name)
    return float(np.median(np.concatenate(rounds))) if rounds else None


def _throughput(row: Measurement, median: float, items: int) -> float | None:
    if row.conditions.get("scenario") == "server":
        rate = row.facts.get("rate")
        return float(rate) if rate is not None else None
    if row.conditions.get("scenario") == "cold-start":
        return None
    pipelined = rounds_of(row, "pipelined")
    fastest = min([median, *([float(np.median(np.concatenate(pipelined)))] if pipelined else [])])
    return items * 1e3 / fastest if fastest > 0 else None


def _speedup(rounds: list[Floats], baseline: Measurement | None) -> stats.Interval | None:
    if baseline is None or baseline.conditions.get("scenario") == "server":
        return None
    other = rounds_of(baseline, primary(baseline))
    return stats.ratio_interval(other, rounds) if other else None


def parity_words(parity: dict[str, Any] | None) -> tuple[str, bool]:
    """(a few words for a table, whether the outputs are outside the tolerance)."""
    if not parity:
        return "not checked", False
    verdict = str(parity.get("verdict", ""))
    if verdict == "reference":
        return "reference", False
    decibels = parity.get("psnr")
    text = "identical" if decibels is None else f"{decibels:.0f} dB"
    return (text, False) if verdict == "pass" else (f"WRONG ({text})" if decibels is not None else "WRONG", True)


def _remarks(row: Measurement, noise: stats.Noise) -> tuple[str, ...]:
    found = []
    if not noise.quiet and row.conditions.get("scenario") != "server":  # there the load itself moves the latency
        found.append(noise.verdict)
    warm = row.conditions.get("warm_up", {})
    if warm and not warm.get("steady"):
        found.append(f"not steady after {warm.get('seconds', 0):.1f} s of warm-up")
    if "leaked_bytes_per_run" in row.facts:
        found.append(f"leaks {row.facts['leaked_bytes_per_run'] / 1024:.0f} KiB a run")
    throttled = row.facts.get("gpu", {}).get("throttled_turns")
    if throttled:
        found.append(f"GPU throttled in {throttled} turns")
    return (*found, *_disturbances(row.facts.get("cpu", {})))


def _disturbances(cpu: dict[str, float]) -> list[str]:
    """What else the processor did while this was measured, where it was enough to matter."""
    found = []
    if cpu.get("others_cores", 0) >= 0.2:
        found.append(f"other processes used {cpu['others_cores']:.1f} cores meanwhile")
    if cpu.get("stolen_cores", 0) >= 0.05:
        found.append(f"the hypervisor withheld {cpu['stolen_cores']:.2f} cores")
    if cpu.get("quota_stopped", 0) >= 0.01:
        found.append(f"stopped {cpu['quota_stopped']:.0%} of the time for exceeding its CPU quota")
    if cpu.get("thermal_events", 0):
        found.append(f"the processor throttled for heat {cpu['thermal_events']:.0f} times")
    return found


def milliseconds(value: float | None) -> str:
    """Three significant digits: 0.123, 1.23, 12.3, 123."""
    if value is None:
        return "–"
    for limit, digits in ((1, 3), (10, 2), (100, 1)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def interval_words(interval: stats.Interval | None) -> str:
    """A median with its half width: "1.23 ±2%"."""
    if interval is None:
        return "–"
    width = max(interval.half_width, 0)
    return f"{milliseconds(interval.value)} ±{f'{width:.0%}' if width <= 1 else '>100%'}"


def ratio_words(interval: stats.Interval | None) -> str:
    """A ratio with its interval: "1.71x [1.65, 1.78]"."""
    if interval is None:
        return "–"
    value, low, high = (f"{v:.2f}" if v >= 0.1 else f"{v:.2g}" for v in (interval.value, interval.low, interval.high))
    return f"{value}x [{low}, {high}]"


def speedup_words(interval: stats.Interval | None, threshold: float = 0.05) -> str:
    """A speedup with its interval, and where it is no difference that matters, the word for it."""
    if interval is None:
        return "–"
    word = stats.verdict(stats.Interval(1 / interval.value, 1 / interval.high, 1 / interval.low), threshold)
    return ratio_words(interval) + (f" {word}" if word in ("equal", "undecided") else "")


def bytes_words(count: int | None) -> str:
    """Kibibytes, mebibytes or gibibytes."""
    if count is None:
        return "–"
    if count < 10 * 2**20:
        return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:,.0f} KiB"
    return f"{count / 2**30:.1f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:,.0f} MiB"


def sizes_words(sizes: dict[str, int]) -> str:
    """ "batch 8" or "batch 1, height 256"."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "–"
