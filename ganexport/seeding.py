"""The seed contract: sample i of seed s is a function of (s, the input's name, i) alone.

Not of the batch size, the backend, the machine or the count. Every number comes from
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and a
transform made of correctly rounded IEEE operations (+, -, *, /, sqrt), without a call into a maths
library and without fused multiply-add, so that any language can match it bit for bit.
``docs/seed-contract.md`` is the specification for implementers.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganexport.errors import UsageError
from ganexport.spec import BATCH, Constant, Dim, GeneratorSpec, Label, Normal, OneHot, Sampler, TensorSpec, Uniform

Array = NDArray[Any]

MAX_SEED = 2**64 - 1
#: An input of this name is fed the truncation instead of having its latents truncated.
TRUNCATION = "truncation"
#: Elements of one sample: the counter of blocks has 32 bits, a block holds four words.
_MAX_ELEMENTS = 2**34
#: Elements (or blocks) worked on at a time, so that the temporaries stay in the processor's cache.
_CHUNK = 1 << 13

# ---- Philox4x32-10 ---------------------------------------------------------------------------

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
# Zero-dimensional arrays rather than numpy scalars: an operation on a short array is then twice as fast.
_MASK = np.array(0xFFFFFFFF, np.uint64)
_SHIFT = np.array(32, np.uint64)


def philox(seeds: Array, stream: int, indices: Array, blocks: int) -> Array:
    """Random words of the counters (block, stream, index low, index high) under 64-bit keys.

    Args:
        seeds: [samples] or [1], uint64: key, low word first.
        stream: Second word of the counter.
        indices: [samples] uint64: third and fourth word of the counter.
        blocks: Counters 0 .. blocks - 1 as the first word.

    Returns:
        [samples, blocks * 4] uint32.
    """
    samples = indices.shape[0]
    words = np.empty((samples, blocks, 4), np.uint32)
    rows = max(1, _CHUNK // max(blocks, 1))
    for begin in range(0, samples, rows):
        part = slice(begin, begin + rows)
        _philox_into(words[part], seeds[part] if seeds.size > 1 else seeds, stream, indices[part])
    return words.reshape(samples, blocks * 4)


def _philox_into(words: Array, seeds: Array, stream: int, indices: Array) -> None:
    """The ten rounds, for [samples, blocks, 4] words."""
    shape = words.shape[:2]
    # Words 0 and 2 of the state lie in `even`, words 1 and 3 in `odd`, so that one operation serves
    # two words; the rounds swap the halves, which plain contiguous views do fastest.
    even, odd, product, multiplier = np.empty((4, 2, *shape), np.uint64)
    even[0] = np.arange(shape[1], dtype=np.uint64)
    even[1] = (indices & _MASK)[:, None]
    odd[0] = stream
    odd[1] = (indices >> _SHIFT)[:, None]
    multiplier[0], multiplier[1] = _MULTIPLIERS
    (even0, even1), (odd0, odd1), (product0, product1) = even, odd, product
    for key in _round_keys(seeds, shape):
        np.multiply(even, multiplier, product)
        np.right_shift(product1, _SHIFT, even0)
        np.right_shift(product0, _SHIFT, even1)
        np.bitwise_xor(even, odd, even)
        np.bitwise_xor(even, key, even)
        np.bitwise_and(product1, _MASK, odd0)
        np.bitwise_and(product0, _MASK, odd1)
    words[..., 0], words[..., 2] = even
    words[..., 1], words[..., 3] = odd


def _round_keys(seeds: Array, shape: tuple[int, ...]) -> Array:
    """The ten rounds' keys: the seed's halves, bumped by the Weyl constants.

    [10, 2, samples or 1, 1]; spelled out to [10, 2, samples, blocks] where that is small, as
    broadcasting costs more than the operation itself on short arrays.
    """
    halves = np.stack([seeds & _MASK, seeds >> _SHIFT])  # [2, samples]
    keys: Array = ((halves[None] + _BUMPS) & _MASK)[..., None]
    if shape[0] * shape[1] > 1024:
        return keys
    wide: Array = np.empty((10, 2, *shape), np.uint64)
    wide[...] = keys
    return wide


_BUMPS = (np.arange(10, dtype=np.uint64)[:, None] * _WEYL)[:, :, None]  # [10, 2, 1]


@functools.lru_cache(maxsize=256)
def stream_of(name: str) -> int:
    """The 32-bit FNV-1a hash of an input's name in UTF-8: its stream of random words."""
    value = 0x811C9DC5
    for byte in name.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


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
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
#: 2 / (2 k + 1), k = 7 .. 0: log m = s (c0 + s² (c1 + s² (…))) with s = (m - 1) / (m + 1).
_LOG_SERIES = tuple(np.array(2.0 / (2 * k + 1)) for k in range(7, -1, -1))
_TABLES = (_CENTRE, _MIDDLE, _FAR)


