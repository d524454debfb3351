"""Results that are on disk as soon as they are measured; what was not measured stands there as not run.

Standard library only, so that a driver can write them on a machine that lacks half the packages. The
format is that of ``ganexport.measurement.Report`` and can be read, compared and merged by
``ganexport bench``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
NOT_RUN = "not run: the deadline came first"


class Results:
    """One report file, rewritten after every row.

    Args:
        path: Where it lies.
        title: For people.
        planned: (candidate, conditions) of every row, in the order in which they will be measured;
            those that never are stay in the file as not run.
        command: What to type to repeat it.
    """

    def __init__(
        self, path: Path, title: str, planned: list[tuple[dict[str, Any], dict[str, Any]]], command: str = ""
    ) -> None:
        from ganexport.environment import describe

        self.path = path
        self.head: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "title": title,
            "environment": describe(),
            "notes": [],
            "command": command or "python -m " + " ".join([_module(), *sys.argv[1:]]),
        }
        self.rows: list[dict[str, Any]] = [
            {"candidate": candidate, "conditions": conditions, "unavailable": NOT_RUN}
            for candidate, conditions in planned
        ]
        self.done = 0
        self.write()

    def note(self, text: str) -> None:
        """Add a remark for the reader."""
        self.head["notes"].append(text)
        self.write()

    def add(
        self,
        index: int,
        series: dict[str, list[int]] | None = None,
        *,
        items: int = 1,
        unavailable: str = "",
        facts: dict[str, Any] | None = None,
        parity: dict[str, Any] | None = None,
    ) -> None:
        """Fill row ``index`` and write the file.

        Args:
            index: Position in the plan.
            series: Samples in nanoseconds by name.
            items: Images each sample stands for.
            unavailable: Why there are no samples.
            facts: Single figures.
            parity: Comparison with the reference.
        """
        row = {key: self.rows[index][key] for key in ("candidate", "conditions")}
        if series:
            row["conditions"] = {**row["conditions"], "items": items}
            row["series"] = [{"name": n, "samples": s, "items": items} for n, s in series.items() if s]
        if unavailable:
            row["unavailable"] = unavailable
        if facts:
            row["facts"] = facts
        if parity:
            row["parity"] = parity
        self.rows[index] = row
        self.done += 1
        self.write()

    def write(self) -> None:
        """Write the whole file, so that a reader (or a kill) never sees half of it."""
        lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in self.head.items()]
        body = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in self.rows)
        text = "{\n" + "\n".join(lines) + '\n "measurements": [\n  ' + body + "\n ]\n}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


def write_runs(path: Path, title: str, command: str, rows: list[dict[str, Any]], notes: tuple[str, ...] = ()) -> None:
    """Trainings and how good they became, as a report.

    Args:
        path: Where it lies.
        title: For people.
        command: What to type to repeat it.
        rows: A training each: "way", "recipe", "seed", "steps", "sets", "seconds" and figures of quality.
        notes: Remarks for the reader.
    """
    given = ("way", "recipe", "seed", "steps", "sets", "seconds")
    planned = [
        ({"name": row["way"], "recipe": row["recipe"]}, {key: row[key] for key in ("seed", "steps", "sets")})
        for row in rows
    ]
    results = Results(path, title, planned, command)
    for index, row in enumerate(rows):
        facts = {key: value for key, value in row.items() if key not in given}
        results.add(index, {"training": [int(row["seconds"] * 1e9)]}, facts=facts)
    for note in notes:
        results.note(note)


class Deadline:
    """Time that is left.

    Args:
        seconds: From now.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, not below zero."""
        return max(0.0, self.end - time.monotonic())


def median(samples: list[int]) -> float:
    """Median of samples."""
    ordered = sorted(samples)
    middle = len(ordered) // 2
    return float(ordered[middle]) if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def say(text: str) -> None:
    """One line of progress on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _module() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name
