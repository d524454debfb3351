"""Is the candidate's output the reference's? Tolerances, comparisons and the certificate.

Nothing here runs an engine: it compares arrays and records what was compared. The tolerance of
every comparison comes from one table, :data:`TOLERANCES`, each row with its reason.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganexport.errors import UsageError

Array = NDArray[Any]


class Tolerance(msgspec.Struct, frozen=True):
    """What a comparison must reach.

    Attributes:
        precision: Of the candidate: "fp32", "fp16", "bf16", "int8".
        max_abs: Largest absolute error, as a share of the peak; None when not judged.
        min_psnr: Smallest PSNR in dB of any compared tensor.
        reason: Why this figure and no tighter one.
        max_drift: Largest share by which it may move the Fréchet distance on paired latents; None when not judged.
    """

    precision: str
    max_abs: float | None
    min_psnr: float
    reason: str
    max_drift: float | None = None


TOLERANCES: tuple[Tolerance, ...] = (
    Tolerance(
        "fp32",
        1e-3,
        80.0,
        "the same fp32 arithmetic in another order: each of ~10 layers sums up to 10^4 products, "
        "rounding 6e-8 each, amplified by normalisations; stock exports read 110-140 dB",
    ),
    Tolerance(
        "fp16",
        None,
        40.0,
        "11 bits of mantissa leave about 60 dB a layer; below 40 dB a trained eye begins to see it",
    ),
    Tolerance("tf32", None, 40.0, "float32 whose products have fp16's mantissa"),
    Tolerance("bf16", None, 40.0, "8 bits of mantissa, fp32 sums: trained generators read 51-54 dB"),
    Tolerance(
        "int8",
        None,
        35.0,
        "per-channel weights and calibrated activations read about 37 dB on trained statistics; "
        "35 dB is one grey level and a half of 255 on average; roundings that are the same in every picture show in "
        "the distribution before they show in a pair, and good ones move it by 0.2% to 0.7%",
        max_drift=0.02,
    ),
    Tolerance(
        "uint8",
        None,
        45.0,
        "one least significant bit everywhere is 48 dB; rounding ties may fall either way",
    ),
)


def tolerance(precision: str) -> Tolerance:
    """The row of :data:`TOLERANCES` for a candidate's precision.

    Raises:
        UsageError: There is no such row.
    """
    for row in TOLERANCES:
        if row.precision == precision:
            return row
    raise UsageError(f"no tolerance for precision {precision!r}; known: {', '.join(t.precision for t in TOLERANCES)}")


class TensorParity(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far one output was from the reference, over everything compared.

    Attributes:
        name: The output.
        samples: How many samples (rows of the batch) were compared.
        max_abs: Largest absolute error.
        mean_abs: Mean absolute error.
        psnr: dB over all elements, with :attr:`peak`; None when identical (infinite).
        worst_psnr: dB of the worst sample; None when identical.
        worst: (input set, row) of the worst sample.
        peak: The declared range's width, else the reference's max - min.
        nonfinite: NaN or infinite elements in the candidate where the reference has none.
    """

    name: str
    samples: int
    max_abs: float
    mean_abs: float
    psnr: float | None
    worst_psnr: float | None
    worst: tuple[int, int]
    peak: float
    nonfinite: int = 0