def _log(x: Array) -> Array:
    """Natural logarithm of positive normal float64 numbers, in exact operations only."""
    mantissa, exponent = np.frexp(x)  # [0.5, 1), both exact
    low = mantissa < _SQRT_HALF
    mantissa = np.where(low, mantissa + mantissa, mantissa)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series: Array = square * _LOG_SERIES[0]
    for coefficient in _LOG_SERIES[1:-1]:
        series += coefficient
        series *= square
    series += _LOG_SERIES[-1]
    series *= s
    series += (exponent - low) * _LN2
    return series


@functools.lru_cache(maxsize=128)
def _spelled_out(table: int, elements: int) -> Array:
    """A table's coefficients repeated for short arrays, where broadcasting costs more than arithmetic."""
    return np.ascontiguousarray(np.broadcast_to(_TABLES[table], (8, 2, elements)))


def _ratio(table: int, r: Array) -> Array:
    """Numerator over denominator at r, [elements]; both by Horner's rule, side by side."""
    rows = _spelled_out(table, r.size) if r.size <= 512 else _TABLES[table]
    both = rows[0] * r
    for row in rows[1:-1]:
        both += row
        both *= r
    both += rows[-1]
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
        r = np.sqrt(-_log(low))
        x = _ratio(1, r - 1.6)
        far = np.flatnonzero(r > 5.0)
        if far.size:
            x[far] = _ratio(2, r[far] - 5.0)
        value[tail] = np.where(q[tail] < 0.0, -x, x)
    return value


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


# ---- from words to values --------------------------------------------------------------------


def _normal_values(words: Array, sampler: Normal, truncation: float | None) -> Array:
    p = (words.astype(np.float64) + 0.5) * 2.0**-32
    if truncation is not None:
        low = normal_below(truncation)
        p *= 1.0 - low - low
        p += low
    value = normal_quantile(p)
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
    return ((words.astype(np.uint64) * np.uint64(classes)) >> _SHIFT).astype(np.int64)


def _random_values(sampler: Any, words: Array, truncation: float | None) -> Array:
    """[samples, elements] values of flat words; in pieces that fit the cache."""
    flat = words.reshape(-1)
    dtype = np.int64 if isinstance(sampler, Label | OneHot) else np.float32
    out = np.empty(flat.shape, dtype)
    for begin in range(0, flat.size, _CHUNK):
        part = flat[begin : begin + _CHUNK]
        if isinstance(sampler, Normal):
            out[begin : begin + _CHUNK] = _normal_values(part, sampler, truncation)
        elif isinstance(sampler, Uniform):
            out[begin : begin + _CHUNK] = _uniform_values(part, sampler)
        else:
            out[begin : begin + _CHUNK] = _labels(part, sampler.classes)
    return out.reshape(words.shape)


