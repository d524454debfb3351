"""Images along the latent space of a generator, as arrays [rows, columns, H, W, C] that :mod:`picture` lays out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ganexport.errors import UsageError
from ganexport.runtime._images import image_tensor, to_uint8
from ganexport.runtime.base import Array
from ganexport.runtime.generator import Generator
from ganexport.seeding import Sampling
from ganexport.spec import BATCH, GeneratorSpec, Label, Normal, OneHot, TensorSpec, Uniform


def walk(
    generator: Generator, seeds: Sequence[int], steps: int, *, label: int | None = None, truncation: float | None = None
) -> Array:
    """A walk through the first samples of several seeds.

    Normal latents turn along the arc between two samples (spherical interpolation, Shoemake 1985; White 2016,
    arXiv:1609.04468), because the straight line between them passes through lengths that a generator never saw;
    uniform ones go straight. A class stays that of the first seed.

    Args:
        generator: Of images.
        seeds: At least two; image 0 is the first sample of ``seeds[0]``, image k·steps that of ``seeds[k]``.
        steps: Images from one seed to the next.
        label: The class; that of the first seed when not given.
        truncation: See :func:`ganexport.latents`.

    Returns:
        [(len(seeds) - 1)·steps + 1, H, W, C] uint8.

    Raises:
        UsageError: Too few seeds or steps, or no random input to walk through.
    """
    if len(seeds) < 2:
        raise UsageError(f"a walk needs at least two seeds, got {len(seeds)}")
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    sampling = Sampling(generator.spec)
    _refuse_unbatched(sampling.spec)
    if not any(_walks(tensor) for tensor in sampling.spec.inputs):
        raise UsageError("this generator has no random latent input to walk through")
    ends = sampling.draw(seeds=list(seeds), labels=label, truncation=truncation)
    places = np.append(np.tile(np.arange(steps) / steps, len(seeds) - 1), 1.0)  # [frames]
    legs = np.append(np.repeat(np.arange(len(seeds) - 1), steps), len(seeds) - 2)
    feeds: dict[str, Array] = {}
    for tensor in sampling.spec.inputs:
        array = ends[tensor.name]
        if BATCH not in tensor.shape:
            feeds[tensor.name] = array
        elif _walks(tensor):
            between = _arc if isinstance(tensor.sampler, Normal) else _line
            frames = [between(array[leg], array[leg + 1], place) for leg, place in zip(legs, places, strict=True)]
            feeds[tensor.name] = np.stack(frames).astype(array.dtype)
        else:
            feeds[tensor.name] = np.repeat(array[:1], len(places), axis=0)
    return _run(generator, sampling.spec, feeds, len(places))


def truncations(
    generator: Generator, values: Sequence[float], n: int, *, seed: int = 0, label: int | None = None
) -> Array:
    """The same samples at several truncations.

    Args:
        generator: Of images.
        values: Of the truncation; what they do is said at :func:`ganexport.latents`.
        n: Samples.
        seed: Of the samples.
        label: One class for all; random ones when not given.

    Returns:
        [len(values), n, H, W, C] uint8.
    """
    if not values:
        raise UsageError("name at least one truncation")
    return np.stack([generator.generate(n, seed, labels=label, truncation=value) for value in values])


def classes_of(spec: GeneratorSpec) -> int:
    """How many classes a generator takes; 0 when it takes none."""
    counts = [tensor.sampler.classes for tensor in spec.inputs if isinstance(tensor.sampler, Label | OneHot)]
    return counts[0] if counts else 0


def by_class(generator: Generator, n: int, *, seed: int = 0, truncation: float | None = None) -> Array:
    """Every class with the same latents: row k is class k, column i is sample i.

    Returns:
        [classes, n, H, W, C] uint8.

    Raises:
        UsageError: The generator takes no labels.
    """
    count = classes_of(generator.spec)
    if not count:
        raise UsageError("this generator is not class-conditional: it takes no labels")
    return np.stack([generator.generate(n, seed, labels=label, truncation=truncation) for label in range(count)])


def neighbours(images: Array, real: Array, k: int) -> tuple[Array, Array]:
    """The k nearest training images of every generated one, by Euclidean distance of pixels.

    Args:
        images: [n, H, W, C] uint8.
        real: [m, H, W, C] uint8.
        k: At most m.

    Returns:
        Indices [n, k] into ``real``, nearest first, and root-mean-square distances [n, k] in grey levels.

    Raises:
        UsageError: Other shapes, or fewer than k real images.
    """
    if images.shape[1:] != real.shape[1:]:
        raise UsageError(
            f"generated images are {list(images.shape[1:])} (height, width, channels), "
            f"the real ones {list(real.shape[1:])}"
        )
    if not 1 <= k <= len(real):
        raise UsageError(f"k must be 1 to {len(real)}, the number of real images; got {k}")
    queries = images.reshape(len(images), -1).astype(np.float32)
    indices = np.empty((len(images), k), np.int64)
    distances = np.empty((len(images), k), np.float64)
    references = real.reshape(len(real), -1)
    best = np.full((len(images), k), np.inf, np.float32)
    for begin in range(0, len(references), 4096):
        part = references[begin : begin + 4096].astype(np.float32)
        squared = (queries**2).sum(1)[:, None] + (part**2).sum(1) - 2.0 * (queries @ part.T)
        both = np.concatenate([best, squared], axis=1)
        order = np.argsort(both, axis=1, kind="stable")[:, :k]
        known = np.concatenate([indices, np.broadcast_to(np.arange(begin, begin + len(part)), squared.shape)], axis=1)
        best, indices = np.take_along_axis(both, order, 1), np.take_along_axis(known, order, 1)
    for row, chosen in enumerate(indices):  # the expansion above rounds; distances are taken directly
        apart = references[chosen].astype(np.float64) - queries[row]
        distances[row] = np.sqrt((apart**2).mean(axis=1))
    return indices, distances


def _walks(tensor: TensorSpec) -> bool:
    return isinstance(tensor.sampler, Normal | Uniform) and BATCH in tensor.shape


def _refuse_unbatched(spec: GeneratorSpec) -> None:
    for tensor in spec.inputs:
        if BATCH in tensor.shape and tensor.shape.index(BATCH) != 0:
            raise UsageError(f"input {tensor.name!r}: its batch is not the first axis")


def _arc(a: Array, b: Array, place: float) -> Array:
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    angle = np.arccos(np.clip((x * y).sum() / lengths, -1.0, 1.0)) if lengths else 0.0
    if np.sin(angle) < 1e-6:  # in one direction, or in opposite ones, where there is no one arc
        return _line(a, b, place)
    return (np.sin((1.0 - place) * angle) * x + np.sin(place * angle) * y) / np.sin(angle)  # type: ignore[no-any-return]


def _line(a: Array, b: Array, place: float) -> Array:
    return (1.0 - place) * a.astype(np.float64) + place * b.astype(np.float64)  # type: ignore[no-any-return]


def _run(generator: Generator, spec: GeneratorSpec, feeds: dict[str, Array], count: int) -> Array:
    tensor = image_tensor(spec)
    assert spec.batch is not None  # there is an input with a batch axis
    size = spec.batch.opt
    pictures = []
    for begin in range(0, count, size):
        rows = np.minimum(np.arange(begin, begin + size), count - 1)  # the last batch is filled up with its last image
        part: dict[str, Any] = {t.name: feeds[t.name][rows] if BATCH in t.shape else feeds[t.name] for t in spec.inputs}
        pictures.append(to_uint8(generator.run(part)[tensor.name], tensor)[: min(size, count - begin)])
    return np.concatenate(pictures)
