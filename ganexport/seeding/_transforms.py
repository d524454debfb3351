"""From random words to values, in correctly rounded IEEE operations only (see docs/seed-contract.md)."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganexport.spec import Label, Normal, OneHot, Uniform

Array = NDArray[Any]

#: Elements worked on at a time, so that the temporaries stay in the processor's cache.
_CHUNK = 1 << 13
#: Up to here an operation costs the same whatever its length.
_FEW = 512

# ---- normal quantile -------------------------------------------------------------------------
# Wichura, "Algorithm AS 241: The percentage points of the normal distribution", 1988, routine
# PPND16. Row k holds the numerator's and the denominator's coefficient of r^k.


def _coefficients(*rows: tuple[float, float]) -> Array:
    return np.array(rows[::-1], np.float64)[:, :, None]  # [8, 2, 1], highest power first


_CENTRE = _coefficients(
    (3.3871328727963666080e0, 1.0),
    (1.3314166789178437745e2, 4.2313330701600911252e1),
    (1.9715909503065514427e3, 6.8718700749205790830e2),
    (1.3731693765509461125e4, 5.3941960214247511077e3),
    (4.5921953931549871457e4, 2.1213794301586595867e4),
    (6.7265770927008700853e4, 3.9307895800092710610e4),
    (3.3430575583588128105e4, 2.8729085735721942674e4),
    (2.5090809287301226727e3, 5.2264952788528545610e3),
)
_MIDDLE = _coefficients(
    (1.42343711074968357734e0, 1.0),
    (4.63033784615654529590e0, 2.05319162663775882187e0),
    (5.76949722146069140550e0, 1.67638483018380384940e0),
    (3.64784832476320460504e0, 6.89767334985100004550e-1),
    (1.27045825245236838258e0, 1.48103976427480074590e-1),
    (2.41780725177450611770e-1, 1.51986665636164571966e-2),
    (2.27238449892691845833e-2, 5.47593808499534494600e-4),
    (7.74545014278341407640e-4, 1.05075007164441684324e-9),
)
_FAR = _coefficients(
    (6.65790464350110377720e0, 1.0),
    (5.46378491116411436990e0, 5.99832206555887937690e-1),
    (1.78482653991729133580e0, 1.36929880922735805310e-1),
    (2.96560571828504891230e-1, 1.48753612908506148525e-2),
    (2.65321895265761230930e-2, 7.86869131145613259100e-4),
    (1.24266094738807843860e-3, 1.84631831751005468180e-5),
    (2.71155556874348757815e-5, 1.42151175831644588870e-7),
    (2.01033439929228813265e-7, 2.04426310338993978564e-15),
)
_MINUS_LN2 = np.array(-0.6931471805599453)
_SQRT_HALF_BITS = np.array(0.7071067811865476).view(np.int64)
#: 2 / (2 k + 1), k = 7 .. 0: log m = s (c0 + s² (c1 + s² (…))) with s = (m - 1) / (m + 1).
_LOG_SERIES = tuple(np.array(2.0 / (2 * k + 1)) for k in range(7, -1, -1))
# Zero-dimensional arrays rather than numbers: an operation on a short array is then faster.
_HALF, _ONE, _WORD, _HALF_WORD = np.array(0.5), np.array(1.0), np.array(2.0**-32), np.array(2.0**-33)
_CENTRE_END, _TAIL, _MIDDLE_START = np.array(0.180625), np.array(0.425), np.array(1.6)
_52 = np.array(52)
_TABLES = (_CENTRE, _MIDDLE, _FAR)
#: Of the arrays that :func:`_minus_log` works in.
_LOG_WORK = (np.int64, np.int64, np.float64, np.float64, np.float64)
#: [16, 2]: the coefficients of the centre and of the middle beside each other.
_REGIONS = np.concatenate([_CENTRE, _MIDDLE], axis=2).reshape(16, 2)


def _minus_log(x: Array, work: Sequence[Array], out: Array) -> Array:
    """Minus the natural logarithm of positive normal float64 numbers, in exact operations only.

    Args:
        x: [elements] float64.
        work: Five arrays like x to work in: float64, but the first two int64.
        out: [elements] float64 for the result.
    """
    exponent, bits, mantissa, s, square = work
    # x = m 2^k with m in [√½, √2): what is above the exponent of √½ is k, both halves exact.
    np.subtract(x.view(np.int64), _SQRT_HALF_BITS, exponent)
    np.right_shift(exponent, _52, exponent)
    np.left_shift(exponent, _52, bits)
    np.subtract(x.view(np.int64), bits, bits)
    np.copyto(mantissa, bits.view(np.float64))
    np.subtract(_ONE, mantissa, s)  # with the sign of minus the logarithm
    np.add(mantissa, _ONE, mantissa)
    np.divide(s, mantissa, s)
    np.multiply(s, s, square)
    np.multiply(square, _LOG_SERIES[0], out)
    for coefficient in _LOG_SERIES[1:-1]:
        np.add(out, coefficient, out)
        np.multiply(out, square, out)
    np.add(out, _LOG_SERIES[-1], out)
    np.multiply(out, s, out)
    np.multiply(exponent, _MINUS_LN2, square)
    return np.add(out, square, out)


@functools.lru_cache(maxsize=128)
def _spelled_out(table: int, elements: int) -> Array:
    """A table's coefficients repeated for short arrays, where broadcasting costs more than arithmetic."""
    return np.ascontiguousarray(np.broadcast_to(_TABLES[table], (8, 2, elements)))


