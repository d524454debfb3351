"""Quality of a generator's images against real ones, every figure with its conditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganexport.errors import DataError, UsageError
from ganexport.evaluation.backbones import BACKBONES, Backbone
from ganexport.evaluation.metrics import bootstrap, kernel_distance, nearest, neighbour_metrics
from ganexport.frechet import frechet_distance

Images = NDArray[np.uint8]

#: The neighbour metrics are quadratic: they use at most this many images a side. The memorisation check looks for as
#: many generated ones, in all training images.
NEIGHBOUR_LIMIT = 10_000
#: Training images in memory as float32 at a time.
_BLOCK = 4096
#: A generated image is called a copy when it is nearer to a training image than this share of the training
#: images are to their own nearest other training image.
COPY_PERCENTILE = 1.0


class Memorisation(msgspec.Struct, frozen=True):
    """Are the generated images copies of training images?

    Attributes:
        copies: Share of generated images nearer to a training image than ``threshold``.
        threshold: Pixel distance (root of summed squares, values in 0..1) that 1% of the training images
            undercut among themselves.
        median_ratio: Median distance of generated images to their nearest training image, over the
            median distance between nearest training images. About 1 for new images, 0 for copies.
    """

    copies: float
    threshold: float
    median_ratio: float

    @property
    def suspicious(self) -> bool:
        """Whether more images are copies than chance explains (1% by construction for real data)."""
        return self.copies > 0.05


class Drift(msgspec.Struct, frozen=True):
    """How far these images are from those that another generator makes of the same latents.

    Attributes:
        against: The other generator.
        frechet: Fréchet distance between the features of the two.
        reference: Fréchet distance of the other one's images from the real ones.
        moved: Change of the distance from the real images, relative to ``reference``: 0.02 is 2% worse.
        psnr: Of the pictures, pair by pair, over all pixels, in dB of 255 grey levels; None where all are the same.
    """

    against: str
    frechet: float
    reference: float
    moved: float
    psnr: float | None


class Evaluation(msgspec.Struct, frozen=True):
    """All figures of one evaluation.

    Attributes:
        source: What made the images.
        data: The real images: name and split.
        generated: Number of generated images.
        real: Number of real images.
        seed: Seed of the latents.
        backbone: What the features are and at which size images enter it.
        frechet: Fréchet distance of the features.
        frechet_interval: 95% bootstrap interval over the generated images.
        kernel: Kernel distance and its standard error over subsets.
        precision: Share of generated images inside the real manifold.
        recall: Share of real images inside the generated manifold.
        density: Average number of real balls around a generated image, over k.
        coverage: Share of real images whose ball holds a generated image.
        class_shares: Share of each class by the classifier; empty for backbones without classes.
        confidence: Mean of the classifier's largest probability; None for backbones without classes.
        memorisation: Comparison with the nearest training images.
        drift: Comparison with another generator of the same latents, where one was named.
    """

    source: str
    data: str
    generated: int
    real: int
    seed: int
    backbone: str
    frechet: float
    frechet_interval: tuple[float, float]
    kernel: tuple[float, float]
    precision: float
    recall: float
    density: float
    coverage: float
    class_shares: tuple[float, ...]
    confidence: float | None
    memorisation: Memorisation
    drift: Drift | None = None


def evaluate_images(
    fake: Images,
    real: Images,
    *,
    source: str,
    data: str,
    seed: int,
    rounds: int = 30,
    backbone: Backbone | None = None,
    against: tuple[str, Images] | None = None,
) -> Evaluation:
    """Compare generated with real images by a network's features.

    Args:
        fake: Generated uint8 images [N, H, W, C].
        real: Real uint8 images [M, h, w, C].
        source: What made them, for the record.
        data: Name and split of the real images, for the record.
        seed: Seed of the latents, for the record.
        rounds: Bootstrap resamples.
        backbone: Of the features; the digit classifier when None.
        against: Name and images [N, H, W, C] of another generator, from the same latents.

    Raises:
        DataError: Images that the backbone does not take.
        UsageError: Too few images.
    """
    if min(len(fake), len(real)) < 100:
        raise UsageError(f"needs at least 100 images on each side, got {len(fake)} generated and {len(real)} real")
    if fake.shape[-1] != real.shape[-1]:
        raise UsageError(
            f"{source}: makes images of {fake.shape[-1]} channels, {data} has {real.shape[-1]}: name images like those "
            "that it learnt from with --data"
        )
    chosen = backbone or BACKBONES.load("digits").backbone()
    fake_features, probabilities = chosen.features(fake)
    real_features, _ = chosen.features(real)

    def distance(features: NDArray[Any]) -> float:
        return frechet_distance(real_features, features)

    frechet = distance(fake_features)
    neighbours = neighbour_metrics(real_features[_some(len(real))], fake_features[:NEIGHBOUR_LIMIT])
    shares: tuple[float, ...] = ()
    if probabilities is not None:
        counts = np.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
        shares = tuple(float(count) / len(probabilities) for count in counts)
    return Evaluation(
        source,
        data,
        len(fake),
        len(real),
        seed,
        chosen.description,
        frechet,
        bootstrap(distance, fake_features, rounds=rounds),
        kernel_distance(real_features, fake_features),
        neighbours["precision"],
        neighbours["recall"],
        neighbours["density"],
        neighbours["coverage"],
        shares,
        float(probabilities.max(1).mean()) if probabilities is not None else None,
        memorisation(fake[:NEIGHBOUR_LIMIT], real),
        _drift(fake, fake_features, frechet, against, chosen, distance) if against is not None else None,
    )


def _drift(
    fake: Images,
    features: NDArray[Any],
    frechet: float,
    against: tuple[str, Images],
    backbone: Backbone,
    distance: Callable[[NDArray[Any]], float],
) -> Drift:
    name, images = against
    if images.shape != fake.shape:
        raise UsageError(f"--against {name}: makes images {list(images.shape[1:])}, these are {list(fake.shape[1:])}")
    others, _ = backbone.features(images)
    reference = distance(others)
    squared = sum(float(((a.astype(np.float64) - b) ** 2).sum()) for a, b in zip(fake, images, strict=True)) / fake.size
    psnr = 10.0 * math.log10(255.0**2 / squared) if squared else None
    return Drift(name, frechet_distance(others, features), reference, frechet / max(reference, 1e-12) - 1.0, psnr)


def _some(count: int) -> NDArray[np.int64]:
    """At most ``NEIGHBOUR_LIMIT`` positions of ``count``: all in order, or a random choice that is always the same."""
    if count <= NEIGHBOUR_LIMIT:
        return np.arange(count)
    return np.random.default_rng(0).choice(count, NEIGHBOUR_LIMIT, replace=False)


def memorisation(fake: Images, real: Images) -> Memorisation:
    """Compare each generated image's nearest training image with the training set's own neighbours.

    Those are the distances of a random half of the training images, or ``NEIGHBOUR_LIMIT`` of them, to the others.

    Args:
        fake: uint8 [N, H, W, C].
        real: uint8 [M, h, w, C]; resized to the generated size when they differ.

    Raises:
        DataError: Different channels.
    """
    if fake.shape[-1] != real.shape[-1]:
        raise DataError(f"generated images have {fake.shape[-1]} channels, the real ones {real.shape[-1]}")
    if fake.shape[1:3] != real.shape[1:3]:
        real = _resize(real, (fake.shape[1], fake.shape[2]))
    distances = _to_nearest(fake, real, np.arange(len(real)))
    # Two parts of a random order: training images against others, never against themselves.
    order = np.random.default_rng(0).permutation(len(real))
    asked, others = np.split(order, [min(len(real) // 2, NEIGHBOUR_LIMIT)])
    own = _to_nearest(real[asked], real, others)
    threshold = float(np.percentile(own, COPY_PERCENTILE))
    return Memorisation(
        float((distances < threshold).mean()), threshold, float(np.median(distances) / max(np.median(own), 1e-12))
    )


def _to_nearest(queries: Images, images: Images, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Distance of each query to the nearest of the images at these places, [N], pixel values in 0..1."""

    def flat(images: Images) -> NDArray[np.float32]:
        return images.reshape(len(images), -1).astype(np.float32) / np.float32(255.0)

    rows = flat(queries)
    found = np.full(len(queries), np.inf)
    for start in range(0, len(places), _BLOCK):
        _, distances = nearest(rows, flat(images[places[start : start + _BLOCK]]))
        np.minimum(found, distances, out=found)
    return found


def _resize(images: Images, size: tuple[int, int]) -> Images:
    from PIL import Image

    def one(image: Images) -> Images:
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        resized = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
        return resized[..., None] if resized.ndim == 2 else resized

    return np.stack([one(image) for image in images])


def collect(
    generate: Callable[[int, int], Images], n: int, batch_size: int, advance: Callable[[int], None] = lambda _: None
) -> Images:
    """Gather n images from ``generate(start, count)``, telling ``advance`` of every batch."""

    def parts() -> Iterator[Images]:
        for start in range(0, n, batch_size):
            images = generate(start, min(batch_size, n - start))
            advance(len(images))
            yield images

    return np.concatenate(list(parts()))