class Certificate(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was compared with what, under which runtime, and the verdict.

    Attributes:
        verdict: "pass", "fail" or "partial" (part of it could not be run here; see notes).
        reference: What produced the reference ("eager torch fp32", "golden outputs").
        runtime: What ran the candidate ("onnxruntime 1.31.0 CPUExecutionProvider").
        precision: Row of the tolerance table that was applied.
        outputs: One entry an output.
        sizes: Every combination of dimension sizes that was run.
        unseen: Those of them that the exporter was never shown.
        deterministic: The same input twice gave the same bits; None when not tried.
        notes: What was not done and why, in plain words.
        failures: Each way in which it is outside the tolerance, in plain words.
        frechet_drift: By which share the candidate moves the Fréchet distance on paired latents
            (:func:`ganexport.frechet.movement`), judged where the tolerance has a figure for it. None for outputs that
            are no pictures, and for fewer than 64 of them.
        warnings: What holds, and may still not be meant, in plain words.
        independent: A sample stays what it is, within the tolerance, whatever shares its batch; None when not tried
            (one sample a call).
    """

    verdict: str
    reference: str
    runtime: str
    precision: str
    outputs: tuple[TensorParity, ...] = ()
    sizes: tuple[dict[str, int], ...] = ()
    unseen: tuple[dict[str, int], ...] = ()
    deterministic: bool | None = None
    notes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    frechet_drift: float | None = None
    independent: bool | None = None
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing that was run is outside its tolerance."""
        return self.verdict in ("pass", "partial") and not self.failures


class Comparison:
    """Accumulates the comparison of one output over many input sets, in bounded memory.

    Args:
        name: The output's name.
        range: Declared (low, high); without it the peak is the reference's max - min.
    """

    def __init__(self, name: str, range: tuple[float, float] | None = None) -> None:  # noqa: A002
        self.name = name
        self.range = range
        self.samples = 0
        self.elements = 0
        self.sum_abs = 0.0
        self.sum_square = 0.0
        self.max_abs = 0.0
        self.nonfinite = 0
        self.worst = (-1, -1)
        self.worst_mse = -1.0
        self.low, self.high = math.inf, -math.inf
        self.failures: list[str] = []

    def add(self, reference: Array, candidate: Array, input_set: int = 0) -> None:
        """Compare one batch; shape differences are recorded as failures, not raised.

        Args:
            reference: [batch, …], the truth.
            candidate: [batch, …], to be judged.
            input_set: Number of the input set, kept for the worst sample.
        """
        if reference.shape != candidate.shape:
            self.failures.append(
                f"{self.name}: shape {list(candidate.shape)} where the reference has {list(reference.shape)} "
                f"(input set {input_set})"
            )
            return
        if reference.ndim == 0:
            reference, candidate = reference.reshape(1), candidate.reshape(1)
        truth = reference.astype(np.float64).reshape(reference.shape[0], -1)
        value = candidate.astype(np.float64).reshape(truth.shape)
        self.samples += truth.shape[0]
        if truth.size == 0:
            return
        bad = ~np.isfinite(value) & np.isfinite(truth)
        self.nonfinite += int(bad.sum())
        both = np.isfinite(value) & np.isfinite(truth)
        error = np.where(both, value - np.where(both, truth, 0.0), 0.0)
        self.elements += truth.size
        self.sum_abs += float(np.abs(error).sum())
        self.sum_square += float((error * error).sum())
        self.max_abs = max(self.max_abs, float(np.abs(error).max()))
        finite = truth[np.isfinite(truth)]
        if finite.size:
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
        mse = (error * error).mean(axis=1)
        mse[bad.any(axis=1)] = math.inf
        row = int(np.argmax(mse))
        if mse[row] > self.worst_mse:
            self.worst_mse, self.worst = float(mse[row]), (input_set, row)

    def result(self) -> TensorParity:
        """The figures over everything added so far."""
        peak = self.range[1] - self.range[0] if self.range else max(self.high - self.low, 0.0)
        if not math.isfinite(peak) or peak == 0.0:
            peak = max(abs(self.high), 1.0) if math.isfinite(self.high) else 1.0
        count = max(self.elements, 1)
        return TensorParity(
            self.name,
            self.samples,
            self.max_abs,
            self.sum_abs / count,
            psnr(self.sum_square / count, peak),
            psnr(max(self.worst_mse, 0.0), peak),
            self.worst,
            peak,
            self.nonfinite,
        )

    def beyond_range(self) -> str:
        """How far the reference leaves its declared range, in plain words; empty within 5% of its width."""
        if self.range is None or self.low > self.high:
            return ""
        low, high = self.range
        slack = 0.05 * (high - low)
        if low - slack <= self.low and self.high <= high + slack:
            middle = (low + high) / 2
            if self.samples >= 64 and self.low >= middle - 0.01 * (high - low) and self.high > middle:
                return (
                    f"{self.name}: no value lies below {self.low:.3g}, its declared range is [{low:g},{high:g}]: if it "
                    f"begins at {middle:g}, say so, or pictures lack contrast (--output says the range)"
                )
            return ""
        return (
            f"{self.name}: the source's values reach from {self.low:.3g} to {self.high:.3g}, its declared range is "
            f"[{low:g},{high:g}]: pictures and bytes clip them (--output says the range)"
        )

    def judge(self, row: Tolerance, min_psnr: float | None = None) -> list[str]:
        """Every way in which the figures are outside a tolerance, in plain words (none: it passes)."""
        result, failures = self.result(), list(self.failures)
        floor = row.min_psnr if min_psnr is None else min_psnr
        if self.samples == 0 and not failures:
            failures.append(f"{self.name}: nothing was compared")
        if result.nonfinite:
            failures.append(f"{self.name}: {result.nonfinite} NaN or infinite values where the reference has none")
        if result.worst_psnr is not None and result.worst_psnr < floor:
            failures.append(
                f"{self.name}: worst sample {result.worst_psnr:.1f} dB, needs {floor:.1f} dB ({row.precision})"
            )
        if row.max_abs is not None and result.max_abs > row.max_abs * result.peak:
            allowed = row.max_abs * result.peak
            failures.append(f"{self.name}: largest error {result.max_abs:.3g}, allowed {allowed:.3g} ({row.precision})")
        return failures


def psnr(mean_square_error: float, peak: float) -> float | None:
    """Peak signal-to-noise ratio in dB, 10·log10(peak² / MSE); None when the error is zero (infinite)."""
    if mean_square_error <= 0.0:
        return None
    if not math.isfinite(mean_square_error):
        return -999.0
    return 10.0 * math.log10(peak * peak / mean_square_error)
