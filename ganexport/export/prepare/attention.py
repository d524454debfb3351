"""Scaled dot-product attention of any rank as the rank-4 one that exporters have a form for.

``F.scaled_dot_product_attention`` takes [..., length, channels]; the ONNX exporter knows
[batch, heads, length, channels] alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch.overrides import TorchFunctionMode


class FourDimensionalAttention(TorchFunctionMode):
    """Gives attention of rank 2 or 3 the missing axes, one head, and takes them away again.

    Attributes:
        count: How many calls were changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Called by torch for every function."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        rank = given["query"].ndim
        if rank not in (2, 3) or len(args) > 4 or any(given[name].ndim != rank for name in ("key", "value")):
            return func(*args, **kwargs)
        self.count += 1
        for name in ("query", "key", "value", "attn_mask"):
            tensor = given.get(name)
            # A mask of lower rank broadcasts from the right as it is; one of full rank needs the axes too.
            if isinstance(tensor, torch.Tensor) and tensor.ndim == rank:
                given[name] = tensor[None, None] if rank == 2 else tensor[:, None]
        result = func(**given)  # [batch, 1, length, channels]
        return result[0, 0] if rank == 2 else result.squeeze(1)
