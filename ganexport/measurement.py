"""A measurement: raw samples and the conditions under which they were taken.

Percentiles, ratios and verdicts are computed from it later (see :mod:`ganexport.stats`), never stored instead.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from ganexport.errors import UsageError

SCHEMA_VERSION = 1


class Series(msgspec.Struct, frozen=True, omit_defaults=True):
    """Raw samples of one thing that was timed.

    Attributes:
        name: "compute", "end_to_end", "host_to_device", "device_to_host", "cold_start", …
        samples: Nanoseconds, from 1, in the order they were taken.
        items: Images (or other items) produced by each sample; one number when constant.
    """

    name: str
    samples: tuple[Annotated[int, msgspec.Meta(ge=1)], ...]
    items: int = 1


class Measurement(msgspec.Struct, frozen=True, omit_defaults=True):
    """One candidate under one set of conditions.

    Attributes:
        candidate: What was run: backend, precision, settings, as a flat mapping with a "name".
        conditions: Batch, scenario, sizes, threads, warm-up count.
        series: Raw samples; empty when it could not be run.
        unavailable: Why it could not be run (backend missing, out of memory); empty when it ran.
        parity: Output against the reference, so that a fast wrong answer shows; None when not checked.
        facts: Single figures taken on the way: peak memory in bytes, file sizes, FLOPs per image.
    """

    candidate: dict[str, Any]
    conditions: dict[str, Any]
    series: tuple[Series, ...] = ()
    unavailable: str = ""
    parity: dict[str, Any] | None = None
    facts: dict[str, Any] = {}


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """A set of measurements taken in one go on one machine.

    Attributes:
        schema_version: :data:`SCHEMA_VERSION` of the writer.
        title: For people.
        environment: Machine and library versions (:func:`ganexport.environment.describe`).
        measurements: All rows, those that could not be run included.
        notes: Conditions in words ("interrupted by Ctrl-C: 3 rows were measured, the rest was not").
        command: What to type to repeat it.
    """

    schema_version: int
    title: str
    environment: dict[str, Any]
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...] = ()
    command: str = ""

    @property
    def interrupted_by(self) -> str:
        """ "Ctrl-C" or "SIGTERM" where a note says so; "" of a whole report."""
        note = next((note for note in self.notes if note.startswith("interrupted")), "")
        return "" if not note else "SIGTERM" if note.startswith("interrupted by SIGTERM") else "Ctrl-C"


def report_to_json(report: Report) -> bytes:
    """The report as JSON, one measurement a line, so that committed results diff well."""
    head = msgspec.to_builtins(msgspec.structs.replace(report, measurements=()))
    head.pop("measurements", None)
    lines = [
        f" {msgspec.json.encode(key).decode()}: {msgspec.json.encode(value).decode()}," for key, value in head.items()
    ]
    rows = ",\n  ".join(msgspec.json.encode(m).decode() for m in report.measurements)
    return ("{\n" + "\n".join(lines) + '\n "measurements": [\n  ' + rows + "\n ]\n}\n").encode()


def report_from_json(text: bytes, where: str = "report") -> Report:
    """Read a report written by :func:`report_to_json`.

    Raises:
        UsageError: Not a report, or of a newer schema.
    """
    try:
        report = msgspec.json.decode(text, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: not a benchmark report: {error}") from None
    if report.schema_version > SCHEMA_VERSION:
        raise UsageError(f"{where}: written by a newer ganexport (schema {report.schema_version}): upgrade ganexport")
    return report
