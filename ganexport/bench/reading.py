"""Reading a report of ``ganexport bench``: what tables and comparisons read in it is checked first.

Rows, facts and environments are open mappings, so that other benchmarks keep theirs in the same form; a file that a
hand or another program changed must still be refused in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from ganexport.errors import UsageError
from ganexport.measurement import Report, report_from_json

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class _Conditions(msgspec.Struct):
    """What is read of a row's conditions."""

    scenario: str = ""
    sizes: dict[str, int] = {}
    items: Annotated[int, msgspec.Meta(ge=1)] = 1
    machine: str = ""
    warm_up: dict[str, float | bool] = {}


class _Trial(msgspec.Struct):
    """One rate of the server scenario."""

    rate: _Positive
    kept: bool
    p99_ns: float = 0.0


class _Facts(msgspec.Struct):
    """What is read of a row's facts."""

    round_sizes: dict[str, tuple[Annotated[int, msgspec.Meta(ge=0)], ...]] = {}
    trials: tuple[_Trial, ...] = ()
    rate: _Positive | None = None
    roofline: dict[str, float | str | None] = {}
    cpu: dict[str, float] = {}
    gpu: dict[str, Any] = {}
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    joules_per_1000: float | None = None
    cores_used: float | None = None
    leaked_bytes_per_run: float = 0.0
    price_per_hour: float = 0.0
    items_per_dollar: float | None = None


class _Parity(msgspec.Struct):
    """What is read of a row's parity."""

    verdict: str = ""
    psnr: float | None = None


class _Processor(msgspec.Struct, frozen=True):
    """What is read of an environment's processor."""

    model: str | None = None
    affinity: int | None = None
    logical: int | None = None
    features: tuple[str, ...] | None = None


class _Peak(msgspec.Struct):
    """What a machine reaches at best."""

    gemm: dict[str, _Positive]
    copy: _Positive


class _Environment(msgspec.Struct):
    """What is read of an environment; of a merged report, of each machine's."""

    cpu: _Processor = _Processor()
    gpus: tuple[dict[str, Any], ...] = ()
    libraries: dict[str, str | None] = {}
    peaks: dict[str, _Peak] = {}
    machines: dict[str, _Environment] = {}


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        UsageError: Not readable, not a report, or one of something else; the message names the row.
    """
    try:
        report = report_from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    where = str(path)
    try:
        msgspec.convert(report.environment, _Environment)
        for number, row in enumerate(report.measurements):
            where = f"{path}, row {number + 1}"
            conditions, facts = msgspec.convert(row.conditions, _Conditions), msgspec.convert(row.facts, _Facts)
            msgspec.convert(row.parity or {}, _Parity)
            if conditions.scenario == "server" and row.series and facts.rate is None:
                raise msgspec.ValidationError("a server scenario without its rate")
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: not of a report of ganexport bench: {error}") from None
    return report
