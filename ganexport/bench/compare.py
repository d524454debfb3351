"""Two reports against each other: did anything become slower, beyond the noise?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from ganexport import stats
from ganexport.bench.digest import display_name, parity_words, primary, rounds_of
from ganexport.environment import device_key
from ganexport.errors import UsageError
from ganexport.measurement import SCHEMA_VERSION, Measurement, Report


@dataclass(frozen=True)
class Difference:
    """One candidate in one cell, before and after.

    Attributes:
        name: The candidate.
        scenario: See :class:`~ganexport.bench.digest.Line`.
        sizes: Dimension sizes.
        comparison: New over old time; None when it could not be compared.
        reason: Why not.
        lost: What the old report had and the new one has not, in words: the row, its samples or its right outputs.
    """

    name: str
    scenario: str
    sizes: dict[str, int]
    comparison: stats.Comparison | None = None
    reason: str = ""
    lost: str = ""

    @property
    def verdict(self) -> str:
        """ "slower", "faster", "equal", "undecided" or "not compared"."""
        return self.comparison.verdict if self.comparison else "not compared"


def compare_reports(old: Report, new: Report, threshold: float = 0.05) -> list[Difference]:
    """Compare every candidate in every cell that both reports know.

    Args:
        old: Before.
        new: After.
        threshold: Share of slowdown that is accepted.

    Raises:
        UsageError: The reports have nothing in common.
    """
    before = {_key(row): row for row in old.measurements}
    after = {_key(row): row for row in new.measurements}
    if not before.keys() & after.keys():
        raise UsageError(
            "the two reports have no candidate in the same scenario and batch in common, so there is nothing to compare"
        )
    found = [_difference(before.get(key), row, threshold) for key, row in after.items()]
    gone = "not measured any more" + (f" (interrupted by {new.interrupted_by})" if new.interrupted_by else "")
    found += [
        Difference(
            display_name(row), *_cell(row), reason="only in the old report", lost="" if row.unavailable else gone
        )
        for key, row in before.items()
        if key not in after
    ]
    return found


def environment_changes(old: Report, new: Report) -> list[str]:
    """Differences of machine and libraries that make absolute figures incomparable, in words."""
    changes = []
    before, after = old.environment, new.environment
    if device_key(before) != device_key(after):
        changes.append(f"machine: {device_key(before)} → {device_key(after)}")
    libraries = before.get("libraries", {}), after.get("libraries", {})
    for name in sorted(set(libraries[0]) | set(libraries[1])):
        versions = libraries[0].get(name), libraries[1].get(name)
        if versions[0] != versions[1]:
            changes.append(f"{name}: {versions[0] or 'none'} → {versions[1] or 'none'}")
    return changes


def merge_reports(reports: list[Report], title: str = "") -> Report:
    """Several machines' reports as one: each row says which machine it comes from.

    Raises:
        UsageError: No report to merge.
    """
    if not reports:
        raise UsageError("nothing to merge: name at least one report")
    machines: dict[str, Any] = {}
    rows: list[Measurement] = []
    notes: list[str] = []
    for report in reports:
        known = report.environment.get("machines")
        if isinstance(known, dict):  # merged before
            machines |= known
            rows += report.measurements
        else:
            name = _machine_name(report.environment, machines)
            machines[name] = report.environment
            rows += [
                msgspec.structs.replace(row, conditions={**row.conditions, "machine": name})
                for row in report.measurements
            ]
        notes += [note for note in report.notes if note not in notes]
    heading = title or reports[0].title
    return Report(SCHEMA_VERSION, heading, {"machines": machines}, tuple(rows), tuple(notes), "ganexport bench merge …")


def _machine_name(environment: dict[str, Any], taken: dict[str, Any]) -> str:
    base = device_key(environment)
    name, number = base, 2
    while name in taken and taken[name] != environment:
        name, number = f"{base}-{number}", number + 1
    return name


def _cell(row: Measurement) -> tuple[str, dict[str, int]]:
    return str(row.conditions.get("scenario", "")), dict(row.conditions.get("sizes", {}))


def _key(row: Measurement) -> tuple[Any, ...]:
    scenario, sizes = _cell(row)
    limits = tuple(row.conditions.get(k) for k in ("slo_ms", "max_batch", "max_delay_ms"))
    return display_name(row), scenario, tuple(sorted(sizes.items())), limits


def _difference(old: Measurement | None, new: Measurement, threshold: float) -> Difference:
    name, (scenario, sizes) = display_name(new), _cell(new)
    if old is None:
        return Difference(name, scenario, sizes, reason="only in the new report")
    if old.unavailable and new.unavailable:
        return Difference(name, scenario, sizes, reason=f"ran in neither: {new.unavailable}")
    if old.unavailable:
        return Difference(name, scenario, sizes, reason=f"old: {old.unavailable}")
    if new.unavailable:
        return Difference(name, scenario, sizes, reason=f"new: {new.unavailable}", lost="runs no more")
    words, wrong = parity_words(new.parity)
    lost = f"outputs outside the tolerance now: {words}" if wrong and not parity_words(old.parity)[1] else ""
    if scenario == "server":
        return Difference(name, scenario, sizes, _compare_rates(old, new, threshold), lost, lost)
    before, after = rounds_of(old, primary(old)), rounds_of(new, primary(new))
    if not before or not after:
        return Difference(name, scenario, sizes, reason="no samples", lost="no samples any more" if before else "")
    return Difference(name, scenario, sizes, _judge(_unpaired(after, before), threshold), lost, lost)


def _unpaired(new: list[Any], old: list[Any]) -> stats.Interval:
    """Rounds of two reports were not taken in turn, so they are resampled independently of each other."""
    above, below = stats.median_interval(new), stats.median_interval(old, seed=1)
    # Of a ratio of independent estimates the squared log-widths add.
    value = above.value / below.value
    down = math.hypot(math.log(above.value / above.low), math.log(below.high / below.value))
    up = math.hypot(math.log(above.high / above.value), math.log(below.value / below.low))
    return stats.Interval(value, value * math.exp(-down), value * math.exp(up))


def _judge(ratio: stats.Interval, threshold: float) -> stats.Comparison:
    return stats.Comparison(ratio, stats.verdict(ratio, threshold), threshold)


def _compare_rates(old: Measurement, new: Measurement, threshold: float) -> stats.Comparison:
    """The search stops between a kept and a refused rate: that gap is the interval."""
    low_old, high_old = _bracket(old)
    low_new, high_new = _bracket(new)
    value = float(old.facts["rate"]) / float(new.facts["rate"])
    return _judge(stats.Interval(value, low_old / high_new, high_old / low_new), threshold)


def _bracket(row: Measurement) -> tuple[float, float]:
    kept = float(row.facts["rate"])
    refused = [t["rate"] for t in row.facts.get("trials", ()) if not t["kept"] and t["rate"] > kept]
    return kept, min(refused, default=kept)