# ---- inputs of a generator -------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def batched(spec: GeneratorSpec) -> GeneratorSpec:
    """The spec with its sample axis named ``batch``.

    A generator of fixed shapes whose inputs (those drawn or fed by the sample) and outputs all
    have the same first size k becomes one with the dimension batch = k (k:k:k); any other spec
    is returned as it is.
    """
    if spec.batch is not None:
        return spec
    tensors = [t for t in (*spec.inputs, *spec.outputs) if not isinstance(t.sampler, Constant)]
    first = {tensor.shape[0] if tensor.shape else None for tensor in tensors}
    size = first.pop() if len(first) == 1 else None
    if not isinstance(size, int) or size < 1:
        return spec

    def rename(tensor: TensorSpec) -> TensorSpec:
        if isinstance(tensor.sampler, Constant):
            return tensor
        return msgspec.structs.replace(tensor, shape=(BATCH, *tensor.shape[1:]))

    return msgspec.structs.replace(
        spec,
        inputs=tuple(map(rename, spec.inputs)),
        outputs=tuple(map(rename, spec.outputs)),
        dims=(Dim(BATCH, size, size, size), *spec.dims),
    )


def latents(
    spec: GeneratorSpec,
    seed: int = 0,
    start: int = 0,
    n: int = 1,
    *,
    seeds: Sequence[int] | None = None,
    labels: Any = None,
    truncation: float | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Inputs of samples start .. start + n - 1 of a seed.

    Args:
        spec: The generator's spec.
        seed: 0 to 2^64 - 1.
        start: Number of the first sample.
        n: How many samples.
        seeds: One seed a sample instead of one for all: sample j is then sample ``start`` of
            ``seeds[j]`` (the first of that seed, unless said otherwise), and n is their count.
        labels: Classes instead of random ones: one for all or one a sample; a mapping from input
            names where several inputs are labels.
        truncation: t > 0: normal inputs are drawn from the normal distribution cut to [-t, t]
            (in standard deviations, before mean and std are applied). A spec with an input named
            "truncation" gets it fed there instead, and its latents stay whole.
        sizes: Sizes of the symbolic dimensions other than batch; the optimum where not given.

    Returns:
        One array an input, of the spec's dtype (bfloat16 inputs as float32); inputs without a
        batch axis are drawn once, as sample 0 of the seed.

    Raises:
        UsageError: Seed, start, count, label, truncation or size out of range, or an input that
            has no sampler and must be fed by the caller.
    """
    return Sampling(spec, sizes).draw(seed, start, n, seeds=seeds, labels=labels, truncation=truncation)


class Sampling:
    """Draws the inputs of one generator at fixed sizes; what :func:`latents` does, prepared once.

    Args:
        spec: The generator's spec.
        sizes: As in :func:`latents`.

    Raises:
        UsageError: Unknown dimension, size out of range, a sampler that does not fit its input.
    """

    def __init__(self, spec: GeneratorSpec, sizes: Mapping[str, int] | None = None) -> None:
        self.spec = batched(spec)
        others = {name: size for name, size in (sizes or {}).items() if name != BATCH}
        resolved = self.spec.sizes(**others)
        self.inputs = [_Input(tensor, resolved) for tensor in self.spec.inputs]
        self.shared = any(i.axis is None and i.random for i in self.inputs)
        self._label_inputs = [i for i in self.inputs if isinstance(i.tensor.sampler, Label | OneHot)]
        self._takes_truncation = any(i.tensor.name == TRUNCATION for i in self.inputs)
        self._normal = any(isinstance(i.tensor.sampler, Normal) for i in self.inputs)

    def draw(
        self,
        seed: int = 0,
        start: int = 0,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        labels: Any = None,
        truncation: float | None = None,
    ) -> dict[str, Array]:
        """As :func:`latents`."""
        keys, indices = self._counters(seed, start, n, seeds)
        count = indices.shape[0]
        if truncation is not None:
            truncation = self._check_truncation(truncation)
        chosen = self._choose_labels(labels, count) if labels is not None else {}
        cut = None if self._takes_truncation else truncation
        feeds = {}
        for entry in self.inputs:
            name = entry.tensor.name
            if name == TRUNCATION and truncation is not None:
                feeds[name] = entry.constant(truncation, count)
            elif name in chosen:
                feeds[name] = entry.labelled(chosen[name])
            else:
                feeds[name] = entry.draw(keys, indices, cut)
        return feeds

    def check(
        self,
        seed: int = 0,
        start: int = 0,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        labels: Any = None,
        truncation: float | None = None,
    ) -> None:
        """Refuse what :meth:`draw` would refuse, for a whole request, without drawing anything.

        Raises:
            UsageError: As :func:`latents`.
        """
        for entry in self.inputs:
            entry.require_sampler()
        n = self._check_counters(seed, start, n, seeds)
        if truncation is not None:
            self._check_truncation(truncation)
        if labels is not None:
            self._choose_labels(labels, n)

    def _check_counters(self, seed: int, start: int, n: int, seeds: Sequence[int] | None) -> int:
        """The number of samples, after all was found in range."""
        start = _whole(start, "start", 0, MAX_SEED)
        if seeds is not None:
            keys = {_whole(s, "seed", 0, MAX_SEED) for s in seeds}
            if not keys:
                raise UsageError("seeds is empty; give at least one seed")
            if self.shared and len(keys) > 1:
                name = next(i.tensor.name for i in self.inputs if i.axis is None and i.random)
                raise UsageError(f"input {name!r} has no batch axis, so all samples share it: draw one seed at a time")
            n = len(seeds)
        else:
            _whole(seed, "seed", 0, MAX_SEED)
            n = _whole(n, "count", 1, MAX_SEED)
            if start + n - 1 > MAX_SEED:
                raise UsageError(f"start {start} and count {n} go beyond sample 2^64 - 1")
        if self.spec.batch is None and n != 1:
            raise UsageError("this generator has no batch dimension: draw one sample at a time")
        return n

    def _counters(self, seed: int, start: int, n: int, seeds: Sequence[int] | None) -> tuple[Array, Array]:
        """Keys, [samples] or [1], and sample numbers, [samples]."""
        n = self._check_counters(seed, start, n, seeds)
        if seeds is not None:
            return np.array([int(s) for s in seeds], np.uint64), np.full(n, start, np.uint64)
        return np.array([seed], np.uint64), np.arange(n, dtype=np.uint64) + np.uint64(start)

    def _check_truncation(self, truncation: float) -> float:
        try:
            value = float(truncation)
        except (TypeError, ValueError):
            raise UsageError(f"truncation {truncation!r} is not a number") from None
        if self._takes_truncation:
            if not math.isfinite(value):
                raise UsageError(f"truncation {truncation!r} is not finite")
        elif not self._normal:
            raise UsageError("this generator has neither a normal input nor one named 'truncation' to truncate")
        elif not 1e-6 <= value <= 8.0:
            raise UsageError(f"truncation is {value:g} standard deviations, allowed are 1e-6 to 8")
        return value

    def _choose_labels(self, labels: Any, count: int) -> dict[str, Array]:
        known = {i.tensor.name: i.classes for i in self._label_inputs}
        if not known:
            raise UsageError("this generator takes no labels")
        if not isinstance(labels, Mapping):
            if len(known) > 1:
                raise UsageError(f"several inputs are labels: give a mapping with {', '.join(known)}")
            labels = {next(iter(known)): labels}
        chosen = {}
        for name, values in labels.items():
            if name not in known:
                raise UsageError(f"no label input {name!r}; this generator has: {', '.join(known)}")
            many = list(values) if hasattr(values, "__iter__") and not isinstance(values, str) else [values] * count
            if len(many) != count:
                raise UsageError(f"{len(many)} labels for {count} samples; give one for all or one a sample")
            chosen[name] = np.array([_whole(v, "label", 0, known[name] - 1) for v in many], np.int64)
        return chosen


class _Input:
    """One input at fixed sizes: its sample axis, the shape of one sample, and how to draw it."""

    def __init__(self, tensor: TensorSpec, sizes: dict[str, int]) -> None:
        self.tensor = tensor
        self.dtype = np.dtype("float32" if tensor.dtype == "bfloat16" else tensor.dtype)
        sampler, where = tensor.sampler, f"input {tensor.name!r}"
        self.random = sampler is not None and not isinstance(sampler, Constant)
        self.axis = tensor.shape.index(BATCH) if BATCH in tensor.shape else None
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if self.axis is not None:
            del shape[self.axis]
        self.shape = tuple(shape)
        self.classes = sampler.classes if isinstance(sampler, Label | OneHot) else 1
        if not 1 <= self.classes < 2**31:
            raise UsageError(f"{where}: {self.classes} classes; allowed are 1 to 2^31 - 1")
        if isinstance(sampler, OneHot) and (not self.shape or self.shape[-1] != sampler.classes):
            raise UsageError(f"{where}: a one-hot of {sampler.classes} needs it as its last size")
        if isinstance(sampler, Normal) and self.dtype.kind != "f":
            raise UsageError(f"{where}: a normal input cannot have dtype {tensor.dtype}")
        if isinstance(sampler, Normal) and not (0.0 < sampler.std <= 1e30 and abs(sampler.mean) <= 1e30):
            raise UsageError(f"{where}: normal({sampler.mean:g},{sampler.std:g}) cannot be drawn in float32")
        if isinstance(sampler, Uniform) and not -1e30 <= sampler.low < sampler.high <= 1e30:
            raise UsageError(f"{where}: uniform({sampler.low:g},{sampler.high:g}) cannot be drawn in float32")
        self.drawn = self.shape[:-1] if isinstance(sampler, OneHot) else self.shape
        self.elements = math.prod(self.drawn)
        if self.elements > _MAX_ELEMENTS:
            raise UsageError(f"{where}: {self.elements} elements a sample are too many to draw")
        self.stream = stream_of(tensor.name)

    def draw(self, keys: Array, indices: Array, truncation: float | None) -> Array:
        """Samples of these counters, with the batch axis in its place."""
        sampler = self.require_sampler()
        if isinstance(sampler, Constant):
            return self.constant(sampler.value, indices.shape[0])
        if self.axis is None:
            keys, indices = keys[:1], np.zeros(1, np.uint64)
        words = philox(keys, self.stream, indices, (self.elements + 3) // 4)
        if words.shape[1] != self.elements:
            words = np.ascontiguousarray(words[:, : self.elements])
        values = _random_values(sampler, words, truncation).reshape(indices.shape[0], *self.drawn)
        return self._finish(values)

    def require_sampler(self) -> Sampler:
        """How it is drawn.

        Raises:
            UsageError: It is data that only the caller can give.
        """
        if self.tensor.sampler is None:
            raise UsageError(f"input {self.tensor.name!r} has no sampler: feed it yourself with .run(feeds)")
        return self.tensor.sampler

    def labelled(self, labels: Array) -> Array:
        """[samples] given labels as this input wants them."""
        if self.axis is None:
            raise UsageError(f"input {self.tensor.name!r} has no batch axis: labels cannot be given one a sample")
        wide = labels.reshape(-1, *(1 for _ in self.drawn))
        return self._finish(np.broadcast_to(wide, (labels.size, *self.drawn)).copy())

    def constant(self, value: float, count: int) -> Array:
        """The same value everywhere."""
        shape = list(self.shape)
        if self.axis is not None:
            shape.insert(self.axis, count)
        return np.full(shape, value, self.dtype)

    def _finish(self, values: Array) -> Array:
        """One-hot where asked, the input's dtype, and the sample axis where the spec has it."""
        if isinstance(self.tensor.sampler, OneHot):
            values = values[..., None] == np.arange(self.tensor.sampler.classes)
        if self.dtype.kind in "iu" and values.dtype.kind == "f":
            values = np.floor(values)
        values = values.astype(self.dtype, copy=False)
        if self.axis is None:
            return np.ascontiguousarray(values[0]).reshape(self.shape)
        if self.axis == 0:
            return np.ascontiguousarray(values)
        return np.ascontiguousarray(np.moveaxis(values, 0, self.axis))


def _whole(value: Any, what: str, low: int, high: int) -> int:
    """A whole number in [low, high]; numpy's integers are fine, floats and booleans are not."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{what} {value!r} is not a whole number") from None
    if not low <= number <= high:
        top = "2^64 - 1" if high == MAX_SEED else high
        raise UsageError(f"{what} is {number}, allowed are {low} to {top}")
    return number
