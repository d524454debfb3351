"""``F.fold``, which sums overlapping patches, as a transposed convolution whose kernel puts each value in its place.

Vocoders overlap and add their frames with it (Vocos, Siuzdak 2023, arXiv 2306.00814); TensorRT has no Col2Im.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ganexport.export.prepare._rewriting import Rewriting


class FoldAsConvolution(Rewriting):
    """Answers folds whose patches tile the output without a rest."""

    line = "fold-convolution: {} folds as transposed convolutions"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        return _folded(*args, **kwargs) if func is F.fold else NotImplemented


def _folded(
    input: torch.Tensor,  # noqa: A002 - torch's name for it
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Any:
    """:func:`F.fold`; its arguments and its result. NotImplemented where patches leave a rest."""
    size, kernel, dilation, padding, stride = map(_pair, (output_size, kernel_size, dilation, padding, stride))
    if input.ndim not in (2, 3):
        return NotImplemented
    spans = [n + 2 * p - d * (k - 1) - 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    if not all(statically_known_true(span % s == 0) for span, s in zip(spans, stride, strict=True)):
        return NotImplemented
    places = kernel[0] * kernel[1]
    value = input if input.ndim == 3 else input[None]  # [B, C k k, patches]
    channels = value.shape[1] // places
    value = value.unflatten(2, [span // s + 1 for span, s in zip(spans, stride, strict=True)])
    one_each = np.tile(np.eye(places).reshape(places, 1, *kernel), (channels, 1, 1, 1))
    weight = torch.tensor(one_each, dtype=value.dtype, device=value.device)
    made = F.conv_transpose2d(value, weight, None, stride, padding, 0, channels, dilation)
    return made if input.ndim == 3 else made[0]


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, tuple | list | torch.Size):
        return (value[0], value[1]) if len(value) == 2 else (value[0], value[0])
    return value, value
