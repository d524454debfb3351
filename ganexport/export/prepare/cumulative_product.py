"""``torch.cumprod``, for which ONNX has no operator, in log2(n) products with shifted copies.

Volume rendering multiplies transmittances along each ray with it (NeRF, Mildenhall et al. 2020, arXiv 2003.08934;
pi-GAN; EG3D).
"""

from __future__ import annotations

from typing import Any

import torch

from ganexport.export.prepare._rewriting import Rewriting, arguments


class ScannedProduct(Rewriting):
    """Answers cumulative products along an axis of fixed length (Hillis and Steele's scan, CACM 29(12), 1986)."""

    line = "scanned-product: {} cumulative products in steps of doubling length"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        if func not in (torch.cumprod, torch.Tensor.cumprod) or kwargs.get("out") is not None:
            return NotImplemented
        given = arguments(("input", "dim"), args, kwargs)
        value, dim = given.get("input"), given.get("dim")
        if not isinstance(value, torch.Tensor) or not isinstance(dim, int) or not value.ndim:
            return NotImplemented
        length = value.shape[dim]
        if not isinstance(length, int):
            return NotImplemented
        kept = value.dtype if value.is_floating_point() or value.is_complex() else torch.int64
        value = value.to(given.get("dtype") or kept)
        reach = 1
        while reach < length:
            before = value.narrow(dim, 0, length - reach)
            value = value * torch.cat([torch.ones_like(value.narrow(dim, 0, reach)), before], dim)
            reach *= 2
        return value
