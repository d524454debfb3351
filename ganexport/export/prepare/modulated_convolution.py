"""Convolution with a weight per sample, folded into groups, rewritten so that the batch stays symbolic.

StyleGAN2 (Karras et al. 2020, section 2.2) modulates the weights by the style and folds the batch
into the groups of one convolution, x [1, B·I, H, W] with w [B·O, I, k, k] and groups = B. ONNX has
no symbolic group count, so exporters fix the batch or fail. The same sums written as patches times
weights, [B, O, I·k·k] @ [B, I·k·k, P], leave the batch free.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it

from ganexport.export.prepare._rewriting import Rewriting

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, F.conv1d: 1, F.conv2d: 2}
_TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, F.conv_transpose1d: 1, F.conv_transpose2d: 2}


class PerSampleConvolution(Rewriting):
    """Rewrites convolutions whose groups are the batch; all others run as they are."""

    line = "per-sample-convolution: {} grouped convolutions as patches times weights"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        rewrite = _rewrite_of(func)
        if rewrite is None:
            return NotImplemented
        transposed, rank = rewrite
        given = _arguments(transposed, args, kwargs)
        if not _per_sample(given, transposed):
            return NotImplemented
        operands = {name: _pair(given[name], rank) for name in ("stride", "dilation", "output_padding")}
        padding = given["padding"] if isinstance(given["padding"], str) else _pair(given["padding"], rank)
        run = _transposed if transposed else _plain
        return run(given["input"], given["weight"], given["bias"], given["groups"], padding, rank, **operands)


def _rewrite_of(func: Any) -> tuple[bool, int] | None:
    try:
        if func in _CONVOLUTIONS:
            return False, _CONVOLUTIONS[func]
        if func in _TRANSPOSED:
            return True, _TRANSPOSED[func]
    except TypeError:
        pass
    return None


def _arguments(transposed: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ["input", "weight", "bias", "stride", "padding"]
    names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    values: dict[str, Any] = {
        "bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1,
    }  # fmt: skip
    return values | dict(zip(names, args, strict=False)) | kwargs


def _per_sample(given: dict[str, Any], transposed: bool) -> bool:
    """A computed weight, one sample in front, and more than one group or a symbolic number of them."""
    groups, weight, value = given["groups"], given["weight"], given["input"]
    if isinstance(weight, torch.nn.Parameter) or value.ndim != weight.ndim or value.shape[0] != 1:
        return False
    symbolic = isinstance(groups, torch.SymInt) or (isinstance(groups, torch.Tensor) and groups.ndim == 0)
    return symbolic or (isinstance(groups, int) and groups > 1 and value.shape[1] // groups > 1)


def _pair(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value) * (rank if len(value) == 1 else 1)


def _plain(
    x: torch.Tensor, w: torch.Tensor, bias: Any, groups: Any, padding: Any, rank: int, *,
    stride: tuple[int, ...], dilation: tuple[int, ...], output_padding: tuple[int, ...],
) -> torch.Tensor:  # fmt: skip
    spatial, kernel = list(x.shape[2:]), list(w.shape[2:])
    channels = w.shape[1]
    x = x.reshape(-1, channels, *spatial)  # [B, I, H, W]
    w = w.reshape(x.shape[0], -1, channels, *kernel)  # [B, O, I, k, k]
    if isinstance(padding, str):
        sides = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [(total // 2, total - total // 2) for total in sides]
    else:
        pads = [(p, p) for p in padding]
    return _correlate(x, w, bias, pads, stride, dilation, kernel, rank)


def _transposed(
    x: torch.Tensor, w: torch.Tensor, bias: Any, groups: Any, padding: Any, rank: int, *,
    stride: tuple[int, ...], dilation: tuple[int, ...], output_padding: tuple[int, ...],
) -> torch.Tensor:  # fmt: skip
    kernel, outputs = list(w.shape[2:]), w.shape[1]
    spatial = list(x.shape[2:])
    # The input channels of one sample: weights carry B·I rows, x carries B·I channels; I is B's cofactor.
    batch = groups if not isinstance(groups, torch.Tensor) else int(groups)
    x = x.reshape(batch, -1, *spatial)  # [B, I, H, W]
    w = w.reshape(batch, -1, outputs, *kernel).transpose(1, 2)  # [B, O, I, k, k]
    w = w.flip([3 + axis for axis in range(rank)])
    for axis in range(rank):
        x = _insert_zeros(x, 2 + axis, stride[axis])
    pads = [
        (d * (k - 1) - p, d * (k - 1) - p + o)
        for k, p, d, o in zip(kernel, padding, dilation, output_padding, strict=True)
    ]
    return _correlate(x, w, bias, pads, (1,) * rank, dilation, kernel, rank)


def _insert_zeros(x: torch.Tensor, axis: int, stride: int) -> torch.Tensor:
    """stride - 1 zeros between neighbours along an axis."""
    if stride == 1:
        return x
    size = x.shape[axis]
    spread = torch.stack([x, *[torch.zeros_like(x)] * (stride - 1)], dim=axis + 1)
    shape = [*x.shape[:axis], size * stride, *x.shape[axis + 1 :]]
    return spread.reshape(shape).narrow(axis, 0, size * stride - (stride - 1))


def _correlate(
    x: torch.Tensor, w: torch.Tensor, bias: Any, pads: list[tuple[int, int]],
    stride: tuple[int, ...], dilation: tuple[int, ...], kernel: list[int], rank: int,
) -> torch.Tensor:  # fmt: skip
    """x [B, I, …] with one weight [B, O, I, …] a sample, as patches times weights; returns [1, B·O, …]."""
    flat = [amount for pair in reversed(pads) for amount in pair]
    if any(flat):
        x = F.pad(x, flat)
    sizes = [(x.shape[2 + a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in range(rank)]
    taps = []
    for offset in _offsets(kernel):
        tap = x
        for axis, position in enumerate(offset):
            start = position * dilation[axis]
            stop = start + (sizes[axis] - 1) * stride[axis] + 1
            index: list[Any] = [slice(None)] * tap.ndim
            index[2 + axis] = slice(start, stop, stride[axis])
            tap = tap[tuple(index)]
        taps.append(tap.flatten(2))  # [B, I, P]
    patches = torch.cat(taps, dim=1)  # [B, k·k·I, P]
    matrix = w.movedim(2, -1).flatten(2)  # [B, O, k·k·I]
    out = torch.matmul(matrix, patches)  # [B, O, P]
    if bias is not None:
        out = out + bias.reshape(out.shape[0], -1, 1)
    return out.reshape(1, -1, *sizes)


def _offsets(kernel: list[int]) -> list[tuple[int, ...]]:
    import itertools

    return list(itertools.product(*(range(size) for size in kernel)))
