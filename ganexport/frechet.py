"""The Fréchet distance of two sets of features, and how far a candidate moves it. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganexport.errors import UsageError
from ganexport.spec import TensorSpec

Features = NDArray[Any]
Array = NDArray[Any]
#: Fixed projections of the shrunk picture, and its side.
PROJECTIONS, SIDE = 24, 16
#: Fewer pictures than this say nothing about 32 features' covariance.
MIN_PICTURES = 64


def moments(features: Features) -> tuple[Features, Features]:
    """Mean [D] and covariance [D, D] of features [N, D], in float64.

    Raises:
        UsageError: Fewer than two samples, or features that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise UsageError(f"needs features [N, D] of at least two samples, got {list(features.shape)}")
    if not np.isfinite(features).all():
        raise UsageError("features are not finite: the generator's images hold NaN or infinite values")
    data = features.astype(np.float64)
    return data.mean(axis=0), np.cov(data, rowvar=False)


def frechet_distance(real: Features, fake: Features) -> float:
    """Fréchet distance of the two Gaussians with the features' moments (Heusel et al. 2017, equation 6).

    ``|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^(1/2))``, with the trace of the root computed from the symmetric product
    ``C1^(1/2) C2 C1^(1/2)``, which has the same eigenvalues and needs no complex arithmetic.

    Args:
        real: Features [N, D].
        fake: Features [M, D].
    """
    mean_real, cov_real = moments(real)
    mean_fake, cov_fake = moments(fake)
    values, vectors = np.linalg.eigh(cov_real)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov_fake @ root)
    trace = np.trace(cov_real) + np.trace(cov_fake) - 2.0 * np.sqrt(np.clip(product, 0.0, None)).sum()
    return float(((mean_real - mean_fake) ** 2).sum() + max(trace, 0.0))


def picture_features(pictures: Array, layout: str, value_range: tuple[float, float]) -> Features:
    """Features [N, 32] of pictures without a network: the same on every machine, for any kind of picture.

    24 fixed random projections of the picture shrunk to 16x16 (what is where), mean absolute differences of
    neighbours at distances 1, 2 and 4 in both directions (texture, edges, grain), mean and spread of the luminance.

    Args:
        pictures: [N, C, H, W] or [N, H, W, C].
        layout: "NCHW" or "NHWC".
        value_range: Of the values.
    """
    low, high = value_range
    values = np.asarray(pictures, np.float32)
    values = values if layout == "NCHW" else values.transpose(0, 3, 1, 2)
    values = (values - np.float32(low)) / np.float32(high - low)  # [N, C, H, W] in [0, 1]
    small = _shrink(_shrink(values, 2), 3).reshape(len(values), -1)
    # Weights by a formula rather than a generator whose stream may change between numpy's versions.
    grid = np.arange(1, PROJECTIONS + 1)[:, None] * np.arange(1, small.shape[1] + 1)[None, :]
    weights = np.sin(grid * np.sqrt(2.0) + grid**2 * np.sqrt(3.0)) / np.sqrt(small.shape[1])
    light = values.mean(axis=1)  # [N, H, W]
    columns = [small.astype(np.float64) @ weights.T]
    for step in (1, 2, 4):
        for axis in (1, 2):
            size = light.shape[axis]
            if size <= step:
                columns.append(np.zeros((len(values), 1)))
                continue
            there, here = light.take(range(step, size), axis), light.take(range(size - step), axis)
            columns.append(np.abs(there - here).mean(axis=(1, 2), dtype=np.float64)[:, None])
    columns.append(light.mean(axis=(1, 2), dtype=np.float64)[:, None])
    columns.append(light.std(axis=(1, 2), dtype=np.float64)[:, None])
    return np.concatenate(columns, axis=1)


def _shrink(values: Array, axis: int) -> Array:
    """Means over at most 16 equal stretches of an axis."""
    size = values.shape[axis]
    edges = np.linspace(0, size, min(size, SIDE) + 1).astype(int)
    sums = np.add.reduceat(values, edges[:-1], axis=axis, dtype=np.float32)
    shape = [1] * values.ndim
    shape[axis] = -1
    return np.asarray(sums / np.diff(edges).reshape(shape).astype(np.float32))


def movement(reference: Features, candidate: Features) -> float | None:
    """By which share a candidate moves the Fréchet distance from pictures of other latents.

    The yardstick is the distance between two halves of the reference's own pictures, the least that a perfect
    generator of this distribution would read: one half is then replaced by the candidate's pictures of the same
    latents. Both halves are taken in turn, and each feature is scaled by the reference's spread. The chance by which a
    change moves one half nearer to the other moves the other half away from it: in the mean of both turns it cancels.

    Args:
        reference: [N, D], one row a latent.
        candidate: [N, D], of the same latents.

    Returns:
        Size of the mean over both turns of (d(candidate, other half) - d(reference, other half)) / d(reference, other
        half); None for fewer than 64 pictures, or a reference whose pictures are all alike.
    """
    if len(reference) < MIN_PICTURES or not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        return None
    spread = reference.std(axis=0)
    varies = spread > 1e-6 * (np.abs(reference).max(axis=0) + 1e-12)
    if not varies.any():
        return None
    truth, value = reference[:, varies] / spread[varies], candidate[:, varies] / spread[varies]
    shares = []
    for one, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        before = frechet_distance(truth[other], truth[one])
        shares.append((frechet_distance(truth[other], value[one]) - before) / before)
    return float(abs(np.mean(shares)))


class Drift:
    """Collects paired pictures of one output during a certificate.

    Args:
        tensor: The picture among the outputs, with range and layout; None collects nothing.
        limit: Pictures that are looked at.
    """

    def __init__(self, tensor: TensorSpec | None, limit: int = 256) -> None:
        known = tensor is not None and tensor.range is not None and tensor.layout in ("NCHW", "NHWC")
        self.tensor = tensor if known else None
        self.limit = limit
        self.reference: list[Features] = []
        self.candidate: list[Features] = []
        self.count = 0

    def add(self, truth: dict[str, Array], value: dict[str, Array]) -> None:
        """The outputs of one call, reference's and candidate's."""
        if self.tensor is None or self.count >= self.limit or self.tensor.name not in value:
            return
        assert self.tensor.range is not None
        pair = truth[self.tensor.name], value[self.tensor.name]
        if pair[0].shape != pair[1].shape or pair[0].ndim != 4:
            return
        if not (np.isfinite(pair[0]).all() and np.isfinite(pair[1]).all()):
            return  # the certificate has counted them
        for into, pictures in zip((self.reference, self.candidate), pair, strict=True):
            into.append(picture_features(pictures, str(self.tensor.layout), self.tensor.range))
        self.count += len(pair[0])

    def result(self) -> float | None:
        """:func:`movement` over what was collected; None where there is too little."""
        if not self.reference:
            return None
        return movement(np.concatenate(self.reference), np.concatenate(self.candidate))
