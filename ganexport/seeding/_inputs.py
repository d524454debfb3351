"""The inputs of a generator, drawn for samples of a seed."""

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
from ganexport.seeding._philox import philox, philox_of_one, stream_of
from ganexport.seeding._transforms import random_values
from ganexport.spec import BATCH, Constant, Dim, GeneratorSpec, Label, Normal, OneHot, Sampler, TensorSpec, Uniform

Array = NDArray[Any]

MAX_SEED = 2**64 - 1
#: An input of this name is fed the truncation instead of having its latents truncated.
TRUNCATION = "truncation"
#: Elements of one sample: the counter of blocks has 32 bits, a block holds four words.
_MAX_ELEMENTS = 2**34


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
        self._fed = next((i for i in self.inputs if i.tensor.sampler is None), None)
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
        n = self._check_counters(seed, start, n, seeds)
        if truncation is not None:
            self._check_truncation(truncation)
        return self.draw_checked(seed, start, n, seeds=seeds, labels=labels, truncation=truncation)

    def draw_checked(
        self,
        seed: int,
        start: int,
        n: int,
        *,
        seeds: Sequence[int] | None = None,
        labels: Any = None,
        truncation: float | None = None,
    ) -> dict[str, Array]:
        """As :meth:`draw`, for samples of a request that :meth:`check` has seen."""
        if truncation is not None:
            truncation = float(truncation)
        cut = None if self._takes_truncation else truncation
        if n == 1 and seeds is None and labels is None and not (self._takes_truncation and truncation is not None):
            return {entry.tensor.name: entry.draw_one(seed, start, cut) for entry in self.inputs}
        keys, indices = _counters(seed, start, n, seeds)
        count = indices.shape[0]
        chosen = self._choose_labels(labels, count) if labels is not None else {}
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
        if self._fed is not None:
            self._fed.require_sampler()
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

    def _check_truncation(self, truncation: float) -> None:
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
        _check_fits(sampler, self.dtype, where)
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
        return self._of_words(sampler, words, truncation)

    def draw_one(self, seed: int, index: int, truncation: float | None) -> Array:
        """As :meth:`draw` for a single sample, without arrays of one number."""
        sampler = self.require_sampler()
        if isinstance(sampler, Constant):
            return self.constant(sampler.value, 1)
        index = 0 if self.axis is None else int(index)
        words = philox_of_one(int(seed), self.stream, index, (self.elements + 3) // 4)
        return self._of_words(sampler, words, truncation)

    def _of_words(self, sampler: Sampler, words: Array, truncation: float | None) -> Array:
        """Random words, [samples, elements and up to three more], as this input."""
        if words.shape[1] != self.elements:
            words = np.ascontiguousarray(words[:, : self.elements])
        values = random_values(sampler, words, truncation).reshape(words.shape[0], *self.drawn)
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


def _check_fits(sampler: Sampler | None, dtype: np.dtype[Any], where: str) -> None:
    """Refuse what the dtype cannot hold: it would wrap around, overflow or be cut without a word."""
    if isinstance(sampler, Label):
        least, most, what = 0.0, sampler.classes - 1.0, f"label({sampler.classes})"
    elif isinstance(sampler, Constant):
        least, most, what = sampler.value, sampler.value, f"constant({sampler.value:g})"
    elif isinstance(sampler, Uniform):
        least, most, what = sampler.low, sampler.high, f"uniform({sampler.low:g},{sampler.high:g})"
    else:
        return
    if dtype.kind == "b":
        fits = least >= 0 and most <= 1
    elif dtype.kind == "f":
        fits = max(abs(least), abs(most)) <= float(np.finfo(dtype).max)
        fits = fits and not (isinstance(sampler, Label) and most > 2.0 ** (np.finfo(dtype).nmant + 1))
    else:
        limits = np.iinfo(dtype)
        most = most - 1 if isinstance(sampler, Uniform) else most  # its end is never drawn
        fits = limits.min <= least and most <= limits.max
        fits = fits and not (isinstance(sampler, Constant) and not float(most).is_integer())
    if not fits:
        raise UsageError(f"{where}: {what} does not fit dtype {dtype.name}; give it a wider one")


def _counters(seed: int, start: int, n: int, seeds: Sequence[int] | None) -> tuple[Array, Array]:
    """Keys, [samples] or [1], and sample numbers, [samples]."""
    if seeds is not None:
        return np.array([int(s) for s in seeds], np.uint64), np.full(len(seeds), start, np.uint64)
    if n == 1:
        return np.array([seed], np.uint64), np.array([start], np.uint64)
    return np.array([seed], np.uint64), np.arange(n, dtype=np.uint64) + np.uint64(start)


def _whole(value: Any, what: str, low: int, high: int) -> int:
    """A whole number in [low, high]; numpy's integers are fine, floats and booleans are not."""
    if type(value) is int and low <= value <= high:
        return value
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
