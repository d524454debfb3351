"""Adaptive pooling of a symbolic height or width, as sums over windows found at run time: exporters fix the windows.

Pyramid pooling and heads of a fixed size use it (Zhao et al. 2017, arXiv 1612.01105). Bin i of k over n places holds
those from floor(i n / k) to ceil((i + 1) n / k).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it

from ganexport.export.prepare._rewriting import Rewriting, arguments

_AVERAGE = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}
_LARGEST = {F.adaptive_max_pool1d: 1, F.adaptive_max_pool2d: 2, F.adaptive_max_pool3d: 3}


class FreeSizePooling(Rewriting):
    """Averages as products with a matrix of shares, maxima over masked copies, an axis at a time."""

    line = "adaptive-pooling: {} poolings whose windows follow the input's size"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        axes = _AVERAGE.get(func) or _LARGEST.get(func)
        if axes is None:
            return NotImplemented
        given = arguments(("input", "output_size", "return_indices"), args, kwargs)
        value, wanted = given["input"], given["output_size"]
        bins: list[Any] = [wanted] * axes if isinstance(wanted, int | torch.SymInt | None) else list(wanted)
        sizes = value.shape[-axes:]
        if given.get("return_indices") or not all(k is None or isinstance(k, int) for k in bins):
            return NotImplemented
        if all(k == 1 for k in bins):  # one window, whatever the size
            return NotImplemented
        if not any(isinstance(n, torch.SymInt) and k is not None for n, k in zip(sizes, bins, strict=True)):
            return NotImplemented
        pool = _average if func in _AVERAGE else _largest
        for axis, (size, k) in enumerate(zip(sizes, bins, strict=True), start=-axes):
            if k is not None:
                value = pool(value.transpose(axis, -1), size, k).transpose(axis, -1)
        return value


def _windows(size: Any, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[k, size] which places are in which bin, and [k, 1] how many each has."""
    index = torch.arange(size, device=device)
    n = index[-1:] + 1  # a tensor: ONNX has no division of a symbolic size
    row = torch.arange(k, device=device)[:, None]
    start = torch.div(row * n, k, rounding_mode="floor")
    end = torch.div((row + 1) * n + k - 1, k, rounding_mode="floor")
    return (index >= start) & (index < end), end - start


def _average(value: torch.Tensor, size: Any, k: int) -> torch.Tensor:
    """[…, k] of […, size]."""
    if k == 1:
        return value.mean(-1, keepdim=True)
    inside, count = _windows(size, k, value.device)
    return value @ (inside.to(value.dtype) / count.to(value.dtype)).T


def _largest(value: torch.Tensor, size: Any, k: int) -> torch.Tensor:
    """[…, k] of […, size]."""
    if k == 1:
        return value.amax(-1, keepdim=True)
    inside, _ = _windows(size, k, value.device)
    lowest = torch.full((), torch.finfo(value.dtype).min, dtype=value.dtype, device=value.device)
    return torch.where(inside, value[..., None, :], lowest).amax(-1)
