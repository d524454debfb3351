"""From a request to the generator's inputs: by seeds, by a seed and a count, or along a walk."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganexport.errors import ArtifactError, UsageError
from ganexport.seeding import MAX_SEED, TRUNCATION, batched, latents
from ganexport.serving.encoding import WEBP_SIDE, grid_size
from ganexport.spec import BATCH, Dim, GeneratorSpec, Label, Normal, OneHot, Uniform

Array = NDArray[Any]

IMAGE_FORMATS = ("png", "webp", "npy", "zip")
ARRAY_FORMATS = ("npy", "zip")


class Job(msgspec.Struct, frozen=True):
    """What one request asks for; plain data, so that it travels to a replica.

    Attributes:
        count: How many samples.
        seeds: One seed a sample; None: samples ``start`` .. ``start + count - 1`` of ``seed``.
        seed: The seed when there is one for all; the walk's beginning.
        start: Number of the first sample of that seed.
        walk_to: Second seed of a walk, whose ``count`` steps include both ends; None without one.
        labels: One class for all samples, or one a sample; None: drawn from the seed.
        truncation: As in :func:`ganexport.latents`.
        format: "png", "webp" (one picture, several as a grid), "npy" or "zip".
    """

    count: int
    seeds: tuple[int, ...] | None = None
    seed: int = 0
    start: int = 0
    walk_to: int | None = None
    labels: int | tuple[int, ...] | None = None
    truncation: float | None = None
    format: str = "png"


class Abilities(msgspec.Struct, frozen=True):
    """What a generator can be asked for over HTTP.

    Attributes:
        classes: Number of classes of its one label input; None when it takes none.
        truncation: (smallest, largest) accepted; None when there is nothing to truncate.
        formats: Accepted formats, the default first.
        shape: [height, width, channels] of its pictures; None when its output is not a picture.
    """

    classes: int | None
    truncation: tuple[float, float] | None
    formats: tuple[str, ...]
    shape: tuple[int, int, int] | None


def abilities(spec: GeneratorSpec) -> Abilities:
    """What can be asked of this generator.

    Raises:
        ArtifactError: It cannot be served from seeds: an input that callers must feed, several
            label inputs, or no axis of samples.
    """
    spec = batched(spec)
    fed = [tensor.name for tensor in spec.inputs if tensor.sampler is None]
    if fed:
        raise ArtifactError(
            f"input {fed[0]!r} has no sampler, so a seed cannot make it: embed this generator and call .run(feeds)"
        )
    if spec.batch is None or any(BATCH not in tensor.shape for tensor in spec.outputs):
        raise ArtifactError("this generator has no batch dimension to count samples by: embed it and call .run(feeds)")
    labelled = [t for t in spec.inputs if isinstance(t.sampler, Label | OneHot)]
    if len(labelled) > 1:
        raise ArtifactError(f"several inputs are labels ({', '.join(t.name for t in labelled)}): embed this generator")
    random = [t for t in spec.inputs if isinstance(t.sampler, Normal | Uniform | Label | OneHot)]
    shared = [t.name for t in random if BATCH not in t.shape]
    if shared:
        raise ArtifactError(f"input {shared[0]!r} is shared by all samples of a batch, so requests cannot share one")
    sampler = labelled[0].sampler if labelled else None
    return Abilities(
        classes=sampler.classes if isinstance(sampler, Label | OneHot) else None,
        truncation=_truncation(spec),
        formats=IMAGE_FORMATS if gives_pictures(spec) else ARRAY_FORMATS,
        shape=_picture(spec),
    )


def gives_pictures(spec: GeneratorSpec) -> bool:
    """Whether its image output can become bytes: uint8 already, or of a declared range."""
    image = spec.image_output
    return image is not None and (image.dtype == "uint8" or image.range is not None)


def _truncation(spec: GeneratorSpec) -> tuple[float, float] | None:
    for tensor in spec.inputs:
        if tensor.name == TRUNCATION:
            return tensor.range or (-8.0, 8.0)
    return (0.01, 8.0) if any(isinstance(t.sampler, Normal) for t in spec.inputs) else None


def _picture(spec: GeneratorSpec) -> tuple[int, int, int] | None:
    image = spec.image_output
    if not gives_pictures(spec) or image is None or image.layout is None:
        return None
    sizes = spec.sizes()
    shape = dict(zip(image.layout, (sizes.get(s, 0) if isinstance(s, str) else s for s in image.shape), strict=True))
    return shape["H"], shape["W"], shape["C"]


def check(job: Job, able: Abilities) -> None:
    """Refuse what this generator cannot do, before it costs anything.

    Raises:
        UsageError: Naming the field and what is allowed.
    """
    if job.format not in able.formats:
        raise UsageError(f"format {job.format!r} is for pictures; this generator gives {', '.join(able.formats)}")
    if job.format == "webp" and able.shape is not None:
        rows, columns = grid_size(job.count, job.count if job.walk_to is not None else None)
        if max(rows * able.shape[0], columns * able.shape[1]) > WEBP_SIDE:
            raise UsageError(f"format: WebP pictures are at most {WEBP_SIDE} pixels a side; ask for fewer, or for png")
    if job.labels is not None:
        if able.classes is None:
            raise UsageError("labels: this generator takes no labels")
        many = (job.labels,) if isinstance(job.labels, int) else job.labels
        if not isinstance(job.labels, int) and len(many) != job.count:
            raise UsageError(f"labels: {len(many)} labels for {job.count} samples; give one for all or one a sample")
        wrong = [label for label in many if not 0 <= label < able.classes]
        if wrong:
            raise UsageError(f"labels: {wrong[0]} is out of range, allowed are 0 to {able.classes - 1}")
    if job.truncation is not None:
        if able.truncation is None:
            raise UsageError("truncation: this generator has nothing to truncate")
        low, high = able.truncation
        if not low <= job.truncation <= high:
            raise UsageError(f"truncation: {job.truncation:g} is out of range, allowed are {low:g} to {high:g}")
    if job.start + job.count - 1 > MAX_SEED:
        raise UsageError("start: start and count go beyond sample 2^64 - 1")


def draw(job: Job, spec: GeneratorSpec) -> dict[str, Array]:
    """The job's inputs.

    Returns:
        One array an input, [.., count, ..] along the batch axis.

    Raises:
        UsageError: As :func:`ganexport.latents`.
    """
    labels = list(job.labels) if isinstance(job.labels, tuple) else job.labels
    if job.walk_to is not None:
        return _walk(job, spec)
    return latents(spec, job.seed, job.start, job.count, seeds=job.seeds, labels=labels, truncation=job.truncation)


def _walk(job: Job, spec: GeneratorSpec) -> dict[str, Array]:
    """From the first sample of one seed to that of another; labels stay those of the beginning."""
    assert job.walk_to is not None
    label = job.labels if isinstance(job.labels, int) else None
    ends = latents(spec, seeds=[job.seed, job.walk_to], labels=label, truncation=job.truncation)
    steps = np.linspace(0.0, 1.0, job.count)
    feeds = {}
    for tensor in batched(spec).inputs:
        if BATCH not in tensor.shape:
            feeds[tensor.name] = ends[tensor.name]
            continue
        axis = tensor.shape.index(BATCH)
        first, last = np.moveaxis(ends[tensor.name], axis, 0)
        if isinstance(tensor.sampler, Normal):
            rows = spherical(first, last, steps)
        elif isinstance(tensor.sampler, Uniform) and first.dtype.kind == "f":
            rows = np.stack([first + (last - first) * t for t in steps]).astype(first.dtype)
        else:
            rows = np.stack([first] * job.count)
        feeds[tensor.name] = np.ascontiguousarray(np.moveaxis(rows, 0, axis))
    return feeds


def spherical(first: Array, last: Array, steps: Array) -> Array:
    """Spherical interpolation, which keeps the length a Gaussian latent has (White, 2016, arXiv:1609.04468).

    Args:
        first: Any shape, at step 0.
        last: The same shape, at step 1.
        steps: [n] from 0 to 1.

    Returns:
        [n, …] of ``first``'s dtype; the ends are exact.
    """
    a, b = first.astype(np.float64).ravel(), last.astype(np.float64).ravel()
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    angle = float(np.arccos(np.clip(a @ b / lengths, -1.0, 1.0))) if lengths > 0 else 0.0
    t = steps[:, None]
    if np.sin(angle) < 1e-6:
        path = a + (b - a) * t
    else:
        path = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    path = path.astype(first.dtype).reshape(len(steps), *first.shape)
    path[steps == 0.0], path[steps == 1.0] = first, last
    return path


def padded_rows(dim: Dim, rows: int) -> int:
    """The smallest allowed batch that holds this many rows (at most ``dim.max``)."""
    return max(dim.min, -(-rows // dim.step) * dim.step)