def _ratio(table: int, r: Array) -> Array:
    """Numerator over denominator at r, [elements]."""
    both = np.empty((2, r.size))
    if r.size > _FEW:
        return _horner(_TABLES[table], r, both)
    wide = np.empty((2, r.size))
    wide[...] = r
    return _horner(_spelled_out(table, r.size), wide, both)


def _horner(rows: Sequence[Array] | Array, r: Array, both: Array) -> Array:
    """The ratio of two polynomials at r, [elements]; both by Horner's rule, side by side.

    Args:
        rows: Eight of [2, elements or 1]: numerator's and denominator's coefficients, highest power first.
        r: [elements] or [2, elements].
        both: [2, elements] to work in; its first row is returned.
    """
    np.multiply(rows[0], r, both)
    for row in rows[1:-1]:
        np.add(both, row, both)
        np.multiply(both, r, both)
    np.add(both, rows[-1], both)
    quotient: Array = np.divide(both[0], both[1], both[0])
    return quotient


def normal_quantile(p: Array) -> Array:
    """The value below which a standard normal variable lies with probability p.

    Args:
        p: [elements] float64, each from 2^-1022 to 1 - 2^-53.

    Returns:
        [elements] float64, within 1e-13 (relative) of the true quantile.
    """
    q = p - 0.5
    r = q * q
    np.subtract(0.180625, r, out=r)
    value = _ratio(0, r)
    value *= q
    tail = np.flatnonzero(np.abs(q) > 0.425)
    if tail.size:
        low = p[tail]
        low = np.minimum(low, 1.0 - low)
        work = [np.empty(low.size, kind) for kind in _LOG_WORK]
        r = _minus_log(low, work, np.empty(low.size))
        np.sqrt(r, r)
        x = _ratio(1, r - 1.6)
        far = np.flatnonzero(r > 5.0)
        if far.size:
            x[far] = _ratio(2, r[far] - 5.0)
        value[tail] = np.where(q[tail] < 0.0, -x, x)
    return value


