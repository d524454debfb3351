"""Scaled dot-product attention of any rank as the rank-4 one that exporters have a form for.

``F.scaled_dot_product_attention`` takes [..., length, channels]; the ONNX exporter knows
[batch, heads, length, channels] alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it

from ganexport.export.prepare._rewriting import Rewriting, arguments


class FourDimensionalAttention(Rewriting):
    """Gives attention of rank 2 or 3 the missing axes, one head, and takes them away again."""

    line = "four-dimensional-attention: {} attentions given a head axis"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        if func is not F.scaled_dot_product_attention:
            return NotImplemented
        given = arguments(("query", "key", "value", "attn_mask"), args, kwargs)
        rank = given["query"].ndim
        if rank not in (2, 3) or len(args) > 4 or any(given[name].ndim != rank for name in ("key", "value")):
            return NotImplemented
        for name in ("query", "key", "value", "attn_mask"):
            tensor = given.get(name)
            # A mask of lower rank broadcasts from the right as it is; one of full rank needs the axes too.
            if isinstance(tensor, torch.Tensor) and tensor.ndim == rank:
                given[name] = tensor[None, None] if rank == 2 else tensor[:, None]
        result = func(**given)  # [batch, 1, length, channels]
        return result[0, 0] if rank == 2 else result.squeeze(1)
