"""``F.fold``, which sums overlapping patches, as a transposed convolution whose kernel puts each value in its place.

Vocoders overlap and add their frames with it (Vocos, Siuzdak 2023, arXiv 2306.00814); TensorRT has no Col2Im.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode


class FoldAsConvolution(TorchFunctionMode):
    """Answers folds whose patches tile the output without a rest.

    Attributes:
        count: How many calls were changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Called by torch for every function."""
        kwargs = kwargs or {}
        if func is not F.fold:
            return func(*args, **kwargs)
        names = ("input", "output_size", "kernel_size", "dilation", "padding", "stride")
        given = {"dilation": 1, "padding": 0, "stride": 1} | dict(zip(names, args, strict=False)) | kwargs
        made = _folded(**given)
        self.count += made is not None
        return func(*args, **kwargs) if made is None else made


def _folded(
    input: torch.Tensor, output_size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any  # noqa: A002
) -> torch.Tensor | None:  # fmt: skip
    size, kernel, dilation, padding, stride = map(_pair, (output_size, kernel_size, dilation, padding, stride))
    if input.ndim not in (2, 3):
        return None
    spans = [n + 2 * p - d * (k - 1) - 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    if not all(statically_known_true(span % s == 0) for span, s in zip(spans, stride, strict=True)):
        return None
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