class _Few:
    """:func:`normal_quantile` of short arrays, where the number of operations counts and not their length.

    The same operations on each element, and so the same bits; but centre and tail go through one
    Horner scheme, each element with its region's coefficients, and the arrays to work in and their
    views are made once.

    Attributes:
        p: [elements] float64: what is asked for, each from 2^-33 to 1 - 2^-33, so near the centre
            that the third table is not needed.

    Args:
        elements: At most :data:`_FEW`.
    """

    def __init__(self, elements: int) -> None:
        self.p, self._q, self._low, self._root = np.empty((4, elements))
        self._tail = np.empty(elements, bool)
        self._region = self._tail.view(np.int8)
        self._work = [np.empty(elements, kind) for kind in _LOG_WORK]
        self._coefficients = np.empty((16, elements))
        self._rows = list(self._coefficients.reshape(8, 2, elements))
        self._wide, self._both = np.empty((2, 2, elements))
        self._r, self._r_again = self._wide

    def quantiles(self) -> Array:
        """Of :attr:`p`; the array is overwritten by the next call."""
        p, q, low, r, root, tail = self.p, self._q, self._low, self._r, self._root, self._tail
        np.subtract(p, _HALF, q)
        np.absolute(q, r)
        np.greater(r, _TAIL, tail)
        np.subtract(_ONE, p, low)
        np.minimum(p, low, out=low)
        _minus_log(low, self._work, root)
        np.sqrt(root, root)
        np.subtract(root, _MIDDLE_START, root)
        np.multiply(q, q, r)
        np.subtract(_CENTRE_END, r, r)
        np.copyto(r, root, where=tail)
        np.copyto(self._r_again, r)
        _REGIONS.take(self._region, 1, self._coefficients, "clip")
        value = _horner(self._rows, self._wide, self._both)
        np.copysign(_ONE, q, q, where=tail)  # x or -x in the tails
        return np.multiply(value, q, value)


class _PerThread(threading.local):
    """Arrays to work in, of each size that was asked for."""

    def __init__(self) -> None:
        self.few = functools.lru_cache(maxsize=32)(_Few)


_PER_THREAD = _PerThread()


@functools.lru_cache(maxsize=64)
def normal_below(t: float) -> float:
    """Probability that a standard normal variable is below -t: 60 halvings over :func:`normal_quantile`."""
    low, high = 0.0, 0.5
    for _ in range(60):
        middle = (low + high) * 0.5
        if normal_quantile(np.array([middle]))[0] < -t:
            low = middle
        else:
            high = middle
    return high


# ---- values ----------------------------------------------------------------------------------


def _normal_values(words: Array, sampler: Normal, truncation: float | None) -> Array:
    few = _PER_THREAD.few(words.size) if words.size <= _FEW else None
    p = few.p if few else np.empty(words.shape)
    np.copyto(p, words)
    p *= _WORD
    p += _HALF_WORD  # (word + ½) 2^-32: every step is exact
    if truncation is not None:
        low = normal_below(truncation)
        p *= 1.0 - low - low
        p += low
    value = few.quantiles() if few else normal_quantile(p)
    if truncation is not None:
        np.clip(value, -truncation, truncation, out=value)
    if sampler.std != 1.0:
        value *= sampler.std
    if sampler.mean != 0.0:
        value += sampler.mean
    return value.astype(np.float32)


def _uniform_values(words: Array, sampler: Uniform) -> Array:
    value = (words >> np.uint32(8)).astype(np.float64) * 2.0**-24
    value *= sampler.high - sampler.low
    value += sampler.low
    rounded = value.astype(np.float32)
    high = np.float32(sampler.high)
    below = np.nextafter(high, np.float32(-math.inf)) if float(high) >= sampler.high else high
    return np.minimum(rounded, below)  # rounding to float32 may reach the excluded end


def _labels(words: Array, classes: int) -> Array:
    chosen: Array = ((words.astype(np.uint64) * np.uint64(classes)) >> np.uint64(32)).astype(np.int64)
    return chosen


def _values(sampler: Any, words: Array, truncation: float | None) -> Array:
    if isinstance(sampler, Normal):
        return _normal_values(words, sampler, truncation)
    if isinstance(sampler, Uniform):
        return _uniform_values(words, sampler)
    return _labels(words, sampler.classes)


def random_values(sampler: Any, words: Array, truncation: float | None) -> Array:
    """[samples, elements] values of flat words; in pieces that fit the cache."""
    flat = words.reshape(-1)
    if flat.size <= _CHUNK:
        return _values(sampler, flat, truncation).reshape(words.shape)
    dtype = np.int64 if isinstance(sampler, Label | OneHot) else np.float32
    out = np.empty(flat.shape, dtype)
    for begin in range(0, flat.size, _CHUNK):
        out[begin : begin + _CHUNK] = _values(sampler, flat[begin : begin + _CHUNK], truncation)
    return out.reshape(words.shape)
