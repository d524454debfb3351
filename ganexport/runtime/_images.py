"""An engine's output as pictures: uint8, NHWC."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ganexport.errors import ArtifactError, UsageError
from ganexport.runtime.base import Array
from ganexport.spec import GeneratorSpec, TensorSpec

#: Values worked on at a time: what stays in the processor's cache, and too little to ask the system for new memory.
_PIECE = 1 << 14
#: Channels up to which one after the other is faster.
_FEW_CHANNELS = 8
_ZERO, _FULL = np.float32(0.0), np.float32(255.0)


def image_tensor(spec: GeneratorSpec) -> TensorSpec:
    """The output that holds pictures.

    Raises:
        UsageError: There is none, or its values' range is not declared.
    """
    tensor = spec.image_output
    if tensor is None:
        kinds = ", ".join(f"{t.name} [{', '.join(map(str, t.shape))}]" for t in spec.outputs)
        unsaid = next((t for t in spec.outputs if len(t.shape) == 4 and t.layout is None), None)
        hint = (
            f'; if {unsaid.name} is one, say so: ganexport convert … --output "{unsaid.name}=[-1,1]:NCHW"'
            if unsaid
            else ""
        )
        raise UsageError(
            f"this generator's outputs are not declared to be images ({kinds}): use .sample(n, seed) for arrays, "
            f"or ganexport generate --format npz{hint}"
        )
    if tensor.dtype != "uint8" and tensor.range is None:
        raise UsageError(
            f"output {tensor.name!r} declares no range of values, so it cannot become pictures: use .sample(n, seed), "
            f'or convert with --output "{tensor.name}=[-1,1]:{tensor.layout}"'
        )
    return tensor


def to_uint8(array: Array, tensor: TensorSpec) -> Array:
    """Pictures as bytes: value ``low`` of the declared range is 0, ``high`` is 255, rounded half up.

    Args:
        array: [batch, C, H, W] or [batch, H, W, C] as ``tensor.layout`` says.
        tensor: The output's spec; uint8 outputs pass through with only their layout changed.

    Returns:
        [batch, H, W, C] uint8, owned by the caller.

    Raises:
        ArtifactError: NaN among the values.
    """
    if array.dtype == np.uint8:
        return _to_nhwc(array, tensor.layout)
    if array.size <= _PIECE:
        return _to_nhwc(_scaled(array, tensor).astype(np.uint8), tensor.layout)
    if tensor.layout == "NCHW":
        batch, channels, height, width = array.shape
        pictures = np.empty((batch, height, width, channels), np.uint8)
        target, rows = pictures.transpose(0, 3, 1, 2), 2
    else:
        pictures = target = np.empty(array.shape, np.uint8)
        rows = 1
    for piece in _pieces(array.shape, rows):
        _interleave(target[piece], _scaled(array[piece], tensor), tensor.layout)
    return pictures


def _interleave(target: Array, source: Array, layout: str | None) -> None:
    """Copy values from 0 to 255 into bytes; NCHW channel by channel, which numpy does several times as fast."""
    channels = source.shape[1]
    if layout != "NCHW" or not 1 < channels <= _FEW_CHANNELS:
        np.copyto(target, source, casting="unsafe")
        return
    whole = source if source.dtype == np.uint8 else source.astype(np.uint8)
    for channel in range(channels):
        target[:, channel] = whole[:, channel]


def _pieces(shape: tuple[int, ...], rows: int) -> Iterator[tuple[slice, ...]]:
    """An array of pictures cut into some pictures each, or some rows of one, that stay in the processor's cache."""
    a_row = math.prod(shape[1:]) // shape[rows]
    pictures = max(1, _PIECE // (a_row * shape[rows]))
    height = shape[rows] if pictures > 1 else max(1, _PIECE // a_row)
    for first in range(0, shape[0], pictures):
        for top in range(0, shape[rows], height):
            piece = [slice(None)] * len(shape)
            piece[0], piece[rows] = slice(first, first + pictures), slice(top, top + height)
            yield tuple(piece)


def _scaled(array: Array, tensor: TensorSpec) -> Array:
    """The values as float32 from 0 to 255, to be cut to whole numbers."""
    assert tensor.range is not None
    low, high = tensor.range
    scale = 255.0 / (high - low)
    value: Array = array * np.float32(scale)
    value += np.float32(0.5 - low * scale)
    # The smallest value is NaN when any is: one pass finds both NaN and whether there is anything to clip.
    least = value.item(value.argmin()) if value.size else 0.0
    if math.isnan(least):
        raise ArtifactError(
            f"output {tensor.name!r} holds NaN: the engine computes wrongly for these inputs; run ganexport verify"
        )
    if least < 0.0:
        np.maximum(value, _ZERO, out=value)
    np.minimum(value, _FULL, out=value)
    return value


def _to_nhwc(array: Array, layout: str | None) -> Array:
    if layout != "NCHW":
        return array
    batch, channels, height, width = array.shape
    if channels == 1:
        return array.reshape(batch, height, width, 1)
    pictures = np.empty((batch, height, width, channels), array.dtype)
    _interleave(pictures.transpose(0, 3, 1, 2), array, layout)
    return pictures
