"""What images cost."""

from __future__ import annotations

import math

import msgspec

from ganexport.bench.digest import digest
from ganexport.errors import UsageError
from ganexport.measurement import Report


def require_price(price_per_hour: float) -> None:
    """Refuse a price that is none.

    Raises:
        UsageError: It is not positive.
    """
    if not 0 < price_per_hour < math.inf:
        raise UsageError(f"--price-per-hour must be positive, got {price_per_hour:g}")


def with_price(report: Report, price_per_hour: float) -> Report:
    """The report with ``facts["items_per_dollar"]`` at a machine's price, from each row's throughput.

    Raises:
        UsageError: The price is not positive.
    """
    require_price(price_per_hour)
    rows = []
    for row, line in zip(report.measurements, digest(report.measurements), strict=True):
        if line.throughput is None:
            rows.append(row)
            continue
        facts = {"price_per_hour": price_per_hour, "items_per_dollar": line.throughput * 3600 / price_per_hour}
        rows.append(msgspec.structs.replace(row, facts={**row.facts, **facts}))
    return msgspec.structs.replace(report, measurements=tuple(rows))
